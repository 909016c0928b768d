"""Calibration: numbers of single genes at the maximum of their own likelihood, and nothing else moved."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

import twins
from native_cells import LABEL_SIZES, N_GENES, build, dense_counts, stir, with_labels
from scdiva.config import OptimConfig
from scdiva.losses import inclusion_probabilities, ztnb_nll
from scdiva.models.scdiva import calibration
from scdiva.models.scdiva.calibration import calibrate
from scdiva.models.scdiva.native import LABEL_OFFSETS, PER_GENE
from scdiva.models.scdiva.objectives import DenoisedCells
from scdiva.training.module import parameter_groups

CALIBRATED = {"identity_offset", "value_offset", "log_theta"}
PRIOR = 2.0
"""Weight of where a number was, in hidden tokens (``calibration._PRIOR_PRECISION``)."""


@pytest.fixture(scope="module")
def cells():
    dense = dense_counts(240)
    dense[:, 7] = 0  # measured and never seen
    dense[:, 11] *= np.arange(240) < 2  # seen twice at most
    measured = np.arange(N_GENES) != 5
    return with_labels(twins.cell_counts(dense * measured, measured=measured))


def masked(built, cells) -> list:
    objective = built.objective(
        p_split=0.0, p_visible=1.0, p_joint=1.0, p_values=0.0, p_staged=0.0, condition_dropout=0
    )
    rng = np.random.default_rng(0)
    parts = []
    for first in range(0, cells.n_cells, 60):
        inputs = objective.prepare(cells.take(np.arange(first, min(first + 60, cells.n_cells))), rng)
        assert isinstance(inputs, DenoisedCells)
        parts.append((inputs.cells, inputs.targets))
    return parts


@torch.no_grad()
def facts(built, parts) -> dict[str, torch.Tensor]:
    """Per gene: how often it is hidden, and expected to be; per hidden count: gene, count, log-mean, log-theta."""
    network = built.network
    observed, expected = torch.zeros(2, N_GENES, dtype=torch.float64)
    values = []
    for cells, targets in parts:
        output = network(cells)
        p = inclusion_probabilities(output.gene_logit_BG, cells.is_admissible_BG, cells.n_hidden_B)
        expected += p.double().sum(dim=0)
        observed += torch.bincount(targets.gene_M, minlength=N_GENES)
        direction = network.trunk.value_direction(output.states.query_BD)[targets.cell_M]
        log_mean = network.log_mean(output, targets.cell_M, targets.gene_M, direction)
        values.append(torch.stack([targets.gene_M, targets.count_M, log_mean], dim=1).double())
    gene, count, log_mean = torch.cat(values).T
    return {"observed": observed, "expected": expected, "gene": gene.long(), "count": count, "log_mean": log_mean}


@pytest.fixture(scope="module")
def before_and_after(cells):
    """A network whose numbers of single genes are off, before and after."""
    built = stir(build(cells, label_sizes=LABEL_SIZES), size=0.1)
    with torch.no_grad():
        for name in CALIBRATED:
            vector = getattr(built.network, name)
            vector += 0.5 * torch.randn(N_GENES, generator=torch.Generator().manual_seed(len(name)))
    parts = masked(built, cells)
    state = {name: tensor.clone() for name, tensor in built.network.state_dict().items()}
    before = facts(built, parts)
    calibrate(built.network, parts, use_bf16=False)
    return built, parts, state, before, facts(built, parts)


def test_nothing_but_numbers_of_single_genes_moves(before_and_after):
    built, _, state, _, _ = before_and_after
    moved = {name for name, tensor in built.network.state_dict().items() if not torch.equal(tensor, state[name])}
    assert moved == CALIBRATED


def test_each_gene_is_expected_as_often_as_it_is_hidden(before_and_after):
    built, _, state, before, after = before_and_after
    off = (built.network.identity_offset - state["identity_offset"]).double().detach()
    # at the maximum: observed - expected = prior * (how far it moved)
    np.testing.assert_allclose(after["observed"] - after["expected"], PRIOR * off, atol=0.5)
    assert (before["observed"] - before["expected"]).abs().max() > 20
    often = after["observed"] > 100
    np.testing.assert_allclose(after["expected"][often], after["observed"][often], rtol=0.1)


def test_offset_and_dispersion_are_about_where_the_likelihood_is_highest(before_and_after):
    """Within 0.03 nats per count: the highest counts of a gene are left out, and UMIs are kept in number."""
    built, _, state, before, after = before_and_after
    n = torch.bincount(after["gene"], minlength=N_GENES)
    gained = lost = 0.0
    for gene in np.flatnonzero((n > 30) & (n <= 256))[:12]:
        of = before["gene"] == gene
        count, log_mean = before["count"][of], before["log_mean"][of] - state["value_offset"][gene]
        start = np.array([state["value_offset"][gene], state["log_theta"][gene]], dtype=float)

        def loss(x, count=count, log_mean=log_mean, start=start):
            nll = ztnb_nll(count, log_mean + x[0], torch.full_like(log_mean, x[1])).double().sum()
            return float(nll) + 0.5 * PRIOR * float(((x - start) ** 2).sum())

        best = minimize(loss, start, method="Nelder-Mead", bounds=[(None, None), (-4, 7)])
        found = np.array([built.network.value_offset[gene].item(), built.network.log_theta[gene].item()])
        assert loss(found) < best.fun + 0.03 * count.numel() + 0.3, gene
        gained, lost = gained + loss(start) - loss(found), lost + loss(found) - best.fun
    assert gained > 50
    assert lost < 0.1 * gained


def test_the_fit_gets_better(before_and_after):
    built, _, state, before, after = before_and_after
    old, new = (
        float(ztnb_nll(f["count"], f["log_mean"], theta[f["gene"]]).mean())
        for f, theta in ((before, state["log_theta"]), (after, built.network.log_theta.detach()))
    )
    assert new < old - 0.1


def test_as_many_umis_are_expected_as_there_are(before_and_after):
    built, _, _, _, after = before_and_after
    log_theta = built.network.log_theta.detach().double()[after["gene"]]
    mu, theta = after["log_mean"].exp(), log_theta.exp()
    expected = mu / (1.0 - (theta / (theta + mu)) ** theta)
    assert float(expected.sum()) == pytest.approx(float(after["count"].sum()), rel=0.01)


def test_what_few_cells_show_moves_little(before_and_after):
    built, _, state, before, _ = before_and_after
    shift = {name: (getattr(built.network, name).detach() - state[name]).abs() for name in CALIBRATED}
    assert shift["identity_offset"][5] == 0  # not measured: nothing is known
    assert shift["log_theta"][5] == shift["log_theta"][7] == 0  # no count was seen
    # offsets of counts move by what all genes have in common
    assert float(shift["value_offset"][5]) == pytest.approx(float(shift["value_offset"][7]), abs=1e-5)
    assert shift["value_offset"][5] < 0.3
    n = torch.bincount(before["gene"], minlength=N_GENES)
    assert n[11] <= 2
    assert shift["log_theta"][11] < 1
    assert shift["identity_offset"].max() > 0.5


def test_one_absurd_count_does_not_decide_a_dispersion(cells):
    found = []
    gene = int(np.argmax(np.bincount(cells.counts.indices)))
    for absurd in (False, True):
        dense = cells.counts.toarray()
        if absurd:
            dense[3, gene] = 400
        some = with_labels(twins.cell_counts(dense, measured=cells.is_measured[0]))
        built = stir(build(cells, label_sizes=LABEL_SIZES), size=0.1)
        calibrate(built.network, masked(built, some), use_bf16=False)
        found.append(float(built.network.log_theta[gene].detach()))
    assert found[1] > found[0] - 0.7


def test_dispersions_stay_within_bounds(cells):
    built = stir(build(cells, label_sizes=LABEL_SIZES), size=0.1)
    with torch.no_grad():
        built.network.log_theta += torch.linspace(-9, 12, N_GENES)
    calibrate(built.network, masked(built, cells), use_bf16=False)
    seen = torch.from_numpy(np.unique(cells.counts.indices)).long()
    assert (built.network.log_theta[seen] >= -4).all()
    assert (built.network.log_theta[seen] <= 7).all()


def test_it_repeats_and_minibatches_do_not_matter(cells):
    found = []
    for merge in (False, False, True):
        built = stir(build(cells, label_sizes=LABEL_SIZES), size=0.1)
        parts = masked(built, cells)
        calibrate(built.network, parts[::-1] if merge else parts, use_bf16=False)
        found.append([getattr(built.network, name).detach().clone() for name in sorted(CALIBRATED)])
    for one, again, reordered in zip(*found, strict=True):
        assert torch.equal(one, again)
        np.testing.assert_allclose(reordered, one, atol=0.1)


class TestLearningRates:
    def test_numbers_of_single_genes_have_their_own(self, cells):
        built = build(cells, label_sizes=LABEL_SIZES)
        objective = built.objective()
        named = {id(p): name for name, p in built.network.named_parameters()}
        of_genes = {named[id(p)] for p in objective.gene_vectors()}
        assert of_genes >= CALIBRATED
        assert of_genes <= PER_GENE
        assert all(dict(built.network.named_parameters())[name].shape == (N_GENES,) for name in of_genes)
        groups = parameter_groups(objective, 0.1, gene_lr=0.5)
        assert [group.get("lr") for group in groups] == [None, None, 0.5]
        assert {named[id(p)] for p in groups[2]["params"]} == of_genes
        assert groups[2]["weight_decay"] == 0
        every = [id(p) for group in groups for p in group["params"]]
        assert len(set(every)) == len(every) == sum(p.requires_grad for p in objective.parameters())

    def test_usually_they_have_none(self, cells):
        objective = build(cells, label_sizes=LABEL_SIZES).objective()
        groups = parameter_groups(objective, 0.1)
        assert len(groups) == 2
        assert all("lr" not in group for group in groups)
        assert OptimConfig().gene_lr_ratio == 1.0

    def test_a_run_uses_the_ratio(self, cells):
        from scdiva.training.module import TrainingModule

        objective = build(cells, label_sizes=LABEL_SIZES).objective()
        rates = {}
        for ratio in (1.0, 20.0):
            config = OptimConfig(lr=1e-3, gene_lr_ratio=ratio)
            module = TrainingModule(objective, config, max_steps=10, seed=0)
            optimiser = module.configure_optimizers()["optimizer"]
            rates[ratio] = [group["initial_lr"] for group in optimiser.param_groups]
        assert rates[1.0] == [1e-3, 1e-3]
        assert rates[20.0] == [1e-3, 1e-3, pytest.approx(2e-2)]


class TestLabels:
    """Offsets, slopes and dispersions by label."""

    @pytest.fixture(scope="class")
    @classmethod
    def by_label(cls, cells):
        built = stir(build(cells, label_sizes=LABEL_SIZES), size=0.1)
        parts = masked(built, cells)
        calibrate(built.network, parts, use_bf16=False, label_field=0, n_labels=LABEL_SIZES[0])
        return built, parts

    @torch.no_grad()
    def test_each_gene_is_expected_as_often_as_it_is_hidden_in_cells_of_each_label(self, by_label):
        built, parts = by_label
        n_labels = LABEL_SIZES[0] + 1
        observed, expected = torch.zeros(2, n_labels, N_GENES)
        for masked_cells, targets in parts:
            output = built.network(masked_cells)
            p = inclusion_probabilities(output.gene_logit_BG, masked_cells.is_admissible_BG, masked_cells.n_hidden_B)
            code = masked_cells.condition_BC[:, 0]
            expected.index_add_(0, code, p.float())
            answer = torch.zeros_like(p, dtype=torch.float32)
            answer[targets.cell_M, targets.gene_M] = 1.0
            observed.index_add_(0, code, answer)
        often = observed[1:] > 25
        assert often.sum() > 10
        np.testing.assert_allclose(expected[1:][often], observed[1:][often], rtol=0.15)

    def test_cells_of_unknown_label_are_left_as_they_were(self, by_label):
        network = by_label[0].network
        assert network.label_confidence[0] == 1
        for name in LABEL_OFFSETS:
            assert (getattr(network, name)[0] == 0).all(), name
            assert (getattr(network, name)[1:] != 0).any(), name

    def test_labels_have_dispersions_of_their_own(self):
        rng = np.random.default_rng(0)
        dense = dense_counts(240)
        cells = with_labels(twins.cell_counts(dense))
        code, gene = cells.condition[:, 0], int(np.argmax(dense.mean(axis=0)))
        theta = np.where(code == 1, 0.7, 300.0)
        dense[:, gene] = rng.poisson(12 * rng.gamma(theta) / theta)
        cells = with_labels(twins.cell_counts(dense))
        built = stir(build(cells, label_sizes=LABEL_SIZES), size=0.1)
        calibrate(built.network, masked(built, cells), use_bf16=False, label_field=0, n_labels=LABEL_SIZES[0])
        found = built.network.label_dispersion[:, gene]
        others = [label for label in np.unique(code) if label > 1]
        assert all(found[label] > found[1] + 1.0 for label in others)

    def test_what_tells_cells_of_a_label_apart_is_made_as_strong_as_it_is(self):
        rng = torch.Generator().manual_seed(0)
        true = torch.tensor([1.0, 0.6, 1.8])
        code = torch.arange(600) % 2 + 1
        centre = torch.randn(3, 40, generator=rng) - 1.0
        deviation = torch.randn(600, 40, generator=rng)
        p = torch.sigmoid(centre[code] + true[code][:, None] * deviation)
        answer = torch.rand(600, 40, generator=rng) < p
        # the network's levels are off by a number for each cell, which changes nothing
        logit = centre[code] + deviation + torch.randn(600, 1, generator=rng)
        network = SimpleNamespace(
            identity_offset=torch.zeros(40), label_identity=torch.zeros(3, 40), label_confidence=torch.ones(3)
        )
        everywhere = torch.ones(600, 40, dtype=torch.bool)
        calibration._calibrate_label_identity(network, [logit], [everywhere], [answer.sum(dim=1)], [answer], [code])
        np.testing.assert_allclose(network.label_confidence, true, atol=0.15)
        after = network.label_confidence[code][:, None] * logit + network.label_identity[code]
        found = inclusion_probabilities(after, everywhere, answer.sum(dim=1))
        for label in (1, 2):
            np.testing.assert_allclose(
                found[code == label].mean(dim=0), answer[code == label].float().mean(dim=0), atol=0.02
            )

    def test_a_network_is_calibrated_by_label_once(self, by_label):
        built, parts = by_label
        with pytest.raises(ValueError, match="already"):
            calibrate(built.network, parts, use_bf16=False, label_field=0, n_labels=LABEL_SIZES[0])
