"""``integrate``: an embedding in which cells lie together by what they are, not by the batch they come from.

The result is a model: it embeds the cells it was fitted to, and further cells of these or of other batches, without
being trained again, since its encoder never reads the batch.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from scdiva.config import IntegrationConfig, LoopConfig, NativeConfig
from scdiva.data.components import fit_components, log_cp10k, variable_genes
from scdiva.data.conditions import ConditionLabels, column_text, is_missing, refuse_missing_batches
from scdiva.data.reader import NamedCells, open_counts
from scdiva.data.source import open_source
from scdiva.data.splits import hold_out
from scdiva.data.thinning import thin_counts
from scdiva.errors import ConfigError, GeneError, OutputError, SourceError, UnsupportedError
from scdiva.metrics.generation_space import NotMeasurableError
from scdiva.metrics.integration import asw_label, batch_label_confounding, kmeans_agreement
from scdiva.models.neighbours import BatchNeighbours, cells_per_kind
from scdiva.models.scdiva.inputs import PackedCells
from scdiva.models.scdiva.integration import MONITOR, IntegrationData, IntegrationObjective, Score
from scdiva.models.scdiva.model import ScDiVa, build_network
from scdiva.models.scdiva.native import NativeNetwork
from scdiva.models.scdiva.whole_encoder import WholeEncoderObjective
from scdiva.tasks.embed import embed, embed_cells
from scdiva.types import CellCounts, Objective

if TYPE_CHECKING:
    from scdiva.data.source import DataLike
    from scdiva.training import FitResult

BUNDLE = "bundle"
"""Folder of the integrated model within the folder of a run."""
MAX_CELLS = 50_000
"""Cells that are trained on; of larger data a random part of each batch."""
MAX_COMPONENT_CELLS = 20_000
MIN_SHARED_GENES = 100
_BLOCK = 2048
_MIN_SCORED_CELLS = 20
_EXPECTED_MOLECULES = 20
_ENCODER_PASSES = 10
_VIEW_SHARES = (0.4, 0.8)
_MODEL_SCALE, _OWN_SCALE = 1 / 3, 1.0
"""Standard deviations of what the encoder reads of the model and of the data's own components (docs/experiments.md)."""
# tags of the random streams that this file draws from a seed
_SUBSET_STREAM, _SPLIT_STREAM, _VIEW_STREAM, _ORDER_STREAM = 128, 129, 130, 131

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Integrated:
    """The result of :func:`integrate`.

    Parameters
    ----------
    model
        Embeds cells of these and of other batches. It has an anchor and no trunk, and embeds z; where the whole encoder
        was trained it is the model that was given, fine-tuned, and embeds LayerNorm([z; h_LAT]).
    z
        ``(n_cells, n_latent)`` float32 embedding of the cells that were given.
    record
        What was done, for ``.uns``.
    """

    model: ScDiVa
    z: NDArray[np.float32]
    record: Mapping[str, Any]


def integrate(
    data: DataLike,
    model: ScDiVa,
    batch_key: str,
    *,
    label_key: str | None = None,
    layer: str | None = None,
    config: IntegrationConfig | None = None,
    loop: LoopConfig | None = None,
    out_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Integrated:
    """Integrate the batches of one file or AnnData.

    Parameters
    ----------
    data
        Raw counts.
    model
        A native model: its gene embeddings and vocabulary are used, or, with ``config.whole_encoder``, all of it; it is
        not changed.
    batch_key
        Column of ``.obs``; every cell has a batch.
    label_key
        Column of ``.obs`` with types, if the embedding may be trained on them (cells without one take part, too). An
        embedding that was shown the labels must not be judged by them as if it had not.
    layer
        Where the counts are; found if left out.
    config, loop, out_dir, seed, progress
        As for :func:`integrate_cells`.

    Raises
    ------
    SourceError
        Cells without a batch, or one batch only; a label column without two types.
    KeyNotFoundError, ScaleError, GeneError
        The data cannot be used.
    UnsupportedError, TrainingError, NonFiniteLossError, OutputError
        See :func:`integrate_cells`.
    """
    source = open_source(data)
    batch = column_text(source.column(batch_key))
    refuse_missing_batches(batch, f".obs[{batch_key!r}] of {source.name}")
    labels = None if label_key is None else column_text(source.column(label_key))
    reader = open_counts(source, model.vocabulary, layer=layer)
    rows = _some_of_each_batch(np.unique(batch, return_inverse=True)[1], seed)
    found = integrate_cells(
        reader.read(rows),
        batch[rows],
        model,
        labels=None if labels is None else labels[rows],
        config=config,
        loop=loop,
        out_dir=out_dir,
        seed=seed,
        progress=progress,
        name=source.name,
    )
    z = found.z
    if rows.size < batch.size:
        z = embed(open_counts(source, found.model.vocabulary, layer=layer, min_coverage=0.0), found.model).z
    record = {
        **found.record,
        "batch_key": batch_key,
        "label_key": label_key or "",
        "counts_in": reader.found.description,
        "genes": reader.alignment.counts(),
    }
    return Integrated(found.model, z, record)


def integrate_cells(
    cells: CellCounts,
    batch: NDArray[np.str_],
    model: ScDiVa,
    *,
    labels: NDArray[np.str_] | None = None,
    config: IntegrationConfig | None = None,
    loop: LoopConfig | None = None,
    out_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    name: str = "the cells",
    warns_of_absent_genes: bool = True,
) -> Integrated:
    """Integrate batches of cells that are in memory.

    Parameters
    ----------
    cells
        Raw counts in the order of the model's vocabulary. Genes that not all of their sources measure are left out, and
        counted.
    batch
        ``(n_cells,)`` names.
    model
        Native; not changed.
    labels
        ``(n_cells,)`` types, empty or "unassigned" where unknown; None: labels are not used.
    config
        The loss.
    loop
        The loop; :func:`loop_config` if left out.
    out_dir
        Folder of the run (log, curve, checkpoints, the model in ``bundle``), which the same call resumes; None: a
        temporary one.
    seed
        Seed of everything random, where ``loop`` is left out.
    progress
        Show a progress bar on a terminal.
    name
        Of the data, for messages and the model card.
    warns_of_absent_genes
        Say which batches lack genes that the others make one expect: a file that was joined from others may hold zeros
        for genes that were not measured.

    Raises
    ------
    SourceError
        Fewer than two batches, labels of fewer than two types, or other numbers of batches or labels than of cells.
    GeneError
        The sources share too few genes.
    ConfigError
        A supervised loss without labels.
    UnsupportedError
        The model is not native, or has no trunk although the whole encoder is to be trained.
    OutputError
        ``out_dir`` holds a bundle that no run of it has made.
    TrainingError, NonFiniteLossError, OutputError
        See :func:`scdiva.training.fit`.
    """
    # deferred: Lightning takes a second
    from scdiva.training import fit

    began = time.monotonic()
    model.native("integration")
    config = config or IntegrationConfig()
    if config.whole_encoder:
        _refuse_without_trunk(model)
    _refuse_foreign_bundle(out_dir)
    batches, code = _coded_batches(batch, cells.n_cells)
    types, label = _coded_labels(labels, cells.n_cells)
    is_supervised = bool(types) and config.supcon_weight > 0
    _refuse_without_labels(config, is_supervised)
    confounding = ""
    if types:
        known = label >= 0
        found = batch_label_confounding(np.array(types)[label[known]], np.array(batches)[code[known]])
        confounding = found.sentence
        log.info("%s: %s", name, confounding)
    cells, small, n_dropped = _shared_genes(cells, model, name)
    if warns_of_absent_genes:
        _warn_of_absent_genes(cells, code, batches, name)
    rows = _some_of_each_batch(code, seed)
    rows = rows[np.diff(cells.counts.indptr)[rows] > 0]
    n_empty = int((np.diff(cells.counts.indptr) == 0).sum())
    if n_empty:
        log.warning("%s: %d cells without counts are not trained on; all are mapped to one point", name, n_empty)
    chosen = replace(cells.take(rows), cell_index=np.arange(rows.size))
    # a caller's inference mode would take the gradients away
    with torch.inference_mode(False):
        has_score = is_supervised and config.stops_early
        loop = loop or loop_config(
            rows.size,
            seed=seed,
            device=model.device.type,
            stops_early=has_score,
            whole_encoder=config.whole_encoder,
        )
        train, heldout = np.arange(rows.size), np.zeros(0, dtype=np.int64)
        if has_score:
            rng = np.random.default_rng([loop.seed, _SPLIT_STREAM])
            train, heldout = hold_out(np.zeros(rows.size, dtype=str), loop.data.heldout_fraction, rng)
            _refuse_few_labels(label[rows][heldout], loop.data.heldout_fraction)
        of_cells = (code[rows], label[rows])
        score = _score if has_score else None
        if config.whole_encoder:
            setup = _whole_encoder(small, of_cells, train, config, loop, score)
        else:
            setup = _anchor_alone(chosen, of_cells, small, (train, heldout), config, loop, score, seed)
        folder = nullcontext(out_dir) if out_dir is not None else tempfile.TemporaryDirectory(prefix="scdiva-")
        with folder as out:
            fitted = fit(
                setup.objective,
                NamedCells(chosen, name, rows),
                train_indices=setup.drawn,
                heldout_indices=heldout,
                config=loop,
                out_dir=str(out),
                monitor=MONITOR if has_score else "loss",
                identity={
                    "content_of_the_cells": _content_hash(chosen, code[rows], label[rows]),
                    "model_to_start_from": model.weights_hash(),
                    "integration": config.model_dump_json(),
                },
                progress=progress,
            )
    used = {
        "batches": list(batches),
        "n_batches": len(batches),
        "supervised": is_supervised,
        "types": list(types),
        "confounding": confounding,
        "n_genes": int(cells.is_measured.all(axis=0).sum()),
        "n_genes_dropped": n_dropped,
        "n_empty_cells": n_empty,
        "n_cells_trained_on": int(rows.size),
        **setup.facts,
        "steps": fitted.best_step,
        "settings": config.model_dump_json(),
    }
    details = _details(small, name, used, train.size, heldout.size, fitted, loop, chosen)
    details["trained_heads"] = list(setup.trained)
    integrated = ScDiVa(
        setup.network, setup.sizes, small.vocabulary, small.statistics, details=details, labels=setup.labels
    )
    if out_dir is not None:
        integrated.save_pretrained(Path(out_dir) / BUNDLE, overwrite=True)
        integrated = ScDiVa.from_pretrained(Path(out_dir) / BUNDLE, device="cpu")
    integrated.to(str(model.device))
    z = embed_cells(integrated, cells)
    record = {**used, **integrated.provenance, "base_model": model.name, "base_model_hash": model.bundle_hash}
    return Integrated(integrated, z, {**record, "minutes": (time.monotonic() - began) / 60})


@dataclass(frozen=True, slots=True)
class _Setup:
    """What is trained, on which cells, and what becomes of it: the network of the objective, its sizes and labels."""

    objective: Objective
    network: NativeNetwork
    sizes: NativeConfig
    labels: ConditionLabels
    drawn: NDArray[np.int64]
    trained: tuple[str, ...]
    facts: Mapping[str, Any]


def _anchor_alone(
    cells: CellCounts,
    of_cells: tuple[NDArray[np.int64], NDArray[np.int64]],
    model: ScDiVa,
    split: tuple[NDArray[np.int64], NDArray[np.int64]],
    config: IntegrationConfig,
    loop: LoopConfig,
    score: Score | None,
    seed: int,
) -> _Setup:
    """Set up layers of an anchor on the model's gene embeddings and the data's own components."""
    data, network, sizes = _start(cells, *of_cells, model, config, seed)
    objective = IntegrationObjective(
        network, config, data, max_steps=loop.training.max_steps, heldout=split[1], score=score
    )
    facts = {
        "trained": "layers of an anchor",
        "n_pairs_across_batches": data.neighbours.n_pairs,
        "share_of_cells_with_such_a_pair": float(data.neighbours.has_across.mean()),
    }
    heads = ("anchor", *(["profile_decoder"] if config.reconstruction_weight > 0 else []))
    drawn = _balanced(split[0], data, config, loop)
    return _Setup(objective, network, sizes, ConditionLabels.none(), drawn, heads, facts)


def _whole_encoder(
    model: ScDiVa,
    of_cells: tuple[NDArray[np.int64], NDArray[np.int64]],
    train: NDArray[np.int64],
    config: IntegrationConfig,
    loop: LoopConfig,
    score: Score | None,
) -> _Setup:
    """Set up all of the model: anchor, gene embeddings, trunk."""
    objective = WholeEncoderObjective(model, config, *of_cells, max_steps=loop.training.max_steps, score=score)
    # heads that are not trained along no longer fit the trunk that they read
    heads = [head for head in model.details.get("trained_heads", ()) if head != "anchor"]
    trained = ("anchor", "trunk", *(heads if config.reconstruction_weight > 0 else []))
    facts = {"trained": "whole encoder", "max_tokens": objective.sizes.trunk.max_tokens}
    return _Setup(objective, objective.denoising.network, objective.sizes, model.labels, train, trained, facts)


def loop_config(
    n_cells: int,
    *,
    seed: int = 0,
    device: str = "auto",
    stops_early: bool = False,
    whole_encoder: bool = False,
) -> LoopConfig:
    """Return the settings of the training loop for so many cells (chosen by docs/experiments.md).

    Without labels nothing measurable tells a better step from a worse one, and the last one is kept. A whole encoder is
    trained on about ten passes over the cells, 100 to 1,000 steps of at most 128 cells (the paper: 50 passes, 256
    cells; ours is what a CPU does in minutes).
    """
    if whole_encoder:
        batch_size = int(np.clip(n_cells // 4, 16, 128))
        return LoopConfig.model_validate(
            {
                "seed": seed,
                "data": {"heldout_fraction": 0.1, "block_size": 1},
                "optim": {"lr": 1e-3, "warmup_steps": 20, "ema_decay": 0.95},
                "training": {
                    "max_steps": int(np.clip(_ENCODER_PASSES * n_cells // batch_size, 100, 1000)),
                    "batch_size": batch_size,
                    "validate_every": 25,
                    "patience": 6 if stops_early else 0,
                    "checkpoint_every": 100,
                    "keep_checkpoints": 1,
                    "log_every": 25,
                    "n_validation_cells": 2048,
                    "device": device if device in ("cpu", "cuda") else "auto",
                },
            }
        )
    return LoopConfig.model_validate(
        {
            "seed": seed,
            "data": {"heldout_fraction": 0.1, "block_size": 1},
            "optim": {"lr": 1e-3, "weight_decay": 1e-4, "warmup_steps": 20, "ema_decay": 0.95, "betas": (0.9, 0.999)},
            "training": {
                "max_steps": 600,
                "batch_size": int(np.clip(n_cells // 4, 16, 256)),
                "validate_every": 50,
                "patience": 6 if stops_early else 0,
                "checkpoint_every": 200,
                "log_every": 50,
                "n_validation_cells": 2048,
                # small matrices: half precision saves nothing, and cosines need more than eight bits
                "precision": "fp32",
                "device": device if device in ("cpu", "cuda") else "auto",
            },
        }
    )


def _coded_batches(batch: NDArray[np.str_], n_cells: int) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    names, code = np.unique(np.asarray(batch, dtype=str), return_inverse=True)
    if batch.size != n_cells or names.size < 2:
        raise SourceError(
            f"{names.size} batch{'es' if names.size != 1 else ''} ({', '.join(names[:3])}) of {batch.size} cells",
            expected=f"at least two, one name for each of the {n_cells} cells",
            fix="name the column that tells batches, donors or technologies apart",
        )
    return tuple(names.tolist()), code.astype(np.int64)


def _coded_labels(labels: NDArray[np.str_] | None, n_cells: int) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Return the types and the code of each cell; -1 where it has none."""
    if labels is None:
        return (), np.full(n_cells, -1, dtype=np.int64)
    names, code = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    is_known = np.array([not is_missing(name) for name in names])
    if labels.size != n_cells or is_known.sum() < 2:
        raise SourceError(
            f"{int(is_known.sum())} types of {labels.size} cells",
            expected=f"at least two types, one label for each of the {n_cells} cells",
            fix="name another column, or integrate without labels",
        )
    position = np.where(is_known, np.cumsum(is_known) - 1, -1)
    return tuple(names[is_known].tolist()), position[code].astype(np.int64)


def _shared_genes(cells: CellCounts, model: ScDiVa, name: str) -> tuple[CellCounts, ScDiVa, int]:
    """Leave out genes that not all sources measure: they would tell the sources apart."""
    is_shared = np.asarray(cells.is_measured.all(axis=0))
    n_dropped = int(cells.is_measured.any(axis=0).sum() - is_shared.sum())
    if is_shared.sum() < MIN_SHARED_GENES:
        raise GeneError(
            f"all batches of {name} measure {int(is_shared.sum())} genes that the model knows",
            expected=f"at least {MIN_SHARED_GENES}",
            fix="check gene names: scdiva check",
        )
    if n_dropped:
        log.warning("%s: %d genes that not all batches measure are left out", name, n_dropped)
        cells = cells.with_genes(is_shared)
    smaller = CellCounts(
        counts=sp.csr_matrix(cells.counts[:, np.flatnonzero(is_shared)]),
        library_size=cells.library_size,
        cell_index=np.arange(cells.n_cells),
        source_of_cell=cells.source_of_cell,
        is_measured=cells.is_measured[:, is_shared],
    )
    return smaller, model.restricted(is_shared), n_dropped


def _refuse_foreign_bundle(out_dir: str | Path | None) -> None:
    """Refuse a folder with a bundle that is not of a run there: it would be replaced."""
    if out_dir is not None and (Path(out_dir) / BUNDLE).exists() and not (Path(out_dir) / "run.json").exists():
        raise OutputError(
            f"{Path(out_dir) / BUNDLE} exists, and {out_dir} holds no run",
            expected="a new folder, or that of the same run",
            fix="name another one",
        )


def _refuse_without_trunk(model: ScDiVa) -> None:
    if model.native("integration").trunk is None:
        raise UnsupportedError(
            f"{model.name} has no trunk, and the published protocol trains a whole encoder",
            expected="a native model with a trunk (scdiva inspect: model, trunk, n_layers)",
            fix="use a model such as scdiva-blood-tiny, or integrate without --published; in Python the same loss "
            "trains layers of an anchor with IntegrationConfig.published().model_copy(update={'whole_encoder': False})",
        )


def _refuse_without_labels(config: IntegrationConfig, is_supervised: bool) -> None:
    if is_supervised or (config.contrastive_weight > 0 and not config.stops_early):
        return
    raise ConfigError(
        "no labels, and a loss that needs them (contrastive_weight = 0 or stops_early)",
        expected="cell types, with supcon_weight above 0",
        fix="name the column of labels, or leave config out",
    )


def _warn_of_absent_genes(cells: CellCounts, code: NDArray[np.int64], batches: tuple[str, ...], name: str) -> None:
    """Say which batches lack genes that the others make one expect: files joined by an outer join hold zeros there."""
    n_batches = len(batches)
    member = sp.csr_matrix((np.ones(code.size), (code, np.arange(code.size))), shape=(n_batches, code.size))
    per_gene = np.asarray((member @ cells.counts).todense(), dtype=np.float64)
    depth = per_gene.sum(axis=1)
    for i, batch in enumerate(batches):
        others = per_gene.sum(axis=0) - per_gene[i]
        expected = others / max(depth.sum() - depth[i], 1.0) * depth[i]
        n_absent = int(((per_gene[i] == 0) & (expected >= _EXPECTED_MOLECULES)).sum())
        if n_absent:
            log.warning(
                "%s: %d genes have no count in batch %s, where by the others one would expect %d molecules or more. If "
                "they were not measured there, leave them out of the file: they tell the batches apart",
                name, n_absent, batch, _EXPECTED_MOLECULES,
            )  # fmt: skip


def _content_hash(cells: CellCounts, code: NDArray[np.int64], label: NDArray[np.int64]) -> str:
    digest = hashlib.sha256()
    for array in (cells.counts.indptr, cells.counts.indices, cells.counts.data, code, label):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _some_of_each_batch(code: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    if code.size <= MAX_CELLS:
        return np.arange(code.size)
    rng = np.random.default_rng([seed, _SUBSET_STREAM])
    share = MAX_CELLS / code.size
    kept = [rng.permutation(np.flatnonzero(code == c)) for c in np.unique(code)]
    return np.sort(np.concatenate([rows[: max(1, round(share * rows.size))] for rows in kept]))


def _start(
    cells: CellCounts,
    code: NDArray[np.int64],
    label: NDArray[np.int64],
    model: ScDiVa,
    config: IntegrationConfig,
    seed: int,
) -> tuple[IntegrationData, NativeNetwork, NativeConfig]:
    """Build the network at its start, and what the objective knows of the cells."""
    assert isinstance(model.config, NativeConfig)
    embedding = model.native("integration").anchor.gene_embedding.detach().cpu().numpy()
    own = _own_components(cells, code, config.n_components, seed)
    n_model = embedding.shape[1]
    joint = np.concatenate([embedding, own], axis=1)
    sizes = NativeConfig(
        n_latent=min(config.n_latent, own.shape[1]),
        n_embedding=joint.shape[1],
        n_hidden=config.n_hidden,
        pooling="centred",
    )
    network = build_network(model.vocabulary.n_genes, sizes)
    assert isinstance(network, NativeNetwork)
    anchor = network.anchor
    with torch.no_grad():
        anchor.gene_embedding.copy_(torch.from_numpy(joint))
        anchor.log_profile.copy_(model.native("integration").anchor.log_profile.cpu())
        pooled = _pooled(network, cells)
        scale = torch.ones(joint.shape[1])
        scale[:n_model] = _MODEL_SCALE / pooled[:, :n_model].std().clamp_min(1e-6)
        scale[n_model:] = _OWN_SCALE / pooled[:, n_model:].std().clamp_min(1e-6)
        anchor.gene_embedding.mul_(scale)
        anchor.pool_centre.copy_((pooled * scale).mean(dim=0))
        whole = pooled * scale - anchor.pool_centre
        # z starts at the principal components of what the encoder reads of the data itself
        _, _, direction = torch.linalg.svd(whole[:, n_model:], full_matrices=False)
        anchor.encoder.weight.zero_()
        anchor.encoder.weight[:, n_model:] = direction[: sizes.n_latent]
    rng = np.random.default_rng([seed, _VIEW_STREAM])
    views = [
        _pooled(network, thin_counts(cells, rng.uniform(*_VIEW_SHARES, cells.n_cells), rng))
        for _ in range(config.n_views)
    ]
    neighbours = BatchNeighbours.find(
        whole[:, n_model:].numpy(), code, k_within=config.n_within, k_across=config.n_across
    )
    return IntegrationData(torch.stack(views), whole, own.shape[1], code, label, neighbours), network, sizes


def _own_components(cells: CellCounts, code: NDArray[np.int64], n_components: int, seed: int) -> NDArray[np.float32]:
    """Return loadings of the data's own principal components, ``(n_genes, C)``; zero for genes that do not vary."""
    values = log_cp10k(cells.counts)
    genes = variable_genes(values, batches=code.astype(str))
    rows = np.random.default_rng([seed, _SUBSET_STREAM, 1]).permutation(cells.n_cells)[:MAX_COMPONENT_CELLS]
    pca = fit_components(sp.csr_matrix(values[np.sort(rows)][:, genes]), seed=seed)
    if pca is None:
        raise SourceError("no gene varies between the cells", expected="cells that differ", fix="check the data")
    loading = np.zeros((cells.n_genes, min(n_components, pca.components_.shape[0])), dtype=np.float32)
    loading[genes] = pca.components_[:n_components].T
    return loading


@torch.no_grad()
def _pooled(network: NativeNetwork, cells: CellCounts) -> torch.Tensor:
    blocks = [
        network.pooled(PackedCells.pack(cells.take(np.arange(first, min(first + _BLOCK, cells.n_cells)))))
        for first in range(0, cells.n_cells, _BLOCK)
    ]
    return torch.cat(blocks)


def _balanced(
    train: NDArray[np.int64], data: IntegrationData, config: IntegrationConfig, loop: LoopConfig
) -> NDArray[np.int64]:
    """Draw the cells that are trained on: every kind of cell as often as the others."""
    if config.n_kinds == 1:
        return train
    size = cells_per_kind(data.whole_NE[:, -data.n_own :].numpy()[train], config.n_kinds, seed=loop.seed)
    rng = np.random.default_rng([loop.seed, _ORDER_STREAM])
    weight = 1.0 / size
    n_draws = max(train.size, min(loop.training.max_steps, 100) * loop.training.batch_size)
    return rng.choice(train, n_draws, p=weight / weight.sum()).astype(np.int64)


def _refuse_few_labels(label: NDArray[np.int64], share: float) -> None:
    """Refuse held-out cells that cannot be scored; ``share`` is that of the held-out cells."""
    known = label[label >= 0]
    if known.size < _MIN_SCORED_CELLS or np.unique(known).size < 2:
        raise SourceError(
            f"{known.size} held-out cells with a label, of {np.unique(known).size} types",
            expected=f"at least {_MIN_SCORED_CELLS} of two types: early stopping goes by them",
            fix=f"label at least {round(_MIN_SCORED_CELLS / share)} cells or so, of which {share:.0%} are held out; or "
            "train without early stopping: on the command line leave out --published, in Python give "
            "config.model_copy(update={'stops_early': False})",
        )


def _score(z: NDArray[np.float32], label: NDArray[np.int64], batch: NDArray[np.int64]) -> float:
    """AvgBIO with k-means clusters; 0 where the cells of a minibatch have no two types."""
    names = label.astype(str)
    try:
        agreement = kmeans_agreement(z, names, seed=0)
        return float(np.mean([agreement.nmi, agreement.ari, asw_label(z, names)]))
    except NotMeasurableError:
        return 0.0


def _details(
    model: ScDiVa,
    name: str,
    used: Mapping[str, Any],
    n_train: int,
    n_heldout: int,
    fitted: FitResult,
    loop: LoopConfig,
    cells: CellCounts,
) -> dict[str, Any]:
    how = "with labels of cell types" if used["supervised"] else "without labels"
    return {
        "name": f"{model.name}-integrated",
        "description": f"Embedding of {name} across {used['n_batches']} batches, integrated {how}, from {model.name}.",
        "license": model.details.get("license", ""),
        "integration": dict(used),
        "training": {
            "n_cells": n_train,
            "n_heldout": n_heldout,
            "heldout": "cells at random",
            "n_cells_seen": fitted.n_cells,
            "n_steps": fitted.last_step,
            "best_step": fitted.best_step,
            "seed": loop.seed,
            "base_model": model.name,
            "sources": [
                {
                    "name": name,
                    "n_cells": cells.n_cells,
                    "n_genes": cells.n_genes,
                    "coverage": float(cells.counts.sum() / max(cells.library_size.sum(), 1.0)),
                    "licence": "the user's own data",
                }
            ],
        },
    }
