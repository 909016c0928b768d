"""Guesses of hidden genes without a model: from the cells of a reference, or from nothing.

The reference is a set of whole cells. Where it is the very file that is judged, a cell is left out of its own reference
(by its position in the file), so that nothing here has seen what it guesses. Each guess reads the visible tokens of a
cell, how many genes are hidden, and its depth: what the native model is told, too. (Our decisions throughout; the
baselines of the published results are not described.)

No torch but for the likelihood of counts. Shapes: ``n_cells`` judged cells, ``n_reference`` cells of the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts

N_NEIGHBOURS = 50
"""Neighbours of the kNN guess."""

PRIOR_CELLS = 20.0
"""How many cells the whole reference counts for beside a cell's neighbours. This and the next: the best of a few on
sorted blood cells and on immune cells of breast."""

PRIOR_DETECTIONS = 30.0
"""How many detections a gene's mean value counts for beside its values among the neighbours."""

_THETA_RANGE = (0.1, 1e4)
# no other use of the same seed has this tag
_NULL_STREAM = 11

CountNLL = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class GeneGuess:
    """A guess of which genes are hidden, and of their values.

    Parameters
    ----------
    log_odds
        ``(n_cells, n_genes)`` float32 log-odds of detection.
    mean_value
        ``(n_cells, n_genes)`` float32 mean log1p(CP10K) where the gene is detected.
    offset
        ``(n_cells,)`` float32: how far the cell's values lie above these.
    count_nll
        Negative log-likelihood of counts (cell, gene, count) in nats; None: there is none.
    """

    log_odds: NDArray[np.float32]
    mean_value: NDArray[np.float32]
    offset: NDArray[np.float32]
    count_nll: CountNLL | None = None

    def expected_values(self, cell: NDArray[np.int64], gene: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the gene's mean value plus the cell's offset, not below 0."""
        return np.maximum(self.mean_value[cell, gene] + self.offset[cell], np.float32(0))

    def value_nll(
        self, cell: NDArray[np.int64], gene: NDArray[np.int64], count: NDArray[np.int64]
    ) -> NDArray[np.float32] | None:
        """Return the negative log-likelihood of counts, if there is one."""
        return None if self.count_nll is None else self.count_nll(cell, gene, count)


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceCells:
    """Whole cells that hidden genes are guessed from; build it with :meth:`of`.

    Parameters
    ----------
    cells
        The cells.
    is_left_out
        Whether a judged cell is among them (the same ``cell_index``) and must be left out of its own guess.
    detected, value, residual
        CSR ``(n_reference, n_genes)`` float32: 1 where there is a count, log1p(CP10K), and what that lies above the
        gene's mean and the cell's offset.
    unit
        ``value`` with rows of length 1.
    n_detected, total_value
        ``(n_genes,)`` their sums.
    is_measured
        ``(n_genes,)``.
    theta
        ``(n_genes,)`` inverse dispersions by moments, for the likelihood.
    line
        Slope and intercept of a cell's mean offset from the genes' mean values, on its log library size.
    """

    cells: CellCounts
    is_left_out: bool
    detected: sp.csr_matrix
    value: sp.csr_matrix
    residual: sp.csr_matrix
    unit: sp.csr_matrix
    n_detected: NDArray[np.float64]
    total_value: NDArray[np.float64]
    is_measured: NDArray[np.bool_]
    theta: NDArray[np.float64]
    line: tuple[float, float]

    @classmethod
    def of(cls, cells: CellCounts, *, is_left_out: bool) -> Self:
        """Prepare reference cells of one source.

        Parameters
        ----------
        cells
            Raw counts in vocabulary order; at least two cells.
        is_left_out
            Whether the judged cells are among them.
        """
        counts = cells.counts
        value = _csr(log1p_cp10k(cells), counts)
        detected = _csr(np.ones(counts.nnz, dtype=np.float32), counts)
        length = np.sqrt(np.asarray(value.multiply(value).sum(axis=1)).ravel())
        unit = sp.csr_matrix(sp.diags(1.0 / np.maximum(length, 1e-12)).astype(np.float32) @ value)
        n_detected = np.asarray(detected.sum(axis=0), dtype=np.float64).ravel()
        total_value = np.asarray(value.sum(axis=0), dtype=np.float64).ravel()
        mean = total_value / np.maximum(n_detected, 1.0)
        offset, n = _mean_offset(value, mean[counts.indices])
        return cls(
            cells=cells,
            is_left_out=is_left_out,
            detected=detected,
            value=value,
            residual=_csr((value.data - mean[counts.indices] - np.repeat(offset, n)).astype(np.float32), counts),
            unit=unit,
            n_detected=n_detected,
            total_value=total_value,
            is_measured=np.asarray(cells.is_measured.any(axis=0)),
            theta=_theta_by_moments(cells),
            line=_line(np.log(np.maximum(cells.library_size, 1.0))[n > 0], offset[n > 0]),
        )

    @property
    def n_cells(self) -> int:
        """Number of reference cells."""
        return self.cells.n_cells

    def population(self, visible: CellCounts) -> GeneGuess:
        """Guess by how often each gene is detected, and its mean value where it is.

        Counts: zero-truncated negative binomial around depth times the gene's share of all UMIs.

        Parameters
        ----------
        visible
            The visible tokens of the judged cells, with the library sizes of the whole cells.
        """
        own = self._own(visible)
        n_others = self.n_cells - np.asarray(own.sum(axis=1))
        n_detected = self.n_detected - (own @ self.detected).toarray()
        total_value = self.total_value - (own @ self.value).toarray()
        rate = (n_detected + 0.5) / (n_others + 1.0)
        # a gene that the reference has no column for is unknown, not rare
        rate[:, ~self.is_measured] = rate[:, self.is_measured].mean(axis=1, keepdims=True)
        typical = total_value.sum(axis=1, keepdims=True) / np.maximum(n_detected.sum(axis=1, keepdims=True), 1.0)
        # one observation of a typical value: a gene that was never seen has none of its own
        mean_value = (total_value + typical) / (n_detected + 1.0)
        umis = np.asarray(self.cells.counts.sum(axis=0), dtype=np.float64).ravel() - (own @ self.cells.counts).toarray()
        share = (umis + 0.5) / (umis + 0.5).sum(axis=1, keepdims=True)

        def count_nll(
            cell: NDArray[np.int64], gene: NDArray[np.int64], count: NDArray[np.int64]
        ) -> NDArray[np.float32]:
            mean = visible.library_size[cell] * share[cell, gene]
            return _truncated_nll(count, mean, self.theta[gene])

        return self._guess(visible, rate, mean_value, count_nll)

    def neighbours(self, visible: CellCounts, prior: GeneGuess, *, k: int = N_NEIGHBOURS) -> GeneGuess:
        """Guess from the k reference cells most alike in what is visible.

        Alike: the scalar product of the visible log1p(CP10K) with a reference cell's, which has length 1. A cell of
        which nothing is visible has no neighbours, and is guessed as :meth:`population` does.

        Parameters
        ----------
        visible
            As for :meth:`population`.
        prior
            What that guesses of these cells.
        k
            Number of neighbours; all others where there are fewer.
        """
        alike = (_csr(log1p_cp10k(visible), visible.counts) @ self.unit.T).toarray()
        own = self._own(visible).tocoo()
        alike[own.row, own.col] = -1.0
        k = min(k, self.n_cells - int(self.is_left_out))
        # stable: which of two equally near cells is taken depends on nothing but their order in the reference
        nearest = np.argsort(-alike, axis=1, kind="stable")[:, :k]
        has_any = np.diff(visible.counts.indptr) > 0
        chosen = sp.csr_matrix(
            (np.repeat(has_any, k).astype(np.float32), nearest.ravel(), np.arange(0, nearest.size + 1, max(k, 1))),
            shape=alike.shape,
        )
        return self._of_cells(visible, prior, chosen)

    def same_label(
        self,
        visible: CellCounts,
        prior: GeneGuess,
        label: NDArray[np.int64],
        reference_label: NDArray[np.int64],
    ) -> GeneGuess:
        """Guess from all reference cells of the same label: what is known to who is told the cell type.

        Parameters
        ----------
        visible
            As for :meth:`population`.
        prior
            What that guesses of these cells.
        label, reference_label
            Codes of the judged cells and of the reference cells; negative: unknown, and alike to no cell.
        """
        is_same = (label[:, None] == reference_label) & (label >= 0)[:, None]
        own = self._own(visible).tocoo()
        is_same[own.row, own.col] = False
        return self._of_cells(visible, prior, sp.csr_matrix(is_same.astype(np.float32)))

    def _of_cells(self, visible: CellCounts, prior: GeneGuess, chosen: sp.csr_matrix) -> GeneGuess:
        """Guess from some reference cells of each judged cell, with the whole reference as prior."""
        n_chosen = np.asarray(chosen.sum(axis=1), dtype=np.float64)
        n_detected = (chosen @ self.detected).toarray().astype(np.float64)
        prior_rate = 1.0 / (1.0 + np.exp(-prior.log_odds.astype(np.float64)))
        rate = (n_detected + PRIOR_CELLS * prior_rate) / (n_chosen + PRIOR_CELLS)
        # cells of other depths have other values: what counts is how far a gene lies above its mean in its own cell
        above = (chosen @ self.residual).toarray() / (n_detected + PRIOR_DETECTIONS)
        mean_value = prior.mean_value + above.astype(np.float64)
        return self._guess(visible, rate, mean_value, None)

    def _guess(
        self,
        visible: CellCounts,
        rate: NDArray[np.float64],
        mean_value: NDArray[np.float64],
        count_nll: CountNLL | None,
    ) -> GeneGuess:
        counts = visible.counts
        cell = np.repeat(np.arange(visible.n_cells), np.diff(counts.indptr))
        offset, n = _mean_offset(_csr(log1p_cp10k(visible), counts), mean_value[cell, counts.indices])
        # of a cell without a visible token its depth says what its values are like
        slope, intercept = self.line
        by_depth = intercept + slope * np.log(np.maximum(visible.library_size, 1.0))
        rate = np.clip(rate, 1e-9, 1 - 1e-6)
        return GeneGuess(
            log_odds=(np.log(rate) - np.log1p(-rate)).astype(np.float32),
            mean_value=mean_value.astype(np.float32),
            offset=np.where(n > 0, offset, by_depth).astype(np.float32),
            count_nll=count_nll,
        )

    def _own(self, visible: CellCounts) -> sp.csr_matrix:
        """Return 1 where a reference cell is the judged cell itself, ``(n_cells, n_reference)``."""
        if not self.is_left_out:
            return sp.csr_matrix(np.zeros((visible.n_cells, self.n_cells), dtype=np.float32))
        is_own = visible.cell_index[:, None] == self.cells.cell_index
        return sp.csr_matrix(is_own.astype(np.float32))


def random_guess(visible: CellCounts, population: GeneGuess, *, seed: int) -> GeneGuess:
    """Guess at random, the null control: all genes alike in a random order, each with the value of another gene.

    Parameters
    ----------
    visible
        The judged cells.
    population
        Whose values are dealt out anew.
    seed
        Seed; each cell has its own stream, by its position in the source.
    """
    log_odds, mean_value = np.empty_like(population.log_odds), np.empty_like(population.mean_value)
    for row, index in enumerate(visible.cell_index):
        rng = np.random.default_rng([seed, _NULL_STREAM, int(index)])
        # too small to matter to a likelihood, and an order without ties
        log_odds[row] = 1e-4 * rng.random(log_odds.shape[1])
        mean_value[row] = rng.permutation(population.mean_value[row])
    return GeneGuess(log_odds, mean_value, population.offset)


def _csr(data: NDArray[np.floating], like: sp.csr_matrix) -> sp.csr_matrix:
    return sp.csr_matrix((data, like.indices, like.indptr), shape=like.shape)


def _mean_offset(value: sp.csr_matrix, mean: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean over each row's stored values of value minus mean; 0 for a row without any. And their number."""
    n = np.diff(value.indptr).astype(np.int64)
    cell = np.repeat(np.arange(n.size), n)
    return np.bincount(cell, weights=value.data - mean, minlength=n.size) / np.maximum(n, 1), n


def _line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and intercept by least squares; a constant where x does not vary."""
    if x.size < 2 or np.ptp(x) == 0:
        return 0.0, float(y.mean()) if y.size else 0.0
    slope = float(np.cov(x, y)[0, 1] / np.var(x, ddof=1))
    return slope, float(y.mean() - slope * x.mean())


def _theta_by_moments(cells: CellCounts) -> NDArray[np.float64]:
    """Inverse dispersion of each gene by moments around library size times its share of all UMIs."""
    counts = cells.counts.astype(np.float64)
    depth = cells.library_size
    total = np.asarray(counts.sum(axis=0)).ravel()
    share = total / max(total.sum(), 1.0)
    # sum over cells of (x - mu)^2 - mu, which is sum of mu^2 / theta in expectation
    square = np.asarray(counts.multiply(counts).sum(axis=0)).ravel()
    mean_square = share**2 * (depth**2).sum()
    excess = square - 2 * share * (counts.T @ depth) + mean_square - share * depth.sum()
    theta = np.divide(mean_square, excess, out=np.full(total.size, _THETA_RANGE[1]), where=excess > 0)
    return np.clip(theta, *_THETA_RANGE)


def _truncated_nll(
    count: NDArray[np.int64], mean: NDArray[np.float64], theta: NDArray[np.float64]
) -> NDArray[np.float32]:
    # deferred: the rest of this module needs no torch
    import torch

    from scdiva.losses import ztnb_nll

    log_mean, log_theta = torch.from_numpy(np.log(np.maximum(mean, 1e-12))), torch.from_numpy(np.log(theta))
    return np.asarray(ztnb_nll(torch.from_numpy(np.asarray(count, dtype=np.int64)), log_mean, log_theta))
