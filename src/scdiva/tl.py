"""Tools, scanpy-style: ``adata`` first, then the model; in place, or ``copy=True`` for a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from scdiva.data.output import check_output, check_record, check_recorded_in, replacing, write_with_slots
from scdiva.data.reader import MIN_COVERAGE, open_counts
from scdiva.data.source import open_source
from scdiva.errors import BundleError, ConfigError, OutputError, SourceError
from scdiva.models.base import Embedder, Imputer, OwnCounts, Reconstructor
from scdiva.serialization import MAX_TOKENS
from scdiva.tasks.annotate import CONFIDENCE, Annotation, CellTyper, Method, fit_cell_typer
from scdiva.tasks.annotate import annotate as _annotate
from scdiva.tasks.embed import BatchSize, Embedding
from scdiva.tasks.embed import embed as _embed
from scdiva.tasks.fine_tuned import FineTuning
from scdiva.tasks.generate import DEFAULT_LATENT, LatentName, Plan, plan_cells
from scdiva.tasks.generate import generate as _generate
from scdiva.tasks.generate import generate_file as _generate_file
from scdiva.tasks.impute import Imputation, Unit
from scdiva.tasks.impute import impute as _impute
from scdiva.tasks.reconstruct import MASK_RATIOS, Reconstruction
from scdiva.tasks.reconstruct import reconstruct as _reconstruct

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from numpy.typing import ArrayLike
    from pandas import DataFrame

    from scdiva.data.source import DataLike
    from scdiva.diffusion.samplers import Sampler
    from scdiva.models.scdiva.model import ScDiVa
    from scdiva.types import LatentPrior

__all__ = [
    "FineTuning",
    "annotate",
    "annotate_file",
    "embed",
    "embed_file",
    "fit_cell_typer",
    "generate",
    "generate_file",
    "impute",
    "impute_file",
    "reconstruct",
    "reconstruct_file",
]


def embed(
    adata: AnnData,
    model: Embedder,
    *,
    layer: str | None = None,
    key_added: str = "X_scdiva",
    batch_size: BatchSize = "auto",
    denoise: Sequence[str] = (),
    min_coverage: float = MIN_COVERAGE,
    library_size_key: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Embed cells.

    Parameters
    ----------
    adata
        Raw counts in ``X``, a layer or ``.raw``; they are found, or named by ``layer``. ``X`` is not changed.
    model
        From ``sd.ScDiVa.from_pretrained``.
    layer
        Layer with the counts; ``"raw"`` for ``adata.raw``.
    key_added
        Slot in ``.obsm``.
    batch_size
        Cells at a time; no influence on the result.
    denoise
        Genes whose denoised expression goes to ``.layers["scdiva_denoised"]`` (log1p of expected CP10K; other columns
        stay empty).
    min_coverage
        Smallest share of UMIs that the model's genes must cover.
    library_size_key
        ``.obs`` column with each cell's total UMIs, for data that hold a gene panel only.
    copy
        Return a copy with the result instead of writing into ``adata``.

    Returns
    -------
    AnnData or None
        ``.obsm[key_added]`` ``(n_obs, n_latent)`` float32; ``.uns["scdiva"]["embed"][key_added]``: model, hash,
        vocabulary, coverage, where the counts were, version.

    Raises
    ------
    SourceError, ScaleError, GeneError, KeyNotFoundError
        The data cannot be used; nothing is written. ``sd.pp.check(adata)`` tells more.
    """
    _check_key(key_added)
    _check_adata(adata, copy=copy)
    result = _run(
        adata,
        model,
        layer=layer,
        batch_size=batch_size,
        denoise=denoise,
        min_coverage=min_coverage,
        library_size_key=library_size_key,
    )[1]
    target = adata.copy() if copy else adata
    target.obsm[key_added] = result.z
    if result.denoised is not None:
        target.layers["scdiva_denoised"] = result.denoised
    earlier = target.uns.get("scdiva", {})
    records = {**earlier.get("embed", {}), key_added: dict(result.record)}
    target.uns["scdiva"] = {**earlier, "embed": records}
    return target if copy else None


def embed_file(
    path_in: str | Path,
    path_out: str | Path,
    model: Embedder,
    *,
    layer: str | None = None,
    key_added: str = "X_scdiva",
    batch_size: BatchSize = "auto",
    denoise: Sequence[str] = (),
    min_coverage: float = MIN_COVERAGE,
    library_size_key: str | None = None,
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> Embedding:
    """Embed the cells of a file in flat memory and write a copy of the file with the result.

    Everything as in :func:`embed`; ``X`` stays on disk and the output appears whole or not at all.

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
    _check_key(key_added)
    target = Path(path_out)
    check_output(target, overwrite=overwrite)
    check_recorded_in(Path(path_in))
    reader, result = _run(
        path_in,
        model,
        layer=layer,
        batch_size=batch_size,
        denoise=denoise,
        min_coverage=min_coverage,
        library_size_key=library_size_key,
        on_block=on_block,
    )
    slots: dict[str, Any] = {f"obsm/{key_added}": result.z, f"uns/scdiva/embed/{key_added}": dict(result.record)}
    if result.denoised is not None:
        slots["layers/scdiva_denoised"] = result.denoised
    write_with_slots(reader.source, target, slots)
    return result


def _check_key(key: str) -> None:
    if not key or "/" in key:
        raise OutputError(f"key_added={key!r}", expected="a name without '/'", fix="for example X_scdiva")


def _check_adata(adata: Any, *, copy: bool) -> None:
    # deferred: importing anndata takes a second that `--help` need not wait for
    import anndata as ad

    if not isinstance(adata, ad.AnnData):
        raise SourceError(
            f"a {type(adata).__name__} is no AnnData", expected="an AnnData", fix="sd.tl.embed_file takes paths"
        )
    if adata.isbacked and (adata.is_view or copy):
        raise SourceError(
            "a view or a copy of a backed AnnData cannot take the result",
            expected="an AnnData in memory, or a whole backed one",
            fix="adata = adata.to_memory(), or sd.tl.embed_file",
        )
    check_record(adata.uns.get("scdiva", {}))


def _run(
    data: Any, model: Embedder, *, layer: str | None, library_size_key: str | None, min_coverage: float, **rest: Any
) -> Any:
    if not isinstance(model, Embedder):
        raise BundleError(
            f"a {type(model).__name__} is no model that embeds",
            expected="a model",
            fix="model = sd.ScDiVa.from_pretrained(...)",
        )
    source = open_source(data)
    reader = open_counts(
        source, model.vocabulary, layer=layer, library_size_key=library_size_key, min_coverage=min_coverage
    )
    return reader, _embed(reader, model, **rest)


def reconstruct(
    adata: AnnData,
    model: Reconstructor,
    *,
    mask_ratios: Sequence[float] = MASK_RATIOS,
    seed: int = 0,
    n_cells: int | None = None,
    reference: DataLike | None = None,
    labels_key: str | None = None,
    max_tokens: int = MAX_TOKENS,
    layer_ratio: float | None = None,
    layer: str | None = None,
    key_added: str = "scdiva_reconstructed",
    batch_size: BatchSize = "auto",
    min_coverage: float = MIN_COVERAGE,
    library_size_key: str | None = None,
) -> Reconstruction:
    """Hide part of every cell, and compare what a model and simple guesses make of it with the truth.

    Parameters
    ----------
    adata
        Raw counts in ``X``, a layer or ``.raw``; they are found, or named by ``layer``.
    model
        From ``sd.ScDiVa.from_pretrained``; nothing is trained.
    mask_ratios
        Shares of hidden tokens, gene and value together.
    seed
        Of the masks (each cell's by its position alone), of the choice of cells and of the null control.
    n_cells
        Judge a random choice of this many cells; None: all.
    reference
        Cells (AnnData or path) that the simple guesses know; None: for each cell all others of ``adata``.
    labels_key
        Column of ``.obs`` with cell types: one more guess, which is told them.
    max_tokens
        Length L to which sequences are cut before they are compared.
    layer_ratio
        One of ``mask_ratios``: write the cells as reconstructed at this share to ``.layers[key_added]``.
    layer
        Layer with the counts; ``"raw"`` for ``adata.raw``.
    key_added
        Name of the record, and of the layer.
    batch_size
        Cells at a time; no influence on the result.
    min_coverage
        Smallest share of UMIs that the model's genes must cover.
    library_size_key
        ``.obs`` column with each cell's total UMIs (of the reference, too), for data that hold a gene panel only.

    Returns
    -------
    Reconstruction
        ``.to_markdown()`` and ``.to_json()`` show the table. ``.uns["scdiva"]["reconstruct"][key_added]`` gets the
        record, with the rows as ``"table"``, and, if asked for, the layer log1p(CP10K): visible genes as observed, and
        as many genes as were hidden, those that the model holds most probable, with the values it expects.

    Raises
    ------
    SourceError, ScaleError, GeneError, KeyNotFoundError, ConfigError, OutputError
        Data or settings cannot be used; nothing is written.
    UntrainedHeadError, UnsupportedError
        The model cannot say what is hidden.
    """
    _check_key(key_added)
    _check_adata(adata, copy=False)
    earlier = adata.uns.get("scdiva", {})
    _check_reconstructions(earlier.get("reconstruct", {}))
    result = _run_reconstruct(
        adata,
        model,
        reference,
        mask_ratios=mask_ratios,
        seed=seed,
        n_cells=n_cells,
        labels_key=labels_key,
        max_tokens=max_tokens,
        layer_ratio=layer_ratio,
        layer=layer,
        batch_size=batch_size,
        min_coverage=min_coverage,
        library_size_key=library_size_key,
    )[1]
    if result.reconstructed is not None:
        adata.layers[key_added] = result.reconstructed
    records = {**earlier.get("reconstruct", {}), key_added: {**result.record, "table": result.table()}}
    adata.uns["scdiva"] = {**earlier, "reconstruct": records}
    return result


def reconstruct_file(
    path_in: str | Path,
    path_out: str | Path,
    model: Reconstructor,
    *,
    mask_ratios: Sequence[float] = MASK_RATIOS,
    seed: int = 0,
    n_cells: int | None = None,
    reference: DataLike | None = None,
    labels_key: str | None = None,
    max_tokens: int = MAX_TOKENS,
    layer_ratio: float | None = None,
    layer: str | None = None,
    key_added: str = "scdiva_reconstructed",
    batch_size: BatchSize = "auto",
    min_coverage: float = MIN_COVERAGE,
    library_size_key: str | None = None,
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> Reconstruction:
    """Do the same with the cells of a file; the judged cells stay on disk, the reference is read.

    Everything as in :func:`reconstruct`; the output appears whole or not at all.

    Parameters
    ----------
    path_in
        ``.h5ad``, ``.zarr``, 10x ``.h5`` or 10x mtx folder.
    path_out
        ``.json`` or ``.md`` for the table alone; ``.h5ad`` or ``.zarr`` for a copy of the file with record and layer.
    overwrite
        Replace an existing output.
    on_block
        Called with the number of cells done, for progress.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist; raised before any work is done.
    """
    _check_key(key_added)
    target = Path(path_out)
    is_table = target.suffix in (".json", ".md")
    if is_table:
        _check_table(target, layer_ratio=layer_ratio, overwrite=overwrite)
    else:
        check_output(target, overwrite=overwrite)
        check_recorded_in(Path(path_in))
    reader, result = _run_reconstruct(
        path_in,
        model,
        reference,
        mask_ratios=mask_ratios,
        seed=seed,
        n_cells=n_cells,
        labels_key=labels_key,
        max_tokens=max_tokens,
        layer_ratio=layer_ratio,
        layer=layer,
        batch_size=batch_size,
        min_coverage=min_coverage,
        library_size_key=library_size_key,
        on_block=on_block,
    )
    if is_table:
        with replacing(target) as partial:
            partial.write_text(
                result.to_json() + "\n" if target.suffix == ".json" else result.to_markdown(), encoding="utf-8"
            )
        return result
    record = {**result.record, "table": result.table()}
    slots: dict[str, Any] = {f"uns/scdiva/reconstruct/{key_added}": record}
    if result.reconstructed is not None:
        slots[f"layers/{key_added}"] = result.reconstructed
    write_with_slots(reader.source, target, slots)
    return result


def _check_reconstructions(slot: Any) -> None:
    if not isinstance(slot, Mapping):
        raise OutputError(
            f".uns['scdiva']['reconstruct'] holds a {type(slot).__name__} that is not ours",
            expected="nothing, or the dictionary that scdiva writes",
            fix="rename or delete it: del adata.uns['scdiva']['reconstruct']",
        )


def _check_table(path: Path, *, layer_ratio: float | None, overwrite: bool) -> None:
    if layer_ratio is not None:
        raise ConfigError(
            f"a layer in {path.name}",
            expected="an output ending in .h5ad or .zarr",
            fix="rename it, or ask for no layer",
        )
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", expected="a folder", fix="create it first")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists", expected="a new file", fix="name another one, or pass --overwrite")


def _run_reconstruct(
    data: Any,
    model: Reconstructor,
    reference: DataLike | None,
    *,
    layer: str | None,
    library_size_key: str | None,
    min_coverage: float,
    **rest: Any,
) -> Any:
    if not isinstance(model, Reconstructor):
        raise BundleError(
            f"a {type(model).__name__} is no model that says what is hidden",
            expected="a model",
            fix="model = sd.ScDiVa.from_pretrained(...)",
        )
    options: dict[str, Any] = {"library_size_key": library_size_key, "min_coverage": min_coverage}
    reader = open_counts(open_source(data), model.vocabulary, layer=layer, **options)
    known = None if reference is None else open_counts(open_source(reference), model.vocabulary, **options)
    return reader, _reconstruct(reader, model, reference=known, **rest)


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
    _check_key(key_added)
    _check_adata(adata, copy=copy)
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
    _check_key(key_added)
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


def generate(
    model: ScDiVa,
    n_cells: int | None = None,
    *,
    condition: Mapping[str, str] | DataFrame | None = None,
    weight: float | Mapping[str, float] = 1.0,
    like: DataLike | None = None,
    latent: LatentName | LatentPrior = DEFAULT_LATENT,
    n_genes: ArrayLike | None = None,
    n_umis: ArrayLike | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    normalize: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> AnnData:
    """Generate cells.

    Parameters
    ----------
    model
        From ``sd.ScDiVa.from_pretrained``; for cell types of your own, fine-tune one first (``scdiva finetune FILE
        --objective conditional --condition cell_type --out DIR``).
    n_cells
        Number of cells. Left out where ``condition`` has a row per cell, or for one variation of each cell of ``like``.
    condition
        What the cells are to be: a label for each wanted field (``{"cell_type": "B cell"}``), or a table with one row
        per cell. Fields that are left out are unknown to the network. ``model.labels`` lists fields and labels.
    weight
        Guidance weight of all wanted fields, or of each. 1 is plain conditioning; above 1 cells become more typical of
        their condition and less varied; 0 ignores it towards the end.
    like
        Real raw counts, an AnnData or a path: cells are generated from the z, with the size and the genes of these
        (variations of a cell).
    latent
        Where z comes from otherwise: ``"prior"``, drawn from a Gaussian mixture of the condition's training cells;
        ``"visible"``, pooled from the genes that are visible so far; ``"null"``, a learned constant; or any object with
        ``sample(condition, sizes, rng)`` and ``view_share`` (``scdiva.types.LatentPrior``).
    n_genes, n_umis
        Genes and UMIs of each cell, one number or one per cell. Left out, both are drawn jointly from those of training
        cells of the condition; given one, the other is drawn from cells near it. The UMIs are told to the network;
        nothing forces the counts to add up to them.
    sampler
        How the sets are drawn (``sd.Sampler``): strategy, steps, grid, Gibbs rounds.
    seed
        Equal seeds give equal cells on the same kind of machine.
    batch_size
        Cells between two calls of ``on_block``; no influence on the result.
    normalize
        Also fill ``.layers["log1p_cp10k"]``.
    on_block
        Called with the number of cells done, for progress.

    Returns
    -------
    AnnData
        ``X`` CSR int32 counts; ``.obs``: the wanted labels, ``scdiva_n_genes`` and ``scdiva_n_umis`` (what the network
        was told), ``scdiva_synthetic`` (True); ``.var``: the genes of the vocabulary; ``.uns["scdiva"]["generate"]``:
        model, hash, seed, settings, and notes on what no training cell had.

    Raises
    ------
    KeyNotFoundError
        A field or label that the model does not know; lists those it knows.
    ConfigError, BundleError, UnsupportedError, UntrainedHeadError
        See :func:`scdiva.tasks.generate.plan_cells`.
    """
    size = _generated_at_once(batch_size)
    plan = _plan(model, n_cells, condition, weight, like, latent, n_genes, n_umis, sampler, seed)
    cells = _generate(model, plan, batch_size=size, on_block=on_block)
    if normalize:
        cells.layers["log1p_cp10k"] = _log1p_cp10k(cells.X)
    return cells


def generate_file(
    path_out: str | Path,
    model: ScDiVa,
    n_cells: int | None = None,
    *,
    condition: Mapping[str, str] | DataFrame | None = None,
    weight: float | Mapping[str, float] = 1.0,
    like: DataLike | None = None,
    latent: LatentName | LatentPrior = DEFAULT_LATENT,
    n_genes: ArrayLike | None = None,
    n_umis: ArrayLike | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> Plan:
    """Generate cells into a file in flat memory; the same call resumes where an interrupted one stopped.

    Everything as in :func:`generate`.

    Parameters
    ----------
    path_out
        ``.h5ad`` or ``.zarr``; appears whole or not at all. Finished blocks of 4,096 cells wait in a hidden folder
        beside it.
    overwrite
        Replace an existing output.

    Returns
    -------
    Plan
        What was drawn: conditions, sizes, notes.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist; raised before any work is done.
    """
    target = Path(path_out)
    check_output(target, overwrite=overwrite)
    size = _generated_at_once(batch_size)
    plan = _plan(model, n_cells, condition, weight, like, latent, n_genes, n_umis, sampler, seed)
    _generate_file(model, plan, target, batch_size=size, overwrite=overwrite, on_block=on_block)
    return plan


_GENERATED = 256
"""Cells between two signs of progress."""


def _generated_at_once(batch_size: BatchSize) -> int:
    if batch_size != "auto" and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}", expected="'auto' or a positive number", fix="leave it out")
    return _GENERATED if batch_size == "auto" else batch_size


def _plan(
    model: ScDiVa,
    n_cells: int | None,
    condition: Mapping[str, str] | DataFrame | None,
    weight: float | Mapping[str, float],
    like: DataLike | None,
    latent: LatentName | LatentPrior,
    n_genes: ArrayLike | None,
    n_umis: ArrayLike | None,
    sampler: Sampler | None,
    seed: int,
) -> Plan:
    cells = None
    if like is not None:
        reader = open_counts(open_source(like), model.vocabulary)
        cells = reader.read(np.arange(len(reader)))
    return plan_cells(
        model,
        condition,
        n_cells,
        weight=weight,
        latent=latent,
        like=cells,
        n_genes=n_genes,
        n_umis=n_umis,
        sampler=sampler,
        seed=seed,
    )


def _log1p_cp10k(counts: Any) -> Any:
    values = counts.astype(np.float32)
    total = np.asarray(values.sum(axis=1)).ravel()
    values.data = np.log1p(values.data * np.repeat(1e4 / np.maximum(total, 1.0), np.diff(values.indptr)))
    return values


def annotate(
    adata: AnnData,
    model: Embedder,
    reference: DataLike | CellTyper,
    label_key: str | None = None,
    *,
    method: Method = "probe",
    layer: str | None = None,
    self_training: bool | Literal["auto"] = "auto",
    confidence: float = CONFIDENCE,
    copy: bool = False,
    **options: Any,
) -> AnnData | None:
    """Annotate cells with the types of a labelled reference.

    Parameters
    ----------
    adata
        Raw counts in ``X``, a layer or ``.raw``; they are found, or named by ``layer``. ``X`` is not changed.
    model
        From ``sd.ScDiVa.from_pretrained``.
    reference
        Labelled cells (AnnData or path), or what :func:`fit_cell_typer` returned.
    label_key
        Column of the reference's ``.obs``; only with cells.
    method
        "probe": regressions on the frozen embedding and on the data's own components, chosen by cross-validation on the
        reference. "reference": nearest neighbours in the embedding, nothing is trained. "finetune": the last layers of
        the trunk and a head are trained. "lora": adapters on all layers, and a head. The last two take minutes.
    layer
        Layer with the counts of ``adata``; ``"raw"`` for ``adata.raw``.
    self_training, confidence
        As in :func:`scdiva.tasks.annotate.annotate`.
    copy
        Return a copy with the result instead of writing into ``adata``.
    **options
        Of :func:`fit_cell_typer`: ``ontology``, ``tissue``, ``is_balanced``, ``false_unknown_rate``, ``fine_tuning``
        (``sd.tl.FineTuning(epochs=...)``), ``seed``.

    Returns
    -------
    AnnData or None
        ``.obs``: ``scdiva_cell_type``, ``scdiva_confidence`` (calibrated probability), ``scdiva_second_cell_type``,
        ``scdiva_novelty``, ``scdiva_unknown``, ``scdiva_ontology_id``, ``scdiva_ontology_label``;
        ``.obsm["scdiva_cell_type_probability"]`` (a table, one column per type); ``.uns["scdiva"]["annotate"]``.

    Raises
    ------
    SourceError, ScaleError, GeneError, KeyNotFoundError, BundleError, ConfigError, UnsupportedError
        The data, the reference or, for fine-tuning, the model cannot be used; nothing is written.
    """
    _check_adata(adata, copy=copy)
    typer = _cell_typer(adata, layer, model, reference, label_key, method, options)
    found = _annotate(adata, model, typer, layer=layer, self_training=self_training, confidence=confidence)
    target = adata.copy() if copy else adata
    columns = found.to_obs(target.obs_names)
    for name in columns:
        target.obs[name] = columns[name]
    target.obsm["scdiva_cell_type_probability"] = _probability_table(found, target.obs_names)
    target.uns["scdiva"] = {**target.uns.get("scdiva", {}), "annotate": dict(found.record)}
    return target if copy else None


def annotate_file(
    path_in: str | Path,
    path_out: str | Path,
    model: Embedder,
    reference: DataLike | CellTyper,
    label_key: str | None = None,
    *,
    method: Method = "probe",
    layer: str | None = None,
    self_training: bool | Literal["auto"] = "auto",
    confidence: float = CONFIDENCE,
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
    **options: Any,
) -> tuple[Annotation, CellTyper]:
    """Annotate the cells of a file and write a copy of it with the result; everything as in :func:`annotate`.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist; raised before any work is done.
    """
    target = Path(path_out)
    check_output(target, overwrite=overwrite)
    check_recorded_in(Path(path_in))
    typer = _cell_typer(path_in, layer, model, reference, label_key, method, options)
    found = _annotate(
        path_in, model, typer, layer=layer, self_training=self_training, confidence=confidence, on_block=on_block
    )
    source = open_source(path_in)
    columns = found.to_obs(source.obs.index)
    slots: dict[str, Any] = {
        "obs": source.obs.assign(**{str(name): columns[name] for name in columns}),
        "obsm/scdiva_cell_type_probability": _probability_table(found, source.obs.index),
        "uns/scdiva/annotate": dict(found.record),
    }
    write_with_slots(source, target, slots)
    return found, typer


def _cell_typer(
    query: DataLike,
    query_layer: str | None,
    model: Embedder,
    reference: DataLike | CellTyper,
    label_key: str | None,
    method: Method,
    options: Mapping[str, Any],
) -> CellTyper:
    if isinstance(reference, CellTyper):
        if label_key is not None or options:
            raise ConfigError(
                f"{', '.join(['label_key', *options])} with an annotator that is fitted already",
                expected="labelled cells as the reference, or nothing but the annotator",
                fix="leave them out",
            )
        return reference
    if label_key is None:
        raise ConfigError("no label_key", expected="the column of the reference's .obs with labels", fix="name it")
    given = {"method": method, "query": query, "query_layer": query_layer, **options}
    return fit_cell_typer(reference, model, label_key, **given)


def _probability_table(found: Annotation, index: Any) -> DataFrame:
    import pandas as pd

    return pd.DataFrame(found.probability, columns=list(found.classes), index=index)
