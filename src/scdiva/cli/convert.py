"""``scdiva convert PATH OUT --vocabulary FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scdiva.cli.common import OverwriteOption


def convert(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Published weights: .safetensors, .pt or .bin.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of the new bundle.")],
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            "--vocabulary", metavar="FILE", help="Required. Genes in row order, one a line: Ensembl id, symbol or both."
        ),
    ] = None,
    trunk_only: Annotated[
        bool, typer.Option("--trunk-only", help="Take what a fine-tuned file shares with the published model.")
    ] = False,
    statistics: Annotated[
        str | None,
        typer.Option("--statistics", metavar="BUNDLE", help="Bundle whose gene statistics order the tokens."),
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the model.")] = "",
    overwrite: OverwriteOption = False,
) -> None:
    """Turn published scDiVa weights into a bundle; strict: no tensor is guessed or dropped without a word."""
    from scdiva.models.scdiva.convert import convert as convert_file

    done = convert_file(
        path,
        out,
        vocabulary=vocabulary,
        trunk_only=trunk_only,
        statistics=statistics,
        name=name,
        overwrite=overwrite,
    )
    typer.echo(f"{out}: {done.architecture} model, {done.n_parameters:,} parameters, {done.n_genes:,} genes")
    if done.prefix:
        typer.echo(f"stripped from every tensor name: {done.prefix}")
    if done.ignored:
        typer.echo(f"{len(done.ignored)} tensors of the file left behind:")
        for tensor in done.ignored:
            typer.echo(f"  {tensor}")
    if done.untrained_heads:
        typer.echo(f"untrained heads, which raise when used: {', '.join(done.untrained_heads)}")
    if done.unknown_ids:
        typer.echo(f"{len(done.unknown_ids)} Ensembl ids are not current ones; kept as they are")
    typer.echo(f"gene statistics: {done.statistics}")
