"""The published networks: autoencoder, denoiser and classifier of Luo et al. (Bioinformatics 2024, btae518).

Layer for layer those of the published code, with their numbers of parameters; what is different is that batch norms
never see other cells outside training (a defect of the published code).

Shape letters: B cells, C classes, D width, F condition fields, G genes, Z latent.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.data.statistics import CP10K
from scdiva.models.scdiffusion.autoencoder import Autoencoder, SparseCells
from scdiva.models.scdiffusion.classifiers import LatentClassifier
from scdiva.models.scdiffusion.denoiser import Denoiser, time_embedding
from scdiva.types import CellCounts, LossOutput

N_HIDDEN_LAYERS = 3
"""Hidden layers of encoder and decoder."""


def _hidden(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.PReLU())


class PublishedAutoencoder(nn.Module):
    """log1p(CP10K) to the unit sphere and back; deterministic, squared error (Luo et al. 2024).

    z is neither standardised nor of variance 1, as published: each of 128 dimensions has a variance of about 1/128,
    which the noise exceeds from step 23 of 1,000 on. In eval mode each cell's z depends on that cell alone.

    Parameters
    ----------
    n_genes, n_latent, n_hidden
        Sizes; published: 128 and 1,024.
    """

    def __init__(self, n_genes: int, n_latent: int, n_hidden: int) -> None:
        super().__init__()
        self.n_genes, self.n_latent = n_genes, n_latent
        inner = [_hidden(n_hidden, n_hidden) for _ in range(N_HIDDEN_LAYERS - 1)]
        self.encoder = nn.Sequential(_hidden(n_genes, n_hidden), *inner, nn.Linear(n_hidden, n_latent))
        inner = [_hidden(n_hidden, n_hidden) for _ in range(N_HIDDEN_LAYERS - 1)]
        self.decoder = nn.Sequential(_hidden(n_latent, n_hidden), *inner, nn.Linear(n_hidden, n_genes))

    def encode(self, cells: SparseCells) -> torch.Tensor:
        """Return z on the unit sphere, ``(B, Z)`` float32; no randomness."""
        return self.encode_values(cells.log_cp10k(self.n_genes))

    def encode_values(self, values_BG: torch.Tensor) -> torch.Tensor:
        """Return z on the unit sphere, ``(B, Z)`` float32, of log1p(CP10K)."""
        return F.normalize(self.encoder(values_BG).float(), dim=1)

    def log1p_cp10k(self, z_BZ: torch.Tensor) -> torch.Tensor:
        """Return what the decoder states, ``(B, G)`` float32 and at least 0: continuous log1p(CP10K).

        z is brought back to the unit sphere first, as generated z leaves it and the decoder was trained on it alone
        (the published code leaves that out).
        """
        return self.decoder(F.normalize(z_BZ, dim=1)).float().relu()

    def share(self, z_BZ: torch.Tensor) -> torch.Tensor:
        """Return shares of the genes, ``(B, G)`` float32: CP10K over its sum; zeros where the decoder states none."""
        cp10k_BG = self.log1p_cp10k(z_BZ).expm1()
        return cp10k_BG / cp10k_BG.sum(dim=1, keepdim=True).clamp_min(1.0 / CP10K)


class PublishedAutoencoderObjective(nn.Module):
    """Mean squared error of log1p(CP10K) of the cells that the encoder has read (Luo et al. 2024)."""

    def __init__(self, autoencoder: PublishedAutoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> SparseCells:
        """Take the counts; nothing is random."""
        return SparseCells.pack(cells)

    prepare_heldout = prepare

    def forward(self, inputs: SparseCells, generator: torch.Generator) -> LossOutput:
        """Compute the loss of one minibatch."""
        values_BG = inputs.log_cp10k(self.autoencoder.n_genes)
        # in training the decoder is linear at its end: the ReLU is of inference only
        decoded_BG = self.autoencoder.decoder(self.autoencoder.encode_values(values_BG)).float()
        return LossOutput(F.mse_loss(decoded_BG, values_BG), n_cells=inputs.n_cells)


class _TimedBlock(nn.Module):
    """Linear, plus a projection of the time, LayerNorm, SiLU."""

    def __init__(self, n_in: int, n_out: int, n_time: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_in, n_out)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(n_time, n_out))
        self.norm = nn.LayerNorm(n_out)

    def forward(self, h_BD: torch.Tensor, time_BD: torch.Tensor) -> torch.Tensor:
        return F.silu(self.norm(self.linear(h_BD) + self.time(time_BD)))


def _time_mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))


class PublishedDenoiser(nn.Module):
    """The noise on z by an MLP in the shape of a U; it knows of no condition ("Cell_Unet" of Luo et al. 2024).

    Parameters
    ----------
    n_latent, width
        Sizes; published: 128 and 512. Layers are of ``width``, ``width``, ``width / 2`` and ``width / 4``.
    """

    def __init__(self, n_latent: int, width: int) -> None:
        super().__init__()
        self.width = width
        levels = (width, width, width // 2, width // 4)
        self.time = _time_mlp(width)
        self.down = nn.ModuleList(_TimedBlock(n_in, n_out, width) for n_in, n_out in pairwise((n_latent, *levels)))
        upwards = levels[::-1]
        self.up = nn.ModuleList(_TimedBlock(n_in, n_out, width) for n_in, n_out in pairwise(upwards))
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.SiLU(), nn.Linear(2 * width, n_latent)
        )

    def forward(
        self, z_BZ: torch.Tensor, t_B: torch.Tensor, depth_B: torch.Tensor, condition_BF: torch.Tensor
    ) -> torch.Tensor:
        """Predict the noise, ``(B, Z)``; depth and conditions are not looked at."""
        time_BD = self.time(time_embedding(t_B, self.width))
        h_BD, on_the_way = z_BZ, []
        for block in self.down:
            h_BD = block(h_BD, time_BD)
            on_the_way.append(h_BD)
        on_the_way.pop()
        for block in self.up:
            h_BD = block(h_BD, time_BD) + on_the_way.pop()
        return self.head(h_BD)


class PublishedClassifier(nn.Module):
    """Label from noised z (Luo et al. 2024).

    ``unused_time`` projects the time for the third layer in the published parameters, and is never applied there; it is
    kept so that the parameters are the published ones, 1,647,628 for 12 labels.

    Parameters
    ----------
    n_latent, width, n_classes
        Sizes; published: 128 and 512. Layers are of ``width``, ``width`` and ``width / 2``.
    dropout
        In training.
    """

    def __init__(self, n_latent: int, width: int, n_classes: int, *, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        half = width // 2
        self.time = _time_mlp(width)
        self.linear = nn.ModuleList([nn.Linear(n_latent, width), nn.Linear(width, width)])
        self.project_time = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(width, width)) for _ in range(2))
        self.after = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(width), nn.SiLU(), nn.Dropout(dropout)) for _ in range(2)
        )
        self.unused_time = nn.Linear(width, half)
        self.leave = nn.Sequential(
            nn.Linear(width, half), nn.BatchNorm1d(half), nn.SiLU(), nn.Dropout(dropout), nn.Linear(half, n_classes)
        )

    def forward(self, z_BZ: torch.Tensor, t_B: torch.Tensor) -> torch.Tensor:
        """Return logits, ``(B, C)``; class c is label code c + 1."""
        time_BD = self.time(time_embedding(t_B, self.width))
        h_BD = z_BZ
        for linear, time, after in zip(self.linear, self.project_time, self.after, strict=True):
            h_BD = after(linear(h_BD) + time(time_BD))
        return self.leave(h_BD)


AnyAutoencoder = Autoencoder | PublishedAutoencoder
AnyDenoiser = Denoiser | PublishedDenoiser
AnyClassifier = LatentClassifier | PublishedClassifier
