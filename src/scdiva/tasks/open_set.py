"""Open sets: how well cells of a type that the reference lacks are told from cells of known types.

One type at a time is taken out of the training cells. Every method gives each held-out cell a novelty and has a
threshold of its own: the AUROC judges the one, the shares of known and unknown cells above the threshold the other.
All methods see the same cells.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines.annotation import MAX_ITERATIONS, N_NEIGHBOURS, C
from scdiva.data.components import components_of, fit_components, log_cp10k, variable_genes
from scdiva.errors import ScdivaError, SourceError
from scdiva.metrics.annotation import N_DRAWS, Interval, open_set_auroc
from scdiva.models.annotators import FALSE_UNKNOWN_RATE, Probe, ReferenceIndex
from scdiva.models.base import Embedder
from scdiva.tasks.annotation_splits import WITHIN, Task, joined, validation_folds
from scdiva.tasks.embed import embed_cells
from scdiva.tasks.evaluation_rows import append_row, package_versions, read_rows, row_key

OURS = ("probe", "reference")
REFERENCE = "knn_pca"
"""The method that differences are from."""
NULL = "random"
METHODS = (*OURS, REFERENCE, "knn_pca_of_all", "logistic_pca", NULL)
TRANSDUCTIVE = ("probe", "knn_pca_of_all")
"""Methods whose components are fitted to held-out cells, too."""
TITLES = {
    "probe": "scDiVa probe, novelty",
    "reference": "scDiVa neighbours, novelty",
    REFERENCE: "distance to 15-nn, PCA-50",
    "knn_pca_of_all": "distance to 15-nn, PCA-50 of all cells",
    "logistic_pca": "1 − max probability, logistic regression on PCA-50",
    NULL: "random numbers (null)",
}
MIN_CELLS = 10
"""Types of fewer held-out cells are not left out."""
PACKAGES = ("scdiva", "numpy", "scipy", "scikit-learn", "scanpy", "anndata", "torch")
"""What runs depend on: their versions are in every row."""
TABLE = "open set"
"""What rows say that they are; other lines of the same file are of other tables."""
OUR_VERSION = 2
"""Of our annotators: rows of an earlier one are of other code, and are not used again."""
_N_FOLDS = 5
_FORMAT = 1
_Z = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class OpenSetRun:
    """One method with one type left out, on the split of one seed: one line of ``rows.jsonl``.

    Parameters
    ----------
    task, left_out, method, seed
        Which.
    key
        Hash of data, split, method and settings: a line is used again only if it is the same.
    auroc
        Probability that a cell of the type is more novel than one of a known type; 0.5 is chance.
    false_unknown_rate, recall
        Share of known cells, and of cells of the type, above the method's own threshold.
    n_known, n_unknown
        Numbers of held-out cells.
    seconds
        To fit and to score, embedding included.
    versions
        Packages that ran.
    """

    task: str
    left_out: str
    method: str
    seed: int
    key: str
    auroc: float
    false_unknown_rate: float
    recall: float
    n_known: int
    n_unknown: int
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and texts."""
        row = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {"table": TABLE, **row, "versions": dict(self.versions)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` made."""
        return cls(**{name: value for name, value in found.items() if name != "table"})

    def __str__(self) -> str:
        return (
            f"{self.task} without {self.left_out}, {self.method}, seed {self.seed}: AUROC {self.auroc:.3f}, unknown: "
            f"{self.false_unknown_rate:.2f} of known and {self.recall:.2f} of new cells; {self.seconds:.1f} s"
        )


@dataclass(frozen=True)
class OpenSetReport:
    """The result of :func:`run_open_set`.

    Parameters
    ----------
    runs
        One per task, type, method and seed.
    """

    runs: tuple[OpenSetRun, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order of their runs."""
        return tuple(dict.fromkeys(run.task for run in self.runs))

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order of their runs."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    def types(self, task: str) -> tuple[str, ...]:
        """Types that are left out in turn."""
        return tuple(dict.fromkeys(run.left_out for run in self.runs if run.task == task))

    def table(self, task: str, method: str, score: str = "auroc") -> NDArray[np.float64]:
        """Return a score, ``(n_types, n_seeds)``; NaN where it is missing."""
        runs = [run for run in self.runs if run.task == task and run.method == method]
        types, seeds = self.types(task), sorted({run.seed for run in self.runs if run.task == task})
        found = np.full((len(types), len(seeds)), np.nan)
        for run in runs:
            found[types.index(run.left_out), seeds.index(run.seed)] = getattr(run, score)
        return found

    def mean(self, task: str, method: str, score: str = "auroc") -> float:
        """Return the mean over types, of means over seeds."""
        return float(np.nanmean(np.nanmean(self.table(task, method, score), axis=1)))

    def interval(self, task: str, method: str) -> Interval:
        """Return the mean AUROC with a bootstrap interval; see :func:`over_types_and_seeds`."""
        return over_types_and_seeds(self.table(task, method))

    def difference(self, task: str, method: str) -> Interval | None:
        """Return the AUROC minus that of the distance to 15 neighbours in PCA-50, paired by type and seed."""
        if method == REFERENCE or REFERENCE not in self.methods:
            return None
        return over_types_and_seeds(self.table(task, method) - self.table(task, REFERENCE))

    def check_null(self) -> None:
        """Refuse a report in which random numbers tell new cells from known ones.

        Raises
        ------
        ScdivaError
            The mean AUROC of the null is more than five of its standard deviations from 0.5.
        """
        for task in self.tasks:
            null = [run for run in self.runs if run.task == task and run.method == NULL]
            if not null:
                continue
            # variance of the Mann-Whitney statistic of two samples of one distribution, over (n m)²
            variance = [(r.n_known + r.n_unknown + 1) / (12.0 * r.n_known * r.n_unknown) for r in null]
            spread = float(np.sqrt(np.sum(variance))) / len(null)
            found = float(np.mean([run.auroc for run in null]))
            if abs(found - 0.5) > 5 * spread:
                raise ScdivaError(
                    f"the null of the open set has an AUROC of {found:.3f} on {task}",
                    expected=f"0.5 ± {5 * spread:.3f}",
                    fix="report it: something is wrong with the scoring; the rows that were measured are kept",
                )

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        summary = []
        for task in self.tasks:
            for method in self.methods:
                auroc, gap = self.interval(task, method), self.difference(task, method)
                summary.append(
                    {
                        "task": task,
                        "method": method,
                        "n_types": len(self.types(task)),
                        "auroc": [auroc.value, auroc.low, auroc.high],
                        "auroc_minus_knn_pca": None if gap is None else [gap.value, gap.low, gap.high],
                        "false_unknown_rate": self.mean(task, method, "false_unknown_rate"),
                        "recall": self.mean(task, method, "recall"),
                        "auroc_by_type": dict(
                            zip(self.types(task), self.table(task, method).mean(axis=1).tolist(), strict=True)
                        ),
                    }
                )
        return {"summary": summary, "runs": [run.to_dict() for run in self.runs]}

    def to_lines(self) -> list[str]:
        """Return the tables, as lines of Markdown."""
        lines = []
        for task in self.tasks:
            types = self.types(task)
            n_seeds = self.table(task, self.methods[0]).shape[1]
            plural = "s" if n_seeds != 1 else ""
            lines += [
                f"Open set, {task}: each of {len(types)} types left out in turn, {n_seeds} seed{plural}.",
                "",
                "| | AUROC | minus distance to 15-nn, PCA-50 | called unknown: known cells | new cells | seconds |",
                "|---|---:|---:|---:|---:|---:|",
            ]
            for method in self.methods:
                auroc, gap = self.interval(task, method), self.difference(task, method)
                shown = "–" if gap is None else f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})"
                if gap is not None and gap.low > 0 and method in OURS:
                    shown = f"**{shown}**"
                rates = [self.mean(task, method, score) for score in ("false_unknown_rate", "recall")]
                seconds = np.mean([r.seconds for r in self.runs if r.task == task and r.method == method])
                lines.append(
                    f"| {TITLES[method]} | {auroc.value:.3f} ({auroc.low:.3f} to {auroc.high:.3f}) | {shown} | "
                    f"{rates[0]:.3f} | {rates[1]:.3f} | {seconds:.1f} |"
                )
            head = " | ".join(TITLES[method] for method in self.methods)
            lines += ["", f"| AUROC, type left out | cells | {head} |", "|---|---:|" + "---:|" * len(self.methods)]
            tables = [self.table(task, method).mean(axis=1) for method in self.methods]
            for i, name in enumerate(types):
                n = next(run.n_unknown for run in self.runs if run.task == task and run.left_out == name)
                lines.append(f"| {name} | {n:,} | " + " | ".join(f"{values[i]:.3f}" for values in tables) + " |")
            lines.append("")
        return lines


def over_types_and_seeds(
    values: NDArray[np.float64], *, n_draws: int = N_DRAWS, level: float = 0.95, seed: int = 0
) -> Interval:
    """Mean over types of means over seeds, with a percentile bootstrap in two steps: types, then seeds within types.

    Seeds of one type share its cells: as independent draws they would make the interval too narrow (our decision). With
    few types it is too narrow all the same.

    Parameters
    ----------
    values
        ``(n_types, n_seeds)``.
    n_draws, level
        Bootstrap draws, and coverage.
    seed
        Of the draws.
    """
    rng = np.random.default_rng([seed, 13])
    n_types, n_seeds = values.shape
    types = rng.integers(n_types, size=(n_draws, n_types, 1))
    draws = values[types, rng.integers(n_seeds, size=(n_draws, n_types, n_seeds))].mean(axis=(1, 2))
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), level)


def leave_type_out(task: Task, name: str) -> Task:
    """Take a type out of the training cells.

    Within a set they join the held-out cells, which then hold all cells of the type; across sets and groups they do
    not, since then the set, and not the type, would be what is new.
    """
    is_left_out = task.train.label == name
    train, moved = (task.train.take(np.flatnonzero(rows)) for rows in (~is_left_out, is_left_out))
    test = joined(task.test, moved) if task.kind == WITHIN else task.test
    return replace(task, train=train, test=test)


def types_to_leave_out(task: Task, *, min_cells: int = MIN_CELLS) -> tuple[str, ...]:
    """Return the trained types with enough held-out cells once they are left out.

    Raises
    ------
    SourceError
        There is none, or fewer than three types: two must be left to train on.
    """
    trained = np.unique(task.train.label)
    held = np.concatenate([task.test.label, task.train.label]) if task.kind == WITHIN else task.test.label
    names = tuple(str(name) for name in trained if (held == name).sum() >= min_cells)
    if not names or trained.size < 3:
        raise SourceError(
            f"{task.name} has {trained.size} types, {len(names)} of them with {min_cells} held-out cells",
            expected="three types, one of them with as many cells",
            fix="leave the open set out",
        )
    return names


def run_open_set(
    tasks: Sequence[Callable[[int], Task]],
    model: Embedder,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    rows_path: Path | None = None,
    on_row: Callable[[OpenSetRun], None] | None = None,
) -> OpenSetReport:
    """Leave out each type of each task in turn.

    Parameters
    ----------
    tasks
        As in :func:`~scdiva.tasks.evaluate_annotation.evaluate_annotation`.
    model
        The frozen model.
    methods
        Of :data:`METHODS`.
    seeds
        Seeds of splits and methods.
    rows_path
        JSONL file that takes each run as it finishes; runs that are there already are not run again.
    on_row
        Called with each run.

    Raises
    ------
    SourceError
        No type can be left out.
    ScdivaError
        The null is not at 0.5.
    """
    rows = [row for row in read_rows(rows_path) if row.get("table") == TABLE]
    known = {run.key: run for run in map(OpenSetRun.from_dict, rows)}
    versions = package_versions(PACKAGES)
    model_hash = str(model.provenance["model_hash"])
    runs = []
    for make in tasks:
        for seed in seeds:
            task = make(seed)
            embedding: list[_Embedding] = []
            for name in types_to_leave_out(task):
                split = leave_type_out(task, name)
                content = split.digest()
                space: list[_Space] = []
                for method in methods:
                    version = [OUR_VERSION] if method in OURS else []
                    key = row_key(_FORMAT, TABLE, content, name, method, seed, model_hash, *version)
                    run = known.get(key)
                    if run is None:
                        if method in OURS and not embedding:
                            embedding.append(_Embedding.of(model, task))
                        if method in ("knn_pca", "logistic_pca") and not space:
                            space.append(_Space.fit(split, seed))
                        run = replace(_run(split, name, method, seed, key, embedding, space), versions=versions)
                        if rows_path is not None:
                            append_row(rows_path, run.to_dict())
                    runs.append(run)
                    if on_row is not None:
                        on_row(run)
    report = OpenSetReport(tuple(runs))
    report.check_null()
    return report


@dataclass(frozen=True, slots=True)
class _Embedding:
    """z of training and held-out cells before a type is left out; a cell's z depends on the cell alone."""

    train: _Z
    test: _Z
    label: NDArray[np.str_]
    seconds: float

    @classmethod
    def of(cls, model: Embedder, task: Task) -> Self:
        started = time.perf_counter()
        train, test = (embed_cells(model, part.cells) for part in (task.train, task.test))
        return cls(train, test, task.train.label, time.perf_counter() - started)

    def without(self, task: Task, name: str) -> tuple[_Z, _Z]:
        """Return z of the cells of :func:`leave_type_out`."""
        is_left_out = self.label == name
        test = np.concatenate([self.test, self.train[is_left_out]]) if task.kind == WITHIN else self.test
        return self.train[~is_left_out], test


@dataclass(frozen=True, slots=True)
class _Fold:
    """Components of some training cells (``near``, with labels) and of others (``far``) that had no part in them."""

    near: _Z
    label: NDArray[np.str_]
    far: _Z


@dataclass(frozen=True, slots=True)
class _Space:
    """Components of the training cells' variable genes: of training cells and of held-out ones.

    Parameters
    ----------
    near, far
        Of training cells, and of held-out cells.
    folds
        For thresholds: components of four fifths of the training cells each. Cells that components are fitted to lie
        further from each other than those that are not; distances between the former are no measure of the latter.
        Empty where components are fitted to held-out cells, too.
    seconds
        That it took.
    """

    near: _Z
    far: _Z
    folds: tuple[_Fold, ...]
    seconds: float

    @classmethod
    def fit(cls, task: Task, seed: int, *, is_of_all: bool = False) -> Self:
        started = time.perf_counter()
        near, far = _values(task)
        fitted = sp.csr_matrix(sp.vstack([near, far])) if is_of_all else near
        genes = variable_genes(fitted)
        near, far, fitted = (sp.csr_matrix(part[:, genes]) for part in (near, far, fitted))
        pca = fit_components(fitted, seed=seed)
        label = task.train.label
        fold = validation_folds(label, np.random.default_rng([seed, 21]), n_folds=_N_FOLDS)
        folds = []
        for i in () if is_of_all else range(_N_FOLDS):
            own = fold != i
            if own.all() or np.unique(label[own]).size < 2:
                continue
            part = fit_components(near[own], seed=seed)
            folds.append(_Fold(components_of(part, near[own]), label[own], components_of(part, near[~own])))
        z_near, z_far = (components_of(pca, values) for values in (near, far))
        return cls(z_near, z_far, tuple(folds), time.perf_counter() - started)

    def threshold(self, novelty: Callable[[_Z, NDArray[np.str_], _Z], NDArray[np.floating]]) -> float:
        """Return what 5 % of training cells exceed that had no part in the fit."""
        found = [novelty(fold.near, fold.label, fold.far) for fold in self.folds]
        return float(np.quantile(np.concatenate(found), 1.0 - FALSE_UNKNOWN_RATE)) if found else float("inf")


@dataclass(frozen=True, slots=True)
class _Novelty:
    """How unlike the training cells each held-out cell is, and what is too unlike."""

    value: NDArray[np.floating]
    threshold: float


def _run(
    task: Task,
    name: str,
    method: str,
    seed: int,
    key: str,
    embedding: Sequence[_Embedding],
    space: Sequence[_Space],
) -> OpenSetRun:
    started = time.perf_counter()
    spent = 0.0
    if method in OURS:
        found = _ours(task, method, seed, *embedding[0].without(task, name))
        spent = embedding[0].seconds
    elif method == NULL:
        rng = np.random.default_rng([seed, 19, int(key[:8], 16)])
        found = _Novelty(rng.random(task.test.label.size), 1.0 - FALSE_UNKNOWN_RATE)
    elif method == "knn_pca_of_all":
        found = _neighbour_distance_of_all(_Space.fit(task, seed, is_of_all=True))
    else:
        novelty = _neighbour_distance if method == REFERENCE else _least_sure
        value = novelty(space[0].near, task.train.label, space[0].far)
        found = _Novelty(value, space[0].threshold(novelty))
        spent = space[0].seconds
    seconds = round(time.perf_counter() - started + spent, 3)
    # of types that were never trained on, a published split may have more than the one that is left out
    is_known, is_new = np.isin(task.test.label, np.unique(task.train.label)), task.test.label == name
    is_called = found.value > found.threshold
    return OpenSetRun(
        task.name,
        name,
        method,
        seed,
        key,
        open_set_auroc(-found.value[is_known], -found.value[is_new]),
        float(is_called[is_known].mean()),
        float(is_called[is_new].mean()),
        int(is_known.sum()),
        int(is_new.sum()),
        seconds,
    )


def _ours(task: Task, method: str, seed: int, z: _Z, z_test: _Z) -> _Novelty:
    train, test = task.train.cells, task.test.cells
    classes, code = np.unique(task.train.label, return_inverse=True)
    annotator: Probe | ReferenceIndex
    if method == "reference":
        annotator = ReferenceIndex.fit(z, code, classes.size)
    else:
        annotator = Probe.fit(train, z, code, classes.size, seed=seed, unlabelled=(test, z_test)).aligned(test, z_test)
    return _Novelty(annotator.calls(test, z_test).novelty, annotator.calibration.threshold)


def _neighbour_distance(near: _Z, label: NDArray[np.str_], far: _Z) -> NDArray[np.float64]:
    """Mean distance to the 15 nearest training cells."""
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=min(N_NEIGHBOURS, near.shape[0])).fit(near)
    return np.asarray(index.kneighbors(far)[0].mean(axis=1))


def _neighbour_distance_of_all(space: _Space) -> _Novelty:
    """Return mean distances where components are of all cells: the threshold is what 5 % of training cells exceed."""
    from sklearn.neighbors import NearestNeighbors

    k = min(N_NEIGHBOURS, space.near.shape[0] - 1)
    index = NearestNeighbors(n_neighbors=k).fit(space.near)
    own = index.kneighbors()[0].mean(axis=1)  # without an argument a cell is not its own neighbour
    far = index.kneighbors(space.far)[0].mean(axis=1)
    return _Novelty(far, float(np.quantile(own, 1.0 - FALSE_UNKNOWN_RATE)))


def _least_sure(near: _Z, label: NDArray[np.str_], far: _Z) -> NDArray[np.float64]:
    """1 minus the largest probability."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=C, max_iter=MAX_ITERATIONS).fit(near, label)
    return np.asarray(1.0 - fitted.predict_proba(far).max(axis=1))


def _values(task: Task) -> list[sp.csr_matrix]:
    genes = np.flatnonzero(task.train.cells.is_measured.all(axis=0))
    return [log_cp10k(sp.csr_matrix(part.cells.counts[:, genes])) for part in (task.train, task.test)]
