"""``tl.reconstruct``: hidden genes and values, predicted and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdiva.data.output import check_output, check_recorded_in, replacing, write_with_slots
from scdiva.data.reader import MIN_COVERAGE, open_counts
from scdiva.data.source import open_source
from scdiva.errors import BundleError, ConfigError, OutputError
from scdiva.models.base import Reconstructor
from scdiva.serialization import MAX_TOKENS
from scdiva.tasks.embed import BatchSize
from scdiva.tasks.reconstruct import MASK_RATIOS, Reconstruction
from scdiva.tasks.reconstruct import reconstruct as _reconstruct

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

    from scdiva.data.source import DataLike
from scdiva.tl.common import check_adata, check_key


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
    check_key(key_added)
    check_adata(adata, copy=False)
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
    check_key(key_added)
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
