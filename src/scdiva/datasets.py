"""Data sets that come with the package, and synthetic cells. ``sd.datasets``."""

from __future__ import annotations

from scdiva.data.bundled import list_datasets, load, pbmc3k, zheng_sorted7_3500
from scdiva.data.perturbation_simulator import SimulatedPerturbations, simulate_perturbations
from scdiva.data.synthetic import synthetic_cells

__all__ = [
    "SimulatedPerturbations",
    "list_datasets",
    "load",
    "pbmc3k",
    "simulate_perturbations",
    "synthetic_cells",
    "zheng_sorted7_3500",
]
