"""The report of ``evaluate perturbation``: rows, means over conditions, intervals, calibrated scores, and the files.

Everything is computed from the rows, so that a report can be made again from ``rows.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.baselines import perturbation as baselines
from scdiva.metrics.perturbation import METRICS, PUBLISHED, calibrated
from scdiva.tasks.evaluation_rows import or_nan, or_none, write_report

CEILING = "ceiling"
NULL = baselines.NULL
MEAN = "mean"
NOT_BASELINES = (NULL, "random_condition", CEILING)
"""What is never "the best baseline"."""
TABLE = "perturbation"
FULL_DEPTH = "ceiling_full_depth"
"""The ceiling at full depth; not measured, and in no row."""
CORRECTED = (
    "pearson_delta", "dep", "c_dep", "auprc", "lfc_spearman", "hit_rate_20", "common_de", "pearson_perturbed",
    "centroid_accuracy", "pds_l1", "pds_l2", "pds_cosine", "direction_match",
)  # fmt: skip
"""Metrics whose ceiling is brought to full depth, as cell-eval does; errors are not."""
TITLES: Mapping[str, str] = {
    **baselines.TITLES,
    CEILING: "half of the real cells (ceiling)",
    FULL_DEPTH: "ceiling at full depth (Spearman-Brown)",
}
N_DRAWS = 2000
LEVEL = 0.95
HEADLINE = (*PUBLISHED, "pearson_perturbed", "weighted_mse", "weighted_r2")
REST = tuple(name for name in METRICS if name not in HEADLINE)
_STREAM = 37


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one held-out condition of one split: a line of ``rows.jsonl``.

    Parameters
    ----------
    kind, split, seed, perturbation, context, method
        Which.
    key
        Hash of data, split, method and settings: a row is used again only if it is the same.
    scores
        Metrics by name; NaN where there is none.
    reasons
        Why, by name.
    n_perturbed, n_control, n_significant
        Held-out cells, and truly significant genes.
    seconds
        To fit (a share of it) and to predict and judge.
    """

    kind: str
    split: str
    seed: int
    perturbation: str
    context: str
    method: str
    key: str
    scores: Mapping[str, float]
    reasons: Mapping[str, str]
    n_perturbed: int
    n_control: int
    n_significant: int
    seconds: float

    @property
    def condition(self) -> str:
        """Perturbation and context."""
        return f"{self.perturbation} in {self.context}" if self.context else self.perturbation

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and texts."""
        scores = {name: or_none(value) for name, value in self.scores.items()}
        return {"table": TABLE, **asdict(self), "scores": scores, "reasons": dict(self.reasons)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` made."""
        content = {name: value for name, value in found.items() if name != "table"}
        content["scores"] = {name: or_nan(value) for name, value in content["scores"].items()}
        return cls(**content)

    def __str__(self) -> str:
        s = self.scores
        return (
            f"{self.split}, {self.condition}, {self.method}, seed {self.seed}: PearsonΔ {s['pearson_delta']:.3f}, "
            f"C-DEP {s['c_dep']:.3f}; {self.seconds:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """A method minus the best baseline, over the conditions that both have.

    Parameters
    ----------
    baseline
        Which baseline was best.
    value, low, high
        Mean difference and its interval.
    n_conditions
        How many conditions.
    """

    baseline: str
    value: float
    low: float
    high: float
    n_conditions: int


@dataclass(frozen=True)
class PerturbationEvaluation:
    """The result of :func:`~scdiva.tasks.evaluate_perturbation.evaluate_perturbation`.

    Parameters
    ----------
    rows
        One per split, condition and method.
    titles
        Of methods.
    ours
        Methods that are no baselines.
    notes
        What the tables need to be read rightly.
    versions
        Packages that ran.
    cell_eval
        Scores of cell-eval, where it was asked for.
    """

    rows: tuple[Row, ...]
    titles: Mapping[str, str] = field(default_factory=lambda: TITLES)
    ours: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    cell_eval: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def with_cell_eval(self, scores: Mapping[str, Mapping[str, float]]) -> PerturbationEvaluation:
        """Return the report with what cell-eval found, by method and metric."""
        return replace(self, cell_eval=scores)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of splits in the order of the rows."""
        return tuple(dict.fromkeys(row.kind for row in self.rows))

    def methods(self, kind: str) -> tuple[str, ...]:
        """Methods in the order of the rows, the ceiling last."""
        return tuple(dict.fromkeys(row.method for row in self.rows if row.kind == kind))

    def conditions(self, kind: str) -> tuple[str, ...]:
        """Held-out conditions in the order of the rows."""
        return tuple(dict.fromkeys(row.condition for row in self.rows if row.kind == kind))

    @cached_property
    def _by_condition(self) -> dict[tuple[str, str, str], dict[str, list[float]]]:
        found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
        for row in self.rows:
            for name, value in row.scores.items():
                if np.isfinite(value):
                    found.setdefault((row.kind, row.method, name), {}).setdefault(row.condition, []).append(value)
        return found

    def by_condition(self, kind: str, method: str, metric: str) -> dict[str, float]:
        """Return a metric by condition, mean over splits and seeds; conditions without a value are left out."""
        found = self._by_condition.get((kind, method, metric), {})
        return {condition: float(np.mean(values)) for condition, values in found.items()}

    def mean(self, kind: str, method: str, metric: str) -> float:
        """Return the mean over conditions; NaN where none has a value.

        The ceiling at full depth is :func:`full_depth` of the ceiling.
        """
        if method == FULL_DEPTH:
            return full_depth(self.mean(kind, CEILING, metric), metric)
        values = list(self.by_condition(kind, method, metric).values())
        return float(np.mean(values)) if values else float("nan")

    def best_baseline(self, kind: str, metric: str) -> str | None:
        """Return the baseline with the best mean, after the fact; None where none has one."""
        sign = 1.0 if METRICS[metric].is_higher_better else -1.0
        means = {
            name: sign * self.mean(kind, name, metric)
            for name in self.methods(kind)
            if name in baselines.BASELINES and name not in NOT_BASELINES
        }
        means = {name: value for name, value in means.items() if np.isfinite(value)}
        return max(means, key=lambda name: means[name]) if means else None

    def difference(self, kind: str, method: str, metric: str) -> Difference | None:
        """Return a method minus the best baseline: mean over conditions, bootstrapped over conditions.

        None for the best baseline itself, and where they share no condition.
        """
        best = self.best_baseline(kind, metric)
        if best is None or best == method:
            return None
        ours, theirs = self.by_condition(kind, method, metric), self.by_condition(kind, best, metric)
        gaps = np.array([ours[condition] - theirs[condition] for condition in ours if condition in theirs])
        if not gaps.size:
            return None
        low, high = bootstrap_of_mean(gaps, np.random.default_rng(_STREAM))
        return Difference(best, float(gaps.mean()), low, high, gaps.size)

    def calibrated(self, kind: str, method: str, metric: str) -> float:
        """Return (u - b) / (r - b), b the mean of training perturbations and r the ceiling at full depth.

        Means over the conditions that have all three.
        """
        names = (method if method != FULL_DEPTH else CEILING, MEAN, CEILING)
        parts = [self.by_condition(kind, name, metric) for name in names]
        common = [condition for condition in parts[0] if all(condition in part for part in parts)]
        if not common:
            return float("nan")
        u, b, r = (float(np.mean([part[condition] for condition in common])) for part in parts)
        r = full_depth(r, metric)
        return calibrated(r if method == FULL_DEPTH else u, b, r, is_higher_better=METRICS[metric].is_higher_better)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        summary = []
        for kind in self.kinds:
            for method in (*self.methods(kind), FULL_DEPTH):
                for metric in METRICS:
                    gap = self.difference(kind, method, metric)
                    values = self.by_condition(kind, method, metric)
                    summary.append(
                        {
                            "kind": kind,
                            "method": method,
                            "metric": metric,
                            "mean": or_none(self.mean(kind, method, metric)),
                            "n_conditions": len(values),
                            "calibrated": or_none(self.calibrated(kind, method, metric)),
                            "minus_best_baseline": None if gap is None else asdict(gap),
                            "by_condition": values,
                        }
                    )
        return {
            "notes": list(self.notes),
            "metrics": {name: metric._asdict() for name, metric in METRICS.items()},
            "titles": dict(self.titles),
            "summary": summary,
            "cell_eval": {method: dict(scores) for method, scores in self.cell_eval.items()},
            "versions": dict(self.versions),
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_markdown(self) -> str:
        """Return the tables."""
        lines = ["# Effects of perturbations", "", *(f"- {note}" for note in self.notes)]
        for kind in self.kinds:
            seeds = len({row.seed for row in self.rows if row.kind == kind})
            lines += ["", f"## {kind}: {len(self.conditions(kind))} conditions, {seeds} seeds"]
            for names in (HEADLINE, REST):
                lines += ["", *self._means(kind, names)]
            lines += ["", *self._differences(kind), "", *self._calibrated(kind), "", *self._conditions(kind)]
            lines += self._without_value(kind)
        if self.cell_eval:
            found = dict.fromkeys(name for scores in self.cell_eval.values() for name in scores)
            body = [
                [name, *(_text(scores.get(name, float("nan"))) for scores in self.cell_eval.values())] for name in found
            ]
            head = ["cell-eval", *(self.titles[method] for method in self.cell_eval)]
            lines += ["", "## As cell-eval measures", "", *table(head, body)]
        return "\n".join(lines) + "\n"

    def _means(self, kind: str, names: Sequence[str]) -> list[str]:
        head = [f"{METRICS[name].title} {'↑' if METRICS[name].is_higher_better else '↓'}" for name in names]
        body = [
            [self.titles[method], *(_text(self.mean(kind, method, name)) for name in names)]
            for method in (*self.methods(kind), FULL_DEPTH)
        ]
        return table(["mean over conditions", *head], body)

    def _differences(self, kind: str) -> list[str]:
        head: list[str] = []
        body: list[list[str]] = []
        for name in HEADLINE:
            best = self.best_baseline(kind, name)
            head.append(f"{METRICS[name].title}: {self.titles[best] if best else '–'}")
        for method in self.ours or [m for m in self.methods(kind) if m not in NOT_BASELINES]:
            cells = [self.difference(kind, method, name) for name in HEADLINE]
            body.append(
                [
                    self.titles[method],
                    *("–" if c is None else f"{c.value:+.3f} ({c.low:+.3f} to {c.high:+.3f})" for c in cells),
                ]
            )
        return table(["minus the best baseline (95 %)", *head], body)

    def _calibrated(self, kind: str) -> list[str]:
        body = [
            [self.titles[method], *(_text(self.calibrated(kind, method, name)) for name in HEADLINE)]
            for method in self.methods(kind)
        ]
        head = [METRICS[name].title for name in HEADLINE]
        return table(["calibrated: 0 = mean of training perturbations, 1 = ceiling at full depth", *head], body)

    def _conditions(self, kind: str) -> list[str]:
        methods = self.methods(kind)
        body = []
        for condition in self.conditions(kind):
            rows = [row for row in self.rows if row.kind == kind and row.condition == condition]
            numbers = [str(round(float(np.mean([getattr(row, n) for row in rows])))) for n in _NUMBERS]
            scores = [self.by_condition(kind, m, "pearson_delta").get(condition, float("nan")) for m in methods]
            body.append([condition, *numbers, *map(_text, scores)])
        return table(["PearsonΔ", "cells", "controls", "DE genes", *(self.titles[m] for m in methods)], body)

    def _without_value(self, kind: str) -> list[str]:
        lines = []
        conditions = self.conditions(kind)
        for name, metric in METRICS.items():
            measured = {c for method in self.methods(kind) for c in self.by_condition(kind, method, name)}
            missing = [condition for condition in conditions if condition not in measured]
            rows = [row for row in self.rows if row.kind == kind and row.condition in missing and name in row.reasons]
            reasons = "; ".join(sorted({row.reasons[name] for row in rows}))
            if missing:
                lines.append(f"- {metric.title}: {len(missing)} of {len(conditions)} conditions ({reasons})")
        return ["", "Without a value, and in no mean:", "", *lines] if lines else []

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``report.md`` and ``report.json`` to an existing folder."""
        return write_report(folder, self.to_markdown(), self.to_dict())


_NUMBERS = ("n_perturbed", "n_control", "n_significant")


def full_depth(ceiling: float, metric: str) -> float:
    """Return 2 r / (1 + r), r the ceiling: what cells as many as all held-out ones would say (Spearman-Brown).

    r itself where it is not above 0, and where the metric is an error.
    """
    return 2 * ceiling / (1 + ceiling) if metric in CORRECTED and ceiling > 0 else ceiling


def bootstrap_of_mean(values: NDArray[np.float64], rng: np.random.Generator) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean, 2,000 draws; the value twice where there is one only."""
    draws = values[rng.integers(values.size, size=(N_DRAWS, values.size))].mean(axis=1)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(row)} |" for row in (head, rule, *body)]


def _text(value: float) -> str:
    # no "-0.000"
    return f"{round(value, 3) + 0.0:.3f}" if np.isfinite(value) else "–"
