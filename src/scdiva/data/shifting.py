"""Cells whose counts are moved until their mean expression is a given one: molecules are taken away, or added.

A gene whose mean is to fall is thinned: each molecule stays with one probability. A gene whose mean is to rise gains
Poisson counts, at one rate per UMI of the cell. So cells keep what they are, depth and subtype included, and only as
many molecules change as the mean asks for. Cells do not all respond alike: with a spread, all rates of a cell have a
factor of their own, its strength of response, log-normal with mean 1. (Our decisions.)

Shape letters: G genes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.statistics import CP10K
from scdiva.errors import ConfigError
from scdiva.types import CellCounts

_ROUNDS = 2
"""A predicted change need not leave the depth as it is; the second round knows the depth that the first one led to."""
_MAX_ADDED_SHARE = 0.2
"""Largest share of a library that one gene may gain."""


@dataclass(frozen=True, slots=True)
class CountShift:
    """How counts are moved.

    Parameters
    ----------
    kept_G
        float64 probability with which each molecule of a gene stays.
    added_G
        float64 expected number of added molecules, per UMI of the cell's library.
    target_G
        float64 mean of log1p(CP10K) that is aimed at.
    spread
        Standard deviation over cells of the log strength of response; 0: all gain at the same rates.
    """

    kept_G: NDArray[np.float64]
    added_G: NDArray[np.float64]
    target_G: NDArray[np.float64]
    spread: float = 0.0

    @classmethod
    def fit(
        cls,
        cells: CellCounts,
        change_G: NDArray[np.floating],
        rng: np.random.Generator,
        *,
        spread: float = 0.0,
        depth_ratio: float = 1.0,
    ) -> Self:
        """Find the numbers at which some cells get a predicted mean.

        Parameters
        ----------
        cells
            Control cells.
        change_G
            ``(n_genes,)`` predicted change of the mean of log1p(CP10K). Where a mean would fall below 0 it is 0. NaN,
            or a gene that no cell's file measures: it stays as it is.
        rng
            Source of randomness.
        spread
            Standard deviation over cells of the log strength of response (:func:`response_spread`).
        depth_ratio
            Library size that a perturbed cell is to have, over that of its control cell: a mean of CP10K does not tell
            it. Agreement with the mean comes first: what is reached lies between this and the ratio that the change
            itself leads to.

        Raises
        ------
        ConfigError
            No cells, changes of another number of genes, or infinite ones.
        """
        change = checked_change(change_G, cells)
        target = target_mean(cells, change)
        by_gene = sp.csc_matrix(cells.counts)
        kept, added = np.ones(cells.n_genes), np.zeros(cells.n_genes)
        library = cells.library_size.astype(np.float64)
        share = np.maximum(library, 0.0) * _strength(cells.n_cells, spread, rng)
        share /= max(share.sum(), 1e-300)
        state = rng.bit_generator.state
        ratio = depth_ratio
        for _ in range(_ROUNDS):
            rng.bit_generator.state = state  # the same molecules come and go in each round
            scale = CP10K / np.maximum(ratio * library, 1.0)
            for gene in range(cells.n_genes):
                own = slice(by_gene.indptr[gene], by_gene.indptr[gene + 1])
                rows, data = by_gene.indices[own], by_gene.data[own]
                mean = float(np.log1p(data * scale[rows]).sum()) / cells.n_cells
                kept[gene], added[gene] = 1.0, 0.0
                if target[gene] < mean:
                    kept[gene] = _thinned(rows, data, scale, target[gene], rng)
                elif target[gene] > mean:
                    n_added = _increased(rows, data, scale, share, target[gene], library.sum(), rng)
                    added[gene] = n_added / max(library.sum(), 1.0)
            n_lost = float(((1.0 - kept[cells.counts.indices]) * cells.counts.data).sum())
            ratio = 1.0 + float(added.sum()) - n_lost / max(library.sum(), 1.0)
        return cls(kept, added, target, spread)

    def apply(self, cells: CellCounts, rng: np.random.Generator) -> CellCounts:
        """Move the counts of some cells; their library sizes move along."""
        counts = cells.counts
        kept = rng.binomial(counts.data, self.kept_G[counts.indices]).astype(np.int32)
        thinned = sp.csr_matrix((kept, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)
        genes = np.flatnonzero(self.added_G)
        rate = np.maximum(cells.library_size, 0.0) * _strength(cells.n_cells, self.spread, rng)
        # all molecules that a cell gains, then their genes: a Poisson count for each gene, and no dense matrix
        n_new = rng.poisson(rate * self.added_G.sum())
        row = np.repeat(np.arange(cells.n_cells), n_new)
        gene = genes[:0]
        if genes.size:
            share = self.added_G[genes] / self.added_G.sum()
            gene = genes[np.minimum(np.searchsorted(np.cumsum(share), rng.random(row.size)), genes.size - 1)]
        is_there = cells.is_measured[cells.source_of_cell[row], gene]
        new = sp.csr_matrix((np.ones(is_there.sum(), np.int32), (row[is_there], gene[is_there])), shape=counts.shape)
        moved = sp.csr_matrix(thinned + new, dtype=np.int32)
        moved.eliminate_zeros()
        moved.sort_indices()
        before, after = (np.asarray(x.sum(axis=1), dtype=np.float64).ravel() for x in (counts, moved))
        return replace(cells, counts=moved, library_size=cells.library_size - before + after)


def _strength(n_cells: int, spread: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Strengths of response, mean 1."""
    if spread == 0:
        return np.ones(n_cells)
    return np.exp(rng.normal(-0.5 * spread**2, spread, n_cells))


def response_spread(perturbed: CellCounts, control: CellCounts, n_genes: int = 50) -> float:
    """Estimate how much the strength of response varies between cells: the spread of :class:`CountShift`.

    Of the genes that rise most, all counts of a cell together are Poisson with mean s L p, L the cell's library and s
    its strength. The variance of s is found by moments; that of the same genes in control cells, which is no response,
    is taken off, in proportion to what they had before. (Our decision.)

    Parameters
    ----------
    perturbed, control
        Cells of one context, with and without one perturbation.
    n_genes
        Number of genes.

    Returns
    -------
    float
        Standard deviation of log s, at most 1; 0 where the counts vary no more than molecules do by chance.
    """
    rise = mean_log1p(perturbed.counts, perturbed.library_size) - mean_log1p(control.counts, control.library_size)
    genes = np.argsort(-rise, kind="stable")[:n_genes]
    shares, excess = [], []
    for cells in (control, perturbed):
        x = np.asarray(cells.counts[:, genes].sum(axis=1), dtype=np.float64).ravel()
        library = np.maximum(cells.library_size, 1.0)
        share = x.sum() / library.sum()
        mean = library * share
        shares.append(share)
        excess.append(
            float(((x - mean) ** 2 - mean).sum() / library.shape[0]) / max(float((library**2).mean()), 1e-300)
        )
    gained = shares[1] - shares[0]
    if gained <= 0:
        return 0.0
    variance = max(excess[1] - excess[0], 0.0) / gained**2
    return float(min(np.sqrt(np.log1p(variance)), 1.0))


def shifted_counts(cells: CellCounts, change_G: NDArray[np.floating], rng: np.random.Generator) -> CellCounts:
    """Return control cells with counts moved until their mean changes as predicted; see :meth:`CountShift.fit`."""
    return CountShift.fit(cells, change_G, rng).apply(cells, rng)


def checked_change(change_G: NDArray[np.floating], cells: CellCounts) -> NDArray[np.float64]:
    """Return a predicted change with 0 in the place of NaN.

    Raises
    ------
    ConfigError
        No cells, changes of another number of genes, or infinite ones.
    """
    if cells.n_cells == 0:
        raise ConfigError("no control cells", expected="at least one", fix="give control cells of the same context")
    change = np.asarray(change_G, dtype=np.float64)
    if change.shape != (cells.n_genes,) or np.isinf(change).any():
        raise ConfigError(
            f"changes of shape {change.shape}" + (", some infinite" if np.isinf(change).any() else ""),
            expected=f"one finite number (or NaN) for each of {cells.n_genes} genes",
            fix="give the predicted change of mean log1p(CP10K) in the order of the cells' genes",
        )
    return np.nan_to_num(change, nan=0.0)


def mean_log1p(counts: sp.csr_matrix, library_size: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over cells of log1p(CP10K), ``(n_genes,)``."""
    scale = CP10K / np.maximum(library_size, 1.0)
    value = np.log1p(counts.data * np.repeat(scale, np.diff(counts.indptr)))
    total = np.bincount(counts.indices, weights=value, minlength=counts.shape[1])
    return np.asarray(total / max(counts.shape[0], 1))


def target_mean(cells: CellCounts, change_G: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean log1p(CP10K) of control cells plus the predicted change, at least 0; 0 of unmeasured genes."""
    target = np.maximum(mean_log1p(cells.counts, cells.library_size) + change_G, 0.0)
    is_measured = cells.is_measured[np.unique(cells.source_of_cell)].any(axis=0)
    return np.asarray(np.where(is_measured, target, 0.0))


def _thinned(
    rows: NDArray[np.integer],
    data: NDArray[np.integer],
    scale: NDArray[np.float64],
    target: float,
    rng: np.random.Generator,
) -> float:
    """Share of molecules to keep for a mean."""
    owner = np.repeat(np.arange(rows.size), data)[rng.permutation(int(data.sum()))]
    low, high, n_cells = 0, owner.size, scale.size
    while low < high:  # fewest molecules whose mean is not below the target
        middle = (low + high) // 2
        left = np.bincount(owner[:middle], minlength=rows.size)
        if float(np.log1p(left * scale[rows]).sum()) / n_cells < target:
            low = middle + 1
        else:
            high = middle
    return low / max(owner.size, 1)


def _increased(
    rows: NDArray[np.integer],
    data: NDArray[np.integer],
    scale: NDArray[np.float64],
    share: NDArray[np.float64],
    target: float,
    n_umis: float,
    rng: np.random.Generator,
) -> int:
    """Molecules to add, over all cells, for a mean."""
    own = np.zeros(scale.size)
    own[rows] = data
    edges = np.cumsum(share)
    owner = np.zeros(0, dtype=np.int64)

    def mean_with(n: int) -> float:
        return float(np.log1p((own + np.bincount(owner[:n], minlength=own.size)) * scale).mean())

    limit = max(int(_MAX_ADDED_SHARE * n_umis), 1)
    high = 8
    while True:
        more = np.searchsorted(edges, rng.random(high - owner.size))
        owner = np.concatenate([owner, np.minimum(more, own.size - 1)])
        if mean_with(high) >= target or high >= limit:
            break
        high = min(4 * high, limit)
    low = 0
    while low < high:
        middle = (low + high) // 2
        if mean_with(middle) < target:
            low = middle + 1
        else:
            high = middle
    # of two numbers beside the target, the nearer one
    if low > 0 and target - mean_with(low - 1) < mean_with(low) - target:
        low -= 1
    return low
