"""Embeddings without a foundation model: PCA of the set, PCA of the corpus, random projection, scVI."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from anndata import AnnData

N_COMPONENTS = 50
N_HVG = 2000
EPOCHS_SCVI = 150
PATIENCE_SCVI = 15


def pca_of_hvg(adata: AnnData, *, seed: int, scale: bool = False) -> NDArray[np.float32]:
    """PCA of a set's own highly variable genes: what everybody does first (and no model of other data).

    Parameters
    ----------
    adata
        Raw counts in ``X``.
    seed
        Seed of the PCA solver.
    scale
        Whether genes are scaled to unit variance (clipped at 10) before the PCA, as in the Seurat tutorial.

    Returns
    -------
    numpy.ndarray
        ``(n_cells, 50)``; CP10K, log1p, 2,000 genes of scanpy's "seurat" flavour.
    """
    import anndata as ad
    import scanpy as sc

    copy = ad.AnnData(sp.csr_matrix(adata.X, dtype=np.float32))
    is_variable = _variable_genes(copy, N_HVG)
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    chosen = copy[:, is_variable].copy()
    if scale:
        sc.pp.scale(chosen, max_value=10)
    sc.pp.pca(chosen, n_comps=min(N_COMPONENTS, min(chosen.shape) - 1), random_state=seed)
    return np.asarray(chosen.obsm["X_pca"])


@dataclass(frozen=True, slots=True)
class CorpusPCA:
    """PCA of a training corpus, applied to other cells: a foundation model in one line.

    Parameters
    ----------
    mean_G, components_GK
        Mean log1p(CP10K) and loadings over the vocabulary.
    """

    mean_G: NDArray[np.float64]
    components_GK: NDArray[np.float64]

    @classmethod
    def fit(cls, cells: CellCounts, *, seed: int) -> Self:
        """Fit on the corpus's log1p(CP10K) values."""
        from sklearn.decomposition import PCA

        matrix = _log_matrix(cells)
        pca = PCA(N_COMPONENTS, svd_solver="arpack", random_state=seed).fit(matrix)
        return cls(pca.mean_, pca.components_.T)

    def transform(self, cells: CellCounts) -> NDArray[np.float64]:
        """Project cells, ``(n_cells, 50)``."""
        return _log_matrix(cells) @ self.components_GK - self.mean_G @ self.components_GK


def random_projection(cells: CellCounts, *, seed: int) -> NDArray[np.float64]:
    """Project log1p(CP10K) onto 50 random directions: the null control."""
    directions = np.random.default_rng(seed).normal(size=(cells.n_genes, N_COMPONENTS)) / np.sqrt(N_COMPONENTS)
    return _log_matrix(cells) @ directions


def scvi_latent(adata: AnnData, *, seed: int, n_latent: int = 10, max_epochs: int = EPOCHS_SCVI) -> NDArray[np.float32]:
    """Latent of scVI trained on the set's own 2,000 variable genes (needs the extra ``eval``).

    scvi-tools advises to select 1,000 to 10,000 variable genes. Its defaults otherwise, but for two: the likelihood is
    negative binomial, and training stops after 150 epochs, or when the ELBO of the 10 % of cells that scvi-tools holds
    out has not improved for 15; on a CPU the defaults take ten times as long.

    Parameters
    ----------
    adata
        Raw counts in ``X``.
    seed
        scvi-tools' global seed.
    n_latent, max_epochs
        Dimensions (scvi-tools' default) and longest training.
    """
    import anndata as ad
    import scvi

    copy = ad.AnnData(sp.csr_matrix(adata.X, dtype=np.float32))
    copy = copy[:, _variable_genes(copy, N_HVG)].copy()
    level = logging.getLogger("lightning.pytorch").level
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scvi.settings.seed = seed
            scvi.model.SCVI.setup_anndata(copy)
            model = scvi.model.SCVI(copy, n_latent=n_latent, gene_likelihood="nb")
            model.train(
                max_epochs=max_epochs,
                early_stopping=True,
                early_stopping_patience=PATIENCE_SCVI,
                accelerator="cpu",
                enable_progress_bar=False,
                logger=False,
                enable_checkpointing=False,
            )
            return np.asarray(model.get_latent_representation())
    finally:
        logging.getLogger("lightning.pytorch").setLevel(level)


def _variable_genes(counts: AnnData, n_genes: int) -> NDArray[np.bool_]:
    """Return scanpy's variable genes of the "seurat" flavour, on log1p(CP10K)."""
    import scanpy as sc

    copy = counts.copy()
    sc.pp.normalize_total(copy, target_sum=1e4)
    sc.pp.log1p(copy)
    sc.pp.highly_variable_genes(copy, n_top_genes=min(n_genes, copy.n_vars))
    return copy.var["highly_variable"].to_numpy(dtype=bool)


def _log_matrix(cells: CellCounts) -> sp.csr_matrix:
    counts = cells.counts
    return sp.csr_matrix((log1p_cp10k(cells), counts.indices, counts.indptr), shape=counts.shape)
