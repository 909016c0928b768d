"""``scdiva evaluate perturbation FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from scdiva.cli.common import (
    DEFAULT_MODEL,
    CoverageOption,
    DeviceOption,
    FileArgument,
    LayerOption,
    LibrarySizeOption,
    ModelOption,
)


def evaluate_perturbation(
    file: FileArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder for report and rows; resumes from it.")],
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
        Literal["knockout", "activation", "treatment"], typer.Option("--kind", help="What was done.")
    ] = "knockout",
    context_key: Annotated[
        str | None, typer.Option("--context-key", help=".obs column of cell types or lines to compare within.")
    ] = None,
    batch_key: Annotated[str | None, typer.Option("--batch-key", help=".obs column of batches.")] = None,
    library_size_key: LibrarySizeOption = None,
    layer: LayerOption = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Leave out cells with this label (repeatable).")
    ] = None,
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Leave out cells that have no perturbation, context or batch.")
    ] = False,
    ignore_confounded_batch: Annotated[
        bool, typer.Option("--ignore-confounded-batch", help="Go on without batches that are either control or not.")
    ] = False,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", help="COLUMN=VALUE: only these cells (repeatable; .h5ad only).")
    ] = None,
    split: Annotated[
        Literal["unseen_context", "unseen_single", "combination", "seen"],
        typer.Option("--split", help="What is new in the held-out conditions."),
    ] = "unseen_single",
    folds: Annotated[
        int, typer.Option("--folds", min=0, help="Folds of unseen_single; 0: one perturbation at a time.")
    ] = 5,
    min_cells: Annotated[
        int, typer.Option("--min-cells", min=1, help="Fewest cells, and control cells, of a condition that is tested.")
    ] = 20,
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Number of seeds, each with splits of its own.")] = 3,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            help="Run only this method (repeatable): 'scdiva' is the model, fine-tuned on each split, "
            "'scdiva_simple' its simple predictors without a network; mean, null and ceiling always run.",
        ),
    ] = None,
    model: ModelOption = DEFAULT_MODEL,
    corpus: Annotated[
        bool, typer.Option("--corpus/--no-corpus", help="Also predict from the model's gene embeddings.")
    ] = True,
    cell_eval: Annotated[
        bool, typer.Option("--cell-eval", help="Also run cell-eval on the predictions (extra 'eval').")
    ] = False,
    min_coverage: CoverageOption = 0.5,
    device: DeviceOption = "auto",
) -> None:
    """Judge predicted effects of perturbations on held-out conditions, beside baselines, a null and a ceiling."""
    from scdiva.baselines.common import require
    from scdiva.data.perturbation_sets import load_perturbed
    from scdiva.errors import OutputError
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks import evaluate_perturbation as task

    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file", expected="a folder", fix="name another one with --out")
    if cell_eval:
        require("cell_eval", "cell_eval", "cell-eval")
    base = ScDiVa.from_pretrained(model, device=device)
    vocabulary = base.vocabulary
    loaded = load_perturbed(
        _filtered(file, filters or ()),
        vocabulary,
        perturbation_key=perturbation_key,
        control=control,
        layout=layout,
        kind=kind,
        context_key=context_key,
        batch_key=batch_key,
        library_size_key=library_size_key,
        layer=layer,
        exclude=exclude or (),
        drop_missing=drop_missing,
        ignore_confounded_batch=ignore_confounded_batch,
        min_cells=min_cells,
        min_coverage=min_coverage,
    )
    typer.echo(str(loaded.report))
    features = task.gene_features(base, vocabulary) if corpus else None
    predictors = task.our_predictors(base)
    if methods is not None:
        predictors = {name: method for name, method in predictors.items() if name in methods}
    splits = task.splits_of(loaded.data, split, seeds=tuple(range(seeds)), n_folds=folds or None, min_cells=min_cells)
    out.mkdir(parents=True, exist_ok=True)
    report = task.evaluate_perturbation(
        loaded.data,
        splits,
        predictors=predictors,
        methods=methods,
        vocabulary=vocabulary,
        corpus=features,
        notes=[f"{file.name}: {' '.join(str(loaded.report).splitlines()[:1])}"],
        rows_path=out / "rows.jsonl",
        on_row=lambda row: typer.echo(str(row)),
    )
    if cell_eval:
        from scdiva.tasks.cell_eval import evaluate_with_cell_eval

        run = [name for kind in report.kinds for name in report.methods(kind) if name != task.CEILING]
        scores = evaluate_with_cell_eval(
            loaded.data,
            splits,
            list(dict.fromkeys(run)),
            out / "cell_eval",
            predictors=predictors,
            vocabulary=vocabulary,
            corpus=features,
        )
        report = report.with_cell_eval(scores)
    for path in report.write(out):
        typer.echo(str(path))


def _filtered(path: Path, filters: Any) -> Any:
    """Return the path, or the cells of it that pass the filters."""
    if not filters:
        return path
    import anndata as ad
    import numpy as np

    from scdiva.cli.evaluate_annotation import _filters
    from scdiva.errors import KeyNotFoundError, SourceError

    if path.suffix != ".h5ad":
        raise SourceError(f"--filter with {path}", expected="an .h5ad file", fix="filter it before")
    adata = ad.read_h5ad(path)
    is_kept = np.ones(adata.n_obs, dtype=bool)
    for column, wanted in _filters(filters).items():
        if column not in adata.obs:
            raise KeyNotFoundError(
                f"no column {column!r}", expected=f"one of {', '.join(adata.obs)}", fix="correct --filter"
            )
        is_kept &= adata.obs[column].astype(str).isin(list(wanted)).to_numpy()
    if not is_kept.any():
        raise SourceError("no cell passes the filters", expected="at least one", fix="correct --filter")
    return adata[is_kept].copy()
