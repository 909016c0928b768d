"""The training loop: any objective, any collection of cells, resumable at any moment."""

from scdiva.training.curve import draw_curve
from scdiva.training.fit import FitResult, fit, uses_bf16

__all__ = ["FitResult", "draw_curve", "fit", "uses_bf16"]
