"""The report of ``evaluate grn``: runs, tables with intervals over regulators, and the files that are written.

Everything here is computed from the runs, so that a report can be made again from ``rows.jsonl``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.baselines import network as baselines
from scdiva.metrics import network as metrics
from scdiva.metrics.annotation import Interval
from scdiva.tasks.evaluation_rows import or_none, write_report

REFERENCE = "spearman"
"""What differences are from."""
SHUFFLED = "_shuffled"
"""Ending of a method's name: the same on cells without relations between genes."""
NULL = REFERENCE + SHUFFLED
DEGREE = "genes alone"
"""Part of a network that knows nothing of pairs (:func:`scdiva.baselines.network.degree_part`)."""
TABLE = "network"
_DIGITS = 6
_SIGN_CODES = "-0+"


@dataclass(frozen=True, slots=True)
class Run:
    """One method on one set of candidates: one line of ``rows.jsonl``.

    Parameters
    ----------
    data, truth, method, seed
        Which.
    part
        "" for the network, "genes alone" for its part that knows nothing of pairs.
    n_targets
        Candidate targets; a sample of them where regressions are compared.
    is_sample
        Whether targets are a sample.
    key
        Hash of cells, truth, method and settings: a line is used again only if it is the same.
    regulators
        The candidate regulators.
    auprc, early, chance, prevalence
        ``(R,)`` of each regulator; as in :class:`scdiva.metrics.network.NetworkScores`.
    matched
        ``(R,)`` degree-matched AUROC of each regulator.
    pooled
        auprc, early, chance and prevalence of all candidates in one ranking.
    auprc_draws, early_draws
        Ratios of all candidates in one ranking, with regulators drawn; the same draws for every method.
    n_nan
        Candidates without a score.
    sign_regulator, sign_truth, sign_predicted
        ``(n_edges,)`` of the known edges with a sign: number of the regulator, true and predicted sign; None predicted
        by methods without signs.
    n_cells
        Cells that the network was estimated from.
    seconds
        To estimate it; of all truths together.
    versions
        Packages that ran.
    """

    data: str
    truth: str
    method: str
    seed: int
    part: str
    n_targets: int
    is_sample: bool
    key: str
    regulators: tuple[str, ...]
    auprc: NDArray[np.float64]
    early: NDArray[np.float64]
    chance: NDArray[np.float64]
    prevalence: NDArray[np.float64]
    matched: NDArray[np.float64]
    pooled: Mapping[str, float]
    auprc_draws: NDArray[np.float64]
    early_draws: NDArray[np.float64]
    n_nan: int
    sign_regulator: NDArray[np.int64]
    sign_truth: NDArray[np.int64]
    sign_predicted: NDArray[np.int64] | None
    n_cells: int
    seconds: float
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists and numbers."""
        predicted = self.sign_predicted
        return {
            "table": TABLE,
            "data": self.data,
            "truth": self.truth,
            "method": self.method,
            "seed": self.seed,
            "part": self.part,
            "n_targets": self.n_targets,
            "is_sample": self.is_sample,
            "key": self.key,
            "regulators": list(self.regulators),
            **{name: _rounded(getattr(self, name)) for name in ("auprc", "early", "chance", "prevalence")},
            "matched": [or_none(value) for value in self.matched],
            "pooled": dict(self.pooled),
            **{name: _rounded(getattr(self, name)) for name in ("auprc_draws", "early_draws")},
            "n_nan": self.n_nan,
            "sign_regulator": self.sign_regulator.tolist(),
            "sign_truth": _sign_text(self.sign_truth),
            "sign_predicted": None if predicted is None else _sign_text(predicted),
            "n_cells": self.n_cells,
            "seconds": self.seconds,
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` made."""
        predicted = found["sign_predicted"]

        def numbers(name: str) -> NDArray[np.float64]:
            return np.array(found[name], dtype=np.float64)

        return cls(
            data=found["data"],
            truth=found["truth"],
            method=found["method"],
            seed=int(found["seed"]),
            part=found["part"],
            n_targets=int(found["n_targets"]),
            is_sample=bool(found["is_sample"]),
            key=found["key"],
            regulators=tuple(found["regulators"]),
            auprc=numbers("auprc"),
            early=numbers("early"),
            chance=numbers("chance"),
            prevalence=numbers("prevalence"),
            matched=numbers("matched"),
            pooled={name: float(value) for name, value in found["pooled"].items()},
            auprc_draws=numbers("auprc_draws"),
            early_draws=numbers("early_draws"),
            n_nan=int(found["n_nan"]),
            sign_regulator=np.array(found["sign_regulator"], dtype=np.int64),
            sign_truth=_signs_of(found["sign_truth"]),
            sign_predicted=None if predicted is None else _signs_of(predicted),
            n_cells=int(found["n_cells"]),
            seconds=float(found["seconds"]),
            versions=found.get("versions", {}),
        )

    @property
    def n_edges(self) -> int:
        """Known edges among the candidates."""
        n_pairs = len(self.regulators) * self.n_targets
        return round(self.pooled["prevalence"] * (n_pairs - self.pooled["n_self"]))

    def __str__(self) -> str:
        ratio = self.pooled["auprc"] / self.pooled["chance"]
        of_each = float(np.mean(self.auprc / self.chance))
        part = f" ({self.part})" if self.part else ""
        sample = " on a sample of targets" if self.is_sample else ""
        return (
            f"{self.data}, {self.truth}, {self.method}{part}{sample}, seed {self.seed}: AUPRC ratio {of_each:.3f} by "
            f"regulator, {ratio:.3f} pooled, degree-matched AUROC {np.nanmean(self.matched):.3f}; {self.seconds:.1f} s"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Figures of one method on one set of candidates, means over seeds, with intervals over regulators.

    Parameters
    ----------
    auprc_ratio, early_ratio
        Mean over regulators.
    auprc_ratio_pooled, early_ratio_pooled
        Of all candidates in one ranking.
    auprc_difference, early_difference, auprc_difference_pooled, early_difference_pooled
        Minus co-expression, the same regulators drawn for both; None for co-expression itself or without it.
    matched, matched_difference
        Degree-matched AUROC, mean over regulators, and minus co-expression's.
    above_genes
        AUPRC ratio by regulator minus that of the part that knows nothing of pairs.
    signs, sign_difference
        Of the first seed; balanced accuracy minus that of the sign of co-expression, on edges that both give a sign.
    n_nan
        Candidates without a score, mean over seeds.
    """

    auprc_ratio: Interval
    early_ratio: Interval
    auprc_ratio_pooled: Interval
    early_ratio_pooled: Interval
    auprc_difference: Interval | None
    early_difference: Interval | None
    auprc_difference_pooled: Interval | None
    early_difference_pooled: Interval | None
    matched: Interval
    matched_difference: Interval | None
    above_genes: Interval | None
    signs: metrics.SignScores | None
    sign_difference: Interval | None
    n_nan: float


@dataclass(frozen=True)
class GrnReport:
    """The result of :func:`~scdiva.tasks.evaluate_grn.evaluate_grn`.

    Parameters
    ----------
    runs
        One per data set, truth, method, part and seed.
    notes
        What the tables need to be read rightly.
    titles
        Of methods that are no baselines.
    """

    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    titles: Mapping[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[tuple[str, str, bool], ...]:
        """Data, truth, and whether targets are a sample, in the order of the runs; samples last."""
        found = dict.fromkeys((run.data, run.truth, run.is_sample) for run in self.runs)
        return tuple(sorted(found, key=lambda task: task[2]))

    def methods(self, task: tuple[str, str, bool]) -> tuple[str, ...]:
        """Methods of a task in the order of their runs."""
        return tuple(dict.fromkeys(run.method for run in self.runs if (run.data, run.truth, run.is_sample) == task))

    def of(self, task: tuple[str, str, bool], method: str, part: str = "") -> list[Run]:
        """Return the runs of a method, one per seed."""
        return [
            run
            for run in self.runs
            if (run.data, run.truth, run.is_sample) == task and run.method == method and run.part == part
        ]

    def title(self, method: str) -> str:
        """Return what a method is called in tables."""
        name = method.removesuffix(SHUFFLED)
        title = self.titles.get(name) or baselines.TITLES.get(name, name)
        return f"{title}, on shuffled cells (null)" if method.endswith(SHUFFLED) else title

    def compare(self, task: tuple[str, str, bool], method: str) -> Comparison:
        """Return the figures of a method."""
        runs, reference = self.of(task, method), self.of(task, REFERENCE)
        draws = drawn(len(runs[0].regulators))
        ours = _ratios(runs)
        other, genes = (_ratios(each) if each else None for each in (reference, self.of(task, method, DEGREE)))
        if method == REFERENCE:
            other = None
        signs = sign_difference = None
        first = runs[0]
        if first.sign_predicted is not None and first.sign_truth.size:
            judged = first.sign_truth, first.sign_predicted
            signs = metrics.sign_scores(*judged, first.sign_regulator, draws)
            if other is not None and reference[0].sign_predicted is not None:
                sign_difference = metrics.sign_difference(
                    *judged, reference[0].sign_predicted, first.sign_regulator, draws
                )

        def gap(other: dict[str, Any] | None, name: str) -> Interval | None:
            return None if other is None else metrics.mean_interval(ours[name] - other[name], draws)

        def pooled_gap(value: str, name: str) -> Interval | None:
            if other is None:
                return None
            return metrics.drawn_interval(ours[value] - other[value], ours[name] - other[name])

        return Comparison(
            auprc_ratio=metrics.mean_interval(ours["auprc"], draws),
            early_ratio=metrics.mean_interval(ours["early"], draws),
            auprc_ratio_pooled=metrics.drawn_interval(ours["pooled_auprc"], ours["auprc_draws"]),
            early_ratio_pooled=metrics.drawn_interval(ours["pooled_early"], ours["early_draws"]),
            auprc_difference=gap(other, "auprc"),
            early_difference=gap(other, "early"),
            auprc_difference_pooled=pooled_gap("pooled_auprc", "auprc_draws"),
            early_difference_pooled=pooled_gap("pooled_early", "early_draws"),
            matched=metrics.mean_interval(ours["matched"], draws),
            matched_difference=gap(other, "matched"),
            above_genes=gap(genes, "auprc"),
            signs=signs,
            sign_difference=sign_difference,
            n_nan=float(np.mean([run.n_nan for run in runs])),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        summary = []
        for task in self.tasks:
            for method in self.methods(task):
                found, run = self.compare(task, method), self.of(task, method)[0]
                summary.append(
                    {
                        "data": task[0],
                        "truth": task[1],
                        "is_sample": task[2],
                        "method": method,
                        "n_seeds": len(self.of(task, method)),
                        "n_regulators": len(run.regulators),
                        "n_targets": run.n_targets,
                        "n_edges": run.n_edges,
                        "prevalence": run.pooled["prevalence"],
                        "n_cells": run.n_cells,
                        "seconds": run.seconds,
                        "n_nan": found.n_nan,
                        **{name: _plain(getattr(found, name)) for name in _INTERVALS},
                        "signs": None if found.signs is None else _sign_dict(found.signs),
                    }
                )
        return {
            "notes": list(self.notes),
            "summary": summary,
            "versions": self._versions(),
            "regulators": [self._regulator_row(run) for run in self.runs if not run.part],
        }

    def _regulator_row(self, run: Run) -> dict[str, Any]:
        """Return the ratios of single regulators; the rest of a run is in ``rows.jsonl``."""
        return {
            **{name: getattr(run, name) for name in ("data", "truth", "method", "seed", "is_sample")},
            "regulators": list(run.regulators),
            "auprc_ratio": _rounded(run.auprc / run.chance),
            "matched_auroc": [or_none(value) for value in run.matched],
            "early_ratio": _rounded(run.early / run.prevalence),
        }

    def _versions(self) -> list[dict[str, str]]:
        found = [dict(run.versions) for run in self.runs]
        return [row for i, row in enumerate(found) if row and row not in found[:i]]

    def to_markdown(self) -> str:
        """Return all tables: ranking of pairs, then signs; then the notes."""
        lines: list[str] = []
        for task in self.tasks:
            run = next(run for run in self.runs if (run.data, run.truth, run.is_sample) == task)
            sample = " (a sample)" if task[2] else ""
            lines += [
                f"**{task[0]}, known edges of {task[1]}**: {len(run.regulators):,} regulators × {run.n_targets:,} "
                f"targets{sample}, {run.n_edges:,} known edges ({run.pooled['prevalence']:.2%} of pairs)",
                "",
                *self._ranking_lines(task),
                *self._sign_lines(task),
            ]
        lines += [f"- {note}" for note in self.notes]
        for packages in self._versions():
            lines.append(f"- Ran with {', '.join(f'{name} {number}' for name, number in packages.items())}.")
        return "\n".join(lines).rstrip() + "\n"

    def _ranking_lines(self, task: tuple[str, str, bool]) -> list[str]:
        lines = [
            "| method | AUPRC ratio, mean of regulators | minus co-expression | above genes alone | pooled | "
            "minus co-expression | early precision ratio, mean of regulators | pooled | degree-matched AUROC | "
            "minus co-expression | no score | seconds |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for method in self.methods(task):
            found = self.compare(task, method)
            is_better = found.auprc_difference is not None and found.auprc_difference.low > 0
            title = f"**{self.title(method)}**" if is_better else self.title(method)
            cells = [
                title,
                _text(found.auprc_ratio),
                _signed(found.auprc_difference),
                _signed(found.above_genes),
                _text(found.auprc_ratio_pooled),
                _signed(found.auprc_difference_pooled),
                _text(found.early_ratio),
                _text(found.early_ratio_pooled),
                _text(found.matched),
                _signed(found.matched_difference),
                f"{found.n_nan:,.0f}",
                f"{np.mean([run.seconds for run in self.of(task, method)]):.1f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return [*lines, ""]

    def _sign_lines(self, task: tuple[str, str, bool]) -> list[str]:
        rows = []
        for method in self.methods(task):
            found = self.compare(task, method)
            if (signs := found.signs) is None:
                continue
            cells = [
                self.title(method),
                f"{signs.n_edges:,}",
                f"{signs.n_undecided:,}",
                _text(signs.accuracy),
                f"{signs.constant_plus:.3f}",
                _text(signs.balanced_accuracy),
                _signed(found.sign_difference),
            ]
            rows.append(f"| {' | '.join(cells)} |")
        if not rows:
            return []
        head = [
            "| sign of known edges | edges | undecided | accuracy | always activation | balanced accuracy | "
            "minus sign of co-expression |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        return [*head, *rows, ""]

    def write(self, folder: Path) -> tuple[Path, ...]:
        """Write ``report.md`` and ``report.json``, each whole or not at all."""
        return write_report(folder, self.to_markdown(), self.to_dict())


_INTERVALS = (
    "auprc_ratio",
    "early_ratio",
    "auprc_ratio_pooled",
    "early_ratio_pooled",
    "auprc_difference",
    "early_difference",
    "auprc_difference_pooled",
    "early_difference_pooled",
    "matched",
    "matched_difference",
    "above_genes",
    "sign_difference",
)
_DRAW_SEED = 53


def drawn(n_regulators: int) -> NDArray[np.int64]:
    """Return the draws of regulators: the same for all methods on the same candidates."""
    return metrics.draw_regulators(n_regulators, np.random.default_rng([n_regulators, _DRAW_SEED]))


def _ratios(runs: Sequence[Run]) -> dict[str, Any]:
    """Return ratios, means over seeds."""
    return {
        "auprc": np.mean([run.auprc / run.chance for run in runs], axis=0),
        "matched": np.mean([run.matched for run in runs], axis=0),
        "early": np.mean([run.early / run.prevalence for run in runs], axis=0),
        "pooled_auprc": float(np.mean([run.pooled["auprc"] / run.pooled["chance"] for run in runs])),
        "pooled_early": float(np.mean([run.pooled["early"] / run.pooled["prevalence"] for run in runs])),
        "auprc_draws": np.mean([run.auprc_draws for run in runs], axis=0),
        "early_draws": np.mean([run.early_draws for run in runs], axis=0),
    }


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.{_DIGITS}g}") for value in values]


def _sign_text(signs: NDArray[np.integer]) -> str:
    return "".join(_SIGN_CODES[sign + 1] for sign in signs.tolist())


def _signs_of(text: str) -> NDArray[np.int64]:
    return np.array([_SIGN_CODES.index(letter) - 1 for letter in text], dtype=np.int64)


def _plain(interval: Interval | None) -> list[float | None] | None:
    return None if interval is None else [or_none(each) for each in (interval.value, interval.low, interval.high)]


def _sign_dict(signs: metrics.SignScores) -> dict[str, Any]:
    return {
        "accuracy": _plain(signs.accuracy),
        "balanced_accuracy": _plain(signs.balanced_accuracy),
        "constant_plus": or_none(signs.constant_plus),
        "n_edges": signs.n_edges,
        "n_activations": signs.n_activations,
        "n_undecided": signs.n_undecided,
    }


def _text(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _signed(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"
