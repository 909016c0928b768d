"""The published protocol of integration (arXiv 2602.03477): whole encoder, batch adversary, SupCon, reconstruction.

All that tells batches or types reads the state LayerNorm([z; h_LAT]) of the unmasked cell, so that anchor, trunk and
gene embeddings are trained by it; the state is then the embedding. Reconstruction is the loss that the model was
pretrained on, of a share of each minibatch: what is scored is hidden from the network there, which the published
latent token does not do.

Shape letters: B cells of a minibatch, S state, D batches.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.config import NativeConfig, NativeObjectiveConfig
from scdiva.models.scdiva.classifier import native_trunk
from scdiva.models.scdiva.inputs import MaskedCells, OnDevice
from scdiva.models.scdiva.integration import (
    MONITOR,
    Score,
    batch_discriminator,
    reversal_factor,
    reverse_gradient,
    scored,
    supcon_loss,
    supcon_projection,
)
from scdiva.models.scdiva.native import SimpleModel
from scdiva.models.scdiva.objectives import DenoisedCells, NativeObjective, tokeniser_of
from scdiva.types import CellCounts, LossOutput

if TYPE_CHECKING:
    from scdiva.config import IntegrationConfig
    from scdiva.models.scdiva.model import ScDiVa

ENCODER_RATIO = 0.3
"""Learning rate of the encoder as a multiple of that of discriminator and projection, which start at random."""


@dataclass(frozen=True, slots=True)
class EncodedCells(OnDevice):
    """Whole cells, and some of them with what is hidden.

    Parameters
    ----------
    cells
        Unmasked.
    batch_B, label_B
        int64 codes; -1: an unknown type.
    denoised
        For reconstruction; None without.
    """

    cells: MaskedCells
    batch_B: torch.Tensor
    label_B: torch.Tensor
    denoised: DenoisedCells | None

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.cells.n_cells


class WholeEncoderObjective(nn.Module):
    """The loss of the published protocol on a whole encoder; on a copy, so that the model stays as it is.

    Parameters
    ----------
    model
        A native model with a trunk.
    config
        Weights; see :class:`~scdiva.config.IntegrationConfig`.
    batch, label
        ``(N,)`` int64 codes of each cell, by ``cells.cell_index``; label -1: unknown.
    max_steps
        Length of the training: the gradient of the adversary sets in over it.
    score
        Scores held-out cells by their labels: early stopping goes by it.

    Raises
    ------
    UnsupportedError
        The model is not native, or has no trunk.
    """

    step: torch.Tensor

    def __init__(
        self,
        model: ScDiVa,
        config: IntegrationConfig,
        batch: NDArray[np.int64],
        label: NDArray[np.int64],
        *,
        max_steps: int,
        score: Score | None = None,
    ) -> None:
        super().__init__()
        native, trunk = native_trunk(model, "integration of the whole encoder")
        network = copy.deepcopy(native).cpu().requires_grad_(True)
        assert isinstance(model.config, NativeConfig)
        n_tokens = min(model.config.trunk.max_tokens, config.max_tokens)
        self.sizes = model.config.model_copy(
            update={"embeds": "state", "trunk": model.config.trunk.model_copy(update={"max_tokens": n_tokens})}
        )
        self.config, self.max_steps, self.score = config, max_steps, score
        self.batch, self.label = batch, label
        # its floors are of evaluations, and it is not evaluated here: the network's own numbers fill their places
        floors = SimpleModel(
            network.anchor.log_profile,
            network.detection_logit,
            network.log_theta,
            float(network.mean_log_depth),
            torch.zeros(network.n_genes),
        )
        self.denoising = NativeObjective(network, NativeObjectiveConfig(), self.sizes, model.statistics, floors)
        self.tokeniser = tokeniser_of(self.sizes, model.statistics)
        n_state, n_batches = network.n_latent + trunk.transformer.width, int(batch.max()) + 1
        # PyTorch's layers draw their first weights from the global generator, which is the caller's
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # manual_seed would set those of all devices
            self.discriminator = batch_discriminator(n_state, n_batches, config)
            self.projection = supcon_projection(n_state, config)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def learning_rate_ratios(self) -> dict[nn.Parameter, float]:
        """Return multiples of the learning rate: of the encoder's weights."""
        return dict.fromkeys(self.denoising.network.parameters(), ENCODER_RATIO)

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> EncodedCells:
        """Read whole cells, and hide something of some of them, for training."""
        denoised = None
        if self.config.reconstruction_weight > 0:
            n_denoised = max(1, round(self.config.denoised_share * cells.n_cells))
            found = self.denoising.prepare(cells.take(rng.permutation(cells.n_cells)[:n_denoised]), rng)
            assert isinstance(found, DenoisedCells)
            denoised = found
        return self._read(cells, rng, denoised)

    def prepare_heldout(self, cells: CellCounts, rng: np.random.Generator) -> EncodedCells:
        """Read whole cells."""
        return self._read(cells, rng, None)

    def _read(self, cells: CellCounts, rng: np.random.Generator, denoised: DenoisedCells | None) -> EncodedCells:
        rows = cells.cell_index
        batch_B, label_B = (torch.from_numpy(codes[rows]) for codes in (self.batch, self.label))
        return EncodedCells(self.tokeniser.unmasked(cells, rng), batch_B, label_B, denoised)

    def forward(self, inputs: EncodedCells, generator: torch.Generator) -> LossOutput:
        """Return the weighted loss and its terms, means over cells (of reconstruction: over its share of them)."""
        config, network = self.config, self.denoising.network
        progress = 1.0
        if self.training:
            progress = float(self.step) / self.max_steps
            self.step += 1
        state_BS = network.cell_state(inputs.cells).float()
        parts: dict[str, tuple[float, torch.Tensor]] = {}
        # cosines need more than the eight bits that autocast would give the heads
        with torch.autocast(state_BS.device.type, enabled=False):
            if config.supcon_weight > 0 and bool((inputs.label_B >= 0).any()):
                read = self.projection if config.has_projection else nn.Identity()
                unit = F.normalize(read(state_BS), dim=1)
                parts["supcon"] = (config.supcon_weight, supcon_loss(unit, inputs.label_B, config.temperature))
            if config.adversarial_weight > 0:
                logit_BD = self.discriminator(reverse_gradient(state_BS, reversal_factor(progress)))
                parts["adversary"] = (config.adversarial_weight, F.cross_entropy(logit_BD, inputs.batch_B))
        terms: dict[str, torch.Tensor] = {}
        if inputs.denoised is not None:
            said = self.denoising(inputs.denoised, generator)
            parts["reconstruction"] = (config.reconstruction_weight, said.loss)
            terms |= said.terms
        # a minibatch without labels may have no part at all
        total = sum((weight * value for weight, value in parts.values()), start=0.0 * state_BS.sum())
        terms |= {name: value.detach() for name, (_, value) in parts.items()}
        if not self.training and self.score is not None:
            terms[MONITOR] = scored(self.score, state_BS, inputs.label_B, inputs.batch_B)
        return LossOutput(total, terms, inputs.n_cells)
