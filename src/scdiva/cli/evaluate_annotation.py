"""``scdiva evaluate annotation FILE``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from scdiva.cli.common import DEFAULT_MODEL, DeviceOption, FileArgument, ModelOption


def evaluate_annotation(
    file: FileArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for report and rows; resumes from it.")],
    label_key: Annotated[str, typer.Option("--label-key", help=".obs column with the cell types.")] = "cell_type",
    test: Annotated[
        Path | None, typer.Option("--test", help="Train on FILE and test on this file, over labels in common.")
    ] = None,
    test_label_key: Annotated[
        str | None, typer.Option("--test-label-key", help="The same column of --test, if it is another one.")
    ] = None,
    label_map: Annotated[
        Path | None, typer.Option("--map", help="Tab-separated: label of FILE, common label. Others are left out.")
    ] = None,
    test_map: Annotated[Path | None, typer.Option("--test-map", help="The same for --test.")] = None,
    per_type: Annotated[
        list[int] | None,
        typer.Option("--per-type", min=1, help="Also with so many labelled cells of each type (repeatable)."),
    ] = None,
    test_fraction: Annotated[
        float, typer.Option("--test-fraction", min=0.05, max=0.9, help="Share of each type that is held out.")
    ] = 0.2,
    published: Annotated[
        str | None,
        typer.Option("--published", help="FILE is this published set (docs/published_sets.md): its keys and split."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    methods: Annotated[list[str] | None, typer.Option("--methods", help="Run only this method (repeatable).")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds, each with a split of its own.")] = 3,
    device: DeviceOption = "auto",
) -> None:
    """Judge annotation by held-out labels, beside logistic regression, neighbours, CellTypist and a null control."""
    from scdiva.errors import OutputError
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks import evaluate_annotation as task

    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", expected="a folder", fix="name another one with --out")
    if test is None and (test_label_key or test_map):
        raise typer.BadParameter("--test-label-key and --test-map need --test")
    loaded = ScDiVa.from_pretrained(model, device=device)
    sizes = (None, *(per_type or ()))
    tasks: list[Any]
    if published is not None:
        tasks = _published(published, file, loaded, test_fraction)
    else:
        train = task.LabelledCounts.open(file, loaded, label_key, _map(label_map))
        tasks = [partial(task.within, train, test_fraction=test_fraction, n_per_type=n) for n in sizes]
        if test is not None:
            other = task.LabelledCounts.open(test, loaded, test_label_key or label_key, _map(test_map))
            tasks = [partial(task.across, train, other, n_per_type=n) for n in sizes]
    out.mkdir(parents=True, exist_ok=True)
    report = task.evaluate_annotation(
        tasks,
        loaded,
        methods=methods,
        seeds=tuple(range(seeds)),
        rows_path=out / "rows.jsonl",
        on_row=lambda run: typer.echo(str(run)),
    )
    for path in report.write(out):
        typer.echo(str(path))


def _published(name: str, path: Path, model: Any, test_fraction: float) -> list[Any]:
    from scdiva.data.published import load_published
    from scdiva.errors import SourceError
    from scdiva.tasks import evaluate_annotation as task

    found = load_published(name, path)
    for note in found.notes:
        typer.echo(f"{name}: {note}")
    if found.labels is None:
        raise SourceError(f"{name} has no cell types", expected="a set of annotation", fix="name another one")
    if found.is_test is None:
        cells = task.LabelledCounts.of(found.adata, model, found.labels)
        return [partial(task.within, cells, test_fraction=test_fraction)]
    train, test = (
        task.LabelledCounts.of(found.adata[rows].copy(), model, found.labels[rows])
        for rows in (found.train, found.test)
    )
    return [partial(task.fixed, name, train, test)]


def _map(path: Path | None) -> dict[str, str] | None:
    if path is None:
        return None
    from scdiva.errors import SourceError

    result = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split("\t")
        if len(parts) != 2:
            raise SourceError(
                f"line {number} of {path}: {line!r}", expected="a label, a tab, a common label", fix="correct the line"
            )
        result[parts[0]] = parts[1]
    return result
