"""The published token model: cells as sequences of (gene, value) tokens behind one latent token.

It is here so that published weights load strictly and the paper's ablations (arXiv 2602.03477) can be rerun. (Source:
the authors' released model and its weights.) It is not what we recommend: its latent token is pooled over the
*clean* embeddings, so that in training and in the published reconstruction the network sees a summary of the very
tokens it must predict. ``lat="visible"`` pools the visible tokens only and shows what is left without that leak.

Tokens are packed cell after cell, without padding (:class:`~scdiva.nn.Packing`); each sequence is the latent token at
position 0 and the cell's tokens at 1 to L, best-ranked first.

Shape letters: B cells, N tokens of all cells together, T tokens and latent tokens of all cells together, R chosen
tokens, V vocabulary rows, D width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.utils.checkpoint import checkpoint

from scdiva.errors import UntrainedHeadError
from scdiva.genes import FIRST_GENE_ROW, N_ROWS_AFTER_GENES
from scdiva.nn import Packing, Transformer, init_transformer
from scdiva.serialization import TokenOrder, collate, serialize

if TYPE_CHECKING:
    from scdiva.config import OfficialConfig
    from scdiva.data.statistics import GeneStatistics
    from scdiva.types import CellCounts

Lat = Literal["clean", "visible"]
"""What the latent token pools: all tokens of the cell (published, leaks), or those that the network may see."""

HEADS = ("gene", "value")
"""Heads, as a bundle's ``trained_heads`` names them; a file of fine-tuned weights may lack them."""

# rows of logits that exist at once: 2,048 rows of 41,818 genes are 0.34 GB in float32
_LOGIT_ROWS = 2048
# cells that are embedded at once: 16 sequences of 1,201 tokens keep the widest layer of the published size at 0.3 GB
_CELLS = 16


@dataclass(frozen=True, slots=True)
class OfficialTokens:
    """Cells as packed token sequences, best-ranked token first; latent tokens are not among them.

    Parameters
    ----------
    row_N
        int64 vocabulary rows (gene index + 2).
    value_N
        float32 log1p(CP10K).
    lengths
        Tokens of each cell; a cell may have none.
    """

    row_N: torch.Tensor
    value_N: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_cells(
        cls,
        cells: CellCounts,
        statistics: GeneStatistics,
        *,
        max_tokens: int,
        order: TokenOrder | str,
        rng: np.random.Generator | None = None,
    ) -> Self:
        """Serialise raw counts; parameters as in :func:`scdiva.serialization.serialize`."""
        if TokenOrder(order) is TokenOrder.RANDOM and rng is None:
            # each cell starts the same stream anew: its order must not depend on the cells beside it
            tokens = collate(
                [
                    serialize(
                        cells.take(np.array([cell])),
                        statistics,
                        max_tokens=max_tokens,
                        order=order,
                        rng=np.random.default_rng(0),
                    )
                    for cell in range(cells.n_cells)
                ]
            )
        else:
            tokens = serialize(cells, statistics, max_tokens=max_tokens, order=order, rng=rng)
        is_token = ~tokens.is_pad_BL
        return cls(
            row_N=torch.from_numpy(tokens.gene_id_BL[is_token].astype(np.int64)),
            value_N=torch.from_numpy(tokens.value_BL[is_token]),
            lengths=tuple(is_token.sum(axis=1).tolist()),
        )

    @property
    def n_cells(self) -> int:
        """Number of cells B."""
        return len(self.lengths)

    @property
    def packing(self) -> Packing:
        """The sequences, with their latent tokens."""
        return Packing(tuple(length + 1 for length in self.lengths))

    @property
    def length_B(self) -> torch.Tensor:
        """int64 tokens of each cell."""
        return torch.tensor(self.lengths, dtype=torch.int64, device=self.row_N.device)

    @property
    def cell_N(self) -> torch.Tensor:
        """int64 cell of each token."""
        return torch.repeat_interleave(torch.arange(self.n_cells, device=self.row_N.device), self.length_B)

    def to(self, device: torch.device) -> Self:
        """Return the same tokens on another device."""
        return type(self)(self.row_N.to(device), self.value_N.to(device), self.lengths)


@dataclass(frozen=True, slots=True)
class OfficialHidden:
    """Final hidden states, after the last norm.

    Parameters
    ----------
    lat_BD
        Of the latent tokens: the published embedding of a cell.
    token_ND
        Of the tokens, in their order.
    """

    lat_BD: torch.Tensor
    token_ND: torch.Tensor


class OfficialNetwork(nn.Module):
    """The published token model; 94,482,433 parameters with the default configuration and 41,813 genes.

    Parameters
    ----------
    n_genes
        Genes of the vocabulary; the token table has five more rows: 0 PAD, 1 MASK (never used), and after the genes
        PAD-FILL, BOS and EOS.
    config
        Sizes.

    Attributes
    ----------
    n_latent
        Dimensions of the embedding: the width D.
    untrained_heads
        Heads that training never touched; using one raises. Empty unless :meth:`mark_trained` says otherwise.

    Notes
    -----
    Starts at :func:`init_official` with a fixed seed. Not excluded from the softmax over genes, as published: special
    rows and the genes of visible tokens.
    """

    def __init__(self, n_genes: int, config: OfficialConfig) -> None:
        super().__init__()
        width, n_rows = config.width, FIRST_GENE_ROW + n_genes + N_ROWS_AFTER_GENES
        self.n_genes, self.n_latent = n_genes, width
        self.max_tokens, self.order = config.max_tokens, TokenOrder(config.order)
        self.untrained_heads: frozenset[str] = frozenset()
        self.gene_embedding = nn.Embedding(n_rows, width)
        self.value_encoder = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width))
        self.gene_mask = nn.Parameter(torch.zeros(width))
        self.value_mask = nn.Parameter(torch.zeros(width))
        self.input_proj = nn.Linear(width, width, bias=False)
        self.latent_encoder = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width)
        )
        self.trunk = Transformer(config.n_layers, width, config.n_heads, config.n_hidden, config.dropout)
        self.gene_head = None if config.is_head_tied else nn.Linear(width, n_rows, bias=False)
        self.value_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        init_official(self, torch.Generator().manual_seed(0))

    def mark_trained(self, heads: Collection[str]) -> None:
        """Tell which of :data:`HEADS` are trained (a bundle's ``trained_heads``; other names are ignored)."""
        self.untrained_heads = frozenset(HEADS) - frozenset(heads)

    def tokenise(
        self, cells: CellCounts, statistics: GeneStatistics, rng: np.random.Generator | None = None
    ) -> OfficialTokens:
        """Serialise cells as the configuration says; ``rng`` matters to ``order = "random"`` only."""
        return OfficialTokens.from_cells(cells, statistics, max_tokens=self.max_tokens, order=self.order, rng=rng)

    def forward(
        self, tokens: OfficialTokens, is_hidden_N: torch.Tensor | None = None, *, lat: Lat = "clean"
    ) -> OfficialHidden:
        """Compute final hidden states.

        Parameters
        ----------
        tokens
            The cells.
        is_hidden_N
            Tokens whose gene and value are replaced by the mask vectors; none if left out.
        lat
            What the latent token pools. ``"clean"``, the published one, is the mean over all tokens of the cell
            **before** they are hidden: it leaks the answer. ``"visible"`` is the mean over the tokens
            that are not hidden. A cell without any such token pools the zero vector (our decision: the published
            model has no parameter for it).
        """
        token_ND = self.gene_embedding(tokens.row_N) + self.value_encoder(tokens.value_N[:, None])
        is_pooled_N = None if lat == "clean" or is_hidden_N is None else ~is_hidden_N
        lat_BD = self.latent_encoder(_mean(token_ND, tokens, is_pooled_N))
        if is_hidden_N is not None:
            token_ND = torch.where(is_hidden_N[:, None], self.gene_mask + self.value_mask, token_ND)
        # float32 whatever the autocast: twelve layers add small terms to this stream
        both = torch.cat([lat_BD.float(), self.input_proj(token_ND).float()])
        packing, device = tokens.packing, token_ND.device
        lat_at_B = torch.tensor(packing.starts, dtype=torch.int64, device=device)
        token_at_N = torch.arange(tokens.row_N.numel(), device=device) + tokens.cell_N + 1
        at_T = torch.cat([lat_at_B, token_at_N])
        source_T = torch.empty_like(at_T)
        source_T[at_T] = torch.arange(at_T.numel(), device=device)
        position_T = torch.arange(at_T.numel(), device=device) - torch.repeat_interleave(lat_at_B, tokens.length_B + 1)
        hidden_TD = self.trunk(both[source_T], packing, position_T)
        return OfficialHidden(hidden_TD[lat_at_B], hidden_TD[token_at_N])

    def gene_logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Logits over all vocabulary rows, ``(R, V)`` float32, of chosen tokens' hidden states.

        Mind the size: 4,096 tokens of the published vocabulary are 0.7 GB. :meth:`identity_nll` needs less.

        Raises
        ------
        UntrainedHeadError
            The weights came without this head.
        """
        self._require("gene")
        weight = self.gene_embedding.weight if self.gene_head is None else self.gene_head.weight
        return F.linear(hidden_RD, weight).float()

    def identity_nll(self, hidden_RD: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        """Negative log-likelihood of genes in nats, ``(R,)`` float32, of chosen tokens' hidden states.

        The logits of 2,048 tokens at a time exist, also in the backward pass, which computes them again.

        Parameters
        ----------
        hidden_RD
            Hidden states of the tokens.
        row_R
            int64 vocabulary rows of their genes.

        Raises
        ------
        UntrainedHeadError
            The weights came without this head.
        """
        parts = [
            checkpoint(self._nll, hidden, row, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else self._nll(hidden, row)
            for hidden, row in zip(hidden_RD.split(_LOGIT_ROWS), row_R.split(_LOGIT_ROWS), strict=True)
        ]
        return torch.cat(parts)

    def _nll(self, hidden_RD: torch.Tensor, row_R: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.gene_logits(hidden_RD), row_R, reduction="none")

    def values(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        """Predicted log1p(CP10K), ``(R,)`` float32, of chosen tokens' hidden states.

        Raises
        ------
        UntrainedHeadError
            The weights came without this head.
        """
        self._require("value")
        return self.value_head(hidden_RD).squeeze(-1).float()

    @torch.no_grad()
    def embed(self, cells: CellCounts, statistics: GeneStatistics) -> torch.Tensor:
        """Embed cells: the final hidden state of the latent token, ``(n_cells, n_latent)`` float32 (our decision).

        Nothing is hidden and dropout is off, so the result is deterministic; it depends on the cell alone (up to the
        rounding of float32: each cell attends to itself only). A cell without tokens gets the model's point of no
        information.

        Parameters
        ----------
        cells
            Raw counts in vocabulary order.
        statistics
            Of the bundle: they order the tokens.
        """
        device, was_training = self.gene_mask.device, self.training
        result_BD = torch.empty((cells.n_cells, self.n_latent), device=device)
        self.eval()
        try:
            for first in range(0, cells.n_cells, _CELLS):
                rows = np.arange(first, min(first + _CELLS, cells.n_cells))
                result_BD[rows[0] : rows[-1] + 1] = self(self.tokenise(cells.take(rows), statistics).to(device)).lat_BD
        finally:
            self.train(was_training)
        return result_BD

    def _require(self, head: str) -> None:
        if head in self.untrained_heads:
            raise UntrainedHeadError(
                f"the {head} head of this model is untrained",
                expected="weights that came with this head",
                fix="convert the published pre-trained file instead, or train the model further",
            )


def _mean(token_ND: torch.Tensor, tokens: OfficialTokens, is_pooled_N: torch.Tensor | None) -> torch.Tensor:
    """Mean over the pooled tokens of each cell, ``(B, D)`` float32; zero where there are none."""
    token_ND = token_ND.float()
    length_B = n_pooled_B = tokens.length_B
    if is_pooled_N is not None:
        token_ND = token_ND * is_pooled_N[:, None]
        n_pooled_B = torch.zeros_like(length_B).index_add_(0, tokens.cell_N, is_pooled_N.long())
    # not index_add, whose order of additions on a GPU, and with it the last bit, differs from call to call
    total_BD = torch.segment_reduce(token_ND, "sum", lengths=length_B, axis=0, initial=0.0)
    return total_BD / n_pooled_B.clamp_min(1)[:, None]


@torch.no_grad()
def init_official(network: OfficialNetwork, generator: torch.Generator, std: float = 0.02) -> None:
    """Start a network: normal weights as in GPT-2 (Radford et al. 2019), zero biases and mask vectors.

    The published start is not known except that both mask vectors are zero (the published code); the rest is our
    decision.

    Parameters
    ----------
    network
        Changed in place.
    generator
        Source of all randomness.
    std
        Standard deviation of the weights; those that write to the residual stream of the trunk have less.
    """
    init_transformer(network.trunk, generator, std)
    heads = [network.value_head] if network.gene_head is None else [network.gene_head, network.value_head]
    for part in (network.gene_embedding, network.value_encoder, network.input_proj, network.latent_encoder, *heads):
        for module in part.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.zeros_(network.gene_mask)
    nn.init.zeros_(network.value_mask)
