"""``tl.embed``: the latent z of every cell."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdiva.data.output import check_output, check_recorded_in, write_with_slots
from scdiva.data.reader import MIN_COVERAGE, open_counts
from scdiva.data.source import open_source
from scdiva.errors import BundleError
from scdiva.models.base import Embedder
from scdiva.tasks.embed import BatchSize, Embedding
from scdiva.tasks.embed import embed as _embed

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

from scdiva.tl.common import check_adata, check_key


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
    check_key(key_added)
    check_adata(adata, copy=copy)
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
    check_key(key_added)
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
