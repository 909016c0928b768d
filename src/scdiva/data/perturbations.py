"""Perturbations, and cells that say which one each of them had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scdiva.types import CellCounts

Kind = Literal["knockout", "activation", "treatment"]
"""Loss of a gene (knock-out, CRISPRi), gain of one (CRISPRa, over-expression), or a drug or cytokine by its name."""
CONTROL = "control"
"""Name of no perturbation."""


@dataclass(frozen=True, slots=True, order=True)
class Perturbation:
    """What was done to a cell.

    Parameters
    ----------
    targets
        Genes (symbols of the vocabulary, or as the file has them where the vocabulary has no such gene), or names of
        drugs and cytokines; sorted, no two equal. None of them: control.
    kind
        What was done to them.
    dose
        Of a treatment, in the unit of the data; None where it is not known or does not apply.
    """

    targets: tuple[str, ...]
    kind: Kind = "knockout"
    dose: float | None = None

    @property
    def name(self) -> str:
        """``"A+B"``, with a dose ``"A@2.5"``; of no target ``"control"``."""
        if not self.targets:
            return CONTROL
        return "+".join(self.targets) + ("" if self.dose is None else f"@{self.dose:g}")

    @property
    def is_control(self) -> bool:
        """Tell whether nothing was perturbed."""
        return not self.targets


@dataclass(frozen=True, slots=True, eq=False)
class PerturbedCells:
    """Cells of one data set with what was done to each, and where.

    Parameters
    ----------
    cells
        Raw counts in vocabulary order; ``library_size`` is over all genes of the cell where the file tells.
    perturbations
        All of the set; ``perturbations[0]`` is control.
    perturbation_code
        ``(n_cells,)`` int64 position in ``perturbations``.
    contexts
        Names of the cell types or lines that are compared within; one, ``""``, where the data has no context.
    context_code
        ``(n_cells,)`` int64.
    batches
        Names of batches; perturbed cells are compared with control cells of their batch where it has any.
    batch_code
        ``(n_cells,)`` int64.
    """

    cells: CellCounts
    perturbations: tuple[Perturbation, ...]
    perturbation_code: NDArray[np.int64]
    contexts: tuple[str, ...]
    context_code: NDArray[np.int64]
    batches: tuple[str, ...]
    batch_code: NDArray[np.int64]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.cells.n_cells

    @property
    def is_control(self) -> NDArray[np.bool_]:
        """Cells that nothing was done to, ``(n_cells,)``."""
        return self.perturbation_code == 0

    @property
    def is_measured(self) -> NDArray[np.bool_]:
        """Genes of the vocabulary that the data measures, ``(n_genes,)``: the panel."""
        return np.asarray(self.cells.is_measured.all(axis=0))

    def take(self, rows: NDArray[np.integer]) -> PerturbedCells:
        """Return the given cells, in the given order; perturbations, contexts and batches keep their codes."""
        return PerturbedCells(
            self.cells.take(rows),
            self.perturbations,
            self.perturbation_code[rows],
            self.contexts,
            self.context_code[rows],
            self.batches,
            self.batch_code[rows],
        )
