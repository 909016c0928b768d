"""Simple gene networks find a planted network; nulls do not."""

import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.baselines import network as baselines
from scdiva.data.network import GeneNetwork
from scdiva.errors import ConfigError
from scdiva.metrics import network as metrics
from scdiva.types import CellCounts

N_CELLS, N_REGULATORS, N_TARGETS, N_OTHERS = 400, 6, 40, 150
N_GENES = N_REGULATORS + N_TARGETS + N_OTHERS


@pytest.fixture(scope="module")
def planted():
    """Cells in which each target has one regulator, half of them repressed; further genes keep depth steady."""
    rng = np.random.default_rng(0)
    activity = rng.normal(size=(N_CELLS, N_REGULATORS))
    regulator = np.arange(N_TARGETS) % N_REGULATORS
    sign = np.where(np.arange(N_TARGETS) % 4 < 2, 1, -1)
    rate = np.full((N_CELLS, N_GENES), 4.0)
    rate[:, :N_REGULATORS] *= np.exp(0.9 * activity)
    rate[:, N_REGULATORS : N_REGULATORS + N_TARGETS] *= np.exp(0.9 * sign * activity[:, regulator])
    counts = sp.csr_matrix(rng.poisson(rate).astype(np.int32))
    counts.sort_indices()
    cells = CellCounts(
        counts=counts,
        library_size=np.asarray(counts.sum(axis=1), dtype=float).ravel(),
        cell_index=np.arange(N_CELLS),
        source_of_cell=(np.arange(N_CELLS) % 2).astype(np.int32),
        is_measured=np.ones((2, N_GENES), dtype=bool),
    )
    is_edge = np.zeros((N_REGULATORS, N_GENES), dtype=bool)
    is_edge[regulator, N_REGULATORS + np.arange(N_TARGETS)] = True
    signs = np.zeros(is_edge.shape, dtype=int)
    signs[regulator, N_REGULATORS + np.arange(N_TARGETS)] = sign
    return cells, is_edge, signs


SYMBOLS = np.array([f"g{i}" for i in range(N_GENES)])
REGULATORS, TARGETS = np.arange(N_REGULATORS), np.arange(N_GENES)
SOME = np.arange(N_REGULATORS + 12)


def ratio(network: GeneNetwork, is_edge) -> float:
    is_candidate = ~np.isnan(network.score)
    draws = metrics.draw_regulators(len(network.regulators), np.random.default_rng(0), 2)
    found = metrics.network_scores(network.score, is_edge, is_candidate, draws)
    return found.auprc / found.chance


@pytest.mark.parametrize("name", ["spearman", "pearson"])
def test_co_expression_finds_the_planted_network_and_its_signs(planted, name):
    cells, is_edge, sign = planted
    found = baselines.BASELINES[name](cells, SYMBOLS, REGULATORS, TARGETS, seed=0)
    assert ratio(found, is_edge) > 15
    assert (found.sign[is_edge] == sign[is_edge]).mean() > 0.95
    assert np.isnan(found.score[0, 0])
    assert found.sign[0, 0] == 0
    assert not found.is_directed
    assert found.n_cells == N_CELLS


def test_spearman_is_scipys(planted):
    from scipy.stats import spearmanr

    cells, _, _ = planted
    found = baselines.spearman(cells, SYMBOLS, REGULATORS, TARGETS, seed=0)
    one, other = (values[:, 0] for values in baselines.log_values(cells, np.array([1]), np.array([8])))
    expected = spearmanr(one, other).statistic
    assert found.score[1, 8] * found.sign[1, 8] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", baselines.TREES)
def test_regressions_find_the_planted_network(planted, name, monkeypatch):
    monkeypatch.setattr(baselines, "N_TREES", 30)
    cells, is_edge, _ = planted
    found = baselines.BASELINES[name](cells, SYMBOLS, REGULATORS, SOME, seed=0)
    keep = is_edge[:, SOME].any(axis=1)
    assert keep.all()
    assert ratio(found, is_edge[:, SOME]) > 4
    assert found.sign is None
    again = baselines.BASELINES[name](cells, SYMBOLS, REGULATORS, SOME, seed=0)
    np.testing.assert_array_equal(found.score, again.score)


def test_nulls_find_nothing(planted):
    cells, is_edge, _ = planted
    for seed in range(3):
        shuffled = baselines.permuted(cells, seed=seed)
        assert ratio(baselines.spearman(shuffled, SYMBOLS, REGULATORS, TARGETS, seed=0), is_edge) < 2
        assert ratio(baselines.random(cells, SYMBOLS, REGULATORS, TARGETS, seed=seed), is_edge) < 2


def test_permuted_cells_keep_each_genes_counts_within_its_file(planted):
    cells, _, _ = planted
    found = baselines.permuted(cells, seed=1)
    for source in (0, 1):
        rows = cells.source_of_cell == source
        before, after = cells.counts[rows].toarray(), found.counts[rows].toarray()
        np.testing.assert_array_equal(np.sort(before, axis=0), np.sort(after, axis=0))
        assert (before != after).any()
    np.testing.assert_array_equal(found.library_size, np.asarray(found.counts.sum(axis=1)).ravel())
    assert (found.counts != baselines.permuted(cells, seed=1).counts).nnz == 0


def test_the_part_of_genes_alone_is_a_product(planted):
    cells, is_edge, _ = planted
    whole = baselines.spearman(cells, SYMBOLS, REGULATORS, TARGETS, seed=0)
    part = baselines.degree_part(whole)
    other = part.score[:, N_REGULATORS:]
    np.testing.assert_allclose(other / other[0], np.broadcast_to((other / other[0])[:, :1], other.shape), rtol=1e-4)
    expected = np.sqrt(np.nanmean(whole.score[:, 9] ** 2)) * np.sqrt(np.nanmean(whole.score[2] ** 2))
    assert part.score[2, 9] == pytest.approx(expected, rel=1e-4)
    assert np.isnan(part.score[0, 0])
    assert 1.5 < ratio(part, is_edge) < ratio(whole, is_edge) / 2


def test_variability_and_covariance_are_numpys(planted):
    cells, _, _ = planted
    one, other = (values[:, 0] for values in baselines.log_values(cells, np.array([1]), np.array([8])))
    found = baselines.covariance(cells, SYMBOLS, REGULATORS, TARGETS, seed=0)
    expected = np.cov(one, other, bias=True)
    assert found.score[1, 8] * found.sign[1, 8] == pytest.approx(expected[0, 1], rel=1e-3)
    spread = baselines.variability(cells, SYMBOLS, REGULATORS, TARGETS, seed=0)
    assert spread.score[1, 8] == pytest.approx(np.sqrt(expected[0, 0] * expected[1, 1]), rel=1e-3)


def test_expression_knows_only_how_often_genes_are_detected(planted):
    cells, _, _ = planted
    found = baselines.expression(cells, SYMBOLS, REGULATORS, TARGETS, seed=0)
    detected = np.bincount(cells.counts.indices, minlength=N_GENES) / N_CELLS
    assert found.score[0, 9] == pytest.approx(np.log(detected[0] * detected[9]), abs=1e-6)


def test_too_few_cells_or_genes_are_refused(planted):
    cells, _, _ = planted
    with pytest.raises(ConfigError, match="2 cells"):
        baselines.spearman(cells.take(np.arange(2)), SYMBOLS, REGULATORS, TARGETS, seed=0)
    with pytest.raises(ConfigError, match="0"):
        baselines.pearson(cells, SYMBOLS, np.zeros(0, dtype=int), TARGETS, seed=0)


def test_a_gene_without_counts_has_no_correlation(planted):
    cells, _, _ = planted
    counts = cells.counts.tolil()
    counts[:, 8] = 0
    counts = sp.csr_matrix(counts)
    counts.eliminate_zeros()
    empty = CellCounts(counts, cells.library_size, cells.cell_index, cells.source_of_cell, cells.is_measured)
    found = baselines.spearman(empty, SYMBOLS, REGULATORS, TARGETS, seed=0)
    assert np.isnan(found.score[:, 8]).all()
    assert (found.sign[:, 8] == 0).all()
