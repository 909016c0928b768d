"""``scdiva annotate QUERY OUT``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from scdiva.cli.common import DEFAULT_MODEL, DeviceOption, FileArgument, LayerOption, ModelOption, OverwriteOption
from scdiva.errors import ConfigError


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
        str, typer.Option("--method", help="probe (regressions on the frozen embedding) or reference (neighbours).")
    ] = "probe",
    save: Annotated[Path | None, typer.Option("--save", help="Folder for the fitted annotator.")] = None,
    model: ModelOption = DEFAULT_MODEL,
    layer: LayerOption = None,
    self_training: Annotated[
        str, typer.Option("--self-training", help="auto, yes or no: learn on from query cells that are sure (probe).")
    ] = "auto",
    ontology: Annotated[
        list[str] | None,
        typer.Option("--ontology", metavar="LABEL=CL:...", help="Cell Ontology id of a label (repeatable)."),
    ] = None,
    tissue: Annotated[
        str | None, typer.Option("--tissue", help="For names such as 'alpha': blood, pancreas, brain, lung, heart.")
    ] = None,
    balanced: Annotated[bool, typer.Option("--balanced", help="Give each type the same weight (probe).")] = False,
    confidence: Annotated[
        float, typer.Option("--confidence", min=0.0, max=1.0, help="Probability that an ontology term must reach.")
    ] = 0.5,
    false_unknown_rate: Annotated[
        float, typer.Option("--false-unknown-rate", help="Share of known cells that may be called unknown.")
    ] = 0.05,
    seed: Annotated[int, typer.Option("--seed", help="Seed of components and folds.")] = 0,
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
    ids = _ontology(ontology or [])
    from scdiva.data.output import check_output
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks.annotate import CellTyper
    from scdiva.tl import annotate_file

    check_output(out, overwrite=overwrite)
    if save is not None and save.exists() and not overwrite:
        raise ConfigError(f"--save {save} exists", expected="a new folder", fix="name another one, or pass --overwrite")
    loaded = ScDiVa.from_pretrained(model, device=device)
    given: Any = CellTyper.load(annotator) if annotator is not None else reference
    options: dict[str, Any] = {}
    if annotator is None:
        options = {
            "ontology": ids,
            "tissue": tissue,
            "is_balanced": balanced,
            "false_unknown_rate": false_unknown_rate,
            "seed": seed,
        }
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
    what = "+".join(record.get("regressions", [])) or "neighbours"
    typer.echo(
        f"{len(found.label):,} cells annotated with {len(found.classes)} types of {record['reference']['name']} "
        f"({record['reference']['n_cells']:,} cells, {record['reference']['n_genes']:,} genes in both) by "
        f"{record['method']} ({what}{', self-trained' if record['self_training'] else ''})"
    )
    for label, n in Counter(found.label.tolist()).most_common():
        mean = float(found.confidence[found.label == label].mean())
        typer.echo(f"  {n:>8,}  {label}  (mean confidence {mean:.2f})")
    typer.echo(
        f"{int(found.is_unknown.sum()):,} cells are unlike the reference (.obs['scdiva_unknown']); in the reference "
        f"{record['reference']['false_unknown_rate']:.0%} are"
    )
    without = record["reference"]["labels_without_ontology_id"]
    if without:
        typer.echo(f"no Cell Ontology id for: {', '.join(without)} (--ontology 'LABEL=CL:...')")
    typer.echo(f"{out}: .obs['scdiva_cell_type'], 'scdiva_confidence', 'scdiva_ontology_label' and more")


def _ontology(pairs: list[str]) -> dict[str, str]:
    result = {}
    for pair in pairs:
        label, separator, term = pair.rpartition("=")
        if not separator:
            raise typer.BadParameter(f"--ontology {pair!r} is not LABEL=CL:...")
        result[label] = term
    return result
