"""What a run writes down: means of losses, the log as CSV and for TensorBoard, and the progress bar."""

from __future__ import annotations

import csv
import io
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from scdiva.config import atomic_path

log = logging.getLogger(__name__)

_FIRST_COLUMNS = ("step", "split", "loss")
_LAST_COLUMNS = ("lr", "grad_norm", "cells_per_s", "n_cells_seen")


class WeightedMeans:
    """Running means of named scalars; they stay on their device until they are asked for."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], weight: float) -> None:
        """Count scalars with a weight (number of cells)."""
        for name, value in values.items():
            # float64: sums of many cells, and exact in a checkpoint.
            pair = torch.stack([value.detach().double() * weight, torch.full_like(value.detach(), weight).double()])
            self._totals[name] = self._totals[name] + pair if name in self._totals else pair

    def over_processes(self) -> dict[str, float]:
        """Return the means over all cells of all processes; a collective call."""
        parts: list[Any] = [self.state_dict()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self.state_dict())
        totals: dict[str, list[float]] = {}
        for part in parts:
            for name, (value, weight) in part.items():
                total = totals.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += weight
        return {name: value / weight for name, (value, weight) in totals.items() if weight > 0}

    def clear(self) -> None:
        """Start again."""
        self._totals = {}

    def state_dict(self) -> dict[str, list[float]]:
        """Return name -> [weighted sum, sum of weights]."""
        return {name: total.tolist() for name, total in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, list[float]], device: torch.device) -> None:
        """Go on from a saved state."""
        self._totals = {name: torch.tensor(total, dtype=torch.float64, device=device) for name, total in state.items()}


class RunLog:
    """The log of a run: ``log.csv`` and ``tensorboard/``.

    Parameters
    ----------
    folder
        Where the run is.
    last_step
        Rows after this step are cut: they belong to work that was lost, and the resumed run writes them again.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        self.path = folder / "log.csv"
        rows = [row for row in read_log(self.path) if int(row["step"]) <= last_step]
        # In the order of first appearance.
        self._columns = list(_FIRST_COLUMNS) + list(
            dict.fromkeys(
                name
                for row in rows
                for name, value in row.items()
                if value != "" and name not in _FIRST_COLUMNS + _LAST_COLUMNS
            )
        )
        self._rewrite(rows)
        self._file = self.path.open("a", encoding="utf-8", newline="")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add one row."""
        new = [name for name in values if name not in self._columns and name not in _LAST_COLUMNS]
        if new:
            self._file.close()
            rows = read_log(self.path)
            self._columns += new
            self._rewrite(rows)
            self._file = self.path.open("a", encoding="utf-8", newline="")
        row = {"step": step, "split": split, **values}
        csv.DictWriter(self._file, [*self._columns, *_LAST_COLUMNS], restval="", lineterminator="\n").writerow(row)
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{name}/{split}", value, step)

    def sync(self) -> None:
        """Flush to disk, so that a checkpoint never is ahead of the log."""
        os.fsync(self._file.fileno())
        self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._board.close()

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with atomic_path(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(
                file, [*self._columns, *_LAST_COLUMNS], restval="", extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)


def read_log(path: Path) -> list[dict[str, str]]:
    """Read ``log.csv``; a last row that was cut off by a kill is left out, a missing file has no rows."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))


class ProgressReport:
    """One bar on a terminal; elsewhere a line through ``logging`` every now and then.

    Parameters
    ----------
    is_on
        Show anything at all.
    every_seconds
        Time between two lines where there is no terminal.
    """

    def __init__(self, *, is_on: bool, every_seconds: float = 60.0) -> None:
        self._is_on = is_on
        self._every = every_seconds
        self._bar: Progress | None = None
        self._text: dict[str, str] = {}
        self._last_line = -float("inf")

    def start(self, step: int, max_steps: int) -> None:
        """Begin at a step."""
        self._max_steps = max_steps
        if self._is_on and sys.stderr.isatty():
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task("", total=max_steps, completed=step)
            self._bar.start()

    def update(self, step: int, **values: float) -> None:
        """Show the step and the newest values."""
        if not self._is_on:
            return
        self._text |= {name.replace("_", " "): f"{value:.4g}" for name, value in values.items()}
        text = ", ".join(f"{name} {value}" for name, value in self._text.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif time.monotonic() - self._last_line >= self._every and values:
            self._last_line = time.monotonic()
            log.info("step %d of %d: %s", step, self._max_steps, text)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
