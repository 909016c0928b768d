from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest

import ten_x_files
from conftest import files_under


class TestCheck:
    def test_a_good_file(self, cli, h5ad):
        result = cli("check", h5ad, "--model", "none")
        assert result.code == 0
        assert result.err == ""
        for words in ("120 cells x 200 features", "X: raw counts", "100.00%", "usable as it is"):
            assert words in result.out

    def test_json_holds_what_python_gets(self, cli, h5ad):
        import scdiva as sd

        result = cli("check", h5ad, "--json", "--model", "none")
        assert result.code == 0
        assert json.loads(result.out) == json.loads(json.dumps(sd.pp.check(h5ad).to_dict()))

    def test_json_of_a_bad_file_still_parses(self, cli, adata, tmp_path):
        adata.X = adata.X.toarray() - 1.5
        adata.write_h5ad(tmp_path / "bad.h5ad")
        result = cli("check", tmp_path / "bad.h5ad", "--json")
        assert result.code == 2
        report = json.loads(result.out)
        assert report["is_usable"] is False
        assert set(report["problem"]) == {"found", "expected", "fix"}

    @pytest.mark.parametrize("form", ["h5", "mtx"])
    def test_ten_x_with_antibodies(self, form, cli, adata, tmp_path):
        path = (
            ten_x_files.write_h5_v3(adata, tmp_path / "raw.h5")
            if form == "h5"
            else ten_x_files.write_mtx_v3(adata, tmp_path / "filtered")
        )
        result = cli("check", path, "--json", "--model", "none")
        report = json.loads(result.out)
        assert result.code == 0
        assert (report["n_features"], report["n_genes"]) == (202, 200)
        assert report["genes"]["not_genes"] == 2
        assert report["coverage"] == 1.0
        assert report["library_size"]["maximum"] == adata.X.sum(axis=1).max()
        assert "2 no genes (antibodies, peaks)" in cli("check", path).out

    def test_against_the_genes_of_a_model(self, cli, h5ad, bundle):
        report = json.loads(cli("check", h5ad, "--model", bundle, "--json").out)
        assert report["genes"]["n_genes"] == 190
        assert 0.5 < report["coverage"] < 1


class TestEmbed:
    def test_options_reach_the_result(self, cli, h5ad, bundle, adata, tmp_path):
        out = tmp_path / "o.zarr"
        gene = adata.var_names[77]
        result = cli(
            "embed", h5ad, out, "--model", bundle, "--key-added", "X_mine", "--denoise", gene, "--layer", "umis"
        )
        assert result.code == 2
        adata.layers["umis"] = adata.X.copy()
        adata.X = adata.X * -1.5
        adata.write_h5ad(h5ad)
        result = cli(
            "embed", h5ad, out, "--model", bundle, "--key-added", "X_mine", "--denoise", gene, "--layer", "umis"
        )
        assert result.code == 0, result.err
        found = ad.read_zarr(out)
        assert found.obsm["X_mine"].shape == (120, 8)
        assert set(found.layers["scdiva_denoised"].nonzero()[1]) == {77}
        assert "layers['umis']" in result.out

    def test_cells_without_counts_are_told(self, cli, adata, bundle, tmp_path, caplog):
        counts = adata.X.toarray()
        counts[:2] = 0
        adata.X = counts
        adata.write_h5ad(tmp_path / "a.h5ad")
        result = cli("embed", tmp_path / "a.h5ad", tmp_path / "o.h5ad", "--model", bundle)
        assert result.code == 0
        assert "2 cells have no UMI" in caplog.text

    def test_in_place_with_overwrite(self, cli, h5ad, bundle, adata):
        assert cli("embed", h5ad, h5ad, "--model", bundle).code == 2
        assert cli("embed", h5ad, h5ad, "--model", bundle, "--overwrite").code == 0
        found = ad.read_h5ad(h5ad)
        np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())
        assert "X_scdiva" in found.obsm

    def test_ten_x_in_h5ad_out(self, cli, adata, bundle, tmp_path):
        path = ten_x_files.write_mtx_v2(adata, tmp_path / "hg19")
        assert cli("embed", path, tmp_path / "o.h5ad", "--model", bundle).code == 0
        assert ad.read_h5ad(tmp_path / "o.h5ad").obsm["X_scdiva"].shape == (120, 8)

    def test_an_interruption_says_so_and_leaves_nothing(self, cli, h5ad, bundle, tmp_path, monkeypatch):
        before = files_under(tmp_path)

        def interrupt(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr("anndata.io.write_elem", interrupt)
        result = cli("embed", h5ad, tmp_path / "o.h5ad", "--model", bundle)
        assert result.code == 130
        assert result.err.splitlines() == [
            "interrupted; no half-written result was left behind, and the same command resumes a training run"
        ]
        assert files_under(tmp_path) == before


class TestInspect:
    def test_text(self, cli, bundle):
        result = cli("inspect", bundle)
        assert result.code == 0
        for words in (
            "tiny: every file verified",
            "anchor.gene_embedding",
            "made up here",
            "heldout_profile_nll",
            "210",
        ):
            assert words in result.out

    def test_json(self, cli, bundle):
        facts = json.loads(cli("inspect", bundle, "--json").out)
        assert facts["n_genes"] == 210
        assert facts["tensors"]["anchor.encoder.weight"] == ["float32", 8, 8]
        # statistics of the corpus are stored, too, but are no parameters: a scale, a mean depth, detection log-odds
        n_values = sum(int(np.prod(shape)) for _, *shape in facts["tensors"].values())
        assert facts["n_parameters"] == n_values - 1 - 1 - 210
        assert facts["trained_heads"] == ["anchor", "profile_decoder", "identity", "value"]

    def test_a_size_of_the_published_network(self, cli):
        told = cli("inspect", "--preset", "official")
        assert told.code == 0
        assert "94,482,433 parameters over 41,813 genes" in told.out
        facts = json.loads(cli("inspect", "--preset", "official", "--json").out)
        assert facts["n_parameters"] == 94_482_433
        assert facts["model"]["architecture"] == "official"

    @pytest.mark.parametrize("preset", ["tiny", "small", "base"])
    def test_a_native_size_is_that_of_a_network(self, preset, cli):
        from scdiva.models.scdiva.model import build_network
        from scdiva.models.scdiva.presets import PRESETS, n_parameters

        facts = json.loads(cli("inspect", "--preset", preset, "--json").out)
        assert facts["n_parameters"] == n_parameters(PRESETS[preset], 41_813)
        assert facts["model"]["trunk"]["n_layers"] == {"tiny": 4, "small": 8, "base": 12}[preset]
        network = build_network(50, PRESETS[preset])
        assert n_parameters(PRESETS[preset], 50) == sum(p.numel() for p in network.parameters())

    @pytest.mark.parametrize("arguments", [("--preset", "huge"), ("--preset", "official", "x"), ()])
    def test_what_is_no_size_is_refused(self, arguments, cli):
        result = cli("inspect", *arguments)
        assert result.code == 2
        assert result.err
        if "huge" in arguments:
            for name in ("scdiva-blood-tiny", "official", "tiny", "small", "base"):
                assert name in result.err


def test_version_and_help(cli):
    import scdiva

    assert cli("--version").out == f"scdiva {scdiva.__version__}\n"
    listed = cli("--help")
    assert listed.code == 0
    for command in (
        "demo",
        "check",
        "embed",
        "inspect",
        "pretrain",
        "finetune",
        "generate",
        "grn",
        "impute",
        "reconstruct",
        "evaluate",
    ):
        assert command in listed.out
        assert cli(command, "--help").code == 0


@pytest.mark.slow
def test_the_demo_runs_and_leaves_its_results(cli, bundled_model, tmp_path):
    result = cli("demo", "--out", tmp_path / "demo")
    assert result.code == 0, result.err
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"pbmc3k_scdiva.h5ad", "umap.png", "summary.txt", "generated.h5ad"}
    assert "accuracy" in (tmp_path / "demo" / "summary.txt").read_text()


def test_the_demo_never_writes_into_a_folder_in_use(cli, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = cli("demo", "--out", tmp_path)
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
