"""``scdiva perturb CONTROL_CELLS OUT --model DIR --perturbation STAT1``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from scdiva.cli.common import DeviceOption, LayerOption, LibrarySizeOption, OverwriteOption


def perturb(
    control_cells: Annotated[Path, typer.Argument(metavar="CONTROL_CELLS", help="Raw counts of control cells.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help=".h5ad: a row of changes per perturbation and context.")],
    model: Annotated[
        str, typer.Option("--model", help="From scdiva finetune --objective perturbation: a bundle folder or Hub id.")
    ],
    perturbation: Annotated[
        list[str],
        typer.Option("--perturbation", help="A gene, also an unseen one; a drug of training; or A+B (repeatable)."),
    ],
    kind: Annotated[
        Literal["knockout", "activation", "treatment"] | None,
        typer.Option("--kind", help="What is done; that of training if left out."),
    ] = None,
    context_key: Annotated[
        str | None, typer.Option("--context-key", help=".obs column of cell types or lines, each predicted by itself.")
    ] = None,
    perturbation_key: Annotated[
        str | None, typer.Option("--perturbation-key", help=".obs column that tells control cells from others.")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option("--control", help="Name of control cells in it (repeatable); those of training if left out."),
    ] = None,
    library_size_key: LibrarySizeOption = None,
    layer: LayerOption = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Most changed genes that are named.")] = 20,
    cells: Annotated[
        Path | None, typer.Option("--cells", help=".h5ad for single perturbed cells (integer counts).")
    ] = None,
    n_cells: Annotated[
        int, typer.Option("-n", "--n-cells", min=0, help="Single cells of each perturbation and context.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the single cells.")] = 0,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Predict what perturbations do to control cells: mean changes with expected errors, and single cells."""
    import numpy as np

    from scdiva.models.scdiva.perturbation_model import PerturbationModel
    from scdiva.tl.perturbation import perturb_file

    found = perturb_file(
        control_cells,
        out,
        PerturbationModel.from_pretrained(model, device=device),
        perturbation,
        kind=kind,
        context_key=context_key,
        perturbation_key=perturbation_key,
        control=control,
        library_size_key=library_size_key,
        layer=layer,
        n_top=top,
        cells_out=cells,
        n_cells=n_cells,
        seed=seed,
        overwrite=overwrite,
    )
    for name, row in found.obs.iterrows():
        unknown = "" if np.isfinite(found[str(name)].layers["expected_error"]).any() else ", expected error unknown"
        about = f"{row['question']}, from {row['n_control_cells']} cells{unknown}"
        typer.echo(f"{name} ({about}): {row['top_genes']}")
    typer.echo(str(out))
    if cells is not None:
        typer.echo(str(cells))
