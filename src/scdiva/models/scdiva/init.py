"""What the network starts at: the principal components and the mean profile of the corpus."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd

from scdiva.data.statistics import GeneStatistics
from scdiva.models.scdiva.network import AnchorNetwork
from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts

MAX_CELLS = 50_000
"""Cells that the decomposition looks at; more change the leading components little and cost memory."""


def normalised_matrix(cells: CellCounts) -> sp.csr_matrix:
    """Return the L2-normalised log1p(CP10K) matrix, CSR ``(n_cells, n_genes)`` float32; empty cells stay zero."""
    counts = cells.counts
    value = log1p_cp10k(cells)
    n_stored = np.diff(counts.indptr)
    norm = np.sqrt(
        np.bincount(
            np.repeat(np.arange(n_stored.size), n_stored), weights=value.astype(float) ** 2, minlength=n_stored.size
        )
    )
    scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
    return sp.csr_matrix(
        (value * np.repeat(scale, n_stored).astype(np.float32), counts.indices, counts.indptr), shape=counts.shape
    )


def corpus_components(blocks: Iterable[CellCounts], n_components: int, seed: int) -> tuple[NDArray[np.float32], float]:
    """Decompose the corpus.

    Parameters
    ----------
    blocks
        Training cells (held-out cells must not be among them).
    n_components
        K, number of singular vectors; fewer are returned if the data have no more.
    seed
        Seed of the randomised algorithm (Halko et al. 2011, as in scikit-learn).

    Returns
    -------
    components_GK
        ``(n_genes, K)`` float32 gene loadings, scaled so that their root mean square is ``1 / sqrt(K)``; the sign of
        each component is fixed.
    pool_scale
        Factor that brings the pooled scores of these cells to K units of total variance.
    """
    matrix = sp.vstack([normalised_matrix(block) for block in blocks], format="csr")
    n_components = min(n_components, min(matrix.shape) - 1)
    _, _, v_KG = randomized_svd(matrix, n_components, random_state=seed, flip_sign=True)
    components = v_KG.T / (np.sqrt(np.mean(v_KG**2)) * np.sqrt(n_components))
    scores = matrix @ components
    pool_scale = np.sqrt(n_components / scores.var(axis=0).sum())
    return components.astype(np.float32), float(pool_scale)


def init_network(
    network: AnchorNetwork, statistics: GeneStatistics, blocks: Iterable[CellCounts], n_components: int, seed: int
) -> None:
    """Set everything in a network that starts at the corpus."""
    components, pool_scale = corpus_components(blocks, n_components, seed)
    network.init_from_corpus(
        torch.from_numpy(components), torch.from_numpy(statistics.log_mean_profile()).float(), pool_scale
    )
