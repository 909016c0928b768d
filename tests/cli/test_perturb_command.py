"""``scdiva finetune --objective perturbation`` and ``scdiva perturb``, from file to file."""

from __future__ import annotations

import re

import anndata as ad
import numpy as np
import pytest

import scdiva as sd
from conftest import files_under
from perturbation_models import native_model, simulated

KEYS = ("--perturbation-key", "perturbation", "--control", "control")
SIMPLE = ("--set", "network=false")


@pytest.fixture(scope="module")
def screen():
    return simulated(n_pairs=6, n_control=60, n_cells=20)


@pytest.fixture(scope="module")
def folder(screen, tmp_path_factory):
    """``screen.h5ad``, ``control.h5ad`` and ``base``, a native model."""
    folder = tmp_path_factory.mktemp("perturb")
    adata = screen.to_adata()
    adata.write_h5ad(folder / "screen.h5ad")
    adata[adata.obs["perturbation"] == "control"].copy().write_h5ad(folder / "control.h5ad")
    native_model(screen.vocabulary, screen.data.cells).save_pretrained(folder / "base")
    return folder


@pytest.fixture(scope="module")
def bundle_path(screen, folder):
    from scdiva.models.scdiva import ScDiVa
    from scdiva.tasks.fit_perturbation import PerturbationTraining
    from scdiva.tasks.perturb import finetune_perturbation

    finetune_perturbation(
        folder / "screen.h5ad",
        ScDiVa.from_pretrained(folder / "base", device="cpu"),
        folder / "run",
        perturbation_key="perturbation",
        control=["control"],
        options=PerturbationTraining(network=False),
        progress=False,
    )
    return folder / "run" / "bundle"


@pytest.fixture
def finetune(cli, folder, tmp_path):
    def run(*options, out=tmp_path / "run"):
        return cli("finetune", folder / "screen.h5ad", "--model", folder / "base", "--out", out, *options)

    return run


def test_fine_tuning_is_that_of_python(finetune, bundle_path, folder, tmp_path):
    done = finetune("--objective", "perturbation", *KEYS, *SIMPLE, "--name", "mine")
    assert done.code == 0, done.err
    assert "18 conditions" in done.out
    assert re.search(r"left_out_single_pearson_delta +-?0\.\d{4}   floor -?0\.\d{4}", done.out)
    assert f"next:  scdiva perturb CONTROL_CELLS OUT.h5ad --model {tmp_path / 'run' / 'bundle'}" in done.out
    ours, theirs = (sd.load_model(path, device="cpu") for path in (tmp_path / "run" / "bundle", bundle_path))
    assert ours.name == "mine"
    asked = [p.name for p in theirs.perturbations[:2]]
    one, other = (sd.tl.perturb(folder / "control.h5ad", model, asked) for model in (ours, theirs))
    assert np.array_equal(one.X, other.X)


def test_a_perturbation_key_alone_says_what_is_meant_and_a_network_is_told_of(finetune, folder, tmp_path, cli):
    done = finetune(*KEYS, "--set", "max_steps=2", "--set", "perturbation.n_trained_layers=1", "--seed", "3")
    assert done.code == 0, done.err
    assert "network: " in done.out
    model = sd.load_model(tmp_path / "run" / "bundle", device="cpu")
    assert model.details["options"]["max_steps"] == 2
    assert model.details["fine_tuning"]["seed"] == 3
    assert len(model.networks) == 1
    shown = cli("inspect", tmp_path / "run" / "bundle")
    assert shown.code == 0, shown.err
    assert "scdiva-perturbation" in shown.out
    again = finetune(*KEYS)
    assert again.code == 2
    assert "exists" in again.err


def test_excluded_perturbations_are_not_learned(finetune, tmp_path, screen):
    name = sorted(screen.pathway)[0]
    done = finetune(*KEYS, *SIMPLE, "--exclude", name)
    assert done.code == 0, done.err
    assert name not in {p.name for p in sd.load_model(tmp_path / "run" / "bundle", device="cpu").perturbations}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--objective", "perturbation"), "perturbation"),
        ((*KEYS, "--objective", "pretrain"), "--perturbation-key, --control with --objective pretrain"),
        (("--control", "control"), "--control with --objective pretrain"),
        ((*KEYS, "--condition", "cell_type"), "--condition"),
        ((*KEYS, "--only-measured-genes"), "--only-measured-genes"),
        ((*KEYS, "--set", "steps=3"), "--set steps=3"),
        ((*KEYS, "--set", "max_steps"), "--set max_steps"),
        ((*KEYS, "--set", "max_steps=many"), "a whole number"),
        ((*KEYS, "--set", 'max_steps="3"'), "a whole number"),
        ((*KEYS, "--set", "max_steps=1.5"), "a whole number"),
        ((*KEYS, "--set", "max_steps=true"), "a whole number"),
        ((*KEYS, "--set", "network=1"), "true or false"),
        ((*KEYS, "--set", "lr=fast"), "a number"),
        ((*KEYS, "--set", "max_targets=0"), "max_targets = 0"),
        (("--perturbation-key", "guide", "--control", "control"), "guide"),
        (("--perturbation-key", "perturbation", "--control", "ctrl"), "ctrl"),
        (("--layout", "none"), "layout"),
        ((*KEYS, "--context-key", "line"), "line"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(finetune, tmp_path, options, words):
    done = finetune(*options)
    assert done.code == 2
    assert words in " ".join(done.err.split())
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_trunk_is_refused(cli, folder, bundle, tmp_path):
    done = cli("finetune", folder / "screen.h5ad", "--model", bundle, "--out", tmp_path / "run", *KEYS)
    assert done.code == 2
    assert "Traceback" not in done.err


def test_a_file_and_python_give_the_same_effects(cli, folder, bundle_path, screen, tmp_path):
    first, second = sorted(screen.pathway)[:2]
    unseen = next(s for s in screen.vocabulary.symbol if s not in screen.pathway)
    asked = [first, f"{first}+{unseen}", second]
    out = tmp_path / "effects.h5ad"
    options = [o for name in asked for o in ("--perturbation", name)]
    command = ("perturb", folder / "control.h5ad", out, "--model", bundle_path, "--device", "cpu", *options)
    done = cli(*command, "--top", 2)
    assert done.code == 0, done.err
    written = ad.read_h5ad(out)
    ours = sd.tl.perturb(
        ad.read_h5ad(folder / "control.h5ad"), sd.load_model(bundle_path, device="cpu"), asked, n_top=2
    )
    assert np.array_equal(written.X, ours.X)
    assert written.obs.astype(str).equals(ours.obs.astype(str))
    assert all(np.array_equal(written.layers[name], ours.layers[name], equal_nan=True) for name in ours.layers)
    for name, row in ours.obs.iterrows():
        assert f"{name} ({row['question']}, from 60 cells): {row['top_genes']}" in done.out
    assert done.out.strip().endswith(str(out))
    assert cli(*command).code == 2  # it exists
    assert cli(*command, "--overwrite").code == 0


def test_control_cells_among_others(cli, folder, bundle_path, tmp_path):
    name = sd.load_model(bundle_path, device="cpu").perturbations[0].name
    effects = []
    for file, options in (("control.h5ad", ()), ("screen.h5ad", KEYS)):
        out = tmp_path / file
        done = cli("perturb", folder / file, out, "--model", bundle_path, "--perturbation", name, *options)
        assert done.code == 0, done.err
        effects.append(ad.read_h5ad(out).X)
    assert np.array_equal(*effects)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--perturbation", "nothing"), "no gene of this model's vocabulary"),
        (("--perturbation", "control"), "control is no perturbation"),
        (("--perturbation", "{0}", "--kind", "activation"), "no activation was in the training data"),
        (("--perturbation", "{0}", "--control", "control"), "perturbation_key"),
        (("--perturbation", "{0}", "--context-key", "line"), "line"),
        (("--perturbation", "{0}", "--kind", "deletion"), "deletion"),
        (("--perturbation", "{0}", "--top", "0"), "--top"),
        ((), "--perturbation"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    cli, folder, bundle_path, screen, tmp_path, options, words
):
    asked = [option.format(sorted(screen.pathway)[0]) for option in options]
    done = cli("perturb", folder / "control.h5ad", tmp_path / "out.h5ad", "--model", bundle_path, *asked)
    assert done.code == 2
    assert words in " ".join(done.err.replace("│", " ").split())
    assert not files_under(tmp_path)


def test_other_models_and_outputs_are_refused(cli, folder, bundle_path, tmp_path):
    asked = ("perturb", folder / "control.h5ad", tmp_path / "out.h5ad", "--perturbation", "STAT1", "--model")
    other = cli(*asked, folder / "base")
    assert other.code == 2
    assert "family" in other.err
    csv = cli(
        "perturb", folder / "control.h5ad", tmp_path / "out.csv", "--perturbation", "STAT1", "--model", bundle_path
    )
    assert csv.code == 2
    assert ".h5ad" in csv.err
    assert not files_under(tmp_path)


def test_help_says_what_the_options_mean(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = cli("perturb", "--help")
    assert shown.code == 0
    for words in ("--perturbation", "also an unseen one", "--context-key", "--control", "--kind", "mean changes"):
        assert words in shown.out, words
    shown = " ".join(cli("finetune", "--help").out.split())
    for words in ("perturbation", "--perturbation-key", "--exclude", "scdiva perturb", "gears, scperturb, replogle"):
        assert words in shown, words
