"""How well expected counts agree with counts that were held out.

Two questions. *Hidden entries*: part of the counts is set to zero; is more expected there than where the zero is true,
and how much? *Count splitting*: a model sees A ~ Binomial(x, rho) and is judged on B = x - A, which given the cell's
rates is independent of A (methods: Neufeld et al. 2024), so that copying A's noise does not pay.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, slots=True)
class HiddenEntries:
    """Entries of a count matrix that are judged: hidden ones, and zeros to compare them with.

    Parameters
    ----------
    cell, gene
        ``(n_entries,)`` int64: first all hidden entries, then as many zeros of the same cells, then as many zeros of
        the same genes.
    n_hidden
        Number of hidden entries; a third of the entries.
    """

    cell: NDArray[np.int64]
    gene: NDArray[np.int64]
    n_hidden: int


def hide_entries(
    counts: sp.csr_matrix, genes: NDArray[np.integer], *, share: float, rng: np.random.Generator
) -> tuple[sp.csr_matrix, HiddenEntries]:
    """Set a share of the nonzero counts of some genes to zero.

    Parameters
    ----------
    counts
        CSR ``(n_cells, n_genes)`` raw counts.
    genes
        Genes whose counts are hidden and judged.
    share
        Probability that a nonzero count is hidden.
    rng
        Source of randomness.

    Returns
    -------
    masked, entries
        The counts without the hidden ones, and the entries to judge. A hidden entry has two partners, drawn at random
        with repetition among the true zeros: one of the same cell, and one of the same gene. Where a cell or a gene has
        no zero at all, nothing is hidden.
    """
    chosen = np.asarray(genes, dtype=np.int64)
    position = np.full(counts.shape[1], -1, dtype=np.int64)
    position[chosen] = np.arange(chosen.size)
    cell_N = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    gene_N = position[counts.indices]
    is_zero = np.ones((counts.shape[0], chosen.size), dtype=bool)
    is_zero[cell_N[gene_N >= 0], gene_N[gene_N >= 0]] = False
    has_zero, has_zero_cell = np.any(is_zero, axis=1), np.any(is_zero, axis=0)
    hidden = np.flatnonzero((gene_N >= 0) & (rng.random(counts.nnz) < share))
    hidden = hidden[has_zero[cell_N[hidden]] & has_zero_cell[gene_N[hidden]]]
    cell, gene = cell_N[hidden].astype(np.int64), gene_N[hidden]
    gene_of_cell = _random_partner(is_zero, cell, rng)
    cell_of_gene = _random_partner(is_zero.T, gene, rng)
    data = counts.data.copy()
    data[hidden] = 0
    masked = sp.csr_matrix((data, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)
    masked.eliminate_zeros()
    entries = HiddenEntries(
        np.concatenate([cell, cell, cell_of_gene]), chosen[np.concatenate([gene, gene_of_cell, gene])], cell.size
    )
    return masked, entries


def _random_partner(is_zero: NDArray[np.bool_], row: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw a random column of each row at which the matrix is true."""
    partner = np.empty(row.size, dtype=np.int64)
    order = np.argsort(row, kind="stable")
    rows, starts = np.unique(row[order], return_index=True)
    for r, part in zip(rows, np.split(order, starts[1:]), strict=False):
        partner[part] = rng.choice(np.flatnonzero(is_zero[r]), part.size)
    return partner


@dataclass(frozen=True, slots=True)
class HiddenScores:
    """Agreement on hidden entries.

    Parameters
    ----------
    auroc_cell, auroc_gene
        Probability that more is expected of a hidden entry than of a true zero of the same cell, of the same gene in
        another cell; 0.5 is chance. The gene's mean alone is worth much in the first and nothing in the second.
    pearson, spearman
        Of true and expected log1p(CP10K) on the hidden entries.
    mae
        Mean absolute error of log1p(CP10K) on hidden entries and as many true zeros of the same cells together.
    """

    auroc_cell: float
    auroc_gene: float
    pearson: float
    spearman: float
    mae: float


def hidden_scores(
    truth: ArrayLike, expected_count: ArrayLike, expected_value: ArrayLike, n_hidden: int
) -> HiddenScores:
    """Score expectations at :class:`HiddenEntries`.

    Parameters
    ----------
    truth
        ``(n_entries,)`` true log1p(CP10K); 0 from ``n_hidden`` on.
    expected_count
        ``(n_entries,)`` expected counts: whether anything is seen depends on the depth of the cell, too. AUROCs are
        made of them.
    expected_value
        ``(n_entries,)`` log1p of expected CP10K.
    n_hidden
        Number of hidden entries.
    """
    # deferred: scikit-learn and scipy.stats take a second to load
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import roc_auc_score

    true, count, value = (np.asarray(a, dtype=np.float64) for a in (truth, expected_count, expected_value))
    m = n_hidden
    label = np.repeat([True, False], m)
    of_genes = np.concatenate([count[:m], count[2 * m :]])
    return HiddenScores(
        auroc_cell=float(roc_auc_score(label, count[: 2 * m])),
        auroc_gene=float(roc_auc_score(label, of_genes)),
        pearson=float(pearsonr(true[:m], value[:m]).statistic),
        spearman=float(spearmanr(true[:m], value[:m]).statistic),
        mae=float(np.abs(true[: 2 * m] - value[: 2 * m]).mean()),
    )


def poisson_deviance(counts: ArrayLike, expected: ArrayLike) -> NDArray[np.float64]:
    """Poisson deviance per entry of each cell, ``(n_cells,)``; 0 is perfect.

    2 (x ln(x / mu) - (x - mu)), mean over genes. For counts of the same cell, B's excess over Poisson noise is part of
    it whoever predicts, so that differences between methods mean more than the height.

    Parameters
    ----------
    counts
        ``(n_cells, n_genes)`` held-out counts.
    expected
        ``(n_cells, n_genes)`` expected counts; positive wherever a count is (else the deviance is infinite).
    """
    x, mu = np.asarray(counts, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_ratio = np.where(x > 0, x * np.log(x / mu), 0.0)
    return np.asarray(2 * (log_ratio - (x - mu)).mean(axis=1))


def gene_correlations(value: ArrayLike, expected: ArrayLike) -> NDArray[np.float64]:
    """Pearson correlation across cells of each gene, ``(n_genes,)``; 0 for a gene whose expectation is constant.

    Parameters
    ----------
    value, expected
        ``(n_cells, n_genes)`` on one scale, log1p(CP10K).
    """
    x, y = (np.asarray(a, dtype=np.float64) for a in (value, expected))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    size = np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
    return np.divide((x * y).sum(axis=0), size, out=np.zeros(x.shape[1]), where=size > 1e-9 * x.shape[0])


def coverage(counts: ArrayLike, low: ArrayLike, high: ArrayLike) -> float:
    """Share of counts within their intervals, ends included: at least the nominal share where those are honest.

    Counts are whole numbers: of most genes an interval holds 0 and 1, and with them more than the nominal share.
    """
    x = np.asarray(counts)
    return float(((x >= np.asarray(low)) & (x <= np.asarray(high))).mean())
