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
RARE = 4
"""A label of fewer cells than so many times k has caps of its own."""


def isolated_caps(counts: sp.csr_matrix) -> NDArray[np.int64]:
    """Return for each gene the largest count that is not isolated among these cells, ``(n_genes,)``.

    In pbmc3k a cell holds, once on average, dozens of molecules of a gene of which nearly all other cells hold none to
    three. A few such counts decide the dispersion of a negative binomial of that gene in all cells. (Our decision.)

    Parameters
    ----------
    counts
        CSR ``(n_cells, n_genes)`` raw counts.
    """
    n_cells, n_genes = counts.shape
    k = _k(n_cells)
    by_gene = sp.csc_matrix(counts)
    caps = np.full(n_genes, SMALLEST_CAP, dtype=np.int64)
    for gene in np.flatnonzero(np.diff(by_gene.indptr) >= k):
        found = by_gene.data[by_gene.indptr[gene] : by_gene.indptr[gene + 1]]
        kth = np.partition(found, found.size - k)[found.size - k]
        caps[gene] = max(SMALLEST_CAP, int(TIMES * kth))
    return caps


def cap_isolated(cells: CellCounts) -> tuple[CellCounts, int]:
    """Set isolated counts back to the gene's cap.

    Labels of few cells, in any field of ``cells.condition``, have caps of their own, computed among their cells: of a
    type of ten cells among thousands every count of a marker would be isolated. A count of such a cell is isolated if
    it is above the caps of all cells and of its labels, and is set back to the largest of them. Few are fewer than
    ``RARE`` times the k of all cells. (Our decision.)

    Returns
    -------
    cells
        The same cells; totals are those of the capped counts.
    n_capped
        Number of counts that were changed.
    """
    counts = cells.counts
    caps = isolated_caps(counts)
    where = np.flatnonzero(counts.data > caps[counts.indices])
    cap, gene = caps[counts.indices[where]], counts.indices[where]
    row = np.searchsorted(counts.indptr, where, side="right") - 1
    for code in cells.condition.T:
        n_cells = np.bincount(code)
        for label in np.unique(code[row]):
            if label > 0 and n_cells[label] < RARE * _k(cells.n_cells):
                is_of_it = code[row] == label
                own = isolated_caps(counts[np.flatnonzero(code == label)])
                cap[is_of_it] = np.maximum(cap[is_of_it], own[gene[is_of_it]])
    is_isolated = counts.data[where] > cap
    where, cap, row = where[is_isolated], cap[is_isolated], row[is_isolated]
    if not where.size:
        return cells, 0
    data = counts.data.copy()
    data[where] = cap
    lost = counts.data[where] - cap
    library_size = cells.library_size - np.bincount(row, weights=lost, minlength=cells.n_cells)
    # the positions of the counts are shared with the cells given
    capped = sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)
    return replace(cells, counts=capped, library_size=library_size), where.size


def _k(n_cells: int) -> int:
    return max(FEWEST, int(np.ceil(SHARE * n_cells)))
