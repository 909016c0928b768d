"""What an evaluation of integrations found: runs of methods with seeds, differences with intervals, tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.baselines import integration as baselines
from scdiva.metrics import integration as metrics
from scdiva.metrics.annotation import Interval
from scdiva.metrics.generation_space import Score
from scdiva.tasks.evaluation_rows import mean_and_sd, mean_text, or_nan, or_none, write_report

FLOOR, NULL, CEILING = "pca", "random", "oracle"
OURS = ("zero_shot", "scdiva", "scdiva_labels", "scdiva_published")
SEES_LABELS = (*sorted(baselines.NEEDS_LABELS), "scdiva_labels", "scdiva_published", CEILING)
"""Methods that are shown the labels by which they are scored."""
METHODS = (
    *(FLOOR, "harmony", "scvi", "zero_shot", "scdiva", NULL),
    *("scanvi", "scdiva_labels", "scdiva_published", CEILING),
)
"""All methods: those that see no labels, then those that do."""
ON_REQUEST = ("scdiva_published",)
"""Methods that are run only if they are named: the whole network is trained."""
TITLES: Mapping[str, str] = {
    **baselines.TITLES,
    "zero_shot": "scDiVa, as it comes",
    "scdiva": "scDiVa, integrated",
    "scdiva_labels": "scDiVa, integrated (sees the labels)",
    "scdiva_published": "scDiVa, published protocol (sees the labels)",
    CEILING: "one-hot labels (ceiling of types)",
}
HEADLINES: Mapping[str, str] = {
    "avg_bio": "AvgBIO",
    "avg_batch": "AvgBATCH",
    "scib_bio": "scib bio",
    "scib_batch": "scib batch",
    "scib_total": "scib total",
}
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Run:
    """One method with one seed: one line of ``rows.jsonl``.

    Parameters
    ----------
    method, seed
        Which.
    key
        Hash of data, method, seed and settings: a line is used again only if it is the same.
    scores
        By name (:data:`~scdiva.metrics.integration.METRICS` and ``MEANS``), on all labelled cells.
    resampled
        Name of a mean to its values in subsamples of the cells, the same for every method; None for the null and the
        ceiling, and for all but the first seed.
    n_scored, n_drawn
        Labelled cells, and cells of each subsample; 0 where there are none.
    n_dimensions
        Of the embedding.
    seconds, seconds_score
        To make and to score the embedding.
    """

    method: str
    seed: int
    key: str
    scores: Mapping[str, Score]
    resampled: Mapping[str, NDArray[np.float64]] | None
    n_scored: int
    n_drawn: int
    n_dimensions: int
    seconds: float
    seconds_score: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers; NaN is None, with its reason."""
        resampled = None
        if self.resampled is not None:
            resampled = {name: [or_none(value) for value in values] for name, values in self.resampled.items()}
        return {
            "method": self.method,
            "seed": self.seed,
            "key": self.key,
            "scores": {name: or_none(score.value) for name, score in self.scores.items()},
            "reasons": {name: score.reason for name, score in self.scores.items() if score.reason},
            "resampled": resampled,
            "n_scored": self.n_scored,
            "n_drawn": self.n_drawn,
            "n_dimensions": self.n_dimensions,
            "seconds": round(self.seconds, 3),
            "seconds_score": round(self.seconds_score, 3),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` made."""
        reasons, drawn = found["reasons"], found["resampled"]
        return cls(
            found["method"],
            int(found["seed"]),
            found["key"],
            {name: Score(or_nan(value), reasons.get(name, "")) for name, value in found["scores"].items()},
            None if drawn is None else {name: np.array([or_nan(v) for v in drawn[name]]) for name in drawn},
            int(found["n_scored"]),
            int(found["n_drawn"]),
            int(found["n_dimensions"]),
            float(found["seconds"]),
            float(found["seconds_score"]),
        )

    def __str__(self) -> str:
        parts = [
            f"{title} {self.scores[name].value:.3f}"
            for name, title in HEADLINES.items()
            if name in self.scores and np.isfinite(self.scores[name].value)
        ]
        took = f"{self.seconds:.1f} s to make, {self.seconds_score:.0f} s to score"
        return f"{self.method}, seed {self.seed}: {', '.join(parts) or 'no mean can be measured'}; {took}"


@dataclass(frozen=True, slots=True)
class IntegrationReport:
    """The result of :func:`evaluate_integration`.

    Parameters
    ----------
    name
        Of the set.
    confounding
        What batch and type have to do with each other, for people.
    n_cells, n_labelled, n_genes, n_batches, n_types
        Sizes.
    runs
        One per method and seed.
    notes
        What the tables need to be read rightly.
    versions
        Packages that ran.
    """

    name: str
    confounding: str
    n_cells: int
    n_labelled: int
    n_genes: int
    n_batches: int
    n_types: int
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order of the tables: those that see no labels, then those that do."""
        there = {run.method for run in self.runs}
        return tuple(name for name in METHODS if name in there)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds, sorted."""
        return tuple(sorted({run.seed for run in self.runs}))

    def values(self, method: str, metric: str) -> list[float]:
        """Return a score over seeds; NaN left out."""
        found = [run.scores[metric].value for run in self.runs if run.method == method and metric in run.scores]
        return [value for value in found if np.isfinite(value)]

    def has(self, metric: str) -> bool:
        """Tell whether some method has a value."""
        return any(self.values(method, metric) for method in self.methods)

    def best_baseline(self, method: str, metric: str) -> str | None:
        """Return the baseline of a method's kind with the highest mean: of those that see labels, or of the others."""
        means = {
            name: float(np.mean(values))
            for name in self.methods
            if name in baselines.BASELINES and name != NULL and (name in SEES_LABELS) == (method in SEES_LABELS)
            if (values := self.values(name, metric))
        }
        return max(means, key=lambda name: means[name]) if means else None

    def difference(self, method: str, metric: str) -> Interval | None:
        """Return the mean over seeds of a method's score minus the best baseline's of its kind, with a 95 % interval.

        The variance has two parts: over cells, that of the first seed's difference in subsamples of m of n cells
        without replacement, times m / (n - m) (the delete-d jackknife, Shao and Wu 1989); and over seeds, that of the
        seeds' differences divided by their number. Degrees of freedom after Welch and Satterthwaite. With one seed the
        interval is over cells alone.

        Parameters
        ----------
        method
            One of ours.
        metric
            One of :data:`HEADLINES`.

        Returns
        -------
        Interval
            None where there is no such baseline or no value.
        """
        best = self.best_baseline(method, metric)
        if best is None or method == best:
            return None
        ours, other = ({run.seed: run for run in self.runs if run.method == name} for name in (method, best))
        pairs = [(ours[seed], other[seed]) for seed in sorted(set(ours) & set(other))]
        gaps = np.array([one.scores[metric].value - two.scores[metric].value for one, two in pairs])
        drawn = [
            one.resampled[metric] - two.resampled[metric]
            for one, two in pairs
            if one.resampled is not None and two.resampled is not None
            if metric in one.resampled and metric in two.resampled
        ]
        if not gaps.size or not np.isfinite(gaps).all() or not drawn or not np.isfinite(drawn).all():
            return None
        over_draws = np.mean(drawn, axis=0)
        n, m = next((one.n_scored, one.n_drawn) for one, _ in pairs if one.resampled is not None)
        over_cells = float(over_draws.var(ddof=1)) * m / (n - m)
        over_seeds = float(gaps.var(ddof=1)) / gaps.size if gaps.size > 1 else 0.0
        half = _half_width(over_cells, over_draws.size - 1, over_seeds, gaps.size - 1)
        value = float(gaps.mean())
        return Interval(value, value - half, value + half, LEVEL)

    def is_better(self, method: str, metric: str) -> bool:
        """Tell whether one of ours is above the best baseline of its kind beyond the interval; one seed says never."""
        if method not in OURS or len(self.seeds) < 2:
            return False
        gap = self.difference(method, metric)
        return gap is not None and gap.low > 0

    @property
    def axes(self) -> tuple[str, str]:
        """Names of the metrics of types and batches for a picture: scib's means, or AvgBATCH without kBET."""
        return "scib_bio", "scib_batch" if self.has("scib_batch") else "avg_batch"

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        names = [name for name in (*metrics.METRICS, *metrics.MEANS) if any(name in run.scores for run in self.runs)]
        summary = []
        for method in self.methods:
            for metric in names:
                mean, sd = mean_and_sd(self.values(method, metric))
                row: dict[str, Any] = {"method": method, "sees_labels": method in SEES_LABELS, "metric": metric}
                row |= {"mean": or_none(mean), "sd": or_none(sd), "n": len(self.values(method, metric))}
                if method in OURS and metric in HEADLINES:
                    gap = self.difference(method, metric)
                    row["best_baseline"] = self.best_baseline(method, metric)
                    row["minus_best_baseline"] = None if gap is None else [gap.value, gap.low, gap.high]
                summary.append(row)
        head = ("name", "confounding", "n_cells", "n_labelled", "n_genes", "n_batches", "n_types")
        return {
            **{key: getattr(self, key) for key in head},
            "notes": list(self.notes),
            "versions": dict(self.versions or {}),
            "summary": summary,
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_markdown(self) -> str:
        """Return the tables: means, every metric, differences from the best baseline, and what is missing."""
        n_seeds = len(self.seeds)
        lines = [
            f"### {self.name}: {self.n_cells:,} cells, {self.n_genes:,} genes, {self.n_batches} batches, "
            f"{self.n_types} types, {n_seeds} seed{'' if n_seeds == 1 else 's'}",
            "",
            self.confounding,
            "",
            *self._means(),
            "",
            "Mean over seeds (standard deviation); 1 is ideal. Bold: above the best baseline of its kind, beyond the "
            f"{LEVEL:.0%} interval below. Neither AvgBATCH nor scib batch is a result without the other columns: noise "
            "wins them.",
            "",
            *self._differences(),
            "",
            *self._every_metric(),
            "",
            *(f"- {note}" for note in (*self.notes, *self._reasons())),
        ]
        if self.versions:
            lines.append(f"- Versions: {', '.join(f'{name} {number}' for name, number in self.versions.items())}.")
        return "\n".join(lines).rstrip() + "\n"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``report.md`` and ``report.json``, each whole or not at all."""
        return write_report(folder, self.to_markdown(), self.to_dict())

    def _means(self) -> list[str]:
        shown = [name for name in HEADLINES if self.has(name)]
        lines = [f"| method | sees labels | {' | '.join(HEADLINES[name] for name in shown)} | seconds |"]
        lines.append("|---|---|" + "---:|" * (len(shown) + 1))
        for method in self.methods:
            cells = [
                f"**{text}**" if self.is_better(method, metric) else text
                for metric in shown
                for text in [mean_text(self.values(method, metric))]
            ]
            seconds = np.mean([run.seconds for run in self.runs if run.method == method])
            sees = "yes" if method in SEES_LABELS else "no"
            lines.append(f"| {TITLES[method]} | {sees} | {' | '.join(cells)} | {seconds:.1f} |")
        return lines

    def _differences(self) -> list[str]:
        ours = [name for name in self.methods if name in OURS]
        shown = [name for name in HEADLINES if self.has(name)]
        if not ours or not shown:
            return ["None of our methods was run."]
        lines = [f"| minus the best baseline of its kind | {' | '.join(HEADLINES[name] for name in shown)} |"]
        lines.append("|---|" + "---|" * len(shown))
        for method in ours:
            cells = []
            for metric in shown:
                gap, best = self.difference(method, metric), self.best_baseline(method, metric)
                if gap is None or best is None:
                    cells.append("–")
                else:
                    cells.append(f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f}) {_short(best)}")
            lines.append(f"| {TITLES[method]} | {' | '.join(cells)} |")
        return lines

    def _every_metric(self) -> list[str]:
        names = [name for name in metrics.METRICS if self.has(name)]
        lines = [f"| metric | {' | '.join(TITLES[method] for method in self.methods)} |"]
        lines.append("|---|" + "---:|" * len(self.methods))
        for metric in names:
            lines.append(f"| {metric} | {' | '.join(mean_text(self.values(m, metric)) for m in self.methods)} |")
        return lines

    def _reasons(self) -> list[str]:
        found: dict[tuple[str, str], dict[str, None]] = {}
        for run in self.runs:
            for metric, score in run.scores.items():
                if not np.isfinite(score.value) and metric not in metrics.MEANS:
                    found.setdefault((metric, score.reason), {})[TITLES[run.method]] = None
        return [
            f"{metric} has no value ({reason}), nor have the means it is part of: {', '.join(titles)}."
            for (metric, reason), titles in found.items()
        ]


def _half_width(over_cells: float, df_cells: int, over_seeds: float, df_seeds: int) -> float:
    """Return the half width of an interval whose variance is the sum of two independent estimates."""
    from scipy.stats import t

    variance = over_cells + over_seeds
    if variance == 0:
        return 0.0
    inverse = over_cells**2 / df_cells + (over_seeds**2 / df_seeds if df_seeds else 0.0)
    return float(t.ppf((1 + LEVEL) / 2, variance**2 / inverse)) * variance**0.5


def _short(method: str) -> str:
    return {"pca": "PCA", "harmony": "Harmony", "scvi": "scVI", "scanvi": "scANVI"}[method]
