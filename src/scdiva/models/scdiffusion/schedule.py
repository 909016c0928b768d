"""The forward process on z: how much signal is left at each time.

Shape letters: B cells, Z latent.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Schedule = Literal["cosine", "linear"]
Prediction = Literal["v", "epsilon"]

_LARGEST_BETA = 0.999
_LINEAR_BETAS = (1e-4, 0.02)


def cosine_alpha_bar(n_times: int) -> torch.Tensor:
    """Return the share of variance that is signal at times 0 to T - 1, ``(T,)`` float32.

    The cosine schedule of Nichol and Dhariwal (2021) as ``diffusers`` computes it (``squaredcos_cap_v2``), so that
    training does not have to load ``diffusers``; a test compares the two.

    Parameters
    ----------
    n_times
        T.
    """

    def level(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    beta = [min(1 - level((i + 1) / n_times) / level(i / n_times), _LARGEST_BETA) for i in range(n_times)]
    return torch.cumprod(1.0 - torch.tensor(beta, dtype=torch.float32), dim=0)


def linear_betas(n_times: int) -> tuple[float, float]:
    """Return first and last beta of the published schedule: 1e-4 and 0.02, times 1,000 / T (Luo et al. 2024)."""
    first, last = (beta * 1000 / n_times for beta in _LINEAR_BETAS)
    return first, last


def alpha_bar(schedule: Schedule, n_times: int) -> torch.Tensor:
    """Return the share of variance that is signal at times 0 to T - 1, ``(T,)`` float32, of a schedule."""
    if schedule == "cosine":
        return cosine_alpha_bar(n_times)
    return torch.cumprod(1.0 - torch.linspace(*linear_betas(n_times), n_times, dtype=torch.float32), dim=0)


def noised(z_BZ: torch.Tensor, noise_BZ: torch.Tensor, alpha_bar_B: torch.Tensor) -> torch.Tensor:
    """Return z after noise was added: ``sqrt(abar) z + sqrt(1 - abar) noise``."""
    signal_B = alpha_bar_B[:, None]
    return signal_B.sqrt() * z_BZ + (1.0 - signal_B).sqrt() * noise_BZ


def velocity(z_BZ: torch.Tensor, noise_BZ: torch.Tensor, alpha_bar_B: torch.Tensor) -> torch.Tensor:
    """Return what the denoiser predicts: ``sqrt(abar) noise - sqrt(1 - abar) z`` (Salimans and Ho 2022)."""
    signal_B = alpha_bar_B[:, None]
    return signal_B.sqrt() * noise_BZ - (1.0 - signal_B).sqrt() * z_BZ


def spread_times(n_cells: int, n_times: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Draw one time per cell, ``(B,)`` int64, evenly spread over all times: less noise in the loss than free draws."""
    u = torch.rand((), generator=generator, device=device)
    order = torch.randperm(n_cells, generator=generator, device=device)
    position = ((torch.arange(n_cells, device=device) + u) / n_cells)[order]
    return (position * n_times).long().clamp_(max=n_times - 1)
