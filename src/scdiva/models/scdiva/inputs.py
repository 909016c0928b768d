"""What the native network reads, packed cell after cell, and how counts become it.

Shape letters: B cells, N gene tokens of all cells together, M hidden genes of all cells together, G genes, C condition
fields.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.diffusion import Masks
from scdiva.serialization import TokenOrder, log1p_cp10k, token_ranks
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from scdiva.data.statistics import GeneStatistics


MAX_SCORED_SLOTS = 64
"""Hidden slots of a cell that are scored in the sequence layout: each costs a row of all genes; the mean over a random
choice of them is the mean over all, in expectation."""


class OnDevice:
    """Dataclasses of tensors that move as a whole."""

    __slots__ = ()

    def to(self, device: torch.device) -> Self:
        """Return the same on another device."""

        def moved(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(moved(item) for item in value)
            return value.to(device) if hasattr(value, "to") else value

        return type(self)(**{f.name: moved(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class PackedCells(OnDevice):
    """What the anchor reads: the detected genes of some cells, packed cell after cell.

    Parameters
    ----------
    gene_N
        int64 gene indices.
    value_N
        float32 log1p(CP10K).
    offset_B
        int64 position at which each cell starts.
    """

    gene_N: torch.Tensor
    value_N: torch.Tensor
    offset_B: torch.Tensor

    @classmethod
    def pack(cls, cells: CellCounts) -> Self:
        """Pack raw counts."""
        counts = cells.counts
        return cls(
            gene_N=torch.from_numpy(counts.indices.astype(np.int64)),
            value_N=torch.from_numpy(log1p_cp10k(cells)),
            offset_B=torch.from_numpy(counts.indptr[:-1].astype(np.int64)),
        )


@dataclass(frozen=True, slots=True)
class MaskedCells(OnDevice):
    """Cells as the network sees them at time t, and what it is asked.

    Parameters
    ----------
    anchor
        What z pools: another view of the cells, or their visible tokens.
    is_null_B
        Cells whose z is the learned null.
    anchor_depth_B, depth_B
        float32 UMIs of what z pools, and of the cell that is denoised, in genes of the vocabulary.
    n_genes_B, n_hidden_B
        int64 detected genes of the cell, and how many of them are hidden.
    condition_BC
        int64 codes of the condition fields; 0 is unknown.
    lengths
        Visible gene tokens of each cell that the trunk reads.
    gene_N, value_N, position_N
        Their genes, log1p(CP10K) (0 where hidden) and ranks in the cell.
    is_value_masked_N
        Visible genes whose value is hidden.
    slot_lengths
        Hidden slots of each cell in the sequence layout; all 0 in the set layout.
    slot_position_S
        Their ranks.
    is_depth_given_B, is_n_genes_given_B
        False where the network is not told.
    is_measured_BG
        Genes that each cell's file measures.
    is_admissible_BG
        Genes that may be among the hidden ones: measured and not visible.
    """

    anchor: PackedCells
    is_null_B: torch.Tensor
    anchor_depth_B: torch.Tensor
    depth_B: torch.Tensor
    n_genes_B: torch.Tensor
    n_hidden_B: torch.Tensor
    condition_BC: torch.Tensor
    lengths: tuple[int, ...]
    gene_N: torch.Tensor
    value_N: torch.Tensor
    position_N: torch.Tensor
    is_value_masked_N: torch.Tensor
    slot_lengths: tuple[int, ...]
    slot_position_S: torch.Tensor
    is_depth_given_B: torch.Tensor
    is_n_genes_given_B: torch.Tensor
    is_measured_BG: torch.Tensor
    is_admissible_BG: torch.Tensor

    @property
    def n_cells(self) -> int:
        """Number of cells B."""
        return len(self.lengths)


@dataclass(frozen=True, slots=True)
class Targets(OnDevice):
    """The answers to a :class:`MaskedCells`.

    Parameters
    ----------
    cell_M, gene_M, count_M, value_M
        Cell, gene, count and log1p(CP10K) of every hidden gene; in the sequence layout of a random choice of them.
    slot_M
        int64 slot of each (sequence layout; else no entries).
    token_V, cell_V, gene_V, count_V, value_V
        Position among the visible tokens, cell, gene, count and value of each token whose value alone is hidden.
    """

    cell_M: torch.Tensor
    gene_M: torch.Tensor
    count_M: torch.Tensor
    value_M: torch.Tensor
    slot_M: torch.Tensor
    token_V: torch.Tensor
    cell_V: torch.Tensor
    gene_V: torch.Tensor
    count_V: torch.Tensor
    value_V: torch.Tensor

    def values(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cell, gene, count and value of every hidden value: first of hidden genes, then of visible ones."""
        return (
            torch.cat([self.cell_M, self.cell_V]),
            torch.cat([self.gene_M, self.gene_V]),
            torch.cat([self.count_M, self.count_V]),
            torch.cat([self.value_M, self.value_V]),
        )


@dataclass(frozen=True, slots=True)
class Profile(OnDevice):
    """Counts that the profile decoder is scored on.

    Parameters
    ----------
    cell_N, gene_N, count_N
        int64 row, int64 gene, float32 count of every stored count.
    is_measured_BG
        Genes that each cell's file measures.
    """

    cell_N: torch.Tensor
    gene_N: torch.Tensor
    count_N: torch.Tensor
    is_measured_BG: torch.Tensor

    @classmethod
    def of(
        cls,
        cells: CellCounts,
        is_scored: NDArray[np.bool_] | None = None,
        is_measured_BG: torch.Tensor | None = None,
    ) -> Self:
        """Take the counts of some cells: of all, or of those that are scored."""
        counts = cells.counts
        cell, gene, count = np.repeat(np.arange(cells.n_cells), np.diff(counts.indptr)), counts.indices, counts.data
        if is_scored is not None:
            kept = is_scored[cell]
            cell, gene, count = cell[kept], gene[kept], count[kept]
        if is_measured_BG is None:
            is_measured_BG = torch.from_numpy(cells.is_measured[cells.source_of_cell])
        return cls(
            cell_N=torch.from_numpy(cell),
            gene_N=torch.from_numpy(gene.astype(np.int64)),
            count_N=torch.from_numpy(count.astype(np.float32)),
            is_measured_BG=is_measured_BG,
        )

    @property
    def n_umis_B(self) -> torch.Tensor:
        """Scored UMIs of each cell."""
        total = torch.zeros(self.is_measured_BG.shape[0], device=self.count_N.device)
        return total.index_add_(0, self.cell_N, self.count_N)


@dataclass(frozen=True, slots=True)
class Tokeniser:
    """How cells become tokens: the trunk's settings with the corpus's statistics.

    Parameters
    ----------
    statistics
        Gene statistics of the training corpus; only their entropies are used.
    max_tokens
        L, largest number of visible tokens of a cell that the trunk reads. What is cut off stays known to be visible:
        it is no candidate for a hidden gene.
    order
        Which tokens a cell keeps.
    has_positions
        Give tokens their ranks (sequence layout); else positions are 0.
    """

    statistics: GeneStatistics
    max_tokens: int
    order: TokenOrder
    has_positions: bool

    def unmasked(self, cells: CellCounts, rng: np.random.Generator) -> MaskedCells:
        """Return whole cells, nothing of them hidden, as the network reads them.

        Parameters
        ----------
        cells
            The cells; their conditions are told where they have any.
        rng
            Used by ``order = "random"`` only.
        """
        n_tokens = np.diff(cells.counts.indptr)
        nothing = np.zeros(int(n_tokens.sum()), dtype=bool)
        return self.corrupt(cells, Masks(nothing, nothing, np.zeros(n_tokens.size, dtype=np.int64)), rng)[0]

    def corrupt(
        self,
        cells: CellCounts,
        masks: Masks,
        rng: np.random.Generator,
        *,
        view: CellCounts | None = None,
        is_null: NDArray[np.bool_] | None = None,
        reads_view: NDArray[np.bool_] | None = None,
        condition_dropout: float = 0.0,
    ) -> tuple[MaskedCells, Targets]:
        """Hide genes and values of some cells.

        Parameters
        ----------
        cells
            The cells that are denoised.
        masks
            What is hidden, for each stored count of ``cells``.
        rng
            For the dropout of conditions, ``order = "random"`` and the choice of scored slots.
        view
            Another view of the same cells.
        reads_view
            Cells whose z pools ``view``; the z of the others pools their visible tokens.
        is_null
            Cells whose z is the learned null.
        condition_dropout
            Probability that each condition is left out, and, once more, that all of a cell are.
        """
        counts = cells.counts
        n_cells, n_stored = cells.n_cells, np.diff(counts.indptr).astype(np.int64)
        cell = np.repeat(np.arange(n_cells), n_stored)
        gene, count, value = counts.indices.astype(np.int64), counts.data, log1p_cp10k(cells)
        is_hidden, is_value_masked = masks.is_gene_masked_N, masks.is_value_masked_N
        rank = np.zeros(cell.size, dtype=np.int64)
        if self.has_positions:
            rank = token_ranks(cells, self.statistics, order=self.order, rng=rng)
        is_visible = ~is_hidden
        is_read = is_visible
        if np.bincount(cell[is_visible], minlength=1).max() > self.max_tokens:
            is_read = is_visible & self._is_kept(cells, cell, value, is_visible, is_value_masked, rng)
        read = np.flatnonzero(is_read)
        hidden = np.flatnonzero(is_hidden)
        slots = slot_of_hidden = np.zeros(0, dtype=np.int64)
        if self.has_positions:
            slots = _at_most(hidden, cell, self.max_tokens, n_cells, rng)
            hidden = _at_most(slots, cell, MAX_SCORED_SLOTS, n_cells, rng)
            slot_of_hidden = np.searchsorted(slots, hidden)
        asked = np.flatnonzero(is_read & is_value_masked)
        token_of_stored = np.cumsum(is_read) - 1

        is_measured = cells.is_measured[cells.source_of_cell]
        is_admissible = is_measured.copy()
        is_admissible[cell[is_visible], gene[is_visible]] = False

        is_null = np.zeros(n_cells, dtype=bool) if is_null is None else is_null
        reads_view = np.zeros(n_cells, dtype=bool) if reads_view is None else reads_view
        is_pooled = ~is_value_masked & ~(is_null | reads_view)[cell]
        anchor, anchor_depth = _anchor(cells, cell, value, is_pooled, view, reads_view & ~is_null)
        condition, is_depth_given, is_n_genes_given = _with_dropout(cells.condition, condition_dropout, rng)
        as_tensor = torch.from_numpy
        masked = MaskedCells(
            anchor=anchor,
            is_null_B=as_tensor(is_null),
            anchor_depth_B=as_tensor(anchor_depth),
            depth_B=as_tensor(_sums(count, cell, n_cells)),
            n_genes_B=as_tensor(n_stored),
            n_hidden_B=as_tensor(masks.n_hidden_B),
            condition_BC=as_tensor(condition),
            lengths=tuple(np.bincount(cell[read], minlength=n_cells).tolist()),
            gene_N=as_tensor(gene[read]),
            value_N=as_tensor(np.where(is_value_masked[read], np.float32(0), value[read])),
            position_N=as_tensor(rank[read]),
            is_value_masked_N=as_tensor(is_value_masked[read]),
            slot_lengths=tuple(np.bincount(cell[slots], minlength=n_cells).tolist()),
            slot_position_S=as_tensor(rank[slots]),
            is_depth_given_B=as_tensor(is_depth_given),
            is_n_genes_given_B=as_tensor(is_n_genes_given),
            is_measured_BG=as_tensor(is_measured),
            is_admissible_BG=as_tensor(is_admissible),
        )
        targets = Targets(
            cell_M=as_tensor(cell[hidden]),
            gene_M=as_tensor(gene[hidden]),
            count_M=as_tensor(count[hidden]),
            value_M=as_tensor(value[hidden]),
            slot_M=as_tensor(slot_of_hidden),
            token_V=as_tensor(token_of_stored[asked]),
            cell_V=as_tensor(cell[asked]),
            gene_V=as_tensor(gene[asked]),
            count_V=as_tensor(count[asked]),
            value_V=as_tensor(value[asked]),
        )
        return masked, targets

    def _is_kept(
        self,
        cells: CellCounts,
        cell: NDArray[np.int64],
        value: NDArray[np.float32],
        is_visible: NDArray[np.bool_],
        is_value_masked: NDArray[np.bool_],
        rng: np.random.Generator,
    ) -> NDArray[np.bool_]:
        """Tell the L best-ranked visible tokens of each cell; a hidden value counts as the mean of the known ones.

        Ranked by its own value, a token would give its value away by being kept.
        """
        is_known = is_visible & ~is_value_masked
        n_known = np.bincount(cell[is_known], minlength=cells.n_cells)
        total = np.bincount(cell[is_known], weights=value[is_known], minlength=cells.n_cells)
        mean = np.divide(total, n_known, out=np.ones_like(total), where=n_known > 0).astype(np.float32)
        rank = token_ranks(
            cells, self.statistics, order=self.order, rng=rng, value=np.where(is_known, value, mean[cell])
        )
        return _rank_among(rank, is_visible, cell, np.diff(cells.counts.indptr).astype(np.int64)) < self.max_tokens


def _anchor(
    cells: CellCounts,
    cell: NDArray[np.int64],
    value: NDArray[np.float32],
    is_pooled: NDArray[np.bool_],
    view: CellCounts | None,
    reads_view: NDArray[np.bool_],
) -> tuple[PackedCells, NDArray[np.float32]]:
    """Pack what z pools: visible tokens of the cells themselves, and all tokens of the other view."""
    n_cells = cells.n_cells
    cell_of, genes, values = cell[is_pooled], cells.counts.indices[is_pooled], value[is_pooled]
    depth = _sums(cells.counts.data[is_pooled], cell_of, n_cells)
    if view is not None and reads_view.any():
        view_cell = np.repeat(np.arange(n_cells), np.diff(view.counts.indptr))
        is_read = reads_view[view_cell]
        cell_of = np.concatenate([cell_of, view_cell[is_read]])
        genes = np.concatenate([genes, view.counts.indices[is_read]])
        values = np.concatenate([values, log1p_cp10k(view)[is_read]])
        order = np.argsort(cell_of, kind="stable")
        cell_of, genes, values = cell_of[order], genes[order], values[order]
        depth = depth + _sums(view.counts.data[is_read], view_cell[is_read], n_cells)
    lengths = np.bincount(cell_of, minlength=n_cells)
    packed = PackedCells(
        gene_N=torch.from_numpy(genes.astype(np.int64)),
        value_N=torch.from_numpy(values),
        offset_B=torch.from_numpy(np.cumsum(lengths) - lengths),
    )
    return packed, depth


def _at_most(
    chosen: NDArray[np.int64], cell: NDArray[np.int64], limit: int, n_cells: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Keep a random ``limit`` of the chosen stored counts of each cell, in order."""
    per_cell = np.bincount(cell[chosen], minlength=n_cells)
    if per_cell.max(initial=0) <= limit:
        return chosen
    order = np.argsort(cell[chosen] + rng.random(chosen.size), kind="stable")
    place = np.empty(chosen.size, dtype=np.int64)
    place[order] = np.arange(chosen.size) - np.repeat(np.cumsum(per_cell) - per_cell, per_cell)
    return chosen[place < limit]


def _with_dropout(
    condition: NDArray[np.int32], rate: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Leave conditions out: (labels, is the depth given, is the number of genes given)."""
    n_cells, n_fields = condition.shape
    if rate == 0:
        return condition.astype(np.int64), np.ones(n_cells, dtype=bool), np.ones(n_cells, dtype=bool)
    is_given = (rng.random((n_cells, n_fields + 2)) >= rate) & (rng.random((n_cells, 1)) >= rate)
    return np.where(is_given[:, :n_fields], condition, 0).astype(np.int64), is_given[:, -2], is_given[:, -1]


def _sums(count: NDArray[np.integer], cell: NDArray[np.int64], n_cells: int) -> NDArray[np.float32]:
    return np.bincount(cell, weights=count, minlength=n_cells).astype(np.float32)


def _rank_among(
    rank: NDArray[np.int64], is_member: NDArray[np.bool_], cell: NDArray[np.int64], n_stored: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rank of each stored count among the members of its cell (of others: the number of members before them)."""
    starts = np.cumsum(n_stored) - n_stored
    at = starts[cell] + rank  # each cell's counts, best-ranked first
    ordered = np.zeros(rank.size, dtype=np.int64)
    ordered[at] = is_member
    before = np.cumsum(ordered) - ordered
    total_before_cell = np.concatenate([[0], np.cumsum(ordered)])[starts] if rank.size else starts
    return before[at] - total_before_cell[cell]
