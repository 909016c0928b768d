"""``grn`` on arrays, in Python, from files, and by command."""

from __future__ import annotations

import numpy as np
import pytest

from scdiva.errors import ConfigError, GeneError, UnsupportedError
from scdiva.tasks.grn import METHODS, GrnOptions, grn_cells, transcription_factors


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
        grn_cells(cells, tiny_trunk_model, names, options=GrnOptions(correction=c)).score
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
