"""Expected counts without a foundation model: population mean, nearest neighbours, scVI, and a null control.

All are fitted on the very cells they impute, as users do; all give expected counts at each cell's own depth.

Shape letters: B cells, G genes of the file, K genes that are asked for.
"""

from __future__ import annotations

import logging
import warnings

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

N_NEIGHBORS = 15
N_COMPONENTS = 50
MIN_CELLS = 3
EPOCHS_SCVI = 200
PATIENCE_SCVI = 10


def population_mean(counts: sp.csr_matrix, genes: NDArray[np.integer]) -> NDArray[np.float64]:
    """Depth of the cell times the share of the gene among all molecules, ``(B, K)``.

    Parameters
    ----------
    counts
        CSR ``(B, G)`` raw counts.
    genes
        ``(K,)`` columns.
    """
    depth = _depth(counts)
    return depth[:, None] * _share(counts, genes)


def knn_smoothing(
    counts: sp.csr_matrix, genes: NDArray[np.integer], *, seed: int, k: int = N_NEIGHBORS
) -> NDArray[np.float64]:
    """Depth times the share of the gene in the cell and its k nearest neighbours together, ``(B, K)``.

    Neighbours are Euclidean in the 50 first principal components of log1p(CP10K) over the genes of at least three
    cells. One more cell of median depth and population mean joins them, without which a gene that none of them shows
    would be impossible.

    Parameters
    ----------
    counts, genes
        As for :func:`population_mean`.
    seed
        Of the PCA solver.
    k
        Neighbours.
    """
    # deferred: scikit-learn takes a second to load
    from sklearn.decomposition import PCA
    from sklearn.neighbors import NearestNeighbors

    depth = _depth(counts)
    kept = counts[:, np.flatnonzero(counts.getnnz(axis=0) >= MIN_CELLS)]
    value = sp.csr_matrix(sp.diags_array(1e4 / np.maximum(depth, 1.0)) @ kept)
    value.data = np.log1p(value.data)
    n_components = min(N_COMPONENTS, min(value.shape) - 1)
    z = PCA(n_components, svd_solver="arpack", random_state=seed).fit_transform(value)
    n_near = min(k + 1, z.shape[0])
    near = NearestNeighbors(n_neighbors=n_near).fit(z).kneighbors(z, return_distance=False)
    indptr = np.arange(0, near.size + 1, n_near)
    among = sp.csr_matrix((np.ones(near.size), near.ravel(), indptr), shape=(z.shape[0], z.shape[0]))
    one_more = float(np.median(depth))
    pooled = (among @ counts[:, genes]).toarray() + one_more * _share(counts, genes)
    return depth[:, None] * pooled / (among @ depth + one_more)[:, None]


def scvi_expected(
    counts: sp.csr_matrix, genes: NDArray[np.integer], *, seed: int, max_epochs: int = EPOCHS_SCVI
) -> NDArray[np.float64]:
    """scVI's normalised expression times depth, ``(B, K)``, trained on the cells themselves (extra ``eval``).

    scvi-tools' defaults but for: the genes that are asked for (instead of variable ones), a negative binomial
    likelihood, and an end after 200 epochs, or when the ELBO of the 10 % of cells that scvi-tools holds out has not
    improved for 10. On CPUs denormal numbers, which make it many times slower, are flushed to zero.

    Parameters
    ----------
    counts, genes
        As for :func:`population_mean`.
    seed
        scvi-tools' global seed.
    max_epochs
        Longest training.
    """  # noqa: D403 - scVI is a name
    import anndata as ad
    import scvi
    import torch

    depth = _depth(counts)
    chosen = sp.csr_matrix(counts[:, genes], dtype=np.float32)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.set_flush_denormal(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scvi.settings.seed = seed
            data = ad.AnnData(chosen)
            scvi.model.SCVI.setup_anndata(data)
            model = scvi.model.SCVI(data, gene_likelihood="nb")
            model.train(
                max_epochs=max_epochs,
                early_stopping=True,
                early_stopping_patience=PATIENCE_SCVI,
                accelerator="cpu",
                enable_progress_bar=False,
                logger=False,
                enable_checkpointing=False,
            )
            share = np.asarray(model.get_normalized_expression(return_numpy=True), dtype=np.float64)
    finally:
        torch.set_flush_denormal(False)
        logger.setLevel(level)
    # shares among the genes it knows, of a cell's molecules in these
    own = np.asarray(chosen.sum(axis=1), dtype=np.float64).ravel()
    return np.maximum(own, (depth > 0) * 1e-3)[:, None] * share


def genes_permuted(expected: NDArray[np.floating], depth: NDArray[np.floating], *, seed: int) -> NDArray[np.float64]:
    """Give every gene the pattern across cells of another gene, around its own mean, ``(B, K)``: the null control.

    Depths and gene means stay right; which gene is where is wrong.

    Parameters
    ----------
    expected
        ``(B, K)`` expected counts of any method.
    depth
        ``(B,)`` UMIs of each cell.
    seed
        Of the permutation.
    """
    rate = np.asarray(expected, dtype=np.float64) / np.maximum(depth, 1.0)[:, None]
    mean = rate.mean(axis=0)
    pattern = rate / np.maximum(mean, 1e-300)
    # every gene gets that of the next in a random cycle: none keeps its own
    cycle = np.random.default_rng(seed).permutation(mean.size)
    other = np.empty_like(cycle)
    other[cycle] = np.roll(cycle, 1)
    return pattern[:, other] * mean * np.maximum(depth, 1.0)[:, None]


def _depth(counts: sp.csr_matrix) -> NDArray[np.float64]:
    return np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()


def _share(counts: sp.csr_matrix, genes: NDArray[np.integer]) -> NDArray[np.float64]:
    """Share of each gene among all molecules, with half a molecule more, ``(K,)``."""
    total = np.asarray(counts[:, genes].sum(axis=0), dtype=np.float64).ravel()
    return (total + 0.5) / max(float(counts.sum()), 1.0)
