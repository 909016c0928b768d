"""The autoencoder: counts to z and back, one cell at a time.

Shape letters: B cells, G genes, H hidden, Z latent, X stored counts of all cells together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.data.statistics import CP10K
from scdiva.types import CellCounts

_SMALLEST_STD = 1e-3


@dataclass(frozen=True, slots=True)
class SparseCells:
    """Counts of some cells as tensors.

    Parameters
    ----------
    row_X, gene_X
        int64 cell and gene of each stored count.
    count_X
        float32 counts.
    depth_B
        float32 UMIs of each cell over the model's genes.
    """

    row_X: torch.Tensor
    gene_X: torch.Tensor
    count_X: torch.Tensor
    depth_B: torch.Tensor

    @classmethod
    def pack(cls, cells: CellCounts) -> Self:
        """Take the counts of cells."""
        counts = cells.counts
        row = np.repeat(np.arange(cells.n_cells), np.diff(counts.indptr))
        return cls(
            torch.from_numpy(row),
            torch.from_numpy(counts.indices.astype(np.int64)),
            torch.from_numpy(counts.data.astype(np.float32)),
            torch.from_numpy(np.asarray(counts.sum(axis=1)).ravel().astype(np.float32)),
        )

    def to(self, device: torch.device) -> SparseCells:
        """Return the same counts on another device."""
        return SparseCells(*(t.to(device) for t in (self.row_X, self.gene_X, self.count_X, self.depth_B)))

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.depth_B.numel())

    def log_cp10k(self, n_genes: int) -> torch.Tensor:
        """Return log1p(CP10K), ``(B, G)``; CP10K is of the UMIs in the model's genes, which is what is decoded."""
        scale_B = CP10K / self.depth_B.clamp_min(1.0)
        dense_BG = self.count_X.new_zeros((self.n_cells, n_genes))
        dense_BG[self.row_X, self.gene_X] = torch.log1p(self.count_X * scale_B[self.row_X])
        return dense_BG


class Autoencoder(nn.Module):
    """Encoder on log1p(CP10K), decoder to a negative binomial for every gene (our decision).

    ``mu = depth * softmax(f(z))`` with one dispersion per gene. There is LayerNorm and no BatchNorm: a cell's z, and
    what is decoded from it, depend on that cell alone (not so in the published code). The decoder's last layer is
    zero at the start, so training begins at the mean profile.

    Parameters
    ----------
    n_genes, n_latent, n_hidden
        Sizes.

    Attributes
    ----------
    centre_G
        Mean log1p(CP10K) of the training cells, taken off what the encoder reads.
    latent_mean_Z, latent_std_Z
        Of the training cells' raw z; :meth:`encode` standardises by them, so that the noise of the diffusion, which has
        variance 1, meets a signal of variance 1 (in the published code it does not).
    """

    centre_G: torch.Tensor
    latent_mean_Z: torch.Tensor
    latent_std_Z: torch.Tensor

    def __init__(self, n_genes: int, n_latent: int, n_hidden: int) -> None:
        super().__init__()
        self.n_genes, self.n_latent = n_genes, n_latent
        self.encoder = nn.Sequential(
            nn.Linear(n_genes, n_hidden), nn.LayerNorm(n_hidden), nn.SiLU(),
            nn.Linear(n_hidden, n_hidden), nn.LayerNorm(n_hidden), nn.SiLU(),
            nn.Linear(n_hidden, n_latent),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(n_latent, n_hidden), nn.LayerNorm(n_hidden), nn.SiLU(),
            nn.Linear(n_hidden, n_hidden), nn.LayerNorm(n_hidden), nn.SiLU(),
            nn.Linear(n_hidden, n_genes),
        )  # fmt: skip
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.log_theta_G = nn.Parameter(torch.full((n_genes,), 2.0))
        self.register_buffer("centre_G", torch.zeros(n_genes))
        self.register_buffer("latent_mean_Z", torch.zeros(n_latent))
        self.register_buffer("latent_std_Z", torch.ones(n_latent))

    def start_at(self, log_profile: NDArray[np.floating], centre: NDArray[np.floating]) -> None:
        """Start at a corpus: its mean profile in the decoder, its mean values off the encoder's input.

        Parameters
        ----------
        log_profile, centre
            ``(n_genes,)`` log of the mean share of each gene; mean log1p(CP10K).
        """
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.bias.copy_(torch.from_numpy(np.asarray(log_profile, dtype=np.float32)))
            self.centre_G.copy_(torch.from_numpy(np.asarray(centre, dtype=np.float32)))

    def standardise_by(self, raw_z: NDArray[np.float32]) -> None:
        """Store mean and standard deviation of raw z, ``(n_cells, Z)``; of training cells."""
        self.latent_mean_Z.copy_(torch.from_numpy(raw_z.mean(axis=0)))
        self.latent_std_Z.copy_(torch.from_numpy(np.maximum(raw_z.std(axis=0), _SMALLEST_STD)))

    def raw_latent(self, cells: SparseCells) -> torch.Tensor:
        """Return z before standardisation, ``(B, Z)``."""
        return self.encoder(cells.log_cp10k(self.n_genes) - self.centre_G)

    def encode(self, cells: SparseCells) -> torch.Tensor:
        """Return standardised z, ``(B, Z)`` float32; no randomness."""
        return (self.raw_latent(cells).float() - self.latent_mean_Z) / self.latent_std_Z

    def log_share_of_raw(self, raw_BZ: torch.Tensor) -> torch.Tensor:
        """Return log shares of the genes, ``(B, G)`` float32, of z before standardisation."""
        return F.log_softmax(self.decoder(raw_BZ).float(), dim=1)

    def log_share(self, z_BZ: torch.Tensor) -> torch.Tensor:
        """Return log shares of the genes, ``(B, G)`` float32, of standardised z."""
        return self.log_share_of_raw(z_BZ * self.latent_std_Z + self.latent_mean_Z)

    def share(self, z_BZ: torch.Tensor) -> torch.Tensor:
        """Return shares of the genes, ``(B, G)`` float32, of standardised z."""
        return self.log_share(z_BZ).exp()

    def gene_layers(self) -> list[nn.Parameter]:
        """Weights of the encoder's first and the decoder's last layer, which have numbers for each gene."""
        return [self.encoder[0].get_parameter("weight"), self.decoder[-1].get_parameter("weight")]

    def gene_vectors(self) -> list[nn.Parameter]:
        """Parameters with one number per gene, which get a learning rate of their own."""
        last = self.decoder[-1]
        assert isinstance(last, nn.Linear)
        return [self.log_theta_G, last.bias]


def negative_binomial_nll(log_mu_BG: torch.Tensor, log_theta_G: torch.Tensor, cells: SparseCells) -> torch.Tensor:
    """Return the negative log-likelihood of each cell, ``(B,)`` nats over all genes.

    Zeros need no gamma functions, so these are computed for the stored counts only, which is most of the cost saved.

    Parameters
    ----------
    log_mu_BG
        Log of the means.
    log_theta_G
        Log inverse dispersion of each gene.
    cells
        The counts.
    """
    softplus = F.softplus
    theta_G = log_theta_G.exp()
    # theta log(theta / (theta + mu)): all there is for a zero
    log_zero_B = -(theta_G * softplus(log_mu_BG - log_theta_G)).sum(dim=1)
    log_mu_X, log_theta_X, theta_X = (
        log_mu_BG[cells.row_X, cells.gene_X],
        log_theta_G[cells.gene_X],
        theta_G[cells.gene_X],
    )
    of_counts_X = (
        torch.lgamma(cells.count_X + theta_X)
        - torch.lgamma(theta_X)
        - torch.lgamma(cells.count_X + 1.0)
        - cells.count_X * softplus(log_theta_X - log_mu_X)
    )
    return -log_zero_B.index_add(0, cells.row_X, of_counts_X)


LOG_THETA_GRID = (-3.0, -2.25, -1.5, -0.75, 0.0, 0.75, 1.5, 2.25, 3.0, 3.75, 4.5, 5.25, 6.0)
"""Candidates of log inverse dispersion, evenly spaced."""
_PRIOR_MEAN, _PRIOR_STD = 1.5, 2.0


@torch.no_grad()
def calibrate_dispersions(autoencoder: Autoencoder, blocks: Iterable[SparseCells]) -> None:
    """Set each gene's dispersion to its maximum of likelihood, everything else as it is.

    Training that stops when profiles no longer gain leaves most dispersions where they started; cells drawn with them
    vary too little. Cells are encoded and scored whole: generation draws z like those of whole cells and decodes whole
    cells, and what must be right is the spread of counts around such a z. (Our decision.)

    Parameters
    ----------
    autoencoder
        Its ``log_theta_G`` is changed.
    blocks
        Training cells.
    """

    def scored() -> Iterator[tuple[torch.Tensor, SparseCells]]:
        for cells in blocks:
            log_share_BG = autoencoder.log_share_of_raw(autoencoder.raw_latent(cells))
            yield log_share_BG + cells.depth_B.clamp_min(1e-3).log()[:, None], cells

    autoencoder.log_theta_G.copy_(dispersions_of_largest_likelihood(scored(), autoencoder.n_genes))


@torch.no_grad()
def dispersions_of_largest_likelihood(scored: Iterable[tuple[torch.Tensor, SparseCells]], n_genes: int) -> torch.Tensor:
    """Return the log inverse dispersion of each gene, ``(n_genes,)``, of largest likelihood given the means.

    The likelihood is taken on a grid and its minimum from the parabola through the best three points. A wide normal
    prior on the log (mean 1.5, standard deviation 2) settles genes of hardly any counts. (Our decision.)

    Parameters
    ----------
    scored
        Blocks of cells: log-means ``(B, G)``, and the counts.
    n_genes
        G.
    """
    grid = torch.tensor(LOG_THETA_GRID)
    nll_KG = (0.5 * ((grid - _PRIOR_MEAN) / _PRIOR_STD).square())[:, None].repeat(1, n_genes)
    for log_mu_BG, cells in scored:
        log_mu_X = log_mu_BG[cells.row_X, cells.gene_X]
        for k, log_theta in enumerate(grid):
            theta = log_theta.exp()
            of_counts_X = (
                torch.lgamma(cells.count_X + theta)
                - torch.lgamma(theta)
                - cells.count_X * F.softplus(log_theta - log_mu_X)
            )
            nll_KG[k] += (theta * F.softplus(log_mu_BG - log_theta)).sum(dim=0)
            nll_KG[k].index_add_(0, cells.gene_X, -of_counts_X)
    best_G = nll_KG.argmin(dim=0).clamp(1, len(LOG_THETA_GRID) - 2)
    left_G, at_G, right_G = (nll_KG.gather(0, (best_G + i)[None])[0] for i in (-1, 0, 1))
    bend_G = (left_G - 2 * at_G + right_G).clamp_min(1e-6)
    shift_G = (0.5 * (left_G - right_G) / bend_G).clamp(-1.0, 1.0)
    return grid[best_G] + shift_G * (grid[1] - grid[0])
