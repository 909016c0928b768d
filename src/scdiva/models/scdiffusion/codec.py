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
_ROUNDS = 6
_PRIOR_UMIS = 1.0
"""Weight of "no offset", in UMIs of a gene: what few molecules show moves little."""
_SLOPE_PRECISION = 10.0
"""Weight of "slope 1", in the same sense."""
_LARGEST_STEP = 0.5


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
    log_centre_G
        Mean log share of each gene over training cells, by the codec.
    slope_G
        Factor on what the codec's log share deviates from it.
    log_offset_G
        Added to the log share of each gene.
    log_theta_G
        Log inverse dispersion of each gene.
    """

    latent_mean_Z: torch.Tensor
    latent_std_Z: torch.Tensor
    log_centre_G: torch.Tensor
    slope_G: torch.Tensor
    log_offset_G: torch.Tensor
    log_theta_G: torch.Tensor

    def __init__(self, n_genes: int, n_latent: int) -> None:
        super().__init__()
        self.register_buffer("latent_mean_Z", torch.zeros(n_latent))
        self.register_buffer("latent_std_Z", torch.ones(n_latent))
        self.register_buffer("log_centre_G", torch.zeros(n_genes))
        self.register_buffer("slope_G", torch.ones(n_genes))
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
        """Return a codec's shares with slopes and offsets, ``(n_cells, n_genes)``; rows sum to 1."""
        return self._moved(np.log(np.maximum(share, _SMALLEST_SHARE)) - self._numpy(self.log_centre_G))

    def _moved(self, deviation: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return shares, given how far the codec's log shares are from the centre."""
        moved = self._numpy(self.log_centre_G) + self._numpy(self.log_offset_G) + self._numpy(self.slope_G) * deviation
        share = np.exp(moved - moved.max(axis=1, keepdims=True))
        return np.asarray(share / share.sum(axis=1, keepdims=True))

    def fit_genes(self, shares: Iterable[tuple[NDArray[np.float32], SparseCells]]) -> None:
        """Set slopes, offsets and dispersions to their maximum of likelihood for some cells.

        The mean profile of new cells differs from that of the corpus a codec was trained on, and a profile that is
        expected given z of a part of a cell says too little of some genes and too much of others. Offset and slope of
        each gene maximise the Poisson likelihood, with weak priors at 0 and 1, by steps that take all other genes as
        they are; dispersions follow as for the autoencoder. (Our decision.)

        Parameters
        ----------
        shares
            Blocks of cells: the codec's shares of each, and the counts of the whole cells.
        """
        blocks = [(np.log(np.maximum(share, _SMALLEST_SHARE)), cells) for share, cells in shares]
        n_cells, n_genes = sum(cells.n_cells for _, cells in blocks), self.log_theta_G.numel()
        centre = (sum(log_share.sum(axis=0, dtype=np.float64) for log_share, _ in blocks) / n_cells).astype(np.float32)
        self.log_centre_G.copy_(torch.from_numpy(centre))
        self.log_offset_G.zero_()
        self.slope_G.fill_(1.0)
        deviations = [(log_share - centre, cells) for log_share, cells in blocks]
        # sums over cells of the counts, and of counts times deviation
        observed, observed_deviation = np.zeros(n_genes), np.zeros(n_genes)
        for deviation, cells in deviations:
            row, gene, count = cells.row_X.numpy(), cells.gene_X.numpy(), cells.count_X.numpy()
            observed += np.bincount(gene, weights=count, minlength=n_genes)
            observed_deviation += np.bincount(gene, weights=count * deviation[row, gene], minlength=n_genes)
        for _ in range(_ROUNDS):  # shares sum to 1: what one gene gains others lose
            expected, first, second = np.zeros(n_genes), np.zeros(n_genes), np.zeros(n_genes)
            for deviation, cells in deviations:
                mean = self._moved(deviation) * cells.depth_B.numpy()[:, None]
                expected += mean.sum(axis=0)
                first += (mean * deviation).sum(axis=0)
                second += (mean * deviation**2).sum(axis=0)
            ratio = (observed + _PRIOR_UMIS) / (expected + _PRIOR_UMIS)
            usual = first / np.maximum(expected, _SMALLEST_SHARE)
            score = observed_deviation - usual * observed  # the offset leaves nothing of the sum of residuals
            information = ratio * np.maximum(second - usual * first, 0.0)
            slope = self._numpy(self.slope_G)
            step = (score - _SLOPE_PRECISION * (slope - 1.0)) / (information + _SLOPE_PRECISION)
            self.log_offset_G.add_(torch.from_numpy(np.log(ratio).astype(np.float32)))
            self.slope_G.add_(torch.from_numpy(np.clip(step, -_LARGEST_STEP, _LARGEST_STEP).astype(np.float32)))
        scored = ((self._log_mean(deviation, cells), cells) for deviation, cells in deviations)
        self.log_theta_G.copy_(dispersions_of_largest_likelihood(scored, n_genes))

    def _log_mean(self, deviation: NDArray[np.float32], cells: SparseCells) -> torch.Tensor:
        mean_BG = torch.from_numpy(np.maximum(self._moved(deviation), _SMALLEST_SHARE)).float()
        return mean_BG.log() + cells.depth_B.clamp_min(1e-3).log()[:, None]

    @staticmethod
    def _numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
        return np.asarray(tensor.detach().cpu(), dtype=np.float32)
