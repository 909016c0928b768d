"""``scdiva evaluate integration FILE`` and ``scdiva evaluate embedding FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scdiva.cli.common import DEFAULT_MODEL, DeviceOption, FileArgument, LayerOption, ModelOption

if TYPE_CHECKING:
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks.evaluate_integration import BatchedCells

OutOption = Annotated[Path, typer.Option("--out", help="Folder for report, rows and picture; resumes from it.")]
MethodsOption = Annotated[list[str] | None, typer.Option("--methods", help="Run only this method (repeatable).")]


def evaluate_integration(
    file: FileArgument,
    out: OutOption,
    batch_key: Annotated[str, typer.Option("--batch-key", help=".obs column with the batches.")] = "batch",
    label_key: Annotated[str, typer.Option("--label-key", help=".obs column with the cell types.")] = "cell_type",
    published: Annotated[
        str | None,
        typer.Option("--published", help="FILE is this published set (docs/published_sets.md), with its keys."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    methods: MethodsOption = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds of methods and clusterings.")] = 3,
    layer: LayerOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Judge integration by known types and batches, beside PCA, Harmony, scVI, scANVI, a null and a ceiling."""
    _require_folder(out)
    from scdiva.metrics.integration import batch_label_confounding
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks import evaluate_integration as task
    from scdiva.tasks.integration_figure import draw_integration

    loaded = ScDiVa.from_pretrained(model, device=device)
    if published is None:
        data = task.BatchedCells.open(file, loaded, batch_key, label_key, layer=layer)
    else:
        data = _published(published, file, loaded, layer)
    is_labelled = data.is_labelled
    typer.echo(batch_label_confounding(data.label[is_labelled], data.batch[is_labelled]).sentence)
    if not is_labelled.all():
        typer.echo(f"{int((~is_labelled).sum()):,} cells have no label: they are integrated, and in no score.")
    out.mkdir(parents=True, exist_ok=True)
    report = task.evaluate_integration(
        data,
        loaded,
        methods=methods,
        seeds=tuple(range(seeds)),
        rows_path=out / "rows.jsonl",
        on_row=lambda run: typer.echo(str(run)),
    )
    draw_integration(report, out / "report.png")
    for path in (*report.write(out), out / "report.png"):
        typer.echo(str(path))


def evaluate_embedding(
    file: FileArgument,
    out: OutOption,
    label_key: Annotated[str, typer.Option("--label-key", help=".obs column with the cell types.")] = "cell_type",
    batch_key: Annotated[
        str | None, typer.Option("--batch-key", help=".obs column with batches; adds how far they are mixed.")
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    methods: MethodsOption = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds of folds, clusters and methods.")] = 3,
    layer: LayerOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Judge the embedding as it comes by known types, beside a PCA of the same cells, null controls and a ceiling."""
    _require_folder(out)
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks import evaluate_embedding as task
    from scdiva.tasks.integration_figure import draw_embedding

    loaded = ScDiVa.from_pretrained(model, device=device)
    data = task.LabelledCells.open(file, loaded, label_key, batch_key, layer=layer)
    out.mkdir(parents=True, exist_ok=True)
    report = task.evaluate_embedding(
        data,
        loaded,
        methods=methods,
        seeds=tuple(range(seeds)),
        rows_path=out / "rows.jsonl",
        on_row=lambda run: typer.echo(str(run)),
    )
    draw_embedding(report, out / "report.png")
    for path in (*report.write(out), out / "report.png"):
        typer.echo(str(path))


def _require_folder(out: Path) -> None:
    from scdiva.errors import OutputError

    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", expected="a folder", fix="name another one with --out")


def _published(name: str, path: Path, model: ScDiVa, layer: str | None) -> BatchedCells:
    from scdiva.data.published import PUBLISHED, load_published
    from scdiva.errors import SourceError
    from scdiva.tasks.evaluate_integration import BatchedCells

    found = load_published(name, path, layer=layer)
    for note in found.notes:
        typer.echo(f"{name}: {note}")
    if found.labels is None or found.batches is None:
        fit = ", ".join(row.name for row in PUBLISHED.values() if "integration" in row.tasks)
        raise SourceError(
            f"{name} has no {'cell types' if found.labels is None else 'batches'}",
            expected=f"a set of integration: {fit}",
            fix="name another one",
        )
    return BatchedCells.of(found.adata, model, found.batches, found.labels, name=found.definition.name)
