from __future__ import annotations

import numpy as np
import pytest

import twins
from scdiva.baselines import CorpusPCA, pca_of_hvg, random_projection
from scdiva.data.reader import open_counts
from scdiva.genes import GeneVocabulary
from scdiva.metrics import knn_scores


@pytest.fixture
def cells(adata):
    return open_counts(adata, GeneVocabulary.default().subset(np.arange(200))).read(np.arange(120))


@pytest.mark.parametrize("scale", [False, True])
def test_pca_of_variable_genes_is_deterministic_and_finds_the_types(scale, adata):
    before = adata.copy()
    first, again = (pca_of_hvg(adata, seed=0, scale=scale) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (120, 50)
    assert knn_scores(first[:, :5], adata.obs["cell_type"], seed=0).accuracy > 0.9
    np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
    assert not adata.obsm


def test_pca_of_fewer_cells_than_components(adata):
    assert pca_of_hvg(adata[:20].copy(), seed=0).shape == (20, 19)


def test_corpus_pca_is_the_pca_of_log_values(cells):
    values = np.log1p(twins.cp10k(cells.counts.toarray(), cells.library_size))
    centred = values - values.mean(axis=0)
    _, _, loadings = np.linalg.svd(centred, full_matrices=False)
    expected = centred @ loadings[:50].T
    found = CorpusPCA.fit(cells, seed=0).transform(cells)
    assert found.shape == (120, 50)
    np.testing.assert_allclose(np.abs(found[:, :3]), np.abs(expected[:, :3]), atol=1e-2)
    # signs aside, distances between cells are what neighbours see
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-3)


def test_corpus_pca_of_a_cell_does_not_depend_on_the_other_cells(cells):
    pca = CorpusPCA.fit(cells.take(np.arange(80)), seed=0)
    whole = pca.transform(cells)
    np.testing.assert_allclose(pca.transform(cells.take(np.array([100, 7]))), whole[[100, 7]], rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(CorpusPCA.fit(cells.take(np.arange(80)), seed=0).components_GK, pca.components_GK)


def test_random_projection_is_seeded_and_keeps_distances_roughly(cells):
    first, again, other = (random_projection(cells, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    values = np.log1p(twins.cp10k(cells.counts.toarray(), cells.library_size))
    ratio = np.linalg.norm(first, axis=1) / np.linalg.norm(values, axis=1)
    assert ratio.mean() == pytest.approx(1.0, abs=0.25)
