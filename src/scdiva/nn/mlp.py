"""Multi-layer perceptrons."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention


class ResidualMLP(nn.Module):
    """LayerNorm, Linear, SiLU, Linear; the last layer is zero at the start, so the whole adds nothing then.

    Parameters
    ----------
    n_in, n_hidden, n_out
        Widths.
    generator
        Randomness of the first layer's start; PyTorch's global one if left out.
    """

    def __init__(self, n_in: int, n_hidden: int, n_out: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(n_in)
        self.up = nn.Linear(n_in, n_hidden)
        # PyTorch's own start of a linear layer, but from a generator: a run that resumes must start at the same weights
        for tensor in (self.up.weight, self.up.bias):
            nn.init.uniform_(tensor, -(n_in**-0.5), n_in**-0.5, generator=generator)
        self.down = nn.Linear(n_hidden, n_out)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(B, n_in)`` to ``(B, n_out)``."""
        return self.down(F.silu(self.up(self.norm(x))))
