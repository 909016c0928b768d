"""Simple gene networks: what any other is judged against, and null controls.

All have one shape: cells, the regulators and targets among their genes, and a seed; back comes a
:class:`~scdiva.data.network.GeneNetwork`. Values are log1p(CP10K). A regulator has no score with itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.network import GeneNetwork
from scdiva.data.statistics import depth_normalised
from scdiva.errors import ConfigError
from scdiva.types import CellCounts

MAX_CELLS_OF_TREES = 2000
"""More cells than this are drawn from, for the regressions."""
N_TREES = 100
_BLOCK = 500
_RANDOM_STREAM, _PERMUTED_STREAM, _CELL_STREAM = 41, 43, 47

Inference = Callable[..., GeneNetwork]


def spearman(
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    *,
    seed: int = 0,
) -> GeneNetwork:
    """Co-expression: the absolute rank correlation over cells, with its sign.

    Parameters
    ----------
    cells
        Cells, all of which measure the regulators and targets.
    symbols
        ``(n_genes,)`` symbol of every gene of the cells.
    regulators, targets
        ``(R,)`` and ``(G,)`` genes (columns of the counts).
    seed
        Seed; this method draws nothing.

    Raises
    ------
    ConfigError
        Fewer than three cells, no regulator or no target.
    """
    values = log_values(cells, regulators, targets)
    correlation = _correlations(*(_ranks(each) for each in values))
    return _signed("spearman", correlation, cells, symbols, regulators, targets, "|Spearman correlation| over cells")


def pearson(
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    *,
    seed: int = 0,
) -> GeneNetwork:
    """Co-expression: the absolute correlation of log1p(CP10K), with its sign. Parameters as in :func:`spearman`."""
    correlation = _correlations(*log_values(cells, regulators, targets))
    return _signed("pearson", correlation, cells, symbols, regulators, targets, "|Pearson correlation| of log1p(CP10K)")


def covariance(
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    *,
    seed: int = 0,
) -> GeneNetwork:
    """Co-expression: the absolute covariance of log1p(CP10K), with its sign; variable genes have more of it.

    Parameters as in :func:`spearman`.
    """
    values = [each - each.mean(axis=0, dtype=np.float64) for each in log_values(cells, regulators, targets)]
    found = values[0].T @ values[1] / cells.n_cells
    return _signed("covariance", found, cells, symbols, regulators, targets, "|covariance| of log1p(CP10K)")


def boosting(
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    *,
    seed: int = 0,
) -> GeneNetwork:
    """Boosted regression of each target on the regulators, in the manner of GRNBoost2; no signs.

    ``sklearn.ensemble.GradientBoostingRegressor`` with GRNBoost2's depth, shares of regulators and cells (3, 0.1, 0.9;
    Moerman et al. 2019, doi:10.1093/bioinformatics/bty916), but 100 steps of 0.05 in the place of early stopping at
    0.01, on at most :data:`MAX_CELLS_OF_TREES` cells (our decision: minutes). Arboreto, which has GRNBoost2 itself, is
    not kept up and does not run with current dask. The score is the share of the target's explained variance; targets
    compare by how well all their regulators explain them (it is multiplied by R² on the training cells, as GRNBoost2's
    sums are).

    Parameters as in :func:`spearman`; the seed is that of cells and trees.
    """
    from sklearn.ensemble import GradientBoostingRegressor

    def fitted(number: int) -> GradientBoostingRegressor:
        return GradientBoostingRegressor(
            n_estimators=N_TREES,
            learning_rate=0.05,
            max_depth=3,
            max_features=0.1,
            subsample=0.9,
            random_state=number,
        )

    return _of_trees("boosting", fitted, cells, symbols, regulators, targets, seed)


def extra_trees(
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    *,
    seed: int = 0,
) -> GeneNetwork:
    """Extremely randomised trees of each target on the regulators, in the manner of GENIE3; no signs.

    GENIE3: Huynh-Thu et al. 2010, doi:10.1371/journal.pone.0012776; 100 trees of at most :data:`MAX_CELLS_OF_TREES`
    cells, leaves of at least five cells (our decision). Parameters as in :func:`boosting`.
    """
    from sklearn.ensemble import ExtraTreesRegressor

    def fitted(number: int) -> ExtraTreesRegressor:
        return ExtraTreesRegressor(N_TREES, max_features="sqrt", min_samples_leaf=5, random_state=number)

    return _of_trees("extra_trees", fitted, cells, symbols, regulators, targets, seed)


def expression(
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    *,
    seed: int = 0,
) -> GeneNetwork:
    """Score a pair by how much its genes are expressed: it knows nothing of pairs.

    The log of the product of the shares of cells that they are detected in. Databases know more of well-expressed
    genes, and methods score them higher: what this has is no regulation. Parameters as in :func:`spearman`.
    """
    detected = np.bincount(cells.counts.indices, minlength=cells.n_genes) / max(cells.n_cells, 1)
    log = np.log(np.maximum(detected, 1e-12))
    score = log[regulators][:, None] + log[targets][None, :]
    text = "log of the product of the shares of cells that regulator and target are detected in"
    return _network("expression", score, None, cells, symbols, regulators, targets, text, is_directed=False)


def variability(
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    *,
    seed: int = 0,
) -> GeneNetwork:
    """Score a pair by how much its genes vary: it knows nothing of pairs.

    The product of the standard deviations of log1p(CP10K). Parameters as in :func:`spearman`.
    """
    spread = [values.std(axis=0, dtype=np.float64) for values in log_values(cells, regulators, targets)]
    text = "product of the standard deviations of log1p(CP10K)"
    score = spread[0][:, None] * spread[1][None, :]
    return _network("variability", score, None, cells, symbols, regulators, targets, text, is_directed=False)


def random(
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    *,
    seed: int = 0,
) -> GeneNetwork:
    """Random scores and signs: chance. Parameters as in :func:`spearman`."""
    rng = np.random.default_rng([seed, _RANDOM_STREAM])
    shape = (len(regulators), len(targets))
    sign = rng.choice(np.array([-1, 1], dtype=np.int8), size=shape)
    text = "a random number"
    return _network("random", rng.random(shape), sign, cells, symbols, regulators, targets, text, is_directed=True)


BASELINES: Mapping[str, Inference] = {
    "spearman": spearman,
    "pearson": pearson,
    "covariance": covariance,
    "boosting": boosting,
    "extra_trees": extra_trees,
    "expression": expression,
    "variability": variability,
    "random": random,
}
TREES = ("boosting", "extra_trees")
"""Seconds for each target: they are run on a sample of targets."""
TITLES = {
    "spearman": "co-expression (Spearman)",
    "pearson": "co-expression (Pearson)",
    "covariance": "co-expression (covariance)",
    "boosting": "boosted regression (as GRNBoost2)",
    "extra_trees": "extremely randomised trees (as GENIE3)",
    "expression": "expression of the two genes alone",
    "variability": "variability of the two genes alone",
    "random": "random numbers",
}


def permuted(cells: CellCounts, *, seed: int) -> CellCounts:
    """Return cells in which each gene's counts are dealt out anew among the cells of its file, gene by gene.

    Genes keep their distributions and lose every relation to each other: what a method finds here is none.
    """
    rng = np.random.default_rng([seed, _PERMUTED_STREAM])
    row_parts, column_parts, data_parts = [], [], []
    for source in np.unique(cells.source_of_cell):
        rows = np.flatnonzero(cells.source_of_cell == source)
        counts = sp.csc_matrix(cells.counts[rows])
        for gene in np.flatnonzero(np.diff(counts.indptr)):
            start, stop = counts.indptr[gene], counts.indptr[gene + 1]
            row_parts.append(rows[rng.permutation(rows.size)[: stop - start]])
            column_parts.append(np.full(stop - start, gene))
            data_parts.append(counts.data[start:stop])
    places = (np.concatenate(row_parts), np.concatenate(column_parts))
    found = sp.csr_matrix((np.concatenate(data_parts), places), shape=cells.counts.shape, dtype=cells.counts.dtype)
    found.sort_indices()
    return CellCounts(
        counts=found,
        library_size=np.asarray(found.sum(axis=1), dtype=np.float64).ravel(),
        cell_index=cells.cell_index,
        source_of_cell=cells.source_of_cell,
        is_measured=cells.is_measured,
        condition=cells.condition,
    )


def degree_part(network: GeneNetwork) -> GeneNetwork:
    """Return what a network says of genes rather than of pairs: how large the target's scores are, and the regulator's.

    The root mean square of the scores of the target over all regulators times that of the regulator over all targets.
    It scores each gene as the method does, and knows nothing of which regulator has which target.
    """
    square = np.square(network.score.astype(np.float64))
    is_known = np.isfinite(square)
    parts = []
    for axis in (1, 0):
        n = is_known.sum(axis=axis, keepdims=True)
        total = np.where(is_known, square, 0.0).sum(axis=axis, keepdims=True)
        parts.append(np.sqrt(np.divide(total, n, out=np.zeros(n.shape), where=n > 0)))
    score = np.where(is_known, parts[0] * parts[1], np.nan).astype(np.float32)
    return GeneNetwork(
        f"{network.method}, genes alone",
        network.regulators,
        network.targets,
        score,
        None,
        False,
        "root mean square of the target's scores times that of the regulator's",
        network.n_cells,
        network.group,
    )


def log_values(
    cells: CellCounts, *genes: NDArray[np.integer], rows: NDArray[np.integer] | None = None
) -> list[NDArray[np.float32]]:
    """Return log1p(CP10K) of genes, dense ``(n_cells, n)`` each.

    Raises
    ------
    ConfigError
        Fewer than three cells, or no genes.
    """
    if cells.n_cells < 3 or not all(len(each) for each in genes):
        raise ConfigError(
            f"{cells.n_cells} cells, {' and '.join(str(len(each)) for each in genes)} regulators and targets",
            expected="at least three cells, a regulator and a target",
            fix="give more cells, or other genes",
        )
    values = sp.csc_matrix(depth_normalised(cells if rows is None else cells.take(rows)))
    return [np.log1p(values[:, each].toarray().astype(np.float32)) for each in genes]


def _ranks(values: NDArray[np.float32]) -> NDArray[np.float32]:
    from scipy.stats import rankdata

    found = np.empty_like(values)
    for start in range(0, values.shape[1], _BLOCK):
        found[:, start : start + _BLOCK] = rankdata(values[:, start : start + _BLOCK], axis=0)
    return found


def _correlations(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return correlations of columns; NaN where one is constant."""
    scaled = []
    for values in (one, other):
        centred = values - values.mean(axis=0, dtype=np.float64)
        norm = np.linalg.norm(centred, axis=0)
        scaled.append(np.divide(centred, norm, out=np.full(centred.shape, np.nan), where=norm > 0))
    return np.clip(scaled[0].T @ scaled[1], -1.0, 1.0)


def _of_trees(
    method: str,
    make: Callable[[int], Any],
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    seed: int,
) -> GeneNetwork:
    rng = np.random.default_rng([seed, _CELL_STREAM])
    rows = np.arange(cells.n_cells)
    if rows.size > MAX_CELLS_OF_TREES:
        rows = np.sort(rng.choice(rows, MAX_CELLS_OF_TREES, replace=False))
    x, y = log_values(cells, regulators, targets, rows=rows)
    score = np.zeros((len(regulators), len(targets)))
    for column, target in enumerate(targets):
        others = np.flatnonzero(np.asarray(regulators) != target)
        values = y[:, column]
        if not others.size or not np.ptp(values):
            continue
        spread = float(values.std())
        model = make(seed).fit(x[:, others], values / spread)
        explained = max(float(model.score(x[:, others], values / spread)), 0.0)
        score[others, column] = model.feature_importances_ * explained
    text = "share of the target's variance that splits by the regulator explain"
    return _network(method, score, None, cells.take(rows), symbols, regulators, targets, text, is_directed=True)


def _signed(
    method: str,
    correlation: NDArray[np.float64],
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    text: str,
) -> GeneNetwork:
    sign = np.sign(np.nan_to_num(correlation)).astype(np.int8)
    return _network(method, np.abs(correlation), sign, cells, symbols, regulators, targets, text, is_directed=False)


def _network(
    method: str,
    score: NDArray[np.float64],
    sign: NDArray[np.int8] | None,
    cells: CellCounts,
    symbols: NDArray[np.str_],
    regulators: NDArray[np.integer],
    targets: NDArray[np.integer],
    text: str,
    *,
    is_directed: bool,
) -> GeneNetwork:
    is_self = np.asarray(regulators)[:, None] == np.asarray(targets)[None, :]
    scores = np.where(is_self, np.nan, score).astype(np.float32)
    if sign is not None:
        sign = np.where(is_self, 0, sign).astype(np.int8)
    return GeneNetwork(method, symbols[regulators], symbols[targets], scores, sign, is_directed, text, cells.n_cells)
