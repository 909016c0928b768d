"""The native anchor and profile decoder: the first part of the scDiVa network.

Both start at something that works without training, and every learned part is a residual that is zero at the start:

- the *anchor* pools a cell to p = sum_g v_g E_g / |v| over its detected genes (v = log1p CP10K) and returns
  z = W p + MLP(p); with the gene embeddings E at the truncated SVD of the corpus and W at the identity, z starts as the
  corpus's principal scores of the cell;
- the *profile decoder* returns log-rates (W' z + MLP'(z)) . E_g + b_g over all genes; b is the corpus's mean profile.

The design is our own (the published anchor, a mean of gene and value embeddings, cannot tell which gene has which
value).

Shape letters: B cells, N stored counts of all cells together, G genes, D gene embedding, Z latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.nn import ResidualMLP

if TYPE_CHECKING:
    from scdiva.config import NativeConfig


class AnchorNetwork(nn.Module):
    """Anchor and profile decoder over G genes.

    Parameters
    ----------
    n_genes
        G, genes of the (sub-)vocabulary.
    config
        Sizes.

    Notes
    -----
    ``init_from_corpus`` sets everything that starts at a statistic of the corpus; without it the gene embeddings are
    small noise and the mean profile is flat.
    """

    pool_scale: torch.Tensor
    pool_centre: torch.Tensor

    def __init__(self, n_genes: int, config: NativeConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.n_latent = config.n_latent
        self.gene_embedding = nn.Parameter(torch.empty(n_genes, config.n_embedding))
        self.encoder = nn.Linear(config.n_embedding, config.n_latent, bias=False)
        self.encoder_mlp = ResidualMLP(config.n_embedding, config.n_hidden, config.n_latent, generator=generator)
        self.decoder = nn.Linear(config.n_latent, config.n_embedding, bias=False)
        self.decoder_mlp = ResidualMLP(config.n_latent, config.n_hidden, config.n_embedding, generator=generator)
        self.log_profile = nn.Parameter(torch.zeros(n_genes))
        # brings the pooled scores, which shrink with the number of genes, to order one; set from the corpus
        self.register_buffer("pool_scale", torch.ones(()))
        self.is_centred = config.pooling == "centred"
        if self.is_centred:
            self.register_buffer("pool_centre", torch.zeros(config.n_embedding))
        nn.init.eye_(self.encoder.weight)
        nn.init.zeros_(self.decoder.weight)
        nn.init.normal_(self.gene_embedding, std=config.embedding_std, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def init_from_corpus(self, components_GK: torch.Tensor, log_profile_G: torch.Tensor, pool_scale: float) -> None:
        """Start from the corpus.

        Parameters
        ----------
        components_GK
            Gene loadings of the corpus's truncated SVD, scaled to the size of the gene embeddings; the first K of the
            D embedding dimensions take them, the others keep their small noise.
        log_profile_G
            Log of the corpus's mean profile.
        pool_scale
            Factor on the pooled sum.
        """
        n_components = components_GK.shape[1]
        self.gene_embedding[:, :n_components] = components_GK
        self.log_profile.copy_(log_profile_G)
        self.pool_scale.fill_(pool_scale)

    def pool(self, gene_N: torch.Tensor, value_N: torch.Tensor, offset_B: torch.Tensor) -> torch.Tensor:
        """Pool cells to p = scale * sum_g v_g E_g / |v|, ``(B, D)`` float32; the zero vector for an empty cell.

        With ``pooling = "centred"`` to sum_g v_g E_g - centre.

        Parameters
        ----------
        gene_N
            int64 gene indices of all detected genes, cell after cell.
        value_N
            float32 log1p(CP10K) of each.
        offset_B
            int64 position at which each cell starts.
        """
        n_cells, n_values = offset_B.numel(), gene_N.numel()
        lengths = torch.diff(offset_B, append=offset_B.new_tensor([n_values]))
        cell_N = torch.repeat_interleave(torch.arange(n_cells, device=offset_B.device), lengths)
        # the norm in float64: a sum over genes that does not depend on how cells were batched
        square_B = torch.zeros(n_cells, dtype=torch.float64, device=offset_B.device)
        square_B.index_add_(0, cell_N, value_N.double().square())
        norm_B = torch.ones_like(square_B) if self.is_centred else square_B.sqrt().clamp_min(1e-12)
        weight_N = value_N / norm_B.float()[cell_N]
        with torch.autocast(value_N.device.type, enabled=False):
            pooled = F.embedding_bag(
                gene_N, self.gene_embedding.float(), offset_B, mode="sum", per_sample_weights=weight_N
            )
        pooled = pooled * self.pool_scale
        return pooled - self.pool_centre if self.is_centred else pooled

    def encode(self, pooled_BD: torch.Tensor) -> torch.Tensor:
        """Map pooled cells ``(B, D)`` to the latent z ``(B, Z)``."""
        return self.encoder(pooled_BD) + self.encoder_mlp(pooled_BD)

    def direction(self, z_BZ: torch.Tensor) -> torch.Tensor:
        """Direction in gene-embedding space in which z moves the profile, ``(B, D)``."""
        return self.decoder(z_BZ) + self.decoder_mlp(z_BZ)

    def log_rates(self, z_BZ: torch.Tensor) -> torch.Tensor:
        """Unnormalised log-rates of all genes, ``(B, G)``; softmax over genes gives the expected profile."""
        return F.linear(self.direction(z_BZ), self.gene_embedding) + self.log_profile
