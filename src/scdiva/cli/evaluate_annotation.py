"""``scdiva evaluate annotation FILE``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from scdiva.cli.common import DEFAULT_MODEL, DeviceOption, FileArgument, ModelOption


def evaluate_annotation(
    file: FileArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for report, picture and rows; resumes from it.")],
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
    merge: Annotated[
        Path | None,
        typer.Option("--merge", help="Tab-separated: label, merged label. Also score with both sides mapped."),
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", help="COLUMN=VALUE: only these cells of FILE and of --test (repeatable)."),
    ] = None,
    group_key: Annotated[
        str | None,
        typer.Option(
            "--group-key", help=".obs column, such as donor: train on the other groups, test on each in turn."
        ),
    ] = None,
    test_group: Annotated[
        list[str] | None, typer.Option("--test-group", help="Test on this group only (repeatable).")
    ] = None,
    per_type: Annotated[
        list[int] | None,
        typer.Option("--per-type", min=1, help="Also with so many labelled cells of each type (repeatable)."),
    ] = None,
    open_set: Annotated[
        bool, typer.Option("--open-set", help="Also leave each type out of training in turn: is it noticed?")
    ] = False,
    test_fraction: Annotated[
        float, typer.Option("--test-fraction", min=0.05, max=0.9, help="Share of each type that is held out.")
    ] = 0.2,
    published: Annotated[
        str | None,
        typer.Option("--published", help="FILE is this published set (docs/published_sets.md): its keys and split."),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", help="Run only this method (repeatable); 'lora', 'finetune': only when named."),
    ] = None,
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
    if test is not None and group_key is not None:
        raise typer.BadParameter("--group-key and --test are two ways to split: give one")
    if test_group and group_key is None:
        raise typer.BadParameter("--test-group needs --group-key")
    if published is not None and (test or group_key or filters or label_map or per_type):
        raise typer.BadParameter(
            "--published has a split of its own: no --test, --group-key, --filter, --map, --per-type"
        )
    merged = _map(merge)
    where = _filters(filters or ())
    loaded = ScDiVa.from_pretrained(model, device=device)
    notes: tuple[str, ...] = ()
    sizes = (None, *(per_type or ()))
    # by number of labelled cells per type, all of them first
    by_size: list[list[Any]]
    if published is not None:
        by_size = [_published(published, file, loaded, test_fraction)]
    else:
        files = [file] if test is None else [file, test]
        own, notes = task.filters_by_source(files, where)
        opened = partial(task.LabelledCounts.open, model=loaded)
        train = opened(file, label_key=label_key, label_map=_map(label_map), where=own[0], group_key=group_key)
        if test is not None:
            key = test_label_key or label_key
            other = opened(test, label_key=key, label_map=_map(test_map), where=own[1])
            by_size = [[partial(task.across, train, other, n_per_type=n)] for n in sizes]
        elif group_key is not None:
            groups = _groups(train, group_key, test_group)
            by_size = [
                [partial(task.leave_one_group_out, train, train.group, name, n_per_type=n) for name in groups]
                for n in sizes
            ]
        else:
            by_size = [[partial(task.within, train, test_fraction=test_fraction, n_per_type=n)] for n in sizes]
    out.mkdir(parents=True, exist_ok=True)
    report = task.evaluate_annotation(
        [make for makes in by_size for make in makes],
        loaded,
        methods=methods,
        seeds=tuple(range(seeds)),
        open_set_tasks=by_size[0] if open_set else (),
        merge=merged,
        notes=notes,
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


def _groups(cells: Any, key: str, wanted: Sequence[str] | None) -> tuple[str, ...]:
    from scdiva.errors import SourceError

    if wanted:
        return tuple(dict.fromkeys(wanted))
    if len(cells.groups) < 2:
        raise SourceError(
            f".obs[{key!r}] of {cells.name} holds {len(cells.groups)} groups",
            expected="at least two",
            fix="name another column",
        )
    return tuple(cells.groups)


def _filters(texts: Sequence[str]) -> dict[str, set[str]]:
    """Read COLUMN=VALUE; several values of one column are alternatives."""
    found: dict[str, set[str]] = {}
    for text in texts:
        column, sign, value = text.partition("=")
        if not sign or not column or not value.strip():
            raise typer.BadParameter(f"{text!r} is no COLUMN=VALUE", param_hint="--filter")
        found.setdefault(column, set()).add(value.strip())
    return found


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
