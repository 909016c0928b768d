"""Values, variable genes and principal components of cells: what baselines, annotators and integration start from.

Thin calls to scanpy and scikit-learn, in one place so that all of them mean the same by "variable genes".
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

N_HVG = 2000
N_COMPONENTS = 50
MIN_CELLS_OF_A_BATCH = 20
_FEWEST_CELLS = 3
"""Dispersions of fewer cells are none: all detected genes are taken."""


def log_cp10k(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Return log1p(CP10K) of raw counts, CSR float32; a cell without counts stays empty."""
    counts = sp.csr_matrix(counts)
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    scale = np.divide(1e4, total, out=np.zeros_like(total), where=total > 0)
    values = np.log1p(counts.data * np.repeat(scale, np.diff(counts.indptr))).astype(np.float32)
    return sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)


def variable_genes(
    values: sp.csr_matrix, *, batches: NDArray[np.str_] | None = None, n_genes: int = N_HVG
) -> NDArray[np.int64]:
    """Return the columns of highly variable genes: scanpy's flavour "seurat".

    The flavour "seurat_v3" moves transfer by up to 0.08 accuracy, but needs scikit-misc; "seurat" needs scanpy alone
    (our decision).

    Parameters
    ----------
    values
        CSR ``(n_cells, n_genes)`` log1p(CP10K).
    batches
        ``(n_cells,)``: genes are then ranked by the number of batches in which they are variable. Batches of fewer than
        20 cells have no say (our decision: their dispersions are noise); if all are so small, batches are ignored.
    n_genes
        How many. Fewer come back where fewer are detected.

    Returns
    -------
    numpy.ndarray
        Sorted columns.
    """
    import anndata as ad
    import scanpy as sc

    key, rows = None, np.ones(values.shape[0], dtype=bool)
    if batches is not None:
        names, batch_of_cell, sizes = np.unique(batches, return_inverse=True, return_counts=True)
        is_large = sizes >= MIN_CELLS_OF_A_BATCH
        if names.size > 1 and is_large.any():
            rows, key = is_large[batch_of_cell], "batch"
    chosen = sp.csr_matrix(values[rows])
    detected = np.flatnonzero(np.bincount(chosen.indices, minlength=values.shape[1]))
    if detected.size <= n_genes or chosen.shape[0] < _FEWEST_CELLS:
        return detected
    adata = ad.AnnData(sp.csr_matrix(chosen[:, detected]))
    if key is not None and batches is not None:
        adata.obs[key] = np.asarray(batches)[rows].astype(str)
        adata.obs[key] = adata.obs[key].astype("category")
    with warnings.catch_warnings():
        # "n_top_genes > number of normalized dispersions": genes that are constant; then all others are taken
        warnings.simplefilter("ignore", UserWarning)
        sc.pp.highly_variable_genes(adata, n_top_genes=n_genes, flavor="seurat", batch_key=key)
    return detected[adata.var["highly_variable"].to_numpy(dtype=bool)]


def fit_components(values: sp.csr_matrix, *, seed: int) -> PCA | None:
    """Fit 50 principal components (fewer for fewer cells or genes); None where there is no room for one.

    Genes are centred and not scaled.
    """
    from sklearn.decomposition import PCA

    size = min(N_COMPONENTS, min(values.shape) - 1)
    if size < 1 or values.nnz == 0:
        return None
    return PCA(size, svd_solver="arpack", random_state=seed).fit(values)


def components_of(pca: PCA | None, values: sp.csr_matrix) -> NDArray[np.float32]:
    """Project values; one column of zeros where there is no PCA."""
    if pca is None:
        return np.zeros((values.shape[0], 1), dtype=np.float32)
    return np.asarray(values @ pca.components_.T - pca.mean_ @ pca.components_.T, dtype=np.float32)
