"""Results into files: the input file with new slots, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from scdiva.data.source import CellSource
from scdiva.errors import OutputError


def check_output(path: Path, *, overwrite: bool) -> None:
    """Refuse an output path before any work is done.

    Raises
    ------
    OutputError
        The file exists (without ``overwrite``), its folder does not, or it is neither ``.h5ad`` nor ``.zarr``.
    """
    if path.suffix not in (".h5ad", ".zarr"):
        raise OutputError(f"output {path.name!r}", expected="a name ending in .h5ad or .zarr", fix="rename it")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", expected="a folder", fix="create it first")
    if path.is_dir() and not ((path / "zarr.json").exists() or (path / ".zgroup").exists()):
        raise OutputError(f"{path} is a folder, but no zarr store", expected="a new file", fix="name another one")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists", expected="a new file", fix="name another one, or pass --overwrite")


def check_record(slot: Any) -> None:
    """Refuse an ``.uns["scdiva"]`` that is somebody else's.

    Raises
    ------
    OutputError
        It is not a dictionary.
    """
    if not isinstance(slot, Mapping) or not isinstance(slot.get("embed", {}), Mapping):
        raise OutputError(
            f".uns['scdiva'] holds a {type(slot).__name__} that is not ours",
            expected="nothing, or the dictionary that scdiva writes",
            fix="rename or delete it: del adata.uns['scdiva']",
        )


def check_recorded_in(path: Path) -> None:
    """Refuse a file whose ``.uns["scdiva"]`` is somebody else's; anything that is no AnnData on disk passes."""
    if path.suffix == ".h5ad" and path.is_file() and h5py.is_hdf5(path):
        try:
            with h5py.File(path, "r") as file:
                slot = file.get("uns/scdiva")
                is_ours = slot is None or isinstance(slot, h5py.Group)
        except OSError:  # a damaged file: opening it as a source says so, with its name
            return
    elif path.suffix == ".zarr" and path.is_dir():
        is_ours = not (path / "uns" / "scdiva").is_dir() or _is_zarr_group(path / "uns" / "scdiva")
    else:
        return
    if not is_ours:
        check_record(None)


def _is_zarr_group(path: Path) -> bool:
    import zarr

    return isinstance(zarr.open(path, mode="r"), zarr.Group)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when the block ends well, and vanishes otherwise.

    The block may make a file or a folder of it. An old folder is moved aside before the new one takes its place, and
    removed after.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    partial = folder / path.name
    try:
        yield partial
        if partial.is_file():
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        aside = folder / "old"
        if path.is_dir():
            path.rename(aside)
        try:
            partial.replace(path)
        except BaseException:
            if aside.exists():
                aside.rename(path)
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_with_slots(source: CellSource, path: Path, slots: Mapping[str, Any]) -> None:
    """Write a source with additional slots to a file; X is copied on disk, not loaded, unless the format changes.

    Parameters
    ----------
    source
        The cells, opened from a file.
    path
        Where to write: ``.h5ad`` or ``.zarr``. May be the source's own path.
    slots
        Key in the file ("obsm/X_scdiva", "uns/scdiva/embed", "layers/scdiva_denoised") to value.
    """
    from anndata.io import write_elem

    same_kind = source.path is not None and source.path.suffix == path.suffix
    with replacing(path) as partial:
        if same_kind and path.suffix == ".h5ad":
            shutil.copyfile(str(source.path), partial)
        elif same_kind:
            shutil.copytree(str(source.path), partial)
        else:
            _write_anew(source, partial)
        if path.suffix == ".h5ad":
            with h5py.File(partial, "r+") as file:
                _write_slots(file, slots, write_elem)
        else:
            import zarr

            # anndata writes consolidated metadata, which cannot be edited: change the store itself, then renew them
            was_consolidated = zarr.open_group(partial, mode="r").metadata.consolidated_metadata is not None
            _write_slots(zarr.open_group(partial, mode="r+", use_consolidated=False), slots, write_elem)
            if was_consolidated:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # "not part of the zarr 3 format": anndata does it, too
                    zarr.consolidate_metadata(partial)


def _write_slots(group: Any, slots: Mapping[str, Any], write_elem: Any) -> None:
    for key, value in slots.items():
        parents = key.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            parent = "/".join(parents[:depth])
            if parent not in group:
                write_elem(group, parent, {})
        write_elem(group, key, value)


def _write_anew(source: CellSource, path: Path) -> None:
    """Write the whole AnnData in another format (10x input, or a change between .h5ad and .zarr); X is loaded."""
    import anndata as ad

    if source.path is not None and source.path.suffix in (".h5ad", ".zarr"):
        # from the file, so that .obsm, .uns and .raw come along
        adata = ad.read_h5ad(source.path) if source.path.suffix == ".h5ad" else ad.read_zarr(source.path)
    else:
        x = source.matrix(None)
        adata = ad.AnnData(X=x.rows(0, source.n_cells), obs=source.obs, var=x.var)
    if path.suffix == ".h5ad":
        adata.write_h5ad(path)
    else:
        adata.write_zarr(path)
