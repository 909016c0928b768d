"""Draws from the value likelihood.

Shape letter: X drawn genes of all cells together.
"""

from __future__ import annotations

import torch

_LARGEST_COUNT = 1_000_000


def draw_ztnb(log_mu_X: torch.Tensor, log_theta_X: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw counts, at least 1, from zero-truncated negative binomials by the inverse distribution function.

    Parameters
    ----------
    log_mu_X, log_theta_X
        Log-mean before truncation and log inverse dispersion, as for :func:`scdiva.losses.ztnb_nll`.
    generator
        Source of randomness.

    Returns
    -------
    torch.Tensor
        ``(X,)`` int64.
    """
    log_mu, log_theta = log_mu_X.double(), log_theta_X.double()
    softplus = torch.nn.functional.softplus
    theta = log_theta.exp()
    log_zero = -theta * softplus(log_mu - log_theta)
    log_nonzero = torch.log(-torch.expm1(log_zero.clamp_max(-1e-300)))
    log_ratio = -softplus(log_theta - log_mu)
    log_pmf = log_theta + log_zero + log_ratio - log_nonzero  # of 1
    u = torch.rand(log_mu.shape, generator=generator, device=log_mu.device, dtype=torch.float64)
    count = torch.ones(log_mu.shape, dtype=torch.int64, device=log_mu.device)
    cumulative = log_pmf.exp()
    mean = (log_mu - log_nonzero).exp()
    active = (u > cumulative).nonzero().squeeze(1)
    log_pmf, theta, log_ratio = log_pmf[active], theta[active], log_ratio[active]
    cumulative, u, mean = cumulative[active], u[active], mean[active]
    x = 1
    while active.numel() and x < _LARGEST_COUNT:
        log_pmf = log_pmf + torch.log((x + theta) / (x + 1)) + log_ratio
        x += 1
        pmf = log_pmf.exp()
        cumulative = cumulative + pmf
        count[active] = x
        # beyond the mean a vanishing probability means that u lies within the rounding of 1
        keep = (u > cumulative) & ~((pmf < 1e-17) & (x > mean))
        if not bool(keep.all()):
            active, log_pmf, theta, log_ratio = active[keep], log_pmf[keep], theta[keep], log_ratio[keep]
            cumulative, u, mean = cumulative[keep], u[keep], mean[keep]
    return count
