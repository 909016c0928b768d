"""``grn`` on arrays, in Python, from files, and by command."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import scdiva as sd
from scdiva.data.network import GeneNetwork
from scdiva.errors import ConfigError, GeneError, UnsupportedError
from scdiva.tasks.grn import METHODS, GrnOptions, grn_cells, transcription_factors
from scdiva.tasks.regulons import Regulon, communities, hallmark_sets, network_graph, regulons


@pytest.fixture(scope="module")
def cells(_cells, tiny_trunk_model):
    from scdiva.data.reader import open_counts

    return open_counts(_cells, tiny_trunk_model.vocabulary).read(np.arange(40))


@pytest.fixture(scope="module")
def names(cells, tiny_trunk_model) -> list[str]:
    """Three genes that many cells express."""
    often = np.argsort(-np.bincount(cells.counts.indices, minlength=cells.n_genes), kind="stable")
    return tiny_trunk_model.vocabulary.symbol[np.sort(often[4:7])].tolist()


class TestEveryMethod:
    @pytest.mark.parametrize("method", METHODS)
    def test_says_what_its_scores_mean(self, method, cells, names, tiny_trunk_model):
        net = grn_cells(cells, tiny_trunk_model, names, method)
        assert net.method == method
        assert net.regulators.tolist() == names
        assert net.score.shape == (3, net.targets.size)
        assert net.score.dtype == np.float32
        assert net.targets.size > 20
        assert (net.is_directed, net.is_signed) == (METHODS[method].is_directed, METHODS[method].is_signed)
        assert len(net.normalisation) > 40
        assert net.n_cells == 40
        for name, row in zip(names, net.score, strict=True):
            assert np.isnan(row[net.targets == name]).all()  # a gene and itself
            assert np.isfinite(row).mean() > 0.5
        if net.sign is not None:
            assert set(np.unique(net.sign)) == {-1, 0, 1}
            assert (net.sign[np.isnan(net.score)] == 0).all()

    @pytest.mark.parametrize("method", METHODS)
    def test_neither_order_nor_company_matters(self, method, cells, names, tiny_trunk_model):
        options = GrnOptions(max_cells=30)
        whole = grn_cells(cells, tiny_trunk_model, names, method, options=options)
        order = np.random.default_rng(0).permutation(40)
        other = grn_cells(cells.take(order), tiny_trunk_model, names[::-1], method, options=options)
        np.testing.assert_array_equal(other.regulators, whole.regulators)
        np.testing.assert_allclose(other.score, whole.score, rtol=2e-3, atol=1e-5)
        alone = grn_cells(cells, tiny_trunk_model, names[1:2], method, options=options)
        np.testing.assert_allclose(alone.score[0], whole.score[1], rtol=2e-3, atol=1e-5)


def test_undirected_scores_are_the_same_both_ways(cells, names, tiny_trunk_model):
    for method in METHODS:
        net = grn_cells(cells, tiny_trunk_model, names, method)
        own = np.array([net.targets.tolist().index(name) for name in names])
        square = net.score[:, own]
        is_symmetric = np.allclose(square, square.T, equal_nan=True, rtol=1e-3)
        assert is_symmetric == (not net.is_directed), method


def test_attention_is_over_what_is_expected(cells, names, tiny_trunk_model):
    lift, difference, plain = (
        grn_cells(cells, tiny_trunk_model, names, "attention", options=GrnOptions(correction=c)).score
        for c in ("lift", "difference", "none")
    )
    np.testing.assert_allclose(plain - difference, plain / lift, rtol=1e-3, atol=1e-7)


class TestRegulators:
    def test_are_transcription_factors_if_none_are_named(self, tiny_trunk_model, bundled_model):
        vocabulary = bundled_model.vocabulary
        found = transcription_factors(vocabulary)
        symbols = set(vocabulary.symbol[found])
        assert {"SPI1", "GATA1", "STAT1", "FOXP3"} <= symbols
        assert "ISG15" not in symbols
        assert 1500 < found.size < 1700

    def test_that_few_cells_express_are_named_and_counted(self, cells, names, tiny_trunk_model, caplog):
        rare = np.flatnonzero(np.bincount(cells.counts.indices, minlength=cells.n_genes) == 0)
        absent = str(tiny_trunk_model.vocabulary.symbol[rare[-1]])
        net = grn_cells(cells, tiny_trunk_model, [*names, absent], "gene_embedding")
        assert net.regulators.tolist() == names
        assert f"1 regulators left out: {absent}" in caplog.text
        with pytest.raises(GeneError, match=absent):
            grn_cells(cells, tiny_trunk_model, [absent], "gene_embedding")

    def test_that_nobody_knows_are_refused(self, cells, tiny_trunk_model):
        with pytest.raises(GeneError, match="NOGENE"):
            grn_cells(cells, tiny_trunk_model, ["NOGENE"])


def test_what_cannot_be_done_is_refused(cells, names, tiny_trunk_model, tiny_model):
    with pytest.raises(ConfigError, match="genie"):
        grn_cells(cells, tiny_trunk_model, names, "genie")
    with pytest.raises(UnsupportedError, match="no trunk"):
        grn_cells(cells, tiny_model, names, "attention")
    with pytest.raises(ConfigError, match="min_cells"):
        GrnOptions(min_cells=0)
    with pytest.raises(ConfigError, match="correction"):
        GrnOptions(correction="softmax")


class TestInAnnData:
    def test_edges_go_to_uns_with_what_they_mean(self, adata, names, tiny_trunk_model):
        result = sd.tl.grn(adata, tiny_trunk_model, regulators=names, method="knockout", n_top=10, copy=True)
        assert "scdiva_grn" not in adata.uns
        edges = result.uns["scdiva_grn"]["edges"]
        assert list(edges.columns) == ["group", "source", "target", "score", "sign"]
        assert edges.groupby("source").size().to_dict() == dict.fromkeys(names, 10)
        assert (np.diff(edges["score"]) <= 0).all()
        record = result.uns["scdiva"]["grn"]["scdiva_grn"]
        assert (record["method"], record["directed"], record["signed"]) == ("knockout", True, True)
        assert record["regulators"] == names
        assert record["n_cells"] == [120]
        assert "log share" in record["normalisation"][0]

    def test_options_are_on_record_and_can_be_saved(self, adata, names, tiny_trunk_model, tmp_path):
        options = sd.tl.GrnOptions(layers=(0, -1), correction="difference", max_tokens=30, max_cells=50)
        sd.tl.grn(adata, tiny_trunk_model, regulators=names, method="attention", options=options, key_added="mine")
        adata.write_h5ad(tmp_path / "a.h5ad")
        record = ad.read_h5ad(tmp_path / "a.h5ad").uns["scdiva"]["grn"]["mine"]
        assert list(record["option_layers"]) == [0, -1]
        assert record["option_heads"] == "all"
        assert record["option_correction"] == "difference"
        assert list(record["n_cells"]) == [50]

    def test_a_network_for_each_group(self, adata, names, tiny_trunk_model, caplog):
        adata.obs["kind"] = ["a"] * 60 + ["b"] * 55 + [None] * 3 + ["c"] * 2
        sd.tl.grn(adata, tiny_trunk_model, regulators=names, group_key="kind", method="gene_embedding")
        edges = adata.uns["scdiva_grn"]["edges"]
        assert edges["group"].unique().tolist() == ["a", "b"]
        assert "sign" not in edges
        assert "1 groups left out: c (2 cells)" in caplog.text
        assert "3 cells without a value in .obs['kind'] left out" in caplog.text
        record = adata.uns["scdiva"]["grn"]["scdiva_grn"]
        assert record["groups_left_out"] == ["c: 2 cells"]
        assert record["cells_without_group"] == 3
        alone = sd.tl.grn(adata[:60].copy(), tiny_trunk_model, regulators=names, method="gene_embedding", copy=True)
        part = edges[edges["group"] == "a"].drop(columns="group").reset_index(drop=True)
        alone_edges = alone.uns["scdiva_grn"]["edges"].drop(columns="group").reset_index(drop=True)
        pd.testing.assert_frame_equal(part, alone_edges)
        with pytest.raises(ConfigError, match="varp"):
            sd.tl.grn(adata, tiny_trunk_model, regulators=names, group_key="kind", varp=True)

    def test_a_group_without_the_gene_is_left_out_and_named(self, adata, names, tiny_trunk_model, caplog):
        adata.obs["kind"] = ["a"] * 60 + ["b"] * 60
        counts = adata.X.tolil()
        counts[60:, adata.var_names.get_loc(names[0])] = 0
        adata.X = counts.tocsr()
        sd.tl.grn(adata, tiny_trunk_model, regulators=names[:1], group_key="kind", method="gene_embedding")
        reason = f"none of 1 regulators is expressed in 20 of 60 cells: {names[0]} (expressed in 0 cells)"
        assert f"1 groups left out: b ({reason})" in caplog.text
        record = adata.uns["scdiva"]["grn"]["scdiva_grn"]
        assert record["groups"] == ["a"]
        assert record["groups_left_out"] == [f"b: {reason}"]
        only_b = adata[60:].copy()
        with pytest.raises(GeneError, match=r"no group of .obs\['kind'\] has a network: b \(none of 1 regulators"):
            sd.tl.grn(only_b, tiny_trunk_model, regulators=names[:1], group_key="kind", method="gene_embedding")
        only_b.obs["kind"] = ["b"] * 10 + [None] * 50
        with pytest.raises(ConfigError, match=r"no group of .obs\['kind'\] has 20 cells: b \(10 cells\)"):
            sd.tl.grn(only_b, tiny_trunk_model, group_key="kind")

    def test_pairs_in_too_few_cells_are_told(self, adata, names, tiny_trunk_model, caplog):
        few = GrnOptions(max_cells=10)
        with pytest.raises(GeneError, match="attention gives no pair of genes a score in 10 cells"):
            sd.tl.grn(adata, tiny_trunk_model, regulators=names, method="attention", options=few)
        assert not set(adata.uns) & {"scdiva", "scdiva_grn"}
        counts = adata.X.tolil()
        column = adata.var_names.get_loc(names[0])
        counts[:, column] = 0
        counts[:25, column] = 1
        counts[:25, [i for i in range(adata.n_vars) if i != column]] = 0
        counts[:25, adata.var_names.get_loc(names[1])] = [[1], *[[0]] * 24]
        adata.X = counts.tocsr()
        sd.tl.grn(adata, tiny_trunk_model, regulators=names, method="attention")
        assert names[0] not in set(adata.uns["scdiva_grn"]["edges"]["source"])
        assert f"1 regulators left out: {names[0]} (no pair with a score)" in caplog.text

    def test_the_order_of_genes_in_the_file_has_no_say(self, adata, names, tiny_trunk_model):
        sd.tl.grn(adata, tiny_trunk_model, regulators=names, varp=True)
        other = adata[:, ::-1].copy()
        sd.tl.grn(other, tiny_trunk_model, regulators=names, varp=True)
        pd.testing.assert_frame_equal(other.uns["scdiva_grn"]["edges"], adata.uns["scdiva_grn"]["edges"], rtol=1e-4)
        matrix = adata.varp["scdiva_grn"]
        np.testing.assert_allclose(
            other.varp["scdiva_grn"].toarray()[::-1, ::-1], matrix.toarray(), rtol=1e-4, atol=1e-7
        )
        best = adata.uns["scdiva_grn"]["edges"].iloc[0]
        at = adata.var_names.get_indexer([best["source"], best["target"]])
        assert matrix[at[0], at[1]] == pytest.approx(best["score"] * best["sign"])

    def test_nothing_is_written_when_it_fails(self, adata, tiny_trunk_model):
        with pytest.raises(GeneError, match="NOGENE"):
            sd.tl.grn(adata, tiny_trunk_model, regulators=["NOGENE"])
        assert not set(adata.uns) & {"scdiva", "scdiva_grn"}


class TestFiles:
    def test_a_file_gives_what_python_gives(self, cli, h5ad, adata, names, tiny_trunk_model, tmp_path):
        tiny_trunk_model.save_pretrained(tmp_path / "model")
        options = [o for name in names for o in ("--tf", name)]
        out = tmp_path / "out.h5ad"
        result = cli(
            "grn", h5ad, out, *options, "--model", tmp_path / "model", "--n-top", 7, "--varp", "--method", "knockout"
        )
        assert result.code == 0, result.err
        assert "directed, signed" in result.out
        sd.tl.grn(adata, tiny_trunk_model, regulators=names, method="knockout", n_top=7, varp=True)
        written = ad.read_h5ad(out)
        edges = adata.uns["scdiva_grn"]["edges"]
        pd.testing.assert_frame_equal(
            written.uns["scdiva_grn"]["edges"], edges, check_dtype=False, check_index_type=False, rtol=1e-5
        )
        np.testing.assert_allclose(written.varp["scdiva_grn"].toarray(), adata.varp["scdiva_grn"].toarray(), rtol=1e-5)
        assert written.uns["scdiva"]["grn"]["scdiva_grn"]["method"] == "knockout"
        adata.write_h5ad(tmp_path / "again.h5ad")  # what Python wrote can be saved, too

        table = tmp_path / "edges.tsv"
        assert (
            cli("grn", h5ad, table, *options, "--model", tmp_path / "model", "--n-top", 7, "--method", "knockout").code
            == 0
        )
        found = pd.read_csv(table, sep="\t", keep_default_na=False)
        assert (
            found[["source", "target", "sign"]].values.tolist() == edges[["source", "target", "sign"]].values.tolist()
        )
        gmt = tmp_path / "regulons.gmt"
        assert cli("grn", h5ad, gmt, *options, "--model", tmp_path / "model", "--n-top", 7).code == 0
        lines = [line.split("\t") for line in gmt.read_text().splitlines()]
        assert {line[0].removesuffix("(+)").removesuffix("(-)") for line in lines} == set(names)
        assert sum(len(line) - 2 for line in lines) == 21

    def test_outputs_are_refused_before_any_work(self, cli, h5ad, tmp_path):
        (tmp_path / "there.tsv").write_text("")
        for out in ("there.tsv", "edges.txt", "nowhere/edges.tsv"):
            result = cli("grn", h5ad, tmp_path / out, "--model", "nomodel")
            assert result.code == 2
            assert "nomodel" not in result.err
        assert ".h5ad, .zarr, .tsv, .csv, .gmt" in cli("grn", h5ad, tmp_path / "edges.txt").err
        for out in ("edges.tsv", "edges.csv", "edges.gmt"):
            result = cli("grn", h5ad, tmp_path / out, "--model", "nomodel", "--varp")
            assert result.code == 2
            assert "no .varp" in result.err

    def test_cells_without_a_group_are_told(self, cli, h5ad, adata, names, tiny_trunk_model, tmp_path, caplog):
        adata.obs["kind"] = ["a"] * 100 + [None] * 20
        adata.write_h5ad(h5ad)
        tiny_trunk_model.save_pretrained(tmp_path / "model")
        arguments = ("--tf", names[0], "--model", tmp_path / "model", "--method", "gene_embedding")
        result = cli("grn", h5ad, tmp_path / "out.h5ad", *arguments, "--group-key", "kind")
        assert result.code == 0, result.err
        assert "20 cells without a value in .obs['kind'] left out" in caplog.text
        assert ad.read_h5ad(tmp_path / "out.h5ad").uns["scdiva"]["grn"]["scdiva_grn"]["cells_without_group"] == 20


def test_regulons_split_targets_by_sign():
    network = GeneNetwork(
        method="knockout",
        regulators=np.array(["SPI1", "GATA1"]),
        targets=np.array(["A", "B", "C", "D"]),
        score=np.array([[3, np.nan, 1, 2], [0.5, 4, 4, 0.1]], dtype=np.float32),
        sign=np.array([[1, 0, -1, 1], [1, -1, 1, 0]], dtype=np.int8),
        is_directed=True,
        normalisation="",
        n_cells=9,
    )
    assert regulons(network) == [
        Regulon("GATA1", ("C", "A"), ("B",), ("D",)),
        Regulon("SPI1", ("A", "D"), ("C",), ()),
    ]
    assert regulons(network, n_top=1) == [Regulon("GATA1", (), ("B",), ()), Regulon("SPI1", ("A",), (), ())]
    with pytest.raises(GeneError, match="score"):
        regulons(pd.DataFrame({"source": ["A"]}))


class TestCommunities:
    def test_are_named_by_what_they_are_enriched_in(self):
        sets = hallmark_sets()
        interferon, other = sets["INTERFERON_ALPHA_RESPONSE"][:8], [f"GENE{i}" for i in range(8)]
        edges = pd.DataFrame(
            [
                {"group": "", "source": genes[0], "target": gene, "score": 1.0}
                for genes in (interferon, other)
                for gene in genes[1:]
            ]
        )
        background = [gene for genes in sets.values() for gene in genes] + [f"GENE{i}" for i in range(2000)]
        found = communities(network_graph(edges), background)
        assert {c.name for c in found} == {"INTERFERON_ALPHA_RESPONSE", "GENE0"}
        named = next(c for c in found if c.name != "GENE0")
        assert set(named.genes) == set(interferon)
        assert named.genes[0] == interferon[0]
        assert named.n_overlap == 8
        assert named.q_value < 1e-6
        assert np.isnan(next(c for c in found if c.name == "GENE0").q_value)

    def test_hallmark_sets_come_with_the_package(self):
        sets = hallmark_sets()
        assert len(sets) == 50
        assert {"ISG15", "MX1", "IFIT3"} <= set(sets["INTERFERON_ALPHA_RESPONSE"])
