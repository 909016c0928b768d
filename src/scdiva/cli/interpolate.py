"""``scdiva interpolate FILE OUT``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from scdiva.cli.common import DeviceOption, FileArgument, LayerOption, OverwriteOption


def interpolate(
    file: FileArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output, .h5ad or .zarr: the cells of the path.")],
    model: Annotated[str, typer.Option("--model", help="Bundle folder of a latent diffusion.")],
    source: Annotated[str, typer.Option("--source", help="Label where the path begins; FILE holds cells of it.")],
    target: Annotated[str, typer.Option("--target", help="Label where it ends.")],
    steps: Annotated[int, typer.Option("--steps", min=2, help="Positions, both ends included.")] = 11,
    method: Annotated[
        Literal["gradient", "slerp", "linear"],
        typer.Option(
            "--method",
            help="gradient: a classifier pulls noised source cells towards both labels. slerp: between noised source "
            "and target cells. linear: mixed molecules of source and target cells, the baseline.",
        ),
    ] = "gradient",
    field: Annotated[
        str | None, typer.Option("--field", help="Column of both labels; the model's field that has them if left out.")
    ] = None,
    n_cells: Annotated[int, typer.Option("-n", "--n-cells", min=1, help="Paths: cells at each position.")] = 100,
    start_time: Annotated[
        float | None,
        typer.Option(
            "--start-time", help="How far cells are noised, up to 1; 0.9 (parity: 0.6) for gradient, 0.5 for slerp."
        ),
    ] = None,
    strength: Annotated[
        float | None, typer.Option("--strength", help="gradient: sum of the two weights; 4 if left out.")
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights",
            metavar="SOURCE:TARGET",
            help="gradient: weights at one position, in the place of --strength; repeat for every position.",
        ),
    ] = None,
    from_noise: Annotated[
        bool, typer.Option("--from-noise", help="gradient: start from noise, with the UMIs of the source cells.")
    ] = False,
    sampler: Annotated[
        Literal["dpm", "ddim", "ddpm"] | None,
        typer.Option("--sampler", help="DPM-Solver++ (default), DDIM, or DDPM (default of parity)."),
    ] = None,
    layer: LayerOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal cells.")] = 0,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Make cells on the way from one label to another, from the real cells of FILE."""
    from scdiva.data.output import check_output
    from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
    from scdiva.tasks.generate import write_adata
    from scdiva.tl import interpolate as run

    pairs = None if weights is None else [_pair(text) for text in weights]
    check_output(out, overwrite=overwrite)
    cells = run(
        ScDiffusion.from_pretrained(model, device=device),
        file,
        source=source,
        target=target,
        steps=steps,
        method=method,
        field=field,
        n_cells=n_cells,
        start_time=start_time,
        strength=strength,
        weights=pairs,
        from_noise=from_noise,
        sampler=None if sampler is None else LatentSampler(sampler),
        layer=layer,
        seed=seed,
    )
    write_adata(out, cells)
    typer.echo(f"{steps} positions of {n_cells:,} cells from {source} to {target}, {method}")
    typer.echo(f'{out}: X is int32 counts; .obs["scdiva_position"] from 0 to 1, .obs["scdiva_path"] which path')


def _pair(text: str) -> tuple[float, float]:
    from scdiva.errors import ConfigError

    try:
        of_source, of_target = (float(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(
            f"--weights {text}", expected="SOURCE:TARGET, two numbers", fix="for example --weights 1.5:0.5"
        ) from None
    return of_source, of_target
