"""From counts to tokens: which genes a cell keeps, in which order, padded to a common length.

Entropy-normalised order (methods: s = v / (H_g / ln N + 0.05) with v = log1p(CP10K); the published formula is not
available, our decision): genes that are expressed in few cells come first, housekeeping genes last. The entropies come
from the model's bundle and are never computed on query data, so a cell gets the same tokens whatever its company.

Shape letters: B cells, L tokens, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.statistics import GeneStatistics, depth_normalised
from scdiva.genes import GeneVocabulary
from scdiva.types import CellCounts

ENTROPY_EPSILON = 0.05
"""Added to the normalised entropy, so that a gene of a single cell does not get an infinite score."""

MAX_TOKENS = 1200
"""Default number of tokens a cell keeps (paper, section on the model configuration)."""


class TokenOrder(StrEnum):
    """How the tokens of a cell are ranked; the first L are kept."""

    ENTROPY = "entropy"
    """v / (H_g / ln N + 0.05), largest first."""
    EXPRESSION = "expression"
    """v, largest first."""
    RANDOM = "random"
    """A random permutation (ablation)."""


@dataclass(frozen=True, slots=True)
class CellTokens:
    """Cells as padded token sequences, best-ranked token first.

    Parameters
    ----------
    gene_id_BL
        int32 vocabulary rows (gene index + 2); 0 (PAD) where there is no token.
    value_BL
        float32 log1p(CP10K); 0 at padding.
    count_BL
        int32 raw counts; 0 at padding.
    is_pad_BL
        True where there is no token.
    n_detected_B
        int64 number of genes detected in the cell, which may exceed L: genes that were cut off are unknown, not zero.
    """

    gene_id_BL: NDArray[np.int32]
    value_BL: NDArray[np.float32]
    count_BL: NDArray[np.int32]
    is_pad_BL: NDArray[np.bool_]
    n_detected_B: NDArray[np.int64]

    @property
    def n_cells(self) -> int:
        """Number of cells B."""
        return int(self.gene_id_BL.shape[0])

    @property
    def n_tokens(self) -> int:
        """Padded length L."""
        return int(self.gene_id_BL.shape[1])

    @property
    def is_truncated_B(self) -> NDArray[np.bool_]:
        """Cells that have more detected genes than tokens."""
        return self.n_detected_B > (~self.is_pad_BL).sum(axis=1)


def log1p_cp10k(cells: CellCounts) -> NDArray[np.float32]:
    """Return log1p(CP10K) of the stored counts, ``(nnz,)`` float32, in the order of ``cells.counts.data``."""
    return np.log1p(depth_normalised(cells).data).astype(np.float32)


def serialize(
    cells: CellCounts,
    statistics: GeneStatistics,
    *,
    max_tokens: int = MAX_TOKENS,
    order: TokenOrder | str = TokenOrder.ENTROPY,
    rng: np.random.Generator | None = None,
) -> CellTokens:
    """Turn cells into token sequences.

    Parameters
    ----------
    cells
        Raw counts ``(n_cells, n_genes)`` in vocabulary order.
    statistics
        Statistics of the *training* corpus, from the bundle.
    max_tokens
        L, the largest number of tokens a cell keeps; the result is as long as its longest cell.
    order
        How tokens are ranked. Equal scores keep the order of the vocabulary.
    rng
        Needed for ``order="random"`` only.

    Returns
    -------
    CellTokens
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, found {max_tokens}")
    counts = cells.counts
    n_stored = np.diff(counts.indptr).astype(np.int64)
    value = log1p_cp10k(cells)
    ranked = _rank_within_rows(_scores(cells, value, statistics, TokenOrder(order), rng), n_stored)

    n_kept = np.minimum(n_stored, max_tokens)
    length = int(n_kept.max(initial=0))
    is_pad = np.arange(length) >= n_kept[:, None]
    # positions in the flat, row-wise ranked arrays of the tokens that are kept
    kept = ranked[(counts.indptr[:-1].astype(np.int64)[:, None] + np.arange(length))[~is_pad]]
    gene_id = np.full(is_pad.shape, GeneVocabulary.PAD_ROW, dtype=np.int32)
    padded_value = np.zeros(is_pad.shape, dtype=np.float32)
    padded_count = np.zeros(is_pad.shape, dtype=np.int32)
    gene_id[~is_pad] = counts.indices[kept] + GeneVocabulary.FIRST_GENE_ROW
    padded_value[~is_pad] = value[kept]
    padded_count[~is_pad] = counts.data[kept]
    return CellTokens(gene_id, padded_value, padded_count, is_pad, n_stored)


def token_ranks(
    cells: CellCounts,
    statistics: GeneStatistics,
    *,
    order: TokenOrder | str = TokenOrder.ENTROPY,
    rng: np.random.Generator | None = None,
    value: NDArray[np.float32] | None = None,
) -> NDArray[np.int64]:
    """Return the rank of every stored count among those of its cell, ``(nnz,)``; 0 is the best.

    Parameters are those of :func:`serialize`; ``value``, ``(nnz,)`` float32, is ranked by in place of log1p(CP10K).
    """
    n_stored = np.diff(cells.counts.indptr).astype(np.int64)
    value = log1p_cp10k(cells) if value is None else value
    ranked = _rank_within_rows(_scores(cells, value, statistics, TokenOrder(order), rng), n_stored)
    rank = np.empty_like(ranked)
    rank[ranked] = np.arange(ranked.size) - np.repeat(np.cumsum(n_stored) - n_stored, n_stored)
    return rank


def _scores(
    cells: CellCounts,
    value: NDArray[np.float32],
    statistics: GeneStatistics,
    order: TokenOrder,
    rng: np.random.Generator | None,
) -> NDArray[np.float32]:
    if cells.n_genes != statistics.n_genes:
        raise ValueError(f"cells have {cells.n_genes} genes, the statistics {statistics.n_genes}")
    if order is TokenOrder.EXPRESSION:
        return value
    if order is TokenOrder.ENTROPY:
        weight = (1.0 / (statistics.normalised_entropy + ENTROPY_EPSILON)).astype(np.float32)
        return value * weight[cells.counts.indices]
    if rng is None:
        raise ValueError("order='random' needs rng")
    return rng.random(value.size, dtype=np.float32)


def _rank_within_rows(score: NDArray[np.float32], n_stored: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return flat positions sorted by (row, score descending, position): one integer sort for the whole block.

    Non-negative float32 numbers sort like their bit patterns, so (row, inverted score bits, position in the row) fits
    into one 64-bit key. Sorting the keys themselves, rather than their indices, is what NumPy does fastest; the low
    bits then tell where each came from. Positions within a row are in gene order, which settles ties.
    """
    position_bits = max(int(n_stored.max(initial=1) - 1).bit_length(), 1)
    rows_per_sort = 1 << (64 - 32 - position_bits)
    starts = np.concatenate([[0], np.cumsum(n_stored)])
    row_start = np.repeat(starts[:-1], n_stored)
    row = np.repeat(np.arange(n_stored.size, dtype=np.uint64), n_stored)
    position = (np.arange(score.size) - row_start).astype(np.uint64)
    inverted_bits = ~score.view(np.uint32)
    ranked = np.empty(score.size, dtype=np.int64)
    for first in range(0, n_stored.size, rows_per_sort):
        part = slice(starts[first], starts[min(first + rows_per_sort, n_stored.size)])
        key = (row[part] - np.uint64(first)) << np.uint64(32)
        key |= inverted_bits[part]
        key <<= np.uint64(position_bits)
        key |= position[part]
        key.sort()
        ranked[part] = (key & np.uint64((1 << position_bits) - 1)).astype(np.int64)
    ranked += row_start
    return ranked


def to_counts(tokens: CellTokens, n_genes: int) -> sp.csr_matrix:
    """Put tokens back into a CSR count matrix ``(n_cells, n_genes)``; genes that were cut off are absent."""
    is_token = ~tokens.is_pad_BL
    rows = np.repeat(np.arange(tokens.n_cells), is_token.sum(axis=1))
    genes = tokens.gene_id_BL[is_token] - GeneVocabulary.FIRST_GENE_ROW
    result = sp.csr_matrix((tokens.count_BL[is_token], (rows, genes)), shape=(tokens.n_cells, n_genes))
    result.sort_indices()
    return result


def collate(parts: list[CellTokens]) -> CellTokens:
    """Join token blocks of different lengths into one, padded to the longest."""
    length = max(part.n_tokens for part in parts)

    def padded(array: NDArray[Any], fill: int | bool) -> NDArray[Any]:
        return np.pad(array, ((0, 0), (0, length - array.shape[1])), constant_values=fill)

    return CellTokens(
        gene_id_BL=np.concatenate([padded(p.gene_id_BL, GeneVocabulary.PAD_ROW) for p in parts]),
        value_BL=np.concatenate([padded(p.value_BL, 0) for p in parts]),
        count_BL=np.concatenate([padded(p.count_BL, 0) for p in parts]),
        is_pad_BL=np.concatenate([padded(p.is_pad_BL, True) for p in parts]),
        n_detected_B=np.concatenate([p.n_detected_B for p in parts]),
    )
