"""A latent diffusion from a file of counts to generated cells: fitted, resumed, extended, asked, refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scdiva as sd
from conftest import files_under
from scdiva.config import ScDiffusionConfig
from scdiva.data.outliers import cap_isolated
from scdiva.datasets import synthetic_cells
from scdiva.errors import (
    ConfigError,
    KeyNotFoundError,
    OutputError,
    ScaleError,
    ScdivaError,
    SourceError,
    TrainingError,
    UnsupportedError,
)
from scdiva.models.scdiffusion import ScDiffusion
from scdiva.tasks import latent_generation, scdiffusion
from scdiva.tasks.scdiffusion import FittedScDiffusion, add_classifier, fit_scdiffusion

TYPES = ("type 0", "type 1", "type 2")
SMALL = ScDiffusionConfig(n_latent=6, n_hidden=32, width=48, n_blocks=2, classifier_width=24)
SHORT = (
    "autoencoder.training.max_steps=300",
    "denoiser.training.max_steps=500",
    "denoiser.optim.lr=3e-3",
    "classifier.training.max_steps=150",
)
SHORTEST = [f"{part}.training.max_steps=2" for part in ("autoencoder", "denoiser", "classifier")]


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """400 cells of three types, with a column that is coarser than the type."""
    cells = synthetic_cells(400, 200, n_types=3, mean_depth=500.0, seed=2)
    cells.obs["state"] = np.where(cells.obs["cell_type"] == "type 0", "left", "right")
    return cells


def fit(data, conditions=("cell_type",), out=None, **options) -> FittedScDiffusion:
    options = {"config": SMALL, "settings": SHORT, "progress": False, "device": "cpu", **options}
    return fit_scdiffusion(data, conditions, out, **options)


@pytest.fixture(scope="module")
def run(cells, tmp_path_factory) -> tuple[FittedScDiffusion, Path]:
    folder = tmp_path_factory.mktemp("latent") / "run"
    return fit(cells, out=folder), folder


@pytest.fixture(scope="module")
def model(run) -> ScDiffusion:
    return run[0].model


def made(model, n_cells=30, **options) -> ad.AnnData:
    return sd.tl.generate(model, n_cells, **{"condition": {"cell_type": "type 1"}, **options})


def called(generated: ad.AnnData, real: ad.AnnData) -> np.ndarray:
    """The type of each cell by the likelihood of its counts under the mean profiles of real cells."""
    genes = [str(name) for name in generated.var_names]
    real = real[:, genes]
    log_share = np.log(
        np.stack([np.asarray(real[(real.obs["cell_type"] == t).to_numpy()].X.sum(axis=0)).ravel() + 0.5 for t in TYPES])
    )
    log_share -= np.log(np.exp(log_share).sum(axis=1, keepdims=True))
    return np.array(TYPES)[np.argmax(generated.X @ log_share.T, axis=1)]


class TestFit:
    def test_generated_cells_are_of_their_type_and_of_real_size(self, model, cells):
        for name in TYPES:
            generated = made(model, 60, condition={"cell_type": name})
            assert (called(generated, cells) == name).mean() > 0.9, name
            real = cells[(cells.obs["cell_type"] == name).to_numpy(), list(generated.var_names)].X
            real_depth, depth = (np.asarray(x.sum(axis=1)).ravel() for x in (real, generated.X))
            assert abs(np.log(np.median(depth) / np.median(real_depth))) < 0.2
            zeros_real, zeros = (1 - x.nnz / np.prod(x.shape) for x in (real, generated.X))
            assert abs(zeros - zeros_real) < 0.03

    def test_what_is_in_the_folder_and_in_the_model(self, run, cells):
        fitted, folder = run
        parts = {"autoencoder", "denoiser", "classifier-cell_type"}
        assert {p.name for p in folder.iterdir()} == {*parts, "bundle"}
        assert set(fitted.seconds) == parts
        assert set(fitted.metrics) == {f"heldout_{part}_loss" for part in parts}
        model = fitted.model
        assert model.labels.to_dict() == {"cell_type": list(TYPES)}
        assert model.config.fields == model.config.classified == ("cell_type",)
        record = model.details["training"]
        assert (record["n_cells"], record["n_heldout"]) == (360, 40)
        z = model.encode(_read(model, cells))
        assert np.abs(z.mean(axis=0)).max() < 0.3
        assert np.abs(z.std(axis=0) - 1).max() < 0.2

    def test_training_helps(self, run):
        import csv

        for part in ("autoencoder", "denoiser", "classifier-cell_type"):
            with (run[1] / part / "log.csv").open() as file:
                losses = [float(row["loss"]) for row in csv.DictReader(file) if "heldout" in row.values()]
            assert min(losses) < 0.97 * losses[0], part

    def test_the_same_call_takes_up_what_is_there(self, run, cells):
        fitted, folder = run
        before = {p: p.stat().st_mtime_ns for p in folder.glob("*/best.safetensors")}
        again = fit(cells, out=folder)
        assert again.model.weights_hash() == fitted.model.weights_hash()
        assert {p: p.stat().st_mtime_ns for p in folder.glob("*/best.safetensors")} == before

    def test_another_call_is_refused(self, run, cells):
        for options in ({"seed": 1}, {"config": SMALL.model_copy(update={"width": 24})}):
            with pytest.raises(TrainingError):
                fit(cells, out=run[1], **options)

    def test_another_autoencoder_under_a_finished_denoiser_is_refused(self, cells, tmp_path):
        fit(cells, out=tmp_path / "run", settings=SHORTEST)
        before = files_under(tmp_path)
        longer = ["autoencoder.training.max_steps=100", *SHORTEST[1:]]
        with pytest.raises(TrainingError, match=r"another training\.max_steps") as caught:
            fit(cells, out=tmp_path / "run", settings=longer)
        assert "another folder" in str(caught.value)
        assert files_under(tmp_path) == before
        shutil.rmtree(tmp_path / "run" / "autoencoder")
        with pytest.raises(TrainingError, match="other latents") as caught:
            fit(cells, out=tmp_path / "run", settings=longer)
        assert "another folder" in str(caught.value)

    def test_without_conditions_and_with_cells_of_unknown_type(self, cells):
        free = fit(cells, (), settings=SHORTEST[:2]).model
        assert sd.tl.generate(free, 5).n_obs == 5
        some = cells.copy()
        some.obs["cell_type"] = [t if i % 2 else "unknown" for i, t in enumerate(some.obs["cell_type"])]
        known = fit(some, settings=SHORTEST[:2], with_classifiers=False).model
        assert known.labels.to_dict() == {"cell_type": list(TYPES)}
        assert known.config.classified == ()


def _read(model, cells):
    from scdiva.data.reader import open_counts

    return open_counts(cells, model.vocabulary).read(np.arange(cells.n_obs))


class TestGenerate:
    def test_counts_labels_z_and_the_record(self, model):
        cells = made(model, 20, weight=2.0, guidance={"cell_type": 0.5}, seed=4, normalize=True)
        assert cells.shape == (20, model.vocabulary.n_genes)
        assert cells.X.dtype == np.int32
        assert cells.X.data.min() >= 1
        assert cells.obs["cell_type"].tolist() == ["type 1"] * 20
        assert cells.obs["scdiva_synthetic"].all()
        assert cells.obsm["X_scdiffusion"].shape == (20, 6)
        assert "log1p_cp10k" in cells.layers
        record = cells.uns["scdiva"]["generate"]
        assert record["guidance_weights"] == {"field": ["cell_type"], "weight": [2.0]}
        assert record["classifier_guidance"] == {"field": ["cell_type"], "scale": [0.5]}
        assert record["sampler"] == {"method": "dpm", "n_steps": 25, "eta": 0.0}
        assert record["seed"] == 4
        assert record["model_hash"] == model.bundle_hash

    def test_a_seed_gives_the_same_cells_in_memory_and_in_files(self, model, monkeypatch, tmp_path):
        monkeypatch.setattr(latent_generation, "GROUP", 8)
        one, same, other = made(model, seed=3), made(model, seed=3, batch_size=4), made(model, seed=5)
        assert (one.X != same.X).nnz == 0
        assert (one.X != other.X).nnz > 0
        assert len({one.X[i].toarray().tobytes() for i in range(30)}) == 30
        for kind in ("h5ad", "zarr"):
            path = tmp_path / f"cells.{kind}"
            sd.tl.generate_file(path, model, 30, condition={"cell_type": "type 1"}, seed=3)
            found = getattr(ad, f"read_{kind}")(path)
            assert (found.X != one.X).nnz == 0
            pd.testing.assert_frame_equal(found.obs, one.obs)
        with pytest.raises(OutputError, match="exists"):
            sd.tl.generate_file(path, model, 30)

    def test_every_setting_shows(self, model):
        usual = made(model)
        for options in (
            {"condition": {"cell_type": "type 2"}},
            {"condition": None},
            {"weight": 3.0},
            {"guidance": {"cell_type": 2.0}},
            {"n_umis": 900},
            {"sampler": sd.LatentSampler("ddim", 10)},
            {"sampler": sd.LatentSampler("ddim", 10, eta=1.0)},
            {"sampler": sd.LatentSampler("ddpm", 20)},
        ):
            assert (made(model, **options).X != usual.X).nnz > 0, options

    def test_a_table_and_given_depths(self, model, cells):
        labels = [*TYPES] * 10
        generated = made(model, None, condition=pd.DataFrame({"cell_type": labels}), n_umis=2000)
        assert generated.obs["cell_type"].tolist() == labels
        assert (called(generated, cells) == np.array(labels)).mean() > 0.9
        assert 1800 < np.asarray(generated.X.sum(axis=1)).mean() < 2200

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"n_cells": 0}, ConfigError, "n_cells=0"),
            ({"seed": -1}, ConfigError, "seed=-1"),
            ({"condition": {"cell_type": "type 9"}}, KeyNotFoundError, "type 0"),
            ({"condition": {"tissue": "lung"}}, KeyNotFoundError, "cell_type"),
            ({"weight": -1.0}, ConfigError, "0 or more"),
            ({"condition": None, "weight": {"cell_type": 2.0}}, ConfigError, "has no condition"),
            ({"condition": None, "weight": 2.0}, ConfigError, "without a condition"),
            ({"guidance": {"tissue": 2.0}}, KeyNotFoundError, "tissue"),
            ({"guidance": 2.0}, ConfigError, "a scale by field"),
            ({"n_umis": 0}, ConfigError, "smallest 0"),
            ({"n_genes": 5}, UnsupportedError, "n_genes"),
            ({"latent": "null"}, UnsupportedError, "latent"),
            ({"sampler": sd.Sampler()}, ConfigError, "LatentSampler"),
            ({"sampler": sd.LatentSampler(n_steps=0)}, ConfigError, "n_steps=0"),
        ],
    )
    def test_impossible_wishes(self, options, error, words, model):
        with pytest.raises(error, match=words):
            made(model, **options)

    def test_the_other_family_refuses_its_options(self, tiny_model):
        for options in ({"guidance": {"cell_type": 1.0}}, {"sampler": sd.LatentSampler()}):
            with pytest.raises(UnsupportedError, match="family scdiva"):
                sd.tl.generate(tiny_model, 3, **options)


class TestAddClassifier:
    def test_a_condition_is_added_and_guided_to_while_the_rest_stays(self, model, cells, tmp_path):
        larger = add_classifier(model, cells, "state", tmp_path, settings=SHORT[3:], device="cpu", progress=False).model
        assert larger.config.fields == ("cell_type",)
        assert larger.config.classified == ("cell_type", "state")
        assert larger.labels.labels("state") == ("left", "right")
        old, new = model.networks.state_dict(), larger.networks.state_dict()
        assert all(bool((new[name] == tensor).all()) for name, tensor in old.items())
        assert any(name.startswith("classifiers.1.") for name in new)
        left = sd.tl.generate(larger, 80, condition={"state": "left"}, guidance={"state": 2.0})
        right = sd.tl.generate(larger, 80, condition={"state": "right"}, guidance={"state": 2.0})
        assert (called(left, cells) == "type 0").mean() > 0.8
        assert (called(right, cells) == "type 0").mean() < 0.1
        both = sd.tl.generate(larger, 40, condition={"state": "right", "cell_type": "type 2"})
        assert (called(both, cells) == "type 2").mean() > 0.9
        unseen = sd.tl.generate(larger, 4, condition={"state": "left", "cell_type": "type 2"})
        assert "no training cell was" in unseen.uns["scdiva"]["generate"]["notes"][0]
        with pytest.raises(ConfigError, match="state"):
            sd.tl.generate(larger, 4, condition={"state": "left"}, weight={"state": 2.0})
        with pytest.raises(ConfigError, match="has a classifier of state"):
            add_classifier(larger, cells, "state")

    def test_the_folder_of_a_fit_keeps_its_model(self, run, cells):
        before = files_under(run[1])
        with pytest.raises(OutputError, match="run of a fit"):
            add_classifier(run[0].model, cells, "state", run[1])
        assert files_under(run[1]) == before

    def test_a_fit_does_not_replace_an_added_condition(self, model, cells, tmp_path):
        options = {"settings": SHORTEST[2:], "device": "cpu", "progress": False}
        add_classifier(model, cells, "state", tmp_path / "more", **options)
        with pytest.raises(OutputError, match="no run of"):
            fit(cells, out=tmp_path / "more", settings=SHORTEST)

    def test_settings_of_what_is_not_trained(self, model, cells):
        for part in ("autoencoder", "denoiser"):
            with pytest.raises(ConfigError, match=f"settings of the {part}"):
                add_classifier(model, cells, "state", settings=[f"{part}.training.max_steps=2"])

    def test_isolated_counts_are_set_back_as_in_a_fit(self, model, cells, monkeypatch):
        seen = []
        monkeypatch.setattr(scdiffusion, "cap_isolated", lambda cells: seen.append(cells) or cap_isolated(cells))
        add_classifier(model, cells, "state", settings=SHORTEST[2:], device="cpu", progress=False)
        assert [found.n_cells for found in seen] == [400]

    def test_fields_of_similar_names_have_folders_of_their_own(self, model, cells, tmp_path):
        options = {"settings": SHORTEST[2:], "device": "cpu", "progress": False}
        some = cells.copy()
        some.obs["my state"], some.obs["my/state"] = some.obs["state"], some.obs["state"].to_numpy()[::-1]
        for field in ("my state", "my/state"):
            add_classifier(model, some, field, tmp_path, **options)
        assert len(list(tmp_path.glob("classifier-my_state-*/best.safetensors"))) == 2

    def test_a_field_without_held_out_labels_is_refused_at_once(self, model, cells, tmp_path):
        some = cells.copy()
        some.obs["few"] = ["here" if i < 2 else "" for i in range(400)]
        with pytest.raises(ConfigError, match="2 of 400 cells have a label of few: 2 of the 360") as caught:
            add_classifier(model, some, "few", tmp_path / "run", min_cells=1)
        assert "--seed" in str(caught.value)
        with pytest.raises(ConfigError, match="label of few"):
            fit(some, ("cell_type", "few"), tmp_path / "run", min_cells=1)
        assert files_under(tmp_path) == {}


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ("few", ConfigError, "'rare one' \\(3\\)"),
            ("no column", KeyNotFoundError, "cell_type"),
            ("not counts", ScaleError, "X"),
            ("few cells", SourceError, "at least 50"),
            ("setting", ConfigError, "autoencoder or denoiser or classifier"),
            ("key", ConfigError, "max_step"),
            ("held-out share", ConfigError, "hold out the same 10%"),
            ("no classifiers", ConfigError, "where none is trained"),
        ],
    )
    def test_bad_input_leaves_nothing(self, change, error, words, cells, tmp_path):
        data, options = cells.copy(), {}
        if change == "few":
            labels = data.obs["cell_type"].astype(str).to_numpy()
            labels[:3] = "rare one"
            data.obs["cell_type"] = labels
        elif change == "no column":
            del data.obs["cell_type"]
        elif change == "not counts":
            data.X = data.X.astype(np.float32)
            data.X.data += np.random.default_rng(0).random(data.X.nnz, dtype=np.float32)
        elif change == "few cells":
            data = data[:40].copy()
            options = {"min_cells": 1}
        elif change == "held-out share":
            options = {"settings": ["denoiser.data.heldout_fraction=0.2"]}
        elif change == "no classifiers":
            options = {"with_classifiers": False}
        else:
            options = {"settings": ["trunk.lr=1" if change == "setting" else "denoiser.training.max_step=3"]}
        with pytest.raises(error, match=words) as caught:
            fit(data, out=tmp_path / "run", **options)
        assert isinstance(caught.value, ScdivaError)
        assert files_under(tmp_path) == {}

    def test_a_bundle_that_is_not_of_the_run(self, cells, bundle, tmp_path):
        (tmp_path / "run").mkdir()
        bundle.rename(tmp_path / "run" / "bundle")
        before = files_under(tmp_path)
        with pytest.raises(OutputError, match="no run of"):
            fit(cells, out=tmp_path / "run")
        assert files_under(tmp_path) == before
