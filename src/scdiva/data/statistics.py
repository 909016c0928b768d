"""Population statistics of genes, in one streaming and mergeable pass."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.errors import BundleError
from scdiva.types import CellCounts

CP10K = 1e4


def depth_normalised(cells: CellCounts) -> sp.csr_matrix:
    """Return CP10K values, ``1e4 * count / library size``, as float64 CSR ``(n_cells, n_genes)``."""
    scale = np.divide(CP10K, cells.library_size, out=np.zeros_like(cells.library_size), where=cells.library_size > 0)
    counts = cells.counts
    values = counts.data * np.repeat(scale, np.diff(counts.indptr))
    return sp.csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape, copy=False)


@dataclass(frozen=True, slots=True, eq=False)
class GeneStatistics:
    """Sums over a population of cells, and the statistics that follow from them.

    Estimated once on the training corpus, stored in the bundle and never recomputed on query data. Two statistics of
    disjoint cells add up (``a + b``): shards can be counted apart.

    Parameters
    ----------
    n_cells
        Number of cells with at least one count.
    sum_cp10k
        ``(n_genes,)`` float64: S_g, the sum over cells of CP10K values.
    sum_xlogx
        ``(n_genes,)`` float64: Q_g, the sum over cells of x ln x with x in CP10K.
    n_detected
        ``(n_genes,)`` int64: number of cells with a count.
    sum_counts
        ``(n_genes,)`` int64: number of UMIs.
    """

    n_cells: int
    sum_cp10k: NDArray[np.float64]
    sum_xlogx: NDArray[np.float64]
    n_detected: NDArray[np.int64]
    sum_counts: NDArray[np.int64]

    @classmethod
    def empty(cls, n_genes: int) -> Self:
        """Return the statistics of no cells at all."""
        zeros, zero_counts = np.zeros(n_genes), np.zeros(n_genes, dtype=np.int64)
        return cls(0, zeros, zeros.copy(), zero_counts, zero_counts.copy())

    @classmethod
    def from_cells(cls, cells: CellCounts) -> Self:
        """Count one block of cells."""
        normalised = depth_normalised(cells)
        genes, n_genes = normalised.indices, cells.n_genes
        values = normalised.data
        return cls(
            n_cells=int((np.diff(cells.counts.indptr) > 0).sum()),
            sum_cp10k=_sums(genes, values, n_genes),
            sum_xlogx=_sums(genes, values * np.log(np.maximum(values, 1e-300)), n_genes),
            n_detected=np.bincount(genes, minlength=n_genes).astype(np.int64),
            # float64 sums of integers are exact up to 2**53
            sum_counts=_sums(genes, cells.counts.data, n_genes).astype(np.int64),
        )

    @classmethod
    def from_blocks(cls, blocks: Iterable[CellCounts]) -> Self:
        """Count blocks of cells one after the other; memory does not grow with the number of cells."""
        total: Self | None = None
        for block in blocks:
            part = cls.from_cells(block)
            total = part if total is None else total + part
        if total is None:
            raise ValueError("no cells to count")
        return total

    def __add__(self, other: Self) -> Self:
        """Merge the statistics of disjoint sets of cells."""
        return type(self)(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def take(self, genes: NDArray[np.integer]) -> Self:
        """Return the statistics of the given genes only (a sub-vocabulary)."""
        kept = {f.name: getattr(self, f.name)[genes] for f in fields(self) if f.name != "n_cells"}
        return type(self)(n_cells=self.n_cells, **kept)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return int(self.sum_cp10k.size)

    @property
    def entropy(self) -> NDArray[np.float64]:
        """``(n_genes,)`` Shannon entropy over cells in nats: H_g = ln S_g - Q_g / S_g; NaN-free, 0 if never seen.

        p(c|g) = x_cg / S_g on CP10K values: a gene spread evenly over N cells has H = ln N, a gene of one cell 0
        (methods: entropy across cells, reading 1; the published formula is not available, our decision).
        """
        is_seen = self.sum_cp10k > 0
        total = np.where(is_seen, self.sum_cp10k, 1.0)
        entropy = np.where(is_seen, np.log(total) - self.sum_xlogx / total, 0.0)
        return np.maximum(entropy, 0.0)

    @property
    def normalised_entropy(self) -> NDArray[np.float64]:
        """``(n_genes,)`` H_g / ln N in [0, 1]; 1 (housekeeping-like, least informative) for genes never seen."""
        if self.n_cells < 2:
            return np.ones(self.n_genes)
        normalised = np.clip(self.entropy / np.log(self.n_cells), 0.0, 1.0)
        return np.where(self.sum_cp10k > 0, normalised, 1.0)

    @property
    def mean(self) -> NDArray[np.float64]:
        """``(n_genes,)`` mean CP10K over cells."""
        return self.sum_cp10k / max(self.n_cells, 1)

    @property
    def detection(self) -> NDArray[np.float64]:
        """``(n_genes,)`` share of cells with at least one count."""
        return self.n_detected / max(self.n_cells, 1)

    def log_mean_profile(self, pseudo_count: float = 0.5) -> NDArray[np.float64]:
        """``(n_genes,)`` log of the mean share of each gene among a cell's UMIs; sums to one over genes.

        Parameters
        ----------
        pseudo_count
            UMIs added to every gene, so that a gene the corpus never saw keeps a finite rate.
        """
        # the mean of shares weighs every cell alike; the pseudo-count is brought to the same unit
        mean_depth = self.sum_counts.sum() / max(self.n_cells, 1)
        profile = self.mean + CP10K * pseudo_count / max(self.n_cells * mean_depth, 1.0)
        return np.log(profile / profile.sum())

    def save(self, path: Path) -> None:
        """Write to ``.npz`` (no pickle)."""
        arrays: dict[str, Any] = {f.name: np.asarray(getattr(self, f.name)) for f in fields(self)}
        np.savez_compressed(path, **arrays)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read from ``.npz``; BundleError if fields are missing or differ in length."""
        names = {f.name for f in fields(cls)}
        try:
            with np.load(path, allow_pickle=False) as archive:
                values = {name: archive[name] for name in archive.files}
        # NumPy raises each of these for some kind of damage, ValueError also for a pickle
        except (OSError, EOFError, ValueError, AttributeError, zipfile.BadZipFile) as error:
            raise BundleError(
                f"{path.name} is damaged ({str(error).splitlines()[0][:120]})",
                expected="an .npz file of plain arrays",
                fix="fetch the bundle again",
            ) from error
        if set(values) != names:
            raise BundleError(
                f"{path.name} holds {sorted(values)}",
                expected=f"{sorted(names)}",
                fix="the bundle was written by another version or damaged; fetch it again",
            )
        n_cells = int(values.pop("n_cells"))
        if len({array.shape for array in values.values()}) != 1:
            raise BundleError(
                f"the arrays of {path.name} differ in length", expected="one value per gene", fix="fetch it again"
            )
        return cls(n_cells=n_cells, **values)


def _sums(genes: NDArray[np.integer], values: NDArray[Any], n_genes: int) -> NDArray[np.float64]:
    """Sum values by gene in float64."""
    return np.bincount(genes, weights=values, minlength=n_genes).astype(np.float64)
