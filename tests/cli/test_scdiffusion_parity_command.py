"""``scdiva scdiffusion fit --preset parity``, with and without SCimilarity weights, and what it refuses."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest
import torch

from conftest import files_under
from scdiva.models.scdiffusion import PRESETS, ScDiffusion

SHORT = [
    option
    for part in ("autoencoder", "denoiser", "classifier")
    for option in ("--set", f"{part}.training.max_steps=2", "--set", f"{part}.training.batch_size=16")
] + ["--n-latent", 4, "--device", "cpu", "--preset", "parity", "--condition", "cell_type"]


@pytest.fixture
def small(monkeypatch):
    sizes = {"n_hidden": 8, "width": 8, "classifier_width": 8}
    monkeypatch.setitem(PRESETS, "parity", PRESETS["parity"].model_copy(update=sizes))


@pytest.fixture
def scimilarity(tmp_path):
    folder = tmp_path / "theirs"
    folder.mkdir()
    torch.save({"state_dict": {"network.1.1.weight": torch.ones(8, 8), "network.3.bias": torch.ones(9)}},
               folder / "encoder.ckpt")  # fmt: skip
    torch.save({"state_dict": {}}, folder / "decoder.ckpt")
    (folder / "gene_order.tsv").write_text("CD3E\nLYZ\n")
    return folder


def test_fit_and_generate(small, cli, h5ad, scimilarity, tmp_path):
    result = cli("scdiffusion", "fit", h5ad, "--out", tmp_path / "run", *SHORT, "--scimilarity", scimilarity)
    assert result.code == 0, result.err
    assert "SCimilarity: 1 tensors taken over" in result.out
    assert "not taken over: encoder.network.3.bias (shape (9,) instead of (4,))" in result.out
    model = ScDiffusion.from_pretrained(tmp_path / "run" / "bundle")
    assert (model.config.architecture, model.n_latent) == ("published", 4)
    for options, sampler in (((), "ddpm"), (("--sampler", "dpm", "--steps", 5), "dpm")):
        made = cli("generate", tmp_path / "o.h5ad", "--model", tmp_path / "run" / "bundle", "-n", 3,
                   "--condition", "cell_type=type 1", "--overwrite", *options)  # fmt: skip
        assert made.code == 0, made.err
        cells = ad.read_h5ad(tmp_path / "o.h5ad")
        assert cells.X.dtype == np.int32
        assert cells.uns["scdiva"]["generate"]["sampler"]["method"] == sampler


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--preset", "parity", "--no-classifiers"), "without classifiers"),
        (("--scimilarity", "absent"), "native autoencoder"),
        (("--preset", "parity", "--scimilarity", "absent"), "lacks encoder.ckpt"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(options, words, cli, h5ad, tmp_path):
    before = files_under(tmp_path)
    result = cli("scdiffusion", "fit", h5ad, "--out", tmp_path / "run", "--condition", "cell_type", *options)
    assert result.code == 2
    assert words in result.err
    assert len([line for line in result.err.splitlines() if line.startswith("error")]) == 1
    assert files_under(tmp_path) == before


def test_an_unknown_preset(cli, h5ad, tmp_path):
    assert cli("scdiffusion", "fit", h5ad, "--out", tmp_path / "run", "--preset", "official").code == 2
