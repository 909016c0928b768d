"""Named sizes of the network, from a laptop's to the published ones."""

from __future__ import annotations

import torch

from scdiva.config import NativeConfig, OfficialConfig, TrunkConfig
from scdiva.models.scdiva.model import build_network

PRESETS: dict[str, NativeConfig | OfficialConfig] = {
    "official": OfficialConfig(architecture="official"),
    "tiny": NativeConfig(
        trunk=TrunkConfig(n_layers=4, width=192, n_heads=3, n_hidden=512, max_tokens=256),
    ),
    "small": NativeConfig(
        n_embedding=256,
        trunk=TrunkConfig(n_layers=8, width=384, n_heads=6, n_hidden=1024, max_tokens=600),
    ),
    "base": NativeConfig(
        n_embedding=512,
        n_hidden=1024,
        trunk=TrunkConfig(n_layers=12, width=512, n_heads=8, n_hidden=2048, max_tokens=1200),
    ),
}
"""``official`` is the published token model; the others are native, ``base`` with the published trunk."""


def n_parameters(config: NativeConfig | OfficialConfig, n_genes: int) -> int:
    """Count the parameters of a configuration without making them."""
    with torch.device("meta"):
        network = build_network(n_genes, config)
    return sum(parameter.numel() for parameter in network.parameters())
