from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

import twins
from native_cells import dense_counts
from scdiva.baselines.reconstruction import PRIOR_CELLS, ReferenceCells, random_guess

DENSE = dense_counts(30, 25)[:28]  # the last two are nearly empty
CELLS = twins.cell_counts(DENSE, DENSE.sum(axis=1) + 5)


def visible_part(rows: np.ndarray, share: float = 0.5, seed: int = 0):
    """Some tokens of some cells, which keep their library sizes and positions."""
    kept = DENSE[rows] * (np.random.default_rng(seed).random((len(rows), DENSE.shape[1])) < share)
    return replace(CELLS.take(rows), counts=sp.csr_matrix(kept.astype(np.int32)))


ROWS = np.array([3, 17, 8])
VISIBLE = visible_part(ROWS)
REFERENCE = ReferenceCells.of(CELLS, is_left_out=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x.astype(np.float64)))


class TestPopulation:
    def test_frequency_among_all_other_cells(self):
        found = sigmoid(REFERENCE.population(VISIBLE).log_odds)
        for row, cell in enumerate(ROWS):
            others = np.delete(DENSE, cell, axis=0) > 0
            np.testing.assert_allclose(found[row], (others.sum(axis=0) + 0.5) / (len(others) + 1), rtol=1e-5)

    def test_values_are_those_of_other_cells_moved_to_the_cell(self):
        guess = REFERENCE.population(VISIBLE)
        value = np.log1p(twins.cp10k(DENSE, CELLS.library_size))
        others, is_there = np.delete(value, ROWS[0], axis=0), np.delete(DENSE, ROWS[0], axis=0) > 0
        typical = others[is_there].mean()
        mean = (others.sum(axis=0) + typical) / (is_there.sum(axis=0) + 1)
        seen = VISIBLE.counts[0].indices
        expected = mean + (value[ROWS[0], seen] - mean[seen]).mean()
        found = guess.expected_values(np.zeros(25, dtype=np.int64), np.arange(25))
        np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-4)

    def test_a_reference_of_other_cells_leaves_none_out(self):
        found = sigmoid(ReferenceCells.of(CELLS, is_left_out=False).population(VISIBLE).log_odds)
        np.testing.assert_allclose(found[0], ((DENSE > 0).sum(axis=0) + 0.5) / (len(DENSE) + 1), rtol=1e-5)

    def test_a_gene_that_the_reference_does_not_measure_is_unknown_and_not_rare(self):
        measured = np.ones(25, dtype=bool)
        measured[4] = False
        dense = DENSE.copy()
        dense[:, 4] = 0
        reference = ReferenceCells.of(twins.cell_counts(dense, measured=measured), is_left_out=False)
        found = sigmoid(reference.population(VISIBLE).log_odds)
        assert found[0, 4] == pytest.approx(np.delete(found[0], 4).mean(), rel=1e-4)

    def test_likelihoods_of_counts_sum_to_one(self):
        guess = REFERENCE.population(VISIBLE)
        count = np.arange(1, 4000)
        zeros = np.zeros(count.size, dtype=np.int64)
        nll = guess.value_nll(zeros, zeros + 2, count)
        assert nll is not None
        assert np.exp(-nll.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("kind", ["population", "neighbours", "same_label"])
def test_what_is_hidden_in_a_cell_does_not_reach_its_own_guess(kind):
    changed = DENSE.copy()
    hidden = (DENSE[ROWS[0]] > 0) & (VISIBLE.counts[0].toarray().ravel() == 0)
    changed[ROWS[0], hidden] = 0
    changed[ROWS[0], DENSE[ROWS[0]] == 0] = 7
    other = ReferenceCells.of(twins.cell_counts(changed, CELLS.library_size), is_left_out=True)

    def guess(reference: ReferenceCells):
        prior = reference.population(VISIBLE)
        if kind == "population":
            return prior
        if kind == "neighbours":
            return reference.neighbours(VISIBLE, prior, k=4)
        return reference.same_label(VISIBLE, prior, ROWS % 3, np.arange(28) % 3)

    np.testing.assert_allclose(guess(REFERENCE).log_odds[0], guess(other).log_odds[0], rtol=1e-5)
    # another cell does see the change
    assert not np.allclose(guess(REFERENCE).log_odds[1:], guess(other).log_odds[1:], rtol=1e-3)


class TestNeighbours:
    def test_the_nearest_by_visible_tokens_are_taken(self):
        prior = REFERENCE.population(VISIBLE)
        value = np.log1p(twins.cp10k(DENSE, CELLS.library_size))
        unit = value / np.linalg.norm(value, axis=1, keepdims=True)
        seen = np.log1p(twins.cp10k(VISIBLE.counts.toarray(), VISIBLE.library_size))
        found = sigmoid(REFERENCE.neighbours(VISIBLE, prior, k=4).log_odds)
        for row, cell in enumerate(ROWS):
            alike = unit @ seen[row]
            alike[cell] = -1
            nearest = np.argsort(-alike)[:4]
            rate = ((DENSE[nearest] > 0).sum(axis=0) + PRIOR_CELLS * sigmoid(prior.log_odds[row])) / (4 + PRIOR_CELLS)
            np.testing.assert_allclose(found[row], np.clip(rate, None, 1 - 1e-6), rtol=1e-4)

    def test_where_nothing_is_visible_the_population_answers(self):
        nothing = visible_part(ROWS, share=0.0)
        prior = REFERENCE.population(nothing)
        guess = REFERENCE.neighbours(nothing, prior)
        np.testing.assert_allclose(guess.log_odds, prior.log_odds, atol=1e-4)
        # values are moved by what cells of that depth have, on a straight line over the reference
        value, is_there = np.log1p(twins.cp10k(DENSE, CELLS.library_size)), DENSE > 0
        mean = value.sum(axis=0) / np.maximum(is_there.sum(axis=0), 1)
        offset = np.array([(row - mean)[there].mean() for row, there in zip(value, is_there, strict=True)])
        expected = np.polyval(np.polyfit(np.log(CELLS.library_size), offset, 1), np.log(nothing.library_size))
        np.testing.assert_allclose(prior.offset, expected, atol=1e-5)

    def test_an_unknown_label_is_alike_to_no_cell(self):
        prior = REFERENCE.population(VISIBLE)
        guess = REFERENCE.same_label(VISIBLE, prior, np.full(3, -1), np.full(28, -1))
        np.testing.assert_allclose(guess.log_odds, prior.log_odds, atol=1e-4)


def test_the_null_control_is_random_and_each_cells_own():
    guess = random_guess(VISIBLE, REFERENCE.population(VISIBLE), seed=0)
    turned = visible_part(ROWS)
    turned = turned.take(np.array([2, 0]))
    again = random_guess(turned, REFERENCE.population(turned), seed=0)
    np.testing.assert_array_equal(guess.log_odds[[2, 0]], again.log_odds)
    np.testing.assert_allclose(guess.mean_value[[2, 0]], again.mean_value)
    other = random_guess(VISIBLE, REFERENCE.population(VISIBLE), seed=1)
    assert not np.array_equal(np.argsort(guess.log_odds[0]), np.argsort(other.log_odds[0]))
    assert not np.array_equal(np.argsort(guess.log_odds[0]), np.argsort(guess.log_odds[1]))
