"""The network on top of the simple predictors: its start, its gradients, its loss, and what it can learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from native_cells import dense_counts
from perturbation_models import native_model
from scdiva.data.perturbations import Perturbation
from scdiva.errors import UnsupportedError
from scdiva.genes import GeneVocabulary
from scdiva.models.scdiva import perturbation_network as code
from scdiva.models.scdiva.perturbation_network import (
    WEIGHT_FLOOR,
    GeneQueryRegressor,
    PerturbationNetwork,
    PerturbationObjective,
    blocks_of,
    gene_weights,
    panel_of,
    ranking_loss,
)
from scdiva.models.scdiva.perturbation_tokens import PerturbationCoder
from twins import cell_counts

N_GENES, N_PANEL, N_AXES = 40, 36, 3
CELLS = cell_counts(dense_counts())
VOCABULARY = GeneVocabulary.default().subset(np.arange(N_GENES))
SYMBOLS = VOCABULARY.symbol.astype(str).tolist()
PANEL = np.arange(2, 2 + N_PANEL)
AXES = np.linalg.qr(np.random.default_rng(0).normal(size=(N_PANEL, N_AXES)))[0].T
CODER = PerturbationCoder(VOCABULARY, ("drug",), 2)


@pytest.fixture(scope="module")
def model():
    return native_model(VOCABULARY, CELLS)


def network_of(model, *, n_trained_layers: int = 1, seed: int = 0) -> PerturbationNetwork:
    return PerturbationNetwork(model, CODER, PANEL, AXES, n_trained_layers=n_trained_layers, seed=seed)


def inputs_of(network, rows, perturbations=None, *, seed: int = 0):
    rows = np.asarray(rows)
    rng = np.random.default_rng(seed)
    asked = perturbations or [Perturbation((SYMBOLS[int(r) % 10],)) for r in rows]
    return network.inputs(
        CELLS.take(rows),
        CODER.codes(asked),
        rng.random((rows.size, N_PANEL)),
        rng.normal(size=(rows.size, N_PANEL)),
        rng.normal(size=(rows.size, 3 * N_AXES)),
    )


@torch.no_grad()
def shaken(network, size: float = 0.3):
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return network


def test_nothing_is_added_at_the_start(model):
    network = network_of(model).eval()
    with torch.no_grad():
        assert not network(inputs_of(network, range(8))).any()
    assert panel_of(network).tolist() == PANEL.tolist()


def test_every_gene_of_the_panel_is_asked_for_and_each_cell_is_its_own(model):
    network = shaken(network_of(model)).eval()
    inputs = inputs_of(network, range(60))
    with torch.no_grad():
        found = network(inputs)
        assert found.shape == (60, N_PANEL)
        assert (found.std(dim=1) > 0).all()
        base = inputs.values_BP3[..., 2].numpy()
        for row in (0, 58, 59):
            alone = network.inputs(
                CELLS.take(np.array([row])),
                inputs.codes.take(torch.tensor([row])),
                inputs.values_BP3[row : row + 1, :, 1].numpy(),
                base[row : row + 1],
                inputs.described_BX[row : row + 1].numpy(),
            )
            assert torch.allclose(network(alone)[0], found[row], atol=1e-5)


def test_states_are_z_lat_and_the_mean_of_the_perturbed_places(model):
    network = shaken(network_of(model)).eval()
    native, width = network.network, network.network.trunk.transformer.width
    gene, other = sorted(SYMBOLS[4:6])
    inputs = inputs_of(network, [3, 4, 5], [Perturbation((gene,)), Perturbation((gene, other)), Perturbation(())])
    with torch.no_grad():
        found = network.states(inputs.cells, inputs.codes)
        tokens = network.tokens(inputs.codes, native.trunk.gene, native.anchor.gene_embedding)
        z = native.latent(inputs.cells)
        said = native.trunk(inputs.cells, z, native.anchor.gene_embedding, native.mean_log_depth, extra_BKD=tokens)
    extra = said.extra_BKD
    places = torch.stack([extra[0, 0], extra[1].mean(dim=0), extra[2, 0]])
    joined = torch.cat([z, said.lat_BD, places], dim=1)
    assert joined.shape[1] == 6 + 2 * width
    expected = (joined - joined.mean(dim=1, keepdim=True)) / joined.std(dim=1, keepdim=True, unbiased=False)
    assert torch.allclose(found, expected, atol=1e-4)


def test_perturbation_and_cell_matter(model):
    network = shaken(network_of(model)).eval()
    asked = [
        Perturbation((SYMBOLS[4],)),
        Perturbation((SYMBOLS[4],), "activation"),
        Perturbation(("drug",), "treatment"),
    ]
    with torch.no_grad():
        found = [network(inputs_of(network, [3], [one])) for one in asked]
        other_cell = network(inputs_of(network, [4], asked[:1]))
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert not torch.allclose(found[0], other_cell)


@pytest.mark.parametrize("n_layers", [0, 1, 2])
def test_gradients_reach_tokens_regressor_and_the_last_layers_and_nothing_else(model, n_layers):
    network = shaken(network_of(model, n_trained_layers=n_layers)).train()
    asked = [Perturbation((SYMBOLS[i],), dose=1.0) for i in range(3)]
    asked += [Perturbation(()), Perturbation(("drug",), "treatment")]
    network(inputs_of(network, range(5), asked)).square().sum().backward()
    reached = {name for name, p in network.named_parameters() if p.grad is not None and bool(p.grad.any())}
    wanted = {name for name, p in network.named_parameters() if p.requires_grad}
    assert reached == wanted
    layers = {name.split("layers.")[1].split(".")[0] for name in wanted if "transformer.layers." in name}
    assert layers == {str(i) for i in range(2 - n_layers, 2)}
    others = {name.split(".")[0] for name in wanted if not name.startswith("network.trunk.transformer.")}
    assert others == {"tokens", "regressor"}
    assert network.trained().keys() == wanted


def test_the_base_model_is_a_copy_and_stays_as_it_is(model):
    before = model.weights_hash()
    shaken(network_of(model, n_trained_layers=2))
    assert model.weights_hash() == before
    assert not any(p.grad is not None for p in model.module.parameters())


def test_the_start_depends_on_its_seed_and_leaves_the_global_generator_alone(model):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = network_of(model, seed=5).trained()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again, other = network_of(model, seed=5).trained(), network_of(model, seed=6).trained()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_what_was_trained_can_be_taken_out_and_put_back(model):
    trained = shaken(network_of(model)).eval()
    fresh = network_of(model, seed=9).eval()
    fresh.load_trained(trained.trained())
    inputs = inputs_of(trained, range(6))
    with torch.no_grad():
        assert torch.equal(trained(inputs), fresh(inputs))
    lacking = trained.trained()
    lacking.popitem()
    with pytest.raises(KeyError):
        fresh.load_trained(lacking)


def test_a_model_without_a_trunk_is_refused():
    plain = native_model(VOCABULARY, CELLS, has_trunk=False)
    with pytest.raises(UnsupportedError, match="no trunk"):
        network_of(plain)


def test_the_regressor_is_what_its_formula_says():
    generator = torch.Generator().manual_seed(0)
    regressor = GeneQueryRegressor(5, 4, generator)
    with torch.no_grad():
        for parameter in regressor.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    s, e, v = (torch.randn(*shape, generator=generator) for shape in ((2, 5), (3, 4), (2, 3, 3)))
    with torch.no_grad():
        found = regressor(s, e, v)
        for b in range(2):
            for j in range(3):
                hidden = regressor.of_state(s[b]) + regressor.of_gene(e[j]) + regressor.of_values(v[b, j])
                one = regressor.out(torch.nn.functional.silu(hidden))[0] + regressor.left(s[b]) @ regressor.right(e[j])
                assert torch.allclose(found[b, j], one, atol=1e-6)


# --- the loss ---


def test_gene_weights_are_squared_scaled_scores_with_a_floor():
    score = np.array([-10.0, 0.0, 5.0, 1.0])
    assert gene_weights(score) == pytest.approx([1.0, WEIGHT_FLOOR, 0.25, WEIGHT_FLOOR])
    assert gene_weights(np.full(3, 2.0)).tolist() == [1.0] * 3
    assert (gene_weights(np.random.default_rng(0).normal(size=50)) >= WEIGHT_FLOOR).all()


def losses(change, target):
    return ranking_loss(change, target, torch.Generator().manual_seed(0))


def test_ranking_loss_is_least_for_the_truth_and_tells_order_from_sign():
    target = torch.zeros(2, 100)
    target[:, :10] = torch.linspace(2, 1, 10) * torch.tensor([1.0, -1.0] * 5)
    right = losses(target, target)
    nothing = losses(torch.zeros_like(target), target)
    wrong_genes = losses((target == 0).float(), target)
    wrong_signs = losses(-target, target)
    assert right[0] < nothing[0] < wrong_genes[0]
    assert right[1] < nothing[1] < wrong_signs[1]
    assert torch.equal(wrong_signs[0], right[0])  # the order by size is the same
    again = losses(target, target)
    assert torch.equal(again[0], right[0])
    # rows are alike: the mean over cells is that of one
    assert torch.allclose(losses(target[:1], target[:1])[0], right[0])


def test_ranking_loss_has_a_gradient_towards_the_truth():
    target = torch.zeros(1, 50)
    target[0, :5] = torch.tensor([3.0, -3.0, 2.0, -2.0, 2.0])
    change = torch.full((1, 50), 0.05, requires_grad=True)
    ranking, sign = losses(change, target)
    (ranking + sign).backward()
    assert (change.grad[0, [0, 2, 4]] < 0).all()
    assert (change.grad[0, 5:] >= 0).all()


def test_blocks_cover_every_row_once():
    assert np.concatenate(list(blocks_of(10, 4))).tolist() == list(range(10))
    assert [b.size for b in blocks_of(10, 4)] == [4, 4, 2]
    assert not list(blocks_of(0, 4))


# --- learning ---


def objective_of(model, *, n_conditions: int = 10, planted: bool = True) -> PerturbationObjective:
    """What the simple predictors miss is a multiple of what they are told of a condition, along one axis."""
    network = network_of(model)
    rng = np.random.default_rng(1)
    described = rng.normal(size=(n_conditions, 3 * N_AXES)).astype(np.float32)
    base = 0.1 * rng.normal(size=(n_conditions, N_PANEL)).astype(np.float32)
    target = base + (described[:, :1] * AXES[:1] * 3 if planted else 0)
    return PerturbationObjective(
        network,
        CODER.codes([Perturbation((SYMBOLS[i],)) for i in range(n_conditions)]),
        np.arange(CELLS.n_cells) % n_conditions,
        np.tile(rng.random(N_PANEL), (n_conditions, 1)).astype(np.float32),
        base,
        target.astype(np.float32),
        np.ones((n_conditions, N_PANEL), dtype=np.float32),
        described,
    )


def test_the_objective_starts_at_the_simple_predictors_and_says_so(model):
    objective = objective_of(model).eval()
    with torch.no_grad():
        found = objective(objective.prepare(CELLS, np.random.default_rng(0)), torch.Generator())
    conditions = objective.condition
    expected = ((objective.base - objective.target) ** 2).mean(axis=1)[conditions].mean()
    assert float(found.terms["wmse"]) == pytest.approx(expected, rel=1e-5)
    assert float(found.terms["wmse_floor"]) == pytest.approx(expected, rel=1e-5)
    assert found.loss.item() == pytest.approx(expected, rel=1e-5)
    assert found.n_cells == CELLS.n_cells


def test_weights_of_genes_count_in_the_loss(model):
    objective = objective_of(model).eval()
    objective.weight[:, 1:] = 0.0
    with torch.no_grad():
        found = objective(objective.prepare(CELLS, np.random.default_rng(0)), torch.Generator())
    expected = ((objective.base - objective.target)[:, 0] ** 2)[objective.condition].mean()
    assert float(found.terms["wmse"]) == pytest.approx(expected, rel=1e-5)


def test_a_planted_residual_is_learned(model, monkeypatch):
    monkeypatch.setattr(code, "DROPOUT", 0.0)
    objective = objective_of(model).train()
    optimiser = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=0.03)
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    inputs = objective.prepare(CELLS.take(np.arange(20)), rng)
    for _ in range(40):
        optimiser.zero_grad()
        objective(inputs, generator).loss.backward()
        optimiser.step()
    with torch.no_grad():
        terms = objective.eval()(inputs, generator).terms
    assert terms["wmse"] < 0.3 * terms["wmse_floor"]


def test_the_trunk_learns_more_slowly_than_the_rest(model):
    objective = objective_of(model)
    ratios = objective.learning_rate_ratios()
    own = {id(p) for p in objective.network.network.parameters() if p.requires_grad}
    assert {id(p) for p in ratios} == own
    assert set(ratios.values()) == {code.TRUNK_RATIO}
