"""``scdiva augment FILE OUT``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scdiva.cli.common import DeviceOption, FileArgument, LayerOption, OverwriteOption

if TYPE_CHECKING:
    from scdiva.tasks.augment import Target


def augment(
    file: FileArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output, .h5ad or .zarr: real and generated cells.")],
    labels_key: Annotated[str, typer.Option("--labels-key", help="Column of .obs with the types.")],
    target: Annotated[
        list[str],
        typer.Option(
            "--target",
            metavar="N|max|median|TYPE=N",
            help="Cells that each type is to have; TYPE=N for one type, repeatable.",
        ),
    ],
    model: Annotated[
        str | None, typer.Option("--model", help="Bundle folder of a latent diffusion; if left out one is fitted.")
    ] = None,
    weight: Annotated[float, typer.Option("--weight", help="Guidance weight of the type; 1 is plain.")] = 1.0,
    keep_model: Annotated[
        Path | None, typer.Option("--keep-model", metavar="DIR", help="Folder for the model that is fitted here.")
    ] = None,
    layer: LayerOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal cells.")] = 0,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Fill up rare types of FILE with generated cells, marked as such."""
    from scdiva.data.output import check_output
    from scdiva.models.scdiffusion import ScDiffusion
    from scdiva.tasks.augment import augment as run
    from scdiva.tasks.generate import write_adata

    wanted = _target(target)
    check_output(out, overwrite=overwrite)
    cells = run(
        file,
        labels_key,
        target=wanted,
        model=None if model is None else ScDiffusion.from_pretrained(model, device=device),
        weight=weight,
        layer=layer,
        out_dir=keep_model,
        seed=seed,
        device=device,
    )
    write_adata(out, cells)
    record = cells.uns["scdiva"]["augment"]
    for name, n_real, n in zip(record["types"], record["n_real"], record["n_generated"], strict=True):
        if n:
            typer.echo(f"{name}: {n_real:,} real and {n:,} generated cells")
    for note in record["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(f'{out}: {cells.n_obs:,} cells, {cells.n_vars:,} genes; .obs["scdiva_synthetic"] tells which are which')


def _target(texts: list[str]) -> Target:
    from scdiva.errors import ConfigError

    def number(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise ConfigError(
                f"--target {text}", expected="N, max, median or TYPE=N", fix="for example --target 200"
            ) from None

    if len(texts) == 1 and "=" not in texts[0]:
        if texts[0] == "max":
            return "max"
        return "median" if texts[0] == "median" else number(texts[0])
    pairs = [text.rpartition("=") for text in texts]
    if any(not name for name, _, _ in pairs) or len({name for name, _, _ in pairs}) < len(pairs):
        raise ConfigError(
            f"--target {' --target '.join(texts)}",
            expected="one of N, max and median, or TYPE=N once for each type",
            fix="for example --target NK=200 --target DC=200",
        )
    return {name.strip(): number(n) for name, _, n in pairs}
