"""``tl.perturb``: what a perturbation does to control cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdiva.data.output import check_output, replacing
from scdiva.errors import ConfigError, OutputError
from scdiva.tasks.perturb import N_TOP, control_cells, draw_cells, wanted_perturbations
from scdiva.tasks.perturb import perturb as _perturb

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.perturbations import Kind
    from scdiva.data.source import DataLike
    from scdiva.models.scdiva.perturbation_model import PerturbationModel


def perturb(
    adata: DataLike,
    model: PerturbationModel,
    perturbation: str | Sequence[str],
    *,
    kind: Kind | None = None,
    context_key: str | None = None,
    perturbation_key: str | None = None,
    control: str | Sequence[str] | None = None,
    library_size_key: str | None = None,
    layer: str | None = None,
    n_top: int = N_TOP,
) -> AnnData:
    """Predict the mean changes that perturbations make to control cells.

    Parameters
    ----------
    adata
        Raw counts of control cells, an AnnData or a path; it is not changed.
    model
        From ``scdiva finetune FILE --objective perturbation`` (``sd.load_model("DIR/bundle")``).
    perturbation
        One or several: a gene of the vocabulary, also one that was never perturbed in training; a drug or cytokine that
        was; a combination ``"A+B"``; a dose after ``@``.
    kind
        "knockout", "activation" or "treatment"; that of training if left out.
    context_key
        Column of ``.obs`` with cell types or lines; a prediction is made for each, also for one that training never saw
        perturbed. Left out: all cells are one context.
    perturbation_key, control
        Column of ``.obs`` and the name or names of control cells in it (those of training if left out), where ``adata``
        has other cells, too.
    library_size_key
        Column of ``.obs`` with each cell's total UMIs, for gene panels.
    layer
        Layer with the counts; found if left out.
    n_top
        Most changed genes that are named.

    Returns
    -------
    AnnData
        A row per perturbation and context. ``X``: change of mean log1p(CP10K). Layers: ``control_mean``,
        ``predicted_mean``, ``simple_predictors``, ``expected_error`` (of left-out training conditions; of what
        was measured its standard error), ``spread_over_cells``, ``spread_over_seeds``. ``.obs["top_genes"]``,
        ``.obs["question"]`` (what was extrapolated: "seen", "context", "single" or "combination").

    Raises
    ------
    UnsupportedError
        A perturbation that cannot be answered; says why.
    SourceError, KeyNotFoundError, ScaleError, GeneError, ConfigError
        The cells cannot be used.
    """
    wanted = wanted_perturbations(model, perturbation, kind)
    cells = control_cells(
        adata,
        model,
        context_key=context_key,
        perturbation_key=perturbation_key,
        control=control,
        library_size_key=library_size_key,
        layer=layer,
    )
    return _perturb(cells, model, wanted, n_top=n_top).adata


def perturb_cells(
    adata: DataLike,
    model: PerturbationModel,
    perturbation: str | Sequence[str],
    n_cells: int,
    *,
    kind: Kind | None = None,
    context_key: str | None = None,
    perturbation_key: str | None = None,
    control: str | Sequence[str] | None = None,
    library_size_key: str | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> AnnData:
    """Draw single perturbed cells: integer counts, whose mean is the one that :func:`perturb` predicts.

    Each starts at a control cell, whose counts are moved by the predicted change; half of the genes that rise are then
    drawn again by masked diffusion that is told what was done.

    Parameters
    ----------
    adata, model, perturbation, kind, context_key, perturbation_key, control, library_size_key, layer
        See :func:`perturb`. The model was fine-tuned with single cells.
    n_cells
        Cells of each perturbation in each context.
    seed
        Equal seeds give equal cells on the same kind of machine.

    Returns
    -------
    AnnData
        Integer counts; ``.obs``: perturbation, context, control_cell.

    Raises
    ------
    UnsupportedError
        A perturbation that cannot be answered, or a model that draws no cells.
    SourceError, KeyNotFoundError, ScaleError, GeneError, ConfigError
        The cells cannot be used.
    """
    wanted = wanted_perturbations(model, perturbation, kind)
    cells = control_cells(
        adata,
        model,
        context_key=context_key,
        perturbation_key=perturbation_key,
        control=control,
        library_size_key=library_size_key,
        layer=layer,
    )
    return draw_cells(cells, model, wanted, n_cells, seed=seed)


def perturb_file(
    path_in: str | Path,
    path_out: str | Path,
    model: PerturbationModel,
    perturbation: str | Sequence[str],
    *,
    kind: Kind | None = None,
    context_key: str | None = None,
    perturbation_key: str | None = None,
    control: str | Sequence[str] | None = None,
    library_size_key: str | None = None,
    layer: str | None = None,
    n_top: int = N_TOP,
    cells_out: str | Path | None = None,
    n_cells: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> AnnData:
    """Predict from the control cells of a file and write the changes as ``.h5ad``; all else as in :func:`perturb`.

    With ``cells_out`` ``n_cells`` single cells of each perturbation and context are written there, as
    :func:`perturb_cells` returns them.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist. Raised before any work is done.
    """
    if (cells_out is None) != (n_cells < 1):
        raise ConfigError(
            f"n_cells={n_cells} and cells_out={cells_out}", expected="both, or neither", fix="give the other one, too"
        )
    targets = [Path(path) for path in (path_out, cells_out) if path is not None]
    for target in targets:
        if target.suffix != ".h5ad":
            raise OutputError(f"output {target.name!r}", expected="a name ending in .h5ad", fix="rename it")
        check_output(target, overwrite=overwrite)
    options: dict[str, Any] = {
        "kind": kind,
        "context_key": context_key,
        "perturbation_key": perturbation_key,
        "control": control,
        "library_size_key": library_size_key,
        "layer": layer,
    }
    found = perturb(Path(path_in), model, perturbation, n_top=n_top, **options)
    results = [found]
    if cells_out is not None:
        results.append(perturb_cells(Path(path_in), model, perturbation, n_cells, seed=seed, **options))
    for target, result in zip(targets, results, strict=True):
        with replacing(target) as partial:
            result.write_h5ad(partial)
    return found
