"""Latent diffusion on the z of a scDiVa model: fitted, saved whole, decoded in two ways, used as its prior, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

import scdiva as sd
from conftest import files_under
from generating import generating
from scdiva.config import OfficialConfig, ScDiffusionConfig
from scdiva.data.conditions import ConditionLabels
from scdiva.data.reader import open_counts
from scdiva.datasets import synthetic_cells
from scdiva.errors import BundleError, ConfigError, KeyNotFoundError, UnsupportedError, UntrainedHeadError
from scdiva.models.base import load_model
from scdiva.models.scdiffusion import ScDiffusion
from scdiva.models.scdiffusion.autoencoder import SparseCells
from scdiva.models.scdiffusion.codec import CodecHead
from scdiva.models.scdiffusion.objectives import LatentTable
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.codec import ScDiVaCodec
from scdiva.models.scdiva.model import build_network
from scdiva.tasks.generate import fine_tuned
from scdiva.tasks.scdiffusion import add_classifier, fit_scdiffusion
from scdiva.tasks.scdiva_latent import codes_by_name, scdiffusion_scdiva_generator, view_latents
from scdiva.types import LatentCodec, LatentPrior

TYPES = ("type 0", "type 1", "type 2")
SMALL = ScDiffusionConfig(width=48, n_blocks=2, classifier_width=24)
SHORT = ("denoiser.training.max_steps=400", "denoiser.optim.lr=3e-3", "classifier.training.max_steps=3")
SHORTEST = ("denoiser.training.max_steps=2", "classifier.training.max_steps=2")


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """300 cells of the types that the codec was trained on."""
    return synthetic_cells(300, 200, n_types=3, mean_depth=400.0, seed=1)


@pytest.fixture(scope="module")
def scdiva(tiny_trunk_model, _cells) -> ScDiVa:
    return generating(tiny_trunk_model, _cells)


def fit(data, codec, conditions=("cell_type",), out=None, **options) -> ScDiffusion:
    options = {"config": SMALL, "settings": SHORTEST, "progress": False, "device": "cpu", **options}
    return fit_scdiffusion(data, conditions, out, codec=codec, **options).model


@pytest.fixture(scope="module")
def saved(cells, scdiva, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latent") / "run"
    # the second field stands before the one that scDiVa knows
    fit(cells, scdiva, ("batch", "cell_type"), folder, settings=SHORT)
    return folder / "bundle"


@pytest.fixture(scope="module")
def model(saved) -> ScDiffusion:
    return ScDiffusion.from_pretrained(saved, device="cpu")


def made(model, n_cells=20, **options) -> ad.AnnData:
    return sd.tl.generate(model, n_cells, **{"condition": {"cell_type": "type 1"}, **options})


def called(generated: ad.AnnData, real: ad.AnnData) -> np.ndarray:
    """The type of each cell by the likelihood of its counts under the mean profiles of real cells."""
    real = real[:, [str(name) for name in generated.var_names]]
    mean = [np.asarray(real[(real.obs["cell_type"] == t).to_numpy()].X.sum(axis=0)).ravel() + 0.5 for t in TYPES]
    log_share = np.log(np.stack(mean) / np.stack(mean).sum(axis=1, keepdims=True))
    return np.array(TYPES)[np.argmax(generated.X @ log_share.T, axis=1)]


class TestFit:
    @pytest.mark.parametrize("decoder", ["profile", "masked"])
    def test_generated_cells_are_of_their_type_and_of_real_size(self, decoder, model, cells):
        depths = {}
        for name in TYPES:
            generated = made(model, 40, condition={"cell_type": name}, decoder=decoder)
            assert (called(generated, cells) == name).mean() > 0.8, name
            depths[name] = np.asarray(generated.X.sum(axis=1)).ravel()
            assert 0.6 < depths[name].mean() / generated.obs["scdiva_n_umis"].mean() < 1.6

    def test_genes_are_those_that_both_know(self, model, scdiva, cells):
        # ten genes of the cells are not in the vocabulary of scDiVa, and twenty of its genes not in the cells
        assert (model.vocabulary.n_genes, scdiva.vocabulary.n_genes) == (190, 210)
        assert made(model).shape == (20, 190)
        (source,) = model.details["training"]["sources"]
        inside = open_counts(cells, scdiva.vocabulary).read(np.arange(300)).counts.sum()
        assert source["coverage"] == pytest.approx(inside / cells.X.sum(), abs=0.01)
        assert source["coverage"] < 0.99
        assert model.details["codec"]["weights_hash"] == scdiva.weights_hash()
        assert "autoencoder" not in model.details["trained_heads"]

    def test_z_is_that_of_scdiva_standardised(self, model, scdiva, cells):
        counts = open_counts(cells, model.vocabulary, min_coverage=0).read(np.arange(300))
        views = view_latents(model.codec, counts, seed=1)
        assert views.shape == (8 * 300, 8)
        z = model.networks.codec_head.standardised(views)
        assert np.abs(z.mean(axis=0)).max() < 0.2
        assert np.abs(z.std(axis=0) - 1).max() < 0.2
        whole = open_counts(cells, scdiva.vocabulary).read(np.arange(300))
        np.testing.assert_allclose(
            model.networks.codec_head.codec_latent(model.encode(counts)), scdiva.latent(whole), rtol=1e-3, atol=1e-3
        )
        assert model.view_share == scdiva.population.prior.view_share == 0.5

    def test_the_same_call_takes_up_what_is_there(self, saved, scdiva, cells):
        mark = saved.parent / "denoiser" / "best.safetensors"
        before, hashed = mark.stat().st_mtime_ns, ScDiffusion.from_pretrained(saved).weights_hash()
        again = fit(cells, scdiva, ("batch", "cell_type"), saved.parent, settings=SHORT)
        assert (mark.stat().st_mtime_ns, again.weights_hash()) == (before, hashed)

    def test_the_model_that_is_given_stays_as_it_is(self, scdiva, cells):
        before = scdiva.weights_hash()
        generated = fit(cells, scdiva)
        assert scdiva.weights_hash() == before
        assert generated.codec.model is not scdiva

    def test_a_condition_is_added(self, model, cells):
        cells = cells.copy()
        cells.obs["state"] = np.where(cells.obs["cell_type"] == "type 0", "left", "right")
        larger = add_classifier(model, cells, "state", settings=SHORTEST[1:], device="cpu", progress=False).model
        assert made(larger, 5, condition={"state": "left"}, decoder="masked").n_obs == 5
        assert any("state" in note for note in made(larger, 5, condition={"state": "left"}, decoder="masked").uns[
            "scdiva"]["generate"]["notes"])  # fmt: skip


class TestHead:
    def test_slopes_offsets_and_dispersions_that_made_the_counts_are_found(self):
        rng = np.random.default_rng(0)
        share = rng.dirichlet(np.full(12, 3.0), 3000).astype(np.float32)
        offset, slope = rng.normal(0, 0.7, 12), rng.uniform(0.4, 1.6, 12)
        centre = np.log(share).mean(axis=0)
        moved = np.exp(centre + offset + slope * (np.log(share) - centre))
        mean = 2000.0 * moved / moved.sum(axis=1, keepdims=True)
        theta = np.exp(np.linspace(-0.5, 2.5, 12))
        counts = rng.poisson(rng.gamma(theta, mean / theta)).astype(np.int32)
        row, gene = np.nonzero(counts)
        packed = SparseCells(
            torch.from_numpy(row), torch.from_numpy(gene), torch.from_numpy(counts[row, gene].astype(np.float32)),
            torch.full((3000,), 2000.0),
        )  # fmt: skip
        head = CodecHead(12, 4)
        head.fit_genes([(share, packed)])
        found = head.log_offset_G.numpy()
        np.testing.assert_allclose(found - found.mean(), offset - offset.mean(), atol=0.15)
        np.testing.assert_allclose(head.slope_G.numpy(), slope, atol=0.15)
        np.testing.assert_allclose(head.log_theta_G.numpy(), np.log(theta), atol=0.25)
        np.testing.assert_allclose(head.adjusted(share).sum(axis=1), 1, rtol=1e-5)

    def test_every_view_of_a_cell_is_looked_up(self):
        z = np.arange(6, dtype=np.float32)[:, None]  # three views of two cells
        table = LatentTable(z, np.zeros(2, dtype=np.float32))

        class Cells:
            cell_index = np.tile([0, 1], 200)
            condition = np.zeros((400, 0), dtype=np.int32)

        found = table.of(Cells(), np.random.default_rng(0)).z_BZ[:, 0].numpy()
        assert set(found[::2]) == {0, 2, 4}
        assert set(found[1::2]) == {1, 3, 5}


class TestBundle:
    def test_it_needs_nothing_else(self, saved, model, cells, tmp_path):
        moved = Path(shutil.copytree(saved, tmp_path / "elsewhere"))
        loaded = ScDiffusion.from_pretrained(moved, device="cpu")
        assert isinstance(loaded.codec, LatentCodec)
        assert isinstance(loaded, LatentPrior)
        assert loaded.weights_hash() == model.weights_hash()
        for decoder in ("profile", "masked"):
            one, other = (made(m, 12, decoder=decoder, seed=4) for m in (model, loaded))
            assert (one.X != other.X).nnz == 0
        assert ScDiVa.from_pretrained(moved / "codec", device="cpu").vocabulary == loaded.vocabulary
        assert isinstance(load_model(moved, device="cpu"), ScDiffusion)
        assert isinstance(load_model(moved / "codec", device="cpu"), ScDiVa)

    @pytest.mark.parametrize("file", ["model.safetensors", "labels.json", "manifest.json"])
    @pytest.mark.parametrize("is_absent", [True, False])
    def test_a_codec_that_was_touched_is_refused(self, file, is_absent, saved, tmp_path):
        path = Path(shutil.copytree(saved, tmp_path / "bundle")) / "codec" / file
        if is_absent:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes() + b" ")
        with pytest.raises(BundleError, match=f"codec.*{file}"):
            ScDiffusion.from_pretrained(path.parents[1])

    def test_a_whole_codec_of_another_model_is_refused(self, saved, scdiva, tmp_path):
        path = Path(shutil.copytree(saved, tmp_path / "bundle"))
        shutil.rmtree(path / "codec")
        with pytest.raises(BundleError, match=r"codec/manifest.json is missing"):
            ScDiffusion.from_pretrained(path)
        scdiva.save_pretrained(path / "codec")
        with pytest.raises(BundleError, match="sha256"):
            ScDiffusion.from_pretrained(path)

    def test_a_codec_of_other_genes_is_refused_even_where_the_hashes_fit(self, saved, scdiva, tmp_path):
        import hashlib

        path = Path(shutil.copytree(saved, tmp_path / "bundle"))
        shutil.rmtree(path / "codec")
        scdiva.save_pretrained(path / "codec")
        hashes = json.loads((path / "manifest.json").read_text())
        hashes["codec/manifest.json"] = hashlib.sha256((path / "codec" / "manifest.json").read_bytes()).hexdigest()
        (path / "manifest.json").write_text(json.dumps(hashes))
        with pytest.raises(BundleError, match="210 genes"):
            ScDiffusion.from_pretrained(path)

    def test_a_codec_that_nothing_lists_is_refused(self, saved, tmp_path):
        path = Path(shutil.copytree(saved, tmp_path / "bundle"))
        hashes = json.loads((path / "manifest.json").read_text())
        del hashes["codec/manifest.json"]
        (path / "manifest.json").write_text(json.dumps(hashes))
        with pytest.raises(BundleError, match="codec"):
            ScDiffusion.from_pretrained(path)


class TestMaskedDecoder:
    def test_genes_umis_and_the_record(self, model):
        cells = made(model, 70, decoder="masked", seed=3)
        np.testing.assert_array_equal(np.diff(cells.X.indptr), cells.obs["scdiva_n_genes"])
        assert (cells.obs["scdiva_n_umis"] >= cells.obs["scdiva_n_genes"]).all()
        record = cells.uns["scdiva"]["generate"]
        assert record["decoder"] == "masked"
        assert cells.obsm["X_scdiffusion"].shape == (70, 8)
        again, other = (made(model, 70, decoder="masked", seed=seed) for seed in (3, 4))
        assert (cells.X != again.X).nnz == 0
        assert (cells.X != other.X).nnz > 0
        profile = made(model, 70, seed=3)
        np.testing.assert_array_equal(profile.obsm["X_scdiffusion"], cells.obsm["X_scdiffusion"])
        assert "scdiva_n_genes" not in profile.obs
        assert profile.uns["scdiva"]["generate"]["decoder"] == "profile"

    def test_z_and_labels_reach_the_masked_diffusion(self, model, monkeypatch):
        told = []
        draw = ScDiVa.draw

        def spy(self, wish, *arguments, **options):
            told.append(wish)
            return draw(self, wish, *arguments, **options)

        monkeypatch.setattr(ScDiVa, "draw", spy)
        cells = made(model, 70, decoder="masked", condition={"batch": "batch 1", "cell_type": "type 2"})
        codec = model.codec.model
        assert sum(wish.depth.size for wish in told) == 70
        assert (np.concatenate([w.condition for w in told]) == codec.labels.encode({"cell_type": "type 2"})).all()
        z = np.concatenate([wish.z for wish in told])
        np.testing.assert_allclose(model.networks.codec_head.standardised(z), cells.obsm["X_scdiffusion"], atol=1e-4)
        depth = np.concatenate([wish.depth for wish in told])
        np.testing.assert_allclose(np.concatenate([wish.z_depth for wish in told]), 0.5 * depth)
        assert any("batch" in note for note in cells.uns["scdiva"]["generate"]["notes"])

    def test_into_a_file(self, model, tmp_path):
        sd.tl.generate_file(tmp_path / "o.h5ad", model, 9, condition={"cell_type": "type 0"}, decoder="masked")
        found, expected = ad.read_h5ad(tmp_path / "o.h5ad"), made(model, 9, condition={"cell_type": "type 0"},
                                                                   decoder="masked")  # fmt: skip
        assert (found.X != expected.X).nnz == 0
        assert found.obs["scdiva_n_genes"].tolist() == expected.obs["scdiva_n_genes"].tolist()


class TestAsPrior:
    FEW = sd.Sampler(n_steps=3)

    def test_of_the_model_it_was_fitted_on_and_of_its_own_codec(self, model, scdiva, cells):
        for owner in (scdiva, model.codec.model):
            generated = sd.tl.generate(
                owner, 60, condition={"cell_type": "type 2"}, latent=model, sampler=sd.Sampler(n_steps=8)
            )
            known = generated[:, [name for name in generated.var_names if name in set(cells.var_names)]]
            assert (called(known, cells) == "type 2").mean() > 0.8
            assert model.name in generated.uns["scdiva"]["generate"]["latent"]

    def test_conditions_go_by_name(self, model, scdiva, monkeypatch):
        asked = []
        sample = ScDiffusion.sample_latents
        monkeypatch.setattr(
            ScDiffusion, "sample_latents", lambda s, c, *a, **k: (asked.append(c), sample(s, c, *a, **k))[1]
        )
        sd.tl.generate(scdiva, 5, condition={"cell_type": "type 1"}, latent=model, sampler=self.FEW)
        assert model.labels.fields == ("batch", "cell_type")
        assert (asked[0] == model.labels.encode({"cell_type": "type 1"})).all()

    def test_a_label_that_the_diffusion_does_not_know_is_refused(self, scdiva, cells, tmp_path):
        some = cells[(cells.obs["cell_type"] != "type 2").to_numpy()].copy()
        diffusion = fit(some, scdiva)
        before = files_under(tmp_path)
        with pytest.raises(KeyNotFoundError, match="cell_type=type 2"):
            sd.tl.generate_file(
                tmp_path / "o.h5ad", scdiva, 5, condition={"cell_type": "type 2"}, latent=diffusion, sampler=self.FEW
            )
        assert files_under(tmp_path) == before
        with pytest.raises(KeyNotFoundError, match="no z for cell_type"):
            sd.tl.generate(
                scdiva,
                5,
                condition={"cell_type": "type 1"},
                latent=fit(cells, scdiva, (), settings=SHORTEST[:1]),
                sampler=self.FEW,
            )

    def test_another_model_is_refused(self, model, tiny_model, adata):
        with pytest.raises(UnsupportedError, match="draws z of tiny"):
            sd.tl.generate(generating(tiny_model, adata), 5, latent=model, sampler=self.FEW)

    def test_codes_by_name(self):
        one = ConditionLabels((("tissue", ("lung",)), ("cell_type", ("B", "T", "NK"))))
        other = ConditionLabels((("cell_type", ("NK", "B")), ("batch", ("0",))))
        codes, untold = codes_by_name(np.array([[0, 1], [0, 3], [0, 0]]), one, other)
        assert codes.tolist() == [[2, 0], [1, 0], [0, 0]]
        assert untold == ()
        codes, untold = codes_by_name(np.array([[1, 2]]), one, other)
        assert codes.tolist() == [[0, 0]]
        assert untold == ("tissue", "cell_type=T")


class TestRefused:
    def test_models_that_have_no_z_or_no_profile_decoder(self, cells, scdiva, tmp_path):
        config = OfficialConfig(architecture="official", width=16, n_layers=1, n_heads=2, n_hidden=16, max_tokens=64)
        official = ScDiVa(build_network(210, config), config, scdiva.vocabulary, scdiva.statistics)
        untrained = ScDiVa(scdiva.network, scdiva.config, scdiva.vocabulary, scdiva.statistics)
        state = scdiva.config.model_copy(update={"embeds": "state"})
        states = ScDiVa(scdiva.network, state, scdiva.vocabulary, scdiva.statistics, details=scdiva.details)
        for codec, error, words in (
            (official, UnsupportedError, "official"),
            (untrained, UntrainedHeadError, "profile"),
            (states, UnsupportedError, "states"),
            ("no-such-model", BundleError, "no-such-model"),
        ):
            with pytest.raises(error, match=words):
                fit(cells, codec, out=tmp_path / "run")
        assert files_under(tmp_path) == {}

    def test_settings_of_an_autoencoder_that_is_not_trained(self, cells, scdiva):
        with pytest.raises(ConfigError, match="autoencoder"):
            fit(cells, scdiva, settings=("autoencoder.training.max_steps=2",))

    def test_decoders_that_are_not_there(self, model, scdiva, cells):
        with pytest.raises(ConfigError, match="decoder='mask'"):
            made(model, decoder="mask")
        with pytest.raises(UnsupportedError, match="family scdiva"):
            made(scdiva, decoder="masked")
        settings = [f"{part}.training.max_steps=2" for part in ("autoencoder", "denoiser")]
        own = fit(cells, None, settings=settings, with_classifiers=False)
        with pytest.raises(UnsupportedError, match="its own autoencoder"):
            made(own, decoder="masked")
        with pytest.raises(UnsupportedError, match="its own autoencoder"):
            made(scdiva, latent=own)

    def test_a_diffusion_without_its_codec(self, model):
        with pytest.raises(ConfigError, match="none given"):
            ScDiffusion(
                model.networks, model.config, model.vocabulary, model.statistics, labels=model.labels,
                population=model.population,
            )  # fmt: skip


class TestGenerator:
    def test_it_takes_up_the_fine_tuned_model_and_both_decoders_share_a_diffusion(self, scdiva, cells, tmp_path):
        train = cells[:150, :].copy()
        codec = fine_tuned(scdiva, "cell_type", train, 3, n_training_steps=2, folder=tmp_path)
        marks = [tmp_path / "seed-3" / "bundle" / "manifest.json"]
        before = [mark.stat().st_mtime_ns for mark in marks]
        for decoder in ("profile", "masked"):
            generate = scdiffusion_scdiva_generator(
                scdiva, "cell_type", decoder=decoder, settings=SHORTEST[:1], n_training_steps=2, folder=tmp_path
            )
            generated = generate(train, {"type 1": 3, "type 0": 2}, 3)
            assert generated.obs["cell_type"].tolist() == ["type 1"] * 3 + ["type 0"] * 2
            assert set(generated.var_names) <= set(train.var_names)
            assert generated.X.dtype == np.int32
            # neither fine-tuned nor fitted again
            marks.append(tmp_path / "scdiffusion-scdiva-seed-3" / "denoiser" / "best.safetensors")
            assert [mark.stat().st_mtime_ns for mark in marks[: len(before)]] == before
            before = [mark.stat().st_mtime_ns for mark in marks]
        model = ScDiffusion.from_pretrained(tmp_path / "scdiffusion-scdiva-seed-3" / "bundle")
        assert model.details["codec"]["weights_hash"] == codec.weights_hash()

    def test_a_model_of_other_cells_is_not_taken_up(self, scdiva, cells, tmp_path):
        from scdiva.errors import TrainingError

        fine_tuned(scdiva, "cell_type", cells[:150, :].copy(), 0, n_training_steps=2, folder=tmp_path)
        with pytest.raises(TrainingError):
            fine_tuned(scdiva, "cell_type", cells[100:250, :].copy(), 0, n_training_steps=2, folder=tmp_path)


def test_a_codec_is_one(scdiva):
    assert isinstance(ScDiVaCodec(scdiva), LatentCodec)
