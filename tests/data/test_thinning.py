from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from scdiva.data.thinning import split_counts, thin_counts
from twins import cell_counts


@settings(max_examples=25, deadline=None)
@given(
    dense=arrays(np.int32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.integers(0, 1000)),
    outside=st.integers(0, 50),
    rho=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_two_views_add_up_to_the_cell_exactly(dense, outside, rho, seed):
    cells = cell_counts(dense, dense.sum(axis=1) + outside)
    before = cells.counts.copy()
    a, b = split_counts(cells, rho, np.random.default_rng(seed))
    np.testing.assert_array_equal((a.counts + b.counts).toarray(), dense)
    np.testing.assert_array_equal(a.library_size + b.library_size, cells.library_size)
    for view in (a, b):
        assert (view.counts.data > 0).all()
        assert view.counts.has_sorted_indices
        assert (view.library_size >= np.asarray(view.counts.sum(axis=1)).ravel()).all()
    np.testing.assert_array_equal(cells.counts.toarray(), before.toarray())
    np.testing.assert_array_equal(cells.counts.indices, before.indices)


def test_nothing_or_everything_is_kept_at_the_ends():
    cells = cell_counts(np.arange(12).reshape(3, 4), [10, 30, 50])
    nothing, everything = split_counts(cells, [0.0, 0.0, 0.0], np.random.default_rng(0))
    assert nothing.counts.nnz == 0
    np.testing.assert_array_equal(everything.library_size, [10, 30, 50])
    np.testing.assert_array_equal(
        thin_counts(cells, 1.0, np.random.default_rng(0)).counts.toarray(), cells.counts.toarray()
    )


def test_equal_seeds_give_equal_splits_and_other_seeds_others():
    cells = cell_counts(np.full((5, 20), 30))
    first, again, other = (split_counts(cells, 0.5, np.random.default_rng(s))[0].counts.toarray() for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_kept_share_is_rho_cell_by_cell():
    rho = np.array([0.1, 0.5, 0.9])
    cells = cell_counts(np.full((3, 2000), 25), np.full(3, 80_000))
    kept = thin_counts(cells, rho, np.random.default_rng(0))
    # 50,000 and 30,000 molecules: the standard error of the share is below 0.003
    np.testing.assert_allclose(np.asarray(kept.counts.sum(axis=1)).ravel() / 50_000, rho, atol=0.01)
    np.testing.assert_allclose(kept.library_size / 80_000, rho, atol=0.01)


def test_views_of_poisson_counts_are_uncorrelated():
    rng = np.random.default_rng(3)
    a, b = split_counts(cell_counts(rng.poisson(4.0, (200, 200))), 0.5, rng)
    correlation = np.corrcoef(a.counts.toarray().ravel(), b.counts.toarray().ravel())[0, 1]
    assert abs(correlation) < 4 / 200  # four standard errors of 40,000 independent pairs
    # Poisson, too: mean and variance of a view agree
    view = a.counts.toarray().ravel()
    assert view.mean() == pytest.approx(2.0, abs=0.03)
    assert view.var() == pytest.approx(2.0, abs=0.08)


@pytest.mark.parametrize("rho", [-0.1, 1.1, [0.5, 2.0, 0.5]])
def test_a_share_outside_zero_and_one_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        split_counts(cell_counts(np.ones((3, 4))), rho, np.random.default_rng(0))
