"""Cells on the way from one label to another: where paths begin and end, what is mixed, what is refused."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import scdiva as sd
from scdiva.config import ScDiffusionConfig
from scdiva.data.reader import open_counts
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, KeyNotFoundError, UnsupportedError
from scdiva.models.scdiffusion import ScDiffusion
from scdiva.models.scdiffusion.model import build_networks
from scdiva.models.scdiffusion.sampling import slerp
from scdiva.tasks.interpolate import linear_weights, mix_counts
from scdiva.tasks.scdiffusion import fit_scdiffusion

TYPES = ("type 0", "type 1", "type 2")
SMALL = ScDiffusionConfig(n_latent=6, n_hidden=32, width=48, n_blocks=2, classifier_width=24)
SHORT = (
    "autoencoder.training.max_steps=300",
    "denoiser.training.max_steps=500",
    "denoiser.optim.lr=3e-3",
    "classifier.training.max_steps=150",
)
METHODS = ("gradient", "slerp", "linear")


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return synthetic_cells(400, 200, n_types=3, mean_depth=500.0, seed=2)


@pytest.fixture(scope="module")
def model(cells):
    return fit_scdiffusion(cells, ["cell_type"], config=SMALL, settings=SHORT, progress=False, device="cpu").model


def between(model, cells, **options) -> ad.AnnData:
    return sd.tl.interpolate(
        model, cells, **{"source": "type 0", "target": "type 2", "steps": 5, "n_cells": 40, **options}
    )


def called(generated: ad.AnnData, real: ad.AnnData) -> np.ndarray:
    """The type of each cell by the likelihood of its counts under the mean profiles of real cells."""
    real = real[:, generated.var_names]
    total = [np.asarray(real[(real.obs["cell_type"] == t).to_numpy()].X.sum(axis=0)).ravel() + 0.5 for t in TYPES]
    log_share = np.log(np.stack([x / x.sum() for x in total]))
    return np.array(TYPES)[np.argmax(generated.X @ log_share.T, axis=1)]


class TestPaths:
    @pytest.mark.parametrize(
        "options",
        [
            {"method": "gradient", "strength": 2.0},
            {"method": "gradient", "from_noise": True},
            {"method": "slerp"},
            {"method": "linear"},
        ],
    )
    def test_they_go_from_one_type_to_the_other(self, options, model, cells):
        path = between(model, cells, **options)
        assert path.n_obs == 200
        assert path.X.dtype == np.int32
        assert path.obs["scdiva_position"].unique().tolist() == [0, 0.25, 0.5, 0.75, 1]
        assert path.obs["scdiva_method"].unique().tolist() == [options["method"]]
        assert path.obs["scdiva_path"].value_counts().tolist() == [5] * 40
        types = called(path, cells).reshape(5, 40)
        of_source, of_target = (types == "type 0").mean(axis=1), (types == "type 2").mean(axis=1)
        assert of_source[0] > 0.9
        assert of_target[-1] > 0.7
        assert (np.diff(of_target) >= -0.1).all()
        again = between(model, cells, **options)
        assert (path.X != again.X).nnz == 0
        assert (path.X != between(model, cells, **options, seed=1).X).nnz > 0

    @pytest.mark.parametrize("method", METHODS)
    def test_they_are_of_named_real_cells_of_both_ends(self, method, model, cells):
        path = between(model, cells, method=method)
        label = cells.obs["cell_type"].astype(str)
        for name in path.obs["scdiva_source_cell"]:
            assert label[name] == "type 0"
        first = path[path.obs["scdiva_path"] == "7"]
        assert first.obs["scdiva_source_cell"].nunique() == 1
        if method == "gradient":
            assert "scdiva_target_cell" not in path.obs
            return
        for name in path.obs["scdiva_target_cell"]:
            assert label[name] == "type 2"
        # pairs are alike in depth
        depth = np.asarray(cells.X.sum(axis=1)).ravel()
        rows = [cells.obs_names.get_indexer(path.obs[f"scdiva_{end}_cell"][:40]) for end in ("source", "target")]
        order = [np.argsort(depth[r], kind="stable") for r in rows]
        assert (np.diff(depth[rows[1]][order[0]]) >= 0).all()

    def test_gradient_needs_no_target_cells(self, model, cells):
        only_source = cells[(cells.obs["cell_type"] == "type 0").to_numpy()].copy()
        assert between(model, only_source).n_obs == 200
        with pytest.raises(KeyNotFoundError, match="no cell whose cell_type is 'type 2'"):
            between(model, only_source, method="slerp")

    def test_few_cells_go_around(self, model, cells):
        few = cells[np.flatnonzero(cells.obs["cell_type"] == "type 0")[:3]].copy()
        path = between(model, few, n_cells=7)
        assert path.obs["scdiva_source_cell"].nunique() == 3

    def test_weights_can_be_given(self, model, cells):
        plain = between(model, cells)
        same = between(model, cells, weights=[(4 * (1 - p), 4 * p) for p in (0, 0.25, 0.5, 0.75, 1)])
        assert (plain.X != same.X).nnz == 0
        stay = between(model, cells, weights=[(2, 0)] * 5)
        assert (called(stay, cells) == "type 0").mean() > 0.9
        assert stay.uns["scdiva"]["interpolate"]["weights"].shape == (5, 2)

    def test_the_end_of_slerp_is_the_target_cell_itself_if_there_is_hardly_any_noise(self, model, cells):
        path = between(model, cells, method="slerp", start_time=0.02, steps=2)
        read = open_counts(cells, model.vocabulary)
        for end, rows in (("source", slice(0, 40)), ("target", slice(40, 80))):
            index = cells.obs_names.get_indexer(path.obs[f"scdiva_{end}_cell"][rows])
            np.testing.assert_allclose(path.obsm["X_scdiffusion"][rows], model.encode(read.read(index)), atol=0.5)

    def test_the_record(self, model, cells, tmp_path):
        path = between(model, cells, method="slerp")
        path.write_h5ad(tmp_path / "a.h5ad")
        record = ad.read_h5ad(tmp_path / "a.h5ad").uns["scdiva"]["interpolate"]
        assert (record["method"], record["field"], record["start_time"]) == ("slerp", "cell_type", 0.5)
        assert "weights" not in record

    @pytest.mark.parametrize(("schedule", "time", "method"), [("cosine", 0.9, "dpm"), ("linear", 0.6, "ddpm")])
    def test_what_is_left_out_goes_by_the_schedule(self, schedule, time, method, model, cells, monkeypatch):
        monkeypatch.setattr(model, "config", model.config.model_copy(update={"schedule": schedule, "n_times": 50}))
        record = between(model, cells, n_cells=2, steps=2).uns["scdiva"]["interpolate"]
        assert (record["start_time"], record["sampler"]["method"]) == (time, method)


class TestParts:
    def test_weights_fall_and_rise(self):
        np.testing.assert_allclose(linear_weights(3, 2.0), [[2, 0], [1, 1], [0, 2]])

    def test_slerp_keeps_lengths_and_meets_both_ends(self):
        a, b = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(slerp(a, b, 0.0), a)
        torch.testing.assert_close(slerp(a, b, 1.0), b)
        unit_a, unit_b = (x / x.norm(dim=1, keepdim=True) for x in (a, b))
        torch.testing.assert_close(slerp(unit_a, unit_b, 0.3).norm(dim=1), torch.ones(50))
        torch.testing.assert_close(slerp(a, a, 0.4), a)

    def test_mixed_counts_keep_depth_and_no_molecule_is_made_up(self):
        rng = np.random.default_rng(0)
        a, b = (sp.csr_matrix(rng.poisson(m, (60, 300)).astype(np.int32)) for m in (2.0, 3.0))
        for position in (0.0, 0.3, 1.0):
            mixed = mix_counts(a, b, position, rng)
            assert mixed.dtype == np.int32
            assert ((a + b - mixed).toarray() >= 0).all()
            total = np.asarray(mixed.sum(axis=1)).ravel()
            least = np.minimum(*(np.asarray(x.sum(axis=1)).ravel() for x in (a, b)))
            assert abs(total.mean() / least.mean() - 1) < 0.02
        assert (mix_counts(a, b, 0.0, rng) != a).nnz == 0  # the source is the shallower one

    def test_half_of_the_molecules_of_each(self):
        left = sp.csr_matrix(np.tile(np.array([[1000, 0]], dtype=np.int32), (200, 1)))
        right = sp.csr_matrix(np.tile(np.array([[0, 4000]], dtype=np.int32), (200, 1)))
        mixed = mix_counts(left, right, 0.5, np.random.default_rng(0)).toarray()
        np.testing.assert_allclose(mixed.mean(axis=0), [500, 500], rtol=0.02)


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"source": "type 9"}, KeyNotFoundError, "type 0"),
            ({"target": "type 0"}, ConfigError, "two different labels"),
            ({"steps": 1}, ConfigError, "steps=1"),
            ({"n_cells": 0}, ConfigError, "n_cells=0"),
            ({"start_time": 1.5}, ConfigError, "start_time"),
            ({"strength": 0.0}, ConfigError, "strength"),
            ({"field": "batch"}, KeyNotFoundError, "batch"),
            ({"method": "cubic"}, ConfigError, "gradient or slerp or linear"),
            ({"method": "linear", "start_time": 0.5}, ConfigError, "nothing is noised"),
            ({"method": "slerp", "strength": 1.0}, ConfigError, "gradient interpolation only"),
            ({"method": "slerp", "from_noise": True}, ConfigError, "gradient interpolation only"),
            ({"from_noise": True, "start_time": 0.5}, ConfigError, "one of the two"),
            ({"weights": [(1, 1)]}, ConfigError, "5 pairs"),
            ({"weights": [(1, 2), (1,)]}, ConfigError, "5 pairs"),
            ({"weights": [(1, 1)] * 5, "strength": 4.0}, ConfigError, "one of the two"),
            ({"sampler": sd.Sampler()}, ConfigError, "LatentSampler"),
            ({"weights": [(0, 0)] * 5}, ConfigError, "both weights are 0"),
            ({"weights": [(-1, 1)] * 5}, ConfigError, "0 or more"),
        ],
    )
    def test_impossible_wishes(self, options, error, words, model, cells):
        with pytest.raises(error, match=words):
            between(model, cells, **options)

    def test_cells_without_counts(self, model, cells):
        empty = cells.copy()
        x = cells.X.toarray()
        x[np.flatnonzero(cells.obs["cell_type"] == "type 0")[0]] = 0
        empty.X = sp.csr_matrix(x)
        with pytest.raises(ConfigError, match="no counts"):
            between(model, empty, n_cells=400)

    def test_another_family_or_no_classifier(self, model, tiny_model, cells):
        with pytest.raises(UnsupportedError, match="latent diffusion"):
            between(tiny_model, cells)
        sizes = model.config.model_copy(update={"classified": ()})
        bare = ScDiffusion(
            build_networks(model.vocabulary.n_genes, sizes, model.labels), sizes, model.vocabulary, model.statistics,
            labels=model.labels, population=model.population,
        )  # fmt: skip
        with pytest.raises(UnsupportedError, match="no classifier"):
            between(bare, cells)
        with pytest.raises(UnsupportedError, match="no classifier of cell_type"):
            between(bare, cells, field="cell_type")
        assert between(bare, cells, method="linear").n_obs == 200
