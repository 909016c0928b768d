"""``scdiva embed IN OUT``."""

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
    parse_batch_size,
    progress_bar,
)


def embed(
    file: FileArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output, .h5ad or .zarr: a copy of FILE with the result.")],
    model: ModelOption = DEFAULT_MODEL,
    layer: LayerOption = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Cells at a time, or 'auto'.")] = "auto",
    denoise: Annotated[
        list[str] | None,
        typer.Option("--denoise", metavar="GENE", help="Also write denoised expression of this gene (repeatable)."),
    ] = None,
    key_added: Annotated[str, typer.Option("--key-added", help="Slot in .obsm.")] = "X_scdiva",
    library_size_key: LibrarySizeOption = None,
    min_coverage: CoverageOption = 0.5,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Embed the cells of FILE: OUT gets .obsm["X_scdiva"] and, in .uns["scdiva"], what was done."""
    size = parse_batch_size(batch_size)
    from scdiva.data.output import check_output
    from scdiva.data.source import open_source
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tl import embed_file

    check_output(out, overwrite=overwrite)
    n_cells = open_source(file).n_cells
    loaded = ScDiVa.from_pretrained(model, device=device)
    started = time.perf_counter()
    with progress_bar("embedding", n_cells) as on_block:
        result = embed_file(
            file,
            out,
            loaded,
            layer=layer,
            key_added=key_added,
            batch_size=size,
            denoise=denoise or (),
            min_coverage=min_coverage,
            library_size_key=library_size_key,
            overwrite=overwrite,
            on_block=on_block,
        )
    seconds = time.perf_counter() - started
    record = result.record
    typer.echo(
        f"{n_cells:,} cells embedded in {seconds:.1f} s by {record['model']}; counts from {record['counts_in']}; "
        f"{record['coverage']:.1%} of UMIs in the model's genes"
    )
    typer.echo(f'{out}: .obsm["{key_added}"] ({n_cells:,} x {result.z.shape[1]})')
    if result.denoised is not None:
        typer.echo(f'{" " * len(str(out))}  .layers["scdiva_denoised"] ({", ".join(record["denoised_genes"])})')
