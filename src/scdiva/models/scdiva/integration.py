"""What takes batches out of an embedding, and keeps what tells cells apart.

The encoder reads a cell's pooled gene embeddings alone, never its batch: what it has learned maps cells of batches that
it has not seen. It starts at the principal components of the data, and is trained on three things:

- *contrast*: a cell and its partner (another view of its counts, a neighbour within the batch, a mutual nearest
  neighbour of another batch) are close, compared with other cells **of the partner's batch**: nothing is gained by
  telling batches apart;
- *alignment*: within each cluster of a minibatch, batches have the same centre;
- with labels, *SupCon* (Khosla et al. 2020): cells of one type are close.

The loss of the published protocol (arXiv 2602.03477) is there as well: a batch discriminator behind gradient reversal
(Ganin et al. 2016), SupCon on a projection, and reconstruction of counts. On the whole encoder, as published, it is
trained in ``whole_encoder.py``. The rest is our own; docs/integration.md has what each part does.

Shape letters: B cells of a minibatch, N cells, V views, E gene embedding, Z latent, K clusters, D batches, G genes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.data.thinning import split_counts
from scdiva.losses import profile_nll
from scdiva.models.neighbours import BatchNeighbours
from scdiva.models.scdiva.inputs import OnDevice, PackedCells, Profile
from scdiva.models.scdiva.native import NativeNetwork
from scdiva.types import CellCounts, LossOutput

if TYPE_CHECKING:
    from scdiva.config import IntegrationConfig

MONITOR = "one_minus_score"
"""Term that is minimised where held-out cells have labels: 1 - the mean score of minibatches."""
_LLOYD_STEPS = 8
_MIN_CELLS_PER_CENTRE = 3
_WARM_UP = 1 / 3
"""Share of the training before alignment begins: clusters of an embedding in which batches lie apart are batches."""
_DISCRIMINATOR_WIDTH, _PROJECTION_WIDTH = 256, 128
_DROPOUT = 0.1
_NEVER = -1e9

Score = Callable[[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]], float]
"""Scores an embedding, given codes of types and batches; 1 is best."""


@dataclass(frozen=True, slots=True)
class Counts(OnDevice):
    """Two views of the cells of a minibatch: one is embedded, the other one's counts are predicted."""

    view: PackedCells
    profile: Profile


@dataclass(frozen=True, slots=True)
class Partners(OnDevice):
    """Cells and their partners.

    Parameters
    ----------
    pooled_BE, partner_BE
        What the encoder reads of each.
    batch_B, partner_batch_B
        int64 codes of their batches.
    label_B, partner_label_B
        int64 codes of their types; -1: unknown.
    aligned_AE, aligned_batch_A
        Cells at random, all equally often, whose batches are brought together.
    counts
        For reconstruction; None without.
    """

    pooled_BE: torch.Tensor
    partner_BE: torch.Tensor
    batch_B: torch.Tensor
    partner_batch_B: torch.Tensor
    label_B: torch.Tensor
    partner_label_B: torch.Tensor
    aligned_AE: torch.Tensor
    aligned_batch_A: torch.Tensor
    counts: Counts | None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.batch_B.numel())


@dataclass(frozen=True, slots=True, eq=False)
class IntegrationData:
    """What the objective knows of all cells.

    Parameters
    ----------
    view_VNE
        Pooled views of every cell, ``(V, N, E)`` float32.
    whole_NE
        The same of the whole cells.
    n_own
        How many of the E dimensions are the data's own components; they come last.
    batch
        ``(N,)`` codes.
    label
        ``(N,)`` codes; -1: unknown.
    neighbours
        Partners.
    """

    view_VNE: torch.Tensor
    whole_NE: torch.Tensor
    n_own: int
    batch: NDArray[np.int64]
    label: NDArray[np.int64]
    neighbours: BatchNeighbours

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself: averages of the weights need no second copy of the data."""
        return self

    @property
    def n_batches(self) -> int:
        """D."""
        return int(self.batch.max()) + 1


class _Reversal(torch.autograd.Function):
    """The identity, whose gradient is turned around."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return -ctx.factor * grad[0], None


def reverse_gradient(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Return x; gradients that come back are multiplied by -factor."""
    reversed_: torch.Tensor = _Reversal.apply(x, factor)
    return reversed_


def reversal_factor(progress: float) -> float:
    """2 / (1 + exp(-10 p)) - 1: from 0 at the start of the training to 1 (Ganin et al. 2016)."""
    return 2.0 / (1.0 + math.exp(-10.0 * progress)) - 1.0


def batch_discriminator(n_read: int, n_batches: int, config: IntegrationConfig) -> nn.Sequential:
    """Return what tells batches apart, ``(B, n_read)`` to logits ``(B, n_batches)``; layers are our decision."""
    return nn.Sequential(
        nn.Linear(n_read, _DISCRIMINATOR_WIDTH),
        nn.ReLU(),
        nn.Dropout(_DROPOUT),
        nn.Linear(_DISCRIMINATOR_WIDTH, n_batches),
    ).requires_grad_(config.adversarial_weight > 0)


def supcon_projection(n_read: int, config: IntegrationConfig) -> nn.Sequential:
    """Return the projection that SupCon reads, ``(B, n_read)`` to ``(B, 128)``; layers are our decision."""
    return nn.Sequential(
        nn.Linear(n_read, _DISCRIMINATOR_WIDTH),
        nn.ReLU(),
        nn.Linear(_DISCRIMINATOR_WIDTH, _PROJECTION_WIDTH),
    ).requires_grad_(config.has_projection)


def scored(score: Score, z_BZ: torch.Tensor, label_B: torch.Tensor, batch_B: torch.Tensor) -> torch.Tensor:
    """1 - the score of the cells of known type: the held-out term :data:`MONITOR`."""
    known = label_B >= 0
    codes = (label_B[known].cpu().numpy(), batch_B[known].cpu().numpy())
    return torch.tensor(1.0 - score(np.asarray(z_BZ[known].cpu()), *codes))


class IntegrationObjective(nn.Module):
    """The loss of integration.

    Parameters
    ----------
    network
        Without a trunk. Its encoder is trained; its gene embeddings stay as they are.
    config
        Weights.
    data
        Pooled cells, batches, labels, partners.
    max_steps
        Length of the training, for the two parts that set in gradually.
    heldout
        Positions of held-out cells: their labels are not trained on, also where they are partners of others.
    score
        Scores held-out cells by their labels, where they have any: early stopping goes by it.
    """

    step: torch.Tensor

    def __init__(
        self,
        network: NativeNetwork,
        config: IntegrationConfig,
        data: IntegrationData,
        *,
        max_steps: int,
        heldout: NDArray[np.int64] | None = None,
        score: Score | None = None,
    ) -> None:
        super().__init__()
        self.training_label = data.label.copy()
        if heldout is not None:
            self.training_label[heldout] = -1
        anchor = network.anchor
        network.requires_grad_(False)
        for part in (anchor.encoder, anchor.encoder_mlp):
            part.requires_grad_(True)
        self.network, self.config, self.data, self.max_steps, self.score = network, config, data, max_steps, score
        n_latent, n_batches = network.n_latent, data.n_batches
        # PyTorch's layers draw their first weights from the global generator, which is the caller's
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # manual_seed would set those of all devices
            self.discriminator = batch_discriminator(n_latent, n_batches, config)
            self.projection = supcon_projection(n_latent, config)
        self.batch_profile: nn.Parameter | None = None
        if config.reconstruction_weight > 0:
            for module in (anchor.decoder, anchor.decoder_mlp):
                module.requires_grad_(True)
            self.batch_profile = nn.Parameter(torch.zeros(n_batches, network.n_genes))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> Partners:
        """Draw views and partners of some cells, for training."""
        data, rows = self.data, cells.cell_index
        partner = data.neighbours.partners(rows, rng, p_self=self.config.p_self, p_across=self.config.p_across)
        view = rng.integers(data.view_VNE.shape[0], size=(2, rows.size))
        one, other = (data.view_VNE[view[i], index] for i, index in enumerate((rows, partner)))
        n_cells = data.batch.size
        aligned = rng.choice(n_cells, min(self.config.n_aligned, n_cells), replace=False)
        of_view = data.view_VNE[int(rng.integers(data.view_VNE.shape[0])), aligned]
        counts = None
        if self.config.reconstruction_weight > 0:
            view_a, view_b = split_counts(cells, rng.uniform(0.4, 0.8, rows.size), rng)
            counts = Counts(PackedCells.pack(view_a), Profile.of(view_b))
        return self._partners(rows, partner, one, other, (aligned, of_view), counts, self.training_label)

    def prepare_heldout(self, cells: CellCounts, rng: np.random.Generator) -> Partners:
        """Take whole cells, and partners of them; of the cell itself, where it is its partner, a view."""
        data, rows = self.data, cells.cell_index
        partner = data.neighbours.partners(rows, rng, p_self=self.config.p_self, p_across=self.config.p_across)
        other = torch.where(
            torch.from_numpy(partner == rows)[:, None], data.view_VNE[0, partner], data.whole_NE[partner]
        )
        return self._partners(rows, partner, data.whole_NE[rows], other, (rows, data.whole_NE[rows]), None, data.label)

    def _partners(
        self,
        rows: NDArray[np.integer],
        partner: NDArray[np.int64],
        one: torch.Tensor,
        other: torch.Tensor,
        aligned: tuple[NDArray[np.integer], torch.Tensor],
        counts: Counts | None,
        label: NDArray[np.int64],
    ) -> Partners:
        batch = self.data.batch
        return Partners(
            pooled_BE=one,
            partner_BE=other,
            batch_B=torch.from_numpy(batch[rows]),
            partner_batch_B=torch.from_numpy(batch[partner]),
            label_B=torch.from_numpy(label[rows]),
            partner_label_B=torch.from_numpy(label[partner]),
            aligned_AE=aligned[1],
            aligned_batch_A=torch.from_numpy(batch[aligned[0]]),
            counts=counts,
        )

    def forward(self, inputs: Partners, generator: torch.Generator) -> LossOutput:
        """Return the weighted loss and its terms, means over cells."""
        config, anchor = self.config, self.network.anchor
        progress = 1.0
        if self.training:
            progress = float(self.step) / self.max_steps
            self.step += 1
        z_BZ, partner_BZ = (anchor.encode(pooled).float() for pooled in (inputs.pooled_BE, inputs.partner_BE))
        read = self.projection if config.has_projection else nn.Identity()
        unit_BZ, partner_unit_BZ = (F.normalize(read(z), dim=1) for z in (z_BZ, partner_BZ))
        parts: dict[str, tuple[float, torch.Tensor]] = {}
        if config.contrastive_weight > 0:
            loss = contrastive_loss(unit_BZ, partner_unit_BZ, inputs.partner_batch_B, config.temperature)
            parts["contrast"] = (config.contrastive_weight, loss)
        if config.alignment_weight > 0 and progress >= _WARM_UP:
            aligned_AZ = F.normalize(anchor.encode(inputs.aligned_AE).float(), dim=1)
            loss = alignment_loss(
                aligned_AZ,
                inputs.aligned_batch_A,
                self.data.n_batches,
                config.n_clusters,
                generator,
                chance_share=config.chance_share,
            )
            parts["alignment"] = (config.alignment_weight, loss)
        if config.supcon_weight > 0 and bool((inputs.label_B >= 0).any()):
            both = torch.cat([unit_BZ, partner_unit_BZ]), torch.cat([inputs.label_B, inputs.partner_label_B])
            parts["supcon"] = (config.supcon_weight, supcon_loss(*both, config.temperature))
        if config.adversarial_weight > 0:
            read_BZ = F.layer_norm(z_BZ, z_BZ.shape[1:])
            logit_BD = self.discriminator(reverse_gradient(read_BZ, reversal_factor(progress)))
            parts["adversary"] = (config.adversarial_weight, F.cross_entropy(logit_BD, inputs.batch_B))
        if inputs.counts is not None:
            parts["profile_nll"] = (config.reconstruction_weight, self._reconstruction(inputs.counts, inputs.batch_B))
        # a minibatch without labels may have no part at all
        total = sum((weight * value for weight, value in parts.values()), start=0.0 * z_BZ.sum())
        terms = {name: value.detach() for name, (_, value) in parts.items()}
        if not self.training and self.score is not None:
            terms[MONITOR] = scored(self.score, z_BZ, inputs.label_B, inputs.batch_B)
        return LossOutput(total, terms, inputs.n_cells)

    def _reconstruction(self, counts: Counts, batch_B: torch.Tensor) -> torch.Tensor:
        anchor, profile = self.network.anchor, counts.profile
        assert self.batch_profile is not None
        z_BZ = anchor.encode(self.network.pooled(counts.view)).float()
        log_rate_BG = anchor.log_rates(z_BZ) + self.batch_profile[batch_B]
        return profile_nll(log_rate_BG, profile.cell_N, profile.gene_N, profile.count_N, profile.is_measured_BG).mean()


def contrastive_loss(
    unit_BZ: torch.Tensor, partner_BZ: torch.Tensor, partner_batch_B: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Cross-entropy of finding each cell's partner among the partners that are of the same batch as it.

    Compared with cells of all batches, as InfoNCE is usually written, a cell could find its partner by its batch.

    Parameters
    ----------
    unit_BZ, partner_BZ
        Unit vectors.
    partner_batch_B
        Batches of the partners.
    temperature
        Divides cosines.
    """
    cosine_BB = unit_BZ @ partner_BZ.T / temperature
    cosine_BB = cosine_BB.masked_fill(partner_batch_B[:, None] != partner_batch_B[None, :], _NEVER)
    return F.cross_entropy(cosine_BB, torch.arange(len(cosine_BB), device=cosine_BB.device))


def supcon_loss(unit_XZ: torch.Tensor, label_X: torch.Tensor, temperature: float) -> torch.Tensor:
    """Supervised contrastive loss (Khosla et al. 2020), mean over cells that have another of their type.

    Parameters
    ----------
    unit_XZ
        Unit vectors.
    label_X
        Types; -1: unknown (such cells are compared with, but are nobody's type).
    temperature
        Divides cosines.
    """
    own_XX = torch.eye(len(unit_XZ), dtype=torch.bool, device=unit_XZ.device)
    is_alike_XX = (label_X[:, None] == label_X[None, :]) & ~own_XX & (label_X >= 0)[:, None]
    log_p_XX = torch.log_softmax((unit_XZ @ unit_XZ.T / temperature).masked_fill(own_XX, _NEVER), dim=1)
    n_alike_X = is_alike_XX.sum(dim=1)
    mean_X = log_p_XX.masked_fill(~is_alike_XX, 0.0).sum(dim=1) / n_alike_X.clamp_min(1)
    return -mean_X.sum() / (n_alike_X > 0).sum().clamp_min(1)


def alignment_loss(
    unit_BZ: torch.Tensor,
    batch_B: torch.Tensor,
    n_batches: int,
    n_clusters: int,
    generator: torch.Generator,
    *,
    chance_share: float,
) -> torch.Tensor:
    """Squared distances of batch centres from their cluster's centre beyond chance, in units of the spread around them.

    Clusters are found in the minibatch (spherical k-means from random cells), so that nothing has to be kept between
    steps. Batches of fewer than three cells in a cluster have no centre there.

    Parameters
    ----------
    unit_BZ
        Unit vectors.
    batch_B
        Codes.
    n_batches, n_clusters
        D and K.
    generator
        Draws the first centres.
    chance_share
        Share of the distances expected by chance, from the spread around each centre, that is not counted.
    """
    fixed_BZ, device = unit_BZ.detach(), unit_BZ.device
    order = torch.randperm(len(fixed_BZ), generator=generator, device=device)
    centre_KZ = fixed_BZ[order[:n_clusters]]
    n_clusters = len(centre_KZ)
    for _ in range(_LLOYD_STEPS):
        cluster_B = (fixed_BZ @ centre_KZ.T).argmax(dim=1)
        total_KZ = torch.zeros_like(centre_KZ).index_add_(0, cluster_B, fixed_BZ)
        centre_KZ = torch.where(total_KZ.abs().sum(dim=1, keepdim=True) > 0, F.normalize(total_KZ, dim=1), centre_KZ)
    group_B = cluster_B * n_batches + batch_B
    n_KD = torch.bincount(group_B, minlength=n_clusters * n_batches)
    total = torch.zeros(n_clusters * n_batches, unit_BZ.shape[1], device=device).index_add(0, group_B, unit_BZ)
    mean = total / n_KD.clamp_min(1)[:, None]
    squared_B = (unit_BZ - mean[group_B]).square().sum(dim=1)
    # centres of few cells lie apart by chance; counted as a difference of batches it presses clusters together
    by_chance = torch.zeros(len(n_KD), device=device).index_add(0, group_B, squared_B) / (n_KD - 1).clamp_min(1)
    by_chance = (by_chance / n_KD.clamp_min(1)).view(n_clusters, n_batches, 1)
    has_centre = (n_KD >= _MIN_CELLS_PER_CENTRE).view(n_clusters, n_batches, 1).float()
    mean_KDZ = mean.view(n_clusters, n_batches, -1)
    n_centres_K11 = has_centre.sum(dim=1, keepdim=True).clamp_min(1)
    middle_K1Z = (mean_KDZ * has_centre).sum(dim=1, keepdim=True) / n_centres_K11
    by_chance = by_chance * (1 - 1 / n_centres_K11)  # the middle lies among the centres that it is the mean of
    apart = (((mean_KDZ - middle_K1Z).square().sum(dim=2, keepdim=True) - chance_share * by_chance) * has_centre).sum()
    return apart / has_centre.sum().clamp_min(1) / squared_B.mean().detach().clamp_min(1e-6)
