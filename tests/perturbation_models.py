"""Small models of perturbations: a native model with a trunk on simulated cells, and what is fitted to it."""

from __future__ import annotations

from typing import Any

import numpy as np

from native_cells import build, stir
from scdiva.data.perturbation_simulator import SimulatedPerturbations, simulate_perturbations
from scdiva.models.scdiva import ScDiVa
from scdiva.types import CellCounts


def simulated(seed: int = 0, **settings: Any) -> SimulatedPerturbations:
    """Few genes and cells: 12 singles of 3 pathways and 24 pairs, unless told otherwise."""
    usual = {
        "n_genes": 150, "n_targets": 12, "n_pathways": 3, "n_programmes": 5, "n_pairs": 24, "n_cells": 40,
        "n_control": 120,
    }  # fmt: skip
    return simulate_perturbations(np.random.default_rng(seed), **(usual | settings))


def native_model(vocabulary: Any, cells: CellCounts, **trunk: Any) -> ScDiVa:
    """A native model with a trunk of two layers, at its start with noise on every weight."""
    built = stir(build(cells.take(np.arange(min(cells.n_cells, 200))), **trunk), 0.05)
    details = {"name": "small", "license": "cc0-1.0", "trained_heads": ["anchor"], "metrics": {}}
    return ScDiVa(built.network, built.config, vocabulary, built.statistics, details=details)
