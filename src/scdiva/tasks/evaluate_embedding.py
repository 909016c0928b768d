"""``evaluate embedding``: how well a model's z, as it comes, keeps known cell types (and mixes batches).

Beside it a PCA of the same cells, a random projection and shuffled labels (nulls), and a classifier of the counts that
is shown labels (a height to measure by, not a bound). Embeddings see all cells and no labels; cells without a label,
and types of fewer than ten cells, are in no score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines import annotation as classifiers
from scdiva.baselines import embedding as baselines
from scdiva.baselines.common import require
from scdiva.data.conditions import column_text, refuse_missing_batches
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, ScdivaError, SourceError
from scdiva.metrics import integration
from scdiva.metrics.annotation import Interval
from scdiva.metrics.embedding import kmeans_nmi, knn_scores, paired_difference
from scdiva.tasks.embed import embed_cells
from scdiva.tasks.evaluate_integration import known_labels
from scdiva.tasks.evaluation_rows import (
    append_row,
    content_hash,
    mean_and_sd,
    mean_text,
    or_nan,
    or_none,
    package_versions,
    read_rows,
    row_key,
    write_report,
)
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from scdiva.data.source import DataLike
    from scdiva.models.base import Embedder

OURS, PCA, NULL_LABELS, NULL_DIRECTIONS, CEILING = "scdiva", "pca", "shuffled", "random_projection", "ceiling"
DEFAULT_METHODS = (OURS, PCA, NULL_DIRECTIONS, NULL_LABELS, CEILING)
METHODS = (OURS, PCA, "scvi", NULL_DIRECTIONS, NULL_LABELS, CEILING)
"""scVI takes minutes: only when it is asked for."""
BASELINES = (PCA, "scvi")
TITLES: Mapping[str, str] = {
    OURS: "scDiVa, as it comes",
    PCA: "PCA-50 of the set's own 2,000 HVG",
    "scvi": "scVI trained on the set",
    NULL_DIRECTIONS: "random projection to 50 (null)",
    NULL_LABELS: "scDiVa with shuffled labels (null)",
    CEILING: "logistic regression on all genes, shown labels (ceiling)",
}
SCORES: Mapping[str, str] = {
    "knn_accuracy": "15-nn accuracy",
    "knn_macro_f1": "15-nn macro-F1",
    "probe_accuracy": "linear probe accuracy",
    "probe_macro_f1": "linear probe macro-F1",
    "kmeans_nmi": "NMI (k-means)",
    "asw_label": "ASW of types",
    "clisi": "cLISI",
    "asw_batch": "ASW of batches",
    "bras": "BRAS",
    "graph_connectivity": "graph connectivity",
    "ilisi": "iLISI",
}
_OF_TYPES, _OF_BATCHES = ("asw_label", "clisi"), ("asw_batch", "bras", "graph_connectivity", "ilisi")
MIN_CELLS = 10
N_FOLDS = 5
N_STARTS = 10
LEVEL = 0.95
_SHUFFLE_STREAM, _INTERVAL_STREAM = 31, 37
_FORMAT = 1
_VERSIONS = ("scdiva", "scikit-learn", "scanpy", "scvi-tools")


@dataclass(frozen=True, slots=True)
class LabelledCells:
    """All cells of a set in the order of the model's vocabulary, with what is known of them.

    Parameters
    ----------
    name
        Of the set.
    cells
        Their counts.
    label
        ``(n_cells,)`` type; empty where it is not known.
    batch
        ``(n_cells,)`` batch, or None.
    """

    name: str
    cells: CellCounts
    label: NDArray[np.str_]
    batch: NDArray[np.str_] | None = None

    @classmethod
    def open(
        cls, data: DataLike, model: Embedder, label_key: str, batch_key: str | None = None, *, layer: str | None = None
    ) -> Self:
        """Read all cells of a file or an AnnData.

        Raises
        ------
        SourceError
            Fewer than two types have ten cells.
        KeyNotFoundError, ScaleError, GeneError
            The data cannot be used.
        """
        source = open_source(data)
        label = known_labels(column_text(source.column(label_key)))
        batch = None if batch_key is None else column_text(source.column(batch_key))
        if batch is not None:
            refuse_missing_batches(batch, source.name)
        reader = open_counts(source, model.vocabulary, layer=layer)
        found = cls(source.name, reader.read(np.arange(len(reader))), label, batch)
        n_types = np.unique(label[found.is_scored]).size
        if n_types < 2:
            raise SourceError(
                f"{n_types} types of {source.name} have {MIN_CELLS} cells",
                expected="at least two",
                fix="name another column, or give more cells",
            )
        return found

    @property
    def is_scored(self) -> NDArray[np.bool_]:
        """Which cells have a label, and nine others with it."""
        _, code, sizes = np.unique(self.label, return_inverse=True, return_counts=True)
        return (self.label != "") & (sizes >= MIN_CELLS)[code]

    @property
    def counts(self) -> sp.csr_matrix:
        """Counts of the genes that the file measures and the model knows, CSR."""
        return sp.csr_matrix(self.cells.counts[:, np.flatnonzero(self.cells.is_measured.all(axis=0))])


@dataclass(frozen=True, slots=True)
class Run:
    """One method with one seed: one line of ``rows.jsonl``.

    Parameters
    ----------
    method, seed
        Which. The seed is that of folds, k-means, PCA solver, directions and shuffling; z has none.
    key
        Hash of data, method, seed and settings: a line is used again only if it is the same.
    scores
        Names of :data:`SCORES` to numbers; what a method does not have is left out, NaN has no value for these cells.
    is_correct
        ``knn_accuracy`` and ``probe_accuracy`` of every scored cell: ``(n_cells,)`` bool.
    seconds
        To make the embedding.
    """

    method: str
    seed: int
    key: str
    scores: Mapping[str, float]
    is_correct: Mapping[str, NDArray[np.bool_]]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers."""
        return {
            "method": self.method,
            "seed": self.seed,
            "key": self.key,
            "scores": {name: or_none(value) for name, value in self.scores.items()},
            "is_correct": {name: values.astype(int).tolist() for name, values in self.is_correct.items()},
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` made."""
        return cls(
            found["method"],
            int(found["seed"]),
            found["key"],
            {name: or_nan(value) for name, value in found["scores"].items()},
            {name: np.array(values, dtype=bool) for name, values in found["is_correct"].items()},
            float(found["seconds"]),
        )

    def __str__(self) -> str:
        shown = ("knn_accuracy", "probe_accuracy", "kmeans_nmi")
        parts = [f"{SCORES[name]} {self.scores[name]:.3f}" for name in shown if name in self.scores]
        return f"{self.method}, seed {self.seed}: {', '.join(parts)}; {self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class EmbeddingReport:
    """The result of :func:`evaluate_embedding`.

    Parameters
    ----------
    name
        Of the set.
    confounding
        What batch and type have to do with each other; empty without batches.
    n_cells, n_scored, n_types, n_genes
        Sizes.
    runs
        One per method and seed.
    notes
        What the table needs to be read rightly.
    versions
        Packages that ran.
    """

    name: str
    confounding: str
    n_cells: int
    n_scored: int
    n_types: int
    n_genes: int
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order of the table."""
        there = {run.method for run in self.runs}
        return tuple(name for name in METHODS if name in there)

    @property
    def scores(self) -> tuple[str, ...]:
        """Scores that were measured, in the order of the table."""
        return tuple(name for name in SCORES if any(name in run.scores for run in self.runs))

    def values(self, method: str, score: str) -> list[float]:
        """Return a score over seeds; NaN left out."""
        found = [run.scores[score] for run in self.runs if run.method == method and score in run.scores]
        return [value for value in found if np.isfinite(value)]

    def difference(self, score: str, other: str = PCA) -> Interval | None:
        """Return our accuracy minus another's, with a 95 % bootstrap interval over cells of the mean over seeds.

        Parameters
        ----------
        score
            ``knn_accuracy`` or ``probe_accuracy``.
        other
            A method.

        Returns
        -------
        Interval
            None where one of the two was not run.
        """
        found = []
        for method in (OURS, other):
            runs = [run for run in self.runs if run.method == method and score in run.is_correct]
            if not runs:
                return None
            found.append(np.mean([run.is_correct[score] for run in runs], axis=0))
        rng = np.random.default_rng(_INTERVAL_STREAM)
        return Interval(*paired_difference(found[0], found[1], rng=rng, level=LEVEL), LEVEL)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        summary = []
        for method in self.methods:
            for score in self.scores:
                if values := self.values(method, score):
                    mean, sd = mean_and_sd(values)
                    row = {"method": method, "score": score, "mean": mean, "sd": or_none(sd), "n": len(values)}
                    summary.append(row)
        differences = {
            f"{OURS} - {other}": {
                score: [gap.value, gap.low, gap.high]
                for score in ("knn_accuracy", "probe_accuracy")
                if (gap := self.difference(score, other)) is not None
            }
            for other in BASELINES
            if other in self.methods
        }
        head = ("name", "confounding", "n_cells", "n_scored", "n_types", "n_genes")
        return {
            **{key: getattr(self, key) for key in head},
            "notes": list(self.notes),
            "versions": dict(self.versions or {}),
            "summary": summary,
            "differences": differences,
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_markdown(self) -> str:
        """Return the table and our differences from the baselines."""
        n_seeds = len({run.seed for run in self.runs})
        lines = [
            f"### {self.name}: {self.n_scored:,} of {self.n_cells:,} cells scored, {self.n_types} types, "
            f"{self.n_genes:,} genes, {n_seeds} seed{'' if n_seeds == 1 else 's'}",
            "",
        ]
        lines += [self.confounding, ""] if self.confounding else []
        lines += [f"| embedding | {' | '.join(SCORES[score] for score in self.scores)} | seconds |"]
        lines += ["|---|" + "---:|" * (len(self.scores) + 1)]
        for method in self.methods:
            cells = [self._cell(method, score) for score in self.scores]
            seconds = np.mean([run.seconds for run in self.runs if run.method == method])
            lines.append(f"| {TITLES[method]} | {' | '.join(cells)} | {seconds:.1f} |")
        lines += [
            "",
            "Mean over seeds (standard deviation); 1 is ideal. Bold: accuracy above every baseline (95 % interval).",
            "",
        ]
        for other in BASELINES:
            for score in ("knn_accuracy", "probe_accuracy"):
                if (gap := self.difference(score, other)) is not None:
                    text = f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
                    lines.append(f"- {SCORES[score]}, {TITLES[OURS]} minus {TITLES[other]}: {text}")
        lines += [f"- {note}" for note in self.notes]
        if self.versions:
            lines.append(f"- Versions: {', '.join(f'{name} {number}' for name, number in self.versions.items())}.")
        return "\n".join(lines).rstrip() + "\n"

    def _cell(self, method: str, score: str) -> str:
        text = mean_text(self.values(method, score))
        gaps = [self.difference(score, other) for other in BASELINES if other in self.methods]
        is_better = method == OURS and bool(gaps) and all(gap is not None and gap.low > 0 for gap in gaps)
        return f"**{text}**" if is_better else text

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``report.md`` and ``report.json``, each whole or not at all."""
        return write_report(folder, self.to_markdown(), self.to_dict())


def evaluate_embedding(
    data: LabelledCells,
    model: Embedder,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    rows_path: Path | None = None,
    on_row: Callable[[Run], None] | None = None,
) -> EmbeddingReport:
    """Score a model's embedding of some cells by their labels, beside a PCA and null controls.

    Parameters
    ----------
    data
        The cells.
    model
        Any model that embeds.
    methods
        Of :data:`METHODS`; :data:`DEFAULT_METHODS` if left out.
    seeds
        Seeds of folds, k-means and methods.
    rows_path
        JSONL file that takes each run as it finishes; runs that are there already are not run again.
    on_row
        Called with each run.

    Raises
    ------
    ConfigError
        An unknown method, or no seed.
    UnsupportedError
        scVI was asked for and is not installed.
    ScdivaError
        The controls are out of order (:func:`check_controls`); the rows are kept.
    """
    chosen = _chosen(methods)
    if not seeds:
        raise ConfigError("no seeds", expected="at least one", fix="leave them out")
    known = {row["key"]: Run.from_dict(row) for row in read_rows(rows_path)}
    columns = (data.label,) if data.batch is None else (data.label, data.batch)
    content, counts, is_scored = content_hash(data.cells, *columns), data.counts, data.is_scored
    z: list[NDArray[np.float32]] = []
    runs = []
    for seed in seeds:
        for method in chosen:
            of_model = str(model.provenance["model_hash"]) if method in (OURS, NULL_LABELS) else ""
            key = row_key(_FORMAT, content, data.batch is not None, method, seed, of_model)
            run = known.get(key)
            if run is None:
                started = time.perf_counter()
                if method in (OURS, NULL_LABELS) and not z:
                    z.append(embed_cells(model, data.cells))
                run = _run(data, counts, method, seed, key, z, started)
                if rows_path is not None:
                    append_row(rows_path, run.to_dict())
            runs.append(run)
            if on_row is not None:
                on_row(run)
    report = EmbeddingReport(
        name=data.name,
        confounding=_confounding(data),
        n_cells=data.cells.n_cells,
        n_scored=int(is_scored.sum()),
        n_types=np.unique(data.label[is_scored]).size,
        n_genes=counts.shape[1],
        runs=tuple(runs),
        notes=_notes(data),
        versions=package_versions(_VERSIONS),
    )
    check_controls(report)
    return report


def check_controls(report: EmbeddingReport) -> None:
    """Refuse a report in which shuffled labels do as well as true ones, or random directions better than components.

    Raises
    ------
    ScdivaError
        Of the accuracy among 15 neighbours, that of shuffled labels is not below that of the PCA, or that of a random
        projection is above it.
    """
    mean = {m: float(np.mean(values)) for m in report.methods if (values := report.values(m, "knn_accuracy"))}
    if PCA not in mean:
        return
    for name in (NULL_LABELS, NULL_DIRECTIONS):
        # on an easy set random directions may be as good
        if name in mean and (mean[name] > mean[PCA] or (name == NULL_LABELS and mean[name] == mean[PCA])):
            raise ScdivaError(
                f"the controls are out of order on {report.name}: {SCORES['knn_accuracy']} {mean[name]:.3f} of "
                f"{TITLES[name]}, {mean[PCA]:.3f} of {TITLES[PCA]}",
                expected="the first to be below the second",
                fix="the set is too small, or its labels say nothing; the rows that were measured are kept",
            )


@dataclass(frozen=True, slots=True)
class Classified:
    """Cells that were classified in folds, each by a classifier that did not see it.

    Parameters
    ----------
    accuracy, macro_f1
        Over all cells; macro-F1 is the mean over all labels present.
    is_correct
        ``(n_cells,)`` bool.
    """

    accuracy: float
    macro_f1: float
    is_correct: NDArray[np.bool_]


def linear_probe(z: NDArray[np.floating[Any]], labels: NDArray[np.str_], *, seed: int) -> Classified:
    """Classify every cell by a logistic regression on the embedding of the other folds.

    The embedding is divided by the mean standard deviation of its dimensions over the training cells, so that C = 1
    means the same for every embedding while dimensions keep their own variances (our decision). Folds are those of
    :func:`~scdiva.metrics.embedding.knn_scores`.

    Parameters
    ----------
    z
        ``(n_cells, n_dimensions)``.
    labels
        ``(n_cells,)``; every label at least five times.
    seed
        Seed of the stratified folds.
    """
    from sklearn.linear_model import LogisticRegression

    def classify(train: NDArray[np.int64], test: NDArray[np.int64]) -> NDArray[np.str_]:
        scale = float(z[train].std(axis=0).mean()) or 1.0
        fitted = LogisticRegression(max_iter=1000).fit(z[train] / scale, labels[train])
        return np.asarray(fitted.predict(z[test] / scale))

    return _in_folds(classify, labels, seed)


def _shown_labels(counts: sp.csr_matrix, labels: NDArray[np.str_], seed: int) -> Classified:
    """Classify every cell by a logistic regression on all genes of the other folds."""

    def classify(train: NDArray[np.int64], test: NDArray[np.int64]) -> NDArray[np.str_]:
        return classifiers.logistic_all_genes(counts[train], labels[train], counts[test], seed=seed).label

    return _in_folds(classify, labels, seed)


def _in_folds(
    classify: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.str_]], labels: NDArray[np.str_], seed: int
) -> Classified:
    from sklearn.metrics import f1_score
    from sklearn.model_selection import StratifiedKFold

    predicted = np.empty_like(labels)
    for train, test in StratifiedKFold(N_FOLDS, shuffle=True, random_state=seed).split(labels[:, None], labels):
        predicted[test] = classify(train, test)
    is_correct = predicted == labels
    return Classified(float(is_correct.mean()), float(f1_score(labels, predicted, average="macro")), is_correct)


def _run(
    data: LabelledCells,
    counts: sp.csr_matrix,
    method: str,
    seed: int,
    key: str,
    z: Sequence[NDArray[np.float32]],
    started: float,
) -> Run:
    rows = np.flatnonzero(data.is_scored)
    labels = data.label[rows]
    if method == CEILING:
        probe = _shown_labels(sp.csr_matrix(counts[rows]), labels, seed)
        scores = {"probe_accuracy": probe.accuracy, "probe_macro_f1": probe.macro_f1}
        seconds = time.perf_counter() - started
        return Run(method, seed, key, scores, {"probe_accuracy": probe.is_correct}, seconds)
    points = np.asarray(z[0] if method in (OURS, NULL_LABELS) else _baseline(data, counts, method, seed))[rows]
    seconds = time.perf_counter() - started
    if method == NULL_LABELS:
        labels = np.random.default_rng([seed, _SHUFFLE_STREAM]).permutation(labels)
    knn, probe = knn_scores(points, labels, seed=seed), linear_probe(points, labels, seed=seed)
    batches = np.full(rows.size, "all") if data.batch is None else data.batch[rows]
    wanted = (*_OF_TYPES, *(() if data.batch is None else _OF_BATCHES))
    found = integration.integration_scores(points, labels, batches, seed=seed, metrics=wanted)
    scores = {
        "knn_accuracy": knn.accuracy,
        "knn_macro_f1": knn.macro_f1,
        "probe_accuracy": probe.accuracy,
        "probe_macro_f1": probe.macro_f1,
        "kmeans_nmi": float(kmeans_nmi(points, labels, seeds=range(N_STARTS * seed, N_STARTS * (seed + 1))).mean()),
        **{name: found[name] for name in found.scores},
    }
    return Run(method, seed, key, scores, {"knn_accuracy": knn.is_correct, "probe_accuracy": probe.is_correct}, seconds)


def _baseline(data: LabelledCells, counts: sp.csr_matrix, method: str, seed: int) -> NDArray[np.floating[Any]]:
    import anndata as ad

    if method == NULL_DIRECTIONS:
        return baselines.random_projection(data.cells, seed=seed)
    # genes without a molecule are neither variable nor normalisable
    seen = ad.AnnData(sp.csr_matrix(counts[:, np.flatnonzero(np.bincount(counts.indices, minlength=counts.shape[1]))]))
    return baselines.pca_of_hvg(seen, seed=seed) if method == PCA else baselines.scvi_latent(seen, seed=seed)


def _chosen(methods: Sequence[str] | None) -> tuple[str, ...]:
    if methods is None:
        return DEFAULT_METHODS
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ConfigError(
            f"no method is called {unknown[0]!r}" if unknown else "no methods",
            expected=f"some of {', '.join(METHODS)}",
            fix="correct the name",
        )
    if "scvi" in methods:
        require("scvi", "scvi", "scvi-tools")
    return tuple(name for name in METHODS if name in methods)


def _confounding(data: LabelledCells) -> str:
    if data.batch is None:
        return ""
    rows = data.is_scored
    return integration.batch_label_confounding(data.label[rows], data.batch[rows]).sentence


def _notes(data: LabelledCells) -> tuple[str, ...]:
    n_without, n_rare = int((data.label == "").sum()), int(((data.label != "") & ~data.is_scored).sum())
    return (
        "All methods: the same cells, and the genes that the file measures and the model knows. Neighbours and "
        f"regressions in {N_FOLDS} stratified folds, the same for every method; NMI: mean of {N_STARTS} starts.",
        f"In no score: {n_without:,} cells without a label, {n_rare:,} of types with fewer than {MIN_CELLS} cells.",
        "The ceiling is what a classifier makes of the counts that is shown labels. It is no bound: where labels come "
        "from clusters of a PCA, neighbours in a PCA can agree better.",
    )
