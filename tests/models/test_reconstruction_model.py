"""What models say of hidden tokens: no leak where none is allowed, and the right states and rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from native_cells import build, dense_counts, stir, twins
from scdiva.config import DenseConfig, OfficialConfig
from scdiva.data.statistics import GeneStatistics
from scdiva.diffusion import Masks
from scdiva.errors import UnsupportedError, UntrainedHeadError
from scdiva.genes import GeneVocabulary
from scdiva.losses import slot_nll, ztnb_expected_log1p, ztnb_nll
from scdiva.models.base import HiddenPlaces, Reconstructor
from scdiva.models.scdiva import ScDiVa, reconstruction
from scdiva.models.scdiva.dense import DenseNetwork
from scdiva.models.scdiva.official import OfficialNetwork
from scdiva.models.scdiva.reconstruction import NativeHidden

N_GENES = 40
DENSE = dense_counts(14, N_GENES, seed=1)[:12]
CELLS = twins.cell_counts(DENSE, DENSE.sum(axis=1) + 9)
VOCABULARY = GeneVocabulary.default().subset(np.arange(N_GENES))
OFFICIAL = {"n_layers": 2, "width": 16, "n_heads": 2, "n_hidden": 24, "max_tokens": N_GENES}


def native(layout: str = "set", heads=("anchor", "profile_decoder", "identity", "value"), **trunk) -> ScDiVa:
    built = stir(build(CELLS, layout=layout, **{"max_tokens": N_GENES} | trunk))
    return ScDiVa(
        built.network, built.config, VOCABULARY, built.statistics, details={"name": "n", "trained_heads": list(heads)}
    )


def official(heads=("gene", "value")) -> ScDiVa:
    config = OfficialConfig(architecture="official", **OFFICIAL)
    network = OfficialNetwork(N_GENES, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    network.mark_trained(heads)
    return ScDiVa(network, config, VOCABULARY, GeneStatistics.from_cells(CELLS), details={"name": "o"})


@pytest.fixture(scope="module")
def is_hidden() -> np.ndarray:
    is_hidden = np.random.default_rng(0).random(CELLS.counts.nnz) < 0.5
    is_hidden[: CELLS.counts.indptr[1]] = True  # all of the first cell
    return is_hidden


def with_other_hidden_tokens(is_hidden: np.ndarray, *, same_genes: bool) -> tuple:
    """The same visible tokens, as many hidden ones and as many UMIs in them; other genes, or other counts of them."""
    rng = np.random.default_rng(7)
    dense, hidden = DENSE.copy(), np.zeros(DENSE.shape, dtype=bool)
    hidden[DENSE > 0] = is_hidden
    other = np.zeros_like(hidden)
    for row in range(len(dense)):
        genes = np.flatnonzero(hidden[row])
        counts = dense[row, genes]
        dense[row, genes] = 0
        if not same_genes:
            free = np.flatnonzero((DENSE[row] == 0) | hidden[row])
            genes = np.sort(rng.choice(free, genes.size, replace=False))
        dense[row, genes] = rng.permutation(counts)
        other[row, genes] = True
    return replace(CELLS, counts=sp.csr_matrix(dense.astype(np.int32))), other[dense > 0]


def everything(said: NativeHidden) -> list[np.ndarray]:
    cell, gene = (a.ravel() for a in np.meshgrid(np.arange(len(DENSE)), np.arange(N_GENES), indexing="ij"))
    return [said.log_odds, said.expected_values(cell, gene), said.value_nll(cell, gene, np.full(cell.size, 2))]


class TestNative:
    @pytest.mark.parametrize("same_genes", [True, False])
    @pytest.mark.parametrize("has_trunk", [True, False])
    def test_what_is_hidden_changes_nothing(self, same_genes, has_trunk, is_hidden):
        model = native(**({} if has_trunk else {"n_layers": 0}))
        changed, also_hidden = with_other_hidden_tokens(is_hidden, same_genes=same_genes)
        assert (changed.counts != CELLS.counts).nnz > 20
        before = everything(model.predict_hidden(CELLS, is_hidden)[""])
        after = everything(model.predict_hidden(changed, also_hidden)[""])
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)

    def test_what_is_visible_does(self, is_hidden):
        model = native()
        dense = DENSE.copy()
        row, gene = next(
            (r, g) for r, g in np.argwhere(DENSE > 0) if not is_hidden[(DENSE[:r] > 0).sum() + (DENSE[r, :g] > 0).sum()]
        )
        dense[row, gene] += 6
        changed = replace(CELLS, counts=sp.csr_matrix(dense.astype(np.int32)))
        before, after = (model.predict_hidden(cells, is_hidden)[""].log_odds for cells in (CELLS, changed))
        assert not np.allclose(before[row], after[row])

    @torch.inference_mode()
    @pytest.mark.parametrize("trunk", [{}, {"n_layers": 0}, {"dispersion": "state"}])
    def test_values_come_from_the_query_and_are_told_the_gene(self, trunk, is_hidden, monkeypatch):
        monkeypatch.setattr(reconstruction, "_VALUES", 3)  # several chunks
        model = native(**trunk)
        network, said = model.network, model.predict_hidden(CELLS, is_hidden)[""]
        cell, gene, count = np.array([0, 3, 3, 9]), np.array([5, 5, 17, 39]), np.array([1, 2, 1, 7])
        direction = None
        if network.trunk is not None:
            direction = network.trunk.value_direction(said.output.states.query_BD)[torch.from_numpy(cell)]
        log_mean = network.log_mean(said.output, torch.from_numpy(cell), torch.from_numpy(gene), direction)
        log_theta = network.log_dispersion(said.output, torch.from_numpy(cell), torch.from_numpy(gene), direction)
        scale = torch.from_numpy(1e4 / CELLS.library_size[cell]).float()
        expected = ztnb_expected_log1p(log_mean, log_theta, scale)
        np.testing.assert_allclose(said.expected_values(cell, gene), expected.numpy(), rtol=1e-5)
        nll = ztnb_nll(torch.from_numpy(count), log_mean, log_theta)
        np.testing.assert_allclose(said.value_nll(cell, gene, count), nll.numpy(), rtol=1e-5)

    def test_expected_values_are_those_of_the_cells_own_depth(self, is_hidden):
        # of a gene whose expected count is as good as 1: log1p(1e4 / library size)
        model = native(n_layers=0)
        model.network.value_offset.data[:] = -30.0
        said = model.predict_hidden(CELLS, is_hidden)[""]
        found = said.expected_values(np.arange(12), np.full(12, 4))
        np.testing.assert_allclose(found, np.log1p(1e4 / CELLS.library_size), rtol=1e-3)

    def test_untrained_heads_are_refused(self, is_hidden):
        with pytest.raises(UntrainedHeadError, match="value head of n is untrained"):
            native(heads=("anchor", "identity")).predict_hidden(CELLS, is_hidden)
        with pytest.raises(UntrainedHeadError, match="identity and the value head"):
            native(heads=()).predict_hidden(CELLS, is_hidden)

    def test_squared_errors_are_no_likelihood(self, is_hidden):
        said = native(value_likelihood="mse").predict_hidden(CELLS, is_hidden)[""]
        assert said.value_nll(np.array([0]), np.array([0]), np.array([1])) is None


def check_choices(said: HiddenPlaces, is_hidden: np.ndarray) -> None:
    cell = np.repeat(np.arange(12), np.diff(CELLS.counts.indptr))
    for row in range(12):
        own = said.distinct[cell[is_hidden] == row]
        assert len(set(own)) == own.size
        assert not set(own) & set(CELLS.counts.indices[(cell == row) & ~is_hidden])
        assert not set(said.likeliest[row]) & set(CELLS.counts.indices[(cell == row) & ~is_hidden])
    is_first = said.rank == 0
    np.testing.assert_array_equal(is_first, said.best == CELLS.counts.indices[is_hidden])


class TestSequenceLayout:
    def test_every_hidden_token_has_its_slot(self, is_hidden):
        model = native("sequence")
        assert (model.n_places, native().n_places) == (N_GENES, None)
        said = model.predict_hidden(CELLS, is_hidden)[""]
        assert isinstance(said, HiddenPlaces)
        assert not said.saw_answer
        check_choices(said, is_hidden)

    def test_likelihoods_are_those_of_training(self, is_hidden):
        model = native("sequence")
        network = model.network
        said = model.predict_hidden(CELLS, is_hidden)[""]
        cell = np.repeat(np.arange(12), np.diff(CELLS.counts.indptr))
        n_hidden = np.bincount(cell[is_hidden], minlength=12)
        built = build(CELLS, layout="sequence", max_tokens=N_GENES)
        masked, _ = built.tokeniser.corrupt(CELLS, Masks(is_hidden, is_hidden, n_hidden), np.random.default_rng(0))
        with torch.no_grad():
            output = network(masked)
            nll = slot_nll(
                output.gene_logit_BG,
                masked.is_admissible_BG,
                masked.n_hidden_B,
                network.trunk.query_direction(output.states.slot_SD),
                network.anchor.gene_embedding,
                torch.from_numpy(cell[is_hidden]),
                torch.from_numpy(CELLS.counts.indices[is_hidden].astype(np.int64)),
            )
        np.testing.assert_allclose(said.identity_nll, nll, rtol=1e-4)


@pytest.fixture(scope="module")
def model() -> ScDiVa:
    return official()


class TestOfficial:
    def test_it_says_which_variant_sees_the_answer(self, model, is_hidden):
        assert isinstance(model, Reconstructor)
        said = model.predict_hidden(CELLS, is_hidden)
        assert {name: places.saw_answer for name, places in said.items()} == {
            "LAT reads the answer": True,
            "LAT reads visible tokens": False,
        }
        for places in said.values():
            check_choices(places, is_hidden)

    def test_and_that_is_true(self, model, is_hidden):
        # one hidden count in each cell is larger by one; only cells in which no token changes its place are compared
        counts = CELLS.counts.copy()
        counts.data = counts.data.copy()
        first = np.array(
            [
                np.flatnonzero(is_hidden[a:b])[0] + a
                for a, b in zip(counts.indptr, counts.indptr[1:], strict=False)
                if is_hidden[a:b].any()
            ]
        )
        counts.data[first] += 1
        changed = replace(CELLS, counts=counts)
        before, after = (model.predict_hidden(c, is_hidden) for c in (CELLS, changed))
        same = [model.network.tokenise(c, model.statistics).row_N for c in (CELLS, changed)]
        cell = np.repeat(np.arange(12), np.diff(CELLS.counts.indptr))
        cell_of_token = model.network.tokenise(CELLS, model.statistics).cell_N.numpy()
        keeps_order = [bool((same[0] == same[1]).numpy()[cell_of_token == row].all()) for row in range(12)]
        kept = np.array(keeps_order)[cell[is_hidden]]
        assert kept.sum() > 20
        np.testing.assert_allclose(
            before["LAT reads visible tokens"].identity_nll[kept],
            after["LAT reads visible tokens"].identity_nll[kept],
            atol=1e-5,
        )
        leak = np.abs(before["LAT reads the answer"].identity_nll - after["LAT reads the answer"].identity_nll)
        assert leak[kept].max() > 1e-4  # small: one count of many in a mean

    @pytest.mark.parametrize("lat", ["clean", "visible"])
    def test_each_gene_is_read_off_its_own_place(self, model, lat, is_hidden):
        said = model.predict_hidden(CELLS, is_hidden)[
            "LAT reads the answer" if lat == "clean" else "LAT reads visible tokens"
        ]
        network = model.network
        tokens = network.tokenise(CELLS, model.statistics)
        # hidden tokens by cell and gene, in the order of the sequence
        hidden = {
            (row, gene + 2)
            for row, gene in zip(
                np.repeat(np.arange(12), np.diff(CELLS.counts.indptr))[is_hidden],
                CELLS.counts.indices[is_hidden],
                strict=True,
            )
        }
        pairs = list(zip(tokens.cell_N.tolist(), tokens.row_N.tolist(), strict=True))
        is_hidden_N = torch.tensor([pair in hidden for pair in pairs])
        with torch.no_grad():
            state = network(tokens, is_hidden_N, lat=lat).token_ND[is_hidden_N]
            nll = network.identity_nll(state, tokens.row_N[is_hidden_N]).numpy()
            value = network.values(state).numpy()
        order = np.lexsort((tokens.row_N[is_hidden_N].numpy(), tokens.cell_N[is_hidden_N].numpy()))
        np.testing.assert_allclose(said.identity_nll, nll[order], atol=1e-4)
        np.testing.assert_allclose(said.value, value[order], atol=1e-4)
        assert said.value_nll is None

    @pytest.mark.parametrize("heads", [("gene",), ("value",), ()])
    def test_untrained_heads_are_refused(self, heads, is_hidden):
        with pytest.raises(UntrainedHeadError):
            official(heads).predict_hidden(CELLS, is_hidden)

    def test_the_dense_model_has_no_tokens(self, is_hidden):
        config = DenseConfig(architecture="official-dense", n_layers=1, width=16, n_heads=2, n_hidden=16)
        model = ScDiVa(DenseNetwork(N_GENES, config), config, VOCABULARY, GeneStatistics.from_cells(CELLS))
        with pytest.raises(UnsupportedError, match="reconstruction"):
            model.predict_hidden(CELLS, is_hidden)
