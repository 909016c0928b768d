"""Changes and rank tests against plain NumPy and SciPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from perturbed import perturbed_cells
from scdiva.data.perturbation_effects import ControlMeans, effects_of, log_values, rank_sum_test


def test_values_use_the_library_size_that_the_cells_come_with():
    cells = perturbed_cells(n_cells=5)
    double = replace(cells, cells=replace(cells.cells, library_size=2 * cells.cells.library_size))
    expected = np.log1p(cells.cells.counts.toarray() / cells.cells.library_size[:, None] * 1e4)
    np.testing.assert_allclose(log_values(cells).toarray(), expected, rtol=1e-5)
    np.testing.assert_allclose(np.expm1(log_values(double).toarray()), np.expm1(expected) / 2, rtol=1e-4, atol=1e-4)


def test_control_means_are_matched_by_batch():
    values = sp.csr_matrix(np.array([[1.0], [3.0], [10.0]]))
    means = ControlMeans.of(values, np.array([0, 0, 1]))
    assert means.matched(np.array([0, 0, 1])) == pytest.approx([(2 + 2 + 10) / 3])
    # batch 7 has no control cells: all of them
    assert means.matched(np.array([7])) == pytest.approx([14 / 3])
    assert means.matched(np.array([1, 7])) == pytest.approx([(10 + 14 / 3) / 2])


def test_effects_are_differences_of_means_within_batches():
    cells = perturbed_cells(contexts=("a", "b"))
    x = log_values(cells).toarray().astype(np.float64)
    found = effects_of(cells)
    assert len(found) == 10
    for effect in found:
        own = np.array([cells.perturbations[p] == effect.perturbation for p in cells.perturbation_code])
        here = np.array([cells.contexts[c] == effect.context for c in cells.context_code])
        rows = np.flatnonzero(own & here)
        control = np.mean(
            [x[here & cells.is_control & (cells.batch_code == cells.batch_code[row])].mean(axis=0) for row in rows],
            axis=0,
        )
        np.testing.assert_allclose(effect.change, x[rows].mean(axis=0) - control, atol=1e-6)
        assert effect.n_cells == rows.size


def test_rank_sums_are_scipys_with_one_batch():
    rng = np.random.default_rng(0)
    x, y = rng.poisson(1.0, (30, 700)), rng.poisson(1.3, (50, 700))
    x[:, 5] = y[:, 5].min()
    y[:, 5] = y[:, 5].min()  # constant
    z = rank_sum_test(sp.csr_matrix(x), sp.csr_matrix(y))
    for gene in (0, 1, 600, 699):
        expected = stats.mannwhitneyu(x[:, gene], y[:, gene], use_continuity=False, method="asymptotic")
        assert 2 * stats.norm.sf(abs(z[gene])) == pytest.approx(expected.pvalue, rel=1e-6)
        assert np.sign(z[gene]) == np.sign(expected.statistic - 30 * 50 / 2)
    assert z[5] == 0


def test_rank_sums_within_batches_do_not_see_a_batch_effect():
    rng = np.random.default_rng(1)
    # all perturbed cells but two are of the bright batch
    batch_x, batch_y = np.array([1] * 38 + [0] * 2), np.array([0] * 35 + [1] * 5)
    x, y = (rng.normal(0, 1, (40, 1)) + 5 * b[:, None] for b in (batch_x, batch_y))
    assert rank_sum_test(sp.csr_matrix(x), sp.csr_matrix(y))[0] > 5
    assert abs(rank_sum_test(sp.csr_matrix(x), sp.csr_matrix(y), batch_x, batch_y)[0]) < 3
    # a batch without controls is tested against all
    assert rank_sum_test(sp.csr_matrix(x), sp.csr_matrix(y), batch_x * 7 + 3, batch_y)[0] > 5
