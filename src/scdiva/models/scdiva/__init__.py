"""scDiVa: masked discrete diffusion over cells as sets of (gene, expression) tokens."""

from scdiva.models.scdiva.model import ScDiVa

__all__ = ["ScDiVa"]
