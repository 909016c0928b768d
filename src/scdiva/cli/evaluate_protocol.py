"""``scdiva evaluate generation-protocol DIR``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate_protocol(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The --out of scdiva evaluate generation, with the cells it kept.")
    ],
    labels_key: Annotated[str, typer.Option("--labels-key", help=".obs column with the cell types.")] = "cell_type",
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", help="Measure only the cells of this generator (repeatable); all that were kept."),
    ] = None,
    n_trees: Annotated[int, typer.Option("--trees", min=1, help="Trees of the random forest.")] = 1000,
) -> None:
    """Measure kept cells as scDiffusion's authors do, beside trivial samplers; writes protocol.md, resumes."""
    from scdiva.tasks import generation_protocol as task
    from scdiva.tasks.generation_report import MethodRun

    def tell(run: MethodRun) -> None:
        parts = [f"{key} {run.scores[task.HELDOUT, key].value:.3f}" for key in task.METRICS]
        called = run.scores["pooled", task.CELLTYPIST].value
        typer.echo(f"{run.method}, seed {run.seed}: {', '.join(parts)}, celltypist {called:.3f} (held-out cells)")

    report = task.evaluate_protocol(
        folder / "cells",
        labels_key=labels_key,
        methods=methods,
        rows_path=folder / "protocol.jsonl",
        n_trees=n_trees,
        on_row=tell,
    )
    typer.echo(str(report.write(folder)))
