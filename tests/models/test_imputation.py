"""What a native model expects of chosen genes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scdiva.data.reader import open_counts
from scdiva.errors import UnsupportedError, UntrainedHeadError
from scdiva.models.base import Imputer
from scdiva.models.scdiva.imputation import N_FOLDS, PRIOR_STRENGTH, fold_of_genes

CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def cells(adata, tiny_model):
    return open_counts(adata, tiny_model.vocabulary).read(np.arange(120))


def with_counts(cells, dense: np.ndarray):
    """Other counts; molecules outside the vocabulary stay."""
    outside = cells.library_size - np.asarray(cells.counts.sum(axis=1)).ravel()
    counts = sp.csr_matrix(dense.astype(np.int32))
    return replace(cells, counts=counts, library_size=dense.sum(axis=1) + outside)


def test_a_model_is_an_imputer(tiny_model, tiny_trunk_model):
    assert isinstance(tiny_model, Imputer)
    assert isinstance(tiny_trunk_model, Imputer)


class TestHidden:
    def test_a_hidden_count_changes_nothing_bit_for_bit(self, cells, tiny_model):
        genes = np.array([3, 50, 51, 120])
        before = tiny_model.impute(cells, genes, own_counts="hidden")
        for gene in genes:
            dense = cells.counts.toarray()
            dense[:, gene] = np.random.default_rng(gene).integers(0, 30, 120)
            after = tiny_model.impute(with_counts(cells, dense), np.array([gene]), own_counts="hidden")
            at = np.flatnonzero(genes == gene)
            np.testing.assert_array_equal(after.scale, before.scale[:, at])
            np.testing.assert_array_equal(after.expected, before.expected[:, at])

    def test_other_counts_do_change_it(self, cells, tiny_model):
        fold = fold_of_genes(tiny_model.vocabulary)
        other = np.flatnonzero(fold != fold[50])[:20]
        dense = cells.counts.toarray()
        dense[:, other] *= 3
        before, after = (
            tiny_model.impute(c, np.array([50]), own_counts="hidden") for c in (cells, with_counts(cells, dense))
        )
        assert np.abs(after.expected / before.expected - 1).min() > 1e-4

    def test_what_else_is_asked_for_changes_nothing(self, cells, tiny_model):
        every = tiny_model.impute(cells, np.arange(210), own_counts="hidden")
        one = tiny_model.impute(cells, np.array([17]), own_counts="hidden")
        np.testing.assert_allclose(one.expected, every.expected[:, [17]], **CLOSE)

    def test_folds_come_from_ids_alone(self, tiny_model):
        fold = fold_of_genes(tiny_model.vocabulary)
        assert set(fold) == set(range(N_FOLDS))
        kept = np.arange(210) % 3 == 0
        np.testing.assert_array_equal(fold_of_genes(tiny_model.vocabulary.subset(kept)), fold[kept])

    def test_the_expectations_add_up_to_about_the_depth(self, cells, tiny_model):
        measured = np.flatnonzero(cells.is_measured[0])
        total = tiny_model.impute(cells, measured, own_counts="hidden").expected.sum()
        assert total == pytest.approx(cells.counts.sum(), rel=0.1)

    def test_hidden_values_are_filled_in_before_z_is_read(self, cells, tiny_model, monkeypatch):
        # with no rate of the hidden genes, z is that of the visible genes alone
        fold = fold_of_genes(tiny_model.vocabulary)
        dense = cells.counts.toarray()
        dense[:, fold == fold[50]] = 0
        found = tiny_model.impute(cells, np.array([50]), own_counts="hidden").expected[:, 0]
        z = tiny_model.embed(with_counts(cells, dense))
        profile = tiny_model.expected_profile(z, np.arange(210))
        visible = cells.is_measured[0] & (fold != fold[50])
        unfilled = dense.sum(axis=1) * profile[:, 50] / profile[:, visible].sum(axis=1)
        assert np.corrcoef(found, unfilled)[0, 1] > 0.8
        assert np.abs(found / unfilled - 1).max() > 1e-3


class TestUsed:
    def test_equals_the_formula(self, cells, tiny_model):
        genes = np.flatnonzero(cells.is_measured[0])[[0, 40, 90]]
        unmeasured = np.flatnonzero(~cells.is_measured[0])[:2]
        assert unmeasured.size == 2
        found = tiny_model.impute(cells, np.concatenate([genes, unmeasured]))
        profile = tiny_model.expected_profile(tiny_model.embed(cells), np.arange(210)).astype(float)
        depth = np.asarray(cells.counts.sum(axis=1)).ravel()
        mean = profile / profile[:, cells.is_measured[0]].sum(axis=1, keepdims=True) * depth[:, None]
        own = cells.counts[:, genes].toarray()
        theta = PRIOR_STRENGTH * np.exp(tiny_model.network.log_theta.detach().numpy()[genes].astype(float))
        expected = mean[:, genes] * (theta + own) / (theta + mean[:, genes])
        np.testing.assert_allclose(found.expected[:, :3], expected, **CLOSE)
        np.testing.assert_allclose(found.expected[:, 3:], mean[:, unmeasured], **CLOSE)
        np.testing.assert_allclose(found.scale, np.repeat(1e4 / cells.library_size[:, None], 5, axis=1), rtol=1e-6)

    def test_lies_between_what_the_rest_says_and_the_own_count(self, cells, tiny_model):
        gene = np.flatnonzero(cells.is_measured[0])[[40]]
        dense = cells.counts.toarray()
        few, many = dense.copy(), dense.copy()
        few[:, gene], many[:, gene] = 0, 40
        low, high = (tiny_model.impute(with_counts(cells, d), gene).expected for d in (few, many))
        assert (low > 0).all()
        assert (low < high).all()
        assert (high < 40).all()


class TestSamples:
    def test_their_mean_is_the_expectation(self, cells, tiny_model):
        genes = np.array([3, 50, 120, 5])
        for own_counts in ("used", "hidden"):
            found = tiny_model.impute(cells, genes, own_counts=own_counts, n_samples=60)
            assert found.draws.shape == found.resampled.shape == (60, 120, 4)
            np.testing.assert_allclose(found.resampled.mean(axis=(0, 1)), found.expected.mean(axis=0), rtol=0.05)
            np.testing.assert_allclose(found.draws.mean(axis=(0, 1)), found.expected.mean(axis=0), rtol=0.08, atol=0.01)
            assert (found.draws == np.rint(found.draws)).all()
            # draws have the noise of counts, expectations of half-samples do not
            assert found.draws.var(axis=0).mean() > 2 * found.resampled.var(axis=0).mean() > 0

    def test_an_expectation_has_none(self, cells, tiny_model):
        found = tiny_model.impute(cells, np.array([3]))
        assert found.draws.shape == found.resampled.shape == (0, 120, 1)

    def test_seed(self, cells, tiny_model):
        first, again, other = (tiny_model.impute(cells, np.array([3, 9]), n_samples=5, seed=s) for s in (1, 1, 2))
        np.testing.assert_array_equal(first.draws, again.draws)
        np.testing.assert_array_equal(first.resampled, again.resampled)
        assert (first.resampled != other.resampled).mean() > 0.9
        np.testing.assert_array_equal(first.expected, other.expected)

    def test_of_a_cell_do_not_depend_on_the_others(self, cells, tiny_model):
        rows = np.array([77, 3, 50])
        every, some = (tiny_model.impute(c, np.array([3, 9]), n_samples=5) for c in (cells, cells.take(rows)))
        np.testing.assert_allclose(some.resampled, every.resampled[:, rows], **CLOSE)
        assert (some.draws == every.draws[:, rows]).mean() > 0.99

    def test_the_spread_is_that_of_repeated_measurements(self, cells, tiny_model):
        # the same cells sequenced again: variance of expectations from half-samples, against that over repetitions
        rng = np.random.default_rng(0)
        rate = cells.counts.toarray()[:20] * 3.0
        genes = np.array([3, 50, 120])
        few = cells.take(np.arange(20))
        again = [
            tiny_model.impute(with_counts(few, rng.poisson(rate)), genes, own_counts="hidden").expected
            for _ in range(30)
        ]
        found = tiny_model.impute(with_counts(few, rng.poisson(rate)), genes, own_counts="hidden", n_samples=60)
        ratio = np.log(found.resampled).std(axis=0).mean() / np.log(np.stack(again)).std(axis=0).mean()
        assert 0.4 < ratio < 2.5


class TestOddCells:
    def test_an_empty_cell_gets_what_the_model_expects_of_nothing(self, cells, tiny_model):
        dense = cells.counts.toarray()
        dense[:2] = 0
        empty = replace(cells, counts=sp.csr_matrix(dense), library_size=dense.sum(axis=1).astype(float))
        for own_counts in ("used", "hidden"):
            found = tiny_model.impute(empty, np.array([3, 50]), own_counts=own_counts, n_samples=3)
            for array in (found.expected, found.scale, found.resampled, found.draws):
                assert np.isfinite(array).all()
            assert (found.expected > 0).all()
            np.testing.assert_array_equal(found.expected[0], found.expected[1])

    def test_cells_of_files_that_measure_different_genes(self, cells, tiny_model):
        measured = cells.is_measured[0].copy()
        measured[50] = False
        dense = cells.counts.toarray()
        dense[60:, 50] = 0
        source = np.repeat([0, 1], 60).astype(np.int32)
        both = replace(
            with_counts(cells, dense), is_measured=np.stack([cells.is_measured[0], measured]), source_of_cell=source
        )
        for own_counts in ("used", "hidden"):
            found = tiny_model.impute(both, np.array([50, 51]), own_counts=own_counts)
            for part, row in ((slice(0, 60), 0), (slice(60, 120), 1)):
                alone = replace(
                    both.take(np.arange(120)[part]),
                    is_measured=both.is_measured[[row]],
                    source_of_cell=np.zeros(60, int),
                )
                expected = tiny_model.impute(alone, np.array([50, 51]), own_counts=own_counts)
                np.testing.assert_allclose(found.expected[part], expected.expected, **CLOSE)


def test_an_untrained_decoder_raises(cells, tiny_model, monkeypatch):
    monkeypatch.setitem(tiny_model.details, "trained_heads", ["anchor"])
    with pytest.raises(UntrainedHeadError, match="profile_decoder of tiny was never trained"):
        tiny_model.impute(cells, np.array([3]))


def test_a_published_model_says_that_it_does_not(cells, tiny_model):
    from scdiva.config import OfficialConfig
    from scdiva.models.scdiva import ScDiVa
    from scdiva.models.scdiva.model import build_network

    config = OfficialConfig(architecture="official", n_layers=1, width=16, n_heads=2, n_hidden=24)
    model = ScDiVa(build_network(210, config), config, tiny_model.vocabulary, tiny_model.statistics)
    with pytest.raises(UnsupportedError, match="imputation"):
        model.impute(cells, np.array([3]))


def test_weights_stay_as_they_are(cells, tiny_model):
    before = {name: tensor.clone() for name, tensor in tiny_model.network.state_dict().items()}
    tiny_model.impute(cells, np.array([3]), own_counts="hidden", n_samples=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in tiny_model.network.state_dict().items())
