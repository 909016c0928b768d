"""Binomial thinning and count splitting: exact, seeded, on the stored counts only.

If a count is Poisson with rate r, then ``A ~ Binomial(x, rho)`` and ``B = x - A`` are independent Poisson counts with
rates ``rho r`` and ``(1 - rho) r``: two views of one cell that share its state and nothing else (Neufeld et al. 2024,
"data thinning"; Sarkar and Stephens 2021 for the Poisson model of UMIs).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scdiva.types import CellCounts


def thin_counts(cells: CellCounts, rho: ArrayLike, rng: np.random.Generator) -> CellCounts:
    """Keep each molecule with probability rho.

    Parameters
    ----------
    cells
        Raw counts ``(n_cells, n_genes)``.
    rho
        Share of molecules to keep, in [0, 1]; one for all cells or one per cell ``(n_cells,)``.
    rng
        Source of randomness.

    Returns
    -------
    CellCounts
        The thinned cells; the library size is thinned too (molecules outside the vocabulary included).
    """
    return split_counts(cells, rho, rng)[0]


def split_counts(cells: CellCounts, rho: ArrayLike, rng: np.random.Generator) -> tuple[CellCounts, CellCounts]:
    """Split every count into two views, A ~ Binomial(x, rho) and B = x - A.

    Parameters
    ----------
    cells
        Raw counts ``(n_cells, n_genes)``.
    rho
        Expected share of A, in [0, 1]; one for all cells or one per cell ``(n_cells,)``.
    rng
        Source of randomness.

    Returns
    -------
    view_a, view_b
        ``view_a.counts + view_b.counts`` equals ``cells.counts`` exactly, library sizes likewise.
    """
    rho_of_cell = np.broadcast_to(np.asarray(rho, dtype=np.float64), (cells.n_cells,))
    if rho_of_cell.size and not ((rho_of_cell >= 0) & (rho_of_cell <= 1)).all():
        raise ValueError(f"rho must lie in [0, 1], found {rho_of_cell.min()} to {rho_of_cell.max()}")
    counts = cells.counts
    rho_of_value = np.repeat(rho_of_cell, np.diff(counts.indptr))
    data_a = rng.binomial(counts.data, rho_of_value).astype(counts.data.dtype)
    n_in_vocabulary = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    n_outside = np.maximum(np.rint(cells.library_size - n_in_vocabulary), 0).astype(np.int64)
    outside_a = rng.binomial(n_outside, rho_of_cell)
    data_b = counts.data - data_a  # before view A is compacted, which happens in place
    view_a = _with_data(cells, data_a, outside_a.astype(np.float64))
    view_b = _with_data(cells, data_b, (n_outside - outside_a).astype(np.float64))
    return view_a, view_b


def _with_data(cells: CellCounts, data: NDArray[np.integer], n_outside: NDArray[np.float64]) -> CellCounts:
    counts = cells.counts
    thinned = sp.csr_matrix((data, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)
    thinned.eliminate_zeros()
    library_size = np.asarray(thinned.sum(axis=1), dtype=np.float64).ravel() + n_outside
    return replace(cells, counts=thinned, library_size=library_size)
