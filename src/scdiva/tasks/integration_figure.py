"""Pictures of ``evaluate integration`` and ``evaluate embedding``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiva.data.output import replacing
from scdiva.tasks import evaluate_embedding as embedding
from scdiva.tasks.integration_report import CEILING, FLOOR, HEADLINES, NULL, OURS, SEES_LABELS, IntegrationReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours: told apart by colour-blind readers; shapes tell methods apart without colour
_STYLES: Mapping[str, tuple[str, str]] = {
    "zero_shot": ("#56B4E9", "o"),
    "scdiva": ("#0072B2", "s"),
    "scdiva_labels": ("#D55E00", "D"),
    "scdiva_published": ("#8B4513", "p"),
    "harmony": ("#009E73", "^"),
    "scvi": ("#CC79A7", "v"),
    "scanvi": ("#E69F00", "P"),
    FLOOR: ("#555555", "X"),
    NULL: ("#999999", "x"),
    CEILING: ("#999999", "*"),
}
_CONTROLS = {FLOOR: "no integration", NULL: "null", CEILING: "ceiling of types"}
_NAMES = {
    "zero_shot": "scDiVa, as it comes",
    "scdiva": "scDiVa, integrated",
    "scdiva_labels": "scDiVa, integrated, sees labels",
    "scdiva_published": "scDiVa, published protocol, sees labels",
    "harmony": "Harmony",
    "scvi": "scVI",
    "scanvi": "scANVI, sees labels",
    FLOOR: "PCA",
    NULL: "noise",
    CEILING: "one-hot labels",
}
_GAP = 0.045
"""Smallest vertical distance of two names, as a share of the height."""


def draw_integration(report: IntegrationReport, path: Path) -> None:
    """Draw types kept against batches mixed: a point for each seed of each method, named at the right.

    Better is up and to the right; grey lines join equal totals (0.6 types + 0.4 batches). Open symbols saw the labels;
    controls are grey.

    Parameters
    ----------
    report
        What is drawn; methods without a value on either axis are left out.
    path
        PNG to write.
    """
    x_name, y_name = report.axes
    points = {}
    for method in report.methods:
        runs = [run for run in report.runs if run.method == method and {x_name, y_name} <= set(run.scores)]
        found = np.array([[run.scores[x_name].value, run.scores[y_name].value] for run in runs]).reshape(-1, 2)
        found = found[np.isfinite(found).all(axis=1)]
        if len(found):
            points[method] = found
    figure = _figure(9.0, 6.0)
    axes = figure.add_subplot()
    every = np.concatenate([*points.values(), np.zeros((0, 2))])
    low = np.floor((every.min(axis=0) - 0.02) * 10) / 10 if len(every) else np.zeros(2)
    axes.set(xlim=(low[0], 1.01), ylim=(low[1], 1.01))
    _draw_totals(axes, y_name)
    for method, found in points.items():
        colour, marker = _STYLES[method]
        is_open = method in SEES_LABELS and method != CEILING
        face: dict[str, Any] = {} if marker == "x" else {"facecolors": "white" if is_open else colour}
        axes.scatter(
            found[:, 0],
            found[:, 1],
            s=110 if marker == "*" else 62,
            marker=marker,
            color=colour if marker == "x" else None,
            edgecolors=None if marker == "x" else colour,
            linewidths=1.8,
            zorder=4 if method in OURS else 3,
            **face,
        )
    _name(axes, {method: found.mean(axis=0) for method, found in points.items()})
    axes.set_xlabel(f"types kept apart: {HEADLINES[x_name]}")
    axes.set_ylabel(f"batches mixed: {HEADLINES[y_name]}")
    n_seeds = len(report.seeds)
    axes.set_title(
        f"{report.name}: {report.n_cells:,} cells, {report.n_batches} batches, {report.n_types} types. "
        f"A point per seed ({n_seeds}); open: saw the labels",
        fontsize=9.5,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_embedding(report: embedding.EmbeddingReport, path: Path) -> None:
    """Draw every score of every embedding: a panel per score, a line per method, a point per seed.

    Parameters
    ----------
    report
        What is drawn.
    path
        PNG to write.
    """
    colours = {
        embedding.OURS: ("#0072B2", "o"),
        embedding.PCA: ("#E69F00", "s"),
        "scvi": ("#CC79A7", "^"),
        embedding.NULL_DIRECTIONS: ("#777777", "x"),
        embedding.NULL_LABELS: ("#777777", "+"),
        embedding.CEILING: ("#009E73", "*"),
    }
    names, scores = report.methods[::-1], report.scores
    n_columns = min(4, len(scores))
    n_rows = -(-len(scores) // n_columns)
    figure = _figure(3.6 + 2.3 * n_columns, n_rows * (1.0 + 0.3 * len(names)) + 0.4)
    panels = np.atleast_1d(figure.subplots(n_rows, n_columns, sharey=True)).ravel()
    for axes, score in zip(panels, scores, strict=False):
        for y, method in enumerate(names):
            values = report.values(method, score)
            colour, marker = colours[method]
            axes.scatter(values, [y] * len(values), color=colour, marker=marker, s=42, linewidths=1.4, zorder=3)
        axes.set_title(embedding.SCORES[score], fontsize=9.5)
        axes.set(xlim=(min(0.0, axes.get_xlim()[0]), 1.02), ylim=(-0.6, len(names) - 0.4))
        axes.set_yticks(range(len(names)), [embedding.TITLES[name] for name in names], fontsize=8.5)
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for axes in panels[len(scores) :]:
        axes.set_visible(False)
    figure.suptitle(
        f"{report.name}: {report.n_scored:,} cells, {report.n_types} types; a point per seed; 1 is ideal", fontsize=10
    )
    _save(figure, path)


def _draw_totals(axes: Axes, y_name: str) -> None:
    """Draw lines of equal scib totals, where the axes are what it is made of."""
    if y_name != "scib_batch":
        return
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    x = np.linspace(left, right, 50)
    for share in np.arange(0.1, 1.0, 0.1):
        y = (share - 0.6 * x) / 0.4
        inside = (y >= bottom) & (y <= top)
        if inside.sum() > 4:  # enough of it to carry its name
            axes.plot(x[inside], y[inside], color="#e0e0e0", linewidth=0.9, zorder=1)
            at = np.flatnonzero(inside)[0]
            axes.annotate(f"total {share:.1f}", (x[at], y[at]), fontsize=7, color="#8a8a8a", va="top", zorder=1)


def _name(axes: Axes, centres: Mapping[str, Sequence[float] | np.ndarray]) -> None:
    """Write the methods' names at the right of the axes, in the order of their heights, with a line to each."""
    ordered = sorted(centres, key=lambda method: float(centres[method][1]))
    bottom, top = axes.get_ylim()
    heights = [(float(centres[method][1]) - bottom) / (top - bottom) for method in ordered]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + _GAP)
    for i in reversed(range(len(heights))):
        ceiling = 1.0 if i == len(heights) - 1 else heights[i + 1] - _GAP
        heights[i] = min(heights[i], ceiling)
    for method, height in zip(ordered, heights, strict=True):
        text = _NAMES[method] + (f" ({_CONTROLS[method]})" if method in _CONTROLS else "")
        axes.annotate(
            text,
            xy=(float(centres[method][0]), float(centres[method][1])),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=9,
            fontweight="bold" if method in OURS else "normal",
            color=_STYLES[method][0],
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": _STYLES[method][0],
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
