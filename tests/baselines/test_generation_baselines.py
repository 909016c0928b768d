from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.baselines import generation as baselines
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError

OF_COUNTS = {
    "multinomial": baselines.multinomial_per_type,
    "negative_binomial": baselines.negative_binomial_per_type,
    "independent_genes": baselines.independent_genes_per_type,
}
ALL = {**OF_COUNTS, "pca_gaussian": baselines.pca_gaussian_per_type, "shuffled": baselines.shuffled}
WANTED = {"type 2": 150, "type 0": 40}


@pytest.fixture(scope="module")
def train() -> tuple[sp.csr_matrix, np.ndarray]:
    cells = synthetic_cells(400, 120, n_types=3, n_batches=1, mean_depth=500.0, seed=3)
    return sp.csr_matrix(cells.X), cells.obs["cell_type"].astype(str).to_numpy()


@pytest.mark.parametrize("name", sorted(ALL))
def test_generators_keep_their_word(name, train):
    counts, labels = ALL[name](*train, WANTED, seed=0)
    assert counts.shape == (190, 120)
    assert labels.tolist() == ["type 2"] * 150 + ["type 0"] * 40
    assert counts.has_sorted_indices
    assert (counts.data > 0).all()
    if name != "pca_gaussian":
        assert counts.dtype == np.int32
    again, _ = ALL[name](*train, WANTED, seed=0)
    other, _ = ALL[name](*train, WANTED, seed=1)
    assert (counts != again).nnz == 0
    assert (counts != other).nnz > 0


@pytest.mark.parametrize("name", sorted(OF_COUNTS))
def test_means_are_those_of_the_type(name, train):
    counts, labels = OF_COUNTS[name](*train, WANTED, seed=0)
    for kind in WANTED:
        real = train[0][train[1] == kind].toarray()
        made = counts[labels == kind].toarray()
        error = made.mean(axis=0) - real.mean(axis=0)
        spread = np.sqrt(real.var(axis=0) / len(made) + real.var(axis=0) / len(real)) + 0.02
        assert np.abs(error / spread).max() < 5
        assert made.sum(axis=1).mean() == pytest.approx(real.sum(axis=1).mean(), rel=0.12)


def test_library_sizes_are_drawn_from_the_type(train):
    counts, labels = baselines.multinomial_per_type(*train, {"type 1": 60}, seed=0)
    known = np.asarray(train[0][train[1] == "type 1"].sum(axis=1)).ravel()
    assert np.isin(np.asarray(counts.sum(axis=1)).ravel(), known).all()
    assert set(labels) == {"type 1"}


def test_dispersion_is_found_by_moments():
    rng = np.random.default_rng(0)
    size = rng.integers(500, 2000, 3000)
    share = np.array([0.02, 0.98])
    spread = rng.gamma(2.0, 0.5, (3000, 1))  # 1/theta = 0.5, for gene 0 only
    x = np.column_stack([rng.poisson(size[:, None] * 0.02 * spread).ravel(), rng.poisson(size * 0.98)])
    genes, found, dispersion = baselines._moments(sp.csr_matrix(x))
    assert genes.tolist() == [0, 1]
    np.testing.assert_allclose(found, share, atol=0.002)
    assert dispersion[0] == pytest.approx(0.5, abs=0.12)
    assert dispersion[1] < 0.05


def test_the_negative_binomial_is_as_overdispersed_as_its_type(train):
    counts, _ = baselines.negative_binomial_per_type(*train, {"type 0": 2000}, seed=0)
    poisson, _ = baselines.multinomial_per_type(*train, {"type 0": 2000}, seed=0)
    assert counts.toarray().var(axis=0).sum() > poisson.toarray().var(axis=0).sum()


def test_independent_genes_keep_each_gene_and_lose_the_cell(train):
    n = int((train[1] == "type 0").sum())
    counts, _ = baselines.independent_genes_per_type(*train, {"type 0": n}, seed=0)
    real = train[0][train[1] == "type 0"].toarray()
    np.testing.assert_array_equal(np.sort(counts.toarray(), axis=0), np.sort(real, axis=0))
    assert counts.toarray().sum(axis=1).std() < 0.7 * real.sum(axis=1).std()  # depth ties genes together
    twice, _ = baselines.independent_genes_per_type(*train, {"type 0": n + 5}, seed=0)
    assert twice.shape[0] == n + 5


def test_the_null_knows_no_types(train):
    counts, labels = baselines.shuffled(*train, {"type 0": 130, "type 1": 130}, seed=0)
    means = [counts[labels == kind].toarray().mean(axis=0) for kind in ("type 0", "type 1")]
    truth = [train[0][train[1] == kind].toarray().mean(axis=0) for kind in ("type 0", "type 1")]
    assert np.abs(means[0] - means[1]).max() < 0.3 * np.abs(truth[0] - truth[1]).max()


def test_pca_gaussian_emits_positive_continuous_values(train):
    counts, labels = baselines.pca_gaussian_per_type(*train, WANTED, seed=0)
    assert counts.dtype == np.float32
    assert (counts.data != np.rint(counts.data)).mean() > 0.9
    cp10k = train[0].multiply(1e4 / train[0].sum(axis=1)).toarray()
    real = np.log1p(cp10k)[train[1] == "type 2"].mean(axis=0)
    made = np.log1p(counts[labels == "type 2"].toarray()).mean(axis=0)
    assert np.corrcoef(real, made)[0, 1] > 0.98


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_type_nobody_has_is_refused(name, train):
    with pytest.raises(ConfigError, match="type 9"):
        ALL[name](*train, {"type 9": 3}, seed=0)


@pytest.mark.parametrize("name", sorted(ALL))
def test_a_type_of_one_cell_and_no_cells_at_all(name, train):
    labels = train[1].copy()
    labels[0] = "lonely"
    counts, made = ALL[name](train[0], labels, {"lonely": 3, "type 1": 0}, seed=0)
    assert counts.shape == (3, 120)
    assert made.tolist() == ["lonely"] * 3


def test_scvi_draws_counts_of_real_cells(train):
    pytest.importorskip("scvi")
    counts, labels = baselines.scvi_posterior(*train, WANTED, 0, max_epochs=2)
    assert counts.shape == (190, 120)
    assert counts.dtype == np.int32
    assert labels.tolist() == ["type 2"] * 150 + ["type 0"] * 40
    assert counts.sum(axis=1).mean() == pytest.approx(train[0].sum(axis=1).mean(), rel=0.3)
