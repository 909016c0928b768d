"""Synthetic cells: small, fast and honest stand-ins for tests, docs and first steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from scdiva.genes import GeneVocabulary

if TYPE_CHECKING:
    from anndata import AnnData


def synthetic_cells(
    n_cells: int = 500,
    n_genes: int = 1000,
    *,
    n_types: int = 4,
    n_batches: int = 2,
    mean_depth: float = 2000.0,
    marker_fold: float = 8.0,
    seed: int = 0,
) -> AnnData:
    """Draw cells with known types and batches, as raw counts over real human gene symbols.

    Gene rates are log-normal; every type raises its own 5 % of the genes ``marker_fold`` times; every batch shifts all
    genes a little; depth is log-normal; counts are Poisson. (Our decision; not a model of any tissue.)

    Parameters
    ----------
    n_cells, n_genes
        Size. Genes are the first ones of the default vocabulary.
    n_types, n_batches
        Number of cell types (``.obs["cell_type"]``) and batches (``.obs["batch"]``).
    mean_depth
        Mean UMIs per cell.
    marker_fold
        How strongly a type's marker genes stand out.
    seed
        Seed of the generator.

    Returns
    -------
    AnnData
        ``X`` int32 CSR raw counts ``(n_cells, n_genes)``.
    """
    # deferred: importing anndata takes a second that `--help` need not wait for
    import anndata as ad

    rng = np.random.default_rng(seed)
    vocabulary = GeneVocabulary.default()
    base = rng.lognormal(0.0, 1.5, n_genes)
    fold = np.ones((n_types, n_genes))
    for row in fold:
        row[rng.choice(n_genes, size=max(1, n_genes // 20), replace=False)] = marker_fold
    shift = rng.lognormal(0.0, 0.1, (n_batches, n_genes))
    cell_type = rng.integers(n_types, size=n_cells)
    batch = rng.integers(n_batches, size=n_cells)
    rate = base * fold[cell_type] * shift[batch]
    depth = mean_depth * rng.lognormal(-0.08, 0.4, n_cells)
    counts = rng.poisson(rate / rate.sum(axis=1, keepdims=True) * depth[:, None]).astype(np.int32)
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical([f"type {i}" for i in cell_type]),
            "batch": pd.Categorical([f"batch {i}" for i in batch]),
        },
        index=[f"cell_{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame({"ensembl_id": vocabulary.ensembl_id[:n_genes]}, index=vocabulary.symbol[:n_genes].astype(str))
    adata = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)
    adata.uns["source"] = f"scdiva.datasets.synthetic_cells(seed={seed})"
    return adata
