"""Scales: which one an expression matrix is on, and whether it goes back to raw counts exactly.

Log-normalised counts can be inverted without knowing the library size: after ``x = log1p(f * c / n)`` all values of a
cell are multiples of one unit ``f / n``, the value of a single count. Dividing by the unit must give integers, for
every value of every cell; where it does not, the data are something else and we say so. (Our decision.)

What can be recovered is the counts up to a factor that all counts of a cell have in common. A cell with a gene of count
one, which almost every real cell has, has no such factor; in a cell that has one, the depth comes out too small by it,
and CP10K values, which are all that an embedding sees, are not touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.errors import ScaleError

_HOW_TO_FIX = "pass the raw counts, e.g. layer='counts', or read the file that came out of the aligner"
# a unit is the smallest value of a cell; where no gene has count 1 the true unit is a half, a third, ... of it
_UNIT_DIVISORS = (1, 2, 3, 4)
# log1p, float32 and expm1 leave a relative error below 1e-6; integers up to tens of thousands are told apart by far
_ROUNDING_TOLERANCE = 0.02
_RELATIVE_TOLERANCE = 2e-6
# a value whose tolerance reaches this proves nothing; at least half of a cell's values must be below it
_MEANINGLESS_TOLERANCE = 0.25


class ScaleKind(StrEnum):
    """What the values of a matrix are."""

    COUNTS = "raw counts"
    LOG1P = "log1p of normalised counts"
    LOG2P1 = "log2(1 + x) of normalised counts"
    LOG10P1 = "log10(1 + x) of normalised counts"
    NORMALISED = "normalised counts, not logged"


_LOG_BASE = {ScaleKind.LOG1P: np.e, ScaleKind.LOG2P1: 2.0, ScaleKind.LOG10P1: 10.0}


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of a matrix, and how counts are made of it.

    Parameters
    ----------
    kind
        What the values are.
    n_cells_checked
        Number of cells that were looked at; every further block is verified again when it is read.
    has_constant_total
        Whether normalised values add up to the same total in every cell that was looked at. They do not if genes were
        dropped after normalisation.
    """

    kind: ScaleKind
    n_cells_checked: int
    has_constant_total: bool = True

    @property
    def is_counts(self) -> bool:
        """Whether the values are raw counts already."""
        return self.kind is ScaleKind.COUNTS

    @property
    def description(self) -> str:
        """One phrase for reports and provenance."""
        if self.is_counts:
            return "raw counts"
        subset = "" if self.has_constant_total else " (of the genes left after normalisation)"
        return f"{self.kind.value}, inverted to raw counts exactly{subset}"

    def to_counts(self, block: sp.csr_matrix, where: str) -> sp.csr_matrix:
        """Turn one block of rows into int32 raw counts, verifying every value.

        Parameters
        ----------
        block
            CSR ``(n_cells, n_genes)`` on this scale.
        where
            Name of the matrix, for the error.

        Raises
        ------
        ScaleError
            A value is NaN, infinite, negative or not on this scale.
        """
        data = _valid_values(block, where)
        if self.is_counts:
            rounded = np.rint(data)
            if not np.array_equal(rounded, data):
                bad = data[rounded != data][0]
                raise ScaleError(
                    f"{where} holds non-integer values (e.g. {bad:.6g}) among integers",
                    expected="raw counts throughout",
                    fix=_HOW_TO_FIX + "; ambient-corrected counts must be rounded by you, on purpose",
                )
            counts = rounded
        else:
            linear = _linear(data, self.kind)
            inverted = _invert_rows(linear, block.indptr)
            if inverted is None:
                raise ScaleError(
                    f"{where} is not exactly invertible to raw counts in every cell",
                    expected=self.kind.value,
                    fix=_HOW_TO_FIX,
                )
            counts = inverted
        if counts.size and counts.max() > np.iinfo(np.int32).max:
            raise ScaleError(
                f"{where} holds a count of {counts.max():.3g}", expected="counts below 2.1e9", fix=_HOW_TO_FIX
            )
        return sp.csr_matrix((counts.astype(np.int32), block.indices, block.indptr), shape=block.shape, copy=False)


def _valid_values(block: sp.csr_matrix, where: str) -> NDArray[np.float64]:
    """Return the stored values as float64; refuse what no expression matrix holds."""
    data = block.data
    if data.dtype == object or not (np.issubdtype(data.dtype, np.number) or data.dtype == bool):
        raise ScaleError(
            f"{where} has dtype {data.dtype}",
            expected="a numeric matrix of raw counts",
            fix="convert it, e.g. adata.X = adata.X.astype('float32')",
        )
    if np.iscomplexobj(data):
        raise ScaleError(f"{where} is complex", expected="raw counts", fix=_HOW_TO_FIX)
    values = data.astype(np.float64)
    if not np.isfinite(values).all():
        n_bad = int((~np.isfinite(values)).sum())
        raise ScaleError(f"{where} holds {n_bad} NaN or infinite values", expected="finite raw counts", fix=_HOW_TO_FIX)
    if values.size and values.min() < 0:
        raise ScaleError(
            f"{where} holds negative values (minimum {values.min():.4g}): scaled, centred or residual data",
            expected="raw counts",
            fix=_HOW_TO_FIX,
        )
    return values


def _linear(values: NDArray[np.float64], kind: ScaleKind) -> NDArray[np.float64]:
    base = _LOG_BASE.get(kind)
    return values if base is None else np.expm1(values * np.log(base))


def _invert_rows(linear: NDArray[np.float64], indptr: NDArray[Any]) -> NDArray[np.float64] | None:
    """Divide every row by its unit; ``None`` unless the result is integers everywhere."""
    n_stored = np.diff(indptr)
    row_of_value = np.repeat(np.arange(n_stored.size), n_stored)
    unit = np.full(n_stored.size, np.inf)
    is_positive = linear > 0
    np.minimum.at(unit, row_of_value[is_positive], linear[is_positive])
    is_done = ~np.isfinite(unit)  # rows without a positive value
    unit[is_done] = 1.0
    counts = np.zeros_like(linear)
    for divisor in _UNIT_DIVISORS:
        ratio = linear * (divisor / unit[row_of_value])
        rounded = np.rint(ratio)
        tolerance = _ROUNDING_TOLERANCE * divisor + _RELATIVE_TOLERANCE * ratio
        n_off = np.bincount(row_of_value[np.abs(ratio - rounded) > tolerance], minlength=unit.size)
        n_blunt = np.bincount(row_of_value[tolerance > _MEANINGLESS_TOLERANCE], minlength=unit.size)
        is_solved = (n_off == 0) & (2 * n_blunt <= n_stored) & ~is_done
        take = is_solved[row_of_value]
        counts[take] = rounded[take]
        is_done |= is_solved
        if is_done.all():
            return counts
    return None


def detect_scale(block: sp.csr_matrix, where: str) -> Scale:
    """Tell on which scale a matrix is, from a sample of its rows.

    Parameters
    ----------
    block
        CSR ``(n_cells, n_genes)``: some rows of the matrix.
    where
        Name of the matrix, for the errors ("X", "layers['counts']").

    Returns
    -------
    Scale

    Raises
    ------
    ScaleError
        NaN, infinite or negative values, all zeros, presence/absence data, or values that are not exactly invertible
        to raw counts.
    """
    values = _valid_values(block, where)
    positive = values[values > 0]
    if positive.size == 0:
        raise ScaleError(f"{where} is all zero", expected="raw counts", fix=_HOW_TO_FIX)
    n_cells = int(block.shape[0])
    if np.array_equal(positive, np.rint(positive)):
        if positive.max() == 1 and positive.size >= 1000:
            raise ScaleError(
                f"{where} holds only 0 and 1: presence/absence data", expected="raw counts", fix=_HOW_TO_FIX
            )
        return Scale(ScaleKind.COUNTS, n_cells)
    # natural log first: it is what scanpy writes. A row with very few distinct values can look invertible on the
    # wrong scale, so a scale must hold in every sampled row, which together carry thousands of values.
    for kind in (ScaleKind.LOG1P, ScaleKind.NORMALISED, ScaleKind.LOG2P1, ScaleKind.LOG10P1):
        if kind in _LOG_BASE and positive.max() * np.log(_LOG_BASE[kind]) > np.log(1e8):
            continue  # expm1 would overflow any sensible total: not logged data
        linear = _linear(values, kind)
        if _invert_rows(linear, block.indptr) is not None:
            row_of_value = np.repeat(np.arange(n_cells), np.diff(block.indptr))
            totals = np.bincount(row_of_value, weights=linear, minlength=n_cells)
            totals = totals[totals > 0]
            return Scale(kind, n_cells, has_constant_total=bool(totals.std() < 0.01 * totals.mean()))
    looks_logged = positive.max() < 30
    raise ScaleError(
        f"{where} holds non-integer values ({positive.min():.4g} to {positive.max():.4g}) that do not go back to "
        f"integers by undoing {'log1p and ' if looks_logged else ''}a per-cell scaling",
        expected="raw counts, or log-normalised counts that can be inverted exactly",
        fix=_HOW_TO_FIX
        + "; ambient-corrected counts must be rounded by you, on purpose; TPM has no counts to go back to",
    )
