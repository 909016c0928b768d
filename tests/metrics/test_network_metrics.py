"""Scores of gene networks: by hand, against scikit-learn, and against the mean over orders of ties."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, balanced_accuracy_score

from scdiva.errors import ConfigError
from scdiva.metrics import network as metrics


def test_average_precision_is_scikit_learns_where_nothing_is_tied():
    rng = np.random.default_rng(0)
    for _ in range(20):
        score, is_true = rng.random(50), rng.random(50) < 0.2
        is_true[0] = True
        found = metrics.expected_average_precision(score, is_true)
        assert found == pytest.approx(average_precision_score(is_true, score))


def every_order(score, is_true):
    """Rank by score with ties in every order, each as likely: lists of which are true, best first."""
    n = len(score)
    for order in itertools.permutations(range(n)):
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order)):
            yield [is_true[i] for i in order]


@pytest.mark.parametrize(
    ("score", "is_true"),
    [
        ([1, 1, 1, 1, 1], [1, 0, 0, 1, 0]),
        ([2, 2, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1]),
        ([3, 1, 1, 1, 1, 0], [0, 1, 1, 1, 0, 1]),
    ],
)
def test_ties_are_their_expectation(score, is_true):
    orders = list(every_order(score, is_true))
    precisions = [np.mean([sum(o[: i + 1]) / (i + 1) for i in range(len(o)) if o[i]]) for o in orders]
    assert metrics.expected_average_precision(score, is_true) == pytest.approx(np.mean(precisions))
    first = sum(is_true)
    assert metrics.expected_early_precision(score, is_true) == pytest.approx(
        np.mean([sum(o[:first]) / first for o in orders])
    )
    assert metrics.expected_early_precision(score, is_true, 2) == pytest.approx(
        np.mean([sum(o[:2]) / 2 for o in orders])
    )


def test_by_hand():
    assert metrics.expected_average_precision([4, 3, 2, 1], [1, 0, 1, 0]) == pytest.approx((1 + 2 / 3) / 2)
    assert metrics.expected_early_precision([4, 3, 2, 1], [1, 0, 1, 0]) == 0.5
    assert metrics.expected_early_precision([4, 3, 2, 1], [1, 1, 0, 0]) == 1
    assert np.isnan(metrics.expected_average_precision([1, 2], [0, 0]))


def test_nan_is_behind_everything():
    assert metrics.expected_average_precision([np.nan, -5.0], [0, 1]) == 1
    assert metrics.expected_average_precision([np.nan, -np.inf], [1, 0]) == 0.5


def test_chance_is_what_random_scores_have():
    rng = np.random.default_rng(1)
    is_true = np.arange(100) < 5
    found = np.mean([metrics.expected_average_precision(rng.random(100), is_true) for _ in range(4000)])
    assert metrics.chance_average_precision(100, 5) == pytest.approx(found, rel=0.03)
    # well above the prevalence
    assert metrics.chance_average_precision(100, 5) > 0.08


def planted(rng, n_regulators=8, n_targets=60, strength=2.0):
    is_edge = rng.random((n_regulators, n_targets)) < 0.15
    is_edge[:, 0] = True
    return rng.normal(size=is_edge.shape) + strength * is_edge, is_edge, np.ones_like(is_edge)


def test_network_scores_agree_with_single_rankings():
    rng = np.random.default_rng(2)
    score, is_edge, is_candidate = planted(rng)
    is_candidate[2, 5:9] = False
    score[3, 4] = np.nan
    draws = metrics.draw_regulators(8, np.random.default_rng(0), 200)
    found = metrics.network_scores(score, is_edge, is_candidate, draws)
    assert found.n_nan == 1
    assert found.auprc == metrics.expected_average_precision(score[is_candidate], is_edge[is_candidate])
    row = is_candidate[2]
    assert found.auprc_of_regulator[2] == metrics.expected_average_precision(score[2, row], is_edge[2, row])
    assert found.prevalence_of_regulator[2] == is_edge[2, row].mean()
    assert found.ratio_of_regulator[2] == found.auprc_of_regulator[2] / found.chance_of_regulator[2]
    assert found.prevalence == is_edge[is_candidate].mean()
    assert (found.ratio_of_regulator > 1.5).all()


def test_draws_are_the_ratios_of_drawn_regulators():
    rng = np.random.default_rng(3)
    score, is_edge, is_candidate = planted(rng)
    draws = metrics.draw_regulators(8, np.random.default_rng(0), 5)
    found = metrics.network_scores(score, is_edge, is_candidate, draws)
    for i, weights in enumerate(draws):
        rows = np.repeat(np.arange(8), weights)
        auprc = metrics.expected_average_precision(score[rows], is_edge[rows])
        chance = metrics.chance_average_precision(is_edge[rows].size, is_edge[rows].sum())
        early = metrics.expected_early_precision(score[rows], is_edge[rows]) / is_edge[rows].mean()
        # a drawn regulator's copies are tied with each other; bins of ranks are a little coarser
        assert found.auprc_ratio_draws[i] == pytest.approx(auprc / chance, rel=0.02)
        assert found.early_ratio_draws[i] == pytest.approx(early, rel=0.02)


def test_intervals_are_deterministic_and_hold_the_value():
    draws = metrics.draw_regulators(30, np.random.default_rng(5))
    assert (draws == metrics.draw_regulators(30, np.random.default_rng(5))).all()
    assert (draws.sum(axis=1) == 30).all()
    values = np.random.default_rng(6).normal(1.0, 0.5, 30)
    found = metrics.mean_interval(values, draws)
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(30)
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    nothing = metrics.mean_interval(values - values, draws)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)


def test_a_regulator_without_targets_and_other_shapes_are_refused():
    score, is_edge, is_candidate = planted(np.random.default_rng(4))
    draws = metrics.draw_regulators(8, np.random.default_rng(0), 3)
    is_edge[1] = False
    with pytest.raises(ConfigError, match="1 regulators without"):
        metrics.network_scores(score, is_edge, is_candidate, draws)
    with pytest.raises(ConfigError, match="expected"):
        metrics.network_scores(score[:, :5], is_edge, is_candidate, draws)


def test_signs_agree_with_scikit_learn():
    rng = np.random.default_rng(7)
    truth = rng.choice([-1, 1, 1, 1], 300)
    predicted = np.where(rng.random(300) < 0.7, truth, -truth)
    predicted[:20] = 0
    truth[20:30] = 0
    regulator = rng.integers(12, size=300)
    draws = metrics.draw_regulators(12, np.random.default_rng(0))
    found = metrics.sign_scores(truth, predicted, regulator, draws)
    judged = (truth != 0) & (predicted != 0)
    assert found.n_edges == judged.sum() == 270
    assert found.n_undecided == 20
    assert found.accuracy.value == pytest.approx((truth == predicted)[judged].mean())
    assert found.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(truth[judged], predicted[judged]))
    assert found.constant_plus == pytest.approx((truth[judged] == 1).mean())
    assert found.balanced_accuracy.low < found.balanced_accuracy.value < found.balanced_accuracy.high


def test_always_activation_has_a_balanced_accuracy_of_a_half():
    truth = np.array([1, 1, 1, -1])
    draws = metrics.draw_regulators(2, np.random.default_rng(0))
    found = metrics.sign_scores(truth, np.ones(4, dtype=int), np.array([0, 0, 1, 1]), draws)
    assert found.accuracy.value == found.constant_plus == 0.75
    assert found.balanced_accuracy.value == 0.5


def test_differences_of_signs_are_on_common_edges():
    truth = np.array([1, 1, -1, -1, -1])
    ours, other = np.array([1, 1, -1, -1, 0]), np.array([1, -1, 1, -1, -1])
    draws = metrics.draw_regulators(5, np.random.default_rng(0))
    found = metrics.sign_difference(truth, ours, other, np.arange(5), draws)
    assert found.value == pytest.approx(1.0 - 0.5)


def test_degree_matched_auroc_by_hand():
    # targets 0-3 have one other known regulator, 4-7 none
    is_edge = np.array([[1, 1, 0, 0, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]], dtype=bool)
    score = np.array([[0.9, 0.2, 0.5, 0.2, 0.1, 0.0, 0.3, 0.1], [0.0] * 8])
    found = metrics.degree_matched_auroc(score, is_edge, np.ones_like(is_edge))
    # 0: above both others; 1: below one, tied with the other; 4: above one, below one, tied with one
    assert found[0] == pytest.approx((1 + 0.25 + 0.5) / 3)
    assert found[1] == 0.5


def test_degree_matched_auroc_is_blind_to_how_well_genes_are_known():
    rng = np.random.default_rng(8)
    fame = rng.choice([0.02, 0.1, 0.5], 2000)
    is_edge = rng.random((30, 2000)) < fame
    score = np.broadcast_to(fame, is_edge.shape)
    assert np.mean([metrics.expected_average_precision(s, e) for s, e in zip(score, is_edge, strict=True)]) > 0.4
    found = metrics.degree_matched_auroc(score, is_edge, np.ones_like(is_edge))
    # a little above: within a bin, the better known are still a little better known
    assert found.mean() == pytest.approx(0.5, abs=0.03)
    told = metrics.degree_matched_auroc(score + 0.2 * is_edge, is_edge, np.ones_like(is_edge))
    assert told.mean() > 0.9


def test_regulators_without_a_value_are_left_out_of_means():
    draws = metrics.draw_regulators(3, np.random.default_rng(0))
    found = metrics.mean_interval([1.0, np.nan, 3.0], draws)
    assert found.value == 2
    assert (found.low, found.high) == (1, 3)
    assert np.isnan(metrics.mean_interval([np.nan] * 3, draws).value)
