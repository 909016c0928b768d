"""The picture of ``evaluate annotation``: macro-F1 of all methods by task, open sets, reliability."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiva.baselines.annotation import BASELINES
from scdiva.data.output import replacing
from scdiva.tasks import open_set
from scdiva.tasks.annotation_report import CHOSEN, NULL, OURS_AND_CHOSEN, TITLES, AnnotationReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours: told apart by colour-blind readers; marker shapes tell them apart without colour
_OURS = {
    "probe": ("#0072B2", "o"),
    "probe_self_trained": ("#D55E00", "s"),
    "reference": ("#009E73", "D"),
    "integrate": ("#56B4E9", "P"),
    "consensus": ("#882255", "X"),
    "lora": ("#CC79A7", "^"),
    "finetune": ("#E69F00", "v"),
    CHOSEN: ("#000000", "*"),
}
_BASELINE, _OTHER = "#444444", "#9a9a9a"
_NULL = "#CC3311"
_SHORT = {
    "probe": "probe",
    "probe_self_trained": "probe, self-trained",
    "reference": "neighbours",
    "integrate": "neighbours, integrated",
    "consensus": "consensus",
    "lora": "low-rank fine-tuning",
    "finetune": "fine-tuned",
    NULL: "null",
    "knn_pca": "15-nn",
    "celltypist": "CellTypist",
}
_MIN_CELLS_PER_BIN = 20
_MARGIN = 0.04


def draw(report: AnnotationReport, path: Path) -> None:
    """Draw a report.

    Left, macro-F1 with 95 % intervals: a line for each of our methods, one for the best baseline, and one for all other
    baselines. Right, reliability by kind of split, and the AUROC of open sets where it was measured.

    Parameters
    ----------
    report
        What is drawn.
    path
        PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    ours = [name for name in report.methods if name in OURS_AND_CHOSEN]
    kinds, found = report.kinds, report.open_set
    heights = [3.6] * len(kinds) + [0.9 + 0.3 * len(found.methods) * len(found.tasks)] * bool(found.tasks)
    height = max(1.6 + 0.21 * (len(ours) + 4) * len(report.tasks), sum(heights), 4.2)
    figure = Figure(figsize=(14, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.add_gridspec(len(heights), 2, width_ratios=[1.7, 1], height_ratios=heights)
    _draw_scores(figure.add_subplot(parts[:, 0]), report, ours, height)
    for i, (kind, tasks) in enumerate(kinds.items()):
        _draw_reliability(figure.add_subplot(parts[i, 1]), report, kind, tasks)
    if found.tasks:
        _draw_open_set(figure.add_subplot(parts[-1, 1]), found)
    with replacing(path) as partial:
        figure.savefig(partial, format="png")


def _draw_scores(axes: Axes, report: AnnotationReport, ours: list[str], height: float) -> None:
    lowest = []
    for task in report.tasks:
        best = report.best_baseline(task)
        found = [report.interval(task, name) for name in (*ours, *([best] if best else []))]
        lowest += [each.low for each in found if each is not None]
    left = max(0.0, np.floor((min(lowest, default=0.0) - _MARGIN) * 20) / 20)
    said: set[str] = set()

    def label(text: str) -> str | None:
        is_new = text not in said
        said.add(text)
        return text if is_new else None

    y, ticks = 0.0, []
    for i, task in enumerate(report.tasks):
        best, top = report.best_baseline(task), y
        for name in ours:
            colour, marker = _OURS[name]
            interval = report.interval(task, name)
            if interval is not None:
                _point(axes, interval, y, colour, marker, 9 if name == CHOSEN else 6, label(TITLES[name]))
            y += 1
        interval = None if best is None else report.interval(task, best)
        if best is not None and interval is not None:
            _point(axes, interval, y, _BASELINE, "|", 11, label("best baseline (named on the right)"))
            axes.annotate(
                "\n".join(textwrap.wrap(TITLES[best], 24)), (1, y), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=8, color=_BASELINE,
            )  # fmt: skip
            axes.plot([interval.value] * 2, [top - 0.4, y], color=_BASELINE, linewidth=1, linestyle=":", zorder=1)
            y += 1
        beyond = []
        for name in report.methods:
            values = report.values(task, name, "macro_f1")
            if not values or name not in BASELINES or name == best:
                continue
            mean = float(np.mean(values))
            if mean < left:
                beyond.append((mean, name))
            elif name == NULL:
                axes.plot(mean, y, "x", color=_NULL, markersize=6, label=label(TITLES[name]))
            else:
                axes.plot(mean, y, "o", mfc="none", mec=_OTHER, markersize=5, label=label("other baselines"))
        y += 1
        if beyond:
            names = ", ".join(f"{_SHORT.get(name, name.replace('_', ' '))} {mean:.2f}" for mean, name in sorted(beyond))
            axes.annotate(
                f"◂ further left: {names}", (0, y - 0.1), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=7.5, color="#777777",
            )  # fmt: skip
            y += 1
        ticks.append(((top + y - 1) / 2, "\n".join(textwrap.wrap(task, 30))))
        if i % 2 == 0:
            axes.axhspan(top - 0.75, y - 0.25, color="#f4f4f4", zorder=0, linewidth=0)
        y += 0.5
    axes.set(xlim=(left, 1.005), ylim=(y - 0.6, -0.9), xlabel="macro-F1 of held-out cells (95 % interval over cells)")
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title("Right of the dotted line: better than the best baseline", loc="left", fontsize=10.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.65 / height), ncols=3, fontsize=8, frameon=False)


def _point(axes: Axes, interval: Any, y: float, colour: str, marker: str, size: float, label: str | None) -> None:
    axes.plot([interval.low, interval.high], [y, y], color=colour, linewidth=1.6, zorder=3)
    axes.plot(interval.value, y, marker, color=colour, markersize=size, zorder=4, label=label, markeredgewidth=1.6)


def _draw_reliability(axes: Axes, report: AnnotationReport, kind: str, tasks: tuple[str, ...]) -> None:
    # what is chosen is one of the others
    names = {name: _OURS[name] for name in report.methods if name in OURS_AND_CHOSEN and name != CHOSEN}
    best = [report.best_baseline(task) for task in tasks]
    # the baseline that is best most often speaks for them
    often = max(dict.fromkeys(name for name in best if name), key=best.count, default=None)
    if often is not None:
        names[often] = (_BASELINE, "P")
    lowest = 0.9
    for name, (colour, marker) in names.items():
        found, error = report.reliability(name, tasks), report.calibration(name, tasks)
        if found is None or error is None:
            continue
        is_shown = found.n_cells >= _MIN_CELLS_PER_BIN
        sure, right = found.confidence[is_shown], found.accuracy[is_shown]
        lowest = min([lowest, *sure.tolist(), *right.tolist()])
        axes.plot(
            sure, right, marker=marker, color=colour, markersize=4, linewidth=1.2,
            linestyle="--" if name == often else "-",
            label=f"{error.error.value:.3f} ({error.error.low:.3f}–{error.error.high:.3f}) "
            + (f"best baseline:\n{TITLES[name]}" if name == often else _SHORT[name]),
        )  # fmt: skip
    left = max(0.0, np.floor((lowest - _MARGIN) * 10) / 10)
    axes.plot([left, 1], [left, 1], color="black", linewidth=0.8, linestyle=":", zorder=1)
    for text, place, side in (("too sure", (0.98, 0.05), "right"), ("too unsure", (0.03, 0.92), "left")):
        axes.annotate(text, place, xycoords="axes fraction", ha=side, fontsize=8, color="#777777", style="italic")
    axes.set(xlim=(left, 1.01), ylim=(left, 1.01), xlabel="confidence", ylabel="share that is right")
    axes.set_title(f"Calibration {kind}: error (95 %) below", loc="left", fontsize=10.5)
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(-0.1, -0.16))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_open_set(axes: Axes, found: open_set.OpenSetReport) -> None:
    styles = {name: _OURS[name] for name in open_set.OURS}
    styles |= {name: (_BASELINE, "P") for name in found.methods if name not in styles}
    styles[open_set.NULL] = (_NULL, "x")
    y, ticks = 0.0, []
    for task in found.tasks:
        for name in found.methods:
            colour, marker = styles[name]
            by_type = found.table(task, name).mean(axis=1)
            axes.plot(by_type, np.full(by_type.size, y + 0.25), "|", color=colour, markersize=5, alpha=0.6)
            _point(axes, found.interval(task, name), y, colour, marker, 6, None)
            text = open_set.TITLES[name]
            title = f"{task}: {text}" if len(found.tasks) > 1 else text
            ticks.append((y, "\n".join(textwrap.wrap(title, 34))))
            y += 1
        y += 0.7
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set(ylim=(y - 0.9, -0.7), xlabel="AUROC (mean, 95 %; ticks: types)")
    axes.set_yticks([place for place, _ in ticks], [text for _, text in ticks], fontsize=7.5)
    axes.grid(axis="x", color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Open set: is a new type noticed?", loc="left", fontsize=10.5)
