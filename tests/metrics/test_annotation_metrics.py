from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdiva.errors import ConfigError, SourceError
from scdiva.metrics import annotation
from scdiva.metrics.annotation import (
    annotation_intervals,
    annotation_scores,
    bootstrap_interval,
    expected_calibration_error,
    merge_labels,
    negative_log_likelihood,
    open_set_auroc,
    paired_bootstrap,
)
from scdiva.metrics.generation_space import NotMeasurableError

TRUTH = np.array(["a", "a", "a", "b", "b", "c"])
CALLED = np.array(["a", "a", "b", "b", "unknown", "b"])


def random_labels(n: int, seed: int, *, n_types: int = 14, p_right: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.choice(n_types, n, p=np.arange(1, n_types + 1) / (n_types * (n_types + 1) / 2))
    called = np.where(rng.random(n) < p_right, truth, rng.integers(0, n_types + 1, n))
    return truth.astype(str), called.astype(str)


def test_scores_of_six_cells_counted_by_hand():
    scores = annotation_scores(TRUTH, CALLED)
    assert (scores.n_cells, scores.n_outside) == (6, 1)
    assert scores.accuracy == pytest.approx(3 / 6)
    assert scores.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    # a: precision 1, recall 2/3; b: precision 1/3, recall 1/2; c is never called
    assert [c.f1 for c in scores.classes] == pytest.approx([4 / 5, 2 / 5, 0])
    assert scores.macro_f1 == pytest.approx((4 / 5 + 2 / 5) / 3)
    assert [(c.label, c.precision, c.support) for c in scores.classes] == [
        ("a", 1.0, 3),
        ("b", pytest.approx(1 / 3), 2),
        ("c", 0.0, 1),
    ]
    assert list(scores.confusion.predicted) == ["a", "b", "c", "unknown"]
    np.testing.assert_array_equal(scores.confusion.counts, [[2, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 0]])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60))
def test_scores_are_those_of_scikit_learn(seed, n):
    from sklearn.metrics import f1_score, precision_recall_fscore_support, recall_score

    truth, called = random_labels(n, seed, n_types=5, p_right=0.5)
    present = np.unique(truth)
    scores = annotation_scores(truth, called)
    options = {"labels": present, "average": "macro", "zero_division": 0.0}
    assert scores.accuracy == pytest.approx(np.mean(truth == called))
    assert scores.macro_f1 == pytest.approx(f1_score(truth, called, **options))
    assert scores.balanced_accuracy == pytest.approx(recall_score(truth, called, **options))
    expected = precision_recall_fscore_support(truth, called, labels=present, zero_division=0.0)
    np.testing.assert_allclose(
        [[c.precision, c.recall, c.f1, c.support] for c in scores.classes], np.transpose(expected)
    )


def test_order_of_cells_does_not_matter():
    truth, called = random_labels(200, 0)
    order = np.random.default_rng(1).permutation(200)
    one, other = annotation_scores(truth, called), annotation_scores(truth[order], called[order])
    assert one.classes == other.classes
    assert one.macro_f1 == other.macro_f1


def test_a_type_that_no_cell_is_counts_against_the_cells_called_so_and_is_no_type_of_the_mean():
    with_known = annotation_scores(["a", "a", "b"], ["a", "b", "b"])
    with_new = annotation_scores(["a", "a", "b"], ["a", "new", "b"])
    assert with_known.accuracy == with_new.accuracy
    assert with_new.macro_f1 == pytest.approx((2 / 3 + 1) / 2)  # b is not blamed; nothing is divided by three
    assert with_new.n_outside == 1


def test_probabilities_are_judged_by_their_maximum_whatever_was_predicted():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.5, 0.5]])
    scores = annotation_scores(["a", "b", "b", "z"], ["unknown"] * 4, p, ["a", "b"])
    assert scores.accuracy == 0
    # right in cells 0 and 2; each cell in a bin of its own but the last two, 0.5 and 0.6, which are wrong
    assert scores.calibration_error.value == pytest.approx((0.1 + 0.6 + 0.2 + 0.5) / 4)
    assert scores.negative_log_likelihood.value == pytest.approx(-np.log([0.9, 0.4, 0.8]).mean())
    assert scores.n_unknown_truth == 1
    without = annotation_scores(["a"], ["a"])
    assert np.isnan(without.calibration_error.value)
    assert "no probabilities" in without.calibration_error.reason
    nothing_known = annotation_scores(["z"], ["a"], [[1.0, 0.0]], ["a", "b"])
    assert np.isnan(nothing_known.negative_log_likelihood.value)


def test_calibration_by_hand_with_empty_bins_and_edges():
    found = expected_calibration_error([0.0, 0.1, 0.5, 0.75, 1.0], [False, False, True, False, True], n_bins=4)
    # bins (0, 0.25], (0.25, 0.5], (0.5, 0.75], (0.75, 1]; 0 belongs to the first, edges to the bin below
    np.testing.assert_array_equal(found.n_cells, [2, 1, 1, 1])
    np.testing.assert_allclose(found.confidence, [0.05, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(found.accuracy, [0, 1, 0, 1])
    assert found.error == pytest.approx((2 * 0.05 + 0.5 + 0.75 + 0) / 5)
    few = expected_calibration_error([0.9, 0.9], [True, False])
    assert few.error == pytest.approx(0.4)
    assert np.isnan(few.accuracy[few.n_cells == 0]).all()
    assert few.n_cells.sum() == 2
    assert few.edges.size == 16


def test_a_calibrated_classifier_has_a_small_error_and_a_boastful_one_a_large_one():
    rng = np.random.default_rng(0)
    sure = rng.uniform(0.4, 1, 20_000)
    right = rng.random(20_000) < sure
    assert expected_calibration_error(sure, right).error < 0.02
    assert expected_calibration_error(np.sqrt(sure), right).error > 0.1


def test_likelihood_by_hand_in_the_order_of_the_columns():
    p = [[0.2, 0.8], [0.5, 0.5], [1.0, 0.0]]
    assert negative_log_likelihood(["a", "b", "b"], p, ["b", "a"]) == pytest.approx(-np.log([0.8, 0.5, 1.0]).mean())
    assert negative_log_likelihood(["a"], [[1.0, 0.0]], ["b", "a"]) == pytest.approx(-np.log(1e-12))
    with pytest.raises(SourceError, match="without a probability: z"):
        negative_log_likelihood(["z"], [[1.0, 0.0]], ["b", "a"])


def test_open_set_auroc_counts_pairs():
    rng = np.random.default_rng(0)
    known, unknown = rng.integers(0, 6, 40), rng.integers(0, 4, 30)
    pairs = (known[:, None] > unknown) + 0.5 * (known[:, None] == unknown)
    assert open_set_auroc(known, unknown) == pytest.approx(pairs.mean())
    assert open_set_auroc([2, 3], [0, 1]) == 1
    with pytest.raises(NotMeasurableError):
        open_set_auroc([1.0], [])
    with pytest.raises(NotMeasurableError, match="NaN"):
        open_set_auroc([1.0], [np.nan])


def test_merged_labels_are_scored_as_one():
    mapping = {"CD4 T": "T", "CD8 T": "T", "T": "lymphocyte"}
    truth, called = ["CD4 T", "CD8 T", "B", "T"], ["CD8 T", "CD8 T", "B", "B"]
    merged = merge_labels(truth, mapping)
    assert list(merged) == ["T", "T", "B", "lymphocyte"]  # once, not through to the end
    assert annotation_scores(merged, merge_labels(called, mapping)).accuracy == 0.75
    assert annotation_scores(truth, called).accuracy == 0.5
    assert merge_labels(["x"], {"x": "a much longer name"})[0] == "a much longer name"


def loop_of_macro_f1(truth, called, rng, n_draws):
    """The stratified bootstrap as it is usually written."""
    from sklearn.metrics import f1_score

    groups = [np.flatnonzero(truth == t) for t in np.unique(truth)]
    draws = []
    for _ in range(n_draws):
        rows = np.concatenate([rng.choice(g, g.size) for g in groups])
        draws.append(f1_score(truth[rows], called[rows], labels=np.unique(truth), average="macro", zero_division=0.0))
    return np.array(draws)


def test_intervals_are_those_of_drawing_cells():
    truth, called = random_labels(120, 3, n_types=4, p_right=0.6)
    drawn = loop_of_macro_f1(truth, called, np.random.default_rng(0), 400)
    found = annotation_intervals(truth, called, rng=np.random.default_rng(1), n_draws=4000).macro_f1
    spread = drawn.std()
    assert found.value == pytest.approx(annotation_scores(truth, called).macro_f1)
    assert found.low == pytest.approx(np.quantile(drawn, 0.025), abs=0.35 * spread)
    assert found.high == pytest.approx(np.quantile(drawn, 0.975), abs=0.35 * spread)
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.2)
    all_scores = annotation_intervals(truth, called, rng=np.random.default_rng(1))
    scores = annotation_scores(truth, called)
    assert all_scores.accuracy.value == pytest.approx(scores.accuracy)
    assert all_scores.balanced_accuracy.value == pytest.approx(scores.balanced_accuracy)
    for interval in (all_scores.accuracy, all_scores.balanced_accuracy, all_scores.macro_f1):
        assert interval.low < interval.value < interval.high


def test_a_thousand_draws_of_a_thousand_cells_take_less_than_a_second():
    truth, called = random_labels(1000, 0)
    _, other = random_labels(1000, 1)
    started = time.process_time()
    annotation_intervals(truth, called, rng=np.random.default_rng(0))
    paired_bootstrap(truth, called, other, rng=np.random.default_rng(0))
    assert time.process_time() - started < 1


def test_paired_differences_know_that_the_cells_are_the_same():
    truth, ours = random_labels(600, 0, p_right=0.7)
    other = ours.copy()
    wrong = np.flatnonzero(ours != truth)
    ours = ours.copy()
    ours[wrong[:25]] = truth[wrong[:25]]  # right where the other was wrong, and the same elsewhere
    found = paired_bootstrap(truth, ours, other, rng=np.random.default_rng(0))
    assert found.accuracy.value == pytest.approx(25 / 600)
    assert found.macro_f1.value == pytest.approx(
        annotation_scores(truth, ours).macro_f1 - annotation_scores(truth, other).macro_f1
    )
    assert not found.accuracy.is_zero_inside
    alone = annotation_intervals(truth, ours, rng=np.random.default_rng(0)).accuracy
    paired = found.accuracy
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)
    same = paired_bootstrap(truth, ours, ours, rng=np.random.default_rng(0)).macro_f1
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert same.is_zero_inside
    back = paired_bootstrap(truth, other, ours, rng=np.random.default_rng(0)).macro_f1
    assert back.value == pytest.approx(-found.macro_f1.value)


def test_the_interval_covers_as_often_as_it_says():
    covered = 0
    for seed in range(80):
        truth, called = random_labels(300, seed, n_types=3, p_right=0.7)
        # 70 % are right on purpose, and of the others one in four by chance
        interval = annotation_intervals(truth, called, rng=np.random.default_rng(seed), n_draws=200).accuracy
        covered += interval.low <= 0.7 + 0.3 / 4 <= interval.high
    assert covered >= 68  # 76 expected; four standard errors below


def test_bootstrap_of_means_functions_and_strata():
    values = np.random.default_rng(0).random(50)
    mean = bootstrap_interval(values, rng=np.random.default_rng(1))
    assert mean.value == pytest.approx(values.mean())
    assert mean.high - mean.low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(50), rel=0.15)
    by_function = bootstrap_interval(lambda rows: values[rows].mean(), n_cells=50, rng=np.random.default_rng(1))
    assert (by_function.low, by_function.high) == pytest.approx((mean.low, mean.high))
    strata = np.repeat(["x", "y"], 25)
    ones = (strata == "y").astype(float)
    fixed = bootstrap_interval(ones, strata=strata, rng=np.random.default_rng(0))
    assert fixed.low == fixed.high == 0.5  # nothing but the sizes of the strata varies, and they do not
    assert bootstrap_interval(ones, rng=np.random.default_rng(0)).high > 0.55
    wide = bootstrap_interval(values, rng=np.random.default_rng(1), level=0.99)
    assert wide.low < mean.low < mean.high < wide.high


def test_draws_in_blocks_are_draws(monkeypatch):
    values = np.random.default_rng(0).random(40)
    whole = bootstrap_interval(values, rng=np.random.default_rng(1))
    monkeypatch.setattr(annotation, "_MAX_ENTRIES", 100)
    assert bootstrap_interval(values, rng=np.random.default_rng(1)) == whole


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: annotation_scores([], []), SourceError, "0 true"),
        (lambda: annotation_scores(["a"], ["a", "b"]), SourceError, "1 true and 2"),
        (lambda: annotation_scores(["a", None], ["a", "b"]), SourceError, "1 missing"),
        (lambda: annotation_scores(["a", np.nan], ["a", "b"]), SourceError, "1 missing"),
        (lambda: annotation_scores(["a"], ["a"], [[1.0]]), ConfigError, "without classes"),
        (lambda: annotation_scores(["a"], ["a"], [[0.5, 0.5]], ["a"]), ConfigError, "shape"),
        (lambda: annotation_scores(["a"], ["a"], [[0.5, 0.5]], ["a", "a"]), ConfigError, "shape"),
        (lambda: annotation_scores(["a"], ["a"], [[3.0, -2.0]], ["a", "b"]), ConfigError, "softmax"),
        (lambda: expected_calibration_error([1.2], [True]), ConfigError, "1.2"),
        (lambda: expected_calibration_error([np.nan], [True]), ConfigError, "nan"),
        (lambda: expected_calibration_error([], []), ConfigError, "shape"),
        (lambda: bootstrap_interval(np.mean, rng=np.random.default_rng(0)), ConfigError, "n_cells"),
        (lambda: bootstrap_interval([], rng=np.random.default_rng(0)), ConfigError, "0 values"),
        (lambda: bootstrap_interval([1.0], strata=["a", "b"], rng=np.random.default_rng(0)), ConfigError, "2 strata"),
        (lambda: bootstrap_interval([1.0], n_draws=0, rng=np.random.default_rng(0)), ConfigError, "n_draws=0"),
        (lambda: annotation_intervals(["a"], ["a"], level=1.0, rng=np.random.default_rng(0)), ConfigError, "level"),
        (lambda: paired_bootstrap(["a"], ["a"], [], rng=np.random.default_rng(0)), SourceError, "0 predicted"),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
