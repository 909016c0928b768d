"""What the scDiVa network is trained on: losses with the preparation of their inputs.

Shape letters: B cells, N stored counts of all cells together, G genes, Z latent.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import nn

from scdiva.data.thinning import split_counts
from scdiva.losses import profile_nll
from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts, LossOutput

if TYPE_CHECKING:
    from scdiva.config import AnchorObjectiveConfig
    from scdiva.models.scdiva.network import AnchorNetwork


@dataclass(frozen=True, slots=True)
class PackedCells:
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

    def to(self, device: torch.device) -> Self:
        """Return the same cells on another device."""
        return type(self)(self.gene_N.to(device), self.value_N.to(device), self.offset_B.to(device))


@dataclass(frozen=True, slots=True)
class SplitViews:
    """Two independent views of the same cells: the encoder sees A, the decoder is scored on B.

    Parameters
    ----------
    view_a
        Packed view A.
    cell_N, gene_N, count_N
        Row, gene and count of every stored count of view B, int64, int64, float32.
    is_measured_BG
        Genes that each cell's file measures.
    """

    view_a: PackedCells
    cell_N: torch.Tensor
    gene_N: torch.Tensor
    count_N: torch.Tensor
    is_measured_BG: torch.Tensor

    def to(self, device: torch.device) -> Self:
        """Return the same views on another device."""
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class SplitProfileObjective(nn.Module):
    """Encode one binomial split of a cell, predict the profile of the other.

    View A ~ Binomial(x, rho) with rho ~ U(rho_min, rho_max) per cell, view B = x - A. The views are independent given
    the cell's rates, so z must carry the cell's state and cannot carry the answer; the spread of rho is the depth
    augmentation. (Our decision; methods A.5 on why the published anchor sees its answer.)

    Parameters
    ----------
    network
        The network that is trained.
    config
        Range of rho, weight of the KL term and noise on z.
    """

    floor_log_profile: torch.Tensor

    def __init__(self, network: AnchorNetwork, config: AnchorObjectiveConfig) -> None:
        super().__init__()
        self.network = network
        self.config = config
        # the floor is the corpus's mean profile, as it was before training
        self.register_buffer("floor_log_profile", network.log_profile.detach().clone(), persistent=False)
        self.log_sigma: nn.Linear | None = None
        if config.kl_weight > 0:
            self.log_sigma = nn.Linear(network.gene_embedding.shape[1], network.n_latent)
            nn.init.zeros_(self.log_sigma.weight)
            nn.init.constant_(self.log_sigma.bias, -2.0)

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> SplitViews:
        """Split cells into two views."""
        rho = rng.uniform(self.config.rho_min, self.config.rho_max, cells.n_cells)
        view_a, view_b = split_counts(cells, rho, rng)
        counts = view_b.counts
        cell = np.repeat(np.arange(cells.n_cells), np.diff(counts.indptr))
        return SplitViews(
            view_a=PackedCells.pack(view_a),
            cell_N=torch.from_numpy(cell),
            gene_N=torch.from_numpy(counts.indices.astype(np.int64)),
            count_N=torch.from_numpy(counts.data.astype(np.float32)),
            is_measured_BG=torch.from_numpy(cells.is_measured[cells.source_of_cell]),
        )

    def forward(self, inputs: SplitViews, generator: torch.Generator) -> LossOutput:
        """Return the loss: held-out profile NLL in nats per UMI, mean over cells, plus the KL term if there is one."""
        view = inputs.view_a
        pooled = self.network.pool(view.gene_N, view.value_N, view.offset_B)
        z = self.network.encode(pooled)
        terms: dict[str, torch.Tensor] = {}
        penalty: torch.Tensor | float = 0.0
        if self.log_sigma is not None:
            log_sigma = self.log_sigma(pooled).float().clamp(-6.0, 2.0)
            kl = (0.5 * (z.float().square() + torch.exp(2 * log_sigma) - 1) - log_sigma).sum(dim=1).mean()
            terms["kl"] = kl.detach()
            if self.training:
                penalty = self.config.kl_weight * kl
                z = z + torch.exp(log_sigma) * self._noise_like(z, generator)
        if self.training and self.config.latent_noise > 0:
            z = z + self.config.latent_noise * self._noise_like(z, generator)
        nll = self._score(self.network.log_rates(z), inputs)
        terms["profile_nll"] = nll.detach()
        if not self.training:
            n_cells = z.shape[0]
            floor = self._score(self.floor_log_profile.expand(n_cells, -1), inputs)
            terms["profile_nll_floor"] = floor.detach()
        return LossOutput(loss=nll + penalty, terms=terms, n_cells=int(z.shape[0]))

    @staticmethod
    def _score(log_rate: torch.Tensor, inputs: SplitViews) -> torch.Tensor:
        return profile_nll(log_rate, inputs.cell_N, inputs.gene_N, inputs.count_N, inputs.is_measured_BG).mean()

    @staticmethod
    def _noise_like(z: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return torch.randn(z.shape, generator=generator, device=z.device)
