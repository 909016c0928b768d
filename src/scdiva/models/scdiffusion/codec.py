"""What a latent diffusion adds to a codec that it did not train: the scale of z, and numbers of single genes.

Shape letters: B cells, G genes, Z latent.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from scdiva.models.scdiffusion.autoencoder import SparseCells, dispersions_of_largest_likelihood

_SMALLEST_STD = 1e-3
_SMALLEST_SHARE = 1e-12
_ROUNDS = 5
_PRIOR_UMIS = 1.0
"""Weight of "no offset", in UMIs of a gene: what few molecules show moves little."""


class CodecHead(nn.Module):
    """Numbers that are fitted to training cells around a codec that stays as it is.

    Parameters
    ----------
    n_genes, n_latent
        Sizes.

    Attributes
    ----------
    latent_mean_Z, latent_std_Z
        Of the codec's z of the training cells: the diffusion runs on standardised z.
    log_offset_G
        Added to the log share of each gene.
    log_theta_G
        Log inverse dispersion of each gene.
    """

    latent_mean_Z: torch.Tensor
    latent_std_Z: torch.Tensor
    log_offset_G: torch.Tensor
    log_theta_G: torch.Tensor

    def __init__(self, n_genes: int, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("latent_mean_Z", torch.zeros(n_latent))
        self.register_buffer("latent_std_Z", torch.ones(n_latent))
        self.register_buffer("log_offset_G", torch.zeros(n_genes))
        self.register_buffer("log_theta_G", torch.full((n_genes,), 2.0))

    def standardise_by(self, z: NDArray[np.float32]) -> None:
        """Store mean and standard deviation of the codec's z, ``(n_cells, Z)``; of training cells."""
        self.latent_mean_Z.copy_(torch.from_numpy(z.mean(axis=0)))
        self.latent_std_Z.copy_(torch.from_numpy(np.maximum(z.std(axis=0), _SMALLEST_STD)))

    def standardised(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the z of the diffusion, given the codec's."""
        return (z - self._numpy(self.latent_mean_Z)) / self._numpy(self.latent_std_Z)

    def codec_latent(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the z of the codec, given the diffusion's."""
        return np.asarray(z, dtype=np.float32) * self._numpy(self.latent_std_Z) + self._numpy(self.latent_mean_Z)

    def adjusted(self, share: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return a codec's shares with the offsets, ``(n_cells, n_genes)``; rows sum to 1."""
        moved = share * np.exp(self._numpy(self.log_offset_G))
        return moved / moved.sum(axis=1, keepdims=True)

    def fit_genes(self, shares: Iterable[tuple[NDArray[np.float32], SparseCells]]) -> None:
        """Set offsets and dispersions to their maximum of likelihood for some cells.

        The mean profile of new cells differs from that of the corpus a codec was trained on. An offset makes the
        expected UMIs of a gene, over all cells, those that were observed (Poisson likelihood, with a prior of one
        UMI towards no offset); dispersions follow as for the autoencoder. (Our decision.)

        Parameters
        ----------
        shares
            Blocks of cells: the codec's shares of each, and the counts of the whole cells.
        """
        blocks = list(shares)
        self.log_offset_G.zero_()
        observed_G = np.zeros(self.log_offset_G.numel())
        for _, cells in blocks:
            observed_G += np.bincount(cells.gene_X.numpy(), weights=cells.count_X.numpy(), minlength=observed_G.size)
        for _ in range(_ROUNDS):  # shares sum to 1: what one gene gains others lose
            expected_G = np.zeros_like(observed_G)
            for share, cells in blocks:
                expected_G += cells.depth_B.numpy().astype(np.float64) @ self.adjusted(share)
            step = np.log((observed_G + _PRIOR_UMIS) / (expected_G + _PRIOR_UMIS))
            self.log_offset_G.add_(torch.from_numpy(step.astype(np.float32)))
        scored = ((self._log_mean(share, cells), cells) for share, cells in blocks)
        self.log_theta_G.copy_(dispersions_of_largest_likelihood(scored, self.log_theta_G.numel()))

    def _log_mean(self, share: NDArray[np.float32], cells: SparseCells) -> torch.Tensor:
        mean_BG = torch.from_numpy(np.maximum(self.adjusted(share), _SMALLEST_SHARE)).float()
        return mean_BG.log() + cells.depth_B.clamp_min(1e-3).log()[:, None]

    @staticmethod
    def _numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
        return np.asarray(tensor.detach().cpu(), dtype=np.float32)
