"""The forward process: which genes and values of a cell are hidden at time t.

The absorbing process hides each token with probability t. Here the *number* of hidden tokens is drawn first and the
tokens then, uniformly: m = floor(t n) + 1 of n tokens with t ~ U(0, 1) makes m uniform on 1..n, and the mean of the
cross-entropy over hidden tokens is then an unbiased estimate of the negative ELBO per token, with less variance than
independent coins (as LLaDA evaluates likelihoods).

Two levels (our decision): a gene may be hidden together with its value, or only its value. A value is
never visible where its gene is hidden.

Shape letters: B cells, N tokens of all cells together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class MaskKind(IntEnum):
    """What is hidden from the network in one cell."""

    JOINT = 0
    """Some genes, with their values."""
    VALUES = 1
    """Some values; all genes are visible (imputation)."""
    STAGED = 2
    """Some genes with their values, and the values of some further genes."""
    ALL = 3
    """Every gene and every value (the start of generation)."""


@dataclass(frozen=True, slots=True)
class Masks:
    """What is hidden in some cells.

    Parameters
    ----------
    is_gene_masked_N, is_value_masked_N
        Facts about each token, cell after cell; where the gene is hidden, the value is.
    n_hidden_B
        int64 number of hidden genes of each cell.
    """

    is_gene_masked_N: NDArray[np.bool_]
    is_value_masked_N: NDArray[np.bool_]
    n_hidden_B: NDArray[np.int64]


def stratified_times(n_cells: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw times in [0, 1), one in each of B equal parts, in random order: t_i = frac(u + i / B)."""
    return rng.permutation((rng.random() + np.arange(n_cells) / max(n_cells, 1)) % 1.0)


def draw_masks(
    n_tokens_B: NDArray[np.integer], kind_B: NDArray[np.integer], t_B: NDArray[np.float64], rng: np.random.Generator
) -> Masks:
    """Draw masks for training.

    Parameters
    ----------
    n_tokens_B
        Tokens of each cell; a cell without tokens has nothing to hide.
    kind_B
        :class:`MaskKind` of each cell.
    t_B
        Times in [0, 1).
    rng
        Source of randomness.
    """
    n = np.asarray(n_tokens_B, dtype=np.int64)
    count = _hidden_count(t_B, n)
    later = _hidden_count(np.maximum(t_B, rng.random(n.size)), n)
    n_gene = np.where(kind_B == MaskKind.VALUES, 0, np.where(kind_B == MaskKind.ALL, n, count))
    n_value = np.where(kind_B == MaskKind.STAGED, later, np.where(kind_B == MaskKind.ALL, n, count))
    return _masks(n, n_gene, n_value, rng)


def exact_count_masks(n_tokens_B: NDArray[np.integer], t: float, rng: np.random.Generator) -> Masks:
    """Hide round(t n) tokens of each cell, at least one, gene and value together: fixed masks for evaluation."""
    n = np.asarray(n_tokens_B, dtype=np.int64)
    count = np.minimum(n, np.maximum(1, np.rint(t * n).astype(np.int64)))
    return _masks(n, count, count, rng)


def _hidden_count(t_B: NDArray[np.float64], n: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.minimum(n, (t_B * n).astype(np.int64) + 1)


def _masks(
    n: NDArray[np.int64], n_gene: NDArray[np.int64], n_value: NDArray[np.int64], rng: np.random.Generator
) -> Masks:
    """Hide the tokens that come first in a random order; values go on where genes stop."""
    cell_N = np.repeat(np.arange(n.size), n)
    order = np.argsort(cell_N + rng.random(cell_N.size), kind="stable")
    rank_N = np.empty(cell_N.size, dtype=np.int64)
    rank_N[order] = np.arange(cell_N.size) - np.repeat(np.cumsum(n) - n, n)
    return Masks(rank_N < n_gene[cell_N], rank_N < n_value[cell_N], n_gene)
