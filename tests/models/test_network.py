from __future__ import annotations

import numpy as np
import pytest
import torch

import twins
from scdiva.config import AnchorConfig, AnchorObjectiveConfig
from scdiva.data.statistics import GeneStatistics
from scdiva.models.scdiva.init import corpus_components, init_network, normalised_matrix
from scdiva.models.scdiva.network import AnchorNetwork
from scdiva.models.scdiva.objectives import PackedCells, SplitProfileObjective
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


@pytest.fixture
def network(cells) -> AnchorNetwork:
    """At its start."""
    network = AnchorNetwork(60, AnchorConfig(n_latent=K, n_embedding=K, n_hidden=8))
    init_network(network, GeneStatistics.from_cells(cells), [cells], K, seed=0)
    return network.eval()


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


def test_the_decoder_starts_at_the_mean_profile_for_every_z(network, cells):
    profile = GeneStatistics.from_cells(cells).log_mean_profile()
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


def test_every_part_can_learn(network, cells):
    # zero at the start must not mean zero for ever: after two steps every parameter has moved
    objective = SplitProfileObjective(network, AnchorObjectiveConfig()).train()
    optimiser = torch.optim.Adam(objective.parameters(), lr=1e-2)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    rng, generator = np.random.default_rng(0), torch.Generator()
    for _ in range(4):
        optimiser.zero_grad()
        objective(objective.prepare(cells, rng), generator).loss.backward()
        optimiser.step()
    assert [name for name, p in network.named_parameters() if torch.equal(p, before[name])] == []


def test_embedding_dimensions_beyond_the_components_stay_small_noise(cells):
    network = AnchorNetwork(60, AnchorConfig(n_latent=10, n_embedding=10, n_hidden=8))
    init_network(network, GeneStatistics.from_cells(cells), [cells], K, seed=0)
    noise = network.gene_embedding.detach()[:, K:]
    assert 0.005 < float(noise.std()) < 0.02


def test_networks_start_equal_whatever_else_was_drawn():
    config = AnchorConfig(n_latent=K, n_embedding=6, n_hidden=8)
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
        w = {name: p.detach().double().numpy() for name, p in tiny_model.network.state_dict().items()}
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
        np.testing.assert_array_equal(z[0], z[1])
        np.testing.assert_array_equal(z[0], z[2])

    def test_the_expected_profile_is_a_share_of_ten_thousand(self, tiny_model, query):
        z = tiny_model.embed(query)
        everything = tiny_model.expected_profile(z, np.arange(tiny_model.vocabulary.n_genes))
        np.testing.assert_allclose(everything.sum(axis=1), 1e4, rtol=1e-4)
        genes = np.array([30, 2, 117])
        np.testing.assert_allclose(tiny_model.expected_profile(z, genes), everything[:, genes], rtol=1e-5)
        assert everything.std(axis=0).max() > 1  # it depends on the cell


class TestObjective:
    @pytest.fixture
    def objective(self, network, cells):
        objective = SplitProfileObjective(network, AnchorObjectiveConfig()).train()
        optimiser = torch.optim.Adam(objective.parameters(), lr=1e-2)
        for seed in range(5):
            optimiser.zero_grad()
            objective(objective.prepare(cells, np.random.default_rng(seed)), torch.Generator()).loss.backward()
            optimiser.step()
        return objective

    def test_the_encoder_never_sees_what_the_decoder_is_scored_on(self, objective, cells, monkeypatch):
        inputs = objective.prepare(cells, np.random.default_rng(0))
        seen = []
        original = objective.network.encode
        monkeypatch.setattr(objective.network, "encode", lambda pooled: seen.append(original(pooled)) or seen[-1])
        first = objective(inputs, torch.Generator()).loss
        changed = type(inputs)(
            inputs.view_a, inputs.cell_N, inputs.gene_N.flip(0), inputs.count_N.flip(0) * 7, inputs.is_measured_BG
        )
        second = objective(changed, torch.Generator()).loss
        assert torch.equal(seen[0], seen[1])
        assert float(first) != float(second)

    def test_the_two_views_are_the_cell(self, objective, cells, dense):
        inputs = objective.prepare(cells, np.random.default_rng(3))
        b = np.zeros_like(dense, dtype=np.float64)
        b[inputs.cell_N.numpy(), inputs.gene_N.numpy()] = inputs.count_N.numpy()
        a = dense - b
        assert (a >= 0).all()
        np.testing.assert_array_equal(inputs.view_a.gene_N.numpy(), np.concatenate([np.flatnonzero(row) for row in a]))

    def test_the_loss_is_the_twin_on_view_b_and_the_floor_its_mean_profile(self, objective, cells):
        objective.eval()
        inputs = objective.prepare(cells, np.random.default_rng(0))
        output = objective(inputs, torch.Generator())
        b = torch.zeros(150, 60, dtype=torch.float64)
        b[inputs.cell_N, inputs.gene_N] = inputs.count_N.double()
        view = inputs.view_a
        with torch.no_grad():
            z = objective.network.encode(objective.network.pool(view.gene_N, view.value_N, view.offset_B))
            log_rate = objective.network.log_rates(z)
        expected = twins.profile_nll(log_rate, b, inputs.is_measured_BG).mean()
        profile = torch.from_numpy(GeneStatistics.from_cells(cells).log_mean_profile()).expand(150, -1)
        floor = twins.profile_nll(profile, b, inputs.is_measured_BG).mean()
        assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
        assert float(output.terms["profile_nll_floor"]) == pytest.approx(float(floor), rel=1e-5)
        assert output.n_cells == 150

    def test_the_floor_does_not_move_with_training(self, objective, cells):
        inputs = objective.prepare(cells, np.random.default_rng(0))
        objective.eval()
        before = float(objective(inputs, torch.Generator()).terms["profile_nll_floor"])
        with torch.no_grad():
            objective.network.log_profile += torch.randn(60, generator=torch.Generator().manual_seed(0))
        assert float(objective(inputs, torch.Generator()).terms["profile_nll_floor"]) == before

    def test_preparation_and_noise_are_seeded(self, network, cells):
        objective = SplitProfileObjective(network, AnchorObjectiveConfig(latent_noise=0.5, kl_weight=0.1)).train()
        with torch.no_grad():
            network.decoder.weight.fill_(0.3)

        def loss(seed, noise):
            inputs = objective.prepare(cells, np.random.default_rng(seed))
            return float(objective(inputs, torch.Generator().manual_seed(noise)).loss)

        assert loss(0, 0) == loss(0, 0)
        assert len({loss(0, 0), loss(1, 0), loss(0, 1)}) == 3
        objective.eval()
        assert loss(0, 0) == loss(0, 1)

    def test_the_kl_term_is_that_of_a_diagonal_normal(self, network, cells):
        objective = SplitProfileObjective(network, AnchorObjectiveConfig(kl_weight=0.1)).eval()
        inputs = objective.prepare(cells, np.random.default_rng(0))
        view = inputs.view_a
        with torch.no_grad():
            mean = network.encode(network.pool(view.gene_N, view.value_N, view.offset_B))
        posterior = torch.distributions.Normal(mean, torch.full_like(mean, float(np.exp(-2.0))))
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=1).mean()
        assert float(objective(inputs, torch.Generator()).terms["kl"]) == pytest.approx(float(kl), rel=1e-5)

    def test_genes_that_a_file_does_not_measure_are_unknown_not_zero(self, network, dense):
        measured = np.arange(60) < 30
        cells = twins.cell_counts(dense * measured, measured=measured)
        objective = SplitProfileObjective(network, AnchorObjectiveConfig()).eval()
        inputs = objective.prepare(cells, np.random.default_rng(0))
        before = float(objective(inputs, torch.Generator()).loss)
        with torch.no_grad():
            network.log_profile[30:] += 9.0
        assert float(objective(inputs, torch.Generator()).loss) == pytest.approx(before, rel=1e-6)
