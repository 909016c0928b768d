"""``scdiva interpolate OUT``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from scdiva.cli.common import DeviceOption, OverwriteOption


def interpolate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output, .h5ad or .zarr: the cells of the path.")],
    model: Annotated[str, typer.Option("--model", help="Bundle folder of a latent diffusion.")],
    source: Annotated[str, typer.Option("--source", help="Label where the path begins.")],
    target: Annotated[str, typer.Option("--target", help="Label where it ends.")],
    file: Annotated[
        Path | None,
        typer.Option("--like", metavar="FILE", help="Start from the cells of the source in FILE; else from noise."),
    ] = None,
    field: Annotated[
        str | None, typer.Option("--field", help="Condition field of both; the first with a classifier if left out.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Positions, both ends included.")] = 11,
    n_cells: Annotated[int, typer.Option("-n", "--n-cells", min=1, help="Cells at each position.")] = 100,
    start_time: Annotated[float, typer.Option("--start-time", help="How far cells of FILE are noised, up to 1.")] = 0.8,
    strength: Annotated[float, typer.Option("--strength", help="Scale of the guidance.")] = 2.0,
    method: Annotated[
        Literal["dpm", "ddim", "ddpm"], typer.Option("--sampler", help="DPM-Solver++, DDIM or DDPM.")
    ] = "dpm",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal cells.")] = 0,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Generate cells on the way from one label to another (gradient interpolation)."""
    from scdiva.data.output import check_output
    from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
    from scdiva.tasks.generate import write_adata
    from scdiva.tl import interpolate as run

    check_output(out, overwrite=overwrite)
    cells = run(
        ScDiffusion.from_pretrained(model, device=device),
        file,
        source=source,
        target=target,
        field=field,
        steps=steps,
        n_cells=n_cells,
        start_time=start_time,
        strength=strength,
        sampler=LatentSampler(method),
        seed=seed,
    )
    write_adata(out, cells)
    typer.echo(f"{steps} positions of {n_cells:,} cells from {source} to {target}")
    typer.echo(f'{out}: X is int32 counts; .obs["scdiva_position"] from 0 to 1; z in .obsm["X_scdiffusion"]')
