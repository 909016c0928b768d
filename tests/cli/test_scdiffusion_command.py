"""``scdiva scdiffusion fit``, ``add-condition``, and ``scdiva generate`` with such a model."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

from conftest import files_under

SHORT = [
    option
    for part in ("autoencoder", "denoiser", "classifier")
    for option in ("--set", f"{part}.training.max_steps=3", "--set", f"{part}.training.batch_size=16")
] + ["--n-latent", 4, "--device", "cpu"]


@pytest.fixture(scope="module")
def fitted(_cells, tmp_path_factory):
    """A model that a run of the command made, and what the command said."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("command")
    _cells.write_h5ad(folder / "cells.h5ad")
    command = [sys.executable, "-c", "from scdiva.cli import main; main()", "scdiffusion", "fit", folder / "cells.h5ad"]
    options = ["--condition", "cell_type", "--condition", "batch", "--out", folder / "run", *SHORT]
    done = subprocess.run([*map(str, [*command, *options])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run" / "bundle", done.stdout


class TestFit:
    def test_it_says_what_was_trained_and_what_comes_next(self, fitted):
        path, out = fitted
        for words in ("autoencoder: ", "denoiser: ", "classifier-cell_type: ", "classifier-batch: ", "scdiva generate"):
            assert words in out
        assert str(path) in out
        assert "--condition 'batch=batch 0' -n 500" in out

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--condition", "celltype"), "cell_type"),
            (("--condition", "cell_type", "--min-cells", 100), "'type 0' ("),
            (("--condition", "cell_type", "--condition", "cell_type"), "more than once"),
            (("--set", "denoiser.optim.rate=1"), "unknown key optim.rate"),
            (("--set", "decoder.optim.lr=1"), "autoencoder or denoiser"),
            (("--layer", "absent"), "absent"),
        ],
    )
    def test_bad_input_is_one_line_and_writes_nothing(self, options, words, cli, h5ad, tmp_path):
        before = files_under(tmp_path)
        result = cli("scdiffusion", "fit", h5ad, "--out", tmp_path / "run", *options)
        assert result.code == 2
        assert words in result.err
        assert len([line for line in result.err.splitlines() if line.startswith("error")]) == 1
        assert files_under(tmp_path) == before

    def test_a_condition_is_added(self, cli, fitted, h5ad, adata, tmp_path):
        adata.obs["state"] = np.where(adata.obs["cell_type"] == "type 0", "left", "right")
        adata.write_h5ad(h5ad)
        options = ("--condition", "state", "--set", "classifier.training.max_steps=3", "--device", "cpu")
        result = cli("scdiffusion", "add-condition", h5ad, "--model", fitted[0], "--out", tmp_path / "more", *options)
        assert result.code == 0, result.err
        made = cli("generate", tmp_path / "o.h5ad", "--model", tmp_path / "more" / "bundle", "-n", 3,
                   "--condition", "state=left", "--guidance", "state=2")  # fmt: skip
        assert made.code == 0, made.err
        assert ad.read_h5ad(tmp_path / "o.h5ad").obs["state"].tolist() == ["left"] * 3
        # a condition that only a classifier knows is guided to unasked, and the record says so
        made = cli("generate", tmp_path / "p.h5ad", "--model", tmp_path / "more" / "bundle", "-n", 3,
                   "--condition", "state=left")  # fmt: skip
        assert made.code == 0, made.err
        scales = ad.read_h5ad(tmp_path / "p.h5ad").uns["scdiva"]["generate"]["classifier_guidance"]
        assert (scales["field"].tolist(), scales["scale"].tolist()) == (["state"], [1.0])


class TestGenerate:
    def test_cells_of_two_conditions_with_both_kinds_of_guidance(self, cli, fitted, tmp_path):
        result = cli(
            "generate", tmp_path / "o.h5ad", "--model", fitted[0], "-n", 7, "--seed", 2, "--sampler", "ddim",
            "--steps", 4, "--condition", "cell_type=type 1:2", "--condition", "batch=batch 0",
            "--guidance", "cell_type=1.5",
        )  # fmt: skip
        assert result.code == 0, result.err
        assert "7 cells (cell_type type 1 and batch batch 0)" in result.out
        cells = ad.read_h5ad(tmp_path / "o.h5ad")
        assert cells.X.dtype == np.int32
        assert cells.obs["cell_type"].tolist() == ["type 1"] * 7
        record = cells.uns["scdiva"]["generate"]
        assert (record["sampler"]["method"], record["sampler"]["n_steps"]) == ("ddim", 4)
        assert (record["guidance_weights"]["field"][0], record["guidance_weights"]["weight"][0]) == ("cell_type", 2.0)
        scales = record["classifier_guidance"]
        assert (scales["field"].tolist(), scales["scale"].tolist()) == (["cell_type"], [1.5])

    def test_each_label(self, cli, fitted, tmp_path):
        result = cli("generate", tmp_path / "o.h5ad", "--model", fitted[0], "--each", "cell_type", "-n", 2)
        assert result.code == 0, result.err
        labels = ad.read_h5ad(tmp_path / "o.h5ad").obs["cell_type"]
        assert labels.tolist() == [f"type {i}" for i in range(3) for _ in range(2)]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--condition", "cell_type=type 9"), "type 0"),
            (("--condition", "tissue=lung"), "cell_type"),
            (("--guidance", "cell_type"), "FIELD=SCALE"),
            (("--guidance", "cell_type=1"), "has no condition"),
            (("--guidance", "cell_type=1", "--guidance", "cell_type=2"), "--guidance cell_type twice"),
            (("--steps", 5000), "1 to 1000"),
            (("--latent", "null"), "--latent with a model of family scdiffusion"),
            (("--strategy", "random"), "--strategy"),
            (("--gibbs-rounds", 1), "--gibbs-rounds"),
            (("--n-genes", 5), "--n-genes"),
        ],
    )
    def test_bad_input_is_one_line_and_writes_nothing(self, options, words, cli, fitted, tmp_path):
        result = cli("generate", tmp_path / "o.h5ad", "--model", fitted[0], "-n", 3, *options)
        assert result.code == 2
        assert words in result.err
        assert len(result.err.splitlines()) == 1
        assert files_under(tmp_path) == {}

    def test_no_cells(self, cli, fitted, tmp_path):
        assert cli("generate", tmp_path / "o.h5ad", "--model", fitted[0], "-n", 0).code == 2
        assert files_under(tmp_path) == {}

    def test_the_options_of_one_family_are_refused_by_the_other(self, cli, fitted, bundle, h5ad, tmp_path):
        for options in (("--sampler", "dpm"), ("--guidance", "cell_type=1")):
            result = cli("generate", tmp_path / "o.h5ad", "--model", bundle, "-n", 3, *options)
            assert result.code == 2
            assert "family scdiva" in result.err
        result = cli("embed", h5ad, tmp_path / "o.h5ad", "--model", fitted[0])
        assert result.code == 2
        assert "family 'scdiffusion'" in result.err
        assert not (tmp_path / "o.h5ad").exists()

    def test_inspect_reads_it(self, cli, fitted):
        result = cli("inspect", fitted[0])
        assert result.code == 0
        assert "classifiers.1" in result.out


class TestCodec:
    def test_a_diffusion_on_the_z_of_a_scdiva_model_and_both_decoders(self, cli, bundle, h5ad, tmp_path):
        options = ("--set", "denoiser.training.max_steps=3", "--no-classifiers", "--device", "cpu")
        result = cli("scdiffusion", "fit", h5ad, "--codec", bundle, "--condition", "cell_type", "--out",
                     tmp_path / "run", *options)  # fmt: skip
        assert result.code == 0, result.err
        assert "codec: tiny, z of 8 dimensions; " in result.out
        assert "autoencoder" not in result.out
        for decoder in ("profile", "masked"):
            out = tmp_path / f"{decoder}.h5ad"
            made = cli("generate", out, "--model", tmp_path / "run" / "bundle", "-n", 4, "--decoder", decoder,
                       "--condition", "cell_type=type 1")  # fmt: skip
            assert made.code == 0, made.err
            assert ad.read_h5ad(out).uns["scdiva"]["generate"]["decoder"] == decoder
        assert "not known to the scDiVa model" in made.out

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--n-latent", 4), "--n-latent"),
            (("--set", "autoencoder.training.max_steps=3"), "autoencoder"),
        ],
    )
    def test_bad_input_is_refused_and_writes_nothing(self, options, words, cli, bundle, h5ad, tmp_path):
        before = files_under(tmp_path)
        result = cli("scdiffusion", "fit", h5ad, "--codec", bundle, "--out", tmp_path / "run", *options)
        assert result.code == 2
        assert words in result.err
        assert files_under(tmp_path) == before

    def test_a_latent_diffusion_is_no_codec_and_decoders_are_of_codecs(self, cli, fitted, bundle, h5ad, tmp_path):
        before = files_under(tmp_path)
        result = cli("scdiffusion", "fit", h5ad, "--codec", fitted[0], "--out", tmp_path / "run")
        assert (result.code, "family 'scdiffusion'" in result.err) == (2, True)
        for model, words in ((fitted[0], "its own autoencoder"), (bundle, "family scdiva")):
            result = cli("generate", tmp_path / "o.h5ad", "--model", model, "-n", 3, "--decoder", "masked")
            assert (result.code, words in result.err) == (2, True)
        assert files_under(tmp_path) == before


class TestInterpolate:
    def test_from_the_cells_of_a_file(self, cli, fitted, h5ad, tmp_path):
        ends = ("--source", "type 0", "--target", "type 2")
        for name, how in (
            ("a.h5ad", ()),
            ("b.zarr", ("--from-noise",)),
            ("c.h5ad", ("--method", "slerp", "--start-time", 0.4)),
            ("d.h5ad", ("--method", "linear")),
            ("e.h5ad", ("--weights", "2:0", "--weights", "1:1", "--weights", "0:3.5")),
        ):
            options = ("--model", fitted[0], *ends, "--steps", 3, "-n", 4, *how)
            result = cli("interpolate", h5ad, tmp_path / name, *options)
            assert result.code == 0, result.err
        cells = ad.read_h5ad(tmp_path / "a.h5ad")
        assert cells.obs["scdiva_position"].tolist() == [0.0] * 4 + [0.5] * 4 + [1.0] * 4
        assert ad.read_zarr(tmp_path / "b.zarr").n_obs == 12
        assert ad.read_h5ad(tmp_path / "d.h5ad").obs["scdiva_method"].tolist() == ["linear"] * 12
        assert ad.read_h5ad(tmp_path / "e.h5ad").uns["scdiva"]["interpolate"]["weights"].tolist()[2] == [0, 3.5]

    def test_bad_input_is_one_line_and_writes_nothing(self, cli, fitted, bundle, h5ad, tmp_path):
        before = files_under(tmp_path)
        for model, source, more, words in (
            (fitted[0], "type 9", (), "type 0"),
            (bundle, "type 0", (), "family 'scdiva'"),
            (fitted[0], "type 0", ("--weights", "2"), "SOURCE:TARGET"),
            (fitted[0], "type 0", ("--method", "linear", "--from-noise"), "gradient interpolation only"),
            (fitted[0], "type 0", ("--strength", 4, "--weights", "2:1"), "a strength and weights"),
        ):
            options = ("--model", model, "--source", source, "--target", "type 2", *more)
            result = cli("interpolate", h5ad, tmp_path / "o.h5ad", *options)
            assert result.code == 2
            assert words in result.err
            assert len(result.err.splitlines()) == 1
            assert files_under(tmp_path) == before


class TestAugment:
    def test_types_are_filled_up(self, cli, fitted, h5ad, tmp_path):
        for name, target in (
            ("a.h5ad", ("--target", 60)),
            ("b.zarr", ("--target", "type 0=70", "--target", "type 1=60")),
        ):
            options = ("--labels-key", "cell_type", "--model", fitted[0], *target)
            result = cli("augment", h5ad, tmp_path / name, *options)
            assert result.code == 0, result.err
        sizes = ad.read_h5ad(tmp_path / "a.h5ad").obs["cell_type"].value_counts()
        assert sizes.min() >= 60
        assert ad.read_zarr(tmp_path / "b.zarr").obs["cell_type"].value_counts()["type 0"] == 70
        assert "generated cells" in result.out

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--labels-key", "celltype", "--target", 60), "cell_type"),
            (("--labels-key", "cell_type", "--target", 0), "target=0"),
            (("--labels-key", "cell_type", "--target", 1), "nothing was done"),
            (("--labels-key", "cell_type", "--target", "most"), "N, max, median or TYPE=N"),
            (("--labels-key", "cell_type", "--target", 60, "--target", "max"), "TYPE=N once for each type"),
            (("--labels-key", "cell_type", "--target", "type 7=60"), "type 7"),
            (("--labels-key", "cell_type", "--target", 60, "--keep-model", "kept"), "only a model that is fitted here"),
        ],
    )
    def test_bad_input_is_one_line_and_writes_nothing(self, options, words, cli, fitted, h5ad, tmp_path):
        before = files_under(tmp_path)
        result = cli("augment", h5ad, tmp_path / "o.h5ad", "--model", fitted[0], *options)
        assert result.code == 2
        assert words in result.err
        assert len(result.err.splitlines()) == 1
        assert files_under(tmp_path) == before
