"""Simple generators of single perturbed cells, given control cells and a predicted change of the mean.

All return CSR int32 counts ``(n_cells, n_genes)``, are deterministic given their seed, and know nothing else of the
perturbation: what a generator of cells is judged against.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines.generation import negative_binomial_per_type
from scdiva.data.shifting import CountShift
from scdiva.types import CellCounts

_TYPE = "cells"


def control_cells(control: CellCounts, n_cells: int, seed: int) -> CellCounts:
    """Return control cells as they are, each as often as any other: no effect at all.

    Parameters
    ----------
    control
        Raw counts of control cells.
    n_cells
        Number of cells.
    seed
        Seed of their order.
    """
    rng = np.random.default_rng(seed)
    rounds = [rng.permutation(control.n_cells) for _ in range(-(-n_cells // max(control.n_cells, 1)))]
    return control.take(np.concatenate(rounds)[:n_cells])


def shifted_cells(
    control: CellCounts,
    change_G: NDArray[np.floating],
    n_cells: int,
    seed: int,
    *,
    spread: float = 0.0,
    depth_ratio: float = 1.0,
) -> CellCounts:
    """Return control cells whose counts are thinned, or gain Poisson counts, until the mean changes as predicted.

    Parameters
    ----------
    control, n_cells, seed
        As of :func:`control_cells`.
    change_G
        ``(n_genes,)`` predicted change of the mean of log1p(CP10K).
    spread
        Standard deviation over cells of the log strength of response; 0: all cells gain at the same rates.
    depth_ratio
        Library size that a perturbed cell is to have, over that of its control cell.

    Raises
    ------
    ConfigError
        No cells, or changes that do not fit them (:meth:`scdiva.data.shifting.CountShift.fit`).
    """
    shift = CountShift.fit(control, change_G, np.random.default_rng([seed, 1]), spread=spread, depth_ratio=depth_ratio)
    return shift.apply(control_cells(control, n_cells, seed), np.random.default_rng([seed, 2]))


def negative_binomial_cells(
    control: CellCounts, change_G: NDArray[np.floating], n_cells: int, seed: int
) -> sp.csr_matrix:
    """Draw every gene on its own, from a negative binomial fitted to control cells moved by the change.

    What is fitted to are the cells of :func:`shifted_cells`, by moments given library sizes
    (:func:`scdiva.baselines.generation.negative_binomial_per_type`). Parameters as there.
    """
    moved = shifted_cells(control, change_G, control.n_cells, seed).counts
    labels = np.full(control.n_cells, _TYPE)
    return negative_binomial_per_type(moved, labels, {_TYPE: n_cells}, seed)[0]
