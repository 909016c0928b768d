"""A gene network: scored edges from regulators to targets, and what the scores mean."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class GeneNetwork:
    """Scored edges from regulators to targets.

    Parameters
    ----------
    method
        What scored them: "attention", "knockout", "embedding", "spearman" and so on.
    regulators, targets
        ``(R,)`` and ``(G,)`` gene symbols of the vocabulary.
    score
        ``(R, G)`` float32: the larger, the likelier an edge; NaN where nothing can be said of a pair (too few cells
        have both, or regulator and target are the same gene).
    sign
        ``(R, G)`` int8: +1 activates, -1 represses, 0 not known; None for a method that has no signs.
    is_directed
        Whether the score of i on j may differ from that of j on i.
    normalisation
        One sentence: what a score of a given size means, and by what it was divided or corrected.
    n_cells
        Cells it was estimated from.
    group
        The group of cells; empty for all.
    """

    method: str
    regulators: NDArray[np.str_]
    targets: NDArray[np.str_]
    score: NDArray[np.float32]
    sign: NDArray[np.int8] | None
    is_directed: bool
    normalisation: str
    n_cells: int
    group: str = ""

    @property
    def is_signed(self) -> bool:
        """Tell whether edges are told to activate or to repress."""
        return self.sign is not None
