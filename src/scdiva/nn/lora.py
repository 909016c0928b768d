"""Low-rank adapters of frozen linear layers (LoRA; Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention


class LoRALinear(nn.Module):
    """A frozen linear layer with a trained correction of low rank: W x + b + (alpha / r) B A x.

    B is zero at the start, so that the layer equals the frozen one exactly. Therefore A has no gradient in the first
    step, and moves from the second on.

    Parameters
    ----------
    base
        The layer; it is frozen.
    rank
        r, rows of A and columns of B.
    alpha
        Size of the correction; ``rank`` if left out, which makes its factor 1.
    generator
        Randomness of A's start, uniform as PyTorch's linear layers; PyTorch's global one if left out.

    Attributes
    ----------
    down, up
        A, ``(r, n_in)``, and B, ``(n_out, r)``.
    """

    def __init__(
        self, base: nn.Linear, rank: int, *, alpha: float | None = None, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        limit = min(base.in_features, base.out_features)
        if not 1 <= rank <= limit:
            raise ValueError(f"rank ({rank}) must be between 1 and {limit}, the smaller side of the layer")
        self.base = base.requires_grad_(False)
        self.scale = 1.0 if alpha is None else alpha / rank
        bound = base.in_features**-0.5
        # drawn on the CPU, so that equal generators give equal adapters on every device
        start = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(start.to(base.weight))
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(..., n_in)`` to ``(..., n_out)``."""
        return self.base(x) + self.scale * F.linear(F.linear(x, self.down), self.up)


def add_lora(
    module: nn.Module,
    names: Collection[str],
    rank: int,
    *,
    alpha: float | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, LoRALinear]:
    """Put an adapter on every linear layer of some names, in place.

    Parameters
    ----------
    module
        What holds the layers; its other weights are left as they are (freeze them first).
    names
        Own names of the layers ("qkv"), wherever in the module they are.
    rank, alpha, generator
        As for :class:`LoRALinear`; adapters draw from the generator in the module's order.

    Returns
    -------
    dict
        The adapters by the qualified names of their layers.

    Raises
    ------
    ValueError
        A name that no linear layer has.
    """
    # a list, since the module changes; adapters that are there already keep their own frozen layer, named "base"
    found = [
        (parent_name, parent, name)
        for parent_name, parent in module.named_modules()
        for name, child in parent.named_children()
        if name in names and isinstance(child, nn.Linear)
    ]
    missing = sorted(set(names) - {name for _, _, name in found})
    if missing:
        raise ValueError(f"no linear layer is called {', '.join(missing)}")
    adapters = {}
    for parent_name, parent, name in found:
        adapter = LoRALinear(parent.get_submodule(name), rank, alpha=alpha, generator=generator)
        setattr(parent, name, adapter)
        adapters[f"{parent_name}.{name}".lstrip(".")] = adapter
    return adapters
