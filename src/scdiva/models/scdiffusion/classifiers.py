"""Classifiers of noised z, for classifier guidance.

Shape letters: B cells, C classes, D width, Z latent.
"""

from __future__ import annotations

import torch
from torch import nn

from scdiva.models.scdiffusion.denoiser import time_embedding


class LatentClassifier(nn.Module):
    """Label of a condition field from noised z at any time (after Luo et al. 2024).

    LayerNorm, not BatchNorm; trained at all noise levels, as guidance asks it at all of them. It reads z alone: it can
    be added to a model whose denoiser never heard of the field.

    Parameters
    ----------
    n_latent, width, n_classes
        Sizes.
    dropout
        In training.
    """

    def __init__(self, n_latent: int, width: int, n_classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Linear(n_latent, width)
        self.middle = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, width),
            nn.LayerNorm(width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(width, n_classes),
        )  # fmt: skip

    def forward(self, z_BZ: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Return logits, ``(B, C)``; class c is label code c + 1."""
        return self.middle(self.enter(z_BZ) + self.time(time_embedding(t_B, self.width)))
