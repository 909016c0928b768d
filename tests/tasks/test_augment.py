"""Rare types filled up with generated cells: what is added, what stays, what is refused."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scdiva as sd
from scdiva.config import ScDiffusionConfig
from scdiva.data.conditions import ConditionLabels
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, KeyNotFoundError, ScdivaError, UnsupportedError
from scdiva.tasks import augment as task
from scdiva.tasks.scdiffusion import fit_scdiffusion

SMALL = ScDiffusionConfig(n_latent=6, n_hidden=32, width=48, n_blocks=2, classifier_width=24)
SHORT = ("autoencoder.training.max_steps=600", "denoiser.training.max_steps=500", "denoiser.optim.lr=3e-3")


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    """Three types, of which type 2 has 20 cells; five cells are not labelled."""
    cells = synthetic_cells(400, 200, n_types=3, mean_depth=500.0, seed=2)
    rare = np.flatnonzero(cells.obs["cell_type"] == "type 2")[20:]
    cells = cells[np.setdiff1d(np.arange(400), rare)].copy()
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "type 0")[:5]] = "unassigned"
    cells.obs["cell_type"] = pd.Categorical(labels)
    cells.obs["is_good"] = True
    cells.obs["age"] = 30
    return cells


@pytest.fixture(scope="module")
def model(cells):
    return fit_scdiffusion(
        cells, ["cell_type"], config=SMALL, settings=SHORT, with_classifiers=False, progress=False, device="cpu"
    ).model


@pytest.fixture(scope="module")
def augmented(model, cells) -> ad.AnnData:
    return sd.tl.augment(cells, "cell_type", target=100, model=model)


def test_real_cells_come_first_and_are_unchanged(augmented, cells):
    real = augmented[: cells.n_obs]
    assert real.obs_names.tolist() == cells.obs_names.tolist()
    np.testing.assert_array_equal(real.X.toarray(), cells[:, augmented.var_names].X.toarray())
    assert real.obs["cell_type"].astype(str).tolist() == cells.obs["cell_type"].astype(str).tolist()
    assert not real.obs["scdiva_synthetic"].any()


def test_generated_cells_fill_up_their_type_and_are_marked(augmented, cells):
    made = augmented[cells.n_obs :]
    assert made.obs["cell_type"].tolist() == ["type 2"] * 80
    assert made.obs["scdiva_synthetic"].all()
    assert made.obs_names.str.startswith("scdiva_synthetic_").all()
    assert augmented.obs_names.is_unique
    assert made.obs[["age", "is_good"]].isna().all().all()
    assert augmented.X.dtype == np.int32
    record = augmented.uns["scdiva"]["augment"]
    assert record["types"] == ["type 0", "type 1", "type 2"]
    assert record["n_generated"] == [0, 0, 80]
    assert record["n_real"][2] == 20
    assert record["target"][2] == 100
    assert not record["fitted_here"]


def test_generated_cells_are_of_their_type(model, cells):
    augmented = sd.tl.augment(cells, "cell_type", target=100, model=model, weight=4.0)
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    real, made = log_profiles(augmented[: cells.n_obs]), log_profiles(augmented[cells.n_obs :])
    centres = np.stack([real[labels == f"type {i}"].mean(axis=0) for i in range(3)])
    nearest = np.linalg.norm(made[:, None] - centres, axis=2).argmin(axis=1)
    assert (nearest == 2).mean() > 0.8


def log_profiles(cells: ad.AnnData) -> np.ndarray:
    x = cells.X.toarray()
    return np.log1p(1e3 * x / x.sum(axis=1, keepdims=True))


def test_equal_seeds_give_equal_cells(augmented, model, cells):
    again = sd.tl.augment(cells, "cell_type", target={"type 2": 100}, model=model)
    assert (augmented.X != again.X).nnz == 0
    other = sd.tl.augment(cells, "cell_type", target={"type 2": 100}, model=model, seed=1)
    assert (augmented.X != other.X).nnz > 0


@pytest.mark.parametrize(("target", "n"), [("max", 1), ("median", 1), ({"type 1": 200}, 1), (200, 3)])
def test_targets(target, n, model, cells):
    out = sd.tl.augment(cells, "cell_type", target=target, model=model)
    sizes = cells.obs["cell_type"].value_counts()
    largest, middle = sizes[["type 0", "type 1"]].max(), sizes[["type 0", "type 1"]].min()
    wanted = {"max": largest, "median": middle}.get(target, 200) if isinstance(target, str) else 200
    after = out.obs["cell_type"].value_counts()
    filled = [name for name in ("type 0", "type 1", "type 2") if after[name] > sizes[name]]
    assert len(filled) >= n
    assert all(after[name] == wanted for name in filled)
    assert after["unassigned"] == 5


def test_a_model_is_fitted_where_none_is_given(cells, monkeypatch):
    def short(data, conditions, out_dir, **options):
        return fit_scdiffusion(data, conditions, out_dir, config=SMALL, settings=SHORT[:1], progress=False, **options)

    monkeypatch.setattr(task, "fit_scdiffusion", short)
    out = sd.tl.augment(cells, "cell_type", target={"type 2": 25}, device="cpu")
    assert out.n_obs == cells.n_obs + 5
    assert out.uns["scdiva"]["augment"]["fitted_here"]


def test_genes_that_one_side_lacks_are_left_out_and_counted(model, cells):
    fewer = cells[:, 7:].copy()
    out = sd.tl.augment(fewer, "cell_type", target={"type 2": 25}, model=model)
    assert set(out.var_names) <= set(fewer.var_names)
    assert any("genes of the model are not in the data" in note for note in out.uns["scdiva"]["augment"]["notes"])
    extra = synthetic_cells(cells.n_obs, 240, n_types=3, seed=3)
    extra.obs_names = cells.obs_names
    more = ad.AnnData(cells.X, obs=cells.obs, var=cells.var)
    names = [name for name in extra.var_names if name not in set(cells.var_names)]
    if names:
        more = ad.concat([more, extra[:, names]], axis=1, merge="first")
        more.obs = cells.obs
        out = sd.tl.augment(more, "cell_type", target={"type 2": 25}, model=model)
        assert not set(names) & set(out.var_names)
        assert any("not in the model" in note for note in out.uns["scdiva"]["augment"]["notes"])


def test_the_result_can_be_written_and_is_not_augmented_again(augmented, model, tmp_path):
    augmented.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(ConfigError, match="generated cells"):
        sd.tl.augment(tmp_path / "a.h5ad", "cell_type", target=500, model=model)


def test_the_record_keeps_labels_with_a_slash(model, cells, tmp_path, monkeypatch):
    """A key with "/" would be a group of the file."""
    slashed = cells.copy()
    slashed.obs["cell_type"] = slashed.obs["cell_type"].astype(str).str.replace("type 2", "NK/T cell")
    labels = ConditionLabels.from_dict({"cell_type": ["type 0", "type 1", "NK/T cell"]})
    monkeypatch.setattr(model, "labels", labels)
    out = sd.tl.augment(slashed, "cell_type", target={"NK/T cell": 25}, model=model)
    out.write_h5ad(tmp_path / "a.h5ad")
    record = ad.read_h5ad(tmp_path / "a.h5ad").uns["scdiva"]["augment"]
    assert dict(zip(record["types"], record["n_generated"], strict=True)) == {"NK/T cell": 5, "type 0": 0, "type 1": 0}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"label_key": "celltype"}, KeyNotFoundError, "cell_type"),
        ({"target": 0}, ConfigError, "target=0"),
        ({"target": "mean"}, ConfigError, "'mean'"),
        ({"target": {"type 7": 100}}, KeyNotFoundError, "type 7"),
        ({"target": 2}, ConfigError, "no type of cell_type is below the target; the rarest is type 2 with 20"),
        ({"label_key": "batch", "target": 500}, UnsupportedError, "takes no condition batch"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"model": None, "weight": -1.0}, ConfigError, "guidance weight -1.0"),
    ],
)
def test_refused(options, error, words, model, cells):
    given = {"label_key": "cell_type", "target": 100, "model": model, **options}
    with pytest.raises(error, match=words):
        sd.tl.augment(cells, given.pop("label_key"), **given)


def test_types_of_a_few_cells_or_unknown_to_the_model_are_refused_by_name(model, cells):
    labels = cells.obs["cell_type"].astype(str).to_numpy()
    labels[np.flatnonzero(labels == "type 2")[:4]] = "odd one"
    odd = cells.copy()
    odd.obs["cell_type"] = pd.Categorical(labels)
    with pytest.raises(ConfigError, match=r"fewer than 10 cells: 'odd one' \(4\)"):
        sd.tl.augment(odd, "cell_type", target=50)
    with pytest.raises(UnsupportedError, match="does not know cell_type odd one"):
        sd.tl.augment(odd, "cell_type", target=50, model=model)


def test_another_family_is_refused(tiny_model, cells):
    with pytest.raises(ScdivaError, match="latent diffusion"):
        sd.tl.augment(cells, "cell_type", target=50, model=tiny_model)
