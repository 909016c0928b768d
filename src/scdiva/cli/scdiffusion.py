"""``scdiva scdiffusion fit FILE --out DIR`` and ``scdiva scdiffusion add-condition FILE --model DIR --out DIR``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scdiva.cli.common import DeviceOption, FileArgument, LayerOption

if TYPE_CHECKING:
    from scdiva.tasks.scdiffusion import FittedScDiffusion

_OUT_HELP = "Folder of the run; the model goes to its 'bundle'."
_MIN_CELLS_HELP = "Cells that each label needs."
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PART.KEY=VALUE",
        help="Setting of a loop, such as denoiser.training.max_steps=2000; repeatable.",
    ),
]


def fit(
    file: FileArgument,
    out: Annotated[Path, typer.Option("--out", help=_OUT_HELP)],
    condition: Annotated[
        list[str] | None,
        typer.Option(
            "--condition", help="Column of .obs that cells can be asked for by, such as cell_type; repeatable."
        ),
    ] = None,
    no_classifiers: Annotated[
        bool, typer.Option("--no-classifiers", help="Leave out the classifiers for classifier guidance.")
    ] = False,
    min_cells: Annotated[int, typer.Option("--min-cells", min=1, help=_MIN_CELLS_HELP)] = 20,
    layer: LayerOption = None,
    name: Annotated[str, typer.Option("--name", help="Name of the model.")] = "",
    preset: Annotated[
        Literal["native", "parity"], typer.Option("--preset", help="Our networks, or those of the publication.")
    ] = "native",
    n_latent: Annotated[
        int | None,
        typer.Option("--n-latent", min=2, help="Dimensions of z; usually 32, of parity 128, of a codec its own."),
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            "--codec",
            metavar="MODEL",
            help="Native scDiVa model (bundled name or bundle folder) whose z is drawn; no autoencoder is trained.",
        ),
    ] = None,
    scimilarity: Annotated[
        Path | None,
        typer.Option("--scimilarity", metavar="DIR", help="SCimilarity model to start the parity autoencoder at."),
    ] = None,
    settings: SettingsOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Fit a latent diffusion to the raw counts of FILE. The same command again resumes."""
    if codec is not None and n_latent is not None:
        raise typer.BadParameter("z of --codec has its own dimensions", param_hint="--n-latent")
    from scdiva.models.scdiffusion import PRESETS
    from scdiva.tasks.scdiffusion import fit_scdiffusion

    config = PRESETS[preset]
    _tell(
        fit_scdiffusion(
            file,
            condition or (),
            out,
            codec=codec,
            config=config if n_latent is None else config.model_copy(update={"n_latent": n_latent}),
            settings=settings or (),
            with_classifiers=not no_classifiers,
            scimilarity=scimilarity,
            min_cells=min_cells,
            layer=layer,
            name=name,
            seed=seed,
            device=device,
        )
    )


def add(
    file: FileArgument,
    model: Annotated[str, typer.Option("--model", help="Bundle folder of a latent diffusion.")],
    condition: Annotated[str, typer.Option("--condition", help="Column of .obs to add as a condition.")],
    out: Annotated[Path, typer.Option("--out", help=_OUT_HELP)],
    min_cells: Annotated[int, typer.Option("--min-cells", min=1, help=_MIN_CELLS_HELP)] = 20,
    layer: LayerOption = None,
    settings: SettingsOption = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Add a condition to a model by a classifier of noised z; autoencoder and denoiser stay as they are."""
    from scdiva.models.scdiffusion import ScDiffusion
    from scdiva.tasks.scdiffusion import add_classifier

    loaded = ScDiffusion.from_pretrained(model, device="cpu")
    _tell(
        add_classifier(
            loaded,
            file,
            condition,
            out,
            settings=settings or (),
            layer=layer,
            min_cells=min_cells,
            seed=seed,
            device=device,
        )
    )


def _tell(fitted: FittedScDiffusion) -> None:
    start = fitted.model.details.get("scimilarity")
    if start is not None:
        typer.echo(
            f"SCimilarity: {len(start['loaded'])} tensors taken over, {len(start['skipped'])} not; "
            f"{start['n_genes_loaded']:,} of {start['n_genes']:,} genes"
        )
        for name, reason in start["skipped"].items():
            typer.echo(f"not taken over: {name} ({reason})")
    for part, seconds in fitted.seconds.items():
        value = fitted.metrics.get(f"heldout_{part}_loss")
        typer.echo(f"{part}: {seconds:.0f} s" + ("" if value is None else f", held-out loss {value:.4f}"))
    typer.echo(
        f"model: {fitted.path} ({fitted.model.n_parameters:,} parameters, {fitted.model.vocabulary.n_genes:,} genes)"
    )
    if fitted.model.codec is not None:
        of_codec, (source,) = fitted.model.details["codec"], fitted.model.details["training"]["sources"]
        typer.echo(
            f"codec: {of_codec['model']}, z of {fitted.model.n_latent} dimensions; {1 - source['coverage']:.2%} of the "
            "UMIs are in genes that it does not know, and are left out"
        )
    fields = fitted.model.labels.fields
    words = ["scdiva", "generate", "OUT.h5ad", "--model", str(fitted.path)]
    if fields:
        words += ["--condition", f"{fields[-1]}={fitted.model.labels.labels(fields[-1])[0]}"]
    typer.echo(f"next:  {shlex.join([*words, '-n', '500'])}")
