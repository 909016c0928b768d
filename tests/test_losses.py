from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import gammaln

import scdiva.losses
import twins
from scdiva.losses import (
    inclusion_nll,
    inclusion_probabilities,
    profile_nll,
    slot_nll,
    ztnb_expected_log1p,
    ztnb_nll,
)


def sparse(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    cell, gene = counts.nonzero(as_tuple=True)
    return cell, gene, counts[cell, gene]


def case(seed: int, n_cells: int = 5, n_genes: int = 11):
    rng = np.random.default_rng(seed)
    log_rate = torch.from_numpy(rng.normal(0, 3, (n_cells, n_genes)).astype(np.float32)).requires_grad_()
    is_measured = torch.from_numpy(rng.random((n_cells, n_genes)) < 0.7)
    is_measured[:, 0] = True
    counts = torch.from_numpy(rng.poisson(2.0, (n_cells, n_genes)).astype(np.float32)) * is_measured
    counts[-1] = 0  # an empty cell
    return log_rate, counts, is_measured


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), n_cells=st.sampled_from([1, 5, 16, 17, 40]))
def test_value_and_gradient_equal_the_dense_definition(seed, n_cells):
    log_rate, counts, is_measured = case(seed, n_cells=n_cells)
    weight = torch.linspace(0.5, 2.0, len(counts))
    found = profile_nll(log_rate, *sparse(counts), is_measured)
    (gradient,) = torch.autograd.grad((found * weight).sum(), log_rate)
    twin_rate = log_rate.detach().double().requires_grad_()
    expected = twins.profile_nll(twin_rate, counts.double(), is_measured)
    (twin_gradient,) = torch.autograd.grad((expected * weight).sum(), twin_rate)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), twin_gradient, rtol=1e-4, atol=1e-6)


def test_gradient_equals_finite_differences():
    log_rate, counts, is_measured = case(1, n_cells=2, n_genes=4)
    entries = sparse(counts)
    (gradient,) = torch.autograd.grad(profile_nll(log_rate, *entries, is_measured).sum(), log_rate)
    for i, j in np.ndindex(2, 4):
        step = torch.zeros_like(log_rate)
        step[i, j] = 1e-2
        with torch.no_grad():
            up, down = (profile_nll(log_rate + s, *entries, is_measured).sum() for s in (step, -step))
        assert float(gradient[i, j]) == pytest.approx(float(up - down) / 2e-2, abs=2e-3)


def test_unmeasured_genes_have_no_mass_and_no_gradient():
    log_rate, counts, is_measured = case(2)
    found = profile_nll(log_rate, *sparse(counts), is_measured)
    other = torch.where(is_measured, log_rate, torch.full_like(log_rate, 50.0))
    torch.testing.assert_close(profile_nll(other, *sparse(counts), is_measured), found)
    (gradient,) = torch.autograd.grad(found.sum(), log_rate)
    assert (gradient[~is_measured] == 0).all()
    assert (gradient[:-1].abs().sum(dim=1) > 0).all()


def test_an_empty_cell_costs_nothing_and_teaches_nothing():
    log_rate, counts, is_measured = case(3)
    found = profile_nll(log_rate, *sparse(counts), is_measured)
    assert float(found[-1].detach()) == 0
    (gradient,) = torch.autograd.grad(found.sum(), log_rate)
    assert (gradient[-1] == 0).all()


def test_a_cell_whose_file_measures_no_gene_is_an_empty_cell():
    log_rate, counts, is_measured = case(3)
    is_measured[-1] = False
    found = profile_nll(log_rate, *sparse(counts), is_measured)
    (gradient,) = torch.autograd.grad(found.sum(), log_rate)
    assert float(found[-1].detach()) == 0
    assert torch.isfinite(gradient).all()


def test_the_unit_is_nats_per_umi():
    is_measured = torch.ones(1, 4, dtype=torch.bool)
    for n in (1.0, 100.0):
        found = profile_nll(torch.zeros(1, 4), *sparse(torch.full((1, 4), n)), is_measured)
        assert float(found) == pytest.approx(np.log(4))


def test_the_minimum_is_at_the_observed_shares():
    counts = torch.tensor([[1.0, 2.0, 5.0, 0.0]])
    is_measured = torch.tensor([[True, True, True, False]])
    best = torch.log(counts.clamp_min(1e-9)).requires_grad_()
    (gradient,) = torch.autograd.grad(profile_nll(best, *sparse(counts), is_measured).sum(), best)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-6, rtol=0)


def test_bfloat16_rates_are_summed_in_float32():
    rng = np.random.default_rng(0)
    log_rate = torch.from_numpy(rng.normal(0, 1, (3, 5000)).astype(np.float32)).bfloat16().requires_grad_()
    counts = torch.from_numpy(rng.poisson(0.3, (3, 5000)).astype(np.float32))
    is_measured = torch.ones(3, 5000, dtype=torch.bool)
    found = profile_nll(log_rate, *sparse(counts), is_measured)
    expected = twins.profile_nll(log_rate.detach().double(), counts.double(), is_measured)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found.sum(), log_rate)
    assert gradient.dtype == torch.bfloat16


def test_no_cells_have_no_loss():
    nothing = torch.zeros(0, dtype=torch.long)
    found = profile_nll(torch.zeros(0, 4), nothing, nothing, torch.zeros(0), torch.zeros(0, 4, dtype=torch.bool))
    assert found.shape == (0,)


def test_rates_far_from_zero_do_not_overflow():
    counts = torch.tensor([[3.0, 1.0, 0.0]])
    is_measured = torch.ones(1, 3, dtype=torch.bool)
    for shift in (-1e4, 1e4):
        log_rate = (torch.tensor([[0.0, 1.0, 2.0]]) + shift).requires_grad_()
        found = profile_nll(log_rate, *sparse(counts), is_measured)
        (gradient,) = torch.autograd.grad(found.sum(), log_rate)
        expected = twins.profile_nll(log_rate.detach().double(), counts.double(), is_measured)
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
        assert torch.isfinite(gradient).all()


def test_the_rates_are_left_alone():
    log_rate, counts, is_measured = case(4)
    before = log_rate.detach().clone()
    profile_nll(log_rate, *sparse(counts), is_measured).sum().backward()
    assert torch.equal(log_rate.detach(), before)


def inclusion_twin(logit: np.ndarray, is_admissible: np.ndarray, n_hidden: int) -> np.ndarray:
    """Probabilities sigmoid(logit + c) that sum to m over admissible genes, by bisection in float64."""
    logit = np.where(is_admissible, logit.astype(np.float64), -np.inf)
    if n_hidden == is_admissible.sum():
        return is_admissible.astype(np.float64)
    lower, upper = -1e4, 1e4
    for _ in range(200):
        middle = (lower + upper) / 2
        total = (1 / (1 + np.exp(-np.clip(logit + middle, -700, 700)))).sum()
        lower, upper = (middle, upper) if total < n_hidden else (lower, middle)
    return np.where(is_admissible, 1 / (1 + np.exp(-np.clip(logit + middle, -700, 700))), 0.0)


def hidden_case(seed: int, n_cells: int = 6, n_genes: int = 12, spread: float = 3.0):
    """Logits, admissible genes, how many are hidden, and which; the first cell hides all, the last none."""
    rng = np.random.default_rng(seed)
    logit = torch.from_numpy(rng.normal(-1, spread, (n_cells, n_genes)).astype(np.float32))
    is_admissible = rng.random((n_cells, n_genes)) < 0.7
    is_admissible[:, 0] = True
    is_hidden = np.zeros_like(is_admissible)
    for i in range(n_cells):
        genes = np.flatnonzero(is_admissible[i])
        n = genes.size if i == 0 else rng.integers(1, genes.size + 1)
        if i < n_cells - 1 or n_cells == 1:
            is_hidden[i, rng.choice(genes, n, replace=False)] = True
    cell, gene = (torch.from_numpy(index) for index in is_hidden.nonzero())
    return logit, torch.from_numpy(is_admissible), torch.from_numpy(is_hidden.sum(axis=1)), cell, gene


class TestInclusion:
    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 1000), spread=st.sampled_from([0.0, 1.0, 5.0, 30.0]))
    def test_probabilities_are_those_of_a_bisection(self, seed, spread):
        logit, is_admissible, n_hidden, _, _ = hidden_case(seed, spread=spread)
        found = inclusion_probabilities(logit, is_admissible, n_hidden)
        torch.testing.assert_close(found.sum(dim=1), n_hidden.float(), rtol=2e-5, atol=2e-6)
        assert (found[~is_admissible] == 0).all()
        if spread <= 5:  # beyond, float32 may round a probability to zero; the loss never does
            assert ((found > 0) == is_admissible)[n_hidden > 0].all()
        for i, m in enumerate(n_hidden.tolist()):
            expected = inclusion_twin(logit[i].numpy(), is_admissible[i].numpy(), m)
            np.testing.assert_allclose(found[i], expected, rtol=2e-4, atol=2e-5)

    @settings(max_examples=40, deadline=None)
    @given(seed=st.integers(0, 1000), n_cells=st.sampled_from([1, 6, 17]), spread=st.sampled_from([0.0, 1.0, 5.0]))
    def test_the_loss_is_the_mean_over_hidden_genes(self, seed, n_cells, spread):
        logit, is_admissible, n_hidden, cell, gene = hidden_case(seed, n_cells, spread=spread)
        found = inclusion_nll(logit, is_admissible, n_hidden, cell, gene)
        assert found.dtype == torch.float32
        for i, m in enumerate(n_hidden.tolist()):
            p = inclusion_twin(logit[i].numpy(), is_admissible[i].numpy(), m)[gene[cell == i].numpy()]
            assert float(found[i]) == pytest.approx(-np.log(p / m).mean() if m else 0.0, rel=1e-4, abs=1e-5)

    def test_the_gradient_is_that_of_the_twin(self):
        logit, is_admissible, n_hidden, cell, gene = hidden_case(3, spread=2.0)
        weight = torch.linspace(0.5, 2.0, len(n_hidden))
        logit.requires_grad_()
        loss = (inclusion_nll(logit, is_admissible, n_hidden, cell, gene) * weight).sum()
        (gradient,) = torch.autograd.grad(loss, logit)

        def twin(values: np.ndarray, i: int) -> float:
            m = int(n_hidden[i])
            p = inclusion_twin(values, is_admissible[i].numpy(), m)[gene[cell == i].numpy()]
            return -np.log(p / m).mean() * float(weight[i]) if m else 0.0

        values, step = logit.detach().double().numpy(), 1e-4
        for i, j in np.ndindex(*values.shape):
            up, down = values[i].copy(), values[i].copy()
            up[j] += step
            down[j] -= step
            numerical = (twin(up, i) - twin(down, i)) / (2 * step)
            assert float(gradient[i, j]) == pytest.approx(numerical, abs=1e-5), (i, j)
        assert float(gradient[0].abs().max()) < 1e-7  # every admissible gene is hidden: nothing to learn
        assert (gradient[-1] == 0).all()  # nothing is hidden
        assert float(gradient[1:-1].abs().max()) > 0.05

    def test_a_common_shift_changes_nothing(self):
        logit, is_admissible, n_hidden, cell, gene = hidden_case(4)
        found = inclusion_nll(logit + 7.0, is_admissible, n_hidden, cell, gene)
        expected = inclusion_nll(logit, is_admissible, n_hidden, cell, gene)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        "logits", [[0.0, -100.0, -100.0, -100.0], [-300.0, 0.0, 300.0, 5.0], [80.0, 80.0, 80.1, 79.9]]
    )
    @pytest.mark.parametrize("m", [1, 2, 3, 4])
    def test_extreme_logits(self, logits, m):
        logit = torch.tensor([logits, [0.0] * 4]).requires_grad_()
        is_admissible, n_hidden = torch.ones(2, 4, dtype=torch.bool), torch.tensor([m, 2])
        p = inclusion_probabilities(logit.detach(), is_admissible, n_hidden)
        assert float(p[0].sum()) == pytest.approx(m, rel=2e-5)
        np.testing.assert_allclose(p[0], inclusion_twin(np.array(logits), np.ones(4, bool), m), atol=1e-4)
        torch.testing.assert_close(p[1], torch.full((4,), 0.5))  # a difficult neighbour does no harm
        cell, gene = torch.tensor([0, 1]), torch.tensor([0, 0])
        loss = inclusion_nll(logit, is_admissible, n_hidden, cell, gene)
        (gradient,) = torch.autograd.grad(loss.sum(), logit)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()

    def test_for_one_hidden_gene_of_rare_ones_it_is_the_softmax(self):
        logit = torch.tensor([[-9.0, -8.0, -10.0, -7.0]])
        p = inclusion_probabilities(logit - 20, torch.ones(1, 4, dtype=torch.bool), torch.tensor([1]))
        assert not torch.allclose(p, torch.softmax(logit, dim=1), atol=1e-3)  # four genes are few: p is not small
        many = torch.cat([logit, torch.full((1, 4000), -7.5)], dim=1)
        p = inclusion_probabilities(many, torch.ones_like(many, dtype=torch.bool), torch.tensor([1]))
        torch.testing.assert_close(p, torch.softmax(many, dim=1), rtol=2e-3, atol=0)

    def test_a_cell_of_a_file_without_genes_is_an_empty_cell(self):
        logit, is_admissible, n_hidden, cell, gene = hidden_case(5)
        is_admissible[-1] = False
        logit.requires_grad_()
        assert (inclusion_probabilities(logit.detach(), is_admissible, n_hidden)[-1] == 0).all()
        loss = inclusion_nll(logit, is_admissible, n_hidden, cell, gene)
        (gradient,) = torch.autograd.grad(loss.sum(), logit)
        assert float(loss[-1].detach()) == 0
        assert torch.isfinite(gradient).all()
        assert (gradient[-1] == 0).all()

    def test_bfloat16_logits_are_summed_in_float32(self):
        rng = np.random.default_rng(0)
        logit = torch.from_numpy(rng.normal(-6, 2, (2, 5000)).astype(np.float32)).bfloat16().requires_grad_()
        is_admissible, n_hidden = torch.ones(2, 5000, dtype=torch.bool), torch.tensor([3, 700])
        cell = torch.tensor([0] * 3 + [1] * 700)
        gene = torch.cat([torch.arange(3), torch.arange(700)])
        found = inclusion_nll(logit, is_admissible, n_hidden, cell, gene)
        for i, m in enumerate((3, 700)):
            p = inclusion_twin(logit[i].detach().float().numpy(), np.ones(5000, bool), m)[:m]
            assert float(found[i].detach()) == pytest.approx(-np.log(p / m).mean(), rel=1e-4)
        (gradient,) = torch.autograd.grad(found.sum(), logit)
        assert gradient.dtype == torch.bfloat16

    def test_no_cells_have_no_loss(self):
        nothing = torch.zeros(0, dtype=torch.long)
        found = inclusion_nll(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool), nothing, nothing, nothing)
        assert found.shape == (0,)


class TestSlots:
    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 1000))
    def test_without_a_direction_it_is_the_inclusion_loss_gene_by_gene(self, seed):
        logit, is_admissible, n_hidden, cell, gene = hidden_case(seed, spread=2.0)
        found = slot_nll(logit, is_admissible, n_hidden, None, torch.zeros(12, 3), cell, gene)
        p = inclusion_probabilities(logit, is_admissible, n_hidden)[cell, gene]
        torch.testing.assert_close(found, -(p / n_hidden[cell]).log(), rtol=1e-4, atol=1e-4)
        mean = torch.zeros(6).index_add(0, cell, found) / n_hidden.clamp_min(1)
        torch.testing.assert_close(
            mean, inclusion_nll(logit, is_admissible, n_hidden, cell, gene), rtol=1e-4, atol=1e-4
        )

    def test_a_direction_moves_the_distribution_of_its_slot_alone(self, monkeypatch):
        monkeypatch.setattr(scdiva.losses, "_SLOTS", 4)  # several chunks
        logit, is_admissible, n_hidden, cell, gene = hidden_case(1, spread=2.0)
        rng = torch.Generator().manual_seed(0)
        direction, embedding = torch.randn(len(cell), 3, generator=rng), torch.randn(12, 3, generator=rng)
        inputs = [x.clone().requires_grad_() for x in (logit, direction, embedding)]
        found = slot_nll(inputs[0], is_admissible, n_hidden, inputs[1], inputs[2], cell, gene)
        p = inclusion_probabilities(logit, is_admissible, n_hidden).double()[cell]
        expected = torch.log_softmax(p.log() + (direction @ embedding.T).double(), dim=1)
        picked = expected[torch.arange(len(cell)), gene]
        torch.testing.assert_close(found.double(), -picked, rtol=1e-4, atol=1e-4)
        for gradient in torch.autograd.grad(found.sum(), inputs):
            assert torch.isfinite(gradient).all()
            assert float(gradient.abs().max()) > 0

    def test_no_slots_have_no_loss(self):
        nothing = torch.zeros(0, dtype=torch.long)
        is_admissible, n_hidden = torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
        found = slot_nll(torch.zeros(2, 4), is_admissible, n_hidden, None, torch.zeros(4, 3), nothing, nothing)
        assert found.shape == (0,)


def truncated_log_pmf(count: np.ndarray, mu: float, theta: float) -> np.ndarray:
    """log P(x | x >= 1) of a negative binomial, float64."""
    log_zero = -theta * np.log1p(mu / theta)
    log_pmf = gammaln(count + theta) - gammaln(theta) - gammaln(count + 1) + log_zero
    log_pmf = log_pmf - count * np.log1p(theta / mu)
    return log_pmf - np.log(-np.expm1(log_zero))


MEANS = [1e-6, 1e-2, 0.5, 3.0, 40.0, 900.0]
DISPERSIONS = [0.02, 0.3, 1.0, 20.0, 3000.0, 1e6]


class TestZeroTruncatedNegativeBinomial:
    @pytest.mark.parametrize("mu", MEANS)
    @pytest.mark.parametrize("theta", DISPERSIONS)
    def test_sums_to_one_over_positive_counts(self, mu, theta):
        count = torch.arange(1, 200_000 if mu > 1 and theta <= 1 else 6000)
        parameter = torch.tensor([mu, theta]).log()
        log_p = -ztnb_nll(count, parameter[0].expand(count.shape), parameter[1].expand(count.shape)).double()
        assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=4e-4)
        assert float(log_p.max()) <= 1e-6

    @pytest.mark.parametrize("mu", MEANS)
    @pytest.mark.parametrize("theta", DISPERSIONS)
    def test_equals_the_definition(self, mu, theta):
        count = np.array([1, 2, 3, 10, 200, 5000])
        log_mu, log_theta = (torch.full(count.shape, x).log() for x in (mu, theta))
        found = ztnb_nll(torch.from_numpy(count), log_mu, log_theta)
        # from the float32 logarithms, so that only the function's own rounding shows
        wide = [float(np.exp(float(x[0]))) for x in (log_mu, log_theta)]
        np.testing.assert_allclose(found, -truncated_log_pmf(count, *wide), rtol=1e-5, atol=1e-5)
        assert found.dtype == torch.float32

    def test_equals_scipy(self):
        from scipy.stats import nbinom

        count = np.arange(1, 30)
        mu, theta = 2.5, 0.7
        expected = nbinom.logpmf(count, theta, theta / (theta + mu)) - np.log(nbinom.sf(0, theta, theta / (theta + mu)))
        found = ztnb_nll(torch.from_numpy(count), torch.full((29,), mu).log(), torch.full((29,), theta).log())
        np.testing.assert_allclose(-found, expected, rtol=1e-5)

    @pytest.mark.parametrize("log_mu", [-30.0, -13.8, 0.0, 7.0, 25.0])
    @pytest.mark.parametrize("log_theta", [-12.0, -3.0, 0.0, 4.0, 14.0])
    def test_losses_and_gradients_are_finite(self, log_mu, log_theta):
        count = torch.tensor([1, 7, 4000])
        parameters = [torch.full((3,), x).requires_grad_() for x in (log_mu, log_theta)]
        loss = ztnb_nll(count, *parameters)
        gradients = torch.autograd.grad(loss.sum(), parameters)
        assert torch.isfinite(loss).all()
        assert (loss >= -1e-6).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients)

    def test_gradients_equal_finite_differences(self):
        count = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)
        for log_mu, log_theta in ((-3.0, 0.5), (1.0, -1.0), (2.0, 3.0)):
            parameters = [torch.full((3,), x).requires_grad_() for x in (log_mu, log_theta)]
            gradients = torch.autograd.grad(ztnb_nll(count, *parameters).sum(), parameters)
            step = 1e-5

            def twin(shift_mu: float, shift_theta: float, at=(log_mu, log_theta)) -> np.ndarray:
                return -truncated_log_pmf(count.numpy(), np.exp(at[0] + shift_mu), np.exp(at[1] + shift_theta))

            for gradient, shift in zip(gradients, ((step, 0), (0, step)), strict=True):
                numerical = (twin(*shift) - twin(-shift[0], -shift[1])) / (2 * step)
                np.testing.assert_allclose(gradient, numerical, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("scale", [0.2, 1.0, 10.0])
    @pytest.mark.parametrize("theta", [0.05, 0.3, 1.0, 20.0, 3000.0])
    @pytest.mark.parametrize("mu", [1e-6, 1e-2, 0.5, 3.0, 20.0])
    def test_the_expected_value_equals_a_sum(self, mu, theta, scale):
        count = np.arange(1, 20_000)
        p = np.exp(truncated_log_pmf(count, mu, theta))
        expected = (p * np.log1p(scale * count)).sum() / p.sum()
        found = ztnb_expected_log1p(*(torch.tensor([x]).log() for x in (mu, theta)), torch.tensor([scale]))
        # exact up to 16; the rest by its first two moments
        assert float(found) == pytest.approx(expected, abs=0.04)
        if mu <= 0.5 and theta >= 0.3:
            assert float(found) == pytest.approx(expected, abs=2e-3)

    def test_the_expected_value_has_finite_gradients_and_stays_in_range(self):
        for log_mu in (-30.0, 0.0, 12.0):
            for log_theta in (-6.0, 0.0, 12.0):
                parameters = [torch.tensor([x]).requires_grad_() for x in (log_mu, log_theta)]
                found = ztnb_expected_log1p(*parameters, torch.tensor([3.0]))
                gradients = torch.autograd.grad(found.sum(), parameters)
                assert float(found.detach()) >= np.log1p(3.0) - 1e-4  # a detected gene has a count of at least one
                assert all(torch.isfinite(gradient).all() for gradient in gradients), (log_mu, log_theta)
