"""The report of ``evaluate annotation``: runs, tables, calibration, and the files that are written.

Everything here is computed from the runs (true and predicted types and confidences), so that a report can be made again
from ``rows.jsonl``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.baselines import annotation as baselines
from scdiva.metrics import annotation as metrics
from scdiva.tasks.annotation_splits import KINDS, WITHIN
from scdiva.tasks.evaluation_rows import write_report
from scdiva.tasks.open_set import OpenSetReport

NULL = "shuffled"
OURS = ("probe", "probe_self_trained", "reference", "integrate", "consensus")
FINE_TUNED = ("lora", "finetune")
"""Methods that train the network: minutes for each run, so they are run only when they are asked for."""
CHOSEN = "chosen"
"""Whichever of our methods is best on training cells that it is validated on."""
OURS_AND_CHOSEN = (*OURS, *FINE_TUNED, CHOSEN)
TRANSDUCTIVE = (*(name for name in OURS if name != "reference"), *FINE_TUNED, "logistic_pca_of_all")
"""Methods that are fitted to held-out cells, too; without their labels. "chosen" may be one of them."""
METHODS = (*OURS_AND_CHOSEN, *baselines.BASELINES)
SIMPLICITY = ("reference", "probe", "probe_self_trained", "lora", "finetune")
"""What "chosen" chooses from, the simplest first: the order in which ties are broken. Methods that are for another
laboratory's cells are not among them: cells of the reference's own cannot tell what they are worth."""
TITLES = {
    "probe": "scDiVa probe",
    "probe_self_trained": "scDiVa probe, self-trained",
    "reference": "scDiVa neighbours",
    "integrate": "scDiVa neighbours, integrated",
    "consensus": "scDiVa consensus",
    "lora": "scDiVa, low-rank fine-tuning",
    "finetune": "scDiVa, fine-tuned",
    CHOSEN: "scDiVa, chosen on validation",
    **baselines.TITLES,
}
TABLE = "split"
"""What rows say that they are; those of an older version say nothing."""
SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "calibration_error", "nll")


@dataclass(frozen=True, slots=True)
class Run:
    """One method on one split: one line of ``rows.jsonl``.

    Parameters
    ----------
    task, method, seed
        Which.
    key
        Hash of data, split, method and settings: a line is used again only if it is the same.
    labels
        All labels, of training and held-out cells.
    truth, predicted
        Codes of the held-out cells: positions in ``labels``.
    confidence
        Probability of what is predicted.
    scores
        accuracy, balanced_accuracy, macro_f1, calibration_error, nll.
    seconds
        To fit and to predict, embedding included.
    kind
        Kind of the split.
    picked, validation
        Of the method "chosen": the method that was taken, and macro-F1 of each on validation cells.
    versions
        Packages that ran.
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
    kind: str = WITHIN
    picked: str = ""
    validation: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers."""
        return {
            "table": TABLE,
            "task": self.task,
            "method": self.method,
            "seed": self.seed,
            "key": self.key,
            "labels": list(self.labels),
            "truth": self.truth.tolist(),
            "predicted": self.predicted.tolist(),
            "confidence": [round(float(value), 4) for value in self.confidence],
            "scores": {name: None if np.isnan(value) else value for name, value in self.scores.items()},
            "seconds": self.seconds,
            "kind": self.kind,
            "picked": self.picked,
            "validation": dict(self.validation),
            "versions": dict(self.versions),
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
            found.get("kind", WITHIN),
            found.get("picked", ""),
            found.get("validation", {}),
            found.get("versions", {}),
        )

    @property
    def true_label(self) -> NDArray[np.str_]:
        """True types of the held-out cells."""
        return np.array(self.labels)[self.truth]

    @property
    def predicted_label(self) -> NDArray[np.str_]:
        """Predicted types of the held-out cells."""
        return np.array(self.labels)[self.predicted]

    def merged(self, mapping: Mapping[str, str]) -> Run:
        """Return the run with several types under one name, in truth and prediction alike.

        Confidences are of the finer types, so that it has no calibration error and no likelihood.
        """
        new = metrics.merge_labels(self.labels, mapping)
        labels = np.unique(new)
        code = np.searchsorted(labels, new)
        truth, predicted = code[self.truth], code[self.predicted]
        found = metrics.annotation_scores(labels[truth], labels[predicted])
        scores = {
            "accuracy": found.accuracy,
            "balanced_accuracy": found.balanced_accuracy,
            "macro_f1": found.macro_f1,
            "calibration_error": float("nan"),
            "nll": float("nan"),
        }
        return replace(self, labels=tuple(labels.tolist()), truth=truth, predicted=predicted, scores=scores)

    def __str__(self) -> str:
        s = self.scores
        picked = f" ({self.picked})" if self.picked else ""
        return (
            f"{self.task}, {self.method}{picked}, seed {self.seed}: accuracy {s['accuracy']:.3f}, "
            f"macro-F1 {s['macro_f1']:.3f}, calibration error {s['calibration_error']:.3f}; {self.seconds:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration error of a method on some tasks.

    Parameters
    ----------
    error
        Mean over seeds of the error over all cells of a seed, with the mean of the seeds' intervals over cells.
    n_cells
        Number of held-out cells, all seeds together.
    """

    error: metrics.Interval
    n_cells: int


@dataclass(frozen=True)
class AnnotationReport:
    """The result of :func:`~scdiva.tasks.evaluate_annotation.evaluate_annotation`.

    Parameters
    ----------
    runs
        One per task, method and seed.
    notes
        What the tables need to be read rightly.
    open_set
        With one type left out at a time; without runs where that was not asked for.
    merge
        Coarser label by label; None where no scores of merged labels were asked for.
    """

    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    open_set: OpenSetReport = field(default_factory=OpenSetReport)
    merge: Mapping[str, str] | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the order of their runs."""
        return tuple(dict.fromkeys(run.task for run in self.runs))

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order of their runs."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Tasks of each kind of split that occurs."""
        found = {kind: tuple(dict.fromkeys(run.task for run in self.runs if run.kind == kind)) for kind in KINDS}
        return {kind: tasks for kind, tasks in found.items() if tasks}

    def of(self, task: str, method: str) -> dict[int, Run]:
        """Return the runs of a method by seed."""
        return {run.seed: run for run in self.runs if run.task == task and run.method == method}

    def values(self, task: str, method: str, score: str) -> list[float]:
        """Return a score over seeds; NaN left out."""
        found = [run.scores[score] for run in self.of(task, method).values()]
        return [value for value in found if np.isfinite(value)]

    def best_baseline(self, task: str, score: str = "macro_f1") -> str | None:
        """Return the baseline with the highest mean."""
        means = {
            name: float(np.mean(values))
            for name in self.methods
            if name in baselines.BASELINES and name != NULL and (values := self.values(task, name, score))
        }
        return max(means, key=lambda name: means[name]) if means else None

    @cached_property
    def _intervals(self) -> dict[tuple[str, str, str], metrics.Interval | None]:
        return {}

    def difference(self, task: str, method: str) -> metrics.Interval | None:
        """Return macro-F1 minus that of the best baseline: mean over seeds, bootstrapped over cells within each.

        The interval is of the mean of the seeds' differences; cells of one split are resampled together.
        """
        best = self.best_baseline(task)
        if best is None or method == best:
            return None
        if (key := (task, method, best)) not in self._intervals:
            ours, other = self.of(task, method), self.of(task, best)
            self._intervals[key] = _mean_interval(
                [
                    metrics.paired_bootstrap(
                        ours[seed].true_label,
                        ours[seed].predicted_label,
                        other[seed].predicted_label,
                        rng=np.random.default_rng([seed, 11]),
                    ).macro_f1
                    for seed in sorted(set(ours) & set(other))
                ]
            )
        return self._intervals[key]

    def interval(self, task: str, method: str) -> metrics.Interval | None:
        """Return macro-F1: mean over seeds, bootstrapped over cells within each."""
        if (key := (task, method, "")) not in self._intervals:
            self._intervals[key] = _mean_interval(
                [
                    metrics.annotation_intervals(
                        run.true_label, run.predicted_label, rng=np.random.default_rng([seed, 12])
                    ).macro_f1
                    for seed, run in self.of(task, method).items()
                ]
            )
        return self._intervals[key]

    def calibration(self, method: str, tasks: Sequence[str]) -> Calibration | None:
        """Return the calibration error over all cells of some tasks; None where the method did none of them.

        Each seed has an error and an interval over its cells, and both are averaged: seeds draw from the same cells, so
        that cells of several seeds together would count as more than there are.
        """
        runs = [run for run in self.runs if run.method == method and run.task in tasks]
        if not runs:
            return None
        found = []
        for seed in sorted({run.seed for run in runs}):
            confidence, is_correct = _confidences([run for run in runs if run.seed == seed])
            found.append(calibration_interval(confidence, is_correct, np.random.default_rng([seed, 14])))
        error = _mean_interval(found)
        assert error is not None  # there is at least one seed
        return Calibration(error, sum(run.truth.size for run in runs))

    def reliability(self, method: str, tasks: Sequence[str]) -> metrics.Reliability | None:
        """Return how often a method is right by how sure it is, over all cells of some tasks and all seeds."""
        runs = [run for run in self.runs if run.method == method and run.task in tasks]
        return metrics.expected_calibration_error(*_confidences(runs)) if runs else None

    def seconds(self, method: str) -> float:
        """Return the mean seconds of a run."""
        return float(np.mean([run.seconds for run in self.runs if run.method == method]))

    def merged(self) -> AnnotationReport | None:
        """Return the report of merged labels: tasks that have labels to merge, and two types left; None if none do."""
        if self.merge is None:
            return None
        runs = [
            run.merged(self.merge)
            for run in self.runs
            if set(self.merge) & set(run.labels) and np.unique(metrics.merge_labels(run.labels, self.merge)).size > 1
        ]
        return AnnotationReport(tuple(runs)) if runs else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        merged = self.merged()
        calibration = []
        for name, tasks in [(task, [task]) for task in self.tasks] + [(f"all {k}", t) for k, t in self.kinds.items()]:
            for method in self.methods:
                if (found := self.calibration(method, tasks)) is not None:
                    e = found.error
                    numbers = {"error": [e.value, e.low, e.high], "n_cells": found.n_cells}
                    calibration.append({"of": name, "method": method, **numbers})
        return {
            "notes": list(self.notes),
            "summary": self._summary(),
            "merge": None if self.merge is None else dict(self.merge),
            "summary_of_merged_labels": [] if merged is None else merged._summary(),
            "calibration": calibration,
            "seconds": {method: self.seconds(method) for method in self.methods},
            "versions": self._versions(),
            "open_set": self.open_set.to_dict(),
            "runs": [run.to_dict() for run in self.runs],
        }

    def _summary(self) -> list[dict[str, Any]]:
        summary = []
        for task in self.tasks:
            for method in self.methods:
                row: dict[str, Any] = {"task": task, "method": method}
                for score in SCORES:
                    values = self.values(task, method, score)
                    row[score] = float(np.mean(values)) if values else None
                    row[f"{score}_sd"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
                gap = self.difference(task, method)
                row["best_baseline"] = self.best_baseline(task)
                row["macro_f1_minus_best_baseline"] = None if gap is None else [gap.value, gap.low, gap.high]
                if method == CHOSEN:
                    row["picked"] = dict(self.picked(task))
                summary.append(row)
        return summary

    def picked(self, task: str) -> Counter[str]:
        """Return how many seeds each method was chosen for."""
        return Counter(run.picked for run in self.of(task, CHOSEN).values())

    def _versions(self) -> list[dict[str, str]]:
        """Return the distinct sets of packages that ran; those of CellTypist's runs name it as well."""
        found = [dict(run.versions) for run in self.runs] + [dict(run.versions) for run in self.open_set.runs]
        return [row for i, row in enumerate(found) if row and row not in found[:i]]

    def to_markdown(self) -> str:
        """Return all tables: scores, differences, merged labels, open sets, calibration; then the notes."""
        lines = [*self._score_lines(), "Accuracy / macro-F1, means over seeds. ", ""]
        lines[-2] += "Bold: macro-F1 above the best baseline's (95 %)."
        lines += self._difference_lines()
        if self.merge is not None:
            merged = self.merged()
            sets: dict[str, list[str]] = {}
            for old, new in self.merge.items():
                sets.setdefault(new, []).append(old)
            said = "; ".join(f"{new}: {', '.join(old)}" for new, old in sets.items())
            lines += [f"With labels merged in truth and prediction alike ({said}):", ""]
            if merged is None:
                lines += ["No task has two types left and one of these labels.", ""]
            else:
                lines += [*merged._score_lines(has_seconds=False), *merged._difference_lines()]
        lines += [*self.open_set.to_lines(), *self._calibration_lines()]
        lines += [f"- {note}" for note in self.notes]
        for packages in self._versions():
            lines.append(f"- Ran with {', '.join(f'{name} {number}' for name, number in packages.items())}.")
        if any(not run.versions for run in self.runs):
            lines.append("- Some rows are of a version that did not record packages.")
        return "\n".join(lines).rstrip() + "\n"

    def _score_lines(self, *, has_seconds: bool = True) -> list[str]:
        names = self.methods
        lines = [f"| task | seeds | {' | '.join(TITLES[name] for name in names)} |"]
        lines.append("|---|---:|" + "---:|" * len(names))
        for task in self.tasks:
            n_seeds = len({run.seed for run in self.runs if run.task == task})
            lines.append(f"| {task} | {n_seeds} | " + " | ".join(self._cell(task, name) for name in names) + " |")
        if has_seconds:
            seconds = " | ".join(f"{self.seconds(name):.1f}" for name in names)
            lines.append(f"| seconds, mean of all runs | | {seconds} |")
        return [*lines, ""]

    def _cell(self, task: str, method: str) -> str:
        accuracy, f1 = (self.values(task, method, score) for score in ("accuracy", "macro_f1"))
        if not f1:
            return "–"
        gap = self.difference(task, method)
        text = f"{np.mean(accuracy):.3f} / {np.mean(f1):.3f}"
        return f"**{text}**" if method in OURS_AND_CHOSEN and gap is not None and gap.low > 0 else text

    def _difference_lines(self) -> list[str]:
        ours = [name for name in self.methods if name in OURS_AND_CHOSEN]
        if not ours or not any(self.best_baseline(task) for task in self.tasks):
            return []
        last = " what was chosen (seeds) |" if CHOSEN in ours else ""
        lines = [f"| macro-F1 minus best baseline | best baseline | {' | '.join(TITLES[n] for n in ours)} |{last}"]
        lines.append("|---|---|" + "---:|" * len(ours) + ("---|" if last else ""))
        for task in self.tasks:
            best = self.best_baseline(task)
            cells = [_signed(self.difference(task, name)) for name in ours]
            if last:
                cells.append(", ".join(f"{TITLES[name]} ({n})" for name, n in self.picked(task).most_common()))
            lines.append(f"| {task} | {TITLES.get(best or '', '–')} | {' | '.join(cells)} |")
        return [*lines, ""]

    def _calibration_lines(self) -> list[str]:
        names = self.methods
        lines = [f"| calibration error (95 %) | cells | {' | '.join(TITLES[n] for n in names)} |"]
        lines.append("|---|---:|" + "---:|" * len(names))
        rows = [(f"all {kind}", tasks) for kind, tasks in self.kinds.items()]
        rows += [(task, (task,)) for task in self.tasks]
        for title, tasks in rows:
            found = [self.calibration(name, tasks) for name in names]
            n_cells = max(each.n_cells for each in found if each is not None)
            cells = [_plain(None if each is None else each.error) for each in found]
            lines.append(f"| {title} | {n_cells:,} | {' | '.join(cells)} |")
        return [*lines, ""]

    def write(self, folder: Path) -> tuple[Path, ...]:
        """Write ``report.md``, ``report.json`` and ``report.png``, each whole or not at all."""
        # deferred: matplotlib
        from scdiva.tasks.annotation_figure import draw

        written = write_report(folder, self.to_markdown(), self.to_dict())
        draw(self, folder / "report.png")
        return (*written, folder / "report.png")


def calibration_interval(
    confidence: NDArray[np.floating],
    is_correct: NDArray[np.bool_],
    rng: np.random.Generator,
    *,
    n_draws: int = metrics.N_DRAWS,
    level: float = 0.95,
) -> metrics.Interval:
    """Return the calibration error with a bootstrap interval over cells.

    Cells are drawn by bin and by whether they are right, with the mean confidence of such cells. Drawn samples have
    larger errors than the sample that they are drawn from, since an error is never negative; the draws are moved by
    that excess, and cut off at 0 (our decision: without it the error lies at the lower end of its own interval).

    Parameters
    ----------
    confidence, is_correct
        ``(n_cells,)``.
    rng
        Source of randomness.
    n_draws, level
        Bootstrap draws, and coverage.
    """
    found = metrics.expected_calibration_error(confidence, is_correct)
    n_bins = found.n_cells.size
    bin_of = np.clip(np.searchsorted(found.edges, confidence, side="left") - 1, 0, n_bins - 1)
    # signed gap of the cells of each bin that are wrong (first) and right (second)
    place = bin_of * 2 + is_correct
    n = np.bincount(place, minlength=2 * n_bins)
    total = np.bincount(place, weights=confidence - is_correct, minlength=2 * n_bins)
    gap = np.divide(total, n, out=np.zeros(2 * n_bins), where=n > 0)
    drawn = rng.multinomial(n.sum(), n / n.sum(), size=n_draws) * gap
    draws = np.abs(drawn.reshape(n_draws, n_bins, 2).sum(axis=2)).sum(axis=1) / n.sum()
    ends = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]) - (draws.mean() - found.error)
    low, high = np.maximum(ends, 0.0)
    return metrics.Interval(found.error, float(low), float(high), level)


def _confidences(runs: Sequence[Run]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return (
        np.concatenate([run.confidence for run in runs]),
        np.concatenate([run.truth == run.predicted for run in runs]),
    )


def _mean_interval(found: Sequence[metrics.Interval]) -> metrics.Interval | None:
    if not found:
        return None
    value, low, high = np.mean([(each.value, each.low, each.high) for each in found], axis=0)
    return metrics.Interval(float(value), float(low), float(high), found[0].level)


def _signed(interval: metrics.Interval | None) -> str:
    return "–" if interval is None else f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def _plain(interval: metrics.Interval | None) -> str:
    return "–" if interval is None else f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
