"""Data sets that come with the package."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING

from scdiva.errors import KeyNotFoundError

if TYPE_CHECKING:
    from anndata import AnnData

_DATASETS = {
    "pbmc3k": "2,700 PBMC of a healthy donor, 10x 3' v1, 9 cell types (10x Genomics, CC BY 4.0)",
    "zheng_sorted7_3500": "3,500 FACS-sorted PBMC, 7 types of 500 cells (Zheng et al. 2017; 10x Genomics, CC BY 4.0)",
}


def list_datasets() -> dict[str, str]:
    """Return the names of the bundled data sets, with a line about each."""
    return dict(_DATASETS)


def dataset_path(name: str) -> Path:
    """Return the file of a bundled data set; KeyNotFoundError lists those there are."""
    if name not in _DATASETS:
        raise KeyNotFoundError(
            f"no bundled data set is called {name!r}", expected=f"one of {', '.join(_DATASETS)}", fix="correct the name"
        )
    return Path(str(importlib.resources.files("scdiva") / "data" / "files" / f"{name}.h5ad"))


def load(name: str) -> AnnData:
    """Load a bundled data set: raw counts in X, labels in ``.obs["cell_type"]``, licence in ``.uns["attribution"]``.

    Raises
    ------
    KeyNotFoundError
        There is no such set.
    """
    # deferred: importing anndata takes a second that `--help` need not wait for
    import anndata as ad

    return ad.read_h5ad(dataset_path(name))


def pbmc3k() -> AnnData:
    """Load 2,700 PBMC of a healthy donor with nine cell types (10x Genomics, CC BY 4.0)."""
    return load("pbmc3k")


def zheng_sorted7_3500() -> AnnData:
    """Load 3,500 FACS-sorted PBMC, seven types (Zheng et al. 2017; 10x Genomics, CC BY 4.0)."""
    return load("zheng_sorted7_3500")
