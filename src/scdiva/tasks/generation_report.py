"""What an evaluation of generated cells found: runs of methods with seeds, their summary, its tables and files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdiva.baselines import generation as baselines
from scdiva.data.output import replacing
from scdiva.metrics import generation as metrics
from scdiva.metrics.generation_space import Score

BASELINES: Mapping[str, Callable[..., baselines.Drawn]] = {
    "scvi": baselines.scvi_posterior,
    "multinomial": baselines.multinomial_per_type,
    "negative_binomial": baselines.negative_binomial_per_type,
    "independent_genes": baselines.independent_genes_per_type,
    "pca_gaussian": baselines.pca_gaussian_per_type,
}
NULL = "shuffled"
CEILING = "ceiling"
METHODS = (*BASELINES, NULL, CEILING)
"""Methods that need no model."""
TITLES = {
    "scdiffusion": "scDiffusion",
    "scdiffusion_parity": "scDiffusion, published networks",
    "scvi": "scVI, posterior predictive",
    "multinomial": "multinomial per type",
    "negative_binomial": "negative binomial per type",
    "independent_genes": "independent genes per type",
    "pca_gaussian": "PCA-Gaussian per type",
    NULL: "shuffled (null)",
    CEILING: "real cells (ceiling)",
}
OVER_TYPES = "mean over types"
HEADLINE = "c2st_forest_hvg"
_BY_TYPE = ("c2st_forest_hvg", "c2st_forest_pca", "mmd2", "recall", "conditional_accuracy", "genes_per_cell_ks")


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One method with one seed: what is written as one line of ``rows.jsonl``.

    Parameters
    ----------
    method, seed
        Which.
    key
        Hash of data, split, method and settings: a line is used again only if it is the same.
    scores
        ``(scope, metric)`` to :class:`Score`; the scope is "pooled" or a type.
    seconds_generate, seconds_score
        What it took.
    n_genes_absent
        Genes of the data that the generator does not make.
    """

    method: str
    seed: int
    key: str
    scores: Mapping[tuple[str, str], Score]
    seconds_generate: float
    seconds_score: float
    n_genes_absent: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON); NaN is None, with its reason."""
        rows = [
            {"scope": scope, "metric": metric, "value": _or_none(score.value), "reason": score.reason}
            for (scope, metric), score in self.scores.items()
        ]
        return {
            "method": self.method,
            "seed": self.seed,
            "key": self.key,
            "seconds_generate": round(self.seconds_generate, 3),
            "seconds_score": round(self.seconds_score, 3),
            "n_genes_absent": self.n_genes_absent,
            "rows": rows,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> MethodRun:
        """Read what :meth:`to_dict` made."""
        scores = {
            (row["scope"], row["metric"]): Score(
                float("nan") if row["value"] is None else float(row["value"]), row["reason"]
            )
            for row in found["rows"]
        }
        return cls(
            found["method"],
            int(found["seed"]),
            found["key"],
            scores,
            found["seconds_generate"],
            found["seconds_score"],
            found["n_genes_absent"],
        )

    def __str__(self) -> str:
        def value(metric: str) -> str:
            score = self.scores.get((metrics.POOLED, metric))
            return "–" if score is None or not np.isfinite(score.value) else f"{score.value:.3f}"

        return (
            f"{self.method}, seed {self.seed}: C2ST forest {value('c2st_forest_hvg')} (genes) "
            f"{value('c2st_forest_pca')} (PCA), MMD² {value('mmd2')}, recall {value('recall')}, called as asked "
            f"{value('conditional_accuracy')}, KS of genes per cell {value('genes_per_cell_ks')}; "
            f"{self.seconds_generate:.1f} s to make, {self.seconds_score:.0f} s to score"
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean, standard deviation (0 for one seed) and number of seeds; NaN with the reason where no seed has a value."""

    mean: float
    sd: float
    n: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """The result of :func:`evaluate_generation`.

    Parameters
    ----------
    name
        Of the data.
    labels_key
        Column of ``.obs`` with the types.
    n_train, n_heldout, n_third
        Cells trained on, held out, and those of the training cells that PCA and variable genes come from.
    n_left_out
        Cells without a label, and of types with fewer than ten cells.
    sizes
        Held-out cells of each type.
    types_with_own_space
        Types whose principal components are their own; the others use those of all cells.
    ours
        Methods under evaluation: neither baselines nor controls.
    runs
        One per method and seed.
    n_trees
        Trees of the random forest.
    """

    name: str
    labels_key: str
    n_train: int
    n_heldout: int
    n_third: int
    n_left_out: int
    sizes: Mapping[str, int]
    types_with_own_space: tuple[str, ...]
    ours: tuple[str, ...]
    runs: tuple[MethodRun, ...]
    n_trees: int = metrics.N_TREES

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods in the order of their runs."""
        return tuple(dict.fromkeys(run.method for run in self.runs))

    @property
    def scored_types(self) -> tuple[str, ...]:
        """Types that are scored on their own."""
        return tuple(name for name in self.sizes if any((name, HEADLINE) in run.scores for run in self.runs))

    def values(self, method: str, metric: str, scope: str = metrics.POOLED) -> dict[int, Score]:
        """Return the score of each seed; the scope "mean over types" averages over types that have a value."""
        found = {}
        for run in self.runs:
            if run.method != method:
                continue
            if scope != OVER_TYPES:
                if (scope, metric) in run.scores:
                    found[run.seed] = run.scores[scope, metric]
                continue
            scores = [score for (name, of), score in run.scores.items() if of == metric and name != metrics.POOLED]
            numbers = [score.value for score in scores if np.isfinite(score.value)]
            if numbers:
                found[run.seed] = Score(float(np.mean(numbers)))
            elif scores:
                found[run.seed] = scores[0]
        return found

    def summary(self, method: str, metric: str, scope: str = metrics.POOLED) -> Summary:
        """Return mean and spread over seeds."""
        scores = self.values(method, metric, scope)
        numbers = [score.value for score in scores.values() if np.isfinite(score.value)]
        if not numbers:
            reason = next((score.reason for score in scores.values()), "not measured in this scope")
            return Summary(float("nan"), float("nan"), 0, reason)
        return Summary(
            float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0, len(numbers)
        )

    def is_better(self, method: str, metric: str, scope: str = metrics.POOLED) -> bool:
        """Tell whether a method is better than every baseline, beyond its interval over seeds.

        Its distances from the ideal value (or from the ceiling's, where that is the ideal) have a 95 % t-interval over
        seeds; the mean distance of the best baseline must lie above it. One seed has no interval: never.
        """
        from scipy.stats import t

        ceiling = self.summary(CEILING, metric, scope).mean
        ideal = metrics.METRICS[metric]
        if ideal.ideal is None and not np.isfinite(ceiling):
            return False

        def distances(name: str) -> NDArray[np.float64]:
            found = [s.value for s in self.values(name, metric, scope).values() if np.isfinite(s.value)]
            return np.array([ideal.distance(value, ceiling) for value in found])

        ours = distances(method)
        others = [d.mean() for name in self.methods if name in BASELINES and (d := distances(name)).size]
        if ours.size < 2 or not others:
            return False
        half = float(t.ppf(0.975, ours.size - 1)) * float(ours.std(ddof=1)) / ours.size**0.5
        return bool(ours.mean() + half < min(others))

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        head = {
            key: getattr(self, key)
            for key in ("name", "labels_key", "n_train", "n_heldout", "n_third", "n_left_out", "n_trees")
        }
        scopes = (metrics.POOLED, *([OVER_TYPES] if self.scored_types else []), *self.scored_types)
        summaries = [
            {"method": method, "scope": scope, "metric": metric, **_finite(asdict(self.summary(method, metric, scope)))}
            for scope in scopes
            for metric in metrics.METRICS
            for method in self.methods
            if self.values(method, metric, scope)
        ]
        lists = {"types_with_own_space": list(self.types_with_own_space), "ours": list(self.ours)}
        return {
            **head,
            **lists,
            "sizes": dict(self.sizes),
            "summary": summaries,
            "runs": [run.to_dict() for run in self.runs],
        }

    def to_json(self) -> str:
        """Return the whole report as JSON: settings, summaries, and every row of every run."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def to_markdown(self) -> str:
        """Return the tables: all cells, the mean over types, a few metrics type by type, and what is missing."""
        seeds = sorted({run.seed for run in self.runs})
        small = [name for name in self.sizes if name not in self.scored_types]
        lines = [
            f"### {self.name}: {self.n_train:,} cells trained on, {self.n_heldout:,} held out, "
            f"{len(self.sizes)} types, {len(seeds)} seed{'s' if len(seeds) != 1 else ''}",
            "",
            "Mean ± standard deviation over seeds (split, generator and judges). Bold: nearer to the ideal than every "
            f"baseline, beyond a 95 % interval over seeds. Variable genes and components are those of {self.n_third:,} "
            f"training cells in neither sample. {self.n_left_out:,} cells without a usable label are left out.",
            "",
            *self._table(metrics.POOLED),
        ]
        if self.scored_types:
            lines += ["", f"Mean over {len(self.scored_types)} types with enough held-out cells:", ""]
            lines += self._table(OVER_TYPES)
            own = ", ".join(self.types_with_own_space) or "none"
            lines += ["", f"Components of their own: {own}. Not scored on their own: {', '.join(small) or 'none'}."]
            for metric in _BY_TYPE:
                lines += ["", f"{metrics.METRICS[metric].title}, by type:", "", *self._type_table(metric)]
        absent = {run.method: run.n_genes_absent for run in self.runs if run.n_genes_absent}
        lines += [""] + [
            f"- {TITLES.get(m, m)} does not make {n:,} genes of the data; they count as 0." for m, n in absent.items()
        ]
        lines += self._reasons()
        return "\n".join(lines).rstrip() + "\n"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write ``report.md`` and ``report.json`` into a folder, each whole or not at all."""
        targets = folder / "report.md", folder / "report.json"
        for path, text in zip(targets, (self.to_markdown(), self.to_json()), strict=True):
            with replacing(path) as partial:
                partial.write_text(text, encoding="utf-8")
        return targets

    def _cell(self, method: str, metric: str, scope: str) -> str:
        found = self.summary(method, metric, scope)
        if not found.n:
            return "–"
        text = f"{found.mean:.3f}" + (f" ± {found.sd:.3f}" if found.n > 1 else "")
        return f"**{text}**" if method in self.ours and self.is_better(method, metric, scope) else text

    def _table(self, scope: str) -> list[str]:
        names = self.methods
        rows = [
            f"| {metric.title} | {'ceiling' if metric.ideal is None else f'{metric.ideal:g}'} | "
            + " | ".join(self._cell(method, key, scope) for method in names)
            + " |"
            for key, metric in metrics.METRICS.items()
            if any(self.values(method, key, scope) for method in names)
        ]
        head = " | ".join(TITLES.get(name, name) for name in names)
        seconds = [f"{np.mean([r.seconds_generate for r in self.runs if r.method == name]):.1f}" for name in names]
        last = [f"| seconds to train and make | | {' | '.join(seconds)} |"] if scope == metrics.POOLED else []
        return [f"| | ideal | {head} |", "|---|---:|" + "---:|" * len(names), *rows, *last]

    def _type_table(self, metric: str) -> list[str]:
        names = self.methods
        rows = [
            f"| {name} | {self.sizes[name]:,} | " + " | ".join(self._cell(m, metric, name) for m in names) + " |"
            for name in self.scored_types
        ]
        head = " | ".join(TITLES.get(name, name) for name in names)
        return [f"| type | held out | {head} |", "|---|---:|" + "---:|" * len(names), *rows]

    def _reasons(self) -> list[str]:
        found: dict[tuple[str, str], dict[str, None]] = {}
        for run in self.runs:
            for (scope, metric), score in run.scores.items():
                if not np.isfinite(score.value) and scope == metrics.POOLED:
                    found.setdefault((run.method, score.reason), {})[metrics.METRICS[metric].title] = None
        return [
            f"- {TITLES.get(method, method)} has no value of: {', '.join(titles)} ({reason})."
            for (method, reason), titles in found.items()
        ]


def read_rows(path: Path) -> list[MethodRun]:
    """Read ``rows.jsonl``; a last line that was cut off by a kill is left out, a missing file has no rows."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [MethodRun.from_dict(json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def append_row(path: Path, run: MethodRun) -> None:
    """Add a run to ``rows.jsonl``, on disk before it returns."""
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):  # a line that was cut off
            with replacing(path) as partial:
                partial.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(run.to_dict(), allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _or_none(value) if isinstance(value, float) else value for key, value in values.items()}
