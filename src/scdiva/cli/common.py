"""Options and small helpers that several commands share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

DEFAULT_MODEL = "scdiva-blood-tiny"

FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help=".h5ad, .zarr, 10x .h5 or 10x mtx folder.")]
ModelOption = Annotated[
    str, typer.Option("--model", help="Bundled name, bundle folder, or Hugging Face Hub id owner/name.")
]
LayerOption = Annotated[
    str | None,
    typer.Option("--layer", help="Layer with the raw counts ('raw' for .raw); found by itself if left out."),
]
CoverageOption = Annotated[
    float, typer.Option("--min-coverage", min=0.0, max=1.0, help="Smallest share of UMIs the model's genes must cover.")
]
LibrarySizeOption = Annotated[
    str | None,
    typer.Option("--library-size-key", help=".obs column with each cell's total UMIs (for gene panels)."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


def parse_batch_size(text: str) -> int | Literal["auto"]:
    """Read "auto" or a positive number."""
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither 'auto' nor a positive number")
    return int(text)


@contextmanager
def progress_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, and nothing elsewhere; gives a function that takes the number done."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=total)
        yield lambda done: progress.update(task, completed=done)
