"""Simple generators of perturbed cells."""

from __future__ import annotations

import numpy as np
import pytest

from scdiva.baselines.perturbation_cells import control_cells, negative_binomial_cells, shifted_cells
from scdiva.data.shifting import mean_log1p, target_mean
from scdiva.errors import ConfigError
from twins import cell_counts

N_CELLS, N_GENES = 300, 20


@pytest.fixture(scope="module")
def control():
    rng = np.random.default_rng(0)
    return cell_counts(rng.poisson(rng.gamma(2.0, 2.0, N_GENES) * rng.uniform(0.5, 2, (N_CELLS, 1))))


@pytest.fixture(scope="module")
def change():
    return np.random.default_rng(1).normal(0, 0.5, N_GENES)


def test_control_cells_come_in_turn(control):
    found = control_cells(control, 2 * N_CELLS + 5, 0)
    times = np.bincount(found.cell_index, minlength=N_CELLS)
    assert set(times.tolist()) == {2, 3}
    np.testing.assert_array_equal(found.counts.toarray(), control.counts.toarray()[found.cell_index])


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_moved_cells_have_the_mean_and_are_seeded(spread, control, change):
    one, again = (shifted_cells(control, change, 900, 3, spread=spread) for _ in range(2))
    assert (one.counts != again.counts).nnz == 0
    error = mean_log1p(one.counts, one.library_size) - target_mean(control, change)
    assert np.abs(error).mean() < 0.05


def test_independent_counts_have_the_mean_and_no_cell_behind_them(control, change):
    counts = negative_binomial_cells(control, change, 900, 3)
    assert counts.shape == (900, N_GENES)
    assert counts.dtype == np.int32
    library = np.asarray(counts.sum(axis=1), dtype=float).ravel()
    assert np.abs(mean_log1p(counts, library) - target_mean(control, change)).mean() < 0.15


def test_no_control_cells(control, change):
    with pytest.raises(ConfigError, match="no control cells"):
        shifted_cells(control.take(np.arange(0)), change, 5, 0)
