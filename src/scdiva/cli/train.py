"""``scdiva pretrain --config FILE`` and ``scdiva finetune FILE --objective pretrain|conditional|perturbation``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scdiva.cli.common import (
    DEFAULT_MODEL,
    CoverageOption,
    FileArgument,
    LayerOption,
    LibrarySizeOption,
    ModelOption,
)

if TYPE_CHECKING:
    from scdiva.tasks.pretrain import TrainedModel

OverridesOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. optim.lr=3e-4.")
]


def pretrain(
    config: Annotated[Path, typer.Option("--config", help="Run configuration (TOML).")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; the model goes to 'bundle' in it.")],
    overrides: OverridesOption = None,
) -> None:
    """Train a model from a corpus. The same command again resumes an interrupted run."""
    from scdiva.config import RunConfig, apply_overrides, load_config
    from scdiva.tasks.pretrain import pretrain as run

    settings = apply_overrides(load_config(config, RunConfig), overrides or [])
    _tell(run(settings, out))


def finetune(
    file: FileArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; the model goes to 'bundle' in it.")],
    objective: Annotated[
        Literal["pretrain", "conditional", "perturbation"] | None,
        typer.Option(
            "--objective",
            help="'pretrain': the embedding, without labels; 'conditional': the whole network, for generation under "
            "--condition; 'perturbation': what perturbations do, for scdiva perturb. Left out: by whether there is a "
            "--condition or a --perturbation-key.",
        ),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    layer: LayerOption = None,
    batch_key: Annotated[
        str | None,
        typer.Option(
            "--batch-key",
            help=".obs column with donors or batches; whole ones are held out, and perturbed cells are compared with "
            "control cells of their own.",
        ),
    ] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option("--condition", help=".obs column that the model can be conditioned on afterwards; repeatable."),
    ] = None,
    perturbation_key: Annotated[
        str | None, typer.Option("--perturbation-key", help=".obs column that says what was done to each cell.")
    ] = None,
    control: Annotated[
        list[str] | None, typer.Option("--control", help="Name of control cells in it (repeatable).")
    ] = None,
    layout: Annotated[
        str | None, typer.Option("--layout", help="Keys of a known layout instead: gears, scperturb, replogle.")
    ] = None,
    kind: Annotated[
        Literal["knockout", "activation", "treatment"], typer.Option("--kind", help="What --perturbation-key names.")
    ] = "knockout",
    context_key: Annotated[
        str | None, typer.Option("--context-key", help=".obs column of cell types or lines to compare within.")
    ] = None,
    dose_key: Annotated[str | None, typer.Option("--dose-key", help=".obs column of doses.")] = None,
    library_size_key: LibrarySizeOption = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Leave out cells of this perturbation (repeatable).")
    ] = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Leave out cells that have no perturbation, context or batch.")
    ] = False,
    ignore_confounded_batch: Annotated[
        bool, typer.Option("--ignore-confounded-batch", help="Go on without batches that are either control or not.")
    ] = False,
    cells: Annotated[
        bool, typer.Option("--cells/--no-cells", help="Of perturbations: also learn to draw single cells (minutes).")
    ] = True,
    only_measured_genes: Annotated[
        bool, typer.Option("--only-measured-genes", help="Leave genes that FILE lacks out of the new model.")
    ] = False,
    name: Annotated[str, typer.Option("--name", help="Name of the new model.")] = "",
    min_coverage: CoverageOption = 0.5,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the run.")] = 0,
    overrides: OverridesOption = None,
) -> None:
    """Adapt a model to the cells of FILE, in a few minutes. The same command again resumes.

    Without --condition nothing is learned from labels, and anchor and profile decoder are trained. With it the whole
    network is, and the labels of the columns become conditions of the new model.

    With --perturbation-key or --layout it learns what perturbations do, for scdiva perturb; --set then takes
    network=false, max_steps=400 and so on.
    """
    from scdiva.config import apply_overrides
    from scdiva.data.source import open_source
    from scdiva.errors import ConfigError
    from scdiva.models.scdiva import ScDiVa

    if objective == "perturbation" or (objective is None and (perturbation_key or layout)):
        if condition or only_measured_genes:
            raise ConfigError(
                "--objective perturbation with --condition or --only-measured-genes",
                expected="--perturbation-key and --control",
                fix="leave the others out",
            )
        _finetune_perturbation(
            file,
            out,
            model,
            overrides or [],
            perturbation_key=perturbation_key,
            control=control,
            layout=layout,
            context_key=context_key,
            batch_key=batch_key,
            kind=kind,
            dose_key=dose_key,
            library_size_key=library_size_key,
            layer=layer,
            exclude=exclude or (),
            cells=cells,
            drop_missing=drop_missing,
            ignore_confounded_batch=ignore_confounded_batch,
            min_coverage=min_coverage,
            name=name,
            seed=seed,
        )
        return
    given = {
        "--perturbation-key": perturbation_key, "--control": control, "--layout": layout, "--context-key": context_key,
        "--dose-key": dose_key, "--library-size-key": library_size_key, "--exclude": exclude,
        "--drop-missing": drop_missing, "--ignore-confounded-batch": ignore_confounded_batch,
    }  # fmt: skip
    if foreign := [option for option, value in given.items() if value]:
        raise ConfigError(
            f"{', '.join(foreign)} with --objective {objective or 'pretrain'}",
            expected="options of that objective",
            fix="use --objective perturbation, or leave them out",
        )
    from scdiva.tasks.pretrain import (
        ADAPTATION_OBJECTIVE,
        CONDITIONING_OBJECTIVE,
        adapt,
        adaptation_config,
        conditioning_config,
    )

    if objective == "conditional" and not condition:
        raise ConfigError(
            "--objective conditional without --condition",
            expected="a column of .obs to condition on",
            fix="for example --condition cell_type",
        )
    if objective == "pretrain" and condition:
        raise ConfigError(
            "--objective pretrain with --condition: it learns nothing from labels",
            expected="one of the two",
            fix="use --objective conditional, or leave --condition out",
        )
    usual = conditioning_config(seed=seed) if condition else adaptation_config(open_source(file).n_cells, seed=seed)
    loss = CONDITIONING_OBJECTIVE if condition else ADAPTATION_OBJECTIVE
    of_loss = [entry.removeprefix("objective.") for entry in overrides or [] if entry.startswith("objective.")]
    of_loop = [entry for entry in overrides or [] if not entry.startswith("objective.")]
    for entry in of_loop:
        if entry.startswith(("data.files", "data.conditions", "data.root")):
            raise ConfigError(
                f"--set {entry}", expected="settings of the loop or of objective", fix="use FILE and --condition"
            )
    _tell(
        adapt(
            file,
            ScDiVa.from_pretrained(model, device="cpu"),
            out,
            config=apply_overrides(usual, of_loop),
            objective=apply_overrides(loss, of_loss),
            conditions=condition or (),
            only_measured_genes=only_measured_genes,
            name=name,
            layer=layer,
            batch_key=batch_key,
            min_coverage=min_coverage,
        )
    )


def _finetune_perturbation(file: Path, out: Path, model: str, overrides: list[str], **data: Any) -> None:
    from dataclasses import fields

    from scdiva.errors import ConfigError
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks.fit_perturbation import BUNDLE, PerturbationTraining
    from scdiva.tasks.perturb import finetune_perturbation

    settings: dict[str, Any] = {}
    names = [field.name for field in fields(PerturbationTraining)]
    for entry in overrides:
        key, _, value = entry.partition("=")
        key = key.removeprefix("perturbation.")
        if key not in names or not value:
            raise ConfigError(f"--set {entry}", expected=f"KEY=VALUE of {', '.join(names)}", fix="correct it")
        try:
            settings[key] = _setting(value, getattr(PerturbationTraining(), key))
        except ValueError as error:
            raise ConfigError(f"--set {entry}", expected=str(error), fix="correct it") from error
    fitted, loaded = finetune_perturbation(
        file, ScDiVa.from_pretrained(model, device="cpu"), out, options=PerturbationTraining(**settings), **data
    )
    typer.echo(str(loaded.report))
    record = fitted.details["fine_tuning"]
    left_out = ", ".join(f"{n} {question}" for question, n in record["left_out"].items() if n) or "none"
    typer.echo(f"{record['n_conditions']} conditions; left out once each, to weigh the simple predictors: {left_out}")
    metrics = fitted.details["metrics"]
    for metric, value in metrics.items():
        if not metric.endswith("_floor"):
            typer.echo(f"  {metric:<38}{value:>9.4f}   floor {metrics[f'{metric}_floor']:.4f}")
    if "network" in record:
        typer.echo(f"network: {record['network']}")
    elif record["gate"]:
        typer.echo(f"network: share of its correction that is used {', '.join(f'{g:.2f}' for g in record['gate'])}")
    typer.echo(f"{record['minutes']:.1f} minutes; model: {out / BUNDLE}")
    first = fitted.perturbations[0].name
    typer.echo(f"next:  scdiva perturb CONTROL_CELLS OUT.h5ad --model {out / BUNDLE} --perturbation {first}")


def _setting(text: str, usual: Any) -> Any:
    """Read a value of the type of the usual one, which is None for a number that is chosen by the data."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if isinstance(usual, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    wanted = int if usual is None else type(usual)
    if type(value) is not wanted:
        raise ValueError({bool: "true or false", int: "a whole number", float: "a number"}[wanted])
    return value


def _tell(trained: TrainedModel) -> None:
    if os.environ.get("RANK", "0") != "0":  # one of several processes under torchrun
        return
    fitted = trained.fit
    typer.echo(
        f"{fitted.last_step:,} steps, {fitted.n_cells:,} cell passes, {fitted.cells_per_s:,.0f} cells/s; stopped by "
        f"{fitted.stopped_because}; best step {fitted.best_step:,}"
    )
    for name, value in trained.metrics.items():
        if not name.endswith("_floor"):
            floor = trained.metrics.get(f"{name}_floor")
            beside = "" if floor is None else f"   floor {floor:.4f}"
            typer.echo(f"  {name:<34}{value:>9.4f}{beside}")
    typer.echo(f"model: {trained.path}")
    typer.echo(f"next:  scdiva embed FILE OUT.h5ad --model {trained.path}")
    fields = trained.model.labels.fields
    if fields and "identity" in trained.model.details["trained_heads"]:
        typer.echo(f"       scdiva generate OUT.h5ad --model {trained.path} --each {fields[-1]}")
