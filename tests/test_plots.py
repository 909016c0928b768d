from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scdiva as sd
from scdiva.errors import ConfigError, GeneError, KeyNotFoundError, SourceError


def test_a_picture_is_written_whole_or_not_at_all(adata, tmp_path, monkeypatch):
    adata.obsm["X_umap"] = np.random.default_rng(0).normal(size=(120, 2))
    sd.pl.umap(adata, tmp_path / "a.png", color="cell_type")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sd.pl.umap(adata, tmp_path / "b.png", color="cell_type")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize(("color", "basis"), [("donor", "X_umap"), ("cell_type", "X_tsne")])
def test_what_is_missing_is_named(color, basis, adata, tmp_path):
    adata.obsm["X_umap"] = np.zeros((120, 2))
    with pytest.raises(KeyNotFoundError, match=color if color == "donor" else basis):
        sd.pl.umap(adata, tmp_path / "a.png", color=color, basis=basis)
    assert list(tmp_path.iterdir()) == []


class FirstComponents:
    """In the place of UMAP, which takes half a minute to compile itself."""

    def __init__(self, **options):
        self.n_neighbors = options["n_neighbors"]

    def fit_transform(self, z):
        assert len(z) > self.n_neighbors
        return z[:, :2]


def test_real_and_generated_cells_are_drawn_side_by_side(adata, tmp_path, monkeypatch):
    monkeypatch.setattr("umap.UMAP", FirstComponents)
    made = adata[:90, ::-1].copy()
    continuous = adata[:50].copy()
    continuous.X = continuous.X * 0.7
    sd.pl.generation(adata, {"ours": made, "PCA": continuous}, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    del made.obs["cell_type"]
    with pytest.raises(KeyNotFoundError, match="ours"):
        sd.pl.generation(adata, {"ours": made}, tmp_path / "b.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_markers_are_drawn_for_real_and_generated_cells(adata, tmp_path, monkeypatch):
    drawn = []
    original = __import__("matplotlib.axes", fromlist=["Axes"]).Axes.scatter
    monkeypatch.setattr(
        "matplotlib.axes.Axes.scatter", lambda self, *a, **k: (drawn.append((a, k)), original(self, *a, **k))[1]
    )
    adata.var["symbol"] = [f"S{i}" for i in range(adata.n_vars)]
    made = {"ours": adata[::2, ::-1].copy(), "theirs": adata[:60].copy()}
    sd.pl.marker_dots(adata, made, tmp_path / "a.png", gene_symbols="symbol")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (x, y), options = drawn[0]
    n_types = adata.obs["cell_type"].nunique()
    n_genes = np.unique(x).size
    assert x.size == y.size == n_types * 3 * n_genes
    assert np.nanmax(np.asarray(options["c"]).reshape(n_types, 3, n_genes)[:, 0]) == pytest.approx(1.0)
    with pytest.raises(KeyNotFoundError, match="hgnc"):
        sd.pl.marker_dots(adata, made, tmp_path / "b.png", gene_symbols="hgnc")
    one = adata.copy()
    one.obs["cell_type"] = "a"
    with pytest.raises(SourceError, match="1 types"):
        sd.pl.marker_dots(one, {}, tmp_path / "b.png")
    del made["ours"].obs["cell_type"]
    with pytest.raises(KeyNotFoundError, match="ours"):
        sd.pl.marker_dots(adata, made, tmp_path / "b.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_markers_belong_to_one_type_each():
    from scdiva.metrics.generation_space import LabelledCells
    from scdiva.pl import _markers_of_types

    counts = np.ones((40, 8), dtype=np.int32)
    counts[:20, :3] = 9
    counts[20:, 4:6] = 9
    cells = LabelledCells(sp.csr_matrix(counts), np.repeat(["a", "b"], 20))
    found = _markers_of_types(cells, ["a", "b"], 3)
    assert set(found["a"]) == {0, 1, 2}
    assert set(found["b"][:2]) == {4, 5}
    assert not set(found["a"]) & set(found["b"])


def test_generated_cells_are_aligned_by_gene_name(adata):
    from scdiva.pl import _counts_over

    turned = adata[:, ::-1][:, 5:].copy()
    counts = _counts_over(turned, adata.var_names)
    expected = adata.X.toarray()
    expected[:, -5:] = 0
    np.testing.assert_array_equal(counts.toarray(), expected)


def test_steps_are_drawn_in_their_order(tmp_path, monkeypatch):
    drawn = []
    plot = "matplotlib.axes.Axes.plot"
    original = __import__("matplotlib.axes", fromlist=["Axes"]).Axes.plot
    monkeypatch.setattr(plot, lambda self, *a, **k: (drawn.append(a), original(self, *a, **k))[1])
    sd.pl.steps([32, 8], [[0.7, 0.8], [0.9, 0.9]], [20.0, 80.0], tmp_path / "a.png", baselines={"real": 0.5})
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    np.testing.assert_allclose(drawn[0][:2], [[8, 32], [0.9, 0.75]])
    np.testing.assert_allclose(drawn[1][:2], [[8, 32], [80, 20]])


class TestPath:
    @pytest.fixture
    def paths(self, adata):
        """Cells that are copies of real ones, with positions."""
        made = adata[:60, 3:].copy()
        made.obs["scdiva_position"] = np.repeat([0.0, 0.5, 1.0], 20)
        for cells in (made, adata):
            cells.obs["score"] = np.linspace(0, 1, cells.n_obs)
        return {"one": made, "other": made[::-1].copy()}

    def test_means_by_position_are_drawn_for_every_method(self, adata, paths, tmp_path, monkeypatch):
        drawn = []
        original = __import__("matplotlib.axes", fromlist=["Axes"]).Axes.plot
        monkeypatch.setattr(
            "matplotlib.axes.Axes.plot", lambda self, *a, **k: (drawn.append(a), original(self, *a, **k))[1]
        )
        gene = adata.var_names[5]
        sd.pl.path(
            adata, paths, tmp_path / "a.png", color="cell_type", source="type 0", target="type 1", keys=("score", gene)
        )
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
        assert len(drawn) == 4
        score = np.linspace(0, 1, 60).reshape(3, 20).mean(axis=1)
        np.testing.assert_allclose(drawn[0], [[0, 0.5, 1], score])

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"color": "donor"}, "donor"),
            ({"source": "type 9"}, "type 9"),
            ({"keys": ("score", "no gene")}, "no gene"),
        ],
    )
    def test_what_is_missing_is_named(self, options, words, adata, paths, tmp_path):
        wanted = {"color": "cell_type", "source": "type 0", "target": "type 1", "keys": ("score",), **options}
        with pytest.raises(KeyNotFoundError, match=words):
            sd.pl.path(adata, paths, tmp_path / "a.png", **wanted)
        assert list(tmp_path.iterdir()) == []

    def test_cells_without_positions_are_refused(self, adata, paths, tmp_path):
        with pytest.raises(KeyNotFoundError, match="scdiva_position"):
            sd.pl.path(adata, {"one": adata}, tmp_path / "a.png", color="cell_type", source="type 0", target="type 1",
                       keys=("score",))  # fmt: skip


@pytest.fixture
def network(adata):
    """Cells with a network of two groups: interferon genes that one gene activates, and others that one represses."""
    interferon = ["ISG15", "MX1", "IFIT3", "IFI44L", "LY6E"]
    rows = [
        {"group": group, "source": source, "target": target, "score": 1.0 / (i + 1), "sign": sign}
        for group in ("a", "b")
        for source, sign, targets in (("IRF7", 1, interferon), ("TCF7", -1, ["GNLY", "NKG7", "CST7"]))
        for i, target in enumerate(targets)
    ]
    background = [*interferon, "IRF7", "TCF7", *(f"GENE{i}" for i in range(500))]
    adata.uns["scdiva_grn"] = {"edges": pd.DataFrame(rows), "targets": np.array(background, dtype=object)}
    return adata


class TestGeneNetworks:
    def test_are_drawn(self, network, tmp_path):
        sd.pl.grn_network(network, tmp_path / "net.png", group="a")
        sd.pl.grn_heatmap(network, tmp_path / "map.png", group="a")
        sd.pl.regulon(network, tmp_path / "tf.png", tf="IRF7", group="b", known=["MX1"])
        for name in ("net.png", "map.png", "tf.png"):
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")

    def test_without_signs_too(self, network, tmp_path):
        network.uns["scdiva_grn"]["edges"] = network.uns["scdiva_grn"]["edges"].drop(columns="sign").iloc[:8]
        sd.pl.grn_network(network, tmp_path / "net.png")
        sd.pl.grn_heatmap(network, tmp_path / "map.png")
        sd.pl.regulon(network, tmp_path / "tf.png", tf="TCF7")
        assert len(list(tmp_path.iterdir())) == 3

    def test_communities_and_signs_are_in_the_legend(self, network, tmp_path, monkeypatch):
        said = []
        axes = __import__("matplotlib.axes", fromlist=["Axes"]).Axes
        original = axes.legend
        monkeypatch.setattr(axes, "legend", lambda self, *a, **k: (said.append(a[1]), original(self, *a, **k))[1])
        sd.pl.grn_network(network, tmp_path / "net.png", group="a")
        text = " ".join(said[0])
        assert "INTERFERON" in text
        assert "TCF7 and its neighbours" in text
        assert text.endswith("activates represses")

    def test_bars_point_where_the_signs_do(self, network, tmp_path, monkeypatch):
        drawn = []
        axes = __import__("matplotlib.axes", fromlist=["Axes"]).Axes
        original = axes.barh
        monkeypatch.setattr(axes, "barh", lambda self, *a, **k: (drawn.append(a[1]), original(self, *a, **k))[1])
        sd.pl.regulon(network, tmp_path / "a.png", tf="IRF7", group="a")
        sd.pl.regulon(network, tmp_path / "b.png", tf="TCF7", group="a", n_targets=2)
        assert (drawn[0] > 0).all()
        assert drawn[1].tolist() == [-1.0, -0.5]

    def test_what_is_missing_is_named(self, network, tmp_path):
        with pytest.raises(ConfigError, match="2 groups"):
            sd.pl.grn_network(network, tmp_path / "a.png")
        with pytest.raises(KeyNotFoundError, match="other"):
            sd.pl.grn_heatmap(network, tmp_path / "a.png", key="other")
        with pytest.raises(GeneError, match="SPI1"):
            sd.pl.regulon(network, tmp_path / "a.png", tf="SPI1", group="a")
        assert list(tmp_path.iterdir()) == []


class TestPerturbation:
    @pytest.fixture
    def effects(self):
        obs = pd.DataFrame(
            {"perturbation": ["A", "A+B"], "context": "", "question": ["seen", "combination"]}, index=["A", "A+B"]
        )
        var = pd.DataFrame({"symbol": list("ABCDE")}, index=list("vwxyz"))
        adata = ad.AnnData(np.array([[-5.0, 0.1, 2, -3, 0], [-5, -6, 1, 2, 3]], dtype=np.float32), obs=obs, var=var)
        adata.layers["expected_error"] = np.full((2, 5), 0.5, dtype=np.float32)
        return adata

    def test_bars_are_the_most_changed_genes_without_targets(self, effects, tmp_path, monkeypatch):
        drawn = []
        axes = __import__("matplotlib.axes", fromlist=["Axes"]).Axes
        original = axes.barh
        monkeypatch.setattr(axes, "barh", lambda self, *a, **k: (drawn.append((a, k)), original(self, *a, **k))[1])
        sd.pl.perturbation(effects, tmp_path / "a.png", name="A", n_genes=2)
        sd.pl.perturbation(effects, tmp_path / "b.png", name="A+B", n_genes=3)
        assert drawn[0][0][1].tolist() == [2.0, -3.0]
        assert drawn[1][0][1].tolist() == [3.0, 2.0, 1.0]
        assert drawn[0][1]["xerr"].tolist() == [0.5, 0.5]
        assert (tmp_path / "a.png").stat().st_size > 0

    def test_what_is_missing_is_named(self, effects, tmp_path):
        with pytest.raises(ConfigError, match="2 effects"):
            sd.pl.perturbation(effects, tmp_path / "a.png")
        with pytest.raises(KeyNotFoundError, match="STAT1"):
            sd.pl.perturbation(effects, tmp_path / "a.png", name="STAT1")
        del effects.layers["expected_error"]
        with pytest.raises(ConfigError, match=r"sd\.tl\.perturb"):
            sd.pl.perturbation(effects, tmp_path / "a.png", name="A")
        assert list(tmp_path.iterdir()) == []
