"""``scdiva grn IN OUT``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from scdiva.cli.common import (
    DEFAULT_MODEL,
    CoverageOption,
    DeviceOption,
    FileArgument,
    LayerOption,
    LibrarySizeOption,
    ModelOption,
    OverwriteOption,
    progress_bar,
)


def grn(
    file: FileArgument,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            help="Output: .h5ad or .zarr (a copy of FILE with the result), .tsv or .csv (edges), .gmt (regulons).",
        ),
    ],
    tf: Annotated[
        list[str] | None,
        typer.Option("--tf", metavar="GENE", help="Regulator (repeatable); human transcription factors if left out."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method", help="response, knockout, knockout_value, attention, rollout, embedding or gene_embedding."
        ),
    ] = "response",
    group_key: Annotated[
        str | None, typer.Option("--group-key", help=".obs column: a network for each group of cells.")
    ] = None,
    n_top: Annotated[int, typer.Option("--n-top", help="Targets of each regulator that are kept.")] = 50,
    min_cells: Annotated[int, typer.Option("--min-cells", help="Fewest cells that express a gene, or a pair.")] = 20,
    max_cells: Annotated[
        int | None, typer.Option("--max-cells", help="Cells that are read: of a group, or of each knocked-out gene.")
    ] = None,
    varp: Annotated[bool, typer.Option("--varp", help="Also write the kept edges as .varp (.h5ad or .zarr).")] = False,
    model: ModelOption = DEFAULT_MODEL,
    layer: LayerOption = None,
    key_added: Annotated[str, typer.Option("--key-added", help="Slot in .uns and .varp.")] = "scdiva_grn",
    library_size_key: LibrarySizeOption = None,
    min_coverage: CoverageOption = 0.5,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Infer which genes regulate which, as the model sees it: OUT gets .uns["scdiva_grn"]["edges"]."""
    from scdiva.data.source import open_source
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks.grn import METHODS
    from scdiva.tl.networks import GrnOptions, check_grn_output, grn_file

    check_grn_output(out, overwrite=overwrite, varp=varp)
    n_cells = open_source(file).n_cells
    loaded = ScDiVa.from_pretrained(model, device=device)
    started = time.perf_counter()
    with progress_bar("reading cells", n_cells) as on_cells:
        found = grn_file(
            file,
            out,
            loaded,
            method=method,
            regulators=tf or None,
            group_key=group_key,
            layer=layer,
            key_added=key_added,
            n_top=n_top,
            varp=varp,
            options=GrnOptions(min_cells=min_cells, max_cells=max_cells),
            min_coverage=min_coverage,
            library_size_key=library_size_key,
            overwrite=overwrite,
            on_cells=on_cells,
        )
    typer.echo(f"{method} by {found.record['model']} in {time.perf_counter() - started:.0f} s")
    for network in found.networks:
        name = f"{network.group}: " if network.group else ""
        typer.echo(
            f"{name}{network.regulators.size:,} regulators, {network.targets.size:,} targets, from "
            f"{network.n_cells:,} cells"
        )
    kind = METHODS[method]
    semantics = ("directed" if kind.is_directed else "undirected", "signed" if kind.is_signed else "without signs")
    typer.echo(f"{', '.join(semantics)}; score: {found.networks[0].normalisation}")
    slot = "" if out.suffix in (".tsv", ".csv", ".gmt") else f': .uns["{key_added}"]["edges"]'
    typer.echo(f"{out}{slot} ({len(found.edges):,} edges)")
