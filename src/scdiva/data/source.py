"""Sources of cells: AnnData in memory, ``.h5ad`` and ``.zarr`` without loading X, 10x ``.h5`` and mtx folders.

A source knows its matrices by name ("X", "layers['counts']", "raw.X") and reads rows of one of them. It says nothing
about genes or scales: that is the reader's work.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.errors import KeyNotFoundError, SourceError

if TYPE_CHECKING:
    from anndata import AnnData

    DataLike: TypeAlias = "AnnData | str | Path"

_SUPPORTED = "an AnnData, an .h5ad or .zarr file, a 10x .h5 file or a 10x mtx folder"


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix of a source: rows are cells.

    Parameters
    ----------
    name
        How a user finds it: "X", "layers['counts']", "raw.X".
    values
        In-memory CSR/CSC/array, a backed sparse dataset, or a dense dataset on disk.
    var
        Its genes, one row per column.
    """

    name: str
    values: Any
    var: pd.DataFrame

    @property
    def shape(self) -> tuple[int, int]:
        """``(n_cells, n_features)``."""
        return (int(self.values.shape[0]), int(self.values.shape[1]))

    def rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Read rows ``start:stop`` as CSR with sorted indices."""
        try:
            rows = self.values[start:stop]
        except (OSError, RuntimeError) as error:  # the file opened well, but a chunk in it cannot be decompressed
            raise SourceError(
                f"rows {start} to {stop} of {self.name} cannot be read ({str(error).splitlines()[0][:120]})",
                expected="an undamaged file",
                fix="copy or download it again",
            ) from error
        return _as_csr(rows)

    def take(self, indices: NDArray[np.integer]) -> sp.csr_matrix:
        """Read the given rows, in the given order; contiguous runs are read in one go."""
        indices = np.asarray(indices)
        if indices.size == 0:
            return self.rows(0, 0)
        is_in_memory = sp.issparse(self.values) or isinstance(self.values, np.ndarray)
        if is_in_memory:
            return _as_csr(self.values[indices])
        order = np.argsort(indices, kind="stable")
        ordered = indices[order]
        starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 2) != 1)
        stops = np.append(starts[1:], ordered.size)
        runs = [self.rows(int(ordered[a]), int(ordered[b - 1]) + 1) for a, b in zip(starts, stops, strict=True)]
        stacked = sp.vstack(runs, format="csr")
        inverse = np.empty_like(order)
        inverse[order] = np.arange(order.size)
        return sp.csr_matrix(stacked[inverse])


@dataclass(frozen=True, slots=True)
class CellSource:
    """Cells with their annotation and one or more matrices.

    Parameters
    ----------
    name
        Short name for messages and provenance (a file's stem, or "AnnData").
    path
        Where it was read from; ``None`` for an AnnData in memory.
    obs
        Annotation of the cells, indexed by cell name.
    matrices
        By name, "X" first.
    """

    name: str
    path: Path | None
    obs: pd.DataFrame
    matrices: Mapping[str, Matrix]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self.obs)

    def matrix(self, layer: str | None) -> Matrix:
        """Return X (``layer=None``), a layer, or ``raw.X`` (``layer="raw"``).

        Raises
        ------
        KeyNotFoundError
            There is no such matrix; the error lists those there are.
        """
        for name in ([f"layers[{layer!r}]", "raw.X" if layer == "raw" else ""]) if layer is not None else ["X"]:
            if name in self.matrices:
                return self.matrices[name]
        wanted = "X" if layer is None else f"layer {layer!r}"
        raise KeyNotFoundError(
            f"{self.name} has no {wanted}",
            expected=f"one of {', '.join(self.matrices) or 'no matrix at all'}",
            fix="name an existing layer, or leave it out to have the counts found",
        )

    def column(self, key: str) -> pd.Series:
        """Return one ``.obs`` column; KeyNotFoundError lists those there are."""
        if key not in self.obs.columns:
            raise KeyNotFoundError(
                f"{self.name} has no .obs column {key!r}",
                expected=f"one of {', '.join(map(str, self.obs.columns[:20])) or 'none'}",
                fix="name an existing column",
            )
        return self.obs[key]


def open_source(data: DataLike) -> CellSource:
    """Open cells for reading; X of an ``.h5ad`` or ``.zarr`` stays on disk.

    Parameters
    ----------
    data
        An AnnData (in memory or backed) or the path of an ``.h5ad``, ``.zarr``, 10x ``.h5`` or 10x mtx folder.

    Returns
    -------
    CellSource

    Raises
    ------
    SourceError
        The file is missing, truncated, of another kind, or holds no cells, no genes or duplicated cell names.
    """
    # deferred: importing anndata takes a second that `--help` need not wait for
    import anndata as ad

    if isinstance(data, ad.AnnData):
        source = _from_anndata(data, name="the AnnData", path=None)
    elif isinstance(data, (str, Path)):
        source = _from_path(Path(data))
    else:
        raise SourceError(
            f"a {type(data).__name__} is no source of cells", expected=_SUPPORTED, fix="wrap the matrix in an AnnData"
        )
    return _validated(source)


def _from_path(path: Path) -> CellSource:
    if not path.exists():
        raise SourceError(f"{path} does not exist", expected=_SUPPORTED, fix="check the path")
    if path.is_dir():
        if (path / "zarr.json").exists() or (path / ".zgroup").exists() or path.suffix == ".zarr":
            return _from_zarr(path)
        if any(path.glob("*matrix.mtx*")):
            return _from_10x(path, reader="read_10x_mtx")
        raise SourceError(
            f"the folder {path} is neither a .zarr store nor a 10x mtx folder",
            expected=_SUPPORTED,
            fix="give a file; folders of several files are accepted where a corpus is expected (pretrain)",
        )
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty (0 bytes)", expected=_SUPPORTED, fix="copy or download it again")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        kind = "is truncated or damaged" if path.suffix in (".h5ad", ".h5") else "is not an HDF5 file"
        raise SourceError(
            f"{path} {kind} ({str(error).splitlines()[0][:120]})",
            expected=_SUPPORTED,
            fix="copy or download it again" if path.suffix in (".h5ad", ".h5") else "convert it to .h5ad",
        ) from error
    if "obs" in file and "var" in file:
        return _from_group(file, path, path.stem)
    keys = sorted(file.keys())
    file.close()
    if "matrix" in keys or _is_old_10x(path, keys):
        return _from_10x(path, reader="read_10x_h5")
    raise SourceError(
        f"{path} is an HDF5 file but neither AnnData nor 10x (it holds {', '.join(keys[:8]) or 'nothing'})",
        expected=_SUPPORTED,
        fix="write it with adata.write_h5ad()",
    )


def _is_old_10x(path: Path, keys: list[str]) -> bool:
    """Tell Cell Ranger 2 output, which has one group per genome; several genomes in one file are not read."""
    if len(keys) != 1:
        return False
    with h5py.File(path, "r") as file:
        group = file[keys[0]]
        return isinstance(group, h5py.Group) and {"barcodes", "data", "indices", "indptr"} <= set(group)


def _from_zarr(path: Path) -> CellSource:
    import zarr

    try:
        group = zarr.open_group(path, mode="r")
        has_parts = "obs" in group and "var" in group
    except Exception as error:  # zarr raises many kinds of errors for a damaged store
        raise SourceError(
            f"{path} cannot be opened as zarr ({str(error).splitlines()[0][:120]})",
            expected=_SUPPORTED,
            fix="write it with adata.write_zarr()",
        ) from error
    if not has_parts:
        raise SourceError(
            f"{path} is a zarr store but not AnnData", expected=_SUPPORTED, fix="write it with adata.write_zarr()"
        )
    return _from_group(group, path, path.stem)


def _from_group(group: Any, path: Path, name: str) -> CellSource:
    """Read obs and var of an AnnData on disk; leave the matrices there."""
    from anndata.io import read_elem

    try:
        obs, var = read_elem(group["obs"]), read_elem(group["var"])
        matrices: dict[str, Matrix] = {}
        if "X" in group:
            matrices["X"] = Matrix("X", _on_disk(group["X"], "X"), var)
        for key in sorted(group["layers"].keys()) if "layers" in group else []:
            label = f"layers[{key!r}]"
            matrices[label] = Matrix(label, _on_disk(group["layers"][key], label), var)
        # an absent .raw may also be there, as an empty element that is no group
        if "raw" in group and hasattr(group["raw"], "keys") and "X" in group["raw"]:
            raw_var = read_elem(group["raw"]["var"])
            matrices["raw.X"] = Matrix("raw.X", _on_disk(group["raw"]["X"], "raw.X"), raw_var)
    except SourceError:
        raise
    except Exception as error:  # a damaged or foreign file can fail anywhere in its parts
        raise SourceError(
            f"{path} cannot be read as AnnData ({type(error).__name__}: {str(error).splitlines()[0][:120]})",
            expected=_SUPPORTED,
            fix="copy it again, or re-save it with a current anndata",
        ) from error
    return CellSource(name, path, obs, matrices)


def _on_disk(element: Any, name: str) -> Any:
    """Return a row-sliceable view of a matrix on disk; columns-first sparse matrices are loaded."""
    from anndata.io import sparse_dataset

    if not hasattr(element, "keys"):
        if element.dtype == object or element.dtype.kind in "OSU":
            raise SourceError(
                f"{name} holds {element.dtype} values, not numbers",
                expected="a numeric matrix of raw counts",
                fix="convert it, e.g. adata.X = adata.X.astype('float32')",
            )
        return element
    dataset = sparse_dataset(element)
    if dataset.format != "csr":
        # rows of a CSC matrix are scattered over the whole file: reading it once beats reading it per block
        return sp.csr_matrix(dataset.to_memory())
    return dataset


def _from_10x(path: Path, reader: str) -> CellSource:
    import scanpy as sc

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Variable names are not unique": alignment deals with it, and counts
            if reader == "read_10x_h5":
                adata = sc.read_10x_h5(path, gex_only=False)
            else:
                prefix = _only_prefix(path)
                adata = sc.read_10x_mtx(path, gex_only=False, make_unique=False, prefix=prefix or None)
    except SourceError:
        raise
    except Exception as error:  # scanpy raises many kinds of errors for damaged 10x output
        raise SourceError(
            f"{path} cannot be read as 10x output ({type(error).__name__}: {str(error).splitlines()[0][:120]})",
            expected="a Cell Ranger .h5 file, or a folder with matrix.mtx, barcodes.tsv and features.tsv (or .gz)",
            fix="copy all three files, or give the .h5 file",
        ) from error
    # all of Cell Ranger's folders have the same few names: the sample is named by the folder around them
    is_generic = path.name.startswith(("filtered_", "raw_", "sample_"))
    return _from_anndata(adata, name=f"{path.parent.name}/{path.stem}" if is_generic else path.stem, path=path)


def _only_prefix(folder: Path) -> str:
    """Return what stands before "matrix.mtx" (GEO puts the sample there); several samples are no source."""
    prefixes = sorted({file.name.split("matrix.mtx")[0] for file in folder.glob("*matrix.mtx*")})
    if len(prefixes) > 1:
        raise SourceError(
            f"the folder {folder} holds the matrices of {len(prefixes)} samples ({', '.join(prefixes[:5])})",
            expected="one matrix.mtx",
            fix="put each sample into a folder of its own",
        )
    return prefixes[0]


def _from_anndata(adata: AnnData, name: str, path: Path | None) -> CellSource:
    matrices: dict[str, Matrix] = {}
    if adata.X is not None:
        matrices["X"] = Matrix("X", adata.X, adata.var)
    for key in sorted(adata.layers.keys()):
        label = f"layers[{key!r}]"
        matrices[label] = Matrix(label, adata.layers[key], adata.var)
    if adata.raw is not None:
        matrices["raw.X"] = Matrix("raw.X", adata.raw.X, adata.raw.var)
    return CellSource(name, path, adata.obs, matrices)


def _validated(source: CellSource) -> CellSource:
    name = source.name if source.path is None else str(source.path)
    if not source.matrices:
        raise SourceError(f"{name} has no X and no layers", expected="a matrix of raw counts", fix="store counts in X")
    for matrix in source.matrices.values():
        if matrix.shape != (source.n_cells, len(matrix.var)):
            raise SourceError(
                f"{name}: {matrix.name} has shape {matrix.shape}, but there are {source.n_cells} cells in .obs and "
                f"{len(matrix.var)} genes in .var",
                expected="matching shapes",
                fix="the file is damaged: write it again",
            )
    if source.n_cells == 0:
        raise SourceError(f"{name} holds 0 cells", expected="at least one cell", fix="check earlier filtering")
    if all(matrix.shape[1] == 0 for matrix in source.matrices.values()):
        raise SourceError(f"{name} holds 0 genes", expected="at least one gene", fix="check earlier filtering")
    duplicated = source.obs.index[source.obs.index.duplicated()]
    if len(duplicated):
        raise SourceError(
            f"{name} has {len(duplicated)} duplicated cell names (e.g. {str(duplicated[0])!r})",
            expected="unique .obs_names",
            fix="adata.obs_names_make_unique(), or add the sample name to the barcodes",
        )
    return source


def _as_csr(rows: Any) -> sp.csr_matrix:
    """Return rows as a CSR matrix with sorted indices and no explicit zeros; the input stays as it is."""
    if isinstance(rows, np.ndarray) and rows.dtype == object:
        raise SourceError(
            "the matrix holds Python objects, not numbers",
            expected="a numeric matrix of raw counts",
            fix="convert it, e.g. adata.X = adata.X.astype('float32')",
        )
    csr = sp.csr_matrix(rows)
    shares_memory = sp.issparse(rows) and csr.data is getattr(rows, "data", None)
    if not csr.has_canonical_format or (csr.data == 0).any():
        csr = csr.copy() if shares_memory else csr
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return csr
