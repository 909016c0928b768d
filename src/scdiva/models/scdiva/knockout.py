"""In-silico knock-out: what a native model expects of every gene with a regulator as it is, and with it taken away.

A target must not tell its own value, and neither may the genes that are asked for with it: genes fall into four folds
by their Ensembl id, a whole fold is hidden from z and from the trunk, and what is read out are the genes of that fold,
expressed or not. A regulator is taken away by hiding it, too, gene and count. Nothing else changes: the cell is told
the same depth, the same number of genes, and the same number of hidden ones, and the trunk reads the same other tokens.
The effect is the difference of the expected log share of the target among the cell's molecules, in nats:

    effect(r on g, cell) = log share of g with r - log share of g without r

Positive: the model expects more of g because of r. Two read-outs:

- "profile": the profile decoder at z. z pools the visible genes, so that this is what the anchor makes of r; cheap.
- "value": the mean of the value head, which is the profile decoder's times what the trunk adds at [QUERY]; the trunk
  runs once for every cell, regulator and fold.

(All our decisions; perturbing single genes in silico is that of Theodoris et al., Nature 2023, who look at embeddings.)

Shape letters: B rows that are read (a cell, with or without a regulator), R regulators, T targets, F genes of one fold,
Z latent, E gene embedding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.config import NativeConfig
from scdiva.diffusion import Masks
from scdiva.models.scdiva.attention import is_among_best, only_tokens, set_trunk
from scdiva.models.scdiva.imputation import require_profile_decoder
from scdiva.models.scdiva.model import ScDiVa
from scdiva.models.scdiva.native import NativeNetwork
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.models.scdiva.reconstruction import require_native_heads
from scdiva.types import CellCounts

ReadOut = Literal["profile", "value"]

N_FOLDS = 4
"""A quarter of the genes is hidden at a time: every cell is read four times."""
_BLOCK = 64
"""Rows that the network reads at a time; no influence on the result."""


@dataclass(frozen=True, slots=True, eq=False)
class KnockoutSums:
    """Effects of regulators on targets, summed over the cells that express the regulator.

    Parameters
    ----------
    total_RT, square_RT
        float64 sums of effects and of their squares.
    n_cells_R
        int64 cells of each regulator.
    """

    total_RT: NDArray[np.float64]
    square_RT: NDArray[np.float64]
    n_cells_R: NDArray[np.int64]

    @property
    def mean_RT(self) -> NDArray[np.float64]:
        """Mean effect over cells; NaN for a regulator without cells."""
        return self.total_RT / np.where(self.n_cells_R > 0, self.n_cells_R, np.nan)[:, None]

    @property
    def standard_error_RT(self) -> NDArray[np.float64]:
        """Standard error of the mean over cells; NaN where there are fewer than two."""
        n_R1 = np.where(self.n_cells_R > 1, self.n_cells_R, np.nan)[:, None]
        variance = np.maximum(self.square_RT / n_R1 - np.square(self.mean_RT), 0.0) * n_R1 / (n_R1 - 1)
        return np.asarray(np.sqrt(variance / n_R1))


@torch.inference_mode()
def knockout_sums(
    model: ScDiVa,
    cells: CellCounts,
    regulators: NDArray[np.int64],
    targets: NDArray[np.int64],
    *,
    read_out: ReadOut = "profile",
    max_tokens: int | None = None,
    max_cells: int | None = None,
    on_cells: Callable[[int], None] | None = None,
) -> KnockoutSums:
    """Take every regulator away from the cells that express it, one at a time, and sum what changes.

    Parameters
    ----------
    model
        A native model.
    cells
        Raw counts in the order of its vocabulary; conditions are not told.
    regulators, targets
        ``(R,)`` and ``(T,)`` gene indices.
    read_out
        "profile" or "value".
    max_tokens
        Genes that the trunk reads of each cell, the best-ranked, besides the regulators; None: all ("value" only).
    max_cells
        Cells of each regulator, chosen by their content; None: all that express it.
    on_cells
        Called with the number of cells done, for progress.

    Returns
    -------
    KnockoutSums

    Raises
    ------
    UnsupportedError
        The model is not native; for "value", it has no trunk that reads sets.
    UntrainedHeadError
        The heads that are read were never trained.
    """
    network = model.native("in-silico knock-out")
    heads = tuple(model.details.get("trained_heads", ()))
    require_profile_decoder(heads, model.name)
    if read_out == "value":
        set_trunk(model, "in-silico knock-out through the value head")
        require_native_heads(heads, model.name)
    folds = np.array([zlib.crc32(str(name).encode()) % N_FOLDS for name in model.vocabulary.ensembl_id])
    row_of_gene = np.full(cells.n_genes, -1, dtype=np.int64)
    row_of_gene[regulators] = np.arange(regulators.size)
    counts = cells.counts
    # every (cell, regulator that it expresses), and of each regulator no more than wanted
    stored_row = row_of_gene[counts.indices]
    cell_of_pair = np.repeat(np.arange(cells.n_cells), np.diff(counts.indptr))[stored_row >= 0]
    row_of_pair = stored_row[stored_row >= 0]
    if max_cells is not None:
        kept = _first_of_each(row_of_pair, content_order(cells)[cell_of_pair], max_cells)
        cell_of_pair, row_of_pair = cell_of_pair[kept], row_of_pair[kept]
    shape = (regulators.size, targets.size)
    total, square = np.zeros(shape), np.zeros(shape)
    network_reader = _Reader(model, network, read_out, max_tokens, regulators, targets)
    for done, cell in enumerate(np.unique(cell_of_pair).tolist(), start=1):
        rows = row_of_pair[cell_of_pair == cell]
        one = cells.take(np.array([cell]))
        for fold in range(N_FOLDS):
            at_T = np.flatnonzero(folds[targets] == fold)
            if not at_T.size:
                continue
            effect = network_reader.effects(one, folds == fold, regulators[rows])[:, at_T]
            at = np.ix_(rows, at_T)
            total[at] += effect
            square[at] += np.square(effect)
        if on_cells is not None:
            on_cells(done)
    return KnockoutSums(total, square, np.bincount(row_of_pair, minlength=regulators.size))


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    """What a network expects of the targets in one cell, without this or that gene."""

    model: ScDiVa
    network: NativeNetwork
    read_out: ReadOut
    max_tokens: int | None
    regulators: NDArray[np.int64]
    targets: NDArray[np.int64]

    def effects(self, cell: CellCounts, is_hidden_G: NDArray[np.bool_], away: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the effects of some genes that the cell expresses on all targets, ``(len(away), T)``.

        Two rows have the whole fold hidden and all genes that may be taken away left; they differ in how many hidden
        genes they are told. A gene outside the fold is taken away in its own row. A gene of the fold is hidden with it
        anyway: its own row shows it.
        """
        genes = cell.counts.indices
        in_fold = is_hidden_G[genes]
        is_own_AN = genes == away[:, None]
        is_of_fold_A = is_hidden_G[away]
        hidden_BN = np.concatenate([[in_fold, in_fold], in_fold ^ is_own_AN])
        n_hidden = int(in_fold.sum())
        n_hidden_B = np.array([n_hidden, n_hidden - 1, *np.where(is_of_fold_A, n_hidden - 1, n_hidden)])
        said = [
            self._log_shares(
                cell,
                hidden_BN[start : start + _BLOCK],
                np.maximum(n_hidden_B[start : start + _BLOCK], 0),
                float(cell.counts.data[~in_fold].sum()),
            )
            for start in range(0, len(hidden_BN), _BLOCK)
        ]
        said_BT = np.concatenate(said)
        whole_T, less_T, own_AT = said_BT[0], said_BT[1], said_BT[2:]
        return np.where(is_of_fold_A[:, None], own_AT - less_T, whole_T - own_AT)

    def _log_shares(
        self, cell: CellCounts, hidden_BN: NDArray[np.bool_], n_hidden_B: NDArray[np.int64], depth: float
    ) -> NDArray[np.float64]:
        """Log shares of the targets among their own sum, ``(B, T)``, with some of the cell's genes hidden in each row.

        A gene that comes or goes tells by itself alone, and not by the depth of what z pools: that is told as given.
        """
        network, model = self.network, self.model
        assert isinstance(model.config, NativeConfig)
        tokeniser = replace(tokeniser_of(model.config, model.statistics), max_tokens=cell.n_genes)
        rows = cell.take(np.zeros(len(hidden_BN), dtype=np.int64))
        rows = replace(rows, condition=np.zeros((rows.n_cells, model.labels.n_fields), dtype=np.int32))
        is_hidden = hidden_BN.ravel()
        # the generator is used by orders at random only
        masked = tokeniser.corrupt(rows, Masks(is_hidden, is_hidden, n_hidden_B), np.random.default_rng(0))[0]
        masked = replace(masked, anchor_depth_B=torch.full_like(masked.anchor_depth_B, depth))
        if self.max_tokens is not None and self.read_out == "value":
            is_read = np.isin(cell.counts.indices, self.regulators) | is_among_best(cell, tokeniser, self.max_tokens)
            masked = only_tokens(masked, np.tile(is_read, len(hidden_BN))[~is_hidden])
        masked = masked.to(model.device)
        z_BZ = network.latent(masked)
        target_T = torch.from_numpy(self.targets).to(model.device)
        embedding_TE = network.anchor.gene_embedding[target_T]
        log_rate_BT = (
            F.linear(network.anchor.direction(z_BZ), embedding_TE).float() + network.anchor.log_profile[target_T]
        )
        log_share_BT = log_rate_BT - log_rate_BT.logsumexp(dim=1, keepdim=True)
        if self.read_out == "value":
            assert network.trunk is not None
            states = network.trunk(masked, z_BZ, network.anchor.gene_embedding, network.mean_log_depth)
            direction_BE = network.trunk.value_direction(states.query_BD)[:, : network.n_embedding + 1].float()
            log_share_BT = log_share_BT + F.linear(direction_BE[:, :-1], embedding_TE.float()) + direction_BE[:, -1:]
        return np.asarray(log_share_BT.double().cpu().numpy())


def content_order(cells: CellCounts) -> NDArray[np.int64]:
    """Return a place for each cell, ``(n_cells,)``: a shuffle by what is in the cells, not by where they stand."""
    counts = cells.counts
    codes = [
        zlib.crc32(
            counts.data[a:b].astype(np.int64).tobytes(), zlib.crc32(counts.indices[a:b].astype(np.int64).tobytes())
        )
        for a, b in zip(counts.indptr[:-1], counts.indptr[1:], strict=True)
    ]
    place = np.empty(cells.n_cells, dtype=np.int64)
    place[np.argsort(np.array(codes, dtype=np.int64), kind="stable")] = np.arange(cells.n_cells)
    return place


def _first_of_each(code: NDArray[np.int64], place: NDArray[np.int64], n_wanted: int) -> NDArray[np.int64]:
    """Return the positions of the first ``n_wanted`` entries of each code, by their places."""
    order = np.lexsort((place, code))
    starts = np.searchsorted(code[order], code[order])
    return np.sort(order[np.arange(code.size) - starts < n_wanted])
