"""``scdiva generate OUT``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scdiva.cli.common import DeviceOption, OverwriteOption, parse_batch_size, progress_bar

if TYPE_CHECKING:
    from scdiva.models.scdiva import ScDiVa


def generate(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output, .h5ad or .zarr: the generated cells.")],
    model: Annotated[
        str, typer.Option("--model", help="Bundled name, bundle folder, or Hugging Face Hub id owner/name.")
    ] = "scdiva-blood-tiny-celltype",
    n_cells: Annotated[int, typer.Option("-n", "--n-cells", min=1, help="Cells; with --each, cells per label.")] = 500,
    condition: Annotated[
        list[str] | None,
        typer.Option(
            "--condition",
            metavar="FIELD=LABEL[:WEIGHT]",
            help='What the cells are, for example cell_type="B cell"; repeatable. A weight above 1 makes them more '
            "typical. scdiva inspect lists fields and labels.",
        ),
    ] = None,
    each: Annotated[
        str | None, typer.Option("--each", metavar="FIELD", help="Generate -n cells for each label of this field.")
    ] = None,
    latent: Annotated[
        Literal["prior", "visible", "null"] | None,
        typer.Option(
            "--latent", help="Where z comes from: a mixture of the condition (default), the genes so far, a constant."
        ),
    ] = None,
    like: Annotated[
        Path | None, typer.Option("--like", metavar="FILE", help="Generate variations of the cells of this file.")
    ] = None,
    n_genes: Annotated[
        int | None, typer.Option("--n-genes", min=1, help="Genes per cell; else as in training.")
    ] = None,
    n_umis: Annotated[int | None, typer.Option("--n-umis", min=1, help="UMIs per cell, told to the network.")] = None,
    strategy: Annotated[
        Literal["random", "confidence", "ancestral", "first-hitting"] | None,
        typer.Option("--strategy", help="Which genes appear first (default random); first-hitting is exact and slow."),
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Network calls per cell.")] = None,
    grid: Annotated[
        Literal["cosine", "uniform"] | None, typer.Option("--grid", help="Times of the steps (default cosine).")
    ] = None,
    gibbs_rounds: Annotated[
        int | None, typer.Option("--gibbs-rounds", min=0, help="Rounds of redrawing at the end (default 0).")
    ] = None,
    method: Annotated[
        Literal["dpm", "ddim", "ddpm"] | None,
        typer.Option(
            "--sampler",
            help="Of an scDiffusion model: DPM-Solver++ (default), DDIM, or DDPM (default of parity, 1,000 steps).",
        ),
    ] = None,
    guidance: Annotated[
        list[str] | None,
        typer.Option(
            "--guidance",
            metavar="FIELD=SCALE",
            help="Of an scDiffusion model: classifier guidance towards the wanted label; repeatable.",
        ),
    ] = None,
    decoder: Annotated[
        Literal["profile", "masked"] | None,
        typer.Option(
            "--decoder",
            help="Of an scDiffusion model on the z of a scDiVa model: counts by its profile decoder (default) or its "
            "masked diffusion.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Equal seeds give equal cells.")] = 0,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Cells between two signs of progress.")] = "auto",
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Generate cells: integer counts of named genes under stated conditions.

    The same command again resumes; cells of an scDiffusion model, which are drawn in seconds, begin anew.
    """
    size = parse_batch_size(batch_size)
    from scdiva.data.output import check_output
    from scdiva.diffusion.samplers import Sampler
    from scdiva.errors import ConfigError
    from scdiva.models.base import load_model
    from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
    from scdiva.tasks.latent_generation import refuse_foreign_options
    from scdiva.tl import generate_file

    check_output(out, overwrite=overwrite)
    loaded: ScDiVa | ScDiffusion = load_model(model, device=device)
    if loaded.family == "scdiva-perturbation":
        raise ConfigError(
            f"{model} is a model of perturbations", expected="one that generates under conditions",
            fix="draw perturbed cells by scdiva perturb --cells",
        )  # fmt: skip
    wanted, weights = _parse(condition or [], loaded.labels.fields)
    table = None
    if each is not None:
        import pandas as pd

        labels = loaded.labels.labels(each)
        if each in wanted:
            raise ConfigError(
                f"--each {each} and --condition {each}={wanted[each]}",
                expected="one of the two",
                fix="--each is for all labels, --condition for one",
            )
        table = pd.DataFrame({each: [label for label in labels for _ in range(n_cells)]})
        for field, label in wanted.items():
            table[field] = label
    sampler: Sampler | LatentSampler
    if isinstance(loaded, ScDiffusion):
        of_sets = {"--strategy": strategy, "--grid": grid, "--gibbs-rounds": gibbs_rounds}
        refuse_foreign_options({**of_sets, "--latent": latent, "--like": like, "--n-genes": n_genes})
        sampler = LatentSampler(method or loaded.default_sampler.method, steps)
    elif method is not None:
        raise ConfigError(
            f"--sampler {method} with {loaded.name}, of family scdiva",
            expected="a model of scdiva scdiffusion fit",
            fix="leave --sampler out; --strategy and --steps say how sets are drawn",
        )
    else:
        usual = Sampler()
        sampler = Sampler(
            strategy or usual.strategy, steps or usual.n_steps, grid or usual.grid, gibbs_rounds=gibbs_rounds or 0
        )
    n = len(table) if table is not None else n_cells
    started = time.perf_counter()
    with progress_bar("generating", n) as on_block:
        plan = generate_file(
            out,
            loaded,
            None if table is not None else n_cells,
            condition=table if table is not None else wanted,
            weight=weights or 1.0,
            guidance=_scales(guidance) if guidance else None,
            like=like,
            latent=latent,
            n_genes=n_genes,
            n_umis=n_umis,
            sampler=sampler,
            decoder=decoder,
            seed=seed,
            batch_size=size,
            overwrite=overwrite,
            on_block=on_block,
        )
    seconds = time.perf_counter() - started
    said = " and ".join(f"{field} {label}" for field, label in wanted.items()) or "no condition"
    if each is not None:
        said += f", each of {len(loaded.labels.labels(each))} labels of {each}"
    typer.echo(f"{plan.n_cells:,} cells ({said}) in {seconds:.1f} s, {plan.n_cells / seconds:.1f} cells/s")
    for note in plan.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{out}: X is int32 counts of {loaded.vocabulary.n_genes:,} genes; seed and settings in .uns")


def _parse(entries: list[str], fields: tuple[str, ...]) -> tuple[dict[str, str], dict[str, float]]:
    """Read FIELD=LABEL[:WEIGHT]; a label may hold colons, so only a number after the last one is a weight."""
    from scdiva.errors import ConfigError

    wanted: dict[str, str] = {}
    weights: dict[str, float] = {}
    for entry in entries:
        field, separator, label = entry.partition("=")
        if not separator or not field.strip() or not label.strip():
            raise ConfigError(
                f"cannot understand --condition {entry!r}",
                expected="FIELD=LABEL or FIELD=LABEL:WEIGHT",
                fix=f'for example cell_type="B cell"; fields of the model: {", ".join(fields) or "none"}',
            )
        field = field.strip()
        if field in wanted:
            raise ConfigError(f"--condition {field} twice", expected="one label per field", fix="use --each for all")
        head, colon, tail = label.rpartition(":")
        if colon:
            try:
                weights[field] = float(tail)
                label = head
            except ValueError:
                pass
        wanted[field] = label.strip()
    return wanted, weights


def _scales(entries: list[str]) -> dict[str, float]:
    """Read FIELD=SCALE."""
    from scdiva.errors import ConfigError

    scales: dict[str, float] = {}
    for entry in entries:
        field, _, text = entry.partition("=")
        if field.strip() in scales:
            raise ConfigError(f"--guidance {field.strip()} twice", expected="one scale per field", fix="leave one out")
        try:
            scales[field.strip()] = float(text)
        except ValueError:
            raise ConfigError(
                f"cannot understand --guidance {entry!r}", expected="FIELD=SCALE", fix="for example cell_type=1"
            ) from None
    return scales
