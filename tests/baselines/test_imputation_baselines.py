from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.baselines.imputation import genes_permuted, knn_smoothing, population_mean
from scdiva.metrics.imputation import gene_correlations, poisson_deviance


@pytest.fixture
def two_kinds() -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Counts, a second measurement of the same cells, and their rates: two kinds of cells."""
    rng = np.random.default_rng(0)
    rate = rng.lognormal(0, 1, (2, 60))[np.arange(200) % 2] * rng.uniform(0.5, 2, (200, 1))
    return sp.csr_matrix(rng.poisson(rate).astype(np.int32)), rng.poisson(rate), rate


def test_population_mean_is_depth_times_share(two_kinds):
    counts, _, _ = two_kinds
    expected = population_mean(counts, np.array([4, 9]))
    depth = counts.toarray().sum(axis=1)
    assert expected.shape == (200, 2)
    np.testing.assert_allclose(expected[:, 0] / depth, (counts.toarray()[:, 4].sum() + 0.5) / counts.sum())


def test_neighbours_beat_the_mean_and_depth_is_right(two_kinds):
    counts, again, _ = two_kinds
    genes = np.arange(60)
    mean, near = population_mean(counts, genes), knn_smoothing(counts, genes, seed=0)
    assert poisson_deviance(again, near).mean() < 0.8 * poisson_deviance(again, mean).mean()
    np.testing.assert_allclose(near.sum(axis=1), counts.toarray().sum(axis=1), rtol=0.05)
    assert (near > 0).all()
    np.testing.assert_array_equal(knn_smoothing(counts, genes[::-1], seed=0), near[:, ::-1])


def test_permuted_genes_keep_means_and_lose_who_varies_where(two_kinds):
    counts, again, rate = two_kinds
    depth = counts.toarray().sum(axis=1).astype(float)
    permuted = genes_permuted(rate, depth, seed=0)
    np.testing.assert_allclose(
        (permuted / depth[:, None]).mean(axis=0), (rate / depth[:, None]).mean(axis=0), rtol=1e-9
    )
    assert gene_correlations(again / depth[:, None], permuted / depth[:, None]).mean() < 0.5 * (
        gene_correlations(again / depth[:, None], rate / depth[:, None]).mean()
    )
    assert poisson_deviance(again, permuted).mean() > poisson_deviance(again, rate).mean()
    assert (permuted != rate).all()


def test_scvi_expects_what_it_was_trained_on(two_kinds):
    pytest.importorskip("scvi")
    from scdiva.baselines.imputation import scvi_expected

    counts, _, _ = two_kinds
    expected = scvi_expected(counts, np.arange(30), seed=0, max_epochs=2)
    np.testing.assert_allclose(expected.sum(axis=1), counts[:, :30].toarray().sum(axis=1), rtol=1e-4)
