"""``scdiva check FILE``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from scdiva.cli.common import DEFAULT_MODEL, CoverageOption, FileArgument, LayerOption, LibrarySizeOption


def check(
    file: FileArgument,
    layer: LayerOption = None,
    library_size_key: LibrarySizeOption = None,
    min_coverage: CoverageOption = 0.5,
    model: Annotated[
        str, typer.Option("--model", help="Judge by this model's genes; 'none': by the full vocabulary.")
    ] = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Tell what is in FILE: counts or not, genes matched, share of UMIs covered, and whether it can be used."""
    from scdiva.pp import check as run

    known = None
    if model != "none":
        from scdiva.models.bundle import find_bundle, read_bundle

        known = read_bundle(find_bundle(model))
    report = run(file, known, layer=layer, library_size_key=library_size_key, min_coverage=min_coverage)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    if not report.is_usable:
        raise typer.Exit(2)
