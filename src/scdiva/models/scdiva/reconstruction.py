"""What native and published models say of hidden tokens (task ``reconstruct``); nothing is trained.

In the set layout all hidden genes of a cell share one distribution, and what is said is said of the cell. In sequences
(published model, and the ordering ablation of the native one) each hidden token has a place, and places tell something:
a token between two others lies between their scores.

Shape letters: B cells, N tokens of all cells together, M hidden tokens of all cells together, H hidden tokens of one
cell, G genes, V vocabulary rows, E gene embedding, X any pairs of cell and gene.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.data.statistics import CP10K, GeneStatistics
from scdiva.diffusion import Masks
from scdiva.errors import UntrainedHeadError
from scdiva.genes import FIRST_GENE_ROW
from scdiva.losses import inclusion_shift, ztnb_expected_log1p, ztnb_nll
from scdiva.models.base import HiddenPlaces
from scdiva.models.scdiva.inputs import MaskedCells, Tokeniser
from scdiva.models.scdiva.native import DenoiserOutput, NativeNetwork
from scdiva.models.scdiva.official import Lat, OfficialNetwork
from scdiva.types import CellCounts

_LogitsOf = Callable[[int, slice], torch.Tensor]
"""From a cell, and where its hidden tokens are, to the logits of its places."""

# 16,384 rows of 128 dimensions are 8 MB in float32
_VALUES = 16_384

N_LIKELIEST = 5
"""How many of the most probable genes of a cell are told."""
NATIVE_HEADS = ("identity", "value")
"""Heads that reconstruction needs, as a native bundle's ``trained_heads`` names them."""


@dataclass(frozen=True, slots=True)
class NativeHidden:
    """What a native model says of the hidden genes of some cells (set layout).

    Parameters
    ----------
    network
        The network.
    output
        What it said of the cells.
    direction_BE
        What its trunk says of hidden values, from the state of [QUERY]; None without a trunk.
    scale_B
        float32 CP10K of one UMI of each cell.
    has_likelihood
        Whether its values were trained as counts.
    """

    network: NativeNetwork
    output: DenoiserOutput
    direction_BE: torch.Tensor | None
    scale_B: torch.Tensor
    has_likelihood: bool

    @property
    def log_odds(self) -> NDArray[np.float32]:
        """Log-odds of each gene to be hidden, ``(n_cells, n_genes)``."""
        return np.asarray(self.output.gene_logit_BG.float().cpu())

    @torch.inference_mode()
    def expected_values(self, cell: NDArray[np.int64], gene: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return expected log1p(CP10K), given detection."""
        found = np.empty(cell.size, dtype=np.float32)
        for rows in _chunks(cell.size):
            cell_X, gene_X = self._at(cell[rows], gene[rows])
            found[rows] = _expected(*self._likelihood(cell_X, gene_X), self.scale_B[cell_X])
        return found

    @torch.inference_mode()
    def value_nll(
        self, cell: NDArray[np.int64], gene: NDArray[np.int64], count: NDArray[np.int64]
    ) -> NDArray[np.float32] | None:
        """Return the NLL of counts in nats; None if values were trained as squared errors."""
        if not self.has_likelihood:
            return None
        found = np.empty(cell.size, dtype=np.float32)
        for rows in _chunks(cell.size):
            found[rows] = _count_nll(*self._likelihood(*self._at(cell[rows], gene[rows])), count[rows])
        return found

    def _likelihood(self, cell_X: torch.Tensor, gene_X: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-mean and log inverse dispersion."""
        direction = None if self.direction_BE is None else self.direction_BE[cell_X]
        log_mean_X = self.network.log_mean(self.output, cell_X, gene_X, direction)
        return log_mean_X, self.network.log_dispersion(self.output, cell_X, gene_X, direction)

    def _at(self, cell: NDArray[np.int64], gene: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        device = self.scale_B.device
        return torch.from_numpy(cell).to(device), torch.from_numpy(gene).to(device)


def require_native_heads(trained_heads: tuple[str, ...], name: str) -> None:
    """Raise UntrainedHeadError if a native model's identity or value head is untrained."""
    missing = [head for head in NATIVE_HEADS if head not in trained_heads]
    if missing:
        raise UntrainedHeadError(
            f"the {' and the '.join(missing)} head of {name} {'are' if len(missing) > 1 else 'is'} untrained",
            expected="a model trained to predict hidden genes and values",
            fix="use scdiva-blood-tiny, or train with objective.identity_weight and objective.value_weight above 0",
        )


@torch.inference_mode()
def predict_hidden_native(
    network: NativeNetwork,
    tokeniser: Tokeniser,
    cells: CellCounts,
    is_hidden: NDArray[np.bool_],
    *,
    has_likelihood: bool,
) -> NativeHidden | HiddenPlaces:
    """Say what is hidden; z pools visible tokens only.

    Parameters
    ----------
    network, tokeniser
        The model.
    cells
        Raw counts; with positions at most L per cell, so that every hidden token has a slot.
    is_hidden
        ``(nnz,)`` hidden stored counts.
    has_likelihood
        Whether its values were trained as counts (``value_likelihood = "ztnb"``).
    """
    device = network.null_latent.device
    masks = Masks(is_hidden, is_hidden, _sums_per_cell(cells, is_hidden))
    # the generator chooses which slots are scored in training; all of them are read here
    masked = tokeniser.corrupt(cells, masks, np.random.default_rng(0))[0].to(device)
    output = network(masked)
    scale_B = torch.from_numpy((CP10K / np.maximum(cells.library_size, 1.0)).astype(np.float32)).to(device)
    if tokeniser.has_positions:
        return _native_places(network, masked, output, cells, is_hidden, scale_B, has_likelihood)
    direction = None
    if network.trunk is not None and output.states is not None:
        direction = network.trunk.value_direction(output.states.query_BD)
    return NativeHidden(network, output, direction, scale_B, has_likelihood)


def _native_places(
    network: NativeNetwork,
    masked: MaskedCells,
    output: DenoiserOutput,
    cells: CellCounts,
    is_hidden: NDArray[np.bool_],
    scale_B: torch.Tensor,
    has_likelihood: bool,
) -> HiddenPlaces:
    """As of the set layout, with what each slot's state adds to identity and value."""
    trunk, states = network.trunk, output.states
    assert trunk is not None
    assert states is not None
    if sum(masked.slot_lengths) != int(is_hidden.sum()):
        raise ValueError(f"{int(is_hidden.sum())} hidden tokens, {sum(masked.slot_lengths)} slots")
    shift_B = inclusion_shift(output.gene_logit_BG, masked.is_admissible_BG, masked.n_hidden_B)
    identity_ME = trunk.query_direction(states.slot_SD)
    value_ME = trunk.value_direction(states.slot_SD)
    cell_M = torch.from_numpy(_cell_of_stored(cells)[is_hidden]).to(scale_B.device)

    def logits_of(cell: int, rows: slice) -> torch.Tensor:
        base_G = F.logsigmoid(output.gene_logit_BG[cell] + shift_B[cell])
        return base_G + F.linear(identity_ME[rows], network.anchor.gene_embedding).float()

    def likelihood(gene: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        gene_M = torch.from_numpy(gene).to(scale_B.device)
        where = (output, cell_M, gene_M, value_ME)
        return network.log_mean(*where), network.log_dispersion(*where)

    found = _Places.choose(logits_of, cells, is_hidden, np.asarray(masked.is_admissible_BG.cpu()), has_specials=False)
    of_truth = likelihood(cells.counts.indices[is_hidden].astype(np.int64))
    return HiddenPlaces(
        best=found.best,
        distinct=found.distinct,
        distinct_value=_expected(*likelihood(found.distinct), scale_B[cell_M]),
        value=_expected(*of_truth, scale_B[cell_M]),
        identity_nll=found.nll,
        value_nll=_count_nll(*of_truth, cells.counts.data[is_hidden]) if has_likelihood else None,
        rank=found.rank,
        likeliest=found.likeliest,
        saw_answer=False,
    )


@torch.inference_mode()
def predict_hidden_official(
    network: OfficialNetwork, statistics: GeneStatistics, cells: CellCounts, is_hidden: NDArray[np.bool_], *, lat: Lat
) -> HiddenPlaces:
    """Say what is hidden, as the published model does: the values without being told which gene they are of.

    Parameters
    ----------
    network, statistics
        The model.
    cells
        Raw counts, at most L per cell.
    is_hidden
        ``(nnz,)`` hidden stored counts.
    lat
        "clean", as published: the latent token pools the hidden tokens, too. "visible": it does not.
    """
    device = network.gene_mask.device
    tokens = network.tokenise(cells, statistics)
    if tokens.row_N.numel() != is_hidden.size:
        raise ValueError(f"{is_hidden.size} stored counts, {tokens.row_N.numel()} tokens: cut the cells first")
    # tokens are in the order of their ranks, stored counts in that of the genes; each gene comes once per cell
    token_of_stored = np.lexsort((tokens.row_N.numpy(), tokens.cell_N.numpy()))
    is_hidden_N = np.empty(is_hidden.size, dtype=bool)
    is_hidden_N[token_of_stored] = is_hidden
    states = network(tokens.to(device), torch.from_numpy(is_hidden_N).to(device), lat=lat)
    hidden_MD = states.token_ND[torch.from_numpy(token_of_stored[is_hidden]).to(device)]
    is_admissible_BG = cells.is_measured[cells.source_of_cell]
    cell, gene = _cell_of_stored(cells), cells.counts.indices
    is_admissible_BG[cell[~is_hidden], gene[~is_hidden]] = False

    def logits_of(cell: int, rows: slice) -> torch.Tensor:
        return network.gene_logits(hidden_MD[rows])

    found = _Places.choose(logits_of, cells, is_hidden, is_admissible_BG, has_specials=True)
    value = np.asarray(network.values(hidden_MD).cpu())
    return HiddenPlaces(
        best=found.best,
        distinct=found.distinct,
        distinct_value=value,
        value=value,
        identity_nll=found.nll,
        value_nll=None,
        rank=found.rank,
        likeliest=found.likeliest,
        saw_answer=lat == "clean",
    )


@dataclass(frozen=True, slots=True)
class _Places:
    """Choices of genes for hidden places; fields as of :class:`~scdiva.models.base.HiddenPlaces`."""

    best: NDArray[np.int64]
    distinct: NDArray[np.int64]
    nll: NDArray[np.float32]
    rank: NDArray[np.int64]
    likeliest: NDArray[np.int64]

    @classmethod
    def choose(
        cls, logits_of: _LogitsOf, cells: CellCounts, is_hidden: NDArray[np.bool_], is_admissible_BG: NDArray[np.bool_],
        *, has_specials: bool,
    ) -> _Places:  # fmt: skip
        """Choose, cell after cell: the logits of one cell's places are all that exists at a time.

        With specials (the published model) the softmax runs over all rows, those of special tokens and visible genes
        included, as published; else over admissible genes.
        """
        gene_M = cells.counts.indices[is_hidden].astype(np.int64)
        found = cls(
            best=np.empty(gene_M.size, dtype=np.int64),
            distinct=np.empty(gene_M.size, dtype=np.int64),
            nll=np.empty(gene_M.size, dtype=np.float32),
            rank=np.empty(gene_M.size, dtype=np.int64),
            likeliest=np.full((cells.n_cells, N_LIKELIEST), -1, dtype=np.int64),
        )
        first = FIRST_GENE_ROW if has_specials else 0
        for cell, rows in _rows_per_cell(cells, is_hidden):
            is_admissible = torch.from_numpy(is_admissible_BG[cell])
            logits = logits_of(cell, rows).float().cpu()
            if not has_specials:
                logits = logits.masked_fill(~is_admissible, float("-inf"))
            log_p = torch.log_softmax(logits, dim=1)
            truth = torch.from_numpy(gene_M[rows]) + first
            own = log_p.gather(1, truth[:, None])
            found.nll[rows] = -own.squeeze(1).numpy()
            found.rank[rows] = (log_p > own).sum(dim=1).numpy()
            n_genes = is_admissible.numel()
            best = log_p.argmax(dim=1).numpy() - first
            found.best[rows] = np.where((best >= 0) & (best < n_genes), best, -1)
            of_genes = log_p[:, first : first + n_genes].masked_fill(~is_admissible, float("-inf"))
            n_likeliest = min(N_LIKELIEST, int(is_admissible.sum()))
            over_places = torch.logsumexp(of_genes, dim=0)
            found.likeliest[cell, :n_likeliest] = over_places.topk(n_likeliest).indices.numpy()
            found.distinct[rows] = _distinct(of_genes.numpy())
        return found


def _distinct(log_p_HG: NDArray[np.float32]) -> NDArray[np.int64]:
    """Give each place a gene of its own: the surest place chooses first. Changes its argument."""
    chosen = np.empty(log_p_HG.shape[0], dtype=np.int64)
    for place in np.argsort(-log_p_HG.max(axis=1, initial=-np.inf), kind="stable"):
        chosen[place] = log_p_HG[place].argmax()
        log_p_HG[:, chosen[place]] = -np.inf
    return chosen


def _expected(log_mean_X: torch.Tensor, log_theta_X: torch.Tensor, scale_X: torch.Tensor) -> NDArray[np.float32]:
    return np.asarray(ztnb_expected_log1p(log_mean_X, log_theta_X, scale_X).cpu())


def _count_nll(log_mean_X: torch.Tensor, log_theta_X: torch.Tensor, count: NDArray[np.integer]) -> NDArray[np.float32]:
    count_X = torch.from_numpy(np.asarray(count, dtype=np.int64)).to(log_mean_X.device)
    return np.asarray(ztnb_nll(count_X, log_mean_X, log_theta_X).cpu())


def _chunks(n: int) -> Iterator[slice]:
    """Parts of n values: each value has a row of its own in gene-embedding space while it is computed."""
    for start in range(0, n, _VALUES):
        yield slice(start, start + _VALUES)


def _cell_of_stored(cells: CellCounts) -> NDArray[np.int64]:
    return np.repeat(np.arange(cells.n_cells), np.diff(cells.counts.indptr))


def _sums_per_cell(cells: CellCounts, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
    return np.bincount(_cell_of_stored(cells)[chosen], minlength=cells.n_cells).astype(np.int64)


def _rows_per_cell(cells: CellCounts, is_hidden: NDArray[np.bool_]) -> Iterator[tuple[int, slice]]:
    """Yield each cell that hides something, and where its hidden tokens are among all hidden ones."""
    ends = np.cumsum(_sums_per_cell(cells, is_hidden)).tolist()
    for cell, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            yield cell, slice(start, end)
