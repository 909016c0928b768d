"""Single counts far beyond all others of their gene: amplification jackpots, which say nothing of a cell's state."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.types import CellCounts

TIMES = 4.0
"""A count is isolated if it is more than so many times the gene's k-th largest count."""
FEWEST, SHARE = 3, 0.005
"""k is the larger of 3 cells and half a percent of the cells: what more cells than that have is no accident."""
SMALLEST_CAP = 8
"""Counts up to here are never isolated."""


def isolated_caps(counts: sp.csr_matrix) -> NDArray[np.int64]:
    """Return for each gene the largest count that is not isolated, ``(n_genes,)``.

    In pbmc3k a cell holds, once on average, dozens of molecules of a gene of which nearly all other cells hold none to
    three. A few such counts decide the dispersion of a negative binomial of that gene in all cells. (Our decision.)

    Parameters
    ----------
    counts
        CSR ``(n_cells, n_genes)`` raw counts.
    """
    n_cells, n_genes = counts.shape
    k = max(FEWEST, int(np.ceil(SHARE * n_cells)))
    by_gene = sp.csc_matrix(counts)
    caps = np.full(n_genes, SMALLEST_CAP, dtype=np.int64)
    for gene in np.flatnonzero(np.diff(by_gene.indptr) >= k):
        found = by_gene.data[by_gene.indptr[gene] : by_gene.indptr[gene + 1]]
        kth = np.partition(found, found.size - k)[found.size - k]
        caps[gene] = max(SMALLEST_CAP, int(TIMES * kth))
    return caps


def cap_isolated(cells: CellCounts) -> tuple[CellCounts, int]:
    """Set isolated counts back to the gene's cap.

    Returns
    -------
    cells
        The same cells; totals are those of the capped counts.
    n_capped
        Number of counts that were changed.
    """
    caps = isolated_caps(cells.counts)[cells.counts.indices]
    is_isolated = cells.counts.data > caps
    if not is_isolated.any():
        return cells, 0
    counts = cells.counts.copy()
    lost = np.where(is_isolated, counts.data - caps, 0)
    counts.data = np.where(is_isolated, caps, counts.data).astype(counts.dtype)
    row = np.repeat(np.arange(cells.n_cells), np.diff(counts.indptr))
    library_size = cells.library_size - np.bincount(row, weights=lost, minlength=cells.n_cells)
    return replace(cells, counts=counts, library_size=library_size), int(is_isolated.sum())
