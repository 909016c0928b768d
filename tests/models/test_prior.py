"""The mixture prior against known Gaussians; populations in bundles."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from generating import generating
from scdiva.errors import BundleError
from scdiva.models import bundle as bundles
from scdiva.models.prior import N_SIZES, MixturePrior, Population
from scdiva.models.scdiva import ScDiVa
from scdiva.types import LatentPrior

Z = 5
MEAN = np.array([[0.0, 1, 2, 0, -1], [4.0, 0, 0, 0, 0], [0.0, -4, 0, 3, 0]])


def cells(n_per_type: int = 140, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z, sizes and types of cells; within a type z is Gaussian, and its first dimension follows the depth."""
    rng = np.random.default_rng(seed)
    kind = np.repeat([0, 1, 2], n_per_type)
    log_depth = rng.normal(7.0, 0.4, kind.size)
    depth = np.exp(log_depth).astype(int)
    n_genes = np.exp(0.6 * log_depth + rng.normal(2.0, 0.1, kind.size)).astype(int)
    z = MEAN[kind] + rng.normal(0, [0.5, 0.2, 1.0, 0.1, 0.3], (kind.size, Z))
    z[:, 0] += 1.5 * (np.log1p(depth) - 7.0)
    z[:, 1] += 0.8 * (z[:, 2] - MEAN[kind, 2])
    return z.astype(np.float32), np.stack([depth, n_genes], axis=1), (kind + 1)[:, None].astype(np.int32)


@pytest.fixture(scope="module")
def prior() -> MixturePrior:
    return MixturePrior.fit(*cells(), seed=0, view_share=0.5)


def wanted(code: int, n: int) -> np.ndarray:
    return np.full((n, 1), code, dtype=np.int32)


class TestGaussians:
    @pytest.mark.parametrize("kind", [0, 1, 2])
    def test_mean_and_covariance_of_a_condition(self, kind, prior):
        real, sizes, _ = cells(2000, seed=1)
        of_kind = slice(2000 * kind, 2000 * (kind + 1))
        found = prior.sample(wanted(kind + 1, 2000), sizes[of_kind], np.random.default_rng(2))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found.mean(axis=0), real[of_kind].mean(axis=0), atol=0.25)
        np.testing.assert_allclose(np.cov(found.T), np.cov(real[of_kind].T), atol=0.25)
        assert np.corrcoef(found[:, 1], found[:, 2])[0, 1] > 0.8

    def test_z_goes_with_the_size(self, prior):
        small, large = (
            prior.sample(wanted(1, 400), np.tile([depth, 500], (400, 1)), np.random.default_rng(0))
            for depth in (700, 1700)
        )
        shift = (large - small).mean(axis=0)  # the same noise
        assert 0.5 < shift[0] < 2.0  # 1.5 per unit of log depth, of which 0.89
        assert np.abs(shift[3]) < 0.1

    def test_sizes_far_outside_say_no_more_than_the_farthest_that_were(self, prior):
        z = prior.sample(wanted(1, 200), np.tile([10**7, 20], (200, 1)), np.random.default_rng(0))
        assert np.isfinite(z).all()
        assert np.abs(z[:, 0].mean() - MEAN[0, 0]) < 8

    def test_every_component_without_a_condition(self, prior):
        _, sizes, _ = cells(300, seed=3)
        z = prior.sample(wanted(0, 900), sizes, np.random.default_rng(0))
        nearest = np.argmin(((z[:, None, [0, 1, 3]] - MEAN[None, :, [0, 1, 3]]) ** 2).sum(axis=2), axis=1)
        assert np.bincount(nearest, minlength=3).min() > 200

    def test_the_noise_is_not_that_of_float16(self, prior):
        assert prior.factor.dtype == np.float16
        covariance = np.stack([f @ f.T for f in prior.factor.astype(float)])
        assert (np.linalg.eigvalsh(covariance) > 0).all()

    def test_seeded(self, prior):
        _, sizes, _ = cells(10)
        one, same, other = (prior.sample(wanted(2, 30), sizes, np.random.default_rng(s)) for s in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert not np.isclose(one, other).any()


class TestComponents:
    def test_clusters_within_a_condition(self):
        # one label of two kinds of cells: two components, and nothing between them
        rng = np.random.default_rng(0)
        z = rng.normal(0, 0.1, (600, Z)).astype(np.float32)
        z[::2, 0] += 10
        sizes = np.tile([1000, 300], (600, 1)) + rng.integers(0, 50, (600, 2))
        prior = MixturePrior.fit(z, sizes, wanted(1, 600), 0)
        assert prior.n_cells.sum() == 600
        found = prior.sample(wanted(1, 500), sizes[:500], rng)[:, 0]
        assert ((np.abs(found) < 1.5) | (np.abs(found - 10) < 1.5)).all()
        assert 0.35 < (found > 5).mean() < 0.65

    def test_cells_of_one_and_of_few_cells_have_a_covariance(self):
        z, sizes, condition = cells(60)
        condition[0], condition[60:63] = 7, 8
        prior = MixturePrior.fit(z, sizes, condition, 0)
        assert sorted(prior.condition[:, 0]) == [1, 2, 3, 7, 8]
        one = prior.sample(wanted(7, 300), np.repeat(sizes[:1], 300, axis=0), np.random.default_rng(0))
        np.testing.assert_allclose(one.mean(axis=0), z[0], atol=1.0)
        assert (one.std(axis=0) > 0).all()

    def test_the_most_frequent_combinations_only(self, monkeypatch):
        monkeypatch.setattr("scdiva.models.prior.MAX_CONDITIONS", 2)
        z, sizes, condition = cells(60)
        keep = np.r_[0:60, 60:100, 120:130]
        prior = MixturePrior.fit(z[keep], sizes[keep], condition[keep], 0)
        assert prior.condition[:, 0].tolist() == [1, 2]

    def test_an_unseen_combination_is_drawn_from_those_that_share_most(self):
        z, sizes, kind = cells(60)
        condition = np.concatenate([kind, np.where(kind == 3, 2, 1)], axis=1).astype(np.int32)
        prior = MixturePrior.fit(z, sizes, condition, 0)
        # nobody is (1, 2): cells of the first or of the second label, and nobody else
        found = prior.sample(np.tile([1, 2], (400, 1)), np.tile([1096, 490], (400, 1)), np.random.default_rng(0))
        assert (found[:, 0] < 2.2).all()  # the second type lies at 4
        assert 0.3 < (found[:, 3] > 1.5).mean() < 0.7  # the third at 3 in another direction

    def test_no_fields_at_all(self):
        z, sizes, _ = cells(60)
        nothing = np.zeros((180, 0), dtype=np.int32)
        prior = MixturePrior.fit(z, sizes, nothing, 0)
        assert prior.condition.shape == (1, 0)
        assert prior.sample(nothing, sizes, np.random.default_rng(0)).shape == (180, Z)

    def test_it_is_a_latent_prior(self, prior):
        assert isinstance(prior, LatentPrior)
        assert prior.view_share == 0.5
        assert prior.n_latent == Z


@pytest.fixture(scope="module")
def able(tiny_trunk_model, _cells) -> ScDiVa:
    return generating(tiny_trunk_model, _cells)


@pytest.fixture
def saved(able, tmp_path):
    able.save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def change(path, **arrays) -> None:
    """Write other arrays (None: leave it out), and make the manifest agree."""
    file = path / bundles.POPULATION
    with np.load(file) as archive:
        full = {**{name: archive[name] for name in archive.files}, **arrays}
    np.savez(file, **{name: array for name, array in full.items() if array is not None})
    agree(path)


def agree(path) -> None:
    hashes = json.loads((path / bundles.MANIFEST).read_text())
    hashes[bundles.POPULATION] = hashlib.sha256((path / bundles.POPULATION).read_bytes()).hexdigest()
    (path / bundles.MANIFEST).write_text(json.dumps(hashes))


def load(path) -> ScDiVa:
    return ScDiVa.from_pretrained(path, device="cpu")


class TestBundles:
    def test_a_population_loads_equal(self, able, saved):
        loaded = load(saved).population
        assert loaded is not None
        before, after = ({**p.sizes.arrays(), **p.prior.arrays()} for p in (able.population, loaded))
        assert before.keys() == after.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array)
            assert after[name].dtype == array.dtype, name

    def test_it_is_part_of_the_hash(self, saved):
        before = load(saved).bundle_hash
        with np.load(saved / bundles.POPULATION) as archive:
            depth = archive["depth"]
        change(saved, depth=depth + 1)
        assert load(saved).bundle_hash != before

    def test_a_bundle_without_one_loads(self, tiny_trunk_model, tmp_path):
        tiny_trunk_model.save_pretrained(tmp_path / "old")
        assert not (tmp_path / "old" / bundles.POPULATION).exists()
        assert load(tmp_path / "old").population is None

    def test_a_file_that_the_manifest_does_not_know_is_not_read(self, saved, tiny_trunk_model, tmp_path):
        tiny_trunk_model.save_pretrained(tmp_path / "old")
        (tmp_path / "old" / bundles.POPULATION).write_bytes((saved / bundles.POPULATION).read_bytes())
        assert load(tmp_path / "old").population is None

    @pytest.mark.parametrize("how", ["missing", "one bit", "cut"])
    def test_damage_is_named(self, how, saved):
        file = saved / bundles.POPULATION
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if how == "missing":
            file.unlink()
        else:
            file.write_bytes(content if how == "one bit" else content[:-9])
        with pytest.raises(BundleError, match=r"population\.npz"):
            load(saved)

    @pytest.mark.parametrize("content", [b"", b"junk" * 100])
    def test_junk_is_refused_even_with_its_hash(self, content, saved):
        (saved / bundles.POPULATION).write_bytes(content)
        agree(saved)
        with pytest.raises(BundleError, match=r"population\.npz"):
            load(saved)

    @pytest.mark.parametrize(
        ("name", "wrong", "words"),
        [
            ("depth", None, "lacks depth"),
            ("prior_mean", None, "lacks prior_mean"),
            ("depth", lambda a: a[:-1], "depth is of shape"),
            ("condition", lambda a: a[:, 0], "condition is int32 of shape"),
            ("condition", lambda a: np.repeat(a, 2, axis=1), "prior_condition is of shape"),
            ("depth", lambda a: a.astype(str), "depth is <U"),
            ("source", lambda a: a + 1, "a source that is not there"),
            ("source", lambda a: a - 1, "a source that is not there"),
            ("is_measured", lambda a: a.astype(float), "is_measured is float64"),
            ("is_measured", lambda a: a[:, :-1], "packs"),
            ("n_vocabulary_genes", lambda a: a - 1, "209 genes"),
            ("prior_factor", lambda a: a[:, :-1], "prior_factor is of shape"),
            ("prior_n_cells", lambda a: a * 0, "a component of no cell"),
        ],
    )
    def test_arrays_that_do_not_fit_are_refused(self, name, wrong, words, saved):
        with np.load(saved / bundles.POPULATION) as archive:
            array = archive[name]
        change(saved, **{name: None if wrong is None else wrong(array)})
        with pytest.raises(BundleError, match=words):
            load(saved)

    def test_a_prior_over_another_z_is_refused(self, saved):
        with np.load(saved / bundles.POPULATION) as archive:
            mean, factor = archive["prior_mean"], archive["prior_factor"]
        change(saved, prior_mean=mean[:, :-1], prior_factor=factor[:, :-1, :-1])
        with pytest.raises(BundleError, match="7 dimensions"):
            load(saved)
        change(saved, prior_mean=mean[:, :N_SIZES], prior_factor=factor[:, :N_SIZES, :N_SIZES])
        with pytest.raises(BundleError, match="sizes, then z"):
            load(saved)

    def test_a_population_of_other_fields_is_refused(self, able, saved):
        with np.load(saved / bundles.POPULATION) as archive:
            pair = {name: np.repeat(archive[name], 2, axis=1) for name in ("condition", "prior_condition")}
        change(saved, **pair)
        with pytest.raises(BundleError, match="2 condition fields"):
            load(saved)

    def test_an_empty_population_is_refused(self, able, saved):
        empty = {
            name: getattr(able.population.sizes, name)[:0]
            for name in ("n_genes", "depth", "library_size", "source", "condition")
        }
        change(saved, **empty)
        with pytest.raises(BundleError, match="0 cells"):
            load(saved)

    def test_a_restricted_model_keeps_it(self, able, tmp_path):
        is_kept = np.arange(able.vocabulary.n_genes) % 3 > 0
        smaller = able.restricted(is_kept)
        assert isinstance(smaller.population, Population)
        np.testing.assert_array_equal(
            smaller.population.sizes.is_measured, able.population.sizes.is_measured[:, is_kept]
        )
        smaller.save_pretrained(tmp_path / "smaller")
        assert load(tmp_path / "smaller").population.sizes.is_measured.shape[1] == is_kept.sum()
