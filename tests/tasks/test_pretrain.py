"""Training end to end on tiny cells: a run by the command, resumed, adapted, used."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

import scdiva as sd
from conftest import files_under
from scdiva.config import LoopConfig, RunConfig, apply_overrides, load_config, parse_config
from scdiva.data.reader import open_counts
from scdiva.datasets import synthetic_cells
from scdiva.errors import ScdivaError, TrainingError
from scdiva.tasks.pretrain import adapt, adaptation_config, pretrain

TOML = """
name = "made-here"
description = "A model of synthetic cells."
licence = "cc0-1.0"
seed = 3

[data]
root = "ROOT"
heldout_fraction = 0.2
min_cells_per_gene = 5

[[data.files]]
path = "one.h5ad"
batch_key = "batch"
exclude_batches = ["batch 2"]
licence = "drawn at random"

[[data.files]]
path = "two.h5ad"

[model]
n_latent = 6
n_embedding = 6
n_hidden = 8

[optim]
lr = 5e-3
warmup_steps = 2
ema_decay = 0.5

[training]
max_steps = 12
batch_size = 32
validate_every = 4
checkpoint_every = 4
log_every = 2
device = "cpu"
precision = "fp32"
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two files with the same types of cells; the second lacks some genes."""
    folder = tmp_path_factory.mktemp("corpus")
    whole = synthetic_cells(260, 120, n_types=3, n_batches=3, mean_depth=500.0, seed=5)
    whole[:160].copy().write_h5ad(folder / "one.h5ad")
    whole[160:, :100].copy().write_h5ad(folder / "two.h5ad")
    (folder / "run.toml").write_text(TOML.replace("ROOT", str(folder)))
    return folder


@pytest.fixture(scope="module")
def config(corpus) -> RunConfig:
    return load_config(corpus / "run.toml", RunConfig)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """One finished run."""
    return pretrain(config, tmp_path_factory.mktemp("run") / "run", progress=False)


def log_without_times(path: Path) -> list[list[str]]:
    rows = [line.split(",") for line in path.read_text().splitlines()]
    keep = [i for i, name in enumerate(rows[0]) if name != "cells_per_s"]
    return [[row[i] for i in keep] for row in rows]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return sd.ScDiVa.from_pretrained(path, device="cpu").network.state_dict()


def assert_equal_weights(left: Path, right: Path) -> None:
    one, two = weights(left), weights(right)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_the_command_trains_a_model_that_the_next_command_uses(corpus, run, cli, tmp_path, monkeypatch):
    result = cli("pretrain", "--config", corpus / "run.toml", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    bundle = tmp_path / "run" / "bundle"
    assert str(bundle) in result.out
    assert "12 steps" in result.out
    assert_equal_weights(bundle, run.path)  # command and function are one code path, and runs repeat
    assert (tmp_path / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    told = cli("inspect", bundle)
    assert told.code == 0
    assert "made-here" in told.out
    embedded = cli("embed", corpus / "two.h5ad", tmp_path / "z.h5ad", "--model", bundle)
    assert embedded.code == 0
    assert ad.read_h5ad(tmp_path / "z.h5ad").obsm["X_scdiva"].shape == (100, 6)


def test_a_run_interrupted_and_resumed_equals_one_in_one_go(config, run, tmp_path):
    # a longer horizon must not change what was computed before, so the same configuration is interrupted instead
    import scdiva.tasks.pretrain as task

    class StoppedError(Exception):
        pass

    original = task.fit

    def interrupted(objective, collection, **options):
        calls = 0
        prepare = objective.prepare

        def counting(cells, rng):
            nonlocal calls
            calls += 1
            if calls > 9 + 3:  # some of these are held-out minibatches
                raise StoppedError
            return prepare(cells, rng)

        objective.prepare = counting
        return original(objective, collection, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "fit", interrupted)
        with pytest.raises((StoppedError, ScdivaError)):
            pretrain(config, tmp_path / "run", progress=False)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    assert not (tmp_path / "run" / "bundle").exists()
    resumed = pretrain(config, tmp_path / "run", progress=False)
    assert_equal_weights(resumed.path, run.path)
    assert log_without_times(resumed.fit.history) == log_without_times(run.fit.history)
    assert resumed.metrics == run.metrics


def test_a_finished_run_is_not_trained_again(config, run):
    before = (run.path / "manifest.json").read_bytes()
    again = pretrain(config, run.path.parent, progress=False)
    assert (again.path / "manifest.json").read_bytes() == before
    assert again.metrics == run.metrics


def test_a_folder_of_another_run_is_refused_and_left_alone(config, run):
    before = files_under(run.path.parent)
    with pytest.raises(TrainingError):
        pretrain(apply_overrides(config, ["optim.lr=1e-4"]), run.path.parent, progress=False)
    assert files_under(run.path.parent) == before


def test_the_bundle_tells_what_it_was_trained_on(corpus, run):
    model = sd.ScDiVa.from_pretrained(run.path, device="cpu")
    assert model.name == "made-here"
    assert model.n_latent == 6
    training = model.details["training"]
    one = ad.read_h5ad(corpus / "one.h5ad")
    n_kept = int((one.obs["batch"] != "batch 2").sum())
    first, second = training["sources"]
    assert (first["name"], first["n_cells"], first["licence"]) == ("one", n_kept, "drawn at random")
    assert (second["name"], second["n_cells"]) == ("two", 100)
    assert training["n_cells"] + training["n_heldout"] == n_kept + 100
    assert training["n_steps"] == 12
    assert training["n_cells_seen"] == 12 * 32
    assert training["heldout"].startswith("whole batches: ")
    assert model.details["trained_heads"] == ["anchor", "profile_decoder"]
    card = (run.path / "README.md").read_text()
    for words in (
        "made-here",
        "A model of synthetic cells.",
        "cc0-1.0",
        "drawn at random",
        "| two | 100 |",
        "not stated",
    ):
        assert words in card


def test_excluded_batches_are_never_seen(corpus, run):
    model = sd.ScDiVa.from_pretrained(run.path, device="cpu")
    files = [(corpus / "one.h5ad", "batch 2"), (corpus / "two.h5ad", None)]
    n_umis = 0
    for path, left_out in files:
        adata = ad.read_h5ad(path)
        kept = adata[adata.obs["batch"] != left_out] if left_out else adata
        n_umis += open_counts(kept.copy(), model.vocabulary).read(np.arange(kept.n_obs)).counts.sum()
    # the statistics are those of the cells that were trained on: fewer than all kept, and no others
    assert model.statistics.n_cells == model.details["training"]["n_cells"]
    assert 0.5 * n_umis < model.statistics.sum_counts.sum() < n_umis


def test_rare_genes_are_left_out_of_the_vocabulary(corpus, run):
    vocabulary = sd.ScDiVa.from_pretrained(run.path, device="cpu").vocabulary
    one, two = ad.read_h5ad(corpus / "one.h5ad"), ad.read_h5ad(corpus / "two.h5ad")
    detected = np.asarray((one[one.obs["batch"] != "batch 2"].X > 0).sum(axis=0)).ravel()
    detected[:100] += np.asarray((two.X > 0).sum(axis=0)).ravel()
    assert list(vocabulary.ensembl_id) == list(one.var["ensembl_id"][detected >= 5])


def test_the_model_is_not_worse_than_the_mean_profile_on_held_out_cells(run):
    assert run.metrics["heldout_profile_nll"] <= run.metrics["heldout_profile_nll_floor"]
    assert run.metrics == sd.ScDiVa.from_pretrained(run.path, device="cpu").details["metrics"]
    assert run.fit.best_value == pytest.approx(run.metrics["heldout_profile_nll"], rel=1e-6)


def test_a_random_start_trains_too(config, tmp_path):
    options = ["model.init=random", "training.max_steps=2", "training.validate_every=2"]
    trained = pretrain(apply_overrides(config, options), tmp_path / "run", progress=False)
    assert np.isfinite(trained.metrics["heldout_profile_nll"])


def test_another_seed_gives_another_model(config, run, tmp_path):
    other = pretrain(apply_overrides(config, ["seed=4"]), tmp_path / "run", progress=False)
    assert not torch.equal(weights(other.path)["encoder.weight"], weights(run.path)["encoder.weight"])


FAST = ["training.max_steps=6", "training.validate_every=3", "optim.warmup_steps=1", "training.precision=fp32"]


class TestAdaptation:
    @pytest.fixture
    def shifted(self, adata):
        """Cells in which some genes are much stronger than in the model's corpus."""
        counts = adata.X.toarray()
        counts[:, 40:60] *= 6
        adata.X = type(adata.X)(counts)
        return adata

    def test_the_command_adapts_and_the_base_stays(self, shifted, bundle, cli, tmp_path):
        shifted.write_h5ad(tmp_path / "mine.h5ad")
        before = files_under(bundle)
        options = [part for text in FAST for part in ("--set", text)]
        result = cli(
            "finetune", tmp_path / "mine.h5ad", "--out", tmp_path / "run", "--model", bundle, "--batch-key", "batch",
            *options,
        )  # fmt: skip
        assert result.code == 0, result.err
        assert files_under(bundle) == before
        adapted = sd.ScDiVa.from_pretrained(tmp_path / "run" / "bundle", device="cpu")
        base = sd.ScDiVa.from_pretrained(bundle, device="cpu")
        assert adapted.name == "tiny-adapted"
        assert adapted.details["training"]["base_model"] == "tiny"
        assert adapted.details["training"]["base_model_hash"] == base.bundle_hash
        assert adapted.vocabulary == base.vocabulary
        np.testing.assert_array_equal(adapted.statistics.entropy, base.statistics.entropy)
        assert "Started from tiny" in (tmp_path / "run" / "bundle" / "README.md").read_text()
        told = cli("inspect", tmp_path / "run" / "bundle", "--json")
        assert json.loads(told.out)["training"]["base_model"] == "tiny"

    def test_what_is_kept_is_never_worse_on_held_out_cells_than_the_start(self, shifted, tiny_model, tmp_path):
        config = apply_overrides(adaptation_config(120), [*FAST, "optim.lr=3.0"])  # a rate that ruins the model
        before = {name: tensor.clone() for name, tensor in tiny_model.network.state_dict().items()}
        trained = adapt(shifted, tiny_model, tmp_path / "run", config=config, progress=False)
        rows = [line.split(",") for line in trained.fit.history.read_text().splitlines()]
        column, split = rows[0].index("profile_nll"), rows[0].index("split")
        values = [float(row[column]) for row in rows[1:] if row[split] == "heldout"]
        assert trained.fit.best_value == pytest.approx(min(values), rel=1e-5)
        assert trained.fit.best_value <= values[0]
        for name, tensor in tiny_model.network.state_dict().items():
            assert torch.equal(tensor, before[name]), name

    def test_equal_calls_give_equal_models(self, shifted, tiny_model, tmp_path):
        config = apply_overrides(adaptation_config(120), FAST)
        for name in ("a", "b"):
            adapt(shifted, tiny_model, tmp_path / name, config=config, progress=False)
        assert_equal_weights(tmp_path / "a" / "bundle", tmp_path / "b" / "bundle")

    @pytest.mark.parametrize("n_cells", [2, 3, 9])
    def test_very_few_cells_are_enough(self, n_cells, adata, tiny_model, tmp_path):
        config = apply_overrides(adaptation_config(n_cells), FAST)
        trained = adapt(adata[:n_cells].copy(), tiny_model, tmp_path / "run", config=config, progress=False)
        cells = open_counts(adata, tiny_model.vocabulary).read(np.arange(3))
        assert np.isfinite(trained.model.embed(cells)).all()

    @pytest.mark.parametrize("n_cells", [1, 50, 500, 100_000])
    def test_the_recommended_settings_fit_the_size(self, n_cells):
        settings = adaptation_config(n_cells, seed=7)
        assert isinstance(settings, LoopConfig)
        assert settings.seed == 7
        assert settings.training.batch_size <= max(16, n_cells)


def test_the_shipped_configuration_is_valid_and_leaves_the_benchmark_donors_out():
    from conftest import REPOSITORY

    config = load_config(REPOSITORY / "configs" / "blood-tiny.toml", RunConfig)
    assert config.name == "scdiva-blood-tiny"
    names = [Path(file.path).stem for file in config.data.files]
    assert len(set(names)) == len(names)
    assert {"pbmc3k", "zheng_sorted7_3500", "frozen_pbmc_donorA", "pbmc68k_reduced_700"}.isdisjoint(names)
    ten_studies = next(file for file in config.data.files if "10study" in file.path)
    assert set(ten_studies.exclude_batches) == {"10x_6K", "10x_8K"}
    assert all(file.licence for file in config.data.files)


def test_a_corpus_of_one_batch_holds_cells_out(corpus, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    text = TOML[: TOML.index("[[data.files]]")].replace("ROOT", str(corpus)) + '[[data.files]]\npath = "two.h5ad"\n'
    rest = TOML[TOML.index("[model]") :].replace("max_steps = 12", "max_steps = 2")
    trained = pretrain(parse_config(text + rest), tmp_path / "run", progress=False)
    assert trained.model.details["training"]["heldout"].startswith("cells at random")
    assert trained.model.details["training"]["n_heldout"] == 20


def test_a_folder_that_adapted_to_other_cells_is_refused(tiny_model, adata, tmp_path):
    config = apply_overrides(adaptation_config(adata.n_obs), ["training.max_steps=2"])
    adapt(adata, tiny_model, tmp_path / "run", config=config, progress=False)
    adapt(adata, tiny_model, tmp_path / "run", config=config, progress=False)  # the same again returns at once
    other = adata.copy()
    other.X = other.X[::-1] * 2
    with pytest.raises(TrainingError, match="content of the files"):
        adapt(other, tiny_model, tmp_path / "run", config=config, progress=False)
