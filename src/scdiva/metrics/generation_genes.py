"""What generated cells get right gene by gene: moments, zeros, depth, curves, markers and correlations.

Moments and correlations are of log1p(CP10K), which every generator has; zeros and genes per cell of the values
themselves; library sizes and copies of counts, which only generators of counts have.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.metrics.generation_space import LabelledCells, NotMeasurableError, Score, log_cp10k

N_BINS = 20
N_CORRELATED_GENES = 500
N_MARKERS = 50
LOG_FOLD_OFFSET = 0.1
"""Added to both means of CP10K in a log fold change; it matters (PerturBench takes the same)."""
MIN_CELLS_OF_TYPE = 10
_MIN_DETECTION_OF_MARKERS = 0.1
_FEWEST = 10


def correlation(x: NDArray[np.floating], y: NDArray[np.floating], *, by_rank: bool) -> float:
    """Spearman's (``by_rank``) or Pearson's correlation; NotMeasurableError where one side is constant."""
    from scipy.stats import rankdata

    if x.size < 3:
        raise NotMeasurableError(f"a correlation needs 3 values, found {x.size}")
    a, b = (rankdata(v) if by_rank else v.astype(np.float64) for v in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    if size <= 1e-12 * x.size:
        raise NotMeasurableError("one side of the correlation is constant")
    return float(a @ b) / size


def gene_moments(counts: sp.csr_matrix) -> dict[str, NDArray[np.float64]]:
    """Return mean, variance and coefficient of variation of log1p(CP10K), and the share of zeros, of every gene.

    The coefficient of variation is NaN where the mean is 0.
    """
    n_cells = counts.shape[0]
    values = log_cp10k(counts).astype(np.float64)
    mean = np.asarray(values.mean(axis=0)).ravel()
    square = np.asarray(values.multiply(values).mean(axis=0)).ravel()
    variance = np.maximum(square - mean**2, 0.0) * n_cells / max(n_cells - 1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        cv = np.where(mean > 0, np.sqrt(variance) / mean, np.nan)
    return {"mean": mean, "variance": variance, "zero_fraction": _zero_fraction(counts), "cv": cv}


def _zero_fraction(counts: sp.csr_matrix) -> NDArray[np.float64]:
    return 1.0 - np.bincount(counts.indices, minlength=counts.shape[1]) / max(counts.shape[0], 1)


def moment_agreement(real: sp.csr_matrix, generated: sp.csr_matrix, is_used: NDArray[np.bool_]) -> dict[str, Score]:
    """Correlation over genes of mean, variance, zero fraction and coefficient of variation.

    Parameters
    ----------
    real, generated
        ``(n_cells, n_genes)``.
    is_used
        ``(n_genes,)`` genes to use: the same for every generator. Genes without any count on one side have no
        coefficient of variation and are left out of that correlation only.

    Returns
    -------
    dict
        ``spearman_mean``, ``pearson_mean`` and so on. The mean alone says next to nothing.
    """
    ours, theirs = gene_moments(real), gene_moments(generated)
    scores = {}
    for name in ours:
        x, y = ours[name][is_used], theirs[name][is_used]
        is_there = np.isfinite(x) & np.isfinite(y)
        for kind, by_rank in (("spearman", True), ("pearson", False)):
            scores[f"{kind}_{name}"] = Score.of(correlation, x[is_there], y[is_there], by_rank=by_rank)
    return scores


def zero_fraction_error(real: sp.csr_matrix, generated: sp.csr_matrix, is_used: NDArray[np.bool_]) -> float:
    """Mean absolute difference of the genes' shares of zeros."""
    if not is_used.any():
        raise NotMeasurableError("no genes to use")
    return float(np.abs(_zero_fraction(real) - _zero_fraction(generated))[is_used].mean())


def kolmogorov_smirnov(x: NDArray[np.floating], y: NDArray[np.floating]) -> float:
    """Largest difference of two empirical distribution functions, 0 to 1."""
    if min(x.size, y.size) < 2:
        raise NotMeasurableError("needs at least 2 cells on both sides")
    both = np.sort(np.concatenate([x, y]))
    shares = [np.searchsorted(np.sort(v), both, side="right") / v.size for v in (x, y)]
    return float(np.abs(shares[0] - shares[1]).max())


def library_size_ks(real: LabelledCells, generated: LabelledCells) -> float:
    """Kolmogorov-Smirnov distance of library sizes."""
    if not generated.is_counts:
        raise NotMeasurableError("the generator emits no counts")
    return kolmogorov_smirnov(*(np.asarray(c.counts.sum(axis=1), dtype=np.float64).ravel() for c in (real, generated)))


def genes_per_cell_ks(real: LabelledCells, generated: LabelledCells) -> float:
    """Kolmogorov-Smirnov distance of the numbers of genes per cell."""
    return kolmogorov_smirnov(*(np.diff(c.counts.indptr).astype(np.float64) for c in (real, generated)))


def curve(counts: sp.csr_matrix, kind: str, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the median over genes of log10 variance or of the zero fraction, in bins of the mean.

    Parameters
    ----------
    counts
        ``(n_cells, n_genes)``.
    kind
        ``"variance"`` (of CP10K) or ``"dropout"``.
    edges
        ``(n_bins + 1,)`` of log10 of the mean CP10K.

    Returns
    -------
    numpy.ndarray
        ``(n_bins,)``; NaN where fewer than three genes are.
    """
    total = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
    values = sp.csr_matrix(sp.diags_array(1e4 / total) @ counts)
    mean = np.asarray(values.mean(axis=0)).ravel()
    is_used = mean > 0
    if kind == "variance":
        variance = np.asarray(values.multiply(values).mean(axis=0)).ravel() - mean**2
        is_used &= variance > 0
        y = np.log10(variance[is_used])
    else:
        y = _zero_fraction(counts)[is_used]
    position = np.digitize(np.log10(mean[is_used]), edges) - 1
    return np.array(
        [np.median(y[position == i]) if (position == i).sum() >= 3 else np.nan for i in range(edges.size - 1)]
    )


def curve_edges(counts: sp.csr_matrix, n_bins: int = N_BINS) -> NDArray[np.float64]:
    """Return edges of bins that hold equally many genes of real cells, by log10 of the mean CP10K."""
    total = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
    mean = np.asarray((sp.diags_array(1e4 / total) @ counts).mean(axis=0)).ravel()
    if (mean > 0).sum() < 3 * n_bins:
        raise NotMeasurableError(f"{n_bins} bins need {3 * n_bins} genes with counts, found {int((mean > 0).sum())}")
    return np.unique(np.quantile(np.log10(mean[mean > 0]), np.linspace(0, 1, n_bins + 1)))


def curve_error(real: sp.csr_matrix, generated: sp.csr_matrix, kind: str) -> float:
    """Mean absolute difference of :func:`curve` between two samples, over bins that both have genes in.

    Genes that real cells have one or two counts of fill the first bins: what is compared there is how counts of one
    molecule look, and all generators of counts agree on it.
    """
    edges = curve_edges(real)
    difference = np.abs(curve(real, kind, edges) - curve(generated, kind, edges))
    if np.isfinite(difference).sum() < 3:
        raise NotMeasurableError("the curves share fewer than 3 bins")
    return float(np.nanmean(difference))


def gene_correlations(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the upper triangle of the correlations between columns; NaN where a column is constant."""
    centred = values - values.mean(axis=0, dtype=np.float64)
    size = np.linalg.norm(centred, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        centred = np.where(size > 1e-9, centred / size, np.nan)
    return (centred.T @ centred)[np.triu_indices(values.shape[1], 1)]


def gene_correlation_agreement(real: NDArray[np.floating], generated: NDArray[np.floating]) -> float:
    """Pearson correlation, over pairs of genes, of the genes' correlations in two samples.

    Pairs with a gene that is constant in the real sample are left out; a pair that is constant among generated cells
    counts as uncorrelated there.

    Parameters
    ----------
    real, generated
        ``(n_cells, n_genes)`` log1p(CP10K); with the mean of each cell's type taken off for the agreement within types.
    """
    if min(len(real), len(generated)) < _FEWEST:
        raise NotMeasurableError(f"needs {_FEWEST} cells on both sides, found {min(len(real), len(generated))}")
    ours, theirs = gene_correlations(real), gene_correlations(generated)
    is_there = np.isfinite(ours)
    return correlation(ours[is_there], np.nan_to_num(theirs[is_there]), by_rank=False)


def centred_by_type(values: NDArray[np.floating], labels: NDArray[np.str_]) -> NDArray[np.float64]:
    """Take the mean of its type off every cell."""
    result = values.astype(np.float64)
    for label in np.unique(labels):
        result[labels == label] -= result[labels == label].mean(axis=0)
    return result


def log_fold_changes(cells: LabelledCells, label: str) -> NDArray[np.float64]:
    """Return log2 of the mean CP10K of a type over that of all other cells, 0.1 added to both, ``(n_genes,)``."""
    values = log_cp10k(cells.counts)
    values.data = np.expm1(values.data)
    is_type = cells.labels == label
    inside, outside = (np.asarray(values[rows].mean(axis=0)).ravel() for rows in (is_type, ~is_type))
    return np.log2(inside + LOG_FOLD_OFFSET) - np.log2(outside + LOG_FOLD_OFFSET)


def marker_genes(cells: LabelledCells, n_markers: int = N_MARKERS) -> NDArray[np.int64]:
    """Return the union over types of the genes with the largest log fold change, among those in 10 % of the type.

    To be called with cells that are in neither of the samples compared. Types of fewer than ten cells have no say.
    """
    found: set[int] = set()
    for label, n in zip(*np.unique(cells.labels, return_counts=True), strict=True):
        if n < MIN_CELLS_OF_TYPE or n == cells.n_cells:
            continue
        is_frequent = 1.0 - _zero_fraction(cells.counts[cells.labels == label]) >= _MIN_DETECTION_OF_MARKERS
        fold = np.where(is_frequent, log_fold_changes(cells, label), -np.inf)
        order = np.argsort(-fold, kind="stable")[:n_markers]
        found.update(int(gene) for gene in order[fold[order] > 0])
    return np.array(sorted(found), dtype=np.int64)


def marker_agreement(real: LabelledCells, generated: LabelledCells, markers: NDArray[np.int64], label: str) -> float:
    """Spearman correlation, over marker genes, of a type's log fold changes in two samples."""
    for cells in (real, generated):
        n = int((cells.labels == label).sum())
        if n < MIN_CELLS_OF_TYPE or n == cells.n_cells:
            raise NotMeasurableError(f"needs {MIN_CELLS_OF_TYPE} cells of the type and some of others, found {n}")
    return correlation(
        log_fold_changes(real, label)[markers], log_fold_changes(generated, label)[markers], by_rank=True
    )


def n_copies(generated: LabelledCells, train: LabelledCells) -> float:
    """Count generated cells whose whole count vector equals that of a training cell (empty cells aside)."""
    if not generated.is_counts:
        raise NotMeasurableError("the generator emits no counts")
    known = set(_row_keys(train.counts))
    return float(sum(key in known for key in _row_keys(generated.counts)))


def _row_keys(counts: sp.csr_matrix) -> list[bytes]:
    indices, data = counts.indices.astype(np.int64), np.rint(counts.data).astype(np.int64)
    spans = zip(counts.indptr[:-1], counts.indptr[1:], strict=True)
    return [indices[a:b].tobytes() + data[a:b].tobytes() for a, b in spans if b > a]
