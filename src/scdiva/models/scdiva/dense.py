"""The dense model of the first published version: a cell is one token.

The whole expression vector of a cell is projected to one token, which goes through transformer layers, to a latent
mean and log-variance, and from the mean to class logits and to reconstructed expression. It is here so that published
weights of that version load strictly; it has no masks, no diffusion and no gene tokens.

The sizes and the tensors are those of the published files (93,523,134 parameters); the forward pass is written anew
and leaves out what is wrong in the published code: attention over one token has a single weight, 1, so
it is its value and output projections, queries, keys and positions have no effect, and their weights are kept only
because the files have them; the latent is the mean, not a random sample.

Shape letters: B cells, V vocabulary rows, D width, Z latent, C classes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.errors import UntrainedHeadError
from scdiva.genes import FIRST_GENE_ROW, N_ROWS_AFTER_GENES
from scdiva.nn import Transformer, init_transformer
from scdiva.nn.transformer import Attention, Block
from scdiva.serialization import log1p_cp10k

if TYPE_CHECKING:
    from scdiva.config import DenseConfig
    from scdiva.data.statistics import GeneStatistics
    from scdiva.types import CellCounts

HEADS = ("annotation", "batch_integration")
"""Heads, as a bundle's ``trained_heads`` names them; a file of fine-tuned weights may lack them."""

# cells whose dense vectors exist at once: 256 of 41,818 rows are 43 MB
_CELLS = 256


class DenseNetwork(nn.Module):
    """The dense model; 93,523,134 parameters with the default configuration and 41,813 genes.

    Parameters
    ----------
    n_genes
        Genes of the vocabulary; the input has five more columns, one per vocabulary row, which are zero for the
        special rows.
    config
        Sizes.

    Attributes
    ----------
    n_latent
        Dimensions Z of the embedding.
    untrained_heads
        Heads that training never touched; using one raises. Empty unless :meth:`mark_trained` says otherwise.

    Notes
    -----
    Starts at small random weights from a fixed seed; scdiva has no training for it.
    """

    def __init__(self, n_genes: int, config: DenseConfig) -> None:
        super().__init__()
        width, n_rows = config.width, FIRST_GENE_ROW + n_genes + N_ROWS_AFTER_GENES
        self.n_genes, self.n_rows, self.n_latent = n_genes, n_rows, config.n_latent
        self.untrained_heads: frozenset[str] = frozenset()
        self.gene_projection = nn.Linear(n_rows, width)
        # named layer_norm in the published files, but without a bias: a root-mean-square norm
        self.gene_norm = nn.RMSNorm(width, eps=1e-5)
        generator = torch.Generator().manual_seed(0)
        trunk = Transformer(config.n_layers, width, config.n_heads, config.n_hidden)
        init_transformer(trunk, generator)
        self.layers = trunk.layers  # without the final norm, which this model does not have
        self.mu = nn.Linear(width, config.n_latent)
        self.logvar = nn.Linear(width, config.n_latent)
        self.annotation_head = nn.Sequential(
            nn.Linear(config.n_latent, width), nn.GELU(), nn.Linear(width, config.n_classes)
        )
        self.batch_integration_head = nn.Sequential(
            nn.Linear(config.n_latent, width), nn.GELU(), nn.Linear(width, n_rows)
        )
        own = (self.gene_projection, self.mu, self.logvar, *self.annotation_head, *self.batch_integration_head)
        _start(own, generator)

    def mark_trained(self, heads: Collection[str]) -> None:
        """Tell which of :data:`HEADS` are trained (a bundle's ``trained_heads``; other names are ignored)."""
        self.untrained_heads = frozenset(HEADS) - frozenset(heads)

    def forward(self, value_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode cells.

        Parameters
        ----------
        value_BV
            log1p(CP10K), one column per vocabulary row.

        Returns
        -------
        mu_BZ, logvar_BZ
            Mean and log-variance of the latent; the mean is the embedding.
        """
        x_BD = self.gene_norm(self.gene_projection(value_BV))
        for layer in self.layers:
            assert isinstance(layer, Block)
            x_BD = x_BD + _attend_to_itself(layer.attention, layer.norm1(x_BD))
            x_BD = x_BD + layer.mlp(layer.norm2(x_BD))
        return self.mu(x_BD), self.logvar(x_BD)

    def annotation_logits(self, mu_BZ: torch.Tensor) -> torch.Tensor:
        """Class logits ``(B, C)``; the names of the published classes are not known.

        Raises
        ------
        UntrainedHeadError
            The weights came without this head.
        """
        self._require("annotation")
        return self.annotation_head(mu_BZ)

    def reconstruct(self, mu_BZ: torch.Tensor) -> torch.Tensor:
        """Reconstructed expression ``(B, V)``, one column per vocabulary row.

        Raises
        ------
        UntrainedHeadError
            The weights came without this head.
        """
        self._require("batch_integration")
        return self.batch_integration_head(mu_BZ)

    @torch.no_grad()
    def embed(self, cells: CellCounts, statistics: GeneStatistics) -> torch.Tensor:
        """Embed cells: the latent mean, ``(n_cells, n_latent)`` float32; deterministic, each cell for itself.

        Parameters
        ----------
        cells
            Raw counts in vocabulary order.
        statistics
            Not used: this model has no order of tokens.
        """
        device, was_training = self.mu.weight.device, self.training
        counts, value = cells.counts, log1p_cp10k(cells)
        result_BZ = torch.empty((cells.n_cells, self.n_latent), device=device)
        self.eval()
        try:
            for first in range(0, cells.n_cells, _CELLS):
                last = min(first + _CELLS, cells.n_cells)
                stored = slice(counts.indptr[first], counts.indptr[last])
                dense_BV = np.zeros((last - first, self.n_rows), dtype=np.float32)
                row = np.repeat(np.arange(last - first), np.diff(counts.indptr[first : last + 1]))
                dense_BV[row, counts.indices[stored] + FIRST_GENE_ROW] = value[stored]
                result_BZ[first:last] = self(torch.from_numpy(dense_BV).to(device))[0]
        finally:
            self.train(was_training)
        return result_BZ

    def _require(self, head: str) -> None:
        if head in self.untrained_heads:
            raise UntrainedHeadError(
                f"the {head} head of this model is untrained",
                expected="weights that came with this head",
                fix="convert a file that has it",
            )


def _attend_to_itself(attention: Attention, x_BD: torch.Tensor) -> torch.Tensor:
    """Attention over one token: its only weight is 1, which leaves the value and output projections."""
    value_weight = attention.qkv.weight[2 * x_BD.shape[1] :]
    return attention.out(F.linear(x_BD, value_weight))


@torch.no_grad()
def _start(linears: Iterable[nn.Module], generator: torch.Generator, std: float = 0.02) -> None:
    """Start linear layers as in GPT-2 (Radford et al. 2019), with zero biases (our decision)."""
    for linear in linears:
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=std, generator=generator)
            nn.init.zeros_(linear.bias)
