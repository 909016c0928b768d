"""How well scores of regulator-target pairs agree with known regulation.

A known network is incomplete: a pair that it lacks is not known to be none, so that no method comes near 1, and numbers
compare between methods on the same candidates only. Ratios are over what random scores have: 1 is chance.

Ties count as their expectation over all orders: a method that gives many pairs the same score has neither luck nor
misfortune from the order in which pairs are stored. NaN is ranked last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdiva.errors import ConfigError
from scdiva.metrics.annotation import Interval

N_DRAWS = 1000
N_BINS = 2000
_LEVEL = 0.95
_DEGREES = np.array([1, 2, 3, 5, 9, 17, 33])


@dataclass(frozen=True, slots=True, eq=False)
class NetworkScores:
    """Scores of one network on one set of candidates.

    Parameters
    ----------
    auprc_of_regulator, early_of_regulator
        ``(R,)`` of each regulator's own candidates: average precision, and precision among the first as many as it has
        known targets.
    chance_of_regulator, prevalence_of_regulator
        ``(R,)`` average precision that random scores are expected to have, and share of known targets.
    matched_of_regulator
        ``(R,)`` degree-matched AUROC: :func:`degree_matched_auroc`.
    auprc, early, chance, prevalence
        The same of all candidates in one ranking.
    auprc_ratio_draws, early_ratio_draws
        ``(n_draws,)`` the ratios of all candidates in one ranking, regulators drawn with repetition. From a histogram
        of ranks (:data:`N_BINS`), so that the draws are a little coarser than the values.
    n_nan
        Candidates without a score.
    """

    auprc_of_regulator: NDArray[np.float64]
    early_of_regulator: NDArray[np.float64]
    chance_of_regulator: NDArray[np.float64]
    prevalence_of_regulator: NDArray[np.float64]
    matched_of_regulator: NDArray[np.float64]
    auprc: float
    early: float
    chance: float
    prevalence: float
    auprc_ratio_draws: NDArray[np.float64]
    early_ratio_draws: NDArray[np.float64]
    n_nan: int

    @property
    def ratio_of_regulator(self) -> NDArray[np.float64]:
        """``(R,)`` AUPRC over that of random scores."""
        return self.auprc_of_regulator / self.chance_of_regulator

    @property
    def early_ratio_of_regulator(self) -> NDArray[np.float64]:
        """``(R,)`` early precision over prevalence."""
        return self.early_of_regulator / self.prevalence_of_regulator


def expected_average_precision(score: ArrayLike, is_true: ArrayLike) -> float:
    """Return the average precision, its expectation over the orders of tied scores.

    Without ties it equals ``sklearn.metrics.average_precision_score``, which has all of a group of ties at the
    precision of its end. NaN is one group, behind all others.

    Parameters
    ----------
    score
        ``(N,)``: the larger, the likelier.
    is_true
        ``(N,)`` bool.

    Returns
    -------
    float
        NaN where nothing is true.
    """
    n, n_true = _groups(score, is_true)
    return float(_average_precision(n[None, :], n_true[None, :])[0])


def chance_average_precision(n: int, n_true: int) -> float:
    """Return the average precision that random scores are expected to have: that of one group of ties.

    Parameters
    ----------
    n, n_true
        Number of scores, and of true ones.
    """
    return float(_average_precision(np.array([[float(n)]]), np.array([[float(n_true)]]))[0])


def expected_early_precision(score: ArrayLike, is_true: ArrayLike, n_first: int | None = None) -> float:
    """Return the share of true ones among the first, its expectation over the orders of tied scores.

    Parameters
    ----------
    score, is_true
        As in :func:`expected_average_precision`.
    n_first
        How many; as many as are true if left out.
    """
    n, n_true = _groups(score, is_true)
    first = n_true.sum() if n_first is None else float(n_first)
    return float(_early_precision(n[None, :], n_true[None, :], np.array([first]))[0])


def network_scores(
    score: NDArray[np.floating],
    is_edge: NDArray[np.bool_],
    is_candidate: NDArray[np.bool_],
    draws: NDArray[np.integer],
) -> NetworkScores:
    """Score a network against known edges.

    AUPRC ratio and early precision ratio as in BEELINE (Pratapa et al. 2020, doi:10.1038/s41592-019-0690-6), but for
    the chance that AUPRC is divided by: they take the prevalence.

    Parameters
    ----------
    score
        ``(R, G)``, the larger, the likelier an edge; NaN: nothing is said.
    is_edge, is_candidate
        ``(R, G)`` known edges, and the pairs that are judged. Every regulator has a known edge among its candidates.
    draws
        ``(n_draws, R)`` how often each regulator is drawn: :func:`draw_regulators`. The same draws for two networks
        make their difference a paired one.

    Raises
    ------
    ConfigError
        Shapes differ, or a regulator has no known target among its candidates.
    """
    if score.shape != is_edge.shape or score.shape != is_candidate.shape or draws.shape[1:] != score.shape[:1]:
        raise ConfigError(
            f"scores {score.shape}, edges {is_edge.shape}, candidates {is_candidate.shape}, draws {draws.shape}",
            expected="the same regulators and targets",
            fix="take them from one set of candidates",
        )
    is_edge = is_edge & is_candidate
    n_edges, n_pairs = is_edge.sum(axis=1), is_candidate.sum(axis=1)
    if not n_edges.all():
        raise ConfigError(
            f"{np.count_nonzero(n_edges == 0)} regulators without a known target among the candidates",
            expected="at least one of each",
            fix="leave these regulators out",
        )
    regulators = range(score.shape[0])
    auprc, early = (
        np.array([function(score[i, is_candidate[i]], is_edge[i, is_candidate[i]]) for i in regulators])
        for function in (expected_average_precision, expected_early_precision)
    )
    flat, flat_edge = score[is_candidate], is_edge[is_candidate]
    regulator = np.broadcast_to(np.arange(score.shape[0])[:, None], score.shape)[is_candidate]
    n_bin, n_true_bin = _histograms(flat, flat_edge, regulator, score.shape[0])
    n, n_true = draws @ n_bin, draws @ n_true_bin
    prevalence = n_true.sum(axis=1) / n.sum(axis=1)
    chance = _average_precision(n.sum(axis=1, keepdims=True), n_true.sum(axis=1, keepdims=True))
    return NetworkScores(
        auprc,
        early,
        np.array([chance_average_precision(*pair) for pair in zip(n_pairs, n_edges, strict=True)]),
        n_edges / n_pairs,
        degree_matched_auroc(score, is_edge, is_candidate),
        expected_average_precision(flat, flat_edge),
        expected_early_precision(flat, flat_edge),
        chance_average_precision(n_pairs.sum(), n_edges.sum()),
        float(n_edges.sum() / n_pairs.sum()),
        _average_precision(n, n_true) / chance,
        _early_precision(n, n_true, n_true.sum(axis=1)) / prevalence,
        int(np.count_nonzero(np.isnan(flat))),
    )


def degree_matched_auroc(
    score: NDArray[np.floating], is_edge: NDArray[np.bool_], is_candidate: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Compare each known target of a regulator with genes that are as well known as targets of others.

    Databases know most of genes that are studied most, and these are scored highest by many methods whatever the
    regulator. Here a known edge is compared with the regulator's other candidates that have about as many known
    regulators besides it (0, 1, 2, 3-4, 5-8, 9-16, 17-32, more; our decision): the share of them that are scored lower,
    ties half. What knows only how well a gene is studied has 0.5.

    Parameters
    ----------
    score, is_edge, is_candidate
        As in :func:`network_scores`.

    Returns
    -------
    numpy.ndarray
        ``(R,)`` mean over the known targets of each regulator; NaN where none has a gene to be compared with.
    """
    from scipy.stats import rankdata

    is_edge = is_edge & is_candidate
    degree = is_edge.sum(axis=0)
    found = np.full(score.shape[0], np.nan)
    for i in range(score.shape[0]):
        row = is_candidate[i]
        edge = is_edge[i, row]
        values = np.where(np.isnan(score[i, row]), -np.inf, score[i, row])
        bin_of = np.searchsorted(_DEGREES, degree[row] - edge, side="right")
        total = n = 0.0
        for each in np.unique(bin_of[edge]):
            part = bin_of == each
            n_edges = np.count_nonzero(edge[part])
            n_others = np.count_nonzero(part) - n_edges
            if n_others:
                ranks = rankdata(values[part])[edge[part]]
                total += (ranks.sum() - n_edges * (n_edges + 1) / 2) / n_others
                n += n_edges
        if n:
            found[i] = total / n
    return found


def draw_regulators(n_regulators: int, rng: np.random.Generator, n_draws: int = N_DRAWS) -> NDArray[np.int64]:
    """Draw regulators with repetition: ``(n_draws, n_regulators)`` how often each was drawn."""
    return rng.multinomial(n_regulators, np.full(n_regulators, 1 / n_regulators), size=n_draws)


def mean_interval(values: ArrayLike, draws: NDArray[np.integer]) -> Interval:
    """Return the mean over regulators with a percentile interval; of differences, a paired one.

    Parameters
    ----------
    values
        ``(R,)``; regulators with NaN are left out.
    draws
        From :func:`draw_regulators`.
    """
    array = np.asarray(values, dtype=np.float64)
    is_there = np.isfinite(array)
    if not is_there.any():
        return drawn_interval(float("nan"), [])
    n = draws[:, is_there].sum(axis=1)
    total = draws[:, is_there] @ array[is_there]
    drawn = np.divide(total, n, out=np.full(n.shape, np.nan), where=n > 0)
    return drawn_interval(float(array[is_there].mean()), drawn)


def drawn_interval(value: float, draws: ArrayLike) -> Interval:
    """Return a value with the central 95 % of draws; draws without a value are left out."""
    found = np.asarray(draws, dtype=np.float64)
    found = found[np.isfinite(found)]
    low, high = np.quantile(found, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]) if found.size else (np.nan, np.nan)
    return Interval(value, float(low), float(high), _LEVEL)


@dataclass(frozen=True, slots=True)
class SignScores:
    """How often the sign of an edge is right.

    Parameters
    ----------
    accuracy
        Share of edges with the right sign.
    balanced_accuracy
        Mean of the share of activations called so and that of repressions; 0.5 is chance, and what calling everything
        an activation has.
    constant_plus
        Accuracy of calling every edge an activation.
    n_edges, n_activations
        Edges that are judged: known sign, and a predicted one that is not 0.
    n_undecided
        Edges with a known sign, and none predicted.
    """

    accuracy: Interval
    balanced_accuracy: Interval
    constant_plus: float
    n_edges: int
    n_activations: int
    n_undecided: int


def sign_scores(
    truth: NDArray[np.integer],
    predicted: NDArray[np.integer],
    regulator: NDArray[np.integer],
    draws: NDArray[np.integer],
) -> SignScores:
    """Judge signs of known edges.

    Parameters
    ----------
    truth, predicted
        ``(n_edges,)`` +1, -1; 0: not known, or not said. Edges with a 0 are not judged.
    regulator
        ``(n_edges,)`` regulator of each edge, a column of ``draws``.
    draws
        From :func:`draw_regulators`.
    """
    is_judged = (truth != 0) & (predicted != 0)
    counts = _sign_counts(truth, predicted, regulator, is_judged, draws.shape[1])
    value, drawn = _sign_values(counts.sum(axis=1)[:, None]), _sign_values(counts @ draws.T)
    total = int(np.count_nonzero(is_judged))
    plus = int(np.count_nonzero(truth[is_judged] > 0))
    return SignScores(
        drawn_interval(float(value[0][0]), drawn[0]),
        drawn_interval(float(value[1][0]), drawn[1]),
        plus / total if total else float("nan"),
        total,
        plus,
        int(np.count_nonzero((truth != 0) & (predicted == 0))),
    )


def sign_difference(
    truth: NDArray[np.integer],
    ours: NDArray[np.integer],
    other: NDArray[np.integer],
    regulator: NDArray[np.integer],
    draws: NDArray[np.integer],
) -> Interval:
    """Return the difference of balanced accuracies, ours minus other, on edges that both give a sign.

    Parameters
    ----------
    truth, ours, other, regulator, draws
        As in :func:`sign_scores`.
    """
    is_judged = (truth != 0) & (ours != 0) & (other != 0)
    counts = [_sign_counts(truth, signs, regulator, is_judged, draws.shape[1]) for signs in (ours, other)]
    values = [float(_sign_values(found.sum(axis=1)[:, None])[1][0]) for found in counts]
    drawn = [_sign_values(found @ draws.T)[1] for found in counts]
    return drawn_interval(values[0] - values[1], drawn[0] - drawn[1])


def _sign_counts(truth: Any, predicted: Any, regulator: Any, is_judged: Any, n: int) -> NDArray[np.float64]:
    """Return ``(4, R)``: activations, those that are right, repressions, those that are right."""
    found = []
    for sign in (1, -1):
        for is_counted in (is_judged & (truth == sign), is_judged & (truth == sign) & (predicted == sign)):
            found.append(np.bincount(regulator[is_counted], minlength=n).astype(np.float64))
    return np.array(found)


def _sign_values(counts: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    plus, right_plus, minus, right_minus = counts
    with np.errstate(invalid="ignore"):
        return (right_plus + right_minus) / (plus + minus), (right_plus / plus + right_minus / minus) / 2


def _groups(score: ArrayLike, is_true: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return size and number of true ones of every group of equal scores, the highest first, NaN last."""
    values = np.asarray(score, dtype=np.float64).ravel()
    true = np.asarray(is_true, dtype=bool).ravel()
    if values.shape != true.shape:
        raise ConfigError(
            f"{values.size} scores and {true.size} truths", expected="as many", fix="give one truth per score"
        )
    # unique takes all NaN for one value, the largest
    _, group = np.unique(-values, return_inverse=True)
    n_groups = int(group.max()) + 1 if group.size else 1
    n, n_true = np.bincount(group, minlength=n_groups), np.bincount(group, weights=true, minlength=n_groups)
    return n.astype(np.float64), n_true.astype(np.float64)


def _histograms(
    score: NDArray[np.floating], is_true: NDArray[np.bool_], regulator: NDArray[np.intp], n_regulators: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return ``(R, n_bins)`` candidates and true ones of each regulator by rank over all; bins grow with the rank.

    Equal scores are never taken apart. The first ranks, where precision varies most, have bins of their own.
    """
    _, group = np.unique(-score.astype(np.float64), return_inverse=True)
    size = np.bincount(group)
    start = np.cumsum(size) - size
    edges = np.unique(np.geomspace(1, max(score.size, 2), N_BINS).round()) - 1
    bin_of = np.unique(np.searchsorted(edges, start, side="right"), return_inverse=True)[1][group]
    n_bins = int(bin_of.max()) + 1
    place, shape = regulator * n_bins + bin_of, (n_regulators, n_bins)
    total = n_regulators * n_bins
    n, n_true = np.bincount(place, minlength=total), np.bincount(place, weights=is_true, minlength=total)
    return n.reshape(shape).astype(np.float64), n_true.reshape(shape).astype(np.float64)


def _average_precision(n: NDArray[np.float64], n_true: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the expected average precision of rows of groups of ties, ``(rows, groups)``.

    The i-th of a group of m with p true ones, behind n0 with t0 true ones, is true with probability p/m, and then has
    an expected precision of (t0 + 1 + (i - 1) (p - 1) / (m - 1)) / (n0 + i).
    """
    before, true_before = np.cumsum(n, axis=1) - n, np.cumsum(n_true, axis=1) - n_true
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n.sum(axis=1).max(initial=0) + 1))])
    start = before.astype(np.int64)
    inverse = harmonic[start + n.astype(np.int64)] - harmonic[start]
    slope = np.divide(n_true - 1, n - 1, out=np.zeros_like(n), where=n > 1)
    share = np.divide(n_true, n, out=np.zeros_like(n), where=n > 0)
    found = share * ((true_before + 1) * inverse + slope * (n - (before + 1) * inverse))
    total = n_true.sum(axis=1)
    return np.divide(found.sum(axis=1), total, out=np.full(total.shape, np.nan), where=total > 0)


def _early_precision(
    n: NDArray[np.float64], n_true: NDArray[np.float64], n_first: NDArray[np.float64]
) -> NDArray[np.float64]:
    before = np.cumsum(n, axis=1) - n
    taken = np.clip(n_first[:, None] - before, 0, n)
    found = (np.divide(n_true, n, out=np.zeros_like(n), where=n > 0) * taken).sum(axis=1)
    return np.divide(found, n_first, out=np.full(n_first.shape, np.nan), where=n_first > 0)
