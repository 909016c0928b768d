"""The dataclasses and protocols that several stages share.

Nothing here imports torch when it runs: ``import scdiva`` and ``scdiva --help`` stay light. Dataclasses are frozen and
slotted; they are validated where they are built and trusted afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class CellCounts:
    """Raw counts of some cells, in vocabulary order.

    Parameters
    ----------
    counts
        CSR ``(n_cells, n_genes)``, int32 raw counts, sorted indices, no explicit zeros; column g is vocabulary gene g.
    library_size
        ``(n_cells,)`` float64: the cell's total over *all* genes of its file, before alignment. CP10K and depth use
        it, so that genes outside the vocabulary still count towards the depth.
    cell_index
        ``(n_cells,)`` int64: the position of each cell in the source or corpus it was read from.
    source_of_cell
        ``(n_cells,)`` int32: which row of ``is_measured`` belongs to the cell.
    is_measured
        ``(n_sources, n_genes)`` bool: the genes that each source file has a column for. An unmeasured gene is
        unknown, not zero.
    condition
        ``(n_cells, n_fields)`` int32: what is known of each cell's cell type, tissue and so on, as codes of the
        model's condition fields; 0 is unknown, code c the (c - 1)th label of the field. No fields where none are used.
    """

    counts: sp.csr_matrix
    library_size: NDArray[np.float64]
    cell_index: NDArray[np.int64]
    source_of_cell: NDArray[np.int32]
    is_measured: NDArray[np.bool_]
    condition: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int32))

    def __post_init__(self) -> None:
        """Give cells without condition fields the shape that belongs to it."""
        if self.condition.shape[1] == 0 and self.condition.shape[0] != self.counts.shape[0]:
            object.__setattr__(self, "condition", np.zeros((self.counts.shape[0], 0), dtype=np.int32))

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.counts.shape[0])

    @property
    def n_genes(self) -> int:
        """Number of vocabulary genes (specials not counted)."""
        return int(self.counts.shape[1])

    def take(self, rows: NDArray[np.integer]) -> CellCounts:
        """Return the given rows, in the given order."""
        return CellCounts(
            counts=self.counts[rows],
            library_size=self.library_size[rows],
            cell_index=self.cell_index[rows],
            source_of_cell=self.source_of_cell[rows],
            is_measured=self.is_measured,
            condition=self.condition[rows],
        )

    def with_genes(self, is_kept: NDArray[np.bool_]) -> CellCounts:
        """Return the cells as if only some genes had been measured; the rest is unknown, and in no cell's total.

        Cells of two files compare only over genes that both measure: what a model says of a cell depends on which
        genes it is given.
        """
        counts = sp.csr_matrix(self.counts.multiply(is_kept[None, :]), dtype=self.counts.dtype)
        counts.eliminate_zeros()
        counts.sort_indices()
        return CellCounts(
            counts=counts,
            library_size=np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(),
            cell_index=self.cell_index,
            source_of_cell=self.source_of_cell,
            is_measured=self.is_measured & is_kept,
            condition=self.condition,
        )


def joined(one: CellCounts, other: CellCounts) -> CellCounts:
    """Return the cells of both, one after the other; each keeps what its file measured.

    Parameters
    ----------
    one, other
        Over the same vocabulary, with the same condition fields.
    """
    return CellCounts(
        counts=sp.csr_matrix(sp.vstack([one.counts, other.counts], format="csr")),
        library_size=np.concatenate([one.library_size, other.library_size]),
        cell_index=np.concatenate([one.cell_index, other.cell_index]),
        source_of_cell=np.concatenate([one.source_of_cell, other.source_of_cell + np.int32(one.is_measured.shape[0])]),
        is_measured=np.concatenate([one.is_measured, other.is_measured]),
        condition=np.concatenate([one.condition, other.condition]),
    )


@runtime_checkable
class CellCollection(Protocol):
    """Cells that can be read by position: one source, or a corpus of several."""

    def __len__(self) -> int:
        """Return the number of cells."""
        ...

    def read(self, indices: NDArray[np.integer]) -> CellCounts:
        """Read the given cells, in the given order."""
        ...

    def describe(self, indices: Sequence[int]) -> str:
        """Name the given cells for a human: file and row or barcode."""
        ...


@dataclass(frozen=True, slots=True)
class LossOutput:
    """What an objective returns for one minibatch.

    Parameters
    ----------
    loss
        Scalar tensor with gradient.
    terms
        Named, detached scalar tensors; the loop logs them and averages them over cells.
    n_cells
        Number of cells that the means run over.
    n_tokens
        Tokens that went through the trunk; 0 where there is none.
    n_flops
        Floating-point operations of the trunk's matrix products, forward only; 0 where it is not counted.
    """

    loss: torch.Tensor
    terms: Mapping[str, torch.Tensor] = field(default_factory=dict)
    n_cells: int = 1
    n_tokens: int = 0
    n_flops: int = 0


@runtime_checkable
class LatentPrior(Protocol):
    """What draws z for cells of given conditions: a Gaussian mixture, or a latent diffusion."""

    @property
    def view_share(self) -> float:
        """Share of a cell's molecules that its z stands for: 1 where z is of whole cells."""
        ...

    def sample(
        self, condition: NDArray[np.integer], sizes: NDArray[np.integer], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Draw z, ``(n_cells, Z)`` float32.

        Parameters
        ----------
        condition
            ``(n_cells, n_fields)`` codes; 0 is any.
        sizes
            ``(n_cells, 2)`` UMIs and genes that the cells are to have.
        rng
            Source of randomness.
        """
        ...


@runtime_checkable
class LatentCodec(Protocol):
    """What turns cells into z and z into expected profiles: what a latent diffusion draws the z of."""

    @property
    def n_latent(self) -> int:
        """Z, dimensions of z."""
        ...

    @property
    def view_share(self) -> float:
        """Share of a cell's molecules that z is to stand for: 1 where z is of whole cells."""
        ...

    def encode(self, cells: CellCounts) -> NDArray[np.float32]:
        """Return z, ``(n_cells, Z)`` float32, without randomness; each row depends on that cell alone."""
        ...

    def expected_share(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the expected share of each gene among a cell's UMIs, ``(n_cells, n_genes)``; rows sum to 1."""
        ...

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write it as a bundle."""
        ...

    def to(self, device: str) -> Self:
        """Move the weights."""
        ...

    def weights_hash(self) -> str:
        """Fingerprint the weights."""
        ...


class Inputs(Protocol):
    """What ``Objective.prepare`` makes: tensors of one minibatch."""

    def to(self, device: torch.device) -> Inputs:
        """Return the same inputs on another device."""
        ...


class Objective(Protocol):
    """A loss with the model it trains: all that the training loop sees.

    An objective is a ``torch.nn.Module`` whose parameters are the ones to train. ``prepare`` runs on the CPU, in the
    loader's workers; calling the objective runs on the training device. Randomness is always passed in.

    Three methods are optional: ``gene_vectors()`` and ``learning_rate_ratios()`` for learning rates of their own
    (:func:`scdiva.training.module.parameter_groups`), and ``heldout_summary(values)``, which turns the means over the
    held-out cells (name to number) into what is logged and monitored; its result has a ``"loss"``.
    """

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> Any:
        """Turn raw counts into the tensors of one minibatch."""
        ...

    def prepare_heldout(self, cells: CellCounts, rng: np.random.Generator) -> Any:
        """Turn held-out cells into what the objective is evaluated on; often the same as :meth:`prepare`."""
        ...

    def __call__(self, inputs: Any, generator: torch.Generator) -> LossOutput:
        """Compute the loss of one minibatch."""
        ...
