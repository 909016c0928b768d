"""The training curve as a picture."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scdiva.config import atomic_path
from scdiva.errors import TrainingError
from scdiva.training.record import read_log


def draw_curve(log_path: str | Path, png_path: str | Path, *, key: str = "loss") -> None:
    """Draw training and held-out loss over steps, with the floors as horizontal lines.

    Parameters
    ----------
    log_path
        ``log.csv`` of a run.
    png_path
        Where the picture goes.
    key
        The column to draw. Its own floor (``KEY_floor``), or up to two floors of other columns where it has none, are
        drawn as horizontal lines at their last held-out value (or training value, where there is none).

    Raises
    ------
    TrainingError
        The log has no rows with that column.
    """
    rows = read_log(Path(log_path))
    figure = Figure(figsize=(7, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    has_curve = False
    for split, style in (("train", {"alpha": 0.6}), ("heldout", {"marker": ".", "linewidth": 2})):
        points = [(int(r["step"]), float(r[key])) for r in rows if r["split"] == split and r.get(key)]
        if points:
            has_curve = True
            axes.plot(*zip(*points, strict=True), label=split.replace("heldout", "held-out"), **style)
    if not has_curve:
        raise TrainingError(
            f"{log_path} has no values of {key!r}",
            expected="the log.csv of a run that has logged at least once",
            fix="check the path and the name of the column",
        )
    floors = [name for name in rows[0] if name.endswith("_floor")]
    # the floors of many terms say nothing of their sum, and would squeeze it into a line
    own = [name for name in floors if name == f"{key}_floor"] or (floors if len(floors) <= 2 else [])
    for floor in own:
        values = [r[floor] for split in ("train", "heldout") for r in rows if r["split"] == split and r[floor]]
        if values:
            axes.axhline(float(values[-1]), linestyle="--", color="grey", linewidth=1)
            axes.annotate(
                floor.replace("_", " "), (1, float(values[-1])), xycoords=("axes fraction", "data"), ha="right"
            )
    axes.set_xlabel("step")
    axes.set_ylabel(key.replace("_", " "))
    axes.legend(frameon=False)
    with atomic_path(png_path) as temporary:
        canvas.print_png(temporary)
