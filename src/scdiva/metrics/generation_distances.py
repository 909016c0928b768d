"""Distances and overlaps between two clouds of points: what a generator's cells are to real ones.

All take points ``(n_cells, n_dimensions)`` and Euclidean distance. What is compared has equal n on both sides; the
estimators of precision, recall and Wasserstein distances depend on n.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist, squareform

from scdiva.metrics.generation_space import NotMeasurableError

Points = NDArray[np.floating[Any]]

WIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Variances of the kernels of :func:`mmd2`, in units of the median squared distance between real cells."""
MAX_TRANSPORT = 1000
"""Most cells per side of an exact transport plan."""
N_PROJECTIONS = 200
N_NEIGHBOURS_LISI = 90
N_NEIGHBOURS_PRDC = 5


def _require(real: Points, generated: Points, fewest: int) -> None:
    n = min(len(real), len(generated))
    if n < fewest:
        raise NotMeasurableError(f"needs at least {fewest} cells on both sides, found {n}")


def mmd2(real: Points, generated: Points) -> float:
    """Squared maximum mean discrepancy, unbiased: 0 for equal distributions (and a little below by chance).

    Mean of five Gaussian kernels exp(-d² / 2σ²), σ² in :data:`WIDTHS` times the median squared distance between real
    cells, which is the same for every generator (Gretton et al. 2012, lemma 6).
    """
    _require(real, generated, 2)
    within_real = pdist(real, "sqeuclidean")
    median = float(np.median(within_real))
    if median == 0:
        raise NotMeasurableError("more than half of the real cells coincide")
    within_generated, between = pdist(generated, "sqeuclidean"), cdist(real, generated, "sqeuclidean")

    def kernel(d2: Points) -> float:
        return float(np.mean([np.exp(-d2 / (2 * width * median)).mean() for width in WIDTHS]))

    return kernel(within_real) + kernel(within_generated) - 2 * kernel(between)


def mmd_scdiffusion(real: Points, generated: Points) -> float:
    """Maximum mean discrepancy as scDiffusion computes it; biased, and only comparable with its own kind.

    Sum of five Gaussian kernels exp(-d² / b), b = mean squared distance over all pairs / 4 · 2^i; means include the
    diagonals. scDiffusion fits 50 components to both samples together: give those.
    """
    _require(real, generated, 2)
    d2 = cdist(both := np.concatenate([real, generated]), both, "sqeuclidean")
    bandwidth = float(d2.sum()) / (len(both) ** 2 - len(both)) / 4
    if bandwidth == 0:
        raise NotMeasurableError("all cells coincide")
    kernel = sum(np.exp(-d2 / (bandwidth * 2**i)) for i in range(5))
    n = len(real)
    return float(kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean())


def energy_distance(real: Points, generated: Points) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased (pairs of different cells)."""
    _require(real, generated, 2)
    return float(2 * cdist(real, generated).mean() - pdist(real).mean() - pdist(generated).mean())


def wasserstein(real: Points, generated: Points, *, order: int, rng: np.random.Generator) -> float:
    """Wasserstein distance of order 1 or 2 by an exact assignment, of at most 1,000 cells per side, drawn at random.

    Its value between two samples of one distribution is far from 0 in 50 dimensions: read it against the ceiling.
    """
    _require(real, generated, 2)
    # deferred: half a second
    from scipy.optimize import linear_sum_assignment

    n = min(len(real), len(generated), MAX_TRANSPORT)
    cost = cdist(_some(real, n, rng), _some(generated, n, rng), "euclidean" if order == 1 else "sqeuclidean")
    mean = float(cost[linear_sum_assignment(cost)].mean())
    return mean if order == 1 else mean**0.5


def sliced_wasserstein(real: Points, generated: Points, *, rng: np.random.Generator) -> float:
    """Root mean square, over 200 random directions, of the Wasserstein-2 distance along the direction."""
    _require(real, generated, 2)
    n = min(len(real), len(generated))
    direction = rng.normal(size=(real.shape[1], N_PROJECTIONS))
    direction /= np.linalg.norm(direction, axis=0)
    ours, theirs = (np.sort(_some(x, n, rng) @ direction, axis=0) for x in (real, generated))
    return float(np.sqrt(((ours - theirs) ** 2).mean()))


def _some(points: Points, n: int, rng: np.random.Generator) -> Points:
    return points if len(points) == n else points[rng.choice(len(points), n, replace=False)]


def ilisi(real: Points, generated: Points) -> float:
    """How well real and generated cells mix, 0 (apart) to 1 (as in one cloud): (median LISI - 1) / (2 - 1).

    LISI of a cell: inverse Simpson index of real against generated among its 90 nearest neighbours, weighted by a
    Gaussian whose perplexity is 30 (Korsunsky et al. 2019; the defaults of scib-metrics). With fewer than 91 cells all
    others are neighbours and the perplexity is a third of their number.
    """
    from scipy.spatial import cKDTree

    _require(real, generated, 5)
    both = np.concatenate([real, generated])
    is_real = np.arange(len(both)) < len(real)
    k = min(N_NEIGHBOURS_LISI, len(both) - 1)
    distance, index = _neighbours_of_self(cKDTree(both), both, k)
    weight = _perplexity_weights(distance, k / 3)
    share = (weight * is_real[index]).sum(axis=1)
    return float(np.median(1 / (share**2 + (1 - share) ** 2)) - 1)


def _neighbours_of_self(tree: Any, points: Points, k: int) -> tuple[Points, NDArray[np.int64]]:
    """Return distances and positions of the k nearest others; points that coincide are others."""
    distance, index = tree.query(points, k + 1)
    is_self = index == np.arange(len(points))[:, None]
    is_self[~is_self.any(axis=1), -1] = True  # crowded out by points that coincide
    keep = ~is_self
    return distance[keep].reshape(len(points), k), index[keep].reshape(len(points), k)


def _perplexity_weights(distance: Points, perplexity: float) -> Points:
    """Return Gaussian weights of neighbours, rows sum to 1, with the entropy of each row log(perplexity)."""
    low, high = np.zeros(len(distance)), np.full(len(distance), np.inf)
    beta = np.ones(len(distance))
    shifted = distance - distance[:, :1]
    weight = np.empty_like(shifted)
    for _ in range(60):
        weight = np.exp(-shifted * beta[:, None])
        weight /= weight.sum(axis=1, keepdims=True)
        entropy = -(weight * np.log(np.maximum(weight, 1e-300))).sum(axis=1)
        error = entropy - np.log(perplexity)
        if (np.abs(error) < 1e-5).all():
            break
        is_wide = error > 0
        low, high = np.where(is_wide, beta, low), np.where(is_wide, high, beta)
        beta = np.where(np.isinf(high), beta * 2, (low + high) / 2)
    return weight


def prdc(real: Points, generated: Points, *, k: int = N_NEIGHBOURS_PRDC) -> dict[str, float]:
    """Precision, recall (Kynkäänniemi et al. 2019), density and coverage (Naeem et al. 2020).

    With balls around every cell that reach to its k-th nearest neighbour of the same sample: precision is the share of
    generated cells in a ball of a real cell, recall the share of real cells in a ball of a generated one, density the
    number of real balls a generated cell lies in, over k, and coverage the share of real balls with a generated cell in
    them. Two samples of one distribution do not reach 1 in all four; the ceiling tells what they reach.
    """
    in_real, in_generated = _in_balls(real, generated, k)
    return {
        "precision": float(in_real.any(axis=0).mean()),
        "recall": float(in_generated.any(axis=1).mean()),
        "density": float(in_real.sum(axis=0).mean() / k),
        "coverage": float(in_real.any(axis=1).mean()),
    }


def recall_of(real: Points, generated: Points, is_chosen: NDArray[np.bool_], *, k: int = N_NEIGHBOURS_PRDC) -> float:
    """Recall (see :func:`prdc`) of some real cells among all generated ones: whether rare ones are still made."""
    if not is_chosen.any():
        raise NotMeasurableError("no type is that rare")
    return float(_in_balls(real, generated, k)[1][is_chosen].any(axis=1).mean())


def _in_balls(real: Points, generated: Points, k: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return ``(n_real, n_generated)``: the generated cell is in the real cell's ball; the other way about."""
    _require(real, generated, k + 1)
    between = cdist(real, generated)
    radius_real, radius_generated = (np.partition(squareform(pdist(x)), k, axis=1)[:, k] for x in (real, generated))
    return between <= radius_real[:, None], between <= radius_generated[None, :]


def pairwise_distance_ratio(real: Points, generated: Points) -> float:
    """Mean distance between two generated cells, over the mean distance between two real ones; 1 is as diverse."""
    _require(real, generated, 2)
    mean = float(pdist(real).mean())
    if mean == 0:
        raise NotMeasurableError("all real cells coincide")
    return float(pdist(generated).mean()) / mean


def effective_cluster_ratio(
    real: Points, generated: Points, others: Points, *, seed: int, n_clusters: int = 20
) -> float:
    """exp(entropy) of the clusters that generated cells fall into, over that of real cells; 1 is as diverse.

    Parameters
    ----------
    real, generated
        The samples.
    others
        Real cells in neither, to which 20 k-means clusters are fitted.
    seed
        Seed of k-means.
    n_clusters
        Number of clusters.
    """
    from sklearn.cluster import KMeans

    if len(others) < 2 * n_clusters:
        raise NotMeasurableError(f"{n_clusters} clusters need {2 * n_clusters} cells, found {len(others)}")
    _require(real, generated, 2)
    clusters = KMeans(n_clusters, n_init=1, random_state=seed).fit(others)

    def effective(points: Points) -> float:
        share = np.bincount(clusters.predict(points), minlength=n_clusters) / len(points)
        share = share[share > 0]
        return float(np.exp(-(share * np.log(share)).sum()))

    return effective(generated) / effective(real)


def memorisation(generated: Points, train: Points, heldout: Points) -> dict[str, float]:
    """Whether generated cells lie nearer to training cells than cells that were never trained on do.

    Parameters
    ----------
    generated
        Generated cells.
    train, heldout
        Real cells that the generator was and was not trained on; of the larger sample the first rows are used, so
        that both are equally dense.

    Returns
    -------
    dict
        ``nearer_to_train``: share of generated cells whose nearest training cell is nearer than the nearest held-out
        one (0.5 without memory; ties count half). ``nearest_distance_ratio``: median distance to the nearest training
        cell, over that to the nearest held-out one (1). ``closer_than_5_percent``: share of generated cells closer to
        a training cell than 95 % of held-out cells are (0.05).
    """
    from scipy.spatial import cKDTree

    n = min(len(train), len(heldout))
    if n < 10 or len(generated) < 10:
        raise NotMeasurableError(f"needs at least 10 cells on all sides, found {min(n, len(generated))}")
    tree_train, tree_heldout = cKDTree(train[:n]), cKDTree(heldout[:n])
    to_train, to_heldout = tree_train.query(generated)[0], tree_heldout.query(generated)[0]
    median = float(np.median(to_heldout))
    threshold = np.quantile(tree_train.query(heldout)[0], 0.05)
    return {
        "nearer_to_train": float(np.mean(to_train < to_heldout) + 0.5 * np.mean(to_train == to_heldout)),
        "nearest_distance_ratio": float(np.median(to_train)) / median if median > 0 else float("nan"),
        "closer_than_5_percent": float(np.mean(to_train < threshold)),
    }
