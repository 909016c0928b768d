"""Which cells of several batches are alike: neighbours within a batch, mutual nearest neighbours across batches.

Two cells of different batches that are among each other's nearest neighbours are very probably of one type: a type that
one batch lacks has no neighbour there that chooses it back (Haghverdi et al. 2018). They are what ties batches together
where no labels are given. Of a small batch fewer neighbours are taken, at most a tenth of its cells: all of a batch of
20 are among 20 neighbours, whatever they are.

Shape letters: N cells, F features, K neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

_SIMILARITIES_AT_ONCE = 10_000_000
_CELLS_PER_NEIGHBOUR = 10
_MICRO_CLUSTERS = 200
_CELLS_PER_MICRO_CLUSTER = 10


@dataclass(frozen=True, slots=True)
class BatchNeighbours:
    """Neighbours of each cell.

    Parameters
    ----------
    within
        ``(N, K)`` int64: other cells of the same batch; the cell itself where it is the only one of its batch.
    across
        ``(N, N)`` CSR of ones: mutual nearest neighbours in other batches; symmetric.
    """

    within: NDArray[np.int64]
    across: sp.csr_matrix

    @classmethod
    def find(cls, points: NDArray[np.floating], batch: NDArray[np.integer], *, k_within: int, k_across: int) -> Self:
        """Find neighbours by cosine similarity; exact.

        Parameters
        ----------
        points
            ``(N, F)``, centred.
        batch
            ``(N,)`` code of each cell's batch.
        k_within, k_across
            Neighbours within the batch, and among which two cells of different batches must find each other; at most a
            tenth of the (smaller) batch's cells.
        """
        unit = np.asarray(points, dtype=np.float32)
        unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
        n_cells = unit.shape[0]
        rows_of = [np.flatnonzero(batch == code) for code in np.unique(batch)]
        within = np.tile(np.arange(n_cells)[:, None], (1, k_within))
        pairs: list[NDArray[np.int64]] = []
        for i, one in enumerate(rows_of):
            if one.size > 1:
                k = _at_most(k_within, one.size)
                # one more than wanted: the cell itself is among them, unless others are at the same place
                near = one[_nearest(unit[one], unit[one], k + 1)]
                is_self = near == one[:, None]
                is_self[~is_self.any(axis=1), -1] = True
                within[one] = near[~is_self].reshape(one.size, k)[:, np.arange(k_within) % k]
            for other in rows_of[i + 1 :]:
                k = _at_most(k_across, min(one.size, other.size))
                there, back = _choices(unit[one], unit[other], k), _choices(unit[other], unit[one], k)
                mutual = there.multiply(back.T).tocoo()
                pairs.append(np.stack([one[mutual.row], other[mutual.col]]))
        row, column = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), dtype=np.int64)
        ones = np.ones(2 * row.size, dtype=np.int8)
        both = (np.concatenate([row, column]), np.concatenate([column, row]))
        return cls(within, sp.csr_matrix((ones, both), shape=(n_cells, n_cells)))

    @property
    def n_pairs(self) -> int:
        """Pairs of mutual nearest neighbours."""
        return int(self.across.nnz) // 2

    @property
    def has_across(self) -> NDArray[np.bool_]:
        """Which cells have a mutual nearest neighbour in another batch."""
        return np.diff(self.across.indptr) > 0

    def partners(
        self, rows: NDArray[np.integer], rng: np.random.Generator, *, p_self: float, p_across: float
    ) -> NDArray[np.int64]:
        """Draw a cell that is alike for each of some cells.

        Parameters
        ----------
        rows
            Which cells.
        rng
            Source of randomness.
        p_self
            Share of cells that are their own partner (in another view of their counts).
        p_across
            Share that gets a mutual nearest neighbour of another batch, where there is one; the rest gets a neighbour
            within the batch.
        """
        draw, place = rng.random(rows.size), rng.random(rows.size)
        partner = self.within[rows, (place * self.within.shape[1]).astype(np.int64)]
        partner = np.where(draw < p_self, rows, partner)
        start, n = self.across.indptr[rows], np.diff(self.across.indptr)[rows]
        is_across = (draw >= p_self) & (draw < p_self + p_across) & (n > 0)
        at = (start + (place * n).astype(np.int64))[is_across]
        partner[is_across] = self.across.indices[at]
        return partner.astype(np.int64)


def _at_most(k: int, size: int) -> int:
    return min(k, max(1, size // _CELLS_PER_NEIGHBOUR))


def _nearest(query: NDArray[np.float32], among: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions of the k most similar, nearest first or not; ``(n_query, k)``."""
    found = np.empty((query.shape[0], k), dtype=np.int64)
    chunk = max(1, _SIMILARITIES_AT_ONCE // among.shape[0])
    for first in range(0, query.shape[0], chunk):
        similarity = query[first : first + chunk] @ among.T
        found[first : first + chunk] = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    return found


def _choices(query: NDArray[np.float32], among: NDArray[np.float32], k: int) -> sp.csr_matrix:
    """Sparse matrix of ones: whom each query chooses."""
    k = min(k, among.shape[0])
    chosen = _nearest(query, among, k)
    indptr = np.arange(0, chosen.size + 1, k)
    return sp.csr_matrix((np.ones(chosen.size, dtype=np.int8), chosen.ravel(), indptr), (len(query), len(among)))


def cells_per_kind(points: NDArray[np.floating], n_kinds: int, *, seed: int) -> NDArray[np.int64]:
    """Tell for each cell how many cells are of its kind, kinds being found without labels.

    Ward clusters of micro-clusters: k-means alone would cut up abundant types until all clusters are of one size.

    Parameters
    ----------
    points
        ``(N, F)``, centred; compared by cosine.
    n_kinds
        Number of kinds; fewer where there are few cells.
    seed
        Of k-means.

    Returns
    -------
    numpy.ndarray
        ``(N,)``.
    """
    from sklearn.cluster import AgglomerativeClustering, KMeans

    unit = points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)
    n_micro = min(_MICRO_CLUSTERS, unit.shape[0] // _CELLS_PER_MICRO_CLUSTER)
    if n_micro <= n_kinds:
        return np.full(unit.shape[0], unit.shape[0], dtype=np.int64)
    micro = KMeans(n_micro, n_init=1, random_state=seed).fit(unit)
    kind = AgglomerativeClustering(n_kinds).fit(micro.cluster_centers_).labels_[micro.labels_]
    return np.bincount(kind)[kind].astype(np.int64)
