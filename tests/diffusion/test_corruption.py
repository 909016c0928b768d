from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from scdiva.diffusion import MaskKind, draw_masks, exact_count_masks, stratified_times

CELLS = st.lists(
    st.tuples(st.integers(0, 30), st.sampled_from(list(MaskKind)), st.floats(0, 1, exclude_max=True)),
    min_size=1,
    max_size=12,
)


def per_cell(is_masked_N: np.ndarray, n_tokens_B: np.ndarray) -> np.ndarray:
    cell_N = np.repeat(np.arange(n_tokens_B.size), n_tokens_B)
    return np.bincount(cell_N, weights=is_masked_N, minlength=n_tokens_B.size).astype(int)


@settings(max_examples=60, deadline=None)
@given(cells=CELLS, seed=st.integers(0, 99))
def test_each_kind_hides_what_it_says(cells, seed):
    n, kind, t = (np.array(column) for column in zip(*cells, strict=True))
    masks = draw_masks(n, kind, t, np.random.default_rng(seed))
    n_gene, n_value = per_cell(masks.is_gene_masked_N, n), per_cell(masks.is_value_masked_N, n)
    np.testing.assert_array_equal(masks.n_hidden_B, n_gene)
    # a value is never visible where its gene is hidden
    assert not (masks.is_gene_masked_N & ~masks.is_value_masked_N).any()
    count = np.minimum(n, np.floor(t * n).astype(int) + 1)
    for i, (n_i, kind_i, _) in enumerate(cells):
        expected_gene, least_values, most_values = {
            MaskKind.JOINT: (count[i], count[i], count[i]),
            MaskKind.VALUES: (0, count[i], count[i]),
            MaskKind.STAGED: (count[i], count[i], n_i),
            MaskKind.ALL: (n_i, n_i, n_i),
        }[kind_i]
        assert n_gene[i] == expected_gene
        assert least_values <= n_value[i] <= most_values


def test_staged_masks_hide_further_values_of_half_of_the_cells():
    # values are hidden at max(t, u): at t = 1/2 half of the cells hide more values than genes
    n = np.full(4000, 40)
    masks = draw_masks(n, np.full(4000, MaskKind.STAGED), np.full(4000, 0.5), np.random.default_rng(0))
    extra = per_cell(masks.is_value_masked_N, n) - per_cell(masks.is_gene_masked_N, n)
    assert (extra > 0).mean() == pytest.approx(19 / 40, abs=0.03)  # u must reach the next of 40 steps
    assert extra.max() == 40 - 21


def test_the_number_of_hidden_tokens_is_uniform():
    n_cells, n_tokens = 7000, 7
    n = np.full(n_cells, n_tokens)
    rng = np.random.default_rng(3)
    # times as in training, minibatch after minibatch, and independent ones
    for t in (np.concatenate([stratified_times(50, rng) for _ in range(140)]), rng.random(n_cells)):
        found = np.bincount(draw_masks(n, np.zeros(n_cells, dtype=int), t, rng).n_hidden_B, minlength=n_tokens + 1)
        assert found[0] == 0
        assert chisquare(found[1:]).pvalue > 1e-3


def test_every_set_of_tokens_is_equally_likely():
    n = np.full(6000, 4)
    masks = draw_masks(n, np.zeros(6000, dtype=int), np.full(6000, 0.3), np.random.default_rng(0))  # two of four
    sets, found = np.unique(masks.is_gene_masked_N.reshape(-1, 4), axis=0, return_counts=True)
    assert sets.shape == (6, 4)
    assert chisquare(found).pvalue > 1e-3


def test_cells_are_masked_independently():
    masks = draw_masks(np.full(4000, 6), np.zeros(4000, dtype=int), np.full(4000, 0.4), np.random.default_rng(0))
    hidden = masks.is_gene_masked_N.reshape(-1, 6).astype(float)
    assert np.abs(np.corrcoef(hidden[::2, 0], hidden[1::2, 0])[0, 1]) < 0.1


@given(n_cells=st.integers(0, 200), seed=st.integers(0, 99))
def test_stratified_times_fill_the_unit_interval(n_cells, seed):
    t = stratified_times(n_cells, np.random.default_rng(seed))
    assert t.shape == (n_cells,)
    assert ((t >= 0) & (t < 1)).all()
    gaps = np.diff(np.sort(t))
    np.testing.assert_allclose(gaps, 1 / max(n_cells, 1), atol=1e-9)


def test_stratified_times_come_in_random_order():
    rng = np.random.default_rng(0)
    # which of the eight parts the second cell is in, seen from the first
    steps = [np.rint(8 * (t[1] - t[0])) % 8 for t in (stratified_times(8, rng) for _ in range(1400))]
    found = np.bincount(np.array(steps, dtype=int), minlength=8)
    assert found[0] == 0
    assert chisquare(found[1:]).pvalue > 1e-3


@settings(max_examples=60, deadline=None)
@given(n=st.lists(st.integers(0, 40), min_size=1, max_size=10), t=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
def test_exact_counts_hide_that_share_and_at_least_one(n, t):
    n = np.array(n)
    masks = exact_count_masks(n, t, np.random.default_rng(0))
    expected = np.where(n == 0, 0, np.maximum(1, np.rint(t * n).astype(int)))
    np.testing.assert_array_equal(per_cell(masks.is_gene_masked_N, n), expected)
    np.testing.assert_array_equal(masks.n_hidden_B, expected)
    np.testing.assert_array_equal(masks.is_value_masked_N, masks.is_gene_masked_N)


def test_masks_are_seeded():
    arguments = (np.array([9, 0, 30]), np.array([0, 1, 2]), np.array([0.2, 0.5, 0.8]))
    one, two, other = (draw_masks(*arguments, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.is_value_masked_N, two.is_value_masked_N)
    assert (one.is_value_masked_N != other.is_value_masked_N).any()


def test_no_cells_and_empty_cells_hide_nothing():
    for n in (np.zeros(0, dtype=int), np.zeros(3, dtype=int)):
        masks = draw_masks(n, np.full(n.size, MaskKind.ALL), np.full(n.size, 0.9), np.random.default_rng(0))
        assert masks.is_gene_masked_N.size == masks.is_value_masked_N.size == 0
        assert masks.n_hidden_B.tolist() == [0] * n.size
