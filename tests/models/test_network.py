from __future__ import annotations

import numpy as np
import pytest
import torch

import twins
from scdiva.config import NativeConfig, NativeObjectiveConfig
from scdiva.data.statistics import GeneStatistics
from scdiva.models.scdiva.init import corpus_components, init_network, normalised_matrix, simple_model
from scdiva.models.scdiva.inputs import PackedCells
from scdiva.models.scdiva.native import NativeNetwork
from scdiva.models.scdiva.network import AnchorNetwork
from scdiva.models.scdiva.objectives import NativeObjective
from scdiva.nn import ResidualMLP

K = 4


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    """Cells of four types, so that the first components are well apart; one cell is empty."""
    rng = np.random.default_rng(0)
    rate = rng.lognormal(0, 1, 60) * np.where(rng.random((4, 60)) < 0.2, 12.0, 1.0)
    counts = rng.poisson(rate[rng.choice(4, 150, p=[0.4, 0.3, 0.2, 0.1])])
    counts[11] = 0
    return counts


@pytest.fixture(scope="module")
def cells(dense):
    return twins.cell_counts(dense, dense.sum(axis=1) + 20)


@pytest.fixture(scope="module")
def statistics(cells) -> GeneStatistics:
    return GeneStatistics.from_cells(cells)


@pytest.fixture(scope="module")
def simple(cells, statistics):
    return simple_model(statistics, np.full(60, cells.n_cells), np.asarray(cells.counts.sum(axis=1)).ravel())


SIZES = NativeConfig(n_latent=K, n_embedding=K, n_hidden=8)


def started(cells, statistics, simple, sizes: NativeConfig = SIZES) -> NativeNetwork:
    network = NativeNetwork(60, sizes)
    init_network(network, statistics, simple, [cells], K, seed=0)
    return network.eval()


@pytest.fixture
def network(cells, statistics, simple) -> AnchorNetwork:
    """The anchor of a network without a trunk, at its start."""
    return started(cells, statistics, simple).anchor


def encode(network: AnchorNetwork, cells) -> np.ndarray:
    packed = PackedCells.pack(cells)
    with torch.no_grad():
        return network.encode(network.pool(packed.gene_N, packed.value_N, packed.offset_B)).numpy()


def test_rows_are_normalised_as_in_the_definition(cells, dense):
    expected = twins.normalised_rows(dense, dense.sum(axis=1) + 20)
    np.testing.assert_allclose(normalised_matrix(cells).toarray(), expected, atol=1e-6)


def test_z_starts_as_the_principal_scores_of_the_corpus(network, cells, dense):
    rows = twins.normalised_rows(dense, dense.sum(axis=1) + 20)
    _, _, loadings = np.linalg.svd(rows, full_matrices=False)
    scores = rows @ loadings[:K].T
    z = encode(network, cells)
    for k in range(K):  # up to sign, and up to one factor for all
        assert abs(np.corrcoef(z[:, k], scores[:, k])[0, 1]) > 0.999
    ratio = z.std(axis=0) / scores.std(axis=0)
    np.testing.assert_allclose(ratio, ratio[0], rtol=0.02)
    assert z.var(axis=0).sum() == pytest.approx(K, rel=1e-3)


def test_components_do_not_depend_on_how_the_corpus_is_cut(cells):
    whole, scale = corpus_components([cells], K, seed=0)
    parts, scale_of_parts = corpus_components([cells.take(np.arange(70)), cells.take(np.arange(70, 150))], K, seed=0)
    np.testing.assert_array_equal(whole, parts)
    assert scale == scale_of_parts
    assert np.sqrt((whole**2).mean()) == pytest.approx(1 / np.sqrt(K), rel=1e-5)


def test_the_decoder_starts_at_the_mean_profile_for_every_z(network, statistics):
    profile = statistics.log_mean_profile()
    with torch.no_grad():
        log_rate = network.log_rates(torch.randn(7, K, generator=torch.Generator().manual_seed(0)) * 5)
    np.testing.assert_allclose(torch.log_softmax(log_rate, dim=1).numpy(), np.tile(profile, (7, 1)), atol=1e-5)


def test_every_learned_part_adds_nothing_at_the_start(network):
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (network.encoder_mlp(x) == 0).all()
        assert (network.decoder_mlp(x) == 0).all()
        assert (network.decoder(x) == 0).all()
        assert torch.equal(network.encoder(x), x)
        assert (ResidualMLP(3, 5, 2)(torch.randn(4, 3)) == 0).all()


def test_every_part_can_learn(cells, statistics, simple):
    # zero at the start must not mean zero for ever: after a few steps every parameter has moved
    network = started(cells, statistics, simple)
    settings = NativeObjectiveConfig(identity_weight=0.0, value_weight=0.0)
    objective = NativeObjective(network, settings, SIZES, statistics, simple).train()
    optimiser = torch.optim.Adam(objective.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in network.anchor.named_parameters()}
    rng, generator = np.random.default_rng(0), torch.Generator()
    for _ in range(4):
        optimiser.zero_grad()
        objective(objective.prepare(cells, rng), generator).loss.backward()
        optimiser.step()
    assert [name for name, p in network.anchor.named_parameters() if torch.equal(p, before[name])] == []


def test_embedding_dimensions_beyond_the_components_stay_small_noise(cells, statistics, simple):
    network = started(cells, statistics, simple, NativeConfig(n_latent=10, n_embedding=10, n_hidden=8)).anchor
    noise = network.gene_embedding.detach()[:, K:]
    assert 0.005 < float(noise.std()) < 0.02


def test_networks_start_equal_whatever_else_was_drawn():
    config = NativeConfig(n_latent=K, n_embedding=6, n_hidden=8)
    first = AnchorNetwork(60, config).state_dict()
    torch.rand(5)
    for name, tensor in AnchorNetwork(60, config).state_dict().items():
        assert torch.equal(tensor, first[name]), name


class TestTrainedModel:
    """On a model in which no part is zero any more."""

    @pytest.fixture
    def query(self, adata, tiny_model):
        from scdiva.data.reader import open_counts

        return open_counts(adata, tiny_model.vocabulary).read(np.arange(120))

    def test_z_depends_on_the_cell_alone(self, tiny_model, query):
        together = tiny_model.embed(query)
        order = np.random.default_rng(0).permutation(120)
        np.testing.assert_allclose(tiny_model.embed(query.take(order)), together[order], atol=1e-5)
        for i in (0, 17, 119):
            np.testing.assert_allclose(tiny_model.embed(query.take(np.array([i])))[0], together[i], atol=1e-5)

    def test_z_equals_the_written_formula(self, tiny_model, query):
        w = {name: p.detach().double().numpy() for name, p in tiny_model.network.anchor.state_dict().items()}
        pooled = (
            twins.normalised_rows(query.counts.toarray(), query.library_size) @ w["gene_embedding"] * w["pool_scale"]
        )
        norm = (pooled - pooled.mean(1, keepdims=True)) / np.sqrt(pooled.var(1, keepdims=True) + 1e-5)
        hidden = norm * w["encoder_mlp.norm.weight"] + w["encoder_mlp.norm.bias"]
        hidden = hidden @ w["encoder_mlp.up.weight"].T + w["encoder_mlp.up.bias"]
        hidden = hidden / (1 + np.exp(-hidden))
        residual = hidden @ w["encoder_mlp.down.weight"].T + w["encoder_mlp.down.bias"]
        assert np.abs(residual).max() > 0.01  # the learned part is at work
        np.testing.assert_allclose(tiny_model.embed(query), pooled @ w["encoder.weight"].T + residual, atol=1e-4)

    def test_empty_cells_share_one_finite_point(self, tiny_model):
        z = tiny_model.embed(twins.cell_counts(np.zeros((3, tiny_model.vocabulary.n_genes)), [0, 0, 50]))
        assert np.isfinite(z).all()
        # a matrix product rounds its last rows in another order than its first
        np.testing.assert_allclose(z, np.broadcast_to(z[0], z.shape), rtol=1e-5)

    def test_the_expected_profile_is_a_share_of_ten_thousand(self, tiny_model, query):
        z = tiny_model.embed(query)
        everything = tiny_model.expected_profile(z, np.arange(tiny_model.vocabulary.n_genes))
        np.testing.assert_allclose(everything.sum(axis=1), 1e4, rtol=1e-4)
        genes = np.array([30, 2, 117])
        np.testing.assert_allclose(tiny_model.expected_profile(z, genes), everything[:, genes], rtol=1e-5)
        assert everything.std(axis=0).max() > 1  # it depends on the cell
