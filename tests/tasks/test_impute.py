"""``impute`` in Python, from files, and by command."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scdiva as sd
from conftest import files_under
from scdiva.errors import BundleError, ConfigError, GeneError, OutputError, SourceError

CLOSE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module")
def names(_cells, tiny_model) -> list[str]:
    """Three measured genes of the model."""
    known = set(tiny_model.vocabulary.symbol)
    return [name for name in _cells.var_names if name in known][20:80:20]


@pytest.fixture(scope="module")
def absent(_cells, tiny_model) -> list[str]:
    """Two genes of the model that the cells do not measure."""
    measured = set(_cells.var["ensembl_id"])
    ids = [str(name) for name in tiny_model.vocabulary.ensembl_id if name not in measured]
    return ids[:2]


def imputed(data: ad.AnnData, model, genes, **options) -> np.ndarray:
    result = sd.tl.impute(data, model, genes, copy=True, **options)
    return result.layers["scdiva_imputed"][:, data.var_names.get_indexer(genes)].toarray()


@pytest.fixture(scope="module")
def reference(_cells, tiny_model, names) -> np.ndarray:
    return imputed(_cells, tiny_model, names)


class TestTheSameCellsGiveTheSameValues:
    @pytest.mark.parametrize("batch_size", [1, 7, 4096])
    @pytest.mark.parametrize("own_counts", ["used", "hidden"])
    def test_in_blocks_of_any_size(self, batch_size, own_counts, adata, tiny_model, names):
        whole = imputed(adata, tiny_model, names, own_counts=own_counts)
        np.testing.assert_allclose(
            imputed(adata, tiny_model, names, own_counts=own_counts, batch_size=batch_size), whole, **CLOSE
        )

    @pytest.mark.parametrize("own_counts", ["used", "hidden"])
    def test_in_any_order_of_cells_and_genes(self, own_counts, adata, tiny_model, names):
        whole = sd.tl.impute(adata, tiny_model, names, own_counts=own_counts, n_samples=4, copy=True)
        cells, genes = np.random.default_rng(0).permutation(120), np.random.default_rng(1).permutation(200)
        other = adata[cells][:, genes].copy()
        sd.tl.impute(other, tiny_model, names[::-1], own_counts=own_counts, n_samples=4)
        back = other[np.argsort(cells)][:, np.argsort(genes)]
        for ending in ("", "_sd", "_q05", "_q95"):
            found, expected = (a.layers[f"scdiva_imputed{ending}"].toarray() for a in (back, whole))
            # a draw at the very edge of a count may fall to the other side
            assert np.isclose(found, expected, atol=1e-4, rtol=0).mean() > 0.999

    def test_with_and_without_other_cells(self, adata, tiny_model, names, reference):
        np.testing.assert_allclose(imputed(adata[40:43].copy(), tiny_model, names), reference[40:43], **CLOSE)

    def test_with_and_without_other_genes(self, adata, tiny_model, names, reference):
        np.testing.assert_allclose(imputed(adata, tiny_model, names[1:2]), reference[:, 1:2], **CLOSE)
        everything = sd.tl.impute(adata, tiny_model, copy=True).layers["scdiva_imputed"].toarray()
        np.testing.assert_allclose(everything[:, adata.var_names.get_indexer(names)], reference, **CLOSE)

    @pytest.mark.parametrize("kind_in", ["h5ad", "zarr"])
    @pytest.mark.parametrize("kind_out", ["h5ad", "zarr"])
    def test_from_file_to_file(self, kind_in, kind_out, adata, tiny_model, names, absent, tmp_path):
        path = tmp_path / f"in.{kind_in}"
        getattr(adata, f"write_{kind_in}")(path)
        sd.tl.impute_file(path, tmp_path / f"out.{kind_out}", tiny_model, [*names, *absent], n_samples=3, seed=4)
        found = getattr(ad, f"read_{kind_out}")(tmp_path / f"out.{kind_out}")
        sd.tl.impute(adata, tiny_model, [*names, *absent], n_samples=3, seed=4)
        assert set(found.layers) == set(adata.layers) == {f"scdiva_imputed{e}" for e in ("", "_sd", "_q05", "_q95")}
        for key in found.layers:
            np.testing.assert_array_equal(found.layers[key].toarray(), adata.layers[key].toarray())
        for key in adata.obsm:
            pd.testing.assert_frame_equal(found.obsm[key], adata.obsm[key], check_names=False)
        np.testing.assert_array_equal(found.X.toarray(), adata.X.toarray())

    def test_by_command(self, cli, h5ad, bundle, adata, names, absent, tmp_path):
        (tmp_path / "genes.txt").write_text(f"# markers\n{names[1]}\n\n{absent[0]}\n")
        out = tmp_path / "out.h5ad"
        result = cli(
            "impute", h5ad, out, "--gene", names[0], "--genes-file", tmp_path / "genes.txt", "--model", bundle,
            "--samples", 3, "--seed", 4, "--own-counts", "hidden", "--unit", "counts", "--device", "cpu",
        )  # fmt: skip
        assert result.code == 0, result.err
        assert "3 genes imputed in 120 cells" in result.out
        assert f"not measured: {absent[0]}" in result.out
        found = ad.read_h5ad(out)
        model = sd.ScDiVa.from_pretrained(bundle, device="cpu")
        sd.tl.impute(
            adata, model, [names[0], names[1], absent[0]], n_samples=3, seed=4, own_counts="hidden", unit="counts"
        )
        for key in adata.layers:
            np.testing.assert_array_equal(found.layers[key].toarray(), adata.layers[key].toarray())
        for key in adata.obsm:
            pd.testing.assert_frame_equal(found.obsm[key], adata.obsm[key], check_names=False)

    def test_all_genes_by_command(self, cli, h5ad, bundle, tmp_path):
        result = cli("impute", h5ad, tmp_path / "o.h5ad", "--all", "--model", bundle)
        assert result.code == 0, result.err
        assert "190 genes imputed" in result.out
        assert ad.read_h5ad(tmp_path / "o.h5ad").layers["scdiva_imputed"].nnz == 120 * 190


class TestWhatIsWritten:
    def test_a_layer_and_the_record(self, adata, tiny_model, names):
        before = adata.copy()
        assert sd.tl.impute(adata, tiny_model, names, key_added="mine") is None
        assert set(adata.layers) == {"mine"}
        assert not adata.obsm
        columns = set(adata.layers["mine"].nonzero()[1])
        assert columns == set(adata.var_names.get_indexer(names))
        np.testing.assert_array_equal(adata.X.toarray(), before.X.toarray())
        record = adata.uns["scdiva"]["impute"]["mine"]
        assert record["model"] == "tiny"
        assert set(record["genes_asked_for"]) == set(names)
        assert record["own_counts"] == "used"
        assert record["unit"] == "log1p of expected CP10K"
        assert (record["n_samples"], record["seed"]) == (0, 0)

    def test_other_records_stay(self, adata, tiny_model, names):
        sd.tl.embed(adata, tiny_model)
        sd.tl.impute(adata, tiny_model, names, key_added="a")
        sd.tl.impute(adata, tiny_model, names, key_added="b")
        assert set(adata.uns["scdiva"]) == {"embed", "impute"}
        assert set(adata.uns["scdiva"]["impute"]) == {"a", "b"}

    def test_genes_without_a_column_go_to_obsm(self, adata, tiny_model, names, absent, tmp_path):
        sd.tl.impute(adata, tiny_model, [absent[1], names[0], absent[0]], n_samples=3)
        frame = adata.obsm["scdiva_imputed_unmeasured"]
        assert isinstance(frame, pd.DataFrame)
        assert sorted(frame.columns) == sorted(absent)
        assert (frame.index == adata.obs_names).all()
        assert (frame.to_numpy() > 0).all()
        assert set(adata.obsm) == {f"scdiva_imputed_unmeasured{e}" for e in ("", "_sd", "_q05", "_q95")}
        assert sorted(adata.uns["scdiva"]["impute"]["scdiva_imputed"]["unmeasured_genes"]) == sorted(absent)
        adata.write_h5ad(tmp_path / "a.h5ad")
        pd.testing.assert_frame_equal(
            ad.read_h5ad(tmp_path / "a.h5ad").obsm["scdiva_imputed_unmeasured"], frame, check_names=False
        )

    def test_genes_without_a_column_alone_write_no_layer(self, adata, tiny_model, absent):
        sd.tl.impute(adata, tiny_model, absent)
        assert not adata.layers
        assert set(adata.obsm) == {"scdiva_imputed_unmeasured"}

    def test_a_gene_without_a_column_is_as_expected_as_it_was_with_one(self, adata, tiny_model, names):
        # what the rest of the cell says of it, on the scale of the same file
        hidden = imputed(adata, tiny_model, names[:1], own_counts="hidden")[:, 0]
        left = adata[:, adata.var_names != names[0]].copy()
        sd.tl.impute(left, tiny_model, names[:1])
        lost = left.obsm["scdiva_imputed_unmeasured"][names[0]].to_numpy()
        assert np.corrcoef(hidden, lost)[0, 1] > 0.9
        assert np.expm1(lost).mean() == pytest.approx(np.expm1(hidden).mean(), rel=0.2)

    def test_a_gene_by_symbol_and_by_id_is_one_gene(self, adata, tiny_model, names, reference):
        gene_id = adata.var.loc[names[0], "ensembl_id"]
        sd.tl.impute(adata, tiny_model, [names[0], gene_id])
        assert adata.uns["scdiva"]["impute"]["scdiva_imputed"]["n_genes"] == 1
        column = adata.var_names.get_loc(names[0])
        np.testing.assert_allclose(adata.layers["scdiva_imputed"][:, column].toarray()[:, 0], reference[:, 0], **CLOSE)

    def test_units(self, adata, tiny_model, names):
        value = imputed(adata, tiny_model, names)
        count = imputed(adata, tiny_model, names, unit="counts")
        depth = np.asarray(adata.X.sum(axis=1))
        np.testing.assert_allclose(np.log1p(1e4 * count / depth), value, rtol=1e-5)

    def test_spread_and_quantiles(self, adata, tiny_model, names):
        sd.tl.impute(adata, tiny_model, names, n_samples=40, unit="counts")
        columns = adata.var_names.get_indexer(names)
        mean, sd_, low, high = (
            adata.layers[f"scdiva_imputed{e}"][:, columns].toarray() for e in ("", "_sd", "_q05", "_q95")
        )
        assert (sd_ > 0).all()
        assert (low <= high).all()
        for quantile in (low, high):
            assert (quantile == np.rint(quantile)).all()
        # the own count is one repetition of the measurement; it was used, so that it lies within more often than not
        own = adata.X[:, columns].toarray()
        assert ((own >= low) & (own <= high)).mean() > 0.85
        assert low.mean() < mean.mean() < high.mean()

    def test_a_copy_leaves_the_input_alone(self, adata, tiny_model, names):
        result = sd.tl.impute(adata, tiny_model, names, copy=True)
        assert set(result.layers) == {"scdiva_imputed"}
        assert not adata.layers
        assert "scdiva" not in adata.uns

    def test_cells_without_counts_are_told(self, adata, tiny_model, names, caplog):
        counts = adata.X.toarray()
        counts[:2] = 0
        adata.X = counts
        sd.tl.impute(adata, tiny_model, names)
        assert "2 cells have no UMI" in caplog.text
        assert np.isfinite(adata.layers["scdiva_imputed"].data).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("genes", "options", "error", "words"),
        [
            (["CD3EE"], {}, GeneError, "CD3EE"),
            ([], {}, GeneError, "no genes to impute"),
            (None, {"n_samples": -1}, ConfigError, "n_samples=-1"),
            (None, {"n_samples": 1}, ConfigError, "at least 2"),
            (None, {"batch_size": 0}, ConfigError, "batch_size=0"),
            (None, {"own_counts": "no"}, ConfigError, "'used' or 'hidden'"),
            (None, {"unit": "cpm"}, ConfigError, "'log1p_cp10k' or 'counts'"),
            (None, {"key_added": "a/b"}, OutputError, "a/b"),
        ],
    )
    def test_is_refused_and_nothing_is_written(self, genes, options, error, words, adata, tiny_model):
        with pytest.raises(error, match=words):
            sd.tl.impute(adata, tiny_model, genes, **options)
        assert not adata.layers
        assert "scdiva" not in adata.uns

    def test_a_close_name_is_suggested(self, adata, bundled_model):
        with pytest.raises(GeneError, match="CD3E"):
            sd.tl.impute(adata, bundled_model, ["CD3EX"], min_coverage=0)

    def test_a_gene_outside_the_models_vocabulary(self, adata, tiny_model):
        outside = sd.GeneVocabulary.default().symbol[500]
        with pytest.raises(GeneError, match="not in this vocabulary"):
            sd.tl.impute(adata, tiny_model, [outside])

    def test_no_model(self, adata):
        with pytest.raises(BundleError, match="no model that imputes"):
            sd.tl.impute(adata, "scdiva-blood-tiny")

    def test_genes_of_raw_have_no_layer(self, adata, tiny_model, names, absent):
        adata.raw = adata.copy()
        adata.X = adata.X * -1.5
        with pytest.raises(OutputError, match="no layer"):
            sd.tl.impute(adata, tiny_model, names, layer="raw")
        sd.tl.impute(adata, tiny_model, absent, layer="raw")
        assert set(adata.obsm) == {"scdiva_imputed_unmeasured"}

    def test_somebody_elses_record(self, adata, tiny_model, names):
        adata.uns["scdiva"] = {"impute": "theirs"}
        with pytest.raises(OutputError, match="not ours"):
            sd.tl.impute(adata, tiny_model, names)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ((), "no genes to impute"),
            (("--all", "--gene", "CD3E"), "all are asked for"),
            (("--gene", "NOSUCHGENE"), "NOSUCHGENE"),
            (("--genes-file", "absent.txt"), "cannot be read as a list of genes"),
            (("--all", "--samples", "-2"), "n_samples=-2"),
        ],
    )
    def test_by_command(self, options, words, cli, h5ad, bundle, tmp_path):
        before = files_under(tmp_path)
        result = cli("impute", h5ad, tmp_path / "o.h5ad", "--model", bundle, *options)
        assert result.code == 2
        assert words in result.err
        assert len(result.err.splitlines()) == 1
        assert files_under(tmp_path) == before

    def test_an_output_that_exists(self, cli, h5ad, bundle, tmp_path):
        (tmp_path / "o.h5ad").write_text("precious")
        result = cli("impute", h5ad, tmp_path / "o.h5ad", "--all", "--model", bundle)
        assert result.code == 2
        assert "exists" in result.err
        assert (tmp_path / "o.h5ad").read_text() == "precious"

    def test_a_list_of_genes_that_is_no_text(self, tmp_path):
        from scdiva.tasks.impute import read_gene_list

        (tmp_path / "genes.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SourceError, match="list of genes"):
            read_gene_list(tmp_path / "genes.txt")


def test_markers_of_real_blood_cells(bundled_model):
    """Bundled cells, which the bundled model never saw: hidden markers follow the labels, better than by chance."""
    from sklearn.metrics import roc_auc_score

    cells = sd.datasets.pbmc3k()
    cells = cells[np.random.default_rng(0).permutation(cells.n_obs)[:300]].copy()
    genes = {"MS4A1": "B", "CD79A": "B", "LYZ": "Mono", "NKG7": "NK"}
    sd.tl.impute(cells, bundled_model, list(genes), own_counts="hidden")
    labels = cells.obs["cell_type"].astype(str)
    for gene, kind in genes.items():
        value = cells.layers["scdiva_imputed"][:, cells.var_names.get_loc(gene)].toarray()[:, 0]
        assert roc_auc_score(labels.str.contains(kind), value) > 0.9, gene
