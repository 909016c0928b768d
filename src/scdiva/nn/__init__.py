"""Building blocks of networks, without domain words."""

from scdiva.nn.mlp import ResidualMLP
from scdiva.nn.transformer import Packing, Transformer, init_transformer

__all__ = ["Packing", "ResidualMLP", "Transformer", "init_transformer"]
