"""``scdiva integrate IN OUT``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from scdiva.cli.common import DEFAULT_MODEL, DeviceOption, FileArgument, LayerOption, ModelOption, OverwriteOption


def integrate(
    file: FileArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output, .h5ad or .zarr: a copy of FILE with the result.")],
    batch_key: Annotated[str, typer.Option("--batch-key", help="Column of .obs with the batch of every cell.")],
    label_key: Annotated[
        str | None,
        typer.Option("--label-key", help="Column of .obs with cell types, if the embedding may be trained on them."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    layer: LayerOption = None,
    key_added: Annotated[str, typer.Option("--key-added", help="Slot in .obsm.")] = "X_scdiva_integrated",
    save: Annotated[
        Path | None,
        typer.Option("--save", help="Folder for the run and the model (in its 'bundle'), which maps further cells."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="The paper's protocol: whole encoder, batch adversary, SupCon (labels).")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of views, partners and training.")] = 0,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Take the batches out of an embedding of FILE: OUT gets .obsm["X_scdiva_integrated"]."""
    from scdiva.config import IntegrationConfig
    from scdiva.data.output import check_output
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tl.integration import BUNDLE, integrate_file

    if published and label_key is None:
        raise typer.BadParameter("--published is a supervised loss, and needs --label-key")
    check_output(out, overwrite=overwrite)
    loaded = ScDiVa.from_pretrained(model, device=device)
    started = time.perf_counter()
    found = integrate_file(
        file,
        out,
        loaded,
        batch_key,
        label_key=label_key,
        layer=layer,
        key_added=key_added,
        config=IntegrationConfig.published() if published else None,
        save=save,
        seed=seed,
        overwrite=overwrite,
    )
    record = found.record
    if record["confounding"]:
        typer.echo(record["confounding"])
    how = "with labels" if record["supervised"] else "without labels"
    left_out = record["n_genes_dropped"]
    typer.echo(
        f"{found.z.shape[0]:,} cells of {record['n_batches']} batches integrated {how} in "
        f"{time.perf_counter() - started:.0f} s, over {record['n_genes']:,} genes"
        + (f" ({left_out:,} that not all batches measure left out)" if left_out else "")
    )
    if record["trained"] == "whole encoder":
        typer.echo(
            f"trained: the whole encoder of {record['base_model']}, which reads {record['max_tokens']} genes a cell"
        )
    else:
        typer.echo(
            f"{record['n_pairs_across_batches']:,} mutual nearest neighbours tie batches together; "
            f"{record['share_of_cells_with_such_a_pair']:.0%} of the cells have one"
        )
    if record["supervised"]:
        typer.echo("the embedding has seen the labels: scores by these labels are those of a supervised method")
    typer.echo(f'{out}: .obsm["{key_added}"] ({found.z.shape[0]:,} x {found.z.shape[1]})')
    if save is not None:
        typer.echo(f"further cells: scdiva embed MORE.h5ad OUT.h5ad --model {save / BUNDLE}")
