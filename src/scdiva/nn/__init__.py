"""Building blocks of networks, without domain words."""

from scdiva.nn.mlp import ResidualMLP

__all__ = ["ResidualMLP"]
