"""The ground on which real and generated cells meet: variable genes and principal components of *other* real cells.

A two-sample test is only as honest as its features. Variable genes and components that were fitted on one of the two
samples describe that sample's noise better than the other's, and then even real cells fail against real cells. Both
are therefore fitted on real cells that are in neither sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

N_VARIABLE_GENES = 2000
N_COMPONENTS = 50
_TARGET = 1e4
_FEWEST_CELLS = 3


class NotMeasurableError(Exception):
    """A metric has no value for these cells; the message says why. It ends as a NaN with that reason."""


@dataclass(frozen=True, slots=True)
class Score:
    """A number, or NaN with the reason why there is none.

    Parameters
    ----------
    value
        The metric.
    reason
        Empty for a number.
    """

    value: float
    reason: str = ""

    @classmethod
    def of(cls, function: Callable[..., float], *arguments: Any, **options: Any) -> Self:
        """Call a metric; NaN with the reason where it cannot be measured."""
        try:
            value = float(function(*arguments, **options))
        except NotMeasurableError as error:
            return cls(float("nan"), str(error))
        return cls(value, "" if np.isfinite(value) else "the metric is not finite for these cells")


@dataclass(frozen=True, slots=True)
class LabelledCells:
    """Cells with their types: what is compared.

    Parameters
    ----------
    counts
        CSR ``(n_cells, n_genes)``, sorted indices, no explicit zeros. Whole numbers are raw counts; anything else is
        expression on a linear scale (CP10K), as methods emit that know no counts.
    labels
        ``(n_cells,)`` type of each cell.
    """

    counts: sp.csr_matrix
    labels: NDArray[np.str_]

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.counts.shape[0])

    @property
    def is_counts(self) -> bool:
        """Whether all values are whole numbers."""
        data = self.counts.data
        return bool(np.issubdtype(data.dtype, np.integer) or np.array_equal(data, np.rint(data)))

    def take(self, rows: NDArray[Any]) -> LabelledCells:
        """Return the given rows (positions or a mask)."""
        return LabelledCells(sp.csr_matrix(self.counts[rows]), self.labels[rows])


def log_cp10k(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Return log1p of counts per 10,000, ``(n_cells, n_genes)`` float32 CSR; cells without counts stay empty."""
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    factor = _TARGET / np.where(total > 0, total, 1.0)
    data = np.log1p(counts.data * np.repeat(factor, np.diff(counts.indptr))).astype(np.float32)
    return sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def variable_genes(counts: sp.csr_matrix, n_genes: int = N_VARIABLE_GENES) -> NDArray[np.int64]:
    """Return columns of the most variable genes, the most variable first.

    scanpy's "seurat" flavour (normalised dispersion) on log1p(CP10K), among genes that vary.

    Raises
    ------
    NotMeasurableError
        Fewer than three cells, or no gene that varies.
    """
    # deferred: scanpy takes seconds to load
    import anndata as ad
    import scanpy as sc

    if counts.shape[0] < _FEWEST_CELLS:
        raise NotMeasurableError(f"variable genes need {_FEWEST_CELLS} cells, found {counts.shape[0]}")
    found = sc.pp.highly_variable_genes(
        ad.AnnData(log_cp10k(counts)), n_top_genes=min(n_genes, counts.shape[1]), inplace=False
    )
    dispersion = found["dispersions_norm"].to_numpy(dtype=np.float64, na_value=-np.inf)
    dispersion[np.bincount(counts.indices, minlength=counts.shape[1]) == 0] = -np.inf
    order = np.argsort(-dispersion, kind="stable")[:n_genes]
    order = order[np.isfinite(dispersion[order])]
    if order.size == 0:
        raise NotMeasurableError("no gene varies")
    return order.astype(np.int64)


@dataclass(frozen=True, slots=True)
class ReferenceSpace:
    """Variable genes and principal components of real cells that are in neither of the samples compared.

    Build it with :meth:`fit`.

    Parameters
    ----------
    genes
        ``(n_variable,)`` columns, the most variable first.
    mean
        ``(n_variable,)`` mean log1p(CP10K).
    components
        ``(n_variable, n_components)`` loadings.
    """

    genes: NDArray[np.int64]
    mean: NDArray[np.float64]
    components: NDArray[np.float64]

    @classmethod
    def fit(
        cls,
        counts: sp.csr_matrix,
        *,
        seed: int,
        n_genes: int = N_VARIABLE_GENES,
        n_components: int = N_COMPONENTS,
        genes: NDArray[np.int64] | None = None,
    ) -> Self:
        """Fit on counts ``(n_cells, n_genes)``.

        Parameters
        ----------
        counts
            Real cells in neither sample.
        seed
            Seed of the PCA solver.
        n_genes, n_components
            Sizes; fewer where there are fewer cells or genes.
        genes
            Variable genes that are chosen already (a space within one type keeps those of all types).

        Raises
        ------
        NotMeasurableError
            Fewer than three cells, or nothing varies.
        """
        from sklearn.decomposition import PCA

        chosen = variable_genes(counts, n_genes) if genes is None else genes
        values = log_cp10k(counts)[:, chosen].toarray()
        if values.shape[0] < _FEWEST_CELLS or not (values.std(axis=0) > 0).any():
            raise NotMeasurableError(f"principal components need cells that differ, found {values.shape[0]} cells")
        size = max(1, min(n_components, min(values.shape) - 1))
        pca = PCA(size, svd_solver="arpack" if size < min(values.shape) else "full", random_state=seed).fit(values)
        return cls(chosen, np.asarray(pca.mean_, dtype=np.float64), np.asarray(pca.components_.T, dtype=np.float64))

    def values(self, counts: sp.csr_matrix) -> NDArray[np.float32]:
        """Return log1p(CP10K) of the variable genes, ``(n_cells, n_variable)`` dense."""
        return log_cp10k(counts)[:, self.genes].toarray()

    def project(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return principal components of what :meth:`values` gave, ``(n_cells, n_components)``."""
        return (values - self.mean) @ self.components
