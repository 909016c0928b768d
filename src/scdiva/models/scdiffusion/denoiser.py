"""The denoiser: what the noise on z is, given time, depth and conditions.

Shape letters: B cells, D width, Z latent, F condition fields.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

_SLOWEST = 10_000.0


def time_embedding(t_B: torch.Tensor, width: int) -> torch.Tensor:
    """Return sines and cosines of a time in steps, ``(B, width)``; frequencies from 1 to 1/10,000."""
    half = width // 2
    frequency = torch.exp(-math.log(_SLOWEST) * torch.arange(half, device=t_B.device) / half)
    angle = t_B.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class AdaptiveBlock(nn.Module):
    """Residual MLP whose norm is shifted, scaled and gated by a context; adds nothing at the start (AdaLN-zero).

    Source: Peebles and Xie, DiT (arXiv:2212.09748).
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, h_BD: torch.Tensor, context_BD: torch.Tensor) -> torch.Tensor:
        """Map ``(B, D)`` to ``(B, D)``."""
        shift_BD, scale_BD, gate_BD = self.modulation(context_BD).chunk(3, dim=1)
        return h_BD + gate_BD * self.mlp(self.norm(h_BD) * (1.0 + scale_BD) + shift_BD)


class Denoiser(nn.Module):
    """Predicts the velocity of noised z (our decision).

    Time, log depth and conditions are added up into one context. Each condition field has a table whose row 0 stands
    for "not known": with row 0 everywhere the prediction is unconditional.

    Parameters
    ----------
    n_latent, width, n_blocks
        Sizes.
    n_labels
        Labels of each field.
    dropout
        Dropout in the blocks, in training.
    """

    def __init__(
        self, n_latent: int, width: int, n_blocks: int, n_labels: Sequence[int], *, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.depth = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.tables = nn.ModuleList(nn.Embedding(n + 1, width) for n in n_labels)
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.1)
        self.enter = nn.Linear(n_latent, width)
        self.blocks = nn.ModuleList(AdaptiveBlock(width, dropout) for _ in range(n_blocks))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.leave = nn.Linear(width, n_latent)
        for layer in (self.modulation, self.leave):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, z_BZ: torch.Tensor, t_B: torch.Tensor, depth_B: torch.Tensor, condition_BF: torch.Tensor
    ) -> torch.Tensor:
        """Predict the velocity.

        Parameters
        ----------
        z_BZ
            Noised z.
        t_B
            int64 times, 0 to T - 1.
        depth_B
            Standardised log depth; 0 is the typical cell.
        condition_BF
            int64 codes of the fields; 0 is not known.

        Returns
        -------
        torch.Tensor
            ``(B, Z)``.
        """
        context_BD = self.time(time_embedding(t_B, self.width)) + self.depth(depth_B[:, None])
        for field, table in enumerate(self.tables):
            context_BD = context_BD + table(condition_BF[:, field])
        context_BD = F.silu(context_BD)
        h_BD = self.enter(z_BZ)
        for block in self.blocks:
            h_BD = block(h_BD, context_BD)
        shift_BD, scale_BD = self.modulation(context_BD).chunk(2, dim=1)
        return self.leave(self.norm(h_BD) * (1.0 + scale_BD) + shift_BD)
