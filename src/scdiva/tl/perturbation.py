"""``tl.perturb``: what a perturbation does to control cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scdiva.data.output import check_output, replacing
from scdiva.errors import OutputError
from scdiva.tasks.perturb import N_TOP, control_cells, wanted_perturbations
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
        Column of ``.obs`` and the name or names of control cells in it, where ``adata`` has other cells, too.
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
        ``predicted_mean``, ``simple_predictors``, ``expected_error`` (of training conditions that were left out),
        ``spread_over_cells``, ``spread_over_seeds``. ``.obs["top_genes"]``, ``.obs["question"]`` (what was
        extrapolated: "seen", "context", "single" or "combination").

    Raises
    ------
    UnsupportedError
        A perturbation that cannot be answered; says why.
    SourceError, KeyNotFoundError, ScaleError, GeneError, ConfigError
        The cells cannot be used.
    """
    texts = [perturbation] if isinstance(perturbation, str) else list(perturbation)
    wanted = wanted_perturbations(model, texts, kind)
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
    overwrite: bool = False,
) -> AnnData:
    """Predict from the control cells of a file and write the changes as ``.h5ad``; all else as in :func:`perturb`.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist. Raised before any work is done.
    """
    target = Path(path_out)
    if target.suffix != ".h5ad":
        raise OutputError(f"output {target.name!r}", expected="a name ending in .h5ad", fix="rename it")
    check_output(target, overwrite=overwrite)
    found = perturb(
        Path(path_in),
        model,
        perturbation,
        kind=kind,
        context_key=context_key,
        perturbation_key=perturbation_key,
        control=control,
        library_size_key=library_size_key,
        layer=layer,
        n_top=n_top,
    )
    with replacing(target) as partial:
        found.write_h5ad(partial)
    return found
