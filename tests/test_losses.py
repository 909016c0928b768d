from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import twins
from scdiva.losses import profile_nll


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
