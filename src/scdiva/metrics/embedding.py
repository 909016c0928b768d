"""How well an embedding separates known cell types: nearest neighbours and clusters.

These are judgements of an embedding by labels it never saw; they say nothing about what the labels are worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

N_NEIGHBORS = 15


@dataclass(frozen=True, slots=True)
class KnnScores:
    """Cross-validated nearest-neighbour classification.

    Parameters
    ----------
    accuracy, macro_f1
        Over all cells.
    is_correct
        ``(n_cells,)`` bool, for paired comparisons.
    """

    accuracy: float
    macro_f1: float
    is_correct: NDArray[np.bool_]


def knn_scores(
    z: NDArray[np.floating], labels: ArrayLike, *, seed: int, k: int = N_NEIGHBORS, n_folds: int = 5
) -> KnnScores:
    """Classify every cell by the majority of its k nearest neighbours among the other folds.

    Parameters
    ----------
    z
        ``(n_cells, n_dimensions)`` embedding, Euclidean distance.
    labels
        ``(n_cells,)``; every label at least ``n_folds`` times.
    seed
        Seed of the stratified folds.
    k, n_folds
        Neighbours and folds.

    Returns
    -------
    KnnScores
        Macro-F1 is the mean over all labels present.
    """
    # deferred: scikit-learn takes a second to load
    from sklearn.metrics import f1_score
    from sklearn.model_selection import StratifiedKFold
    from sklearn.neighbors import KNeighborsClassifier

    truth = np.asarray(labels).astype(str)
    predicted = np.empty_like(truth)
    for train, test in StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(z, truth):
        predicted[test] = KNeighborsClassifier(k).fit(z[train], truth[train]).predict(z[test])
    is_correct = predicted == truth
    return KnnScores(float(is_correct.mean()), float(f1_score(truth, predicted, average="macro")), is_correct)


def kmeans_nmi(z: NDArray[np.floating], labels: ArrayLike, *, seeds: range | list[int]) -> NDArray[np.float64]:
    """Cluster with k-means, k = number of labels; return the normalised mutual information for each seed.

    Parameters
    ----------
    z
        ``(n_cells, n_dimensions)`` embedding.
    labels
        ``(n_cells,)``.
    seeds
        Seeds of k-means (k-means++ with one start each).

    Returns
    -------
    numpy.ndarray
        ``(n_seeds,)`` NMI, arithmetic mean of the entropies.
    """
    # deferred: scikit-learn takes a second to load
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    truth = np.asarray(labels).astype(str)
    k = np.unique(truth).size
    return np.array(
        [normalized_mutual_info_score(truth, KMeans(k, n_init=1, random_state=seed).fit_predict(z)) for seed in seeds]
    )


def paired_difference(
    ours: ArrayLike, other: ArrayLike, *, rng: np.random.Generator, n_draws: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Return the mean difference of two scores of the same cells, with a bootstrap interval over cells.

    Parameters
    ----------
    ours, other
        ``(n_cells,)`` score of each cell (for example whether it was classified correctly).
    rng
        Source of randomness.
    n_draws, level
        Bootstrap draws and coverage of the interval.

    Returns
    -------
    difference, low, high
    """
    difference = np.asarray(ours, dtype=float) - np.asarray(other, dtype=float)
    n_cells = difference.size
    draws = np.array([difference[rng.integers(n_cells, size=n_cells)].mean() for _ in range(n_draws)])
    tail = (1 - level) / 2
    return float(difference.mean()), float(np.quantile(draws, tail)), float(np.quantile(draws, 1 - tail))
