from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.baselines import integration as baselines
from scdiva.baselines.embedding import pca_of_hvg
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, UnsupportedError
from scdiva.metrics import knn_scores

PACKAGE = {"harmony": "harmonypy", "scvi": "scvi", "scanvi": "scvi"}
HERE = sorted(name for name in baselines.BASELINES if name not in PACKAGE or find_spec(PACKAGE[name]))
QUICK = {"scvi": {"max_epochs": 3}, "scanvi": {"max_epochs": 3}}


@pytest.fixture(scope="module")
def cells():
    return synthetic_cells(300, 120, n_types=3, n_batches=2, mean_depth=400.0, seed=5)


@pytest.fixture(scope="module")
def given(cells):
    columns = (cells.obs[key].astype(str).to_numpy() for key in ("batch", "cell_type"))
    return sp.csr_matrix(cells.X), *columns


@pytest.mark.parametrize("name", HERE)
def test_embeddings_are_finite_seeded_and_leave_the_counts_alone(name, given):
    counts, batches, labels = given
    before = counts.copy()
    run = baselines.BASELINES[name]
    first, again = (run(counts, batches, labels, seed=0, **QUICK.get(name, {})) for _ in range(2))
    assert first.dtype == np.float32
    assert first.shape == (300, 10 if name in ("scvi", "scanvi") else 50)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    assert (counts != before).nnz == 0


def test_pca_is_that_of_the_sets_variable_genes(cells, given):
    found = baselines.pca(*given, seed=0)
    expected = pca_of_hvg(cells, seed=0)
    np.testing.assert_allclose(
        np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-3
    )  # all genes are variable here, and signs are free
    assert knn_scores(found[:, :5], given[2], seed=0).accuracy > 0.9


def test_noise_says_nothing_of_types_and_changes_with_the_seed(given):
    counts, batches, labels = given
    noise, other = (baselines.random(counts, batches, seed=s) for s in (0, 1))
    assert knn_scores(noise, labels, seed=0).accuracy < 0.6
    assert (noise != other).any()
    assert noise.mean() == pytest.approx(0, abs=0.03)
    assert noise.std() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("name", HERE)
def test_one_batch_and_wrong_lengths_are_refused(name, given):
    counts, batches, labels = given
    with pytest.raises(ConfigError, match="one batch"):
        baselines.BASELINES[name](counts, np.full(300, "run 1"), labels, seed=0)
    with pytest.raises(ConfigError, match="299 batches"):
        baselines.BASELINES[name](counts, batches[1:], labels, seed=0)
    with pytest.raises(ConfigError, match="299 labels"):
        baselines.BASELINES[name](counts, batches, labels[1:], seed=0)


@pytest.mark.parametrize("name", sorted(PACKAGE))
def test_without_its_package_the_extra_is_named(name, given, monkeypatch):
    monkeypatch.setattr("scdiva.baselines.common.find_spec", lambda module: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'scdiva\[eval\]'"):
        baselines.BASELINES[name](*given, seed=0)


def test_missing_labels_are_the_unlabelled_ones():
    batches = ["a", "b", "a", "b"]
    counts = sp.csr_matrix(np.ones((4, 3), dtype=np.int32))
    _, label = baselines._checked(counts, batches, ["T cell", "unassigned", "nan", ""])
    assert label.tolist() == ["T cell", "Unknown", "Unknown", "Unknown"]


def test_tables_agree():
    assert list(baselines.TITLES) == list(baselines.BASELINES)
    assert set(baselines.BASELINES) >= baselines.NEEDS_LABELS


@pytest.mark.skipif(find_spec("harmonypy") is None, reason="needs harmonypy")
def test_harmony_mixes_what_a_batch_shifts(given):
    counts, _, labels = given
    shifted = counts.toarray()
    batch = np.where(np.arange(300) % 2 == 0, "a", "b")
    shifted[np.ix_(batch == "b", np.arange(0, 120, 2))] *= 8
    shifted = sp.csr_matrix(shifted)
    before, after = (
        knn_scores(run(shifted, batch, seed=0), batch, seed=0).accuracy for run in (baselines.pca, baselines.harmony)
    )
    assert before > 0.9
    assert after < before - 0.1
    assert knn_scores(baselines.harmony(shifted, batch, seed=0), labels, seed=0).accuracy > 0.9


@pytest.mark.skipif(find_spec("scvi") is None, reason="needs scvi-tools")
def test_scanvi_needs_labels(given):
    counts, batches, _ = given
    for labels in (None, np.full(300, "unassigned")):
        with pytest.raises(ConfigError, match="without labels"):
            baselines.scanvi(counts, batches, labels, seed=0)
