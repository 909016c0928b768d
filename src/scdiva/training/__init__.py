"""The training loop: any objective, any collection of cells, resumable at any moment."""

from scdiva.training.curve import draw_curve
from scdiva.training.fit import FitResult, fit, uses_bf16
from scdiva.training.peak import measured_peak

__all__ = ["FitResult", "draw_curve", "fit", "measured_peak", "uses_bf16"]
