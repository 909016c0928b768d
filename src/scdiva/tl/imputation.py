"""``tl.impute``: expected counts of chosen genes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdiva.data.output import check_output, check_recorded_in, write_with_slots
from scdiva.data.reader import MIN_COVERAGE, open_counts
from scdiva.data.source import open_source
from scdiva.errors import BundleError, OutputError
from scdiva.models.base import Imputer, OwnCounts
from scdiva.tasks.embed import BatchSize
from scdiva.tasks.impute import Imputation, Unit
from scdiva.tasks.impute import impute as _impute

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

from scdiva.tl.common import check_adata, check_key


def impute(
    adata: AnnData,
    model: Imputer,
    genes: Sequence[str] | None = None,
    *,
    own_counts: OwnCounts = "used",
    unit: Unit = "log1p_cp10k",
    n_samples: int = 0,
    seed: int = 0,
    layer: str | None = None,
    key_added: str = "scdiva_imputed",
    batch_size: BatchSize = "auto",
    min_coverage: float = MIN_COVERAGE,
    library_size_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Say how much of chosen genes to expect in each cell, whether they were measured or not.

    Parameters
    ----------
    adata
        Raw counts in ``X``, a layer or ``.raw``; they are found, or named by ``layer``. ``X`` is not changed.
    model
        From ``sd.ScDiVa.from_pretrained``.
    genes
        Symbols or Ensembl ids of genes that the model knows; ``adata`` need not have a column for them. None: all
        genes of the model that it measures.
    own_counts
        "used": the gene's own count in a cell corrects what the rest of the cell says (denoising). "hidden": the
        expectation does not depend on it, so that it can be compared with it.
    unit
        "log1p_cp10k": log1p of the expected CP10K; "counts": expected counts at the cell's own depth.
    n_samples
        Half-samples of each cell (0, or at least 2; 20 give a usable spread), for three more slots: ``_sd``, the
        standard deviation of the expectation (the cell's other molecules are a sample); ``_q05`` and ``_q95``, within
        which nine in ten repeated measurements of the cell at the same depth should lie (in addition: the spread of
        the gene's rate around the expectation, and of counts around the rate). Neither covers systematic errors of the
        model.
    seed
        Of the samples. A cell's values depend on that cell, the seed and the genes that are asked for.
    layer
        Layer with the counts; ``"raw"`` for ``adata.raw`` (unmeasured genes only: a layer cannot hold its genes).
    key_added
        Name of the slots.
    batch_size
        Cells at a time; no influence on the result.
    min_coverage
        Smallest share of UMIs that the model's genes must cover.
    library_size_key
        ``.obs`` column with each cell's total UMIs, for data that hold a gene panel only.
    copy
        Return a copy with the result instead of writing into ``adata``.

    Returns
    -------
    AnnData or None
        ``.layers[key_added]`` CSR float32, measured genes (columns of other genes stay empty);
        ``.obsm[f"{key_added}_unmeasured"]`` a DataFrame with a column for each gene that ``adata`` has none for; with
        samples the same with ``_sd``, ``_q05`` and ``_q95`` at the end; ``.uns["scdiva"]["impute"][key_added]``: what
        was done.

    Raises
    ------
    SourceError, ScaleError, GeneError, KeyNotFoundError, ConfigError, OutputError
        Data, genes or settings cannot be used; nothing is written.
    UntrainedHeadError, UnsupportedError
        The model cannot impute.
    """
    check_key(key_added)
    check_adata(adata, copy=copy)
    earlier = adata.uns.get("scdiva", {})
    _check_imputations(earlier.get("impute", {}))
    result = _run_impute(
        adata,
        model,
        genes=genes,
        own_counts=own_counts,
        unit=unit,
        n_samples=n_samples,
        seed=seed,
        layer=layer,
        batch_size=batch_size,
        min_coverage=min_coverage,
        library_size_key=library_size_key,
    )[1]
    target = adata.copy() if copy else adata
    for key, value in _imputation_slots(result, key_added, adata.obs_names).items():
        kind, name = key.split("/", 1)
        getattr(target, kind)[name] = value
    records = {**earlier.get("impute", {}), key_added: dict(result.record)}
    target.uns["scdiva"] = {**earlier, "impute": records}
    return target if copy else None


def impute_file(
    path_in: str | Path,
    path_out: str | Path,
    model: Imputer,
    genes: Sequence[str] | None = None,
    *,
    own_counts: OwnCounts = "used",
    unit: Unit = "log1p_cp10k",
    n_samples: int = 0,
    seed: int = 0,
    layer: str | None = None,
    key_added: str = "scdiva_imputed",
    batch_size: BatchSize = "auto",
    min_coverage: float = MIN_COVERAGE,
    library_size_key: str | None = None,
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> Imputation:
    """Impute the cells of a file and write a copy of the file with the result.

    Everything as in :func:`impute`; ``X`` stays on disk, the result is held in memory, and the output appears whole or
    not at all.

    Parameters
    ----------
    path_in
        ``.h5ad``, ``.zarr``, 10x ``.h5`` or 10x mtx folder.
    path_out
        ``.h5ad`` or ``.zarr``.
    overwrite
        Replace an existing output (which may be the input itself).
    on_block
        Called with the number of cells done, for progress.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist; raised before any work is done.
    """
    check_key(key_added)
    target = Path(path_out)
    check_output(target, overwrite=overwrite)
    check_recorded_in(Path(path_in))
    reader, result = _run_impute(
        path_in,
        model,
        genes=genes,
        own_counts=own_counts,
        unit=unit,
        n_samples=n_samples,
        seed=seed,
        layer=layer,
        batch_size=batch_size,
        min_coverage=min_coverage,
        library_size_key=library_size_key,
        on_block=on_block,
    )
    slots = _imputation_slots(result, key_added, reader.source.obs.index)
    write_with_slots(reader.source, target, {**slots, f"uns/scdiva/impute/{key_added}": dict(result.record)})
    return result


def _imputation_slots(result: Imputation, key: str, cell_names: Any) -> dict[str, Any]:
    """Return slot in the file to value."""
    # deferred: importing pandas takes a moment that `--help` need not wait for
    import pandas as pd

    slots: dict[str, Any] = {f"layers/{key}{ending}": matrix for ending, matrix in result.measured.items()}
    for ending, values in result.unmeasured.items():
        slots[f"obsm/{key}_unmeasured{ending}"] = pd.DataFrame(
            values, index=cell_names, columns=list(result.unmeasured_names)
        )
    return slots


def _check_imputations(slot: Any) -> None:
    if not isinstance(slot, Mapping):
        raise OutputError(
            f".uns['scdiva']['impute'] holds a {type(slot).__name__} that is not ours",
            expected="nothing, or the dictionary that scdiva writes",
            fix="rename or delete it: del adata.uns['scdiva']['impute']",
        )


def _run_impute(
    data: Any, model: Imputer, *, layer: str | None, library_size_key: str | None, min_coverage: float, **rest: Any
) -> Any:
    if not isinstance(model, Imputer):
        raise BundleError(
            f"a {type(model).__name__} is no model that imputes",
            expected="a model",
            fix="model = sd.ScDiVa.from_pretrained(...)",
        )
    reader = open_counts(
        open_source(data),
        model.vocabulary,
        layer=layer,
        library_size_key=library_size_key,
        min_coverage=min_coverage,
    )
    return reader, _impute(reader, model, **rest)
