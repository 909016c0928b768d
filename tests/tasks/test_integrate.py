from __future__ import annotations

import json
from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import scdiva as sd
from conftest import files_under
from scdiva.baselines.integration import pca
from scdiva.config import IntegrationConfig, NativeConfig, OfficialConfig
from scdiva.data.reader import open_counts
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, KeyNotFoundError, OutputError, SourceError, TrainingError, UnsupportedError
from scdiva.metrics.integration import integration_scores
from scdiva.models.neighbours import BatchNeighbours
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.integration import IntegrationData, IntegrationObjective
from scdiva.models.scdiva.model import build_network
from scdiva.models.scdiva.whole_encoder import WholeEncoderObjective
from scdiva.tasks.embed import embed_cells
from scdiva.tasks.integrate import _balanced, integrate, integrate_cells, loop_config

N = 300
SMALL = IntegrationConfig(n_latent=8, n_components=10, n_hidden=16, n_kinds=1, n_clusters=4, n_views=2)
"""Its parts are what is tested; how good the default is, benchmarks tell."""


def loop(n_steps: int = 60, *, stops_early: bool = False):
    config = loop_config(N, stops_early=stops_early)
    training = config.training.model_copy(update={"max_steps": n_steps, "validate_every": 20})
    return config.model_copy(update={"training": training})


@pytest.fixture(scope="module")
def batches() -> ad.AnnData:
    """Three types in two batches; the second batch loses nearly all molecules of every third gene."""
    adata = synthetic_cells(N, 200, n_types=3, mean_depth=600.0, seed=3)
    rng = np.random.default_rng(0)
    counts = adata.X.toarray().astype(np.int64)
    adata.obs["batch"] = np.where(np.arange(N) % 2, "one", "two")
    rows = np.flatnonzero(adata.obs["batch"] == "two")
    genes = np.arange(0, 200, 3)
    counts[np.ix_(rows, genes)] = rng.binomial(counts[np.ix_(rows, genes)], 0.02)
    adata.X = sp.csr_matrix(counts.astype(np.int32))
    return adata


@pytest.fixture(scope="module")
def integrated(batches, tiny_model):
    return integrate(batches, tiny_model, "batch", config=SMALL, loop=loop(200), progress=False)


class TestWithoutLabels:
    def test_batches_mix_and_types_stay_apart(self, batches, integrated, tiny_model):
        cells = open_counts(batches, tiny_model.vocabulary).read(np.arange(N))
        before = pca(cells.counts, batches.obs["batch"], seed=0)
        kind, batch = (batches.obs[key].astype(str).to_numpy() for key in ("cell_type", "batch"))
        wanted = ("ilisi", "asw_label", "bras")
        was, now = (integration_scores(z, kind, batch, seed=0, metrics=wanted) for z in (before, integrated.z))
        assert was["ilisi"] < 0.1 < 0.4 < now["ilisi"]
        assert now["bras"] > was["bras"]
        assert now["asw_label"] > was["asw_label"]

    def test_result(self, integrated):
        assert integrated.z.shape == (N, 8)
        assert integrated.z.dtype == np.float32
        assert np.isfinite(integrated.z).all()
        record = integrated.record
        assert record["n_batches"] == 2
        assert record["batches"] == ["one", "two"]
        assert record["supervised"] is False
        assert record["confounding"] == ""
        assert record["n_genes"] == 190
        assert record["share_of_cells_with_such_a_pair"] > 0.5
        assert integrated.model.details["trained_heads"] == ["anchor"]

    def test_the_model_embeds_the_same_cells_alike_and_further_ones_without_batches(self, batches, integrated):
        cells = open_counts(batches, integrated.model.vocabulary).read(np.arange(N))
        np.testing.assert_allclose(embed_cells(integrated.model, cells), integrated.z, rtol=0, atol=1e-4)
        more = synthetic_cells(40, 200, n_types=3, mean_depth=600.0, seed=3)
        del more.obs["batch"]
        assert sd.tl.embed(more, integrated.model, copy=True).obsm["X_scdiva"].shape == (40, 8)

    def test_equal_seeds_give_equal_embeddings(self, batches, integrated, tiny_model):
        again = integrate(batches, tiny_model, "batch", config=SMALL, loop=loop(200), progress=False)
        np.testing.assert_array_equal(again.z, integrated.z)

    def test_the_model_that_was_given_is_not_changed(self, batches, tiny_model):
        before = {name: tensor.clone() for name, tensor in tiny_model.network.state_dict().items()}
        integrate(batches, tiny_model, "batch", config=SMALL, loop=loop(5), progress=False)
        for name, tensor in tiny_model.network.state_dict().items():
            assert (tensor == before[name]).all(), name


class TestWithLabels:
    def test_types_are_tighter_and_the_record_says_so(self, batches, integrated, tiny_model):
        found = integrate(
            batches, tiny_model, "batch", label_key="cell_type", config=SMALL, loop=loop(200),
            progress=False,
        )  # fmt: skip
        kind, batch = (batches.obs[key].astype(str).to_numpy() for key in ("cell_type", "batch"))
        scores = [integration_scores(z, kind, batch, seed=0, metrics=("asw_label",)) for z in (integrated.z, found.z)]
        assert scores[1]["asw_label"] > scores[0]["asw_label"]
        assert found.record["supervised"] is True
        assert "batch and type" in found.record["confounding"]
        assert len(found.record["types"]) == 3

    def test_cells_without_a_label_take_part(self, batches, tiny_model):
        some = batches.copy()
        label = some.obs["cell_type"].astype(str).to_numpy().copy()
        label[::4] = "unassigned"
        some.obs["cell_type"] = label
        found = integrate(
            some, tiny_model, "batch", label_key="cell_type", config=SMALL, loop=loop(5),
            progress=False,
        )  # fmt: skip
        assert found.z.shape == (N, 8)
        assert len(found.record["types"]) == 3

    def test_the_published_loss_on_an_anchor_alone(self, batches, tiny_model):
        config = IntegrationConfig.published().model_copy(
            update={"n_latent": 8, "n_components": 10, "n_hidden": 16, "whole_encoder": False}
        )
        found = integrate(
            batches, tiny_model, "batch", label_key="cell_type", config=config, loop=loop(40, stops_early=True),
            progress=False,
        )  # fmt: skip
        assert found.model.details["trained_heads"] == ["anchor", "profile_decoder"]
        settings = json.loads(found.record["settings"])
        assert settings["adversarial_weight"] == config.adversarial_weight > 0
        assert found.record["trained"] == "layers of an anchor"
        assert np.isfinite(found.z).all()


PUBLISHED = IntegrationConfig.published().model_copy(update={"max_tokens": 32})


def published_loop(n_steps: int, *, stops_early: bool = True):
    config = loop_config(N, stops_early=stops_early, whole_encoder=True)
    training = config.training.model_copy(
        update={"max_steps": n_steps, "validate_every": 10, "batch_size": 60, "checkpoint_every": 5}
    )
    optim = config.optim.model_copy(update={"lr": 0.02, "warmup_steps": 2})
    return config.model_copy(update={"training": training, "optim": optim})


@pytest.fixture(scope="module")
def published(batches, tiny_trunk_model, tmp_path_factory):
    """The published protocol, ten steps, with its folder."""
    folder = tmp_path_factory.mktemp("published") / "run"
    return folder, integrate(
        batches, tiny_trunk_model, "batch", label_key="cell_type", config=PUBLISHED, loop=published_loop(10),
        out_dir=folder, progress=False,
    )  # fmt: skip


class TestWholeEncoder:
    def test_types_come_together_and_batches_mix(self, batches, published, tiny_trunk_model):
        cells = open_counts(batches, tiny_trunk_model.vocabulary).read(np.arange(N))
        before = tiny_trunk_model.cell_state(cells)
        # with no more than 30 held-out cells the first steps are as good as any: the last one is taken
        config = PUBLISHED.model_copy(
            update={"reconstruction_weight": 0.1, "adversarial_weight": 0.1, "stops_early": False}
        )
        found = integrate(
            batches, tiny_trunk_model, "batch", label_key="cell_type", config=config,
            loop=published_loop(60, stops_early=False), progress=False,
        )  # fmt: skip
        kind, batch = (batches.obs[key].astype(str).to_numpy() for key in ("cell_type", "batch"))
        wanted = ("ilisi", "asw_label", "kmeans_nmi")
        was, now = (integration_scores(z, kind, batch, seed=0, metrics=wanted) for z in (before, found.z))
        assert now["asw_label"] > was["asw_label"] + 0.05
        assert now["ilisi"] > was["ilisi"] + 0.1
        assert was["kmeans_nmi"] < 0.1 < 0.4 < now["kmeans_nmi"]

    def test_the_whole_network_is_trained(self, published, tiny_trunk_model):
        before = dict(tiny_trunk_model.restricted(np.isin(
            tiny_trunk_model.vocabulary.ensembl_id, published[1].model.vocabulary.ensembl_id
        )).network.named_parameters())  # fmt: skip
        after = dict(published[1].model.network.named_parameters())
        assert after.keys() == before.keys()
        for part in ("anchor.gene_embedding", "anchor.encoder.weight", "trunk.lat.weight", "trunk.gene.weight"):
            assert not torch.equal(after[part], before[part]), part
        for name in after:
            if "transformer" in name:
                assert not torch.equal(after[name], before[name]), name
        assert published[1].record["steps"] > 0

    def test_result(self, published, tiny_trunk_model):
        found = published[1]
        assert found.z.shape == (N, 8 + 16)
        np.testing.assert_allclose(found.z.mean(axis=1), 0.0, atol=1e-4)  # LayerNorm
        np.testing.assert_allclose(found.z.std(axis=1), 1.0, atol=1e-2)
        assert found.model.n_latent == 24
        assert found.model.config.embeds == "state"
        assert found.model.config.trunk.max_tokens == 32
        assert found.record["trained"] == "whole encoder"
        assert found.record["supervised"] is True
        assert found.model.details["trained_heads"] == ["anchor", "trunk", "profile_decoder", "identity", "value"]
        assert tiny_trunk_model.config.embeds == "latent"

    def test_the_bundle_maps_the_same_cells_alike_and_further_ones_without_batch_or_label(self, batches, published):
        folder, found = published
        loaded = ScDiVa.from_pretrained(folder / "bundle", device="cpu")
        cells = open_counts(batches, loaded.vocabulary).read(np.arange(N))
        np.testing.assert_array_equal(embed_cells(loaded, cells), found.z)
        one = embed_cells(loaded, cells.take(np.array([7])))
        np.testing.assert_allclose(one[0], found.z[7], atol=1e-4)
        more = synthetic_cells(40, 200, n_types=3, mean_depth=600.0, seed=3)
        told = sd.tl.embed(more, loaded, copy=True).obsm["X_scdiva"]
        del more.obs["batch"], more.obs["cell_type"]
        np.testing.assert_array_equal(sd.tl.embed(more, loaded, copy=True).obsm["X_scdiva"], told)
        assert told.shape == (40, 24)

    def test_a_label_of_a_cell_is_not_in_its_embedding(self, batches, published):
        model = published[1].model
        reader = open_counts(batches, model.vocabulary).with_conditions(model.labels, {})
        cells = reader.read(np.arange(20))
        assert (cells.condition > 0).all()
        np.testing.assert_array_equal(model.embed(cells), published[1].z[:20])

    def test_what_starts_at_z_is_refused(self, published):
        model = published[1].model
        with pytest.raises(UnsupportedError, match="profile decoding"):
            model.expected_profile(published[1].z, np.arange(3))
        with pytest.raises(UnsupportedError, match="generation"):
            sd.tl.generate(model, n_cells=2)

    def test_hidden_genes_are_predicted_as_before(self, batches, published):
        genes = [str(name) for name in published[1].model.vocabulary.symbol[:2]]
        done = sd.tl.impute(batches, published[1].model, genes, copy=True)  # of a model that is fine-tuned
        assert done.n_obs == N

    def test_the_model_that_was_given_is_not_changed(self, batches, tiny_trunk_model):
        before = {name: tensor.clone() for name, tensor in tiny_trunk_model.network.state_dict().items()}
        with torch.inference_mode():
            integrate(
                batches, tiny_trunk_model, "batch", label_key="cell_type", config=PUBLISHED, loop=published_loop(2),
                progress=False,
            )  # fmt: skip
        for name, tensor in tiny_trunk_model.network.state_dict().items():
            assert (tensor == before[name]).all(), name

    def test_heads_that_are_not_trained_along_are_not_named(self, batches, tiny_trunk_model):
        config = PUBLISHED.model_copy(update={"reconstruction_weight": 0.0})
        found = integrate(
            batches, tiny_trunk_model, "batch", label_key="cell_type", config=config, loop=published_loop(2),
            progress=False,
        )  # fmt: skip
        assert found.model.details["trained_heads"] == ["anchor", "trunk"]

    def test_a_model_without_a_trunk(self, batches, tiny_model):
        with pytest.raises(UnsupportedError, match="no trunk") as error:
            integrate(batches, tiny_model, "batch", label_key="cell_type", config=IntegrationConfig.published())
        assert "'whole_encoder': False" in str(error.value)

    def test_length_of_the_training(self):
        few, some, many = (loop_config(n, whole_encoder=True).training.max_steps for n in (300, 3607, 10**6))
        assert (few, some, many) == (100, 281, 1000)


class TestFiles:
    @pytest.mark.parametrize("is_published", [False, True])
    def test_an_interrupted_run_goes_on_to_the_same_result(
        self, batches, tiny_model, tiny_trunk_model, tmp_path, monkeypatch, is_published
    ):
        options = {"label_key": "cell_type", "config": PUBLISHED} if is_published else {"config": SMALL}
        model = tiny_trunk_model if is_published else tiny_model
        made = published_loop(12) if is_published else loop(12)
        training = made.training.model_copy(update={"checkpoint_every": 5})
        options |= {"loop": made.model_copy(update={"training": training}), "progress": False}
        whole = integrate(batches, model, "batch", **options)
        kind = WholeEncoderObjective if is_published else IntegrationObjective
        prepare, seen = kind.prepare, []

        def cut_off(self, cells, rng):
            seen.append(cells.n_cells)
            if len(seen) > 8:
                raise KeyboardInterrupt
            return prepare(self, cells, rng)

        with monkeypatch.context() as patch:
            patch.setattr(kind, "prepare", cut_off)
            with pytest.raises((KeyboardInterrupt, SystemExit)):
                integrate(batches, model, "batch", out_dir=tmp_path / "run", **options)
        assert not (tmp_path / "run" / "bundle").exists()
        assert not (tmp_path / "run" / "result.json").exists()
        taken = []
        monkeypatch.setattr(kind, "prepare", lambda self, *given: taken.append(1) or prepare(self, *given))
        again = integrate(batches, model, "batch", out_dir=tmp_path / "run", **options)
        assert 0 < len(taken) < 12  # it went on from a checkpoint
        np.testing.assert_array_equal(again.z, whole.z)

    def test_saved_and_read_again(self, batches, tiny_model, tmp_path):
        found = integrate(
            batches, tiny_model, "batch", config=SMALL, loop=loop(5), out_dir=tmp_path / "run", progress=False
        )
        loaded = ScDiVa.from_pretrained(tmp_path / "run" / "bundle", device="cpu")
        cells = open_counts(batches, loaded.vocabulary).read(np.arange(N))
        np.testing.assert_array_equal(embed_cells(loaded, cells), found.z)
        # the same call takes the finished run
        written = (tmp_path / "run" / "best.safetensors").stat().st_mtime_ns
        again = integrate(
            batches, tiny_model, "batch", config=SMALL, loop=loop(5), out_dir=tmp_path / "run", progress=False
        )
        np.testing.assert_array_equal(again.z, found.z)
        assert (tmp_path / "run" / "best.safetensors").stat().st_mtime_ns == written
        other = ScDiVa(
            build_network(tiny_model.vocabulary.n_genes, tiny_model.config), tiny_model.config, tiny_model.vocabulary,
            tiny_model.statistics, details=tiny_model.details,
        )  # fmt: skip
        with pytest.raises(TrainingError, match="model to start from"):
            integrate(batches, other, "batch", config=SMALL, loop=loop(5), out_dir=tmp_path / "run", progress=False)

    def test_the_bundle_of_another_model_is_not_replaced(self, batches, tiny_model, tmp_path):
        tiny_model.save_pretrained(tmp_path / "bundle")
        before = files_under(tmp_path)
        with pytest.raises(OutputError, match="holds no run"):
            integrate(batches, tiny_model, "batch", config=SMALL, loop=loop(5), out_dir=tmp_path)
        assert files_under(tmp_path) == before

    def test_python_and_file_are_equal(self, batches, tiny_model, tmp_path, monkeypatch):
        monkeypatch.setattr("scdiva.tasks.integrate.loop_config", lambda *a, **k: loop(5))
        batches.write_h5ad(tmp_path / "in.h5ad")
        model, out = sd.tl.integrate(batches, tiny_model, "batch", config=SMALL, copy=True)
        sd.tl.integrate_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", tiny_model, "batch", config=SMALL)
        written = ad.read_h5ad(tmp_path / "out.h5ad")
        np.testing.assert_array_equal(written.obsm["X_scdiva_integrated"], out.obsm["X_scdiva_integrated"])
        record = written.uns["scdiva"]["integrate"]["X_scdiva_integrated"]
        assert record["batch_key"] == "batch"
        assert "X_scdiva_integrated" not in batches.obsm
        assert model.n_latent == 8


class TestWhatIsLeftOut:
    def test_more_cells_than_are_trained_on(self, batches, tiny_model, monkeypatch):
        monkeypatch.setattr("scdiva.tasks.integrate.MAX_CELLS", 200)
        found = integrate(batches, tiny_model, "batch", config=SMALL, loop=loop(5), progress=False)
        assert found.z.shape == (N, 8)
        assert found.record["n_cells_trained_on"] == 200

    def test_genes_that_not_all_sources_measure(self, batches, tiny_model):
        cells = open_counts(batches, tiny_model.vocabulary).read(np.arange(N))
        is_measured = np.concatenate([cells.is_measured, cells.is_measured])
        lost = np.flatnonzero(is_measured[0])[:15]
        is_measured[1, lost] = False
        two = replace(cells, is_measured=is_measured, source_of_cell=(np.arange(N) % 2).astype(np.int32))
        found = integrate_cells(two, batches.obs["batch"].to_numpy(str), tiny_model, config=SMALL, loop=loop(5))
        assert found.record["n_genes_dropped"] == 15
        assert found.record["n_genes"] == found.model.vocabulary.n_genes == 175

    def test_genes_without_a_count_in_one_batch_are_spoken_of(self, batches, tiny_model, caplog):
        some = batches.copy()
        counts = some.X.toarray()
        counts[np.ix_(some.obs["batch"] == "one", np.arange(20, 40))] = 0
        some.X = sp.csr_matrix(counts)
        with caplog.at_level("WARNING"):
            integrate(some, tiny_model, "batch", config=SMALL, loop=loop(5), progress=False)
        assert "genes have no count in batch one" in caplog.text

    def test_empty_cells(self, batches, tiny_model, caplog):
        some = batches.copy()
        counts = some.X.toarray()
        counts[[3, 50]] = 0
        some.X = sp.csr_matrix(counts)
        with caplog.at_level("WARNING"):
            found = integrate(some, tiny_model, "batch", config=SMALL, loop=loop(5), progress=False)
        assert "2 cells without counts" in caplog.text
        assert found.record["n_cells_trained_on"] == N - 2
        np.testing.assert_allclose(found.z[3], found.z[50], atol=1e-5)

    def test_held_out_labels_are_not_trained_on(self, batches, tiny_model, monkeypatch):
        seen: list[np.ndarray] = []
        prepare = IntegrationObjective.prepare

        def spy(self, cells, rng):
            inputs = prepare(self, cells, rng)
            heldout = self.data.label != self.training_label
            assert heldout.sum() == N // 10
            seen.append(inputs.partner_label_B.numpy())
            return inputs

        monkeypatch.setattr(IntegrationObjective, "prepare", spy)
        config = SMALL.model_copy(update={"stops_early": True})
        integrate(
            batches, tiny_model, "batch", label_key="cell_type", config=config, loop=loop(5, stops_early=True),
            progress=False,
        )  # fmt: skip
        share = np.mean([(labels == -1).mean() for labels in seen])
        assert 0.02 < share < 0.2  # partners that are held out

    def test_within_inference_mode(self, batches, tiny_model):
        with torch.inference_mode():
            found = integrate(batches, tiny_model, "batch", config=SMALL, loop=loop(5), progress=False)
        assert not next(found.model.network.parameters()).is_inference()


class TestBadInput:
    def test_a_supervised_loss_without_labels(self, batches, tiny_model):
        anchor_alone = IntegrationConfig.published().model_copy(update={"whole_encoder": False})
        for config in (anchor_alone, SMALL.model_copy(update={"contrastive_weight": 0.0})):
            with pytest.raises(ConfigError, match="no labels"):
                integrate(batches, tiny_model, "batch", config=config)

    def test_batches(self, batches, tiny_model):
        some = batches[:60].copy()
        some.obs["same"] = "a"
        some.obs["gaps"] = np.where(np.arange(60) < 7, None, "a")
        with pytest.raises(SourceError, match="1 batch "):
            integrate(some, tiny_model, "same")
        with pytest.raises(SourceError, match=r"7 cells of .* have no batch"):
            integrate(some, tiny_model, "gaps")
        with pytest.raises(KeyNotFoundError, match="donor"):
            integrate(some, tiny_model, "donor")

    def test_labels(self, batches, tiny_model):
        some = batches[:60].copy()
        some.obs["one"] = "B cell"
        with pytest.raises(SourceError, match="1 types"):
            integrate(some, tiny_model, "batch", label_key="one")

    def test_numbers_that_differ(self, batches, tiny_model):
        cells = open_counts(batches, tiny_model.vocabulary).read(np.arange(N))
        with pytest.raises(SourceError, match="of 3 cells"):
            integrate_cells(cells, np.array(["a", "b", "a"]), tiny_model)

    def test_a_model_that_is_not_native(self, batches, tiny_model):
        config = OfficialConfig(architecture="official", n_layers=1, width=8, n_heads=2, n_hidden=8, max_tokens=16)
        genes = tiny_model.vocabulary.n_genes
        official = ScDiVa(build_network(genes, config), config, tiny_model.vocabulary, tiny_model.statistics)
        with pytest.raises(UnsupportedError, match="integration"):
            integrate(batches, official, "batch")

    def test_nothing_is_written(self, batches, tiny_model, tmp_path):
        batches.write_h5ad(tmp_path / "in.h5ad")
        before = files_under(tmp_path)
        with pytest.raises(KeyNotFoundError):
            sd.tl.integrate_file(tmp_path / "in.h5ad", tmp_path / "out.h5ad", tiny_model, "donor")
        with pytest.raises(OutputError):
            sd.tl.integrate_file(tmp_path / "in.h5ad", tmp_path / "in.h5ad", tiny_model, "batch")
        assert files_under(tmp_path) == before

    def test_impossible_settings(self):
        with pytest.raises(ValueError, match="p_self and p_across"):
            IntegrationConfig(p_self=0.6, p_across=0.6)
        with pytest.raises(ValueError, match="whole_encoder has no partners"):
            IntegrationConfig(whole_encoder=True)
        with pytest.raises(ValueError, match="needs a trunk"):
            NativeConfig(embeds="state")

    def test_too_few_labels_to_stop_by(self, batches, tiny_trunk_model):
        some = batches.copy()
        label = some.obs["cell_type"].astype(str).to_numpy().copy()
        label[60:] = "unassigned"
        some.obs["cell_type"] = label
        given = {"label_key": "cell_type", "progress": False}
        with pytest.raises(SourceError, match="held-out cells with a label") as error:
            integrate(some, tiny_trunk_model, "batch", config=PUBLISHED, **given)
        assert "at least 200 cells" in str(error.value)
        assert "leave out --published" in str(error.value)
        advised = PUBLISHED.model_copy(update={"stops_early": False})  # what it says to do in Python
        assert "model_copy(update={'stops_early': False})" in str(error.value)
        given["loop"] = published_loop(2, stops_early=False)
        assert integrate(some, tiny_trunk_model, "batch", config=advised, **given).z.shape == (N, 24)


class TestBalance:
    @pytest.fixture(scope="class")
    @staticmethod
    def kinds():
        """Four kinds of 2,000 cells, the rarest of them 2 %, and what the objective knows of them."""
        rng = np.random.default_rng(0)
        kind = np.repeat(np.arange(4), (1200, 600, 160, 40))
        points = (4 * np.eye(6)[kind] + 0.3 * rng.normal(size=(kind.size, 6))).astype(np.float32)
        # three dimensions of the model before them, of noise: kinds are found in the data's own
        whole = np.concatenate(
            [rng.normal(size=(kind.size, 3)).astype(np.float32), points - points.mean(axis=0)], axis=1
        )
        batch = rng.integers(2, size=kind.size)
        neighbours = BatchNeighbours.find(points, batch, k_within=2, k_across=2)
        view = torch.from_numpy(whole)
        return kind, IntegrationData(view[None], view, 6, batch, np.full(kind.size, -1), neighbours)

    def test_rare_kinds_are_drawn_as_often_as_abundant_ones(self, kinds):
        kind, data = kinds
        config = SMALL.model_copy(update={"n_kinds": 4})
        train = np.flatnonzero(np.arange(kind.size) % 10)  # a tenth is held out
        drawn = _balanced(train, data, config, loop_config(train.size))
        assert set(drawn) <= set(train)
        assert drawn.size >= 20_000
        share = np.bincount(kind[drawn]) / drawn.size
        np.testing.assert_allclose(share, 0.25, atol=0.015)
        # within a kind all cells alike: none of the 36 rare ones stands in for the others
        often = np.bincount(drawn, minlength=kind.size)[train[kind[train] == 3]]
        assert often.min() > 0.7 * often.mean()
        assert often.max() < 1.3 * often.mean()

    def test_one_kind_is_no_balance(self, kinds):
        kind, data = kinds
        train = np.arange(kind.size)
        np.testing.assert_array_equal(_balanced(train, data, SMALL, loop_config(kind.size)), train)

    def test_equal_seeds_draw_equally(self, kinds):
        kind, data = kinds
        config, train = SMALL.model_copy(update={"n_kinds": 4}), np.arange(kind.size)
        one, two, other = (_balanced(train, data, config, loop_config(kind.size, seed=s)) for s in (0, 0, 1))
        np.testing.assert_array_equal(one, two)
        assert (one != other).any()


def test_command_line(cli, h5ad, bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("scdiva.tasks.integrate.loop_config", lambda *a, **k: loop(5))
    out = tmp_path / "out.h5ad"
    done = cli(
        "integrate", h5ad, out, "--batch-key", "batch", "--label-key", "cell_type", "--model", bundle, "--save",
        tmp_path / "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "120 cells of 2 batches integrated with labels" in done.out
    assert "supervised method" in done.out
    assert ad.read_h5ad(out).obsm["X_scdiva_integrated"].shape[0] == 120
    assert (tmp_path / "run" / "bundle" / "model.safetensors").exists()
    refused = cli("integrate", h5ad, tmp_path / "b.h5ad", "--batch-key", "batch", "--model", bundle, "--published")
    assert refused.code != 0
    assert "--label-key" in refused.err
    refused = cli(
        "integrate", h5ad, tmp_path / "b.h5ad", "--batch-key", "batch", "--label-key", "cell_type", "--model", bundle,
        "--published",
    )  # fmt: skip
    assert refused.code != 0
    assert "no trunk" in refused.err
    assert not (tmp_path / "b.h5ad").exists()


def test_command_line_published(cli, batches, tiny_trunk_model, tmp_path, monkeypatch):
    monkeypatch.setattr("scdiva.tasks.integrate.loop_config", lambda *a, **k: published_loop(2))
    batches.write_h5ad(tmp_path / "in.h5ad")
    tiny_trunk_model.save_pretrained(tmp_path / "model")
    done = cli(
        "integrate", tmp_path / "in.h5ad", tmp_path / "out.h5ad", "--batch-key", "batch", "--label-key", "cell_type",
        "--model", tmp_path / "model", "--published",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "trained: the whole encoder of tiny, which reads 64 genes a cell" in done.out
    assert ad.read_h5ad(tmp_path / "out.h5ad").obsm["X_scdiva_integrated"].shape == (N, 24)
