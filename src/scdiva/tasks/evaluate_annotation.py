"""``evaluate annotation``: our annotators beside simple classifiers and a null, on the same splits, in one run.

Three kinds of split: within a set (a share of each type is held out), with a few labelled cells of each type, and
across two sets with labels in common. All methods see the genes that both sides measure and the model knows; labels of
held-out cells are seen by none. What may look at unlabelled held-out cells says so (:data:`TRANSDUCTIVE`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines import annotation as baselines
from scdiva.data.conditions import is_missing, label_text
from scdiva.data.output import replacing
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, KeyNotFoundError, ScdivaError, SourceError
from scdiva.metrics import annotation as metrics
from scdiva.models.annotators import Probe, ReferenceIndex
from scdiva.models.base import Embedder
from scdiva.tasks.embed import embed_cells
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from scdiva.data.source import CellSource, DataLike

NULL = "shuffled"
OURS = ("probe", "probe_self_trained", "reference")
TRANSDUCTIVE = ("probe", "probe_self_trained", "logistic_pca_of_all")
"""Methods whose components are fitted to held-out cells, too; without their labels."""
METHODS = (*OURS, *baselines.BASELINES)
TITLES = {
    "probe": "scDiVa probe",
    "probe_self_trained": "scDiVa probe, self-trained",
    "reference": "scDiVa neighbours",
    **baselines.TITLES,
}
_FORMAT = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Run:
    """One method on one split: one line of ``rows.jsonl``.

    Parameters
    ----------
    task, method, seed
        Which.
    key
        Hash of data, split, method and settings: a line is used again only if it is the same.
    classes
        Labels of the training cells.
    truth, predicted
        Codes of the held-out cells: positions in ``labels``.
    labels
        All labels, of training and held-out cells.
    scores
        accuracy, balanced_accuracy, macro_f1, calibration_error, nll.
    seconds
        To fit and to predict.
    """

    task: str
    method: str
    seed: int
    key: str
    labels: tuple[str, ...]
    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: NDArray[np.float64]
    scores: Mapping[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers."""
        return {
            "task": self.task,
            "method": self.method,
            "seed": self.seed,
            "key": self.key,
            "labels": list(self.labels),
            "truth": self.truth.tolist(),
            "predicted": self.predicted.tolist(),
            "confidence": [round(float(value), 4) for value in self.confidence],
            "scores": {name: None if np.isnan(value) else value for name, value in self.scores.items()},
            "seconds": round(self.seconds, 3),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` made."""
        return cls(
            found["task"],
            found["method"],
            int(found["seed"]),
            found["key"],
            tuple(found["labels"]),
            np.array(found["truth"], dtype=np.int64),
            np.array(found["predicted"], dtype=np.int64),
            np.array(found["confidence"]),
            {name: float("nan") if value is None else float(value) for name, value in found["scores"].items()},
            float(found["seconds"]),
        )

    def __str__(self) -> str:
        s = self.scores
        return (
            f"{self.task}, {self.method}, seed {self.seed}: accuracy {s['accuracy']:.3f}, "
            f"macro-F1 {s['macro_f1']:.3f}, calibration error {s['calibration_error']:.3f}; {self.seconds:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class AnnotationReport:
    """The result of :func:`evaluate_annotation`.

    Parameters
    ----------
    runs
        One per task, method and seed.
    notes
        What the tables need to be read rightly.
    """

    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order of their runs."""
        return tuple(dict.fromkeys(run.task for run in self.runs))

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order of their runs."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    def values(self, task: str, method: str, score: str) -> list[float]:
        """Return a score over seeds; NaN left out."""
        found = [run.scores[score] for run in self.runs if run.task == task and run.method == method]
        return [value for value in found if np.isfinite(value)]

    def best_baseline(self, task: str, score: str = "macro_f1") -> str | None:
        """Return the baseline with the highest mean."""
        means = {
            name: float(np.mean(values))
            for name in self.methods
            if name in baselines.BASELINES and name != NULL and (values := self.values(task, name, score))
        }
        return max(means, key=lambda name: means[name]) if means else None

    def difference(self, task: str, method: str) -> metrics.Interval | None:
        """Return macro-F1 minus that of the best baseline: mean over seeds, bootstrapped over cells within each.

        The interval is of the mean of the seeds' differences; cells of one split are resampled together.
        """
        best = self.best_baseline(task)
        if best is None or method == best:
            return None
        ours, other = ({r.seed: r for r in self.runs if r.task == task and r.method == name} for name in (method, best))
        found = []
        for seed in sorted(set(ours) & set(other)):
            labels = np.array(ours[seed].labels)
            interval = metrics.paired_bootstrap(
                labels[ours[seed].truth],
                labels[ours[seed].predicted],
                labels[other[seed].predicted],
                rng=np.random.default_rng([seed, 11]),
            ).macro_f1
            found.append((interval.value, interval.low, interval.high))
        if not found:
            return None
        value, low, high = np.mean(found, axis=0)
        return metrics.Interval(float(value), float(low), float(high), 0.95)

    def pooled_calibration_error(self, method: str) -> tuple[float, int]:
        """Return the calibration error over all cells of all runs of a method, and their number."""
        runs = [run for run in self.runs if run.method == method]
        confidence = np.concatenate([run.confidence for run in runs])
        is_correct = np.concatenate([run.truth == run.predicted for run in runs])
        return metrics.expected_calibration_error(confidence, is_correct).error, int(confidence.size)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        summary = []
        for task in self.tasks:
            for method in self.methods:
                row: dict[str, Any] = {"task": task, "method": method}
                for score in ("accuracy", "balanced_accuracy", "macro_f1", "calibration_error", "nll"):
                    values = self.values(task, method, score)
                    row[score] = float(np.mean(values)) if values else None
                    row[f"{score}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
                gap = self.difference(task, method)
                row["best_baseline"] = self.best_baseline(task)
                row["macro_f1_minus_best_baseline"] = None if gap is None else [gap.value, gap.low, gap.high]
                summary.append(row)
        return {"notes": list(self.notes), "summary": summary, "runs": [run.to_dict() for run in self.runs]}

    def to_markdown(self) -> str:
        """Return the table of all tasks: accuracy / macro-F1, and differences from the best baseline."""
        names = self.methods
        lines = [f"| task | seeds | {' | '.join(TITLES.get(name, name) for name in names)} |"]
        lines.append("|---|---:|" + "---:|" * len(names))
        for task in self.tasks:
            n_seeds = len({run.seed for run in self.runs if run.task == task})
            lines.append(f"| {task} | {n_seeds} | " + " | ".join(self._cell(task, name) for name in names) + " |")
        lines += [
            "",
            "Accuracy / macro-F1, means over seeds. Bold: macro-F1 above the best baseline's (95 %).",
            "",
        ]
        ours = [name for name in names if name in OURS]
        lines += [f"| macro-F1 minus best baseline | best baseline | {' | '.join(TITLES[n] for n in ours)} |"]
        lines += ["|---|---|" + "---:|" * len(ours)]
        for task in self.tasks:
            best = self.best_baseline(task)
            cells = []
            for name in ours:
                gap = self.difference(task, name)
                cells.append("–" if gap is None else f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})")
            lines.append(f"| {task} | {TITLES.get(best or '', '–')} | {' | '.join(cells)} |")
        lines += ["", "| calibration error, pooled | " + " | ".join(TITLES.get(n, n) for n in names) + " |"]
        lines += ["|---|" + "---:|" * len(names)]
        pooled = [self.pooled_calibration_error(name) for name in names]
        lines += [f"| all tasks | {' | '.join(f'{error:.3f} (n = {n:,})' for error, n in pooled)} |", ""]
        lines += [f"- {note}" for note in self.notes]
        return "\n".join(lines).rstrip() + "\n"

    def _cell(self, task: str, method: str) -> str:
        accuracy, f1 = (self.values(task, method, score) for score in ("accuracy", "macro_f1"))
        if not f1:
            return "–"
        gap = self.difference(task, method)
        text = f"{np.mean(accuracy):.3f} / {np.mean(f1):.3f}"
        return f"**{text}**" if method in OURS and gap is not None and gap.low > 0 else text

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``report.md`` and ``report.json``, each whole or not at all."""
        targets = folder / "report.md", folder / "report.json"
        texts = self.to_markdown(), json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        for path, text in zip(targets, texts, strict=True):
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return targets


@dataclass(frozen=True, slots=True)
class LabelledCounts:
    """Labelled cells in the order of the model's vocabulary."""

    name: str
    cells: CellCounts
    label: NDArray[np.str_]

    @classmethod
    def open(cls, data: DataLike, model: Embedder, label_key: str, label_map: Mapping[str, str] | None = None) -> Self:
        """Read cells that have a label; with a map, those whose label it names.

        Raises
        ------
        SourceError
            No cell is left.
        KeyNotFoundError, ScaleError, GeneError
            The data cannot be used.
        """
        source = open_source(data)
        label = np.array([label_text(value) for value in source.column(label_key)], dtype=str)
        if label_map is not None:
            unknown = sorted(set(label_map) - set(label.tolist()))
            if unknown:
                raise KeyNotFoundError(
                    f"{source.name} has no label {', '.join(map(repr, unknown[:5]))}",
                    expected=f"labels of .obs[{label_key!r}]: {', '.join(sorted(set(label.tolist()))[:20])}",
                    fix="correct the map",
                )
            label = np.array([label_map.get(name, "") for name in label], dtype=str)
        return cls._of(source, model, label)

    @classmethod
    def of(cls, data: DataLike, model: Embedder, label: NDArray[np.str_]) -> Self:
        """Read cells whose labels are given; those without one are left out.

        Raises
        ------
        SourceError
            No cell is left.
        """
        return cls._of(open_source(data), model, label)

    @classmethod
    def _of(cls, source: CellSource, model: Embedder, label: NDArray[np.str_]) -> Self:
        kinds, inverse = np.unique(label, return_inverse=True)
        rows = np.flatnonzero(~np.array([is_missing(kind) for kind in kinds])[inverse])
        if not rows.size:
            raise SourceError(f"no cell of {source.name} has a label", expected="labels", fix="name another key")
        cells = open_counts(source, model.vocabulary).read(rows)
        return cls(source.name, cells, label[rows])

    def take(self, rows: NDArray[np.int64]) -> Self:
        """Return some cells."""
        return type(self)(self.name, self.cells.take(rows), self.label[rows])


@dataclass(frozen=True, slots=True)
class Task:
    """Training and held-out cells of one seed.

    Parameters
    ----------
    name
        What the table calls it.
    train, test
        Over the genes that both measure.
    """

    name: str
    train: LabelledCounts
    test: LabelledCounts


def within(
    cells: LabelledCounts, seed: int, *, test_fraction: float = 0.2, n_per_type: int | None = None, min_cells: int = 10
) -> Task:
    """Hold out a share of each type; optionally only a few of the others have a label.

    Types of fewer than ``min_cells`` cells are left out.
    """
    rng = np.random.default_rng([seed, 5])
    train, test = [], []
    for name in np.unique(cells.label):
        rows = rng.permutation(np.flatnonzero(cells.label == name))
        if rows.size < min_cells:
            continue
        n_test = max(1, round(test_fraction * rows.size))
        test.append(rows[:n_test])
        train.append(rows[n_test:][:n_per_type])
    if len(train) < 2:
        raise SourceError(
            f"{len(train)} types of {cells.name} have {min_cells} cells", expected="at least two", fix="give more cells"
        )
    name = cells.name if n_per_type is None else f"{cells.name}, {n_per_type} per type"
    return Task(name, *(cells.take(np.sort(np.concatenate(rows))) for rows in (train, test)))


def across(
    train: LabelledCounts, test: LabelledCounts, seed: int, *, n_per_type: int | None = None, min_cells: int = 5
) -> Task:
    """Train on one set and test on another, over types and genes in common."""
    kinds, sizes = np.unique(train.label, return_counts=True)
    common = sorted(set(kinds[sizes >= min_cells].tolist()) & set(test.label.tolist()))
    if len(common) < 2:
        raise SourceError(
            f"{train.name} and {test.name} have {len(common)} labels in common",
            expected="at least two",
            fix="give maps from their labels to common ones",
        )
    rng = np.random.default_rng([seed, 6])
    rows = [rng.permutation(np.flatnonzero(train.label == name))[:n_per_type] for name in common]
    held = np.flatnonzero(np.isin(test.label, common))
    is_shared = np.concatenate([train.cells.is_measured, test.cells.is_measured]).all(axis=0)
    parts = train.take(np.sort(np.concatenate(rows))), test.take(held)
    shared = [LabelledCounts(part.name, part.cells.with_genes(np.asarray(is_shared)), part.label) for part in parts]
    suffix = "" if n_per_type is None else f", {n_per_type} per type"
    return Task(f"{train.name} → {test.name}{suffix}", *shared)


def fixed(name: str, train: LabelledCounts, test: LabelledCounts, seed: int) -> Task:
    """Return a published split: the same for every seed; types that were not trained on count as errors."""
    return Task(name, train, test)


def evaluate_annotation(
    tasks: Sequence[Callable[[int], Task]],
    model: Embedder,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    rows_path: Path | None = None,
    on_row: Callable[[Run], None] | None = None,
) -> AnnotationReport:
    """Run methods on tasks.

    Parameters
    ----------
    tasks
        Each makes the split of a seed: ``partial(within, cells)``, ``partial(across, one, other)``.
    model
        The frozen model.
    methods
        Of :data:`METHODS`; all that are installed if left out.
    seeds
        Seeds of splits and methods.
    rows_path
        JSONL file that takes each run as it finishes; runs that are there already are not run again.
    on_row
        Called with each run.

    Raises
    ------
    ConfigError
        An unknown method, or no seed.
    UnsupportedError
        A method that was asked for needs a package that is not installed.
    ScdivaError
        The null control is not below our methods: something is wrong, and the rows are kept.
    """
    chosen = _chosen(methods)
    if not seeds:
        raise ConfigError("no seeds", expected="at least one", fix="leave them out")
    known = {} if rows_path is None else {run.key: run for run in _read(rows_path)}
    runs = []
    for make in tasks:
        for seed in seeds:
            task = make(seed)
            content = _content(task)
            embedded: list[NDArray[np.float32]] = []
            for method in chosen:
                key = hashlib.sha256(
                    json.dumps([_FORMAT, content, method, seed, str(model.provenance["model_hash"])]).encode()
                ).hexdigest()[:24]
                run = known.get(key)
                if run is None:
                    if method in OURS and not embedded:
                        embedded = [embed_cells(model, part.cells) for part in (task.train, task.test)]
                    run = _run(task, method, seed, key, embedded)
                    if rows_path is not None:
                        _append(rows_path, run)
                runs.append(run)
                if on_row is not None:
                    on_row(run)
    report = AnnotationReport(
        tuple(runs),
        (
            "All methods: the genes that both sides measure and the model knows; types with too few cells left out.",
            f"Fitted to held-out cells as well, without their labels: {', '.join(TITLES[n] for n in TRANSDUCTIVE)}.",
            "The logistic regressions' C was chosen on one split each of pbmc3k and zheng_sorted7_3500.",
        ),
    )
    check_controls(report)
    return report


def check_controls(report: AnnotationReport) -> None:
    """Refuse a report in which labels at random do as well as true ones.

    Raises
    ------
    ScdivaError
        On some task the null's accuracy is not below the best baseline's.
    """
    for task in report.tasks:
        null, best = report.values(task, NULL, "accuracy"), report.best_baseline(task, "accuracy")
        if not null or best is None:
            continue
        found = float(np.mean(report.values(task, best, "accuracy")))
        if float(np.mean(null)) >= found:
            raise ScdivaError(
                f"the controls are out of order on {task}: accuracy {np.mean(null):.3f} with shuffled labels, "
                f"{found:.3f} of {best}",
                expected="shuffled labels to do worse",
                fix="the set is too small, or its labels say nothing; the rows that were measured are kept",
            )


def _chosen(methods: Sequence[str] | None) -> tuple[str, ...]:
    if methods is None:
        try:
            baselines.require_celltypist()
        except ScdivaError:
            log.warning("CellTypist is not installed, and left out: pip install 'scdiva[eval]'")
            return tuple(name for name in METHODS if name != "celltypist")
        return METHODS
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ConfigError(
            f"no method is called {unknown[0]!r}" if unknown else "no methods",
            expected=f"some of {', '.join(METHODS)}",
            fix="correct the name",
        )
    if "celltypist" in methods:
        baselines.require_celltypist()
    return tuple(dict.fromkeys(methods))


def _run(task: Task, method: str, seed: int, key: str, embedded: Sequence[NDArray[np.float32]]) -> Run:
    started = time.perf_counter()
    if method in OURS:
        classes, probability = _ours(task, method, seed, embedded)
    else:
        genes = np.flatnonzero(task.train.cells.is_measured.all(axis=0))
        counts = [sp.csr_matrix(part.cells.counts[:, genes]) for part in (task.train, task.test)]
        found = baselines.BASELINES[method](counts[0], task.train.label, counts[1], seed=seed)
        classes, probability = found.classes, found.probabilities
    seconds = time.perf_counter() - started
    predicted = np.asarray(classes)[probability.argmax(axis=1)]
    scored = metrics.annotation_scores(task.test.label, predicted, probability, classes)
    labels = tuple(sorted({*task.train.label.tolist(), *task.test.label.tolist()}))
    scores = {
        "accuracy": scored.accuracy,
        "balanced_accuracy": scored.balanced_accuracy,
        "macro_f1": scored.macro_f1,
        "calibration_error": scored.calibration_error.value,
        "nll": scored.negative_log_likelihood.value,
    }
    codes = [np.searchsorted(labels, values) for values in (task.test.label, predicted)]
    return Run(task.name, method, seed, key, labels, codes[0], codes[1], probability.max(axis=1), scores, seconds)


def _ours(
    task: Task, method: str, seed: int, embedded: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.str_], NDArray[np.floating]]:
    train, test = task.train.cells, task.test.cells
    classes, code = np.unique(task.train.label, return_inverse=True)
    if method == "reference":
        return classes, ReferenceIndex.fit(embedded[0], code, classes.size).calls(test, embedded[1]).probability
    probe = Probe.fit(train, embedded[0], code, classes.size, seed=seed, unlabelled=(test, embedded[1]))
    if method == "probe_self_trained":
        probe = probe.self_trained(test, embedded[1])
    return classes, probe.calls(test, embedded[1]).probability


def _content(task: Task) -> str:
    digest = hashlib.sha256(task.name.encode())
    for part in (task.train, task.test):
        digest.update("\x1f".join(part.label.tolist()).encode())
        for array in (part.cells.counts.indptr, part.cells.counts.indices, part.cells.counts.data):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> list[Run]:
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [Run.from_dict(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def _append(path: Path, run: Run) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run.to_dict(), allow_nan=False) + "\n")
