"""Pretraining on a corpus, and adaptation to a user's own unlabelled cells: the only tasks that run the loop."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from scdiva.config import FileConfig, LoopConfig, NativeConfig, NativeObjectiveConfig, OfficialConfig, RunConfig
from scdiva.data.bundled import dataset_path
from scdiva.data.conditions import ConditionLabels, collect_labels
from scdiva.data.loader import fixed_minibatches, ordered_blocks
from scdiva.data.population import MAX_RECORDS, CellSizes
from scdiva.data.reader import MIN_COVERAGE, CellCorpus, CellsInMemory, CountsReader, list_sources, open_counts
from scdiva.data.source import open_source
from scdiva.data.splits import hold_out
from scdiva.data.statistics import GeneStatistics
from scdiva.data.thinning import thin_counts
from scdiva.diffusion.samplers import Sampler
from scdiva.errors import ConfigError
from scdiva.genes import GeneVocabulary
from scdiva.models.prior import MixturePrior, Population
from scdiva.models.scdiva.calibration import calibrate
from scdiva.models.scdiva.generation import Wish
from scdiva.models.scdiva.init import MAX_CELLS, grow, init_network, simple_model
from scdiva.models.scdiva.inputs import MaskedCells, Targets
from scdiva.models.scdiva.model import Network, ScDiVa, build_network
from scdiva.models.scdiva.native import NativeNetwork, SimpleModel
from scdiva.models.scdiva.objectives import DenoisedCells, NativeObjective
from scdiva.models.scdiva.official import OfficialNetwork
from scdiva.models.scdiva.official_objective import OfficialObjective
from scdiva.nn.precision import uses_bf16
from scdiva.serialization import log1p_cp10k
from scdiva.training import FitResult, fit
from scdiva.types import CellCollection, CellCounts, Objective

if TYPE_CHECKING:
    from scdiva.data.source import DataLike

log = logging.getLogger(__name__)

BUNDLE = "bundle"
"""Folder of the finished model within the folder of a run."""

BUNDLED_PREFIX = "bundled:"
"""``bundled:pbmc3k`` in the place of a path names a data set that comes with the package."""

MAX_CELLS_IN_MEMORY = 200_000
"""Corpora up to this size are read once; larger ones are read from disk block by block, in every epoch."""

_BLOCK = 2048
# tags of the random streams that this file draws from a run's seed
_SPLIT_STREAM, _SVD_STREAM, _POPULATION_STREAM, _CALIBRATION_STREAM = 64, 65, 66, 67


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
        Terms of the loss on the held-out cells, each beside its floor (``*_floor``); see
        :class:`scdiva.models.scdiva.objectives.NativeObjective`.
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
    if isinstance(config.model, OfficialConfig) and config.objective != NativeObjectiveConfig():
        raise ConfigError(
            "settings in [objective] for the official model",
            expected="none: its loss is the published one",
            fix='remove [objective], or set model.architecture = "native"',
        )
    if not config.data.files:
        raise ConfigError(
            "data.files is empty", expected="the files of the corpus", fix="name them in the configuration"
        )
    base = ScDiVa.from_pretrained(config.start_from, device="cpu") if config.start_from else None
    if base is None:
        corpus = open_corpus_of(config, GeneVocabulary.default())
        vocabulary = _seen_genes(corpus, config.data.min_cells_per_gene)
    else:
        vocabulary = base.vocabulary
    corpus = open_corpus_of(config, vocabulary)
    files = [file for file, _ in _sources_of(config)]
    corpus, labels = _with_conditions(corpus, config.data.conditions, [file.conditions for file in files], base)
    cells = _in_memory(corpus)
    groups = corpus.groups([file.batch_key for file in files])
    train, heldout = hold_out(groups, config.data.heldout_fraction, np.random.default_rng([config.seed, _SPLIT_STREAM]))
    log.info(
        "%s cells to train on, %s held out, %s genes", f"{train.size:,}", f"{heldout.size:,}", f"{vocabulary.n_genes:,}"
    )
    own, simple = _statistics(corpus, cells, train)
    # tokens are ranked by the statistics that the model was first trained with
    statistics = own if base is None else base.statistics
    network = build_network(vocabulary.n_genes, config.model, labels)
    if base is not None:
        grow(network, base, labels)
    elif isinstance(network, NativeNetwork) and isinstance(config.model, NativeConfig):
        blocks = _svd_blocks(cells, train, config.seed) if config.model.init == "svd" else None
        n_components = min(config.model.n_latent, config.model.n_embedding)
        init_network(network, own, simple, blocks, n_components, seed=config.seed)
    objective = _objective(network, config, statistics, simple)
    identity = {"content_of_the_files": _content_hash(corpus, own)}
    if base is not None:
        identity["model_to_start_from"] = base.weights_hash()
    fitted, metrics = _fit(objective, cells, train, heldout, config, out, identity, progress=progress)
    record = _training_record(corpus, groups, train, heldout, fitted, config, [f.licence for f in files])
    details = {
        "name": config.name or out.name,
        "description": config.description,
        "license": config.licence,
        "trained_heads": _trained_heads(config),
        "training": record
        if base is None
        else {**record, **_origin(base), "heldout_may_be_known": _warn_of_seen_cells(base, record)},
        "metrics": metrics,
    }
    model = ScDiVa(network, config.model, vocabulary, statistics, details=details, labels=labels)
    model.population = population_of(model, cells, train, seed=config.seed)
    return _saved(model, out, fitted)


def adapt(
    data: DataLike,
    model: ScDiVa,
    out_dir: str | Path,
    *,
    config: LoopConfig | None = None,
    objective: NativeObjectiveConfig | None = None,
    conditions: Sequence[str] = (),
    only_measured_genes: bool = False,
    name: str = "",
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
        Loss settings. If left out: anchor and profile decoder on split views, or, with ``conditions``, everything.
    conditions
        Columns of ``.obs`` that the adapted model can be conditioned on (cell type, for example); their labels are
        added to those of the model. Needs a model with a trunk.
    only_measured_genes
        Leave the genes that the data do not measure out of the new model: it is smaller, and does not know them.
    name
        Name of the new model; that of the model with "-adapted" if left out.
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
    config_of_model = model.config
    model.native("adaptation")
    assert isinstance(config_of_model, NativeConfig)
    if conditions and not config_of_model.trunk.n_layers:
        raise ConfigError(
            f"{model.name} has no trunk, and takes no conditions such as {conditions[0]}",
            expected="a model with a trunk (scdiva inspect: model, trunk, n_layers)",
            fix="name another model, or leave the conditions out",
        )
    if conditions:
        # offsets by label come anew, with the calibration
        trunk = config_of_model.trunk.model_copy(update={"dispersion": "state", "label_offsets": ""})
        config_of_model = config_of_model.model_copy(update={"trunk": trunk})
    reader = open_counts(open_source(data), model.vocabulary, layer=layer, min_coverage=min_coverage)
    if only_measured_genes:
        model = model.restricted(reader.alignment.is_measured)
        reader = open_counts(reader.source, model.vocabulary, layer=layer, min_coverage=min_coverage)
    corpus, labels = _with_conditions(CellCorpus((reader,), (None,)), conditions, [{}], model)
    cells = _in_memory(corpus)
    loop = config or (adaptation_config(len(cells), seed=seed) if not conditions else conditioning_config(seed=seed))
    settings = objective or (CONDITIONING_OBJECTIVE if conditions else ADAPTATION_OBJECTIVE)
    groups = corpus.groups([batch_key])
    train, heldout = hold_out(groups, loop.data.heldout_fraction, np.random.default_rng([loop.seed, _SPLIT_STREAM]))
    network = build_network(model.vocabulary.n_genes, config_of_model, labels)
    assert isinstance(network, NativeNetwork)
    grow(network, model, labels)
    own, simple = _statistics(corpus, cells, train)
    if not settings.freeze_anchor:
        _start_profile(network, simple, reader.alignment.is_measured)
    identity = {
        "content_of_the_files": _content_hash(corpus, own),
        "model_to_start_from": model.weights_hash(),
        "objective": settings.model_dump_json(),
        "conditions": ", ".join(conditions),
    }
    task = NativeObjective(network, settings, config_of_model, model.statistics, simple)
    trunk = config_of_model.trunk
    # only a model that draws counts of sets has numbers to calibrate, and only one that was trained to do so
    has_heads = settings.identity_weight > 0 and settings.value_weight > 0
    is_generator = has_heads and trunk.value_likelihood == "ztnb" and trunk.layout == "set"
    is_calibrated = bool(conditions) and is_generator
    finish = partial(_calibrate, task, cells, train, loop, labels, conditions[0]) if is_calibrated else None
    fitted, metrics = _fit(task, cells, train, heldout, loop, out, identity, progress=progress, finish=finish)
    if is_calibrated:
        trunk = config_of_model.trunk.model_copy(update={"label_offsets": conditions[0]})
        config_of_model = config_of_model.model_copy(update={"trunk": trunk})
    record = _training_record(corpus, groups, train, heldout, fitted, loop, ["the user's own data"])
    what = f"with labels of {', '.join(conditions)} as conditions" if conditions else "without labels"
    details = {
        **model.details,
        "name": name or f"{model.name}-adapted",
        "description": f"{model.name}, adapted to {reader.source.name} {what}.",
        # what the new weights were not trained with does not count as trained any more: it read the old ones
        "trained_heads": _heads(settings),
        "training": {**record, **_origin(model)},
        "metrics": metrics,
    }
    adapted = ScDiVa(network, config_of_model, model.vocabulary, model.statistics, details=details, labels=labels)
    adapted.population = population_of(adapted, cells, train, seed=loop.seed)
    if is_calibrated:
        _settle_depth(adapted, seed=loop.seed)
    return _saved(adapted, out, fitted)


ADAPTATION_OBJECTIVE = NativeObjectiveConfig(identity_weight=0.0, value_weight=0.0)
"""Loss settings of :func:`adapt` (chosen by docs/experiments.md): anchor and profile decoder."""


CONDITIONING_OBJECTIVE = NativeObjectiveConfig(
    p_split=0.3, p_visible=0.2, p_whole=0.4, p_joint=0.5, p_values=0.2, p_staged=0.2
)
"""Loss settings of :func:`adapt` with conditions (chosen by docs/experiments.md): most cells are denoised as they are
generated, whole and from a z that is not their own visible part."""


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


def conditioning_config(*, seed: int = 0) -> LoopConfig:
    """Return the loop settings of :func:`adapt` with conditions: the whole network is trained."""
    return LoopConfig.model_validate(
        {
            "seed": seed,
            "data": {"heldout_fraction": 0.1},
            "optim": {"lr": 5e-4, "gene_lr_ratio": 20.0, "warmup_steps": 50, "ema_decay": 0.99},
            "training": {
                "max_steps": 200,
                "batch_size": 64,
                "validate_every": 50,
                "patience": 4,
                "checkpoint_every": 100,
                "n_validation_cells": 512,
            },
        }
    )


PRIOR_VIEW_SHARE = 0.5
"""Share of a cell's molecules behind the z that the prior over z is fitted to (docs/experiments.md)."""
_CALIBRATION_CELLS = 2048


def _calibrate(
    objective: NativeObjective,
    cells: CellCollection,
    train: NDArray[np.int64],
    config: LoopConfig,
    labels: ConditionLabels,
    field: str,
) -> None:
    """Bring the numbers of single genes to their best for the training cells (``models.scdiva.calibration``).

    Cells are masked as they are generated: whole, with their conditions, and with a z of their own. A dispersion that
    had to cover cells of unknown type as well would be too large for all others.
    """
    usual = objective.config
    as_generated = {"p_split": 0.0, "p_visible": 0.0, "p_whole": 1.0, "p_joint": 0.9, "p_values": 0.0, "p_staged": 0.0}
    of_prior = {"rho_min": PRIOR_VIEW_SHARE, "rho_max": PRIOR_VIEW_SHARE, "condition_dropout": 0.0}
    objective.config = usual.model_copy(update={**as_generated, **of_prior})
    rng = np.random.default_rng([config.seed, _CALIBRATION_STREAM])
    chosen = rng.permutation(train)[:_CALIBRATION_CELLS]

    def masked() -> Iterator[tuple[MaskedCells, Targets]]:
        for first in range(0, chosen.size, config.training.batch_size):
            inputs = objective.prepare(cells.read(chosen[first : first + config.training.batch_size]), rng)
            assert isinstance(inputs, DenoisedCells)
            yield inputs.cells, inputs.targets

    calibrate(
        objective.network.cpu(),
        masked(),
        use_bf16=uses_bf16(config.training.precision, "cpu"),
        label_field=labels.fields.index(field),
        n_labels=len(labels.labels(field)),
    )
    objective.config = usual


_SETTLING_CELLS, _SETTLING_ROUNDS = 192, 2


def _settle_depth(model: ScDiVa, *, seed: int) -> None:
    """Make generated cells have, on average, the UMIs that they were asked to have.

    Each count is calibrated given real surroundings; in a generated cell the surroundings are generated too, and small
    errors add up over hundreds of genes. One factor for all genes takes them out.
    """
    network, population = model.native("generation"), model.population
    assert population is not None
    sizes = population.sizes
    rng = np.random.default_rng([seed, _CALIBRATION_STREAM, 1])
    for _ in range(_SETTLING_ROUNDS):
        row = rng.integers(sizes.n_records, size=_SETTLING_CELLS)
        wanted = np.stack([sizes.depth[row], sizes.n_genes[row]], axis=1)
        wish = Wish(
            depth=sizes.depth[row],
            library_size=sizes.library_size[row],
            condition=sizes.condition[row],
            is_measured=sizes.is_measured[sizes.source[row]],
            weight=np.ones(sizes.condition.shape[1]),
            z=population.prior.sample(sizes.condition[row], wanted, rng),
            z_depth=(population.prior.view_share * sizes.depth[row]).astype(np.float32),
        )
        drawn = model.draw(wish, sizes.n_genes[row].astype(np.int64), Sampler(), seed=int(rng.integers(2**31)))
        with torch.no_grad():
            network.value_offset.sub_(float(np.log(drawn.sum() / sizes.depth[row].sum())))


def population_of(model: ScDiVa, cells: CellCollection, indices: NDArray[np.int64], *, seed: int) -> Population | None:
    """Collect what generation draws sizes and z from; None for a model that is not native.

    Parameters
    ----------
    model
        The trained model.
    cells
        Cells with the condition codes of the model.
    indices
        Which of them: those that were trained on.
    seed
        Seed of the choice of cells and of the mixture.
    """
    if not isinstance(model.network, NativeNetwork):
        return None
    rng = np.random.default_rng([seed, _POPULATION_STREAM])
    chosen = indices if indices.size <= MAX_RECORDS else np.sort(rng.choice(indices, MAX_RECORDS, replace=False))
    blocks = list(ordered_blocks(cells, _BLOCK, indices=chosen))
    # z of a part of each cell: of a whole one it would follow its noise, which a cell drawn from it would repeat
    z = np.concatenate([model.latent(thin_counts(block, PRIOR_VIEW_SHARE, rng)) for block in blocks])
    condition = np.concatenate([block.condition for block in blocks])
    sizes = np.concatenate(
        [np.stack([np.asarray(b.counts.sum(axis=1)).ravel(), np.diff(b.counts.indptr)], axis=1) for b in blocks]
    )
    kept = sizes[:, 1] > 0
    prior = MixturePrior.fit(z[kept], sizes[kept], condition[kept], seed, view_share=PRIOR_VIEW_SHARE)
    return Population(CellSizes.of(blocks, rng), prior)


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
    found: list[tuple[FileConfig, Path]] = []
    for file in config.data.files:
        if file.path.startswith(BUNDLED_PREFIX):
            found.append((file, dataset_path(file.path.removeprefix(BUNDLED_PREFIX))))
        else:
            found += [(file, path) for path in list_sources([root / file.path])]
    return found


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


def _with_conditions(
    corpus: CellCorpus, fields: Sequence[str], columns: Sequence[Mapping[str, str]], base: ScDiVa | None
) -> tuple[CellCorpus, ConditionLabels]:
    """Code the cells by the labels of the corpus, added to those of the model that the run starts from."""
    labels = base.labels if base is not None else ConditionLabels.none()
    if fields:
        found, report = collect_labels(zip(corpus.readers, corpus.rows, strict=True), fields, columns)
        labels = labels.merged(found)
        for line in report.lines():
            log.info("%s", line)
    return corpus.with_conditions(labels, columns), labels


def _statistics(
    corpus: CellCorpus, cells: CellCollection, train: NDArray[np.int64]
) -> tuple[GeneStatistics, SimpleModel]:
    """Count the training cells, in one pass."""
    depths: list[NDArray[np.int64]] = []
    sum_value = np.zeros(corpus.vocabulary.n_genes)

    def counted() -> Iterator[CellCounts]:
        for block in ordered_blocks(cells, _BLOCK, indices=train):
            depths.append(np.asarray(block.counts.sum(axis=1)).ravel())
            sum_value[:] += np.bincount(block.counts.indices, weights=log1p_cp10k(block), minlength=sum_value.size)
            yield block

    statistics = GeneStatistics.from_blocks(counted())
    ends = np.cumsum(corpus.sizes)
    n_cells = np.bincount(np.searchsorted(ends, train, side="right"), minlength=ends.size)
    is_measured = np.stack([reader.alignment.is_measured for reader in corpus.readers])
    mean_value = sum_value / np.maximum(statistics.n_detected, 1)
    n_measured = n_cells @ is_measured.astype(np.int64)
    return statistics, simple_model(statistics, n_measured, np.concatenate(depths), mean_value)


def _svd_blocks(cells: CellCollection, train: NDArray[np.int64], seed: int) -> Iterator[CellCounts]:
    rng = np.random.default_rng([seed, _SVD_STREAM])
    chosen = train if train.size <= MAX_CELLS else np.sort(rng.choice(train, MAX_CELLS, replace=False))
    return ordered_blocks(cells, _BLOCK, indices=chosen)


def _objective(network: Network, config: RunConfig, statistics: GeneStatistics, simple: SimpleModel) -> Objective:
    if isinstance(network, NativeNetwork):
        assert isinstance(config.model, NativeConfig)
        return NativeObjective(network, config.objective, config.model, statistics, simple)
    assert isinstance(network, OfficialNetwork)
    return OfficialObjective(network, statistics)


def _trained_heads(config: RunConfig) -> list[str]:
    if isinstance(config.model, OfficialConfig):
        return ["gene", "value"]
    return _heads(config.objective)


def _heads(objective: NativeObjectiveConfig) -> list[str]:
    heads = ["anchor", "profile_decoder"]
    for head, weight in (("identity", objective.identity_weight), ("value", objective.value_weight)):
        if weight > 0:
            heads.append(head)
    return heads


@torch.no_grad()
def _start_profile(network: NativeNetwork, simple: SimpleModel, is_measured: NDArray[np.bool_]) -> None:
    """Start the mean profile at that of the new cells; genes that they do not measure keep their rates.

    The measured genes together keep their share: what a file does not measure is unknown, not absent.
    """
    measured = torch.from_numpy(np.flatnonzero(is_measured))
    log_profile = network.anchor.log_profile
    new = simple.log_profile_G[measured]
    log_profile[measured] = new - new.logsumexp(0) + log_profile[measured].logsumexp(0)


def _warn_of_seen_cells(base: ScDiVa, record: Mapping[str, Any]) -> bool:
    """Tell, and warn, if the model to start from may have been trained on cells that this run holds out."""
    before = base.details.get("training", {}).get("heldout")
    may_be = before != record["heldout"]
    if may_be:
        log.warning(
            "%s held out other cells (%s) than this run (%s): the held-out figures may be of cells it was trained on",
            base.name,
            before,
            record["heldout"],
        )
    return may_be


def _origin(base: ScDiVa) -> dict[str, str]:
    return {"base_model": base.name, "base_model_hash": base.bundle_hash}


def _fit(
    objective: Objective,
    cells: CellCollection,
    train: NDArray[np.int64],
    heldout: NDArray[np.int64],
    config: LoopConfig,
    out: Path,
    identity: Mapping[str, str],
    *,
    progress: bool,
    finish: Callable[[], None] | None = None,
) -> tuple[FitResult, dict[str, float]]:
    fitted = fit(
        objective,
        cells,
        train_indices=train,
        heldout_indices=heldout,
        config=config,
        out_dir=out,
        monitor="loss",
        identity=identity,
        progress=progress,
    )
    if finish is not None:
        finish()
    generator = torch.Generator().manual_seed(config.seed)
    totals: dict[str, float] = {}
    n_cells = 0
    with torch.inference_mode():
        for minibatch in fixed_minibatches(
            cells,
            heldout,
            objective.prepare_heldout,
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


def _saved(model: ScDiVa, out: Path, fitted: FitResult) -> TrainedModel:
    """Write the bundle; of several processes the first does, and the others wait for it."""
    path = out / BUNDLE
    if rank_zero_only.rank == 0:
        model.save_pretrained(path, overwrite=True)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return TrainedModel(ScDiVa.from_pretrained(path, device="cpu"), path, fitted, model.details["metrics"])
