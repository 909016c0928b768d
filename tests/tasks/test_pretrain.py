"""Training end to end on tiny cells: a run by the command, resumed, adapted, used."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch

import scdiva as sd
import twins
from conftest import files_under
from scdiva.config import (
    LoopConfig,
    NativeObjectiveConfig,
    OfficialConfig,
    RunConfig,
    apply_overrides,
    load_config,
    parse_config,
)
from scdiva.data.conditions import ConditionLabels
from scdiva.data.reader import open_counts
from scdiva.data.statistics import GeneStatistics
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, ScdivaError, TrainingError
from scdiva.models.scdiva.init import grow, simple_model
from scdiva.models.scdiva.model import build_network
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

[objective]
identity_weight = 0.0
value_weight = 0.0

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
    keep = [i for i, name in enumerate(rows[0]) if name not in ("cells_per_s", "tokens_per_s", "share_of_peak")]
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


class StoppedError(Exception):
    """Stands for a power failure."""


def interrupt(config: RunConfig, out: Path, after: int) -> None:
    """Start a run and stop it where a minibatch after the first ``after`` is prepared."""
    import scdiva.tasks.pretrain as task

    original = task.fit

    def interrupted(objective, collection, **options):
        calls = 0
        prepare = objective.prepare

        def counting(cells, rng):
            nonlocal calls
            calls += 1
            if calls > after:
                raise StoppedError
            return prepare(cells, rng)

        objective.prepare = counting
        return original(objective, collection, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "fit", interrupted)
        with pytest.raises((StoppedError, ScdivaError)):
            pretrain(config, out, progress=False)
    assert list((out / "checkpoints").iterdir())
    assert not (out / "bundle").exists()


def test_a_run_interrupted_and_resumed_equals_one_in_one_go(config, run, tmp_path):
    # a longer horizon must not change what was computed before, so the same configuration is interrupted instead
    interrupt(config, tmp_path / "run", after=9)
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
    name = "anchor.encoder.weight"
    assert not torch.equal(weights(other.path)[name], weights(run.path)[name])


TRUNK = """
name = "with-trunk"
seed = 3
start_from = "START"

[data]
root = "ROOT"
conditions = ["cell_type", "lane"]
heldout_fraction = 0.2

[[data.files]]
path = "one.h5ad"
batch_key = "batch"
exclude_batches = ["batch 2"]
conditions = { lane = "batch" }

[[data.files]]
path = "two.h5ad"

[model]
n_latent = 6
n_embedding = 6
n_hidden = 8

[model.trunk]
n_layers = 1
width = 12
n_heads = 2
n_hidden = 16
max_tokens = 40

[optim]
lr = 1e-2
warmup_steps = 2
ema_decay = 0.5

[training]
max_steps = 6
batch_size = 8
accumulate = 2
n_validation_cells = 24
validate_every = 3
checkpoint_every = 2
log_every = 2
device = "cpu"
precision = "fp32"
"""


@pytest.fixture(scope="module")
def trunk_config(corpus, run) -> RunConfig:
    return parse_config(TRUNK.replace("ROOT", str(corpus)).replace("START", str(run.path)))


@pytest.fixture(scope="module")
def trunk_run(trunk_config, tmp_path_factory):
    """A trunk on the finished run, with conditions, two minibatches per step."""
    return pretrain(trunk_config, tmp_path_factory.mktemp("trunk") / "run", progress=False)


class TestTrunk:
    def test_the_bundle_holds_trunk_labels_and_origin(self, corpus, run, trunk_run):
        model = sd.ScDiVa.from_pretrained(trunk_run.path, device="cpu")
        base = sd.ScDiVa.from_pretrained(run.path, device="cpu")
        assert model.name == "with-trunk"
        assert model.config.trunk.n_layers == 1
        types = ad.read_h5ad(corpus / "one.h5ad").obs["cell_type"].cat.categories
        assert model.labels.to_dict() == {"cell_type": list(types), "lane": ["batch 0", "batch 1"]}
        assert model.vocabulary == base.vocabulary
        np.testing.assert_array_equal(model.statistics.entropy, base.statistics.entropy)
        assert model.details["trained_heads"] == ["anchor", "profile_decoder", "identity", "value"]
        training = model.details["training"]
        assert (training["base_model"], training["base_model_hash"]) == ("made-here", base.bundle_hash)
        assert training["n_cells_seen"] == 6 * 2 * 8
        cells = open_counts(corpus / "two.h5ad", model.vocabulary).read(np.arange(7))
        assert model.embed(cells).shape == (7, 6)
        assert model.cell_state(cells).shape == (7, 18)

    def test_it_starts_at_the_base_and_at_the_floors(self, run, trunk_run):
        rows = [line.split(",") for line in trunk_run.fit.history.read_text().splitlines()]
        first = dict(zip(rows[0], next(row for row in rows[1:] if "heldout" in row), strict=True))
        assert first["step"] == "0"
        # the base learned nothing of identity: there the start is the floor
        for t in (0.1, 0.5, 0.9):
            floor = float(first[f"identity_nll_t{t}_floor"])
            assert float(first[f"identity_nll_t{t}"]) == pytest.approx(floor, abs=2e-5)
        assert float(first["profile_nll"]) < float(first["profile_nll_floor"])
        assert trunk_run.fit.best_value <= float(first["loss"]) + 1e-9
        for name in ("identity_nll_t0.5", "value_nll_t0.9", "value_mae_t0.1"):
            assert {f"heldout_{name}", f"heldout_{name}_floor"} <= set(trunk_run.metrics)

    def test_interrupted_between_minibatches_of_a_step_and_resumed_it_is_the_same(
        self, trunk_config, trunk_run, tmp_path
    ):
        interrupt(trunk_config, tmp_path / "run", after=9)
        resumed = pretrain(trunk_config, tmp_path / "run", progress=False)
        assert_equal_weights(resumed.path, trunk_run.path)
        assert log_without_times(resumed.fit.history) == log_without_times(trunk_run.fit.history)
        assert resumed.metrics == trunk_run.metrics

    def test_the_command_tells_terms_beside_their_floors(self, corpus, run, trunk_run, cli, tmp_path):
        (tmp_path / "run.toml").write_text(TRUNK.replace("ROOT", str(corpus)).replace("START", str(run.path)))
        result = cli("pretrain", "--config", tmp_path / "run.toml", "--out", tmp_path / "run")
        assert result.code == 0, result.err
        assert_equal_weights(tmp_path / "run" / "bundle", trunk_run.path)
        for name, value in trunk_run.metrics.items():
            if not name.endswith("_floor"):
                line = next(line for line in result.out.splitlines() if line.split()[:1] == [name])
                assert f"{value:.4f}" in line
                assert f"floor {trunk_run.metrics[name + '_floor']:.4f}" in line

    def test_on_other_cells_it_keeps_genes_and_ranking_of_the_base(self, trunk_config, run, tmp_path):
        options = ["training.max_steps=1", "data.conditions=[]", 'data.files=[{path="two.h5ad"}]']
        trained = pretrain(apply_overrides(trunk_config, options), tmp_path / "run", progress=False)
        assert trained.model.details["training"]["n_cells"] < 100
        assert trained.model.vocabulary == run.model.vocabulary
        np.testing.assert_array_equal(trained.model.statistics.entropy, run.model.statistics.entropy)
        assert trained.model.labels.n_fields == 0

    def test_a_model_of_other_sizes_is_no_start(self, trunk_config, tmp_path):
        with pytest.raises(ConfigError, match="made-here has null_latent") as caught:
            pretrain(apply_overrides(trunk_config, ["model.n_latent=5"]), tmp_path / "run", progress=False)
        assert "[model]" in str(caught.value)
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("heads", [4, 5])
    def test_a_width_that_no_head_divides_is_refused_when_the_settings_are_read(self, heads, trunk_config):
        with pytest.raises(ConfigError, match="multiple of twice n_heads"):
            apply_overrides(trunk_config, [f"model.trunk.n_heads={heads}"])

    def test_conditions_without_a_trunk_are_refused(self, config, tmp_path):
        with pytest.raises(ConfigError, match="cell_type"):
            pretrain(apply_overrides(config, ['data.conditions=["cell_type"]']), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    def test_finetuning_adds_labels_to_those_of_the_model(self, corpus, trunk_run, cli, adata, tmp_path):
        adata.obs["cell_type"] = adata.obs["cell_type"].cat.rename_categories({"type 1": "a new type"})
        adata.write_h5ad(tmp_path / "mine.h5ad")
        before = files_under(trunk_run.path)
        options = [
            part
            for text in [*FAST, "training.batch_size=16", "training.n_validation_cells=16"]
            for part in ("--set", text)
        ]
        result = cli(
            "finetune", tmp_path / "mine.h5ad", "--out", tmp_path / "run", "--model", trunk_run.path,
            "--condition", "cell_type", *options,
        )  # fmt: skip
        assert result.code == 0, result.err
        assert files_under(trunk_run.path) == before
        base, adapted = (
            sd.ScDiVa.from_pretrained(path, device="cpu") for path in (trunk_run.path, tmp_path / "run" / "bundle")
        )
        assert adapted.labels.fields == ("cell_type", "lane")
        assert adapted.labels.labels("cell_type") == (*base.labels.labels("cell_type"), "a new type")
        assert adapted.labels.labels("lane") == base.labels.labels("lane")
        assert "cell_type" in adapted.details["description"]
        assert "heldout_identity_nll_t0.5" in adapted.details["metrics"]

    def test_conditions_for_a_model_without_a_trunk_are_one_clear_error(self, bundle, h5ad, cli, tmp_path):
        arguments = ("finetune", h5ad, "--out", tmp_path / "run", "--model", bundle, "--condition", "cell_type")
        result = cli(*arguments)
        assert result.code == 2
        assert "cell_type" in result.err
        assert len(result.err.splitlines()) == 1
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "name"),
    [
        ("[model.trunk]\nlayout = 'sequence'", "sequence"),
        ("[model.trunk]\nvalue_likelihood = 'mse'\n[objective]\nvalue_weight = 10.0", "mse"),
        ("[model.trunk]\norder = 'random'\ndropout = 0.2", "random"),
        ("[model]\narchitecture = 'official'", "official"),
    ],
)
def test_every_variant_trains_and_loads(section, name, corpus, tmp_path):
    head = TRUNK[: TRUNK.index("[model]")].replace("ROOT", str(corpus)).replace('start_from = "START"\n', "")
    head = head.replace('conditions = ["cell_type", "lane"]\n', "").replace('conditions = { lane = "batch" }\n', "")
    sizes = "n_layers = 1\nwidth = 12\nn_heads = 2\nn_hidden = 16\nmax_tokens = 30\n"
    model = section.replace("]\n", f"]\n{sizes}", 1) + "\n"
    training = (
        TRUNK[TRUNK.index("[optim]") :]
        .replace("max_steps = 6", "max_steps = 2")
        .replace("validate_every = 3", "validate_every = 2")
    )
    settings = parse_config(head + model + training)
    trained = pretrain(settings, tmp_path / "run", progress=False)
    assert trained.metrics
    assert np.isfinite(list(trained.metrics.values())).all()
    model = sd.ScDiVa.from_pretrained(trained.path, device="cpu")
    assert model.config == settings.model
    cells = open_counts(corpus / "two.h5ad", model.vocabulary).read(np.arange(20))
    z = model.embed(cells)
    assert np.isfinite(z).all()
    assert z.std(axis=0).max() > 0
    assert model.details["trained_heads"] == (
        ["gene", "value"] if name == "official" else ["anchor", "profile_decoder", "identity", "value"]
    )


class TestBundledData:
    CONFIG = """
    [data]
    heldout_fraction = 0.01
    min_cells_per_gene = 200
    conditions = ["cell_type"]
    [[data.files]]
    path = "bundled:NAME"
    [model]
    n_latent = 4
    n_embedding = 4
    n_hidden = 8
    [model.trunk]
    n_layers = 1
    width = 8
    n_heads = 2
    n_hidden = 8
    max_tokens = 20
    [training]
    max_steps = 2
    batch_size = 8
    validate_every = 2
    n_validation_cells = 8
    device = "cpu"
    """

    def test_a_name_stands_for_the_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # a relative root must not matter
        trained = pretrain(parse_config(self.CONFIG.replace("NAME", "pbmc3k")), tmp_path / "run", progress=False)
        training = trained.model.details["training"]
        assert training["n_cells"] + training["n_heldout"] == sd.datasets.pbmc3k().n_obs
        assert training["sources"][0]["name"] == "pbmc3k"
        assert "CD4 T" in " ".join(trained.model.labels.labels("cell_type"))

    def test_an_unknown_name_is_refused(self, tmp_path):
        with pytest.raises(ScdivaError, match="pbmc3k"):
            pretrain(parse_config(self.CONFIG.replace("NAME", "brain")), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


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


class TestWhatTheModelKnowsIsKept:
    """Adapting a model must not take away what the new cells say nothing about."""

    LOOP = LoopConfig.model_validate(
        {
            "data": {"heldout_fraction": 0.2},
            "optim": {"lr": 1e-2, "warmup_steps": 1, "ema_decay": 0.5},
            "training": {"max_steps": 3, "batch_size": 16, "validate_every": 1, "device": "cpu", "precision": "fp32"},
        }
    )

    @pytest.fixture
    def few_genes(self, adata):
        return adata[:, :90].copy()

    def test_genes_that_the_cells_do_not_measure_keep_their_expression(self, few_genes, tiny_model, tmp_path):
        adapted = adapt(few_genes, tiny_model, tmp_path / "run", config=self.LOOP, progress=False).model
        reader = open_counts(few_genes, tiny_model.vocabulary, min_coverage=0.1)
        unmeasured = np.flatnonzero(~reader.alignment.is_measured)
        z = np.zeros((1, tiny_model.n_latent), dtype=np.float32)
        before, after = (model.expected_profile(z, unmeasured).sum() for model in (tiny_model, adapted))
        assert before > 1000
        assert after == pytest.approx(before, rel=0.2)

    def test_only_what_was_trained_counts_as_trained(self, adata, tiny_trunk_model, tmp_path):
        adapted = adapt(adata, tiny_trunk_model, tmp_path / "run", config=self.LOOP, progress=False).model
        assert adapted.details["trained_heads"] == ["anchor", "profile_decoder"]

    def test_a_frozen_anchor_keeps_every_embedding(self, adata, tiny_trunk_model, tmp_path):
        settings = NativeObjectiveConfig(freeze_anchor=True)
        adapted = adapt(
            adata, tiny_trunk_model, tmp_path / "run", config=self.LOOP, objective=settings,
            conditions=["cell_type", "batch"], progress=False,
        ).model  # fmt: skip
        cells = open_counts(adata, tiny_trunk_model.vocabulary).read(np.arange(20))
        np.testing.assert_array_equal(adapted.embed(cells), tiny_trunk_model.embed(cells))
        before = tiny_trunk_model.network.state_dict()
        after = adapted.network.state_dict()
        moved = {
            name for name in before if before[name].shape == after[name].shape and not before[name].equal(after[name])
        }
        assert "trunk.query_direction.weight" in moved
        assert not {name for name in moved if name.startswith("anchor.")}

    def test_a_frozen_anchor_and_nothing_else_to_train_is_refused(self):
        with pytest.raises(ValueError, match="nothing to train"):
            NativeObjectiveConfig(freeze_anchor=True, identity_weight=0.0, value_weight=0.0)

    def test_a_new_label_starts_as_an_unknown_one(self, adata, tiny_trunk_model):
        base = tiny_trunk_model
        labels = base.labels.merged(ConditionLabels((("cell_type", ("a new type",)),)))
        network = build_network(base.vocabulary.n_genes, base.config, labels).eval()
        grow(network, base, labels)
        cells = open_counts(adata, base.vocabulary).read(np.arange(10))
        new, unknown = (
            replace(cells, condition=np.full((10, 1), code, dtype=np.int32)) for code in (labels.sizes[0], 0)
        )
        with torch.inference_mode():
            found = [network(base.unmasked(c)).gene_logit_BG for c in (new, unknown)]
        assert torch.equal(*found)

    def test_a_restricted_model_says_the_same_of_the_genes_it_keeps(self, adata, tiny_trunk_model):
        is_kept = np.arange(tiny_trunk_model.vocabulary.n_genes) % 3 > 0
        smaller = tiny_trunk_model.restricted(is_kept)
        assert smaller.vocabulary.n_genes == is_kept.sum()
        assert smaller.provenance["model_hash"] == "not saved"
        z = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
        whole = tiny_trunk_model.expected_profile(z, np.flatnonzero(is_kept))
        part = smaller.expected_profile(z, np.arange(is_kept.sum()))
        np.testing.assert_allclose(part, 1e4 * whole / whole.sum(axis=1, keepdims=True), rtol=1e-4)

    def test_the_command_sets_the_loss_and_refuses_what_it_would_ignore(self, adata, tiny_trunk_model, cli, tmp_path):
        adata.write_h5ad(tmp_path / "mine.h5ad")
        tiny_trunk_model.save_pretrained(tmp_path / "base")
        start = ("finetune", tmp_path / "mine.h5ad", "--model", tmp_path / "base", "--condition", "batch")
        refused = cli(*start, "--out", tmp_path / "no", "--set", 'data.conditions=["batch"]')
        assert refused.code == 2
        assert "--condition" in refused.err
        fast = [part for text in (*FAST, "objective.freeze_anchor=true") for part in ("--set", text)]
        done = cli(*start, "--out", tmp_path / "run", *fast, "--name", "named", "--only-measured-genes")
        assert done.code == 0, done.err
        model = sd.ScDiVa.from_pretrained(tmp_path / "run" / "bundle", device="cpu")
        assert model.name == "named"
        assert model.labels.fields == ("cell_type", "batch")
        assert model.vocabulary.n_genes < tiny_trunk_model.vocabulary.n_genes


def test_a_gene_that_few_files_measure_is_as_frequent_as_where_it_is_measured():
    counts = np.random.default_rng(0).poisson(2.0, size=(400, 60))
    counts[40:, 3] = 0  # one file in ten has the gene
    cells = twins.cell_counts(counts)
    n_measured = np.where(np.arange(60) == 3, 40, 400)
    simple = simple_model(GeneStatistics.from_cells(cells), n_measured, counts.sum(axis=1))
    share = simple.log_profile_G.exp().numpy()
    assert share[3] == pytest.approx(1 / 60, rel=0.2)


def test_settings_of_the_loss_are_refused_for_the_official_model(config, tmp_path):
    official = OfficialConfig(architecture="official", n_layers=1, width=8, n_heads=2, n_hidden=8, max_tokens=16)
    with pytest.raises(ConfigError, match="official"):
        pretrain(config.model_copy(update={"model": official}), tmp_path / "run", progress=False)


def test_held_out_cells_that_the_first_stage_may_have_seen_are_told(trunk_config, tmp_path, caplog):
    other = apply_overrides(trunk_config, ["data.heldout_fraction=0.45", "training.max_steps=1"])
    with caplog.at_level(logging.WARNING):
        trained = pretrain(other, tmp_path / "run", progress=False)
    assert trained.model.details["training"]["heldout_may_be_known"]
    assert "may be of cells it was trained on" in caplog.text
