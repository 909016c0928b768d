"""Splits of a corpus into training and held-out cells."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdiva.errors import SourceError


def hold_out(
    groups: ArrayLike, fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out whole groups of cells (donors, batches), or cells where there is only one group.

    Cells of one donor resemble each other beyond their type; held-out cells of a donor that was trained on would make
    the held-out loss too good.

    Parameters
    ----------
    groups
        ``(n_cells,)`` group of every cell.
    fraction
        Wanted share of held-out cells, in (0, 1). With groups it is met as closely as whole groups allow; groups are
        taken at random, and none that would take the held-out share beyond twice the wanted one. At least one cell
        is left on each side.
    rng
        Source of randomness.

    Returns
    -------
    train, heldout
        Sorted positions.

    Raises
    ------
    SourceError
        There are fewer than two cells.
    """
    names, group_of_cell, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    n_cells = int(sizes.sum())
    if n_cells < 2:
        raise SourceError(
            f"{n_cells} cell{'s' if n_cells != 1 else ''} to train on and to hold out",
            expected="at least two",
            fix="give a file with more cells",
        )
    wanted = min(max(1, round(fraction * n_cells)), n_cells - 1)
    is_heldout = np.zeros(n_cells, dtype=bool)
    if names.size > 1:
        taken = 0
        for group in rng.permutation(names.size):
            if taken >= wanted:
                break
            if taken + sizes[group] <= min(2 * wanted, n_cells - 1):
                is_heldout |= group_of_cell == group
                taken += int(sizes[group])
    if not is_heldout.any():  # one group, or none small enough
        is_heldout[rng.choice(n_cells, size=wanted, replace=False)] = True
    return np.flatnonzero(~is_heldout), np.flatnonzero(is_heldout)
