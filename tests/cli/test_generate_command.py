"""``scdiva generate`` and ``scdiva finetune --objective conditional``."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scdiva as sd
from conftest import files_under
from generating import generating

FAST = ("--steps", 3)


@pytest.fixture(scope="module")
def saved(tiny_trunk_model, _cells, tmp_path_factory):
    path = tmp_path_factory.mktemp("generator") / "bundle"
    generating(tiny_trunk_model, _cells).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(saved):
    return sd.ScDiVa.from_pretrained(saved, device="cpu")


def assert_equal_cells(left: ad.AnnData, right: ad.AnnData) -> None:
    assert (left.X != right.X).nnz == 0
    pd.testing.assert_frame_equal(left.obs, right.obs)


class TestGenerate:
    @pytest.mark.parametrize("kind", ["h5ad", "zarr"])
    def test_equals_python(self, kind, cli, saved, model, tmp_path):
        out = tmp_path / f"cells.{kind}"
        result = cli(
            "generate", out, "--model", saved, "-n", 15, "--condition", "cell_type=type 1:2.5", "--seed", 3,
            "--latent", "visible", "--grid", "uniform", "--gibbs-rounds", 1, "--n-umis", 500, *FAST, "--device", "cpu",
        )  # fmt: skip
        assert result.code == 0, result.err
        assert "15 cells (cell_type type 1)" in result.out
        found = getattr(ad, f"read_{kind}")(out)
        expected = sd.tl.generate(
            model, 15, condition={"cell_type": "type 1"}, weight=2.5, seed=3, latent="visible", n_umis=500,
            sampler=sd.Sampler(n_steps=3, grid="uniform", gibbs_rounds=1),
        )  # fmt: skip
        assert_equal_cells(found, expected)
        assert found.uns["scdiva"]["generate"]["guidance_weights"]["cell_type"] == 2.5
        assert found.uns["scdiva"]["generate"]["model_hash"] == model.bundle_hash

    def test_as_many_of_each_label(self, cli, saved, tmp_path):
        result = cli("generate", tmp_path / "o.h5ad", "--model", saved, "--each", "cell_type", "-n", 4, *FAST)
        assert result.code == 0, result.err
        assert "12 cells" in result.out
        labels = ad.read_h5ad(tmp_path / "o.h5ad").obs["cell_type"]
        assert labels.tolist() == [f"type {i}" for i in range(3) for _ in range(4)]

    def test_variations_of_a_file(self, cli, saved, model, h5ad, adata, tmp_path):
        result = cli("generate", tmp_path / "o.h5ad", "--model", saved, "--like", h5ad, "-n", 7, *FAST)
        assert result.code == 0, result.err
        expected = sd.tl.generate(model, 7, like=adata, sampler=sd.Sampler(n_steps=3))
        assert_equal_cells(ad.read_h5ad(tmp_path / "o.h5ad"), expected)

    def test_a_label_may_hold_colons_and_signs(self, cli, saved, tmp_path):
        from scdiva.cli.generate import _parse

        assert _parse(["a=x:y", "b=CD4+ T=helper", "c = 1:2:3", "d=x:0.5"], ()) == (
            {"a": "x:y", "b": "CD4+ T=helper", "c": "1:2", "d": "x"},
            {"c": 3.0, "d": 0.5},
        )

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--condition", "cell_type=type 9"), "type 0"),
            (("--condition", "tissue=lung"), "cell_type"),
            (("--condition", "type 1"), "FIELD=LABEL"),
            (("--condition", "cell_type="), "FIELD=LABEL"),
            (("--condition", "cell_type=type 1", "--condition", "cell_type=type 2"), "twice"),
            (("--condition", "cell_type=type 1:-2"), "0 or more"),
            (("--each", "tissue"), "cell_type"),
            (("--each", "cell_type", "--condition", "cell_type=type 1"), "one of the two"),
            (("--n-genes", "9999"), "at most 190"),
            (("--like", "absent.h5ad"), "does not exist"),
            (("--model", "no-such-model"), "is no model"),
        ],
    )
    def test_bad_input_is_one_line_and_writes_nothing(self, options, words, cli, saved, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        model = () if "--model" in options else ("--model", saved)
        result = cli("generate", tmp_path / "o.h5ad", *model, "-n", 3, *options)
        assert result.code == 2
        assert words in result.err
        assert len(result.err.splitlines()) == 1
        assert files_under(tmp_path) == {}

    @pytest.mark.parametrize(
        "options", [("-n", 0), ("--steps", 0), ("--seed", -1), ("--batch-size", "x"), ("--latent", "best")]
    )
    def test_numbers_that_cannot_be(self, options, cli, saved, tmp_path):
        result = cli("generate", tmp_path / "o.h5ad", "--model", saved, *options)
        assert result.code == 2
        assert files_under(tmp_path) == {}

    def test_a_bundle_without_a_population(self, cli, bundle, tmp_path):
        result = cli("generate", tmp_path / "o.h5ad", "--model", bundle, "-n", 3)
        assert result.code == 2
        assert "population.npz" in result.err
        assert not (tmp_path / "o.h5ad").exists()

    def test_an_output_that_exists(self, cli, saved, tmp_path):
        (tmp_path / "o.h5ad").write_text("precious")
        result = cli("generate", tmp_path / "o.h5ad", "--model", saved, "-n", 3)
        assert result.code == 2
        assert (tmp_path / "o.h5ad").read_text() == "precious"
        assert cli("generate", tmp_path / "o.h5ad", "--model", saved, "-n", 3, *FAST, "--overwrite").code == 0
        assert ad.read_h5ad(tmp_path / "o.h5ad").n_obs == 3

    def test_the_same_command_resumes(self, cli, saved, model, tmp_path, monkeypatch):
        from scdiva.tasks import generate as task

        monkeypatch.setattr(task, "GROUP", 8)
        monkeypatch.setattr(task, "BLOCK", 16)
        out, drawn, draw = tmp_path / "o.h5ad", [], sd.ScDiVa.draw

        def interrupted(self, wish, *arguments, **keywords):
            drawn.append(1)
            if len(drawn) == 4:
                raise KeyboardInterrupt
            return draw(self, wish, *arguments, **keywords)

        command = ("generate", out, "--model", saved, "-n", 40, *FAST, "--batch-size", 8)
        with monkeypatch.context() as patch:
            patch.setattr(sd.ScDiVa, "draw", interrupted)
            assert cli(*command).code == 130
        assert not out.exists()
        assert cli(*command).code == 0
        assert_equal_cells(ad.read_h5ad(out), sd.tl.generate(model, 40, sampler=sd.Sampler(n_steps=3)))
        assert [p.name for p in tmp_path.iterdir()] == ["o.h5ad"]


class TestConditionalFineTuning:
    SHORT = (
        "--set", "training.max_steps=2", "--set", "training.batch_size=16", "--set", "training.validate_every=1",
        "--set", "training.precision='fp32'", "--set", "training.device='cpu'",
    )  # fmt: skip

    def test_what_it_makes_can_generate(self, cli, saved, adata, tmp_path, monkeypatch):
        monkeypatch.setattr("scdiva.tasks.pretrain._SETTLING_CELLS", 32)
        adata.obs["lane"] = np.where(np.arange(120) % 2 == 0, "left", "right")
        adata.write_h5ad(tmp_path / "mine.h5ad")
        result = cli(
            "finetune", tmp_path / "mine.h5ad", "--model", saved, "--objective", "conditional", "--condition", "lane",
            "--out", tmp_path / "run", *self.SHORT,
        )  # fmt: skip
        assert result.code == 0, result.err
        bundle = tmp_path / "run" / "bundle"
        assert f"scdiva generate OUT.h5ad --model {bundle} --each lane" in result.out
        done = cli("generate", tmp_path / "o.h5ad", "--model", bundle, "--each", "lane", "-n", 3, *FAST)
        assert done.code == 0, done.err
        assert ad.read_h5ad(tmp_path / "o.h5ad").obs["lane"].tolist() == ["left"] * 3 + ["right"] * 3

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--objective", "conditional"), "without --condition"),
            (("--objective", "pretrain", "--condition", "cell_type"), "learns nothing from labels"),
        ],
    )
    def test_contradictions_are_refused(self, options, words, cli, saved, h5ad, tmp_path):
        result = cli("finetune", h5ad, "--model", saved, "--out", tmp_path / "run", *options)
        assert result.code == 2
        assert words in result.err
        assert not (tmp_path / "run").exists()
