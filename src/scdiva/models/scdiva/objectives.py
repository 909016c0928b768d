"""What the native network is trained on, and how it is judged on held-out cells.

Shape letters: B cells, N tokens or stored counts of all cells together, M hidden genes, V visible genes with a hidden
value, X both, G genes, E gene embedding, Z latent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import nn

from scdiva.data.statistics import GeneStatistics
from scdiva.data.thinning import split_counts
from scdiva.diffusion import draw_masks, exact_count_masks, stratified_times
from scdiva.losses import inclusion_nll, profile_nll, slot_nll, ztnb_expected_log1p, ztnb_nll
from scdiva.models.scdiva.inputs import MaskedCells, OnDevice, PackedCells, Profile, Targets, Tokeniser
from scdiva.models.scdiva.native import PER_GENE, DenoiserOutput, NativeNetwork, SimpleModel
from scdiva.serialization import TokenOrder
from scdiva.types import CellCounts, LossOutput

if TYPE_CHECKING:
    from scdiva.config import NativeConfig, NativeObjectiveConfig

HELDOUT_TIMES = (0.1, 0.5, 0.9)
"""Shares of hidden genes at which held-out cells are judged."""


@dataclass(frozen=True, slots=True)
class SplitViews(OnDevice):
    """Two independent views of the same cells: the anchor sees A, the profile decoder is scored on B.

    Parameters
    ----------
    view_a
        Packed view A.
    profile
        View B.
    """

    view_a: PackedCells
    profile: Profile

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.view_a.offset_B.numel())


@dataclass(frozen=True, slots=True)
class DenoisedCells(OnDevice):
    """Cells at time t with the answers, and the counts that the profile decoder is scored on.

    Parameters
    ----------
    cells, targets
        What the network sees, and what is hidden.
    profile
        View B of the cells whose z comes from view A; no counts of the others.
    """

    cells: MaskedCells
    targets: Targets
    profile: Profile


@dataclass(frozen=True, slots=True)
class HeldoutCells(OnDevice):
    """Held-out cells: split views, and fixed masks at :data:`HELDOUT_TIMES` with z from the visible tokens.

    Parameters
    ----------
    split
        For the profile.
    at
        One per time; none where the trunk's tasks have no weight.
    """

    split: SplitViews
    at: tuple[DenoisedCells, ...]


class NativeObjective(nn.Module):
    """The loss of the native model: identity, value and profile, in nats.

    *No leak* (set layout). Of what is scored only totals reach the network: how many genes are hidden, and the depth. A
    cell is treated in one of three ways: z comes from view A ~ Binomial(x, rho) and view B = x - A is denoised
    (``p_split``; the views are independent given the cell's rates, so z must carry the cell's state and cannot carry
    the answer; the spread of rho is the depth augmentation); or z pools the visible tokens of the whole cell
    (``p_visible``); or z is the learned null. With ``p_whole`` a fourth way is added, for generation from a prior over
    z: z comes from view A, and the whole cell is denoised.

    *Weights.* Means over the hidden tokens of each cell, then over cells: the ELBO's weight 1/t up to a constant
    (MDLM). Times are stratified over the minibatch. (All our decisions.)

    Parameters
    ----------
    network
        The network that is trained.
    config
        Shares of the training modes, weights, KL and noise.
    model
        The network's configuration.
    statistics
        Of the training corpus: they rank tokens.
    simple
        The simple model: the floors of the evaluation.
    """

    floor_log_profile: torch.Tensor
    floor_detection_logit: torch.Tensor
    floor_log_theta: torch.Tensor
    mean_value: torch.Tensor

    def __init__(
        self,
        network: NativeNetwork,
        config: NativeObjectiveConfig,
        model: NativeConfig,
        statistics: GeneStatistics,
        simple: SimpleModel,
    ) -> None:
        super().__init__()
        if config.freeze_anchor:
            network.anchor.requires_grad_(False)
        self.network = network
        self.config = config
        self.likelihood = model.trunk.value_likelihood
        self.has_trunk_tasks = config.identity_weight > 0 or config.value_weight > 0
        self.tokeniser = tokeniser_of(model, statistics)
        for name, value in (
            ("floor_log_profile", simple.log_profile_G),
            ("floor_detection_logit", simple.detection_logit_G),
            ("floor_log_theta", simple.log_theta_G),
            ("mean_value", simple.mean_value_G),
        ):
            self.register_buffer(name, value.detach().clone(), persistent=False)
        self.log_sigma: nn.Linear | None = None
        if config.kl_weight > 0:
            self.log_sigma = nn.Linear(model.n_embedding, network.n_latent)
            nn.init.zeros_(self.log_sigma.weight)
            nn.init.constant_(self.log_sigma.bias, -2.0)

    def gene_vectors(self) -> list[nn.Parameter]:
        """Return the weights that hold one number per gene."""
        return [p for name, p in self.network.named_parameters() if name in PER_GENE and p.ndim == 1]

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> SplitViews | DenoisedCells:
        """Split, mask and pack cells for training."""
        if not self.has_trunk_tasks:
            return self._split(cells, rng)
        config, n_cells = self.config, cells.n_cells
        treatment = rng.random(n_cells)
        is_split = treatment < config.p_split
        is_null = treatment >= config.p_split + config.p_whole + config.p_visible
        is_whole = ~is_split & (treatment < config.p_split + config.p_whole)
        has_view = is_split | is_whole
        rho = np.where(has_view, rng.uniform(config.rho_min, config.rho_max, n_cells), 0.0)
        view_a, view_b = split_counts(cells, rho, rng)
        if is_whole.any():
            view_b = _with_rows(view_b, cells, is_whole)
        kind = np.searchsorted(
            np.cumsum([config.p_joint, config.p_values, config.p_staged]), rng.random(n_cells), side="right"
        )
        n_tokens = np.diff(view_b.counts.indptr)
        masks = draw_masks(n_tokens, kind, stratified_times(n_cells, rng), rng)
        masked, targets = self.tokeniser.corrupt(
            view_b,
            masks,
            rng,
            view=view_a,
            reads_view=has_view,
            is_null=is_null,
            condition_dropout=config.condition_dropout,
        )
        return DenoisedCells(masked, targets, Profile.of(view_b, is_split, masked.is_measured_BG))

    def prepare_heldout(self, cells: CellCounts, rng: np.random.Generator) -> HeldoutCells:
        """Split held-out cells, and mask them at each of :data:`HELDOUT_TIMES`."""
        if not self.has_trunk_tasks:
            return HeldoutCells(self._split(cells, rng), ())
        # masks first: what else draws from rng depends on settings, the masks must not
        n_tokens = np.diff(cells.counts.indptr)
        masks = [exact_count_masks(n_tokens, t, rng) for t in HELDOUT_TIMES]
        split = self._split(cells, rng)
        at = [DenoisedCells(*self.tokeniser.corrupt(cells, mask, rng), split.profile) for mask in masks]
        return HeldoutCells(split, tuple(at))

    def _split(self, cells: CellCounts, rng: np.random.Generator) -> SplitViews:
        rho = rng.uniform(self.config.rho_min, self.config.rho_max, cells.n_cells)
        view_a, view_b = split_counts(cells, rho, rng)
        return SplitViews(PackedCells.pack(view_a), Profile.of(view_b))

    def forward(self, inputs: SplitViews | DenoisedCells | HeldoutCells, generator: torch.Generator) -> LossOutput:
        """Return the weighted loss and its terms, means over cells.

        Training gives ``identity_nll`` (nats per hidden gene), ``value_nll`` (nats per hidden value; squared error of
        log1p(CP10K) for ``value_likelihood = "mse"``) and ``profile_nll`` (nats per UMI of view B). Held-out cells
        give the first two for each time, ``value_mae`` (error of log1p(CP10K)), and beside each its floor: detection
        frequencies, corpus profile times depth, gene mean with cell offset, corpus profile.
        """
        if isinstance(inputs, HeldoutCells):
            return self._evaluate(inputs, generator)
        terms: dict[str, torch.Tensor] = {}
        if isinstance(inputs, SplitViews):
            z_BZ, penalty = self._latent(inputs.view_a, generator, terms)
            nll = _profile_nll(self.network.anchor.log_rates(z_BZ), inputs.profile).mean()
            terms["profile_nll"] = nll.detach()
            return LossOutput(self.config.profile_weight * nll + penalty, terms, inputs.n_cells)
        cells, targets, network = inputs.cells, inputs.targets, self.network
        z_BZ, penalty = self._latent(cells.anchor, generator, terms)
        output = network(cells, torch.where(cells.is_null_B[:, None], network.null_latent, z_BZ))
        loss = penalty
        parts = {
            "identity_nll": (self.config.identity_weight, *self._identity(output, cells, targets)),
            "value_nll": (self.config.value_weight, *self._value(output, cells, targets)[:2]),
            "profile_nll": (
                self.config.profile_weight,
                _profile_nll(output.log_rate_BG, inputs.profile),
                inputs.profile.n_umis_B > 0,
            ),
        }
        for name, (weight, value_B, is_scored_B) in parts.items():
            mean = _mean_over(value_B, is_scored_B)
            terms[name] = mean.detach()
            loss = loss + weight * mean
        n_tokens = output.states.packing.n_tokens if output.states is not None else 0
        return LossOutput(loss, terms, cells.n_cells, n_tokens, network.flops(output))

    def _latent(
        self, view: PackedCells, generator: torch.Generator, terms: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z, with noise in training where there is any, and the KL penalty."""
        pooled = self.network.pooled(view)
        z_BZ = self.network.anchor.encode(pooled).float()
        penalty = torch.zeros((), device=z_BZ.device)
        if self.log_sigma is not None:
            log_sigma = self.log_sigma(pooled).float().clamp(-6.0, 2.0)
            kl = (0.5 * (z_BZ.square() + torch.exp(2 * log_sigma) - 1) - log_sigma).sum(dim=1).mean()
            terms["kl"] = kl.detach()
            if self.training:
                penalty = self.config.kl_weight * kl
                z_BZ = z_BZ + torch.exp(log_sigma) * _noise_like(z_BZ, generator)
        if self.training and self.config.latent_noise > 0:
            z_BZ = z_BZ + self.config.latent_noise * _noise_like(z_BZ, generator)
        return z_BZ, penalty

    def _identity(
        self, output: DenoiserOutput, cells: MaskedCells, targets: Targets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of the hidden genes of each cell, and which cells have any."""
        is_scored_B = cells.n_hidden_B > 0
        trunk = self.network.trunk
        if trunk is None or not trunk.is_sequence or output.states is None:
            nll_B = inclusion_nll(
                output.gene_logit_BG, cells.is_admissible_BG, cells.n_hidden_B, targets.cell_M, targets.gene_M
            )
            return nll_B, is_scored_B
        nll_M = slot_nll(
            output.gene_logit_BG,
            cells.is_admissible_BG,
            cells.n_hidden_B,
            trunk.query_direction(output.states.slot_SD[targets.slot_M]),
            self.network.anchor.gene_embedding,
            targets.cell_M,
            targets.gene_M,
        )
        return _mean_per_cell(nll_M, targets.cell_M, cells.n_cells), is_scored_B

    def _value(
        self, output: DenoiserOutput, cells: MaskedCells, targets: Targets
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss and absolute error of the hidden values of each cell, and (second) which cells have any."""
        network, states, trunk = self.network, output.states, self.network.trunk
        hidden = visible = None
        if states is not None and trunk is not None:
            if trunk.is_sequence:
                hidden = trunk.value_direction(states.slot_SD[targets.slot_M])
            else:  # one direction per cell, for all of its hidden genes
                hidden = trunk.value_direction(states.query_BD)[targets.cell_M]
            visible = trunk.value_direction(states.token_ND[targets.token_V])
        log_mean_X = torch.cat(
            [
                network.log_mean(output, targets.cell_M, targets.gene_M, hidden),
                network.log_mean(output, targets.cell_V, targets.gene_V, visible),
            ]
        )
        cell_X, _, count_X, value_X = targets.values()
        log_theta_X = torch.cat(
            [
                network.log_dispersion(output, targets.cell_M, targets.gene_M, hidden),
                network.log_dispersion(output, targets.cell_V, targets.gene_V, visible),
            ]
        )
        # CP10K of one UMI: the library of a cell has genes beyond the vocabulary, which its depth here has not
        scale_X = torch.expm1(value_X) / count_X
        expected_X = ztnb_expected_log1p(log_mean_X, log_theta_X, scale_X)
        if self.likelihood == "ztnb":
            loss_X = ztnb_nll(count_X, log_mean_X, log_theta_X)
        else:
            loss_X = (expected_X - value_X).square()
        return self._per_cell(loss_X, (expected_X - value_X).abs().detach(), cell_X, cells.n_cells)

    def _floor_value(self, cells: MaskedCells, targets: Targets) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As :meth:`_value`, of the corpus profile times depth; the error is that of gene mean with cell offset."""
        cell_X, gene_X, count_X, value_X = targets.values()
        total_B = self.floor_log_profile.masked_fill(~cells.is_measured_BG, float("-inf")).logsumexp(dim=1)
        log_mean_X = cells.depth_B.clamp_min(1.0).log()[cell_X] + self.floor_log_profile[gene_X] - total_B[cell_X]
        expected_X = self.mean_value[gene_X] + self._cell_offset(cells)[cell_X]
        if self.likelihood == "ztnb":
            loss_X = ztnb_nll(count_X, log_mean_X, self.floor_log_theta[gene_X])
        else:
            loss_X = (expected_X - value_X).square()
        return self._per_cell(loss_X, (expected_X - value_X).abs(), cell_X, cells.n_cells)

    def _cell_offset(self, cells: MaskedCells) -> torch.Tensor:
        """How far the known values of each cell lie above their genes' means, on average; 0 where none is known.

        The anchor of held-out cells pools all of the known tokens, those beyond L included.
        """
        known, n_cells = cells.anchor, cells.n_cells
        lengths_B = torch.diff(known.offset_B, append=known.offset_B.new_tensor([known.gene_N.numel()]))
        cell_N = torch.arange(n_cells, device=lengths_B.device).repeat_interleave(lengths_B)
        return _mean_per_cell(known.value_N - self.mean_value[known.gene_N], cell_N, n_cells)

    @staticmethod
    def _per_cell(
        loss_X: torch.Tensor, error_X: torch.Tensor, cell_X: torch.Tensor, n_cells: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        is_scored_B = torch.zeros(n_cells, dtype=torch.bool, device=cell_X.device).index_fill_(0, cell_X, True)
        return _mean_per_cell(loss_X, cell_X, n_cells), is_scored_B, _mean_per_cell(error_X, cell_X, n_cells)

    def _evaluate(self, inputs: HeldoutCells, generator: torch.Generator) -> LossOutput:
        terms: dict[str, torch.Tensor] = {}
        z_BZ, penalty = self._latent(inputs.split.view_a, generator, terms)
        n_cells, profile = inputs.split.n_cells, inputs.split.profile
        nll = _profile_nll(self.network.anchor.log_rates(z_BZ), profile).mean()
        floor = _profile_nll(self.floor_log_profile.expand(n_cells, -1), profile).mean()
        terms |= {"profile_nll": nll, "profile_nll_floor": floor}
        loss = self.config.profile_weight * nll + penalty
        n_tokens = n_flops = 0
        for t, denoised in zip(HELDOUT_TIMES, inputs.at, strict=False):
            cells, targets = denoised.cells, denoised.targets
            output = self.network(cells)
            found = {
                "identity_nll": self._identity(output, cells, targets),
                "value_nll": (value := self._value(output, cells, targets))[:2],
                "value_mae": (value[2], value[1]),
            }
            floors = {
                "identity_nll": self._floor_identity(cells, targets),
                "value_nll": (value := self._floor_value(cells, targets))[:2],
                "value_mae": (value[2], value[1]),
            }
            for name, (value_B, is_scored_B) in found.items():
                terms[f"{name}_t{t}"] = _mean_over(value_B, is_scored_B)
                terms[f"{name}_t{t}_floor"] = _mean_over(*floors[name])
            share = 1 / len(HELDOUT_TIMES)
            loss = loss + share * self.config.identity_weight * terms[f"identity_nll_t{t}"]
            loss = loss + share * self.config.value_weight * terms[f"value_nll_t{t}"]
            if output.states is not None:
                n_tokens += output.states.packing.n_tokens
                n_flops += self.network.flops(output)
        return LossOutput(loss, {k: v.detach() for k, v in terms.items()}, n_cells, n_tokens, n_flops)

    def _floor_identity(self, cells: MaskedCells, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
        if targets.slot_M.numel():  # a choice of the hidden genes is scored
            nll_M = slot_nll(
                self.floor_detection_logit.expand(cells.n_cells, -1),
                cells.is_admissible_BG,
                cells.n_hidden_B,
                None,
                self.network.anchor.gene_embedding,
                targets.cell_M,
                targets.gene_M,
            )
            return _mean_per_cell(nll_M, targets.cell_M, cells.n_cells), cells.n_hidden_B > 0
        logits = self.floor_detection_logit.expand(cells.n_cells, -1)
        nll_B = inclusion_nll(logits, cells.is_admissible_BG, cells.n_hidden_B, targets.cell_M, targets.gene_M)
        return nll_B, cells.n_hidden_B > 0


def _with_rows(cells: CellCounts, other: CellCounts, is_other: NDArray[np.bool_]) -> CellCounts:
    """Return cells with some of them replaced by those of ``other`` in the same places."""
    rows = np.arange(cells.n_cells) + np.where(is_other, cells.n_cells, 0)
    return replace(
        cells,
        counts=sp.vstack([cells.counts, other.counts], format="csr")[rows],
        library_size=np.where(is_other, other.library_size, cells.library_size),
    )


def tokeniser_of(model: NativeConfig, statistics: GeneStatistics) -> Tokeniser:
    """Return how a model's cells become tokens."""
    trunk = model.trunk
    has_positions = trunk.layout == "sequence" and trunk.n_layers > 0  # without a trunk no hidden gene has a place
    return Tokeniser(statistics, trunk.max_tokens, TokenOrder(trunk.order), has_positions)


def _profile_nll(log_rate_BG: torch.Tensor, profile: Profile) -> torch.Tensor:
    return profile_nll(log_rate_BG, profile.cell_N, profile.gene_N, profile.count_N, profile.is_measured_BG)


def _mean_per_cell(value_X: torch.Tensor, cell_X: torch.Tensor, n_cells: int) -> torch.Tensor:
    total_B = torch.zeros(n_cells, dtype=torch.float32, device=value_X.device)
    number_B = torch.zeros_like(total_B).index_add_(0, cell_X, torch.ones_like(value_X, dtype=torch.float32))
    return total_B.index_add(0, cell_X, value_X.float()) / number_B.clamp_min(1.0)


def _mean_over(value_B: torch.Tensor, is_scored_B: torch.Tensor) -> torch.Tensor:
    return torch.where(is_scored_B, value_B, 0.0).sum() / is_scored_B.sum().clamp_min(1)


def _noise_like(z: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(z.shape, generator=generator, device=z.device)
