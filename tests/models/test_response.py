"""The response of the profile decoder: finite differences, order of cells, which method it is."""

import copy

import numpy as np
import pytest
import torch

from scdiva.data.reader import open_counts
from scdiva.models.scdiva.response import mean_jacobian, responses
from scdiva.tasks import grn
from scdiva.tasks.evaluate_grn import model_networks


@pytest.fixture
def cells(adata, tiny_model):
    reader = open_counts(adata, tiny_model.vocabulary)
    return reader.read(np.arange(60))


def test_it_is_what_finite_differences_of_the_decoder_say(cells, tiny_model):
    anchor = tiny_model.native("tests").anchor
    double = copy.deepcopy(anchor).double()
    genes = np.array([3, 11, 40])
    found = responses(tiny_model, cells, genes, genes)
    read = tiny_model.unmasked(cells).anchor
    with torch.no_grad():
        pooled = anchor.pool(read.gene_N, read.value_N, read.offset_B).double()
        step = 1e-5
        for i, gene in enumerate(genes):
            more = pooled + step * double.gene_embedding[gene]
            rates = [double.log_rates(double.encode(p)) for p in (more, pooled)]
            slope = ((rates[0] - rates[1]) / step).mean(dim=0).numpy()
            np.testing.assert_allclose(found[i], slope[genes], rtol=1e-3, atol=1e-5)


def test_the_order_of_cells_has_no_say(cells, tiny_model):
    order = np.random.default_rng(0).permutation(cells.n_cells)
    one, other = (mean_jacobian(tiny_model, each, max_cells=20) for each in (cells, cells.take(order)))
    np.testing.assert_allclose(one, other, atol=1e-6)
    every = mean_jacobian(tiny_model, cells)
    assert np.abs(every - one).max() > 1e-6


def test_the_method_weighs_repressions_less_and_tells_strong_signs_only(cells, tiny_model, monkeypatch):
    monkeypatch.setattr(grn, "_MIN_Z_OF_SIGN", 1.0)
    found = grn.grn_cells(cells, tiny_model, [str(tiny_model.vocabulary.symbol[5])], "response")
    targets = tiny_model.vocabulary.find(found.targets.tolist())
    raw = responses(tiny_model, cells, np.array([5]), targets)[0]
    raw[targets == 5] = np.nan
    z = (raw - np.nanmean(raw)) / np.nanstd(raw)
    np.testing.assert_allclose(found.score[0], np.where(z < 0, -z / 2, z), rtol=1e-4, atol=1e-5)
    known = ~np.isnan(z)
    assert (found.sign[0][known] == np.where(np.abs(z) >= 1.0, np.sign(z), 0)[known]).all()
    assert np.count_nonzero(found.sign) > 0
    assert found.is_directed


def test_evaluations_take_the_methods_of_a_model(cells, tiny_model):
    networks, titles, fingerprint = model_networks(tiny_model)
    assert set(networks) == set(titles) == set(grn.METHODS)
    symbols = np.asarray(tiny_model.vocabulary.symbol, dtype=np.str_)
    n_cells = np.bincount(cells.counts.indices, minlength=cells.n_genes)
    genes = np.flatnonzero(n_cells >= 20)
    found = networks["response"](cells, symbols, genes[:1], genes, seed=0)
    direct = grn.grn_cells(cells, tiny_model, [str(symbols[genes[0]])], "response")
    np.testing.assert_array_equal(found.score, direct.score)
    _, _, other = model_networks(tiny_model, grn.GrnOptions(max_cells=7))
    assert fingerprint != other
