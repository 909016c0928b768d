"""What a perturbation changes: means, changes and rank tests of perturbed against control cells of the same batch.

Baselines and metrics mean the same by "the change of a condition", so it is defined here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.perturbations import Perturbation, PerturbedCells

MIN_CELLS = 10
"""Conditions of fewer cells or control cells are not among the effects, if others have as many (our decision)."""
_BLOCK = 512


def log_values(cells: PerturbedCells) -> sp.csr_matrix:
    """Return log1p(CP10K), CSR ``(n_cells, n_genes)`` float32, by the library sizes that the cells come with.

    A cell of library size 0 has no values.
    """
    counts, size = cells.cells.counts, np.asarray(cells.cells.library_size, dtype=np.float64)
    factor = np.divide(1e4, size, out=np.zeros_like(size), where=size > 0)
    data = np.log1p(counts.data * np.repeat(factor, np.diff(counts.indptr))).astype(np.float32)
    return sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def mean_of(values: sp.csr_matrix) -> NDArray[np.float64]:
    """Return the mean over cells, ``(n_genes,)``."""
    # scipy's mean of float32 adds up float32
    return np.bincount(values.indices, weights=values.data, minlength=values.shape[1]) / max(values.shape[0], 1)


@dataclass(frozen=True, slots=True, eq=False)
class ControlMeans:
    """Means of control cells by batch, to compare perturbed cells of any batches with.

    Parameters
    ----------
    by_batch
        ``(n_genes,)`` by batch code.
    overall
        ``(n_genes,)`` over all control cells.
    """

    by_batch: Mapping[int, NDArray[np.float64]]
    overall: NDArray[np.float64]

    @classmethod
    def of(cls, values: sp.csr_matrix, batch: NDArray[np.integer]) -> Self:
        """Take the means of at least one control cell."""
        return cls({int(b): mean_of(values[np.flatnonzero(batch == b)]) for b in np.unique(batch)}, mean_of(values))

    def matched(self, batch: NDArray[np.integer]) -> NDArray[np.float64]:
        """Return the mean over perturbed cells of their batch's control mean, ``(n_genes,)``.

        Perturbed cells of a batch without control cells are compared with all control cells.
        """
        codes, n = np.unique(batch, return_counts=True)
        means = np.stack([self.by_batch.get(int(code), self.overall) for code in codes])
        return np.asarray(n @ means / batch.size)


def rank_sum_test(
    perturbed: sp.csr_matrix,
    control: sp.csr_matrix,
    perturbed_batch: NDArray[np.integer] | None = None,
    control_batch: NDArray[np.integer] | None = None,
) -> NDArray[np.float64]:
    """Return z of the Wilcoxon rank-sum test of every gene, positive where perturbed cells have more.

    With ties corrected for, without continuity correction; over batches van Elteren's stratified test (1960: rank sums
    weighted by 1 / (N + 1)). Perturbed cells of batches without control cells are tested against all control cells. A
    gene that does not vary has z = 0.

    Parameters
    ----------
    perturbed, control
        CSR ``(n_cells, n_genes)`` log1p(CP10K).
    perturbed_batch, control_batch
        ``(n_cells,)`` codes; one batch where left out.
    """
    n_genes = perturbed.shape[1]
    if perturbed_batch is None or control_batch is None:
        perturbed_batch, control_batch = np.zeros(perturbed.shape[0], int), np.zeros(control.shape[0], int)
    has_control = np.isin(perturbed_batch, control_batch)
    strata = [
        (np.flatnonzero(perturbed_batch == b), np.flatnonzero(control_batch == b))
        for b in np.unique(perturbed_batch[has_control])
    ]
    if not has_control.all():
        strata.append((np.flatnonzero(~has_control), np.arange(control.shape[0])))
    z = np.zeros(n_genes)
    columns = [(sp.csc_matrix(perturbed[p]), sp.csc_matrix(control[c])) for p, c in strata]
    for first in range(0, n_genes, _BLOCK):
        block = slice(first, min(first + _BLOCK, n_genes))
        shift, variance = np.zeros(block.stop - first), np.zeros(block.stop - first)
        for p, c in columns:
            found = _rank_shift(p[:, block].toarray(), c[:, block].toarray())
            shift, variance = shift + found[0], variance + found[1]
        z[block] = np.divide(shift, np.sqrt(variance), out=np.zeros_like(shift), where=variance > 0)
    return z


def _rank_shift(x: NDArray[np.floating], y: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weighted rank sum minus its expectation, and its variance under permutation."""
    from scipy.stats import rankdata

    n, total = len(x), len(x) + len(y)
    rank = rankdata(np.concatenate([x, y]), axis=0) - (total + 1) / 2
    weight = 1.0 / (total + 1)
    # of ranks with ties, the variance of a sum of n drawn without replacement
    variance = n * (total - n) / (total * max(total - 1, 1)) * (rank**2).sum(axis=0)
    variance[np.ptp(rank, axis=0) == 0] = 0.0
    return weight * rank[:n].sum(axis=0), weight**2 * variance


@dataclass(frozen=True, slots=True, eq=False)
class Effect:
    """What one perturbation changes in one context.

    Parameters
    ----------
    perturbation, context
        Which.
    change
        ``(n_genes,)`` mean log1p(CP10K) of perturbed cells minus that of control cells, matched by batch.
    control_mean
        ``(n_genes,)`` the mean of those control cells.
    n_cells
        Number of perturbed cells.
    """

    perturbation: Perturbation
    context: str
    change: NDArray[np.float64]
    control_mean: NDArray[np.float64]
    n_cells: int

    @classmethod
    def of(
        cls,
        cells: PerturbedCells,
        values: sp.csr_matrix,
        perturbed: NDArray[np.integer],
        control: ControlMeans,
    ) -> Self:
        """Measure it.

        Parameters
        ----------
        cells
            Cells.
        values
            What :func:`log_values` gives for them.
        perturbed
            Rows of cells of one perturbation in one context; at least one.
        control
            Control cells of that context.
        """
        control_mean = control.matched(cells.batch_code[perturbed])
        return cls(
            cells.perturbations[cells.perturbation_code[perturbed[0]]],
            cells.contexts[cells.context_code[perturbed[0]]],
            mean_of(values[perturbed]) - control_mean,
            control_mean,
            perturbed.size,
        )


def effects_of(
    cells: PerturbedCells, values: sp.csr_matrix | None = None, *, min_cells: int = MIN_CELLS
) -> tuple[Effect, ...]:
    """Return the effect of every condition (perturbation and context) with enough cells and any control cells.

    Where none has enough, of all that have control cells.

    Parameters
    ----------
    cells
        Cells.
    values
        What :func:`log_values` gives for them, if it is there already.
    min_cells
        Fewest perturbed cells, and fewest control cells of the context.
    """
    values = log_values(cells) if values is None else values
    found: list[Effect] = []
    is_large: list[bool] = []
    controls: dict[int, ControlMeans] = {}
    for context, perturbation in conditions_of(cells):
        here = cells.context_code == context
        perturbed = np.flatnonzero(here & (cells.perturbation_code == perturbation))
        control = np.flatnonzero(here & cells.is_control)
        if control.size:
            if context not in controls:
                controls[context] = ControlMeans.of(values[control], cells.batch_code[control])
            found.append(Effect.of(cells, values, perturbed, controls[context]))
            is_large.append(min(perturbed.size, control.size) >= min_cells)
    return tuple(effect for effect, large in zip(found, is_large, strict=True) if large) or tuple(found)


def conditions_of(cells: PerturbedCells) -> Sequence[tuple[int, int]]:
    """Return the (context, perturbation) codes that occur, control left out, sorted."""
    pairs = np.unique(np.stack([cells.context_code, cells.perturbation_code], axis=1), axis=0)
    return [(int(context), int(perturbation)) for context, perturbation in pairs if perturbation != 0]
