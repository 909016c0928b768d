"""Pretraining on a corpus, and adaptation to a user's own unlabelled cells: the only tasks that run the loop."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.config import AnchorObjectiveConfig, FileConfig, LoopConfig, RunConfig
from scdiva.data.loader import fixed_minibatches, ordered_blocks
from scdiva.data.reader import MIN_COVERAGE, CellCorpus, CellsInMemory, CountsReader, list_sources, open_counts
from scdiva.data.source import open_source
from scdiva.data.splits import hold_out
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import ConfigError
from scdiva.genes import GeneVocabulary
from scdiva.models.scdiva.init import MAX_CELLS, init_network
from scdiva.models.scdiva.model import ScDiVa
from scdiva.models.scdiva.network import AnchorNetwork
from scdiva.models.scdiva.objectives import SplitProfileObjective
from scdiva.training import FitResult, fit
from scdiva.types import CellCollection

if TYPE_CHECKING:
    from scdiva.data.source import DataLike

log = logging.getLogger(__name__)

BUNDLE = "bundle"
"""Folder of the finished model within the folder of a run."""

MAX_CELLS_IN_MEMORY = 200_000
"""Corpora up to this size are read once; larger ones are read from disk block by block, in every epoch."""

_BLOCK = 2048
# tags of the random streams that this file draws from a run's seed
_SPLIT_STREAM, _SVD_STREAM = 64, 65


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """The result of a run.

    Parameters
    ----------
    model
        With the best weights, as saved.
    path
        Its bundle.
    fit
        What the loop reached.
    metrics
        Terms of the loss on the held-out cells, nats per UMI: ``profile_nll``, and ``profile_nll_floor``, the mean
        profile that knows nothing of the cell.
    """

    model: ScDiVa
    path: Path
    fit: FitResult
    metrics: Mapping[str, float]


def pretrain(config: RunConfig, out_dir: str | Path, *, progress: bool = True) -> TrainedModel:
    """Train a model from a corpus; the same call again goes on where the last one was interrupted.

    Parameters
    ----------
    config
        The run; ``config.data.files`` names the corpus.
    out_dir
        Folder of the run: checkpoints, logs, curve, and the finished model in ``bundle``.
    progress
        Show a progress bar on a terminal.

    Raises
    ------
    ConfigError
        No files, or batches to exclude that do not exist.
    SourceError, ScaleError, GeneError, KeyNotFoundError
        A file of the corpus cannot be used; names the first.
    TrainingError, NonFiniteLossError
        See :func:`scdiva.training.fit`.
    """
    out = Path(out_dir)
    if not config.data.files:
        raise ConfigError(
            "data.files is empty", expected="the files of the corpus", fix="name them in the configuration"
        )
    corpus = open_corpus_of(config, GeneVocabulary.default())
    vocabulary = _seen_genes(corpus, config.data.min_cells_per_gene)
    corpus = open_corpus_of(config, vocabulary)
    cells = _in_memory(corpus)
    files = [file for file, _ in _sources_of(config)]
    groups = corpus.groups([file.batch_key for file in files])
    train, heldout = hold_out(groups, config.data.heldout_fraction, np.random.default_rng([config.seed, _SPLIT_STREAM]))
    log.info(
        "%s cells to train on, %s held out, %s genes", f"{train.size:,}", f"{heldout.size:,}", f"{vocabulary.n_genes:,}"
    )
    statistics = GeneStatistics.from_blocks(ordered_blocks(cells, _BLOCK, indices=train))
    network = AnchorNetwork(vocabulary.n_genes, config.model)
    if config.model.init == "svd":
        rng = np.random.default_rng([config.seed, _SVD_STREAM])
        chosen = train if train.size <= MAX_CELLS else np.sort(rng.choice(train, MAX_CELLS, replace=False))
        blocks = ordered_blocks(cells, _BLOCK, indices=chosen)
        n_components = min(config.model.n_latent, config.model.n_embedding)
        init_network(network, statistics, blocks, n_components, seed=config.seed)
    else:
        with torch.no_grad():
            network.log_profile.copy_(torch.from_numpy(statistics.log_mean_profile()))
    objective = SplitProfileObjective(network, config.objective)
    identity = {"content_of_the_files": _content_hash(corpus, statistics)}
    fitted, metrics = _fit(objective, cells, train, heldout, config, out, identity, progress=progress)
    details = {
        "name": config.name or out.name,
        "description": config.description,
        "license": config.licence,
        "trained_heads": ["anchor", "profile_decoder"],
        "training": _training_record(corpus, groups, train, heldout, fitted, config, [f.licence for f in files]),
        "metrics": metrics,
    }
    model = ScDiVa(network, config.model, vocabulary, statistics, details=details)
    return _saved(model, out, fitted, metrics)


def adapt(
    data: DataLike,
    model: ScDiVa,
    out_dir: str | Path,
    *,
    config: LoopConfig | None = None,
    objective: AnchorObjectiveConfig | None = None,
    seed: int = 0,
    layer: str | None = None,
    batch_key: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    progress: bool = True,
) -> TrainedModel:
    """Continue the training of a model on a user's own unlabelled cells.

    Nothing is learned from labels. The mean profile of the decoder starts at that of the new cells; everything else
    starts at the model. Training stops when the held-out cells no longer gain; if they gain nothing at all, the
    embedding is that of the model.

    Parameters
    ----------
    data
        AnnData or path.
    model
        The model to start from; it is not changed.
    out_dir
        Folder of the run; the adapted model goes to ``bundle`` in it.
    config
        Loop settings; :func:`adaptation_config` if left out.
    objective
        Loss settings; those for small data if left out.
    seed
        Seed of the run, where ``config`` is left out.
    layer, min_coverage
        As in :func:`scdiva.tl.embed`.
    batch_key
        Column of ``.obs`` with donors or batches; whole ones are held out where there is more than one.

    Raises
    ------
    SourceError, ScaleError, GeneError, KeyNotFoundError
        The data cannot be used.
    TrainingError, NonFiniteLossError
        See :func:`scdiva.training.fit`.
    """
    out = Path(out_dir)
    reader = open_counts(open_source(data), model.vocabulary, layer=layer, min_coverage=min_coverage)
    corpus = CellCorpus((reader,), (None,))
    cells = _in_memory(corpus)
    loop = config or adaptation_config(len(cells), seed=seed)
    settings = objective or ADAPTATION_OBJECTIVE
    groups = corpus.groups([batch_key])
    train, heldout = hold_out(groups, loop.data.heldout_fraction, np.random.default_rng([loop.seed, _SPLIT_STREAM]))
    network = AnchorNetwork(model.vocabulary.n_genes, model.config)
    network.load_state_dict(model.network.state_dict())
    own = GeneStatistics.from_blocks(ordered_blocks(cells, _BLOCK, indices=train))
    with torch.no_grad():
        network.log_profile.copy_(torch.from_numpy(own.log_mean_profile()))
    identity = {
        "content_of_the_files": _content_hash(corpus, own),
        "model_to_start_from": _weights_hash(model),
        "objective": settings.model_dump_json(),
    }
    fitted, metrics = _fit(
        SplitProfileObjective(network, settings), cells, train, heldout, loop, out, identity, progress=progress
    )
    record = _training_record(corpus, groups, train, heldout, fitted, loop, ["the user's own data"])
    details = {
        **model.details,
        "name": f"{model.name}-adapted",
        "description": f"{model.name}, adapted to {reader.source.name} without labels.",
        "training": {**record, "base_model": model.name, "base_model_hash": model.bundle_hash},
        "metrics": metrics,
    }
    adapted = ScDiVa(network, model.config, model.vocabulary, model.statistics, details=details, labels=model.labels)
    return _saved(adapted, out, fitted, metrics)


ADAPTATION_OBJECTIVE = AnchorObjectiveConfig()
"""Loss settings of :func:`adapt` (chosen by docs/experiments.md)."""


def adaptation_config(n_cells: int, *, seed: int = 0) -> LoopConfig:
    """Return the loop settings of :func:`adapt` for a data set of some size (chosen by docs/experiments.md)."""
    return LoopConfig.model_validate(
        {
            "seed": seed,
            "data": {"heldout_fraction": 0.1},
            "optim": {"lr": 1e-3, "warmup_steps": 20, "ema_decay": 0.99},
            "training": {
                "max_steps": 600,
                "batch_size": min(128, max(16, n_cells // 8)),
                "validate_every": 25,
                "patience": 4,
                "checkpoint_every": 100,
            },
        }
    )


def open_corpus_of(config: RunConfig, vocabulary: GeneVocabulary) -> CellCorpus:
    """Open the files of a run as one corpus, without the batches that the run leaves out.

    Raises
    ------
    ConfigError
        ``exclude_batches`` names batches that do not exist, or comes without ``batch_key``.
    SourceError, ScaleError, GeneError, KeyNotFoundError
        A file cannot be used; names the first.
    """
    readers: list[CountsReader] = []
    rows: list[NDArray[np.int64] | None] = []
    for file, path in _sources_of(config):
        reader = open_counts(path, vocabulary, layer=file.layer, min_coverage=config.data.min_coverage)
        readers.append(reader)
        if not file.exclude_batches:
            rows.append(None)
            continue
        if file.batch_key is None:
            raise ConfigError(
                f"{file.path}: exclude_batches without batch_key", expected="both", fix="name the .obs column"
            )
        batch = reader.source.column(file.batch_key).astype(str).to_numpy()
        unknown = sorted(set(file.exclude_batches) - set(batch))
        if unknown:
            raise ConfigError(
                f"{file.path} has no batch {', '.join(unknown)} to exclude",
                expected=f"some of {', '.join(sorted(set(batch))[:20])}",
                fix="correct exclude_batches",
            )
        kept = np.flatnonzero(~np.isin(batch, file.exclude_batches))
        if kept.size == 0:
            raise ConfigError(
                f"exclude_batches leaves no cell of {file.path}",
                expected="some batches to train on",
                fix="leave the file out, or exclude fewer batches",
            )
        rows.append(kept)
    return CellCorpus(tuple(readers), tuple(rows))


def _sources_of(config: RunConfig) -> list[tuple[FileConfig, Path]]:
    """Return every source of the corpus with its settings; a folder of files stands for all of them."""
    root = Path(config.data.root)
    return [(file, path) for file in config.data.files for path in list_sources([root / file.path])]


def _seen_genes(corpus: CellCorpus, min_cells: int) -> GeneVocabulary:
    """Return the vocabulary of the genes that enough cells of the corpus express."""
    n_detected = np.zeros(corpus.vocabulary.n_genes, dtype=np.int64)
    for block in ordered_blocks(corpus, _BLOCK):
        n_detected += np.bincount(block.counts.indices, minlength=n_detected.size)
    is_seen = n_detected >= min_cells
    if not is_seen.any():
        raise ConfigError(
            f"data.min_cells_per_gene = {min_cells}: no gene is detected in so many cells",
            expected=f"at most {n_detected.max()}, the cells of the most frequent gene",
            fix="lower data.min_cells_per_gene",
        )
    return corpus.vocabulary.subset(is_seen)


def _in_memory(corpus: CellCorpus) -> CellCollection:
    return CellsInMemory.of(corpus) if len(corpus) <= MAX_CELLS_IN_MEMORY else corpus


def _fit(
    objective: SplitProfileObjective,
    cells: CellCollection,
    train: NDArray[np.int64],
    heldout: NDArray[np.int64],
    config: LoopConfig,
    out: Path,
    identity: Mapping[str, str],
    *,
    progress: bool,
) -> tuple[FitResult, dict[str, float]]:
    fitted = fit(
        objective,
        cells,
        train_indices=train,
        heldout_indices=heldout,
        config=config,
        out_dir=out,
        monitor="profile_nll",
        identity=identity,
        progress=progress,
    )
    objective.eval()
    generator = torch.Generator().manual_seed(config.seed)
    totals: dict[str, float] = {}
    n_cells = 0
    with torch.inference_mode():
        for minibatch in fixed_minibatches(
            cells,
            heldout,
            objective.prepare,
            batch_size=config.training.batch_size,
            seed=config.seed,
            max_cells=config.training.n_validation_cells,
        ):
            output = objective(minibatch.inputs, generator)
            n_cells += output.n_cells
            for name, value in output.terms.items():
                totals[name] = totals.get(name, 0.0) + float(value) * output.n_cells
    return fitted, {f"heldout_{name}": total / n_cells for name, total in totals.items()}


def _training_record(
    corpus: CellCorpus,
    groups: NDArray[np.str_],
    train: NDArray[np.int64],
    heldout: NDArray[np.int64],
    fitted: FitResult,
    config: LoopConfig,
    licences: Sequence[str],
) -> dict[str, Any]:
    whole = sorted(set(groups[heldout]) - set(groups[train]))
    return {
        "n_cells": int(train.size),
        "n_heldout": int(heldout.size),
        "heldout": f"whole batches: {', '.join(whole)}" if whole else "cells at random: there is one batch only",
        "n_cells_seen": fitted.n_cells,
        "n_steps": fitted.last_step,
        "best_step": fitted.best_step,
        "seed": config.seed,
        "sources": [
            {
                "name": reader.source.name,
                "n_cells": int(size),
                "n_genes": reader.alignment.n_vocabulary_genes_present,
                "coverage": _coverage(reader, rows),
                "licence": licence,
            }
            for reader, rows, size, licence in zip(corpus.readers, corpus.rows, corpus.sizes, licences, strict=True)
        ],
    }


def _coverage(reader: CountsReader, rows: NDArray[np.int64] | None) -> float:
    inside = total = 0.0
    for block in ordered_blocks(reader, _BLOCK, indices=rows):
        inside, total = inside + float(block.counts.sum()), total + float(block.library_size.sum())
    return inside / total if total else 0.0


def _content_hash(corpus: CellCorpus, statistics: GeneStatistics) -> str:
    """Fingerprint what is trained on: sources, cell names, where the counts are, genes and the counts per gene."""
    digest = hashlib.sha256(corpus.vocabulary.fingerprint.encode())
    for reader in corpus.readers:
        digest.update(f"{reader.source.name}\n{reader.found.description}\n".encode())
        digest.update("\n".join(map(str, reader.source.obs.index)).encode())
    for array in (statistics.sum_counts, statistics.n_detected):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _weights_hash(model: ScDiVa) -> str:
    """Fingerprint the weights of a model, saved or not."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _saved(model: ScDiVa, out: Path, fitted: FitResult, metrics: dict[str, float]) -> TrainedModel:
    path = out / BUNDLE
    model.save_pretrained(path, overwrite=True)
    return TrainedModel(ScDiVa.from_pretrained(path, device="cpu"), path, fitted, metrics)
