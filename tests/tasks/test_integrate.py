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
from scdiva.config import IntegrationConfig, OfficialConfig
from scdiva.data.reader import open_counts
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, KeyNotFoundError, OutputError, SourceError, TrainingError, UnsupportedError
from scdiva.metrics.integration import integration_scores
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.integration import IntegrationObjective
from scdiva.models.scdiva.model import build_network
from scdiva.tasks.embed import embed_cells
from scdiva.tasks.integrate import integrate, integrate_cells, loop_config

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

    def test_the_published_loss(self, batches, tiny_model):
        config = IntegrationConfig.published().model_copy(update={"n_latent": 8, "n_components": 10, "n_hidden": 16})
        found = integrate(
            batches, tiny_model, "batch", label_key="cell_type", config=config, loop=loop(40, stops_early=True),
            progress=False,
        )  # fmt: skip
        assert found.model.details["trained_heads"] == ["anchor", "profile_decoder"]
        settings = json.loads(found.record["settings"])
        assert settings["adversarial_weight"] == 1.0
        assert np.isfinite(found.z).all()


class TestFiles:
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
        for config in (IntegrationConfig.published(), SMALL.model_copy(update={"contrastive_weight": 0.0})):
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
