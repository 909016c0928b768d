"""``scdiva reconstruct FILE OUT``."""

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


def reconstruct(
    file: FileArgument,
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help=".json or .md: the table; .h5ad or .zarr: a copy of FILE with the result."),
    ],
    model: ModelOption = DEFAULT_MODEL,
    mask_ratio: Annotated[
        list[float] | None,
        typer.Option("--mask-ratio", help="Share of hidden tokens (repeatable); 0.15 to 1 if left out."),
    ] = None,
    n_cells: Annotated[
        int | None, typer.Option("--cells", min=1, help="Judge a random choice of this many cells; all if left out.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of masks and of the choice of cells.")] = 0,
    reference: Annotated[
        Path | None,
        typer.Option("--reference", help="Cells that the simple guesses know; the file's other cells if left out."),
    ] = None,
    labels_key: Annotated[
        str | None, typer.Option("--labels-key", help=".obs column: one more guess, which is told the label.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, help="Length that sequences are cut to.")] = 1200,
    layer_ratio: Annotated[
        float | None, typer.Option("--layer-at", help="Write the cells as reconstructed at this share as a layer.")
    ] = None,
    layer: LayerOption = None,
    key_added: Annotated[
        str, typer.Option("--key-added", help="Name of the record, and of the layer.")
    ] = "scdiva_reconstructed",
    batch_size: Annotated[str, typer.Option("--batch-size", help="Cells at a time, or 'auto'.")] = "auto",
    library_size_key: LibrarySizeOption = None,
    min_coverage: CoverageOption = 0.5,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Hide part of every cell of FILE and compare what a model and simple guesses make of it with the truth."""
    size = parse_batch_size(batch_size)
    from scdiva.data.source import open_source
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks.reconstruct import MASK_RATIOS
    from scdiva.tl import reconstruct_file

    n_in_file = open_source(file).n_cells
    loaded = ScDiVa.from_pretrained(model, device=device)
    started = time.perf_counter()
    with progress_bar("reconstructing", min(n_cells or n_in_file, n_in_file)) as on_block:
        result = reconstruct_file(
            file,
            out,
            loaded,
            mask_ratios=mask_ratio or MASK_RATIOS,
            seed=seed,
            n_cells=n_cells,
            reference=reference,
            labels_key=labels_key,
            max_tokens=max_tokens,
            layer_ratio=layer_ratio,
            layer=layer,
            key_added=key_added,
            batch_size=size,
            min_coverage=min_coverage,
            library_size_key=library_size_key,
            overwrite=overwrite,
            on_block=on_block,
        )
    typer.echo(result.to_markdown())
    record = result.record
    if record["lat_saw_answer"]:
        typer.echo("Rows marked **yes** were given a summary of the very tokens that were hidden.")
    typer.echo(f"{record['n_cells']:,} cells in {time.perf_counter() - started:.1f} s; {out} written")
