"""The published latent diffusion from a file of counts to generated cells."""

from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

import scdiva as sd
from conftest import files_under
from scdiva.data.reader import open_counts
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, TrainingError
from scdiva.models.scdiffusion import PRESETS, ScDiffusion
from scdiva.tasks.evaluate_generation import generator_of
from scdiva.tasks.scdiffusion import (
    FittedScDiffusion,
    add_classifier,
    fit_scdiffusion,
    loop_config,
    scdiffusion_parity_generator,
)

TYPES = ("type 0", "type 1", "type 2")
SMALL = PRESETS["parity"].model_copy(
    update={"n_latent": 6, "n_hidden": 32, "width": 32, "classifier_width": 24, "n_times": 200, "guided_times": 100}
)
SHORT = (
    "autoencoder.training.max_steps=300",
    "autoencoder.optim.lr=2e-3",
    "denoiser.training.max_steps=600",
    "denoiser.optim.lr=3e-3",
    "classifier.training.max_steps=200",
    "classifier.optim.lr=3e-3",
)
SHORTEST = [f"{part}.training.max_steps=2" for part in ("autoencoder", "denoiser", "classifier")]


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    cells = synthetic_cells(400, 200, n_types=3, mean_depth=500.0, seed=2)
    cells.obs["state"] = np.where(cells.obs["cell_type"] == "type 0", "left", "right")
    return cells


def fit(data, conditions=("cell_type",), out=None, **options) -> FittedScDiffusion:
    options = {"config": SMALL, "settings": SHORT, "progress": False, "device": "cpu", **options}
    return fit_scdiffusion(data, conditions, out, **options)


@pytest.fixture(scope="module")
def run(cells, tmp_path_factory) -> tuple[FittedScDiffusion, Path]:
    folder = tmp_path_factory.mktemp("parity") / "run"
    return fit(cells, out=folder), folder


@pytest.fixture(scope="module")
def model(run) -> ScDiffusion:
    return run[0].model


def called(generated: ad.AnnData, real: ad.AnnData) -> np.ndarray:
    """The type of each cell by the likelihood of its counts under the mean profiles of real cells."""
    real = real[:, [str(name) for name in generated.var_names]]
    log_share = np.log(
        np.stack([np.asarray(real[(real.obs["cell_type"] == t).to_numpy()].X.sum(axis=0)).ravel() + 0.5 for t in TYPES])
    )
    log_share -= np.log(np.exp(log_share).sum(axis=1, keepdims=True))
    return np.array(TYPES)[np.argmax(generated.X @ log_share.T, axis=1)]


def read(model, cells):
    return open_counts(cells, model.vocabulary).read(np.arange(cells.n_obs))


class TestFit:
    def test_cells_are_of_the_type_that_classifiers_guide_to(self, model, cells):
        for name in TYPES:
            generated = sd.tl.generate(model, 60, condition={"cell_type": name})
            assert (called(generated, cells) == name).mean() > 0.75, name
            assert generated.X.dtype == np.int32
            record = generated.uns["scdiva"]["generate"]
            assert record["sampler"] == {"method": "ddpm", "n_steps": 200, "eta": 0.0}
            assert record["model_hash"] == model.bundle_hash
        free = sd.tl.generate(model, 60, condition={"cell_type": "type 1"}, guidance={"cell_type": 0.0})
        assert len(set(called(free, cells))) > 1

    def test_the_other_samplers_work_too(self, model, cells):
        for sampler in (sd.LatentSampler("dpm"), sd.LatentSampler("ddim")):
            generated = sd.tl.generate(model, 60, condition={"cell_type": "type 2"}, sampler=sampler)
            assert (called(generated, cells) == "type 2").mean() > 0.6, sampler

    def test_what_is_kept(self, run, cells):
        fitted, folder = run
        model = fitted.model
        assert (model.config.architecture, model.config.fields) == ("published", ())
        assert model.config.classified == ("cell_type",)
        assert {p.name for p in folder.iterdir()} == {"autoencoder", "denoiser", "classifier-cell_type", "bundle"}
        np.testing.assert_allclose(np.linalg.norm(model.encode(read(model, cells)), axis=1), 1, rtol=1e-4)
        again = fit(cells, out=folder)
        assert again.model.weights_hash() == model.weights_hash()
        with pytest.raises(TrainingError):
            fit(cells, out=folder, config=SMALL.model_copy(update={"n_hidden": 16}))

    def test_training_helps(self, run):
        import csv

        for part in ("autoencoder", "denoiser", "classifier-cell_type"):
            with (run[1] / part / "log.csv").open() as file:
                losses = [float(row["loss"]) for row in csv.DictReader(file) if "heldout" in row.values()]
            assert min(losses) < 0.97 * losses[0], part

    def test_a_weight_of_a_field_that_the_denoiser_does_not_know(self, model):
        for weight in (2.0, {"cell_type": 2.0}):
            with pytest.raises(ConfigError, match="was not trained with"):
                sd.tl.generate(model, 3, condition={"cell_type": "type 1"}, weight=weight)

    def test_a_classifier_is_added_and_reads_z_without_batch_mates(self, model, cells, monkeypatch):
        from scdiva.tasks import scdiffusion as task

        tables = []
        latents = task._latents
        monkeypatch.setattr(task, "_latents", lambda *arguments: tables.append(latents(*arguments)) or tables[-1])
        larger = add_classifier(model, cells, "state", settings=SHORT[4:], device="cpu", progress=False).model
        assert larger.config.classified == ("cell_type", "state")
        np.testing.assert_allclose(tables[0], model.encode(read(model, cells)), atol=1e-5)
        left = sd.tl.generate(larger, 60, condition={"state": "left"}, guidance={"state": 4.0})
        assert (called(left, cells) == "type 0").mean() > 0.7

    def test_refused(self, cells, tmp_path):
        for options, words in (
            ({"with_classifiers": False}, "without classifiers"),
            ({"config": None, "scimilarity": tmp_path}, "native autoencoder"),
        ):
            with pytest.raises(ConfigError, match=words):
                fit(cells, out=tmp_path / "run", **options)
        assert files_under(tmp_path) == {}
        free = fit(cells, (), settings=SHORTEST[:2], with_classifiers=False).model
        assert sd.tl.generate(free, 5).n_obs == 5


class TestSettings:
    def test_they_are_the_published_ones_but_for_the_steps_and_one_rate(self):
        parts = {part: loop_config(part, 5000, architecture="published") for part in ("autoencoder", "denoiser")}
        parts["classifier"] = loop_config("classifier", 5000, architecture="published")
        assert {c.training.batch_size for c in parts.values()} == {128}
        assert [c.optim.lr for c in parts.values()] == [5e-4, 1e-3, 3e-4]
        assert [c.optim.weight_decay for c in parts.values()] == [0.01, 1e-4, 0.0]
        assert [c.optim.schedule for c in parts.values()] == ["constant", "linear", "constant"]
        assert [c.optim.ema_decay for c in parts.values()] == [0.0, 0.9999, 0.0]
        assert parts["denoiser"].optim.final_lr_ratio == 0.0


class TestScimilarity:
    @pytest.fixture
    def start(self, model, tmp_path) -> Path:
        """A folder in SCimilarity's layout with the weights of an autoencoder that was trained."""
        from scdiva.models.scdiffusion.scimilarity import _names_of

        own = model.networks.autoencoder.state_dict()
        (tmp_path / "theirs").mkdir()
        for part in ("encoder", "decoder"):
            state = {theirs: own[ours].clone() for theirs, ours in _names_of(part).items()}
            torch.save({"state_dict": state}, tmp_path / "theirs" / f"{part}.ckpt")
        (tmp_path / "theirs" / "gene_order.tsv").write_text("\n".join(model.vocabulary.symbol.tolist()))
        return tmp_path / "theirs"

    def test_training_starts_there_and_the_bundle_says_so(self, start, model, cells, tmp_path):
        import csv

        fitted = fit(cells, out=tmp_path / "run", settings=SHORTEST, scimilarity=start)
        record = ScDiffusion.from_pretrained(tmp_path / "run" / "bundle").details["scimilarity"]
        assert record["n_genes_loaded"] == record["n_genes"] == model.vocabulary.n_genes
        assert record["skipped"] == {}
        with (tmp_path / "run" / "autoencoder" / "log.csv").open() as file:
            first = next(float(row["loss"]) for row in csv.DictReader(file) if "heldout" in row.values())
        assert first == pytest.approx(model.details["metrics"]["heldout_autoencoder_loss"], rel=0.02)
        assert fitted.model.details["scimilarity"] == record
        with pytest.raises(TrainingError):
            fit(cells, out=tmp_path / "run", settings=SHORTEST)


class TestEvaluation:
    def test_the_generator_gives_cells_of_every_label(self, cells, tmp_path, monkeypatch):
        monkeypatch.setitem(PRESETS, "parity", SMALL)
        named = generator_of("scdiffusion_parity", "cell_type", settings=SHORTEST, folder=tmp_path)
        made = named(cells, {"type 0": 3, "type 2": 2}, 1)
        assert made.obs["cell_type"].tolist() == ["type 0"] * 3 + ["type 2"] * 2
        assert set(made.var_names) <= set(cells.var_names)
        assert [p.name for p in tmp_path.iterdir()] == ["scdiffusion_parity-seed-1"]
        same = scdiffusion_parity_generator("cell_type", settings=SHORTEST, folder=tmp_path)(cells, {"type 1": 4}, 1)
        assert same.n_obs == 4
