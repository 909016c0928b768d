"""``scdiva annotate QUERY OUT``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from scdiva.cli.common import DEFAULT_MODEL, DeviceOption, FileArgument, LayerOption, ModelOption, OverwriteOption

FALSE_UNKNOWN_RATE = 0.05
_MANY_UNKNOWN = 0.2
"""Share of unknown cells from which another method is spoken of."""


def annotate(
    file: FileArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output, .h5ad or .zarr: a copy of FILE with the result.")],
    reference: Annotated[
        Path | None, typer.Option("--reference", help="Labelled cells: .h5ad, .zarr, 10x .h5 or 10x mtx folder.")
    ] = None,
    label_key: Annotated[
        str | None, typer.Option("--label-key", help="Column of the reference's .obs with cell types.")
    ] = None,
    annotator: Annotated[
        Path | None, typer.Option("--annotator", help="Instead of a reference: a folder that --save wrote.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="consensus (the default: the next three, weighted by their agreement on FILE), probe (regressions on "
            "the frozen embedding), reference (neighbours), integrate (neighbours, once reference and FILE are "
            "integrated), finetune (trains last layers and a head: minutes) or lora (adapters and a head).",
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Folder for the fitted annotator.")] = None,
    extend: Annotated[
        Path | None,
        typer.Option("--extend", help="Add the reference to this saved index (--method reference); --save keeps both."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    layer: LayerOption = None,
    self_training: Annotated[
        str,
        typer.Option(
            "--self-training",
            help="auto, yes or no: whether FILE is looked at as a whole: a probe is aligned with it, a consensus "
            "weighed by it, and both (auto: where types have few cells) learn from their own calls.",
        ),
    ] = "auto",
    ontology: Annotated[
        list[str] | None,
        typer.Option("--ontology", metavar="LABEL=CL:...", help="Cell Ontology id of a label (repeatable)."),
    ] = None,
    tissue: Annotated[
        str | None, typer.Option("--tissue", help="For names such as 'alpha': blood, pancreas, brain, lung, heart.")
    ] = None,
    balanced: Annotated[
        bool,
        typer.Option("--balanced", help="The same weight for each type; finetune, lora: more for rare ones."),
    ] = False,
    trained_layers: Annotated[
        int | None,
        typer.Option("--trained-layers", min=0, help="Last layers to train (finetune); a third of them if left out."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Rank of the adapters (lora); 8 if left out.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="Passes over the reference, at most (finetune, lora); 8 if left out."),
    ] = None,
    confidence: Annotated[
        float, typer.Option("--confidence", min=0.0, max=1.0, help="Probability that an ontology term must reach.")
    ] = 0.5,
    false_unknown_rate: Annotated[
        float, typer.Option("--false-unknown-rate", help="Share of known cells that may be called unknown.")
    ] = FALSE_UNKNOWN_RATE,
    seed: Annotated[int, typer.Option("--seed", help="Seed of components, folds and training.")] = 0,
    device: DeviceOption = "auto",
    overwrite: OverwriteOption = False,
) -> None:
    """Annotate the cells of FILE with the types of a labelled reference: OUT gets .obs["scdiva_cell_type"] and more."""
    if (reference is None) == (annotator is None):
        raise typer.BadParameter("give either --reference with --label-key, or --annotator")
    if reference is not None and label_key is None:
        raise typer.BadParameter("--reference needs --label-key")
    choices = {"auto": "auto", "yes": True, "no": False}
    if self_training not in choices:
        raise typer.BadParameter(f"--self-training {self_training!r} is none of auto, yes, no")
    if extend is not None and method != "reference":
        raise typer.BadParameter("--extend belongs to --method reference")
    if annotator is None and self_training == "yes" and method in ("reference", "finetune", "lora"):
        raise typer.BadParameter(f"--self-training yes: method {method} does not learn from FILE")
    for name, value, methods in (
        ("--trained-layers", trained_layers, ("finetune",)),
        ("--rank", rank, ("lora",)),
        ("--epochs", epochs, ("finetune", "lora")),
    ):
        if value is not None and (annotator is not None or method not in methods):
            raise typer.BadParameter(f"{name} belongs to --method {' or '.join(methods)}")
    if annotator is not None:
        fitted_with = {
            "--label-key": label_key is not None,
            "--method": method is not None,
            "--ontology": bool(ontology),
            "--tissue": tissue is not None,
            "--balanced": balanced,
            "--false-unknown-rate": false_unknown_rate != FALSE_UNKNOWN_RATE,
            "--seed": seed != 0,
            "--extend": extend is not None,
        }
        if ignored := [name for name, is_given in fitted_with.items() if is_given]:
            raise typer.BadParameter(f"{ignored[0]} is for fitting; --annotator is fitted already")
    ids = _ontology(ontology or [])
    from scdiva.data.output import check_output
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks.annotate import CellTyper, check_annotator_folder
    from scdiva.tl import FineTuning, annotate_file

    check_output(out, overwrite=overwrite)
    if save is not None:
        check_annotator_folder(save, overwrite=overwrite)
    loaded = ScDiVa.from_pretrained(model, device=device)
    given: Any = CellTyper.load(annotator) if annotator is not None else reference
    options: dict[str, Any] = {}
    if annotator is None:
        options = {
            "extend": None if extend is None else CellTyper.load(extend),
            "ontology": ids,
            "tissue": tissue,
            "is_balanced": balanced,
            "false_unknown_rate": false_unknown_rate,
            "seed": seed,
        }
        if method in ("finetune", "lora"):
            settings = FineTuning(n_trained_layers=trained_layers, rank=rank)
            options["fine_tuning"] = settings if epochs is None else replace(settings, epochs=epochs)
    found, fitted = annotate_file(
        file,
        out,
        loaded,
        given,
        label_key,
        method=method,  # type: ignore[arg-type]  # the task refuses what it does not know
        layer=layer,
        self_training=choices[self_training],  # type: ignore[arg-type]
        confidence=confidence,
        overwrite=overwrite,
        **options,
    )
    if save is not None:
        fitted.save(save, overwrite=overwrite)
    record = found.record
    training = record["reference"].get("training")
    what = _trained(training) if training else _without_training(record)
    typer.echo(
        f"{len(found.label):,} cells annotated with {len(found.classes)} types of {record['reference']['name']} "
        f"({record['reference']['n_cells']:,} cells, {record['reference']['n_genes']:,} genes in both) by "
        f"{record['method']} ({what}{', self-trained' if record['self_training'] else ''})"
    )
    if training:
        for line in _training(training):
            typer.echo(line)
    if held_out := record["reference"].get("held_out"):
        typer.echo(
            f"cells of the reference, each judged without its label: accuracy {held_out['accuracy']:.3f}, macro-F1 "
            f"{held_out['macro_f1']:.3f}, calibration error {held_out['calibration_error']:.3f}"
        )
    for label, n in Counter(found.label.tolist()).most_common():
        mean = float(found.confidence[found.label == label].mean())
        typer.echo(f"  {n:>8,}  {label}  (mean confidence {mean:.2f})")
    typer.echo(
        f"{int(found.is_unknown.sum()):,} cells are unlike the reference (.obs['scdiva_unknown']); in the reference "
        f"{record['reference']['false_unknown_rate']:.0%} are"
    )
    if record["method"] in ("probe", "reference") and found.is_unknown.mean() > _MANY_UNKNOWN:
        typer.echo("FILE may be of another laboratory or in another state: try --method consensus or integrate")
    without = record["reference"]["labels_without_ontology_id"]
    if without:
        typer.echo(f"no Cell Ontology id for: {', '.join(without)} (--ontology 'LABEL=CL:...')")
    typer.echo(f"{out}: .obs['scdiva_cell_type'], 'scdiva_confidence', 'scdiva_ontology_label' and more")


def _without_training(record: Mapping[str, Any]) -> str:
    if "members" in record:
        shares = zip(record["members"], record["member_weights"], strict=True)
        return ", ".join(f"{name} {weight:.0%}" for name, weight in shares)
    return "+".join(record.get("regressions", [])) or "neighbours"


def _trained(training: Mapping[str, Any]) -> str:
    end = ", with a regression on components" if training["with_components"] else ""
    if training["rank"]:
        return f"adapters of rank {training['rank']} on {training['n_layers']} layers, and a head{end}"
    return f"the last {training['n_trained_layers']} of {training['n_layers']} layers, and a head{end}"


def _training(training: Mapping[str, Any]) -> list[str]:
    memory = f", peak memory {training['peak_memory_mb']:,.0f} MB" if "peak_memory_mb" in training else ""
    lines = [
        f"trained: {training['n_trained_weights']:,} weights, {training['n_steps']} steps over {training['n_train']:,} "
        f"cells, best after {training['best_step']}; {training['cells_per_s']:.0f} cells/s, "
        f"{training['minutes']:.1f} minutes{memory}"
    ]
    if training["n_validation"]:
        lines.append(
            f"{training['n_validation']:,} cells of the reference held out: accuracy "
            f"{training['validation_accuracy']:.3f}, macro-F1 {training['validation_macro_f1']:.3f}, calibration error "
            f"{training['validation_calibration_error']:.3f}"
        )
    return lines


def _ontology(pairs: list[str]) -> dict[str, str]:
    result = {}
    for pair in pairs:
        label, separator, term = pair.rpartition("=")
        if not separator:
            raise typer.BadParameter(f"--ontology {pair!r} is not LABEL=CL:...")
        result[label] = term
    return result
