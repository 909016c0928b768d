from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.metrics.imputation import (
    coverage,
    gene_correlations,
    hidden_scores,
    hide_entries,
    poisson_deviance,
)


@pytest.fixture
def counts() -> sp.csr_matrix:
    return sp.csr_matrix(np.random.default_rng(0).poisson(0.7, (80, 30)).astype(np.int32))


class TestHideEntries:
    def test_hides_what_it_says_and_nothing_else(self, counts):
        genes = np.arange(5, 25)
        masked, entries = hide_entries(counts, genes, share=0.5, rng=np.random.default_rng(1))
        m = entries.n_hidden
        difference = (counts - masked).toarray()
        hidden = np.zeros(counts.shape, dtype=bool)
        hidden[entries.cell[:m], entries.gene[:m]] = True
        np.testing.assert_array_equal(difference, np.where(hidden, counts.toarray(), 0))
        assert (counts.toarray()[hidden] > 0).all()
        assert hidden.sum() == m
        assert m / counts[:, genes].nnz == pytest.approx(0.5, abs=0.05)
        assert not difference[:, :5].any()
        assert not difference[:, 25:].any()
        assert masked.nnz == counts.nnz - m

    def test_partners_are_true_zeros_of_the_same_cell_and_of_the_same_gene(self, counts):
        genes = np.arange(5, 25)
        _, entries = hide_entries(counts, genes, share=0.5, rng=np.random.default_rng(1))
        m = entries.n_hidden
        assert entries.cell.size == entries.gene.size == 3 * m
        assert (counts.toarray()[entries.cell[m:], entries.gene[m:]] == 0).all()
        np.testing.assert_array_equal(entries.cell[m : 2 * m], entries.cell[:m])
        np.testing.assert_array_equal(entries.gene[2 * m :], entries.gene[:m])
        assert set(entries.gene) <= set(genes)

    def test_cells_and_genes_without_zeros_are_left_alone(self):
        dense = np.ones((4, 4), dtype=np.int32)
        dense[:2, 2:] = 0
        masked, entries = hide_entries(sp.csr_matrix(dense), np.arange(4), share=1.0, rng=np.random.default_rng(0))
        assert entries.n_hidden == 0
        np.testing.assert_array_equal(masked.toarray(), dense)


def test_hidden_scores_of_the_truth_and_of_a_constant():
    truth = np.concatenate([np.array([1.0, 2.0, 3.0]), np.zeros(6)])
    best = hidden_scores(truth, truth, truth, 3)
    assert (best.auroc_cell, best.auroc_gene, best.mae) == (1.0, 1.0, 0.0)
    assert best.pearson == pytest.approx(1.0)
    assert best.spearman == pytest.approx(1.0)
    blind = hidden_scores(truth, np.ones(9), np.array([1.0, 1.1, 0.9, *np.ones(6)]), 3)
    assert blind.auroc_cell == blind.auroc_gene == 0.5
    assert blind.pearson < 0
    assert blind.mae == pytest.approx((0 + 0.9 + 2.1 + 3) / 6)


def test_deviance_by_hand_and_least_at_the_truth():
    x, mu = np.array([[0.0, 2.0]]), np.array([[0.5, 1.0]])
    assert poisson_deviance(x, mu)[0] == pytest.approx(2 * (0.5 + 2 * np.log(2) - 1) / 2)
    assert poisson_deviance(x, np.array([[1e-9, 2.0]]))[0] == pytest.approx(0, abs=1e-8)
    assert np.isinf(poisson_deviance(x, np.array([[0.5, 0.0]]))[0])
    rng = np.random.default_rng(0)
    rate = rng.gamma(1.0, 1.0, (200, 20))
    counts = rng.poisson(rate)
    true, flat, noisy = (
        poisson_deviance(counts, m).mean() for m in (rate, np.ones_like(rate), rng.poisson(rate) + 0.1)
    )
    assert true < flat
    assert true < noisy


def test_gene_correlations():
    x = np.random.default_rng(0).normal(size=(50, 3))
    found = gene_correlations(x, np.stack([2 * x[:, 0] + 1, -x[:, 1], np.ones(50)], axis=1))
    np.testing.assert_allclose(found, [1, -1, 0], atol=1e-12)


def test_coverage_counts_the_ends():
    assert coverage([[0, 1], [2, 5]], [[0, 2], [1, 1]], [[0, 3], [2, 4]]) == 0.5
