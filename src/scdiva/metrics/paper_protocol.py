"""Realism of generated cells as scDiffusion's authors measure it: for comparison with their numbers, and no other end.

Luo et al. 2024 (Bioinformatics 40, btae518) and the notebooks beside their code. Values are log1p(CP10K) of genes that
three real training cells have; components are those of real and generated cells *together*. What they leave open is
decided here: test cells are drawn with equal shares of real and generated ones, and both samples are equally large.

Read the numbers next to those of trivial samplers. The correlations see nothing but each gene's mean, every sampler of
real cells' means passes; with training cells for a reference, copies of them pass all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.metrics import generation_distances as distances
from scdiva.metrics.generation import Metric
from scdiva.metrics.generation_genes import correlation
from scdiva.metrics.generation_space import LabelledCells, NotMeasurableError, Score, log_cp10k

N_COMPONENTS = 50
N_TREES = 1000
N_NEIGHBOURS_GRAPH = 10
N_COMPONENTS_GRAPH = 20
N_NEIGHBOURS_LISI = 90
MIN_CELLS_OF_TYPE = 10
"""Fewest cells of a type on both sides for the test with five nearest neighbours."""
_BLOCK = 1000

METRICS: Mapping[str, Metric] = {
    "scc": Metric("SCC", 1.0),
    "pcc": Metric("PCC", 1.0),
    "mmd": Metric("MMD (biased)", None),
    "ilisi": Metric("iLISI", None),
    "forest_auc": Metric("random forest AUC", 0.5),
    "knn_auc": Metric("5 neighbours AUC", 0.5),
}
"""What is measured between two samples; CellTypist's accuracy needs the real cells it was trained on, see
:mod:`scdiva.tasks.generation_protocol`."""


def genes_of(counts: sp.csr_matrix) -> NDArray[np.int64]:
    """Return columns of the genes that at least three cells have."""
    return np.flatnonzero(np.bincount(counts.indices, minlength=counts.shape[1]) >= 3)


def protocol_scores(
    real: LabelledCells, generated: LabelledCells, genes: NDArray[np.int64], *, seed: int, n_trees: int = N_TREES
) -> dict[str, Score]:
    """Measure generated cells against real ones.

    Parameters
    ----------
    real, generated
        Equally many cells of each type (:func:`scdiva.metrics.generation.match_types`), raw counts or CP10K.
    genes
        Columns to use (:func:`genes_of` the real training cells).
    seed
        Seed of components, split and forest.
    n_trees
        Trees of the forest; theirs has 1,000.

    Returns
    -------
    dict
        Name in :data:`METRICS` to :class:`Score`. ``scc``, ``pcc``: correlation over genes of the mean. ``mmd``: sum
        of five Gaussian kernels, biased, on 50 joint components
        (:func:`~scdiva.metrics.generation_distances.mmd_scdiffusion`). ``ilisi``: :func:`graph_ilisi`.
        ``forest_auc``: trees of depth 5, balanced, on the same components, 25 % of the cells to test. ``knn_auc``:
        five nearest neighbours among all genes within a type, 30 % to test, mean over types of ten cells.
    """
    x, y = (log_cp10k(sp.csr_matrix(cells.counts[:, genes])) for cells in (real, generated))
    means = [np.asarray(values.mean(axis=0), dtype=np.float64).ravel() for values in (x, y)]
    scores = {
        "scc": Score.of(correlation, *means, by_rank=True),
        "pcc": Score.of(correlation, *means, by_rank=False),
    }
    try:
        z = joint_components(x, y, seed=seed)
    except NotMeasurableError as error:
        missing = Score(float("nan"), str(error))
        scores |= {"mmd": missing, "ilisi": missing, "forest_auc": missing}
    else:
        n = real.n_cells
        scores |= {
            "mmd": Score.of(distances.mmd_scdiffusion, z[:n], z[n:]),
            "ilisi": Score.of(graph_ilisi, z[:n], z[n:]),
            "forest_auc": Score.of(_forest_auc, z[:n], z[n:], seed, n_trees),
        }
    return {**scores, "knn_auc": Score.of(_knn_auc, x, y, real.labels, generated.labels, seed)}


def joint_components(real: sp.csr_matrix, generated: sp.csr_matrix, *, seed: int) -> NDArray[np.float64]:
    """Return 50 principal components of two samples together, ``(n_real + n_generated, 50)``; fewer of few cells.

    Raises
    ------
    NotMeasurableError
        Fewer than four cells or genes, or none that differ.
    """
    from sklearn.decomposition import PCA

    both = sp.csr_matrix(sp.vstack([real, generated]))
    size = min(N_COMPONENTS, min(both.shape) - 1)
    if size < 3:
        raise NotMeasurableError(f"components need four cells and genes, found {both.shape[0]} and {both.shape[1]}")
    if not (both.max(axis=0) - both.min(axis=0)).nnz:
        raise NotMeasurableError("all cells coincide")
    return np.asarray(PCA(size, svd_solver="arpack", random_state=seed).fit_transform(both), dtype=np.float64)


def graph_ilisi(real: NDArray[np.float64], generated: NDArray[np.float64]) -> float:
    """Return iLISI as scib's ``ilisi_graph(type_="knn")`` on scanpy's graph of 10 neighbours in 20 components.

    Its neighbours are the 90 nearest along the graph, where it takes scanpy's *connectivities* for the lengths of
    edges: near neighbours, which are strongly connected, count as far, and what is far is drawn near. That can hardly
    be meant, and is kept here since the published numbers are of it: it forgives samples that lie side by side. Cells
    that reach fewer than 90 others count as unmixed. ``ilisi`` in :mod:`scdiva.metrics.generation` has neither
    peculiarity.

    Parameters
    ----------
    real, generated
        ``(n_cells, n_components)``.
    """
    from scipy.sparse.csgraph import dijkstra

    both = np.concatenate([real, generated])[:, :N_COMPONENTS_GRAPH]
    k = N_NEIGHBOURS_LISI
    if len(both) <= k:
        raise NotMeasurableError(f"needs more than {k} cells, found {len(both)}")
    lengths = connectivities(both)
    is_real = np.repeat([True, False], [len(real), len(generated)])
    found = []
    for first in range(0, len(both), _BLOCK):
        rows = np.arange(first, min(first + _BLOCK, len(both)))
        paths = dijkstra(lengths, indices=rows)
        paths[np.arange(rows.size), rows] = -1.0  # the cell itself comes first
        near = np.argpartition(paths, k, axis=1)[:, : k + 1]
        order = np.argsort(np.take_along_axis(paths, near, axis=1), axis=1)
        near = np.take_along_axis(near, order, axis=1)[:, 1:]
        distance = np.take_along_axis(paths, near, axis=1)
        is_connected = np.asarray(np.isfinite(distance).all(axis=1), dtype=bool)
        weight = distances._perplexity_weights(np.where(is_connected[:, None], distance, 0.0), k // 3)
        share = np.asarray((weight * is_real[near]).sum(axis=1))
        found.append(np.where(is_connected, 1 / (share**2 + (1 - share) ** 2), 1.0))
    return float(np.median(np.concatenate(found)) - 1)


def connectivities(points: NDArray[np.float64], n_neighbours: int = N_NEIGHBOURS_GRAPH) -> sp.csr_matrix:
    """Return the graph of ``scanpy.pp.neighbors(n_neighbors=10)``, symmetric CSR ``(n_cells, n_cells)``.

    UMAP's fuzzy set (McInnes et al. 2018): an edge to one of the 9 nearest others is exp(-(d - rho) / sigma), rho the
    distance to the nearest that does not coincide, sigma such that the edges of a cell add up to log2(10); then
    a + b - ab of both directions. Written out, since UMAP's own takes a minute to compile itself.

    Parameters
    ----------
    points
        ``(n_cells, n_dimensions)``.
    n_neighbours
        Neighbours of a cell, itself included.
    """
    from scipy.spatial import cKDTree

    n, k = len(points), n_neighbours - 1
    distance, index = distances._neighbours_of_self(cKDTree(points), points, k)
    is_apart = distance > 0
    rho = np.where(is_apart.any(axis=1), np.where(is_apart, distance, np.inf).min(axis=1), 0.0)
    beyond = np.maximum(distance - rho[:, None], 0.0)
    low, high, sigma = np.zeros(n), np.full(n, np.inf), np.ones(n)
    for _ in range(64):
        is_wide = np.exp(-beyond / sigma[:, None]).sum(axis=1) > np.log2(n_neighbours)
        low, high = np.where(is_wide, low, sigma), np.where(is_wide, sigma, high)
        sigma = np.where(np.isinf(high), sigma * 2, (low + high) / 2)
    mean = distance.sum(axis=1) / n_neighbours
    sigma = np.maximum(sigma, 1e-3 * np.where(rho > 0, mean, mean.mean()))
    edges = np.exp(-beyond / np.maximum(sigma, 1e-300)[:, None])
    graph = sp.csr_matrix((edges.ravel(), index.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    turned = sp.csr_matrix(graph.T)
    return sp.csr_matrix(graph + turned - graph.multiply(turned))


def _forest_auc(real: NDArray[np.float64], generated: NDArray[np.float64], seed: int, n_trees: int) -> float:
    from sklearn.ensemble import RandomForestClassifier

    judge = RandomForestClassifier(n_trees, max_depth=5, class_weight="balanced", random_state=seed)
    return _held_out_auc(judge, np.concatenate([real, generated]), len(real), 0.25, seed)


def _knn_auc(
    real: sp.csr_matrix,
    generated: sp.csr_matrix,
    real_labels: NDArray[np.str_],
    generated_labels: NDArray[np.str_],
    seed: int,
) -> float:
    """Mean over types. Neighbours vote for one side or the other where one of the samples is denser: near 0.5 again."""
    from sklearn.neighbors import KNeighborsClassifier

    found = []
    for name in np.unique(real_labels):
        x, y = real[real_labels == name], generated[generated_labels == name]
        if min(x.shape[0], y.shape[0]) >= MIN_CELLS_OF_TYPE:
            both = sp.csr_matrix(sp.vstack([x, y]))
            found.append(_held_out_auc(KNeighborsClassifier(5), both, x.shape[0], 0.3, seed))
    if not found:
        raise NotMeasurableError(f"no type has {MIN_CELLS_OF_TYPE} cells on both sides")
    return float(np.mean(found))


def _held_out_auc(
    judge: Any, both: NDArray[np.float64] | sp.csr_matrix, n_real: int, test_fraction: float, seed: int
) -> float:
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import train_test_split

    is_real = np.arange(both.shape[0]) < n_real
    if min(n_real, both.shape[0] - n_real) < MIN_CELLS_OF_TYPE:
        raise NotMeasurableError(f"needs {MIN_CELLS_OF_TYPE} cells on both sides, found {n_real}")
    fit, test = train_test_split(
        np.arange(is_real.size), test_size=test_fraction, random_state=seed, stratify=is_real, shuffle=True
    )
    judge.fit(both[fit], is_real[fit])
    return float(roc_auc_score(is_real[test], judge.predict_proba(both[test])[:, 1]))
