"""``scdiva impute IN OUT``."""

from __future__ import annotations

import time
from enum import StrEnum
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
from scdiva.errors import GeneError

_N_SHOWN = 6


class _OwnCounts(StrEnum):
    used = "used"
    hidden = "hidden"


class _Unit(StrEnum):
    log1p_cp10k = "log1p_cp10k"
    counts = "counts"


def impute(
    file: FileArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output, .h5ad or .zarr: a copy of FILE with the result.")],
    gene: Annotated[
        list[str] | None,
        typer.Option("--gene", metavar="GENE", help="Symbol or Ensembl id (repeatable); FILE need not measure it."),
    ] = None,
    genes_file: Annotated[Path | None, typer.Option("--genes-file", help="Text file with one gene per line.")] = None,
    all_genes: Annotated[bool, typer.Option("--all", help="All genes of the model that FILE measures.")] = False,
    model: ModelOption = DEFAULT_MODEL,
    own_counts: Annotated[
        _OwnCounts,
        typer.Option(
            "--own-counts", help="Whether a gene's own count in a cell counts as evidence, or is not looked at."
        ),
    ] = _OwnCounts.used,
    unit: Annotated[
        _Unit, typer.Option("--unit", help="log1p of expected CP10K, or expected counts at the cell's own depth.")
    ] = _Unit.log1p_cp10k,
    n_samples: Annotated[
        int, typer.Option("--samples", help="Half-samples of each cell, for spread and quantiles; 0: neither.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the samples.")] = 0,
    layer: LayerOption = None,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Cells at a time, or 'auto'.")] = "auto",
    key_added: Annotated[str, typer.Option("--key-added", help="Name of the slots.")] = "scdiva_imputed",
    library_size_key: LibrarySizeOption = None,
    min_coverage: CoverageOption = 0.5,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Impute genes in the cells of FILE: OUT gets a layer (measured genes) and .obsm (genes that FILE lacks)."""
    size = parse_batch_size(batch_size)
    from scdiva.data.output import check_output
    from scdiva.data.source import open_source
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks.impute import read_gene_list
    from scdiva.tl import impute_file

    check_output(out, overwrite=overwrite)
    genes = [*(gene or ()), *(read_gene_list(genes_file) if genes_file else ())]
    if bool(genes) == all_genes:
        raise GeneError(
            "genes are named, and all are asked for" if all_genes else "no genes to impute",
            expected="--gene (repeatable) and --genes-file, or --all",
            fix="for example --gene CD3E --gene MS4A1",
        )
    n_cells = open_source(file).n_cells
    loaded = ScDiVa.from_pretrained(model, device=device)
    started = time.perf_counter()
    with progress_bar("imputing", n_cells) as on_block:
        result = impute_file(
            file,
            out,
            loaded,
            None if all_genes else genes,
            own_counts=own_counts.value,
            unit=unit.value,
            n_samples=n_samples,
            seed=seed,
            layer=layer,
            key_added=key_added,
            batch_size=size,
            min_coverage=min_coverage,
            library_size_key=library_size_key,
            overwrite=overwrite,
            on_block=on_block,
        )
    seconds = time.perf_counter() - started
    record = result.record
    n_unmeasured = len(result.unmeasured_names)
    typer.echo(
        f"{record['n_genes']:,} genes imputed in {n_cells:,} cells in {seconds:.1f} s by {record['model']}; own counts "
        f"{record['own_counts']}; {record['unit']}"
    )
    endings = ", ".join(f"{ending}" for ending in (result.measured or result.unmeasured) if ending)
    more = f", and the same with {endings}" if endings else ""
    lines = []
    if result.measured:
        lines.append(f'.layers["{key_added}"] ({record["n_genes"] - n_unmeasured:,} measured genes){more}')
    if result.unmeasured:
        shown = ", ".join(result.unmeasured_names[:_N_SHOWN]) + (", ..." if n_unmeasured > _N_SHOWN else "")
        lines.append(f'.obsm["{key_added}_unmeasured"] (not measured: {shown}){more}')
    for i, line in enumerate(lines):
        typer.echo(f"{out}: {line}" if i == 0 else f"{' ' * len(str(out))}  {line}")
