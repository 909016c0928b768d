"""``scdiva evaluate grn FILE...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scdiva.cli.common import DEFAULT_MODEL, DeviceOption, ModelOption


def evaluate_grn(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Files of raw counts, taken as one set of cells.")
    ],
    truth: Annotated[
        list[Path],
        typer.Option(
            "--truth", help="Table of known regulation: source, target, and sign, weight or mode (repeatable)."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for report and rows; resumes from it.")],
    model: ModelOption = DEFAULT_MODEL,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", help="Run this method (repeatable); with '_shuffled' at its end, on shuffled cells."),
    ] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds of what is drawn at random.")] = 3,
    min_share: Annotated[
        float,
        typer.Option("--min-share", min=0.0, max=1.0, help="Share of cells that expressed genes are detected in."),
    ] = 0.02,
    min_targets: Annotated[
        int, typer.Option("--min-targets", min=1, help="Fewest known targets of a candidate regulator.")
    ] = 10,
    n_sampled: Annotated[
        int, typer.Option("--sampled-targets", min=2, help="Targets on which regressions are compared.")
    ] = 300,
    max_cells: Annotated[
        int, typer.Option("--max-cells", min=1, help="Most cells that the model reads (knock-outs: of each regulator).")
    ] = 500,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Most genes of a cell that the model's trunk reads.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Judge gene networks by known regulation, beside co-expression, regressions and nulls."""
    from scdiva.data.known_network import read_truth
    from scdiva.errors import OutputError
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks import evaluate_grn as task
    from scdiva.tasks.grn import GrnOptions

    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", expected="a folder", fix="name another one with --out")
    loaded = ScDiVa.from_pretrained(model, device=device)
    truths = [read_truth(path, loaded.vocabulary) for path in truth]
    for known in truths:
        typer.echo(str(known))
    data = task.NetworkCells.open(files, loaded, min_share=min_share)
    networks, titles, fingerprint = task.model_networks(loaded, GrnOptions(max_cells=max_cells, max_tokens=max_tokens))
    out.mkdir(parents=True, exist_ok=True)
    report = task.evaluate_grn(
        data,
        truths,
        methods=methods or (*task.DEFAULT_METHODS, "response", "response_shuffled"),
        networks=networks,
        titles=titles,
        fingerprint=fingerprint,
        seeds=tuple(range(seeds)),
        min_targets=min_targets,
        n_sampled=n_sampled,
        rows_path=out / "rows.jsonl",
        on_row=lambda run: typer.echo(str(run)),
    )
    for path in report.write(out):
        typer.echo(str(path))
