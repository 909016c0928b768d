"""Draws of counts against the exact zero-truncated negative binomial."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, nbinom

from scdiva.diffusion.counts import draw_ztnb
from scdiva.losses import ztnb_nll

N = 20_000


def draws(log_mu: float, log_theta: float, n: int = N, seed: int = 0) -> np.ndarray:
    full = torch.full((n,), 1.0, dtype=torch.float64)
    return draw_ztnb(full * log_mu, full * log_theta, torch.Generator().manual_seed(seed)).numpy()


def exact(log_mu: float, log_theta: float, last: int) -> np.ndarray:
    """P(1), ..., P(last) in float64 by SciPy."""
    mu, theta = math.exp(log_mu), math.exp(log_theta)
    of = nbinom(theta, theta / (theta + mu))
    return np.exp(of.logpmf(np.arange(1, last + 1)) - math.log(-math.expm1(float(of.logpmf(0)))))


@pytest.mark.parametrize("mu", [1e-4, 0.05, 1.0, 6.0, 40.0])
@pytest.mark.parametrize("theta", [0.02, 0.5, 3.0, 1e3])
def test_frequencies_are_those_of_the_distribution(mu, theta):
    found = draws(math.log(mu), math.log(theta))
    assert found.min() >= 1
    p = exact(math.log(mu), math.log(theta), 20_000)
    # outcomes in bins of about equal probability, the rest in one
    edges = np.unique(np.searchsorted(np.cumsum(p), np.linspace(0, 1, 40)[1:-1]) + 1)
    bins = [0, *edges.tolist(), 10**9]
    observed = np.histogram(found, np.array(bins) + 0.5)[0]
    cdf = np.array([0.0, *np.cumsum(p)[edges - 1], 1.0])
    expected = N * np.diff(cdf)
    often = expected > 5
    if often.sum() > 1:
        observed = np.append(observed[often], observed[~often].sum())
        expected = np.append(expected[often], expected[~often].sum())
        if expected[-1] < 1:
            assert observed[-1] <= 12
            observed, expected = observed[:-1], expected[:-1]
        assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4
    else:  # one outcome has nearly all of the probability
        assert observed[~often].sum() <= 12


def test_a_tiny_mean_gives_ones():
    assert (draws(math.log(1e-12), 0.0) == 1).all()
    assert (draws(-200.0, 3.0, 500) == 1).all()


def test_a_large_mean_without_dispersion_is_poisson():
    found = draws(math.log(1e3), math.log(1e8), 4000)
    assert found.mean() == pytest.approx(1e3, abs=4 * math.sqrt(1e3 / 4000))
    assert found.var() == pytest.approx(1e3, rel=0.1)


def test_a_large_mean_with_dispersion():
    found = draws(math.log(1e3), math.log(4.0), 4000)
    deviation = math.sqrt(1e3 + 1e6 / 4)
    assert found.mean() == pytest.approx(1e3, abs=4 * deviation / math.sqrt(4000))
    assert found.std() == pytest.approx(deviation, rel=0.1)


def test_the_frequencies_are_those_of_the_loss():
    count = torch.arange(1, 200)
    p = torch.exp(-ztnb_nll(count, torch.full((199,), 1.2), torch.full((199,), -0.7))).double().numpy()
    found = np.bincount(draws(1.2, -0.7), minlength=200)[1:]
    is_often = N * p > 5
    observed = np.append(found[is_often[: found.size].nonzero()[0]], 0)
    observed[-1] = N - observed.sum()
    expected = np.append(N * p[is_often], N - (N * p[is_often]).sum())
    assert chisquare(observed, expected).pvalue > 1e-4


def test_each_gene_has_its_own_mean_and_dispersion():
    log_mu = torch.tensor([-9.0, 0.0, 4.0]).repeat(3000)
    log_theta = torch.tensor([0.0, 5.0, -1.0]).repeat(3000)
    found = draw_ztnb(log_mu, log_theta, torch.Generator().manual_seed(1)).reshape(3000, 3).double()
    mu, theta = log_mu[:3].double().exp(), log_theta[:3].double().exp()
    mean = mu / (1 - (theta / (theta + mu)) ** theta)
    np.testing.assert_allclose(found.mean(dim=0), mean, rtol=0.15)
    assert found[:, 0].max() <= 2


def test_draws_are_whole_seeded_and_of_any_number():
    log_mu = torch.linspace(-3, 3, 50)
    one, same, other = (draw_ztnb(log_mu, log_mu * 0, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert one.dtype == torch.int64
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert draw_ztnb(log_mu[:0], log_mu[:0], torch.Generator()).shape == (0,)
