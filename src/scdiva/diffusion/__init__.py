"""Masked diffusion: what is hidden from the network, and when. Pure functions."""

from scdiva.diffusion.corruption import MaskKind, Masks, draw_masks, exact_count_masks, stratified_times

__all__ = ["MaskKind", "Masks", "draw_masks", "exact_count_masks", "stratified_times"]
