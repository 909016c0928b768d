"""Counts that are moved until their mean is a given one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scdiva.data.shifting import CountShift, mean_log1p, response_spread, shifted_counts, target_mean
from scdiva.errors import ConfigError
from twins import cell_counts, cp10k

N_CELLS, N_GENES = 400, 30
MEASURED = np.arange(N_GENES) != 7


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    dense = rng.poisson(rng.gamma(0.7, 3.0, N_GENES) * rng.uniform(0.5, 2, (N_CELLS, 1))) * MEASURED
    dense[:, 3] = 0
    return cell_counts(dense, dense.sum(axis=1) + 400, MEASURED)


def test_the_mean_is_that_of_log1p_cp10k(cells):
    expected = np.log1p(cp10k(cells.counts.toarray(), cells.library_size)).mean(axis=0)
    np.testing.assert_allclose(mean_log1p(cells.counts, cells.library_size), expected)


def test_means_move_as_predicted(cells):
    change = np.random.default_rng(1).normal(0, 0.4, N_GENES)
    change[3], change[7] = 1.5, np.nan  # a gene that no control cell has; one that is not measured
    target = target_mean(cells, np.nan_to_num(change))
    moved = shifted_counts(cells, change, np.random.default_rng(2))
    found = mean_log1p(moved.counts, moved.library_size)
    # standard errors of drawn means are up to 0.05
    np.testing.assert_allclose(found, target, atol=0.15)
    assert np.abs(found - target).mean() < 0.04
    assert target[3] == 1.5
    assert target[7] == found[7] == 0
    before = mean_log1p(cells.counts, cells.library_size)
    assert np.abs(before - target).mean() > 0.2


def test_counts_are_whole_and_what_is_outside_the_genes_stays(cells):
    moved = shifted_counts(cells, np.full(N_GENES, 0.3), np.random.default_rng(2))
    assert moved.counts.dtype == np.int32
    assert (moved.counts.data > 0).all()
    assert moved.counts.has_sorted_indices
    outside = moved.library_size - np.asarray(moved.counts.sum(axis=1)).ravel()
    np.testing.assert_allclose(outside, 400)


def test_only_what_changes_is_touched(cells):
    shift = CountShift(np.ones(N_GENES), np.zeros(N_GENES), np.zeros(N_GENES))
    kept = shift.kept_G.copy()
    kept[2] = 0.0
    moved = replace(shift, kept_G=kept).apply(cells, np.random.default_rng(0)).counts.toarray()
    others = np.arange(N_GENES) != 2
    np.testing.assert_array_equal(moved[:, others], cells.counts.toarray()[:, others])
    assert (moved[:, 2] == 0).all()


def test_no_change_keeps_nearly_all_and_a_mean_below_zero_is_zero(cells):
    shift = CountShift.fit(cells, np.zeros(N_GENES), np.random.default_rng(0))
    np.testing.assert_array_equal(shift.kept_G, 1.0)
    np.testing.assert_array_equal(shift.added_G, 0.0)
    gone = shifted_counts(cells, np.where(np.arange(N_GENES) == 0, -99.0, 0.0), np.random.default_rng(0))
    assert gone.counts[:, 0].nnz == 0


def test_equal_seeds_give_equal_cells(cells):
    change = np.linspace(-1, 1, N_GENES)
    one, again, other = (shifted_counts(cells, change, np.random.default_rng(s)).counts.toarray() for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("change", [np.zeros(N_GENES - 1), np.full(N_GENES, np.inf)])
def test_changes_that_do_not_fit_are_refused(change, cells):
    with pytest.raises(ConfigError, match="changes of shape"):
        CountShift.fit(cells, change, np.random.default_rng(0))


def test_no_cells_are_refused(cells):
    with pytest.raises(ConfigError, match="no control cells"):
        CountShift.fit(cells.take(np.arange(0)), np.zeros(N_GENES), np.random.default_rng(0))


class TestSpread:
    @pytest.mark.parametrize("spread", [0.0, 0.5])
    def test_the_spread_of_moved_cells_is_found_again(self, spread, cells):
        change = np.where(np.arange(N_GENES) < 10, 1.5, 0.0)
        found = []
        for seed in range(3):
            rng = np.random.default_rng(seed)
            moved = CountShift.fit(cells, change, rng, spread=spread).apply(cells, rng)
            found.append(response_spread(moved, cells, 10))
            error = mean_log1p(moved.counts, moved.library_size) - target_mean(cells, change)
            assert np.abs(error).mean() < 0.06
        assert abs(np.mean(found) - spread) < 0.12

    def test_genes_that_respond_go_together(self, cells):
        change = np.where(np.arange(N_GENES) < 10, 1.5, 0.0)

        def correlation(spread: float) -> float:
            rng = np.random.default_rng(0)
            moved = CountShift.fit(cells, change, rng, spread=spread).apply(cells, rng)
            gained = np.log1p(cp10k(moved.counts.toarray(), moved.library_size))[:, :7]
            return float(np.corrcoef(gained.T)[np.triu_indices(7, 1)].mean())

        assert correlation(0.7) > correlation(0.0) + 0.1

    def test_no_response_has_none(self, cells):
        assert response_spread(cells, cells) == 0.0


def test_depth_follows_and_means_stay():
    rng = np.random.default_rng(0)
    cells = cell_counts(rng.poisson(rng.gamma(2.0, 2.0, 60), (N_CELLS, 60)))
    depths = []
    for ratio in (0.7, 1.0, 1.3):
        rng = np.random.default_rng(0)
        moved = CountShift.fit(cells, np.zeros(60), rng, depth_ratio=ratio).apply(cells, rng)
        depths.append(moved.library_size.mean() / cells.library_size.mean())
        assert np.abs(mean_log1p(moved.counts, moved.library_size) - target_mean(cells, np.zeros(60))).mean() < 0.08
    assert depths[0] < 0.9
    assert depths[1] == 1.0
    assert depths[2] > 1.1
