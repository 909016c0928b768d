"""``evaluate integration``: our embeddings of batches beside Harmony, scVI, scANVI, a PCA, a null and a ceiling.

All methods see the same cells and the genes of them that the model knows. Cells without a label are integrated with the
others, and are in no score. Methods that see the labels are compared with such ones only. Differences have an interval
over cells (subsamples without replacement, :func:`resampled_means`) and seeds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines import integration as baselines
from scdiva.baselines.common import require
from scdiva.config import IntegrationConfig
from scdiva.data.conditions import column_text, is_missing, refuse_missing_batches
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, ScdivaError, SourceError
from scdiva.metrics import integration as metrics
from scdiva.metrics.generation_space import NotMeasurableError
from scdiva.models.scdiva.classifier import native_trunk
from scdiva.tasks.embed import embed_cells
from scdiva.tasks.evaluation_rows import append_row, content_hash, package_versions, read_rows, row_key
from scdiva.tasks.integration_report import (
    CEILING,
    FLOOR,
    HEADLINES,
    METHODS,
    NULL,
    ON_REQUEST,
    OURS,
    SEES_LABELS,
    TITLES,
    IntegrationReport,
    Run,
)
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from scdiva.data.source import CellSource, DataLike
    from scdiva.models.scdiva.model import ScDiVa

PACKAGES: Mapping[str, tuple[str, str]] = {
    "harmony": ("harmonypy", "harmonypy"),
    "scvi": ("scvi", "scvi-tools"),
    "scanvi": ("scvi", "scvi-tools"),
}
"""Module and package of baselines that need the extra ``eval``."""

N_DRAWS = 20
MOST_CELLS_DRAWN = 5000
N_RESOLUTIONS_AROUND = 2
"""Leiden resolutions below and above the chosen one that subsamples choose among."""
_ORACLE_NOISE = 1e-3
_DRAW_STREAM, _ORACLE_STREAM = 23, 29
_FORMAT = 1
_VERSIONS = ("scdiva", "scikit-learn", "scanpy", "igraph", "scib-metrics", "harmonypy", "scvi-tools")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchedCells:
    """Cells of several batches in the order of the model's vocabulary.

    Parameters
    ----------
    name
        Of the set.
    cells
        Their counts.
    batch
        ``(n_cells,)`` batch of every cell.
    label
        ``(n_cells,)`` type; empty where it is not known.
    """

    name: str
    cells: CellCounts
    batch: NDArray[np.str_]
    label: NDArray[np.str_]

    @classmethod
    def open(cls, data: DataLike, model: ScDiVa, batch_key: str, label_key: str, *, layer: str | None = None) -> Self:
        """Read all cells of a file or an AnnData.

        Raises
        ------
        SourceError
            A cell without a batch, fewer than two batches, or fewer than two types.
        KeyNotFoundError, ScaleError, GeneError
            The data cannot be used.
        """
        source = open_source(data)
        batch, label = (column_text(source.column(key)) for key in (batch_key, label_key))
        return cls._of(source, model, batch, label, layer)

    @classmethod
    def of(
        cls, data: DataLike, model: ScDiVa, batch: NDArray[np.str_], label: NDArray[np.str_], *, name: str = ""
    ) -> Self:
        """Take the cells of a file or an AnnData with batches and labels that are given.

        Raises
        ------
        SourceError
            As for :meth:`open`, or other numbers of batches or labels than of cells.
        """
        return cls._of(open_source(data), model, batch, label, None, name)

    @classmethod
    def _of(
        cls,
        source: CellSource,
        model: ScDiVa,
        batch: NDArray[np.str_],
        label: NDArray[np.str_],
        layer: str | None,
        name: str = "",
    ) -> Self:
        if not batch.size == label.size == source.n_cells:
            raise SourceError(
                f"{source.n_cells} cells, {batch.size} batches, {label.size} labels",
                expected="one of each for every cell",
                fix="give both for all cells",
            )
        refuse_missing_batches(batch, source.name)
        label = known_labels(label)
        for what, values in (("batch", batch), ("type", label[label != ""])):
            found = np.unique(values)
            if found.size < 2:
                raise SourceError(
                    f"{source.name} has {found.size} {what}{'' if found.size == 1 else 's'}",
                    expected="at least two",
                    fix=f"name the column that tells {what}s apart",
                )
        reader = open_counts(source, model.vocabulary, layer=layer)
        return cls(name or source.name, reader.read(np.arange(len(reader))), batch, label)

    @property
    def is_labelled(self) -> NDArray[np.bool_]:
        """Which cells have a label."""
        return self.label != ""

    @property
    def counts(self) -> sp.csr_matrix:
        """Counts of the genes that the file measures and the model knows, CSR."""
        return sp.csr_matrix(self.cells.counts[:, np.flatnonzero(self.cells.is_measured.all(axis=0))])


def evaluate_integration(
    data: BatchedCells,
    model: ScDiVa,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    rows_path: Path | None = None,
    on_row: Callable[[Run], None] | None = None,
) -> IntegrationReport:
    """Embed cells of several batches by several methods, and score the embeddings.

    Parameters
    ----------
    data
        The cells.
    model
        What our methods start from.
    methods
        Of :data:`METHODS`; if left out, all whose packages are installed and that are not :data:`ON_REQUEST`.
    seeds
        Seeds of methods and of the clusterings of the scores.
    rows_path
        JSONL file that takes each run as it finishes; runs that are there already are not run again.
    on_row
        Called with each run.

    Returns
    -------
    IntegrationReport

    Raises
    ------
    ConfigError
        An unknown method, or no seed.
    UnsupportedError
        A method that was asked for needs a package that is not installed, or a model with a trunk.
    ScdivaError
        The controls are out of order (:func:`check_controls`); the rows are kept.
    """
    chosen, notes = _chosen(methods)
    if not seeds:
        raise ConfigError("no seeds", expected="at least one", fix="leave them out")
    if "scdiva_published" in chosen:
        native_trunk(model, "the published integration")
    wanted, lacking = measurable_metrics()
    if lacking:
        notes.append(
            f"Without {' and '.join(lacking)} these are not measured: "
            f"{', '.join(HEADLINES.get(n, n) for n in (*metrics.METRICS, *metrics.MEANS) if n not in wanted)}."
        )
        log.warning("%s", notes[-1])
    known = {row["key"]: Run.from_dict(row) for row in read_rows(rows_path)}
    content = content_hash(data.cells, data.batch, data.label)
    is_scored, counts = data.is_labelled, data.counts
    draws = subsamples(data.label[is_scored], data.batch[is_scored], n_draws=N_DRAWS)
    runs = []
    for seed in seeds:
        unintegrated: list[NDArray[np.float32]] = []
        for method in chosen:
            of_model = str(model.provenance["model_hash"]) if method in OURS else ""
            # cells vary alike whatever the seed: subsamples of one seed are enough, and a third of the time
            is_drawn = seed == seeds[0] and method not in (NULL, CEILING)
            drawn = draws if is_drawn else draws[:0]
            key = row_key(_FORMAT, content, method, seed, of_model, sorted(wanted), list(drawn.shape))
            run = known.get(key)
            if run is None:
                if not unintegrated:
                    unintegrated.append(baselines.pca(counts, data.batch, seed=seed))
                run = _run(data, counts, model, method, seed, key, unintegrated[0], wanted, drawn)
                if rows_path is not None:
                    append_row(rows_path, run.to_dict())
            runs.append(run)
            if on_row is not None:
                on_row(run)
    report = IntegrationReport(
        name=data.name,
        confounding=metrics.batch_label_confounding(data.label[is_scored], data.batch[is_scored]).sentence,
        n_cells=data.cells.n_cells,
        n_labelled=int(is_scored.sum()),
        n_genes=counts.shape[1],
        n_batches=np.unique(data.batch).size,
        n_types=np.unique(data.label[is_scored]).size,
        runs=tuple(runs),
        notes=(*_notes(data, draws.shape[1]), *notes),
        versions=package_versions(_VERSIONS),
    )
    check_controls(report)
    return report


def check_controls(report: IntegrationReport) -> None:
    """Refuse a report in which noise keeps types apart as well as a PCA, or something does so better than the labels.

    AvgBIO is what is compared; where it has no value scib's mean over types, or the silhouette width of types.

    Raises
    ------
    ScdivaError
        The null is not below the unintegrated PCA, or the ceiling below another method.
    """
    metric = next((name for name in ("avg_bio", "scib_bio", "asw_label") if report.has(name)), None)
    if metric is None:
        return
    means = {m: float(np.mean(values)) for m in report.methods if (values := report.values(m, metric))}
    wrong = []
    if NULL in means and FLOOR in means and means[NULL] >= means[FLOOR]:
        wrong.append((NULL, FLOOR))
    if CEILING in means:
        wrong += [(name, CEILING) for name, mean in means.items() if name != CEILING and mean > means[CEILING]]
    for lower, upper in wrong:
        raise ScdivaError(
            f"the controls are out of order on {report.name}: {HEADLINES.get(metric, metric)} {means[lower]:.3f} of "
            f"{TITLES[lower]}, {means[upper]:.3f} of {TITLES[upper]}",
            expected="the first to be below the second",
            fix="the set is too small, or its labels say nothing; the rows that were measured are kept",
        )


def known_labels(labels: NDArray[np.str_]) -> NDArray[np.str_]:
    """Return the labels, empty where they say that nothing is known ("unassigned", "nan", ...)."""
    kinds, code = np.unique(labels, return_inverse=True)
    return np.array(["" if is_missing(kind) else kind for kind in kinds], dtype=str)[code]


def measurable_metrics() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the metrics and means that can be measured with what is installed, and the packages that are not."""
    lacking = {name: module for name, module in metrics.EXTRAS.items() if find_spec(module) is None}
    absent = set(lacking)
    while more := {name for name, parts in metrics.MEANS.items() if absent & set(parts)} - absent:
        absent |= more
    names = (*metrics.METRICS, *metrics.MEANS)
    packages = sorted({module.replace("_", "-") for module in lacking.values()})
    return tuple(name for name in names if name not in absent), tuple(packages)


def oracle(labels: NDArray[np.str_], *, seed: int) -> NDArray[np.float64]:
    """Return one-hot labels with noise of 0.001: perfect for types, and blind to batches.

    Parameters
    ----------
    labels
        ``(n_cells,)``; cells without one (empty) lie around the origin.
    seed
        Of the noise, without which cells of a type would have no nearest neighbours.

    Returns
    -------
    numpy.ndarray
        ``(n_cells, n_types)``.
    """
    names = np.unique(labels[labels != ""])
    noise = np.random.default_rng([seed, _ORACLE_STREAM]).normal(scale=_ORACLE_NOISE, size=(labels.size, names.size))
    return (labels[:, None] == names[None, :]) + noise


def subsamples(
    labels: NDArray[np.str_], batches: NDArray[np.str_], *, n_draws: int = N_DRAWS, most: int = MOST_CELLS_DRAWN
) -> NDArray[np.int64]:
    """Draw subsamples of half of the cells, without replacement; the same for every method and seed.

    Systematic samples of the cells in the order of type, batch within the type, and chance: every type, and every batch
    within it, keeps its share to within a cell.

    Parameters
    ----------
    labels, batches
        ``(n_cells,)`` type and batch.
    n_draws
        Number of subsamples.
    most
        Most cells of one.

    Returns
    -------
    numpy.ndarray
        ``(n_draws, n_drawn)`` positions, sorted.
    """
    n = labels.size
    m = min(n // 2, most)
    rng = np.random.default_rng([n, _DRAW_STREAM])
    found = []
    for _ in range(n_draws):
        order = np.lexsort((rng.random(n), batches, labels))
        found.append(np.sort(order[np.floor((np.arange(m) + rng.random()) * (n / m)).astype(np.int64)]))
    return np.array(found)


def resampled_means(
    embedding: NDArray[np.floating[Any]],
    labels: NDArray[np.str_],
    batches: NDArray[np.str_],
    draws: NDArray[np.int64],
    *,
    seed: int,
    unintegrated: NDArray[np.floating[Any]],
    resolution: float | None,
    wanted: Collection[str],
) -> dict[str, NDArray[np.float64]]:
    """Measure the means of an embedding in subsamples of its cells: how much they vary with the cells.

    Everything is measured anew, clusters included, with two exceptions that keep the cost at seconds (our decision):
    Leiden chooses among the five resolutions around that of all cells, and kBET is left out, so that scib's mean over
    batches is that of the other four metrics, and its total accordingly. The spread of a mean of four is that of the
    mean of five if kBET varies as the others do on average.

    Parameters
    ----------
    embedding, unintegrated
        ``(n_cells, n_dimensions)``.
    labels, batches
        ``(n_cells,)``.
    draws
        ``(n_draws, n_drawn)`` positions of the cells of each subsample.
    seed
        Of Leiden and k-means.
    resolution
        Leiden's on all cells; None where it has none.
    wanted
        Metrics and means that are measured on all cells.

    Returns
    -------
    dict
        Name of each wanted mean to ``(n_draws,)`` values, NaN where a subsample has none.
    """
    plain = [name for name in metrics.METRICS if name in wanted and name not in metrics.EXTRAS]
    found: dict[str, list[float]] = {name: [] for name in metrics.MEANS if name in wanted}
    for rows in draws:
        types = labels[rows]
        measured = metrics.integration_scores(
            embedding[rows], types, batches[rows], seed=seed, unintegrated=unintegrated[rows], metrics=plain
        )
        values = {name: measured[name] for name in measured.scores}
        if resolution is not None:
            values |= _leiden_near(embedding[rows], types, resolution, seed)
        for name, parts in metrics.MEANS.items():
            if name not in found:
                continue
            terms = [values.get(part, float("nan")) for part in parts if part != "kbet"]
            is_total = name == "scib_total"
            weights = (metrics.BIO_SHARE, 1 - metrics.BIO_SHARE) if is_total else (1 / len(terms),) * len(terms)
            values[name] = float(np.dot(weights, terms))
            found[name].append(values[name])
    return {name: np.array(values) for name, values in found.items()}


def _leiden_near(
    embedding: NDArray[np.floating[Any]], types: NDArray[np.str_], resolution: float, seed: int
) -> dict[str, float]:
    at = metrics.RESOLUTIONS.index(resolution)
    near = metrics.RESOLUTIONS[max(0, at - N_RESOLUTIONS_AROUND) : at + N_RESOLUTIONS_AROUND + 1]
    try:
        agreement = metrics.leiden_agreement(embedding, types, seed=seed, resolutions=near)
    except NotMeasurableError:
        return {}
    return {"leiden_nmi": agreement.nmi, "leiden_ari": agreement.ari}


def _chosen(methods: Sequence[str] | None) -> tuple[tuple[str, ...], list[str]]:
    """Return the methods to run, and a note on those that are left out."""
    if methods is None:
        absent = [name for name, (module, _) in PACKAGES.items() if find_spec(module) is None]
        if not absent:
            return tuple(name for name in METHODS if name not in ON_REQUEST), []
        packages = ", ".join(dict.fromkeys(PACKAGES[name][1] for name in absent))
        note = f"Not run, for want of {packages} (pip install 'scdiva[eval]'): {', '.join(TITLES[n] for n in absent)}."
        log.warning("%s", note)
        return tuple(name for name in METHODS if name not in (*absent, *ON_REQUEST)), [note]
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ConfigError(
            f"no method is called {unknown[0]!r}" if unknown else "no methods",
            expected=f"some of {', '.join(METHODS)}",
            fix="correct the name",
        )
    for name in methods:
        if name in PACKAGES:
            require(PACKAGES[name][0], name, PACKAGES[name][1])
    return tuple(name for name in METHODS if name in methods), []


def _run(
    data: BatchedCells,
    counts: sp.csr_matrix,
    model: ScDiVa,
    method: str,
    seed: int,
    key: str,
    unintegrated: NDArray[np.float32],
    wanted: Collection[str],
    draws: NDArray[np.int64],
) -> Run:
    started = time.perf_counter()
    embedding = _embedding(data, counts, model, method, seed)
    made = time.perf_counter()
    rows = np.flatnonzero(data.is_labelled)
    z, before, labels, batches = embedding[rows], unintegrated[rows], data.label[rows], data.batch[rows]
    resampled = None
    with _quiet_scib():
        scored = metrics.integration_scores(z, labels, batches, seed=seed, unintegrated=before, metrics=wanted)
        if draws.size:
            resolution = None if scored.leiden is None else scored.leiden.resolution
            options = {"seed": seed, "unintegrated": before, "resolution": resolution, "wanted": wanted}
            resampled = resampled_means(z, labels, batches, draws, **options)  # type: ignore[arg-type]
    return Run(
        method,
        seed,
        key,
        dict(scored.scores),
        resampled,
        n_scored=rows.size,
        n_drawn=draws.shape[1] if draws.size else 0,
        n_dimensions=embedding.shape[1],
        seconds=made - started,
        seconds_score=time.perf_counter() - made,
    )


def _embedding(
    data: BatchedCells, counts: sp.csr_matrix, model: ScDiVa, method: str, seed: int
) -> NDArray[np.floating[Any]]:
    if method == CEILING:
        return oracle(data.label, seed=seed)
    if method in baselines.BASELINES:
        return baselines.BASELINES[method](counts, data.batch, data.label, seed=seed)
    if method == "zero_shot":
        return embed_cells(model, data.cells)
    # deferred: training loads lightning, which the other methods do not need
    from scdiva.tasks.integrate import integrate_cells

    labels = data.label if method in SEES_LABELS else None
    config = IntegrationConfig.published() if method == "scdiva_published" else None
    return integrate_cells(data.cells, data.batch, model, labels=labels, config=config, seed=seed, name=data.name).z


def _notes(data: BatchedCells, n_drawn: int) -> list[str]:
    n_without = int((~data.is_labelled).sum())
    notes = [
        "All methods: the same cells, and the genes that the file measures and the model knows.",
        f"{TITLES[CEILING]}: perfect for types by construction; batches are in random order within each type, "
        "which is what its batch scores are of.",
        f"Intervals: over cells ({N_DRAWS} subsamples of {n_drawn:,} without replacement, first seed) and seeds; the "
        "best baseline is the best after the fact.",
    ]
    if n_without:
        notes.insert(1, f"{n_without:,} cells without a label are integrated with the others, and are in no score.")
    return notes


@contextmanager
def _quiet_scib() -> Iterator[None]:
    """Keep scib-metrics from saying of every small type that kBET leaves it out; it sets its own level on import."""
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(disabled)
