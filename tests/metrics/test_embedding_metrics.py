from __future__ import annotations

import numpy as np
import pytest

from scdiva.metrics import kmeans_nmi, knn_scores, paired_difference


@pytest.fixture(scope="module")
def blobs() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], [120, 60, 30])
    centre = {"a": (0, 0), "b": (50, 0), "c": (0, 50)}
    return np.array([centre[x] for x in labels]) + rng.normal(size=(210, 2)), labels


def test_separable_types_are_all_found(blobs):
    z, labels = blobs
    scores = knn_scores(z, labels, seed=0)
    assert scores.accuracy == scores.macro_f1 == 1.0
    assert scores.is_correct.all()
    np.testing.assert_allclose(kmeans_nmi(z, labels, seeds=range(3)).max(), 1.0)


def test_shuffled_labels_are_at_chance(blobs):
    z, labels = blobs
    shuffled = np.random.default_rng(1).permutation(labels)
    scores = knn_scores(z, shuffled, seed=0)
    # chance is at most the share of the most frequent label (0.57); macro-F1 of that guess is 0.24
    assert 0.35 < scores.accuracy < 0.65
    assert scores.macro_f1 < 0.45
    assert kmeans_nmi(z, shuffled, seeds=[0])[0] < 0.06


def test_accuracy_and_f1_follow_from_the_cells_that_were_right():
    # one dimension, two types, and three cells on the wrong side
    z = np.array([[0.0]] * 20 + [[10.0]] * 20) + np.linspace(0, 0.1, 40)[:, None]
    labels = np.array(["x"] * 20 + ["y"] * 20)
    z[:3, 0] = 10.06, 10.075, 10.09
    scores = knn_scores(z, labels, seed=0, k=3)
    assert list(np.flatnonzero(~scores.is_correct)) == [0, 1, 2]
    assert scores.accuracy == pytest.approx(37 / 40)
    precision_y, recall_x = 20 / 23, 17 / 20
    assert scores.macro_f1 == pytest.approx((2 * recall_x / (1 + recall_x) + 2 * precision_y / (1 + precision_y)) / 2)


def test_scores_are_seeded_and_blind_to_names(blobs):
    z, labels = blobs
    noisy = z + np.random.default_rng(0).normal(0, 25, z.shape)
    first, again, other = (knn_scores(noisy, labels, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.is_correct, again.is_correct)
    assert (first.is_correct != other.is_correct).any()
    np.testing.assert_array_equal(kmeans_nmi(noisy, labels, seeds=[3]), kmeans_nmi(noisy, labels, seeds=[3]))
    renamed = np.array([{"a": 2, "b": 0, "c": 1}[x] for x in labels])
    np.testing.assert_allclose(kmeans_nmi(noisy, renamed, seeds=[3]), kmeans_nmi(noisy, labels, seeds=[3]))


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        ours, other = rng.random(80) < 0.7, rng.random(80) < 0.6
        difference, low, high = paired_difference(ours, other, rng=rng, n_draws=200)
        assert low <= difference <= high
        covered += low <= 0.1 <= high
    assert covered >= 51  # 57 of 60 expected; four standard errors below


def test_no_difference_has_no_interval_and_cells_stay_paired():
    right = np.random.default_rng(0).random(50) < 0.5
    assert paired_difference(right, right, rng=np.random.default_rng(0)) == (0.0, 0.0, 0.0)
    difference, low, high = paired_difference(right + 0.25, right, rng=np.random.default_rng(0))
    assert difference == low == high == pytest.approx(0.25)


def test_a_wider_level_gives_a_wider_interval():
    rng = np.random.default_rng(0)
    ours, other = rng.random(60), rng.random(60)
    narrow, wide = (paired_difference(ours, other, rng=np.random.default_rng(1), level=v) for v in (0.5, 0.99))
    assert wide[1] < narrow[1] < narrow[2] < wide[2]
