from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from scdiva.metrics.reconstruction import NO_GENE, bleu, edit_distance, pearson, rank_correlation, spearman

SEQUENCES = st.lists(st.integers(0, 6), max_size=30)


def naive_edit_distance(a, b) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = min(table[i, j] + (x != y), table[i, j + 1] + 1, table[i + 1, j] + 1)
    return int(table[-1, -1])


class TestEditDistance:
    @settings(max_examples=300, deadline=None)
    @given(SEQUENCES, SEQUENCES)
    def test_is_what_the_table_says(self, a, b):
        assert edit_distance(a, b) == naive_edit_distance(a, b)

    def test_of_long_permutations(self):
        rng = np.random.default_rng(0)
        a, b = rng.permutation(150), rng.permutation(170)
        assert edit_distance(a, b) == naive_edit_distance(a, b)

    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [([], [], 0), ([1], [], 1), ([], [1, 2], 2), ([1, 2, 3], [1, 2, 3], 0), ([1, 2, 3], [2, 3, 4], 2)],
    )
    def test_by_hand(self, a, b, expected):
        assert edit_distance(np.array(a, dtype=int), np.array(b, dtype=int)) == expected

    def test_each_place_left_hidden_is_one_error(self):
        truth = np.arange(1200)
        left = np.where(np.random.default_rng(0).random(1200) < 0.4, NO_GENE, truth)
        assert edit_distance(truth, left) == (left == NO_GENE).sum()


class TestBleu:
    def test_of_equal_sequences_is_one(self):
        assert bleu([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]) == pytest.approx(1.0)

    def test_by_hand(self):
        # 1-grams 4/5; 2-grams (1 2), (2 3) of 4: 3/5; 3-grams (1 2 3) of 3: 2/4; no 4-gram of 2: 1/3
        assert bleu([1, 2, 3, 4, 5], [1, 2, 3, 9, 5]) == pytest.approx((4 / 5 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)

    def test_repetitions_are_clipped(self):
        # 1-grams: one of the two 7s counts, and 8: 2/3; 2-grams (7 8): 2/3; one 3-gram, no match: 1/2; no 4-gram: 1/1
        assert bleu([7, 8, 9], [7, 7, 8]) == pytest.approx((2 / 3 * 2 / 3 * 1 / 2 * 1.0) ** 0.25)

    def test_a_short_prediction_is_penalised(self):
        # every n-gram there is matches; the penalty is exp(1 - 6 / 4)
        assert bleu([1, 2, 3, 4, 5, 6], [1, 2, 3, 4]) == pytest.approx(np.exp(-0.5))

    @pytest.mark.parametrize("predicted", [[], [7, 8, 9], [NO_GENE] * 3])
    def test_without_a_common_gene_it_is_zero(self, predicted):
        assert bleu([1, 2, 3], predicted) == 0.0

    def test_grams_are_told_apart_in_long_sequences(self):
        # were n-grams numbered without care, (a, b) would meet (c, d)
        rng = np.random.default_rng(0)
        truth = rng.permutation(41813)[:1200]
        shuffled = rng.permutation(truth)
        grams = [{tuple(s[i : i + n]) for i in range(1201 - n)} for n in range(1, 5) for s in (truth, shuffled)]
        precision = [(len(grams[2 * n] & grams[2 * n + 1]) + (n > 0)) / (1200 - n + (n > 0)) for n in range(4)]
        assert bleu(truth, shuffled) == pytest.approx(np.prod(precision) ** 0.25)


class TestCorrelations:
    def test_of_the_same_order_is_one_and_of_the_reverse_minus_one(self):
        assert rank_correlation([5, 3, 9, 1], [5, 3, 9, 1]) == pytest.approx(1.0)
        assert rank_correlation([5, 3, 9, 1], [1, 9, 3, 5]) == pytest.approx(-1.0)

    def test_over_the_union_with_absent_genes_last(self):
        # genes 1 2 3 4 9: true ranks 1 2 3 4 5, predicted 2 1 5 4 3
        assert rank_correlation([1, 2, 3, 4], [2, 1, 9, 4]) == pytest.approx(
            spearmanr([1, 2, 3, 4, 5], [2, 1, 5, 4, 3])[0]
        )

    def test_no_gene_is_no_gene_and_the_first_place_counts(self):
        # genes 1 2 3: true 1 2 3; predicted: 1 comes second and last, 2 nowhere (4), 3 third
        assert rank_correlation([1, 2, 3], [NO_GENE, 1, 3, 1]) == pytest.approx(spearmanr([1, 2, 3], [2, 4, 3])[0])

    def test_of_nothing(self):
        assert rank_correlation([1, 2, 3], [NO_GENE] * 3) == 0.0
        assert np.isnan(rank_correlation([1], [1]))

    def test_of_values(self):
        rng = np.random.default_rng(0)
        a, b = rng.integers(0, 5, 50), rng.normal(size=50)
        assert spearman(a, b) == pytest.approx(spearmanr(a, b)[0])
        assert pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
        assert pearson(a, np.ones(50)) == 0.0
        assert np.isnan(pearson(np.ones(50), b))
