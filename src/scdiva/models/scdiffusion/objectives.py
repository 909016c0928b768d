"""What autoencoder, denoiser and classifiers are trained on, one after the other, by the same loop.

Shape letters: B cells, C classes, F condition fields, G genes, Z latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.data.thinning import split_counts
from scdiva.models.scdiffusion.autoencoder import Autoencoder, SparseCells, negative_binomial_nll
from scdiva.models.scdiffusion.published import AnyClassifier, AnyDenoiser
from scdiva.models.scdiffusion.schedule import Prediction, Schedule, alpha_bar, noised, spread_times, velocity
from scdiva.types import CellCounts, LossOutput

MIN_SNR_GAMMA = 5.0
"""Largest signal-to-noise ratio that counts in the weight of a time (Hang et al. 2023)."""
CONDITION_DROPOUT = 0.1
"""Probability that a field is left out, and, once more, that all are."""
SHARE_READ = (0.5, 0.9)
"""Share of a cell's molecules that the encoder reads in training; the decoder is judged on the others."""


PRIOR_PRECISION = 400.0
"""Of the weights of the decoder's last layer: 256 of them, with inputs near 0.6, move a gene by a half on the log."""
LABEL_WEIGHT = 0.02
"""Weight of the cross-entropy of each condition, in nats per cell, beside nats per UMI."""
GENE_LAYER_RATIO = 0.3
"""Learning rate of the layers with a row for each gene, in units of the usual one."""


@dataclass(frozen=True, slots=True)
class TwoViews:
    """Two parts of the molecules of some cells, one to encode and one to decode, and the codes of their labels."""

    read: SparseCells
    scored: SparseCells
    condition_BF: torch.Tensor

    def to(self, device: torch.device) -> TwoViews:
        """Return the same on another device."""
        return TwoViews(self.read.to(device), self.scored.to(device), self.condition_BF.to(device))


class AutoencoderObjective(nn.Module):
    """Negative binomial likelihood of molecules that the encoder has not read, in nats per UMI.

    Count splitting makes the two views of a cell independent given its state, so z must carry the state and gains
    nothing from carrying the noise; an autoencoder of thousands of cells and genes that is judged on what it read
    learns the noise by heart (our decision).

    The weights that belong to single genes, of the decoder's last layer, have a normal prior: what says little of a
    gene leaves it at its mean. They and the first layer of the encoder are trained slower than the rest: most genes are
    seen in few cells, and Adam would let their weights wander as fast as those of the others. (Our decision.)

    A linear classifier of each condition reads z, and its cross-entropy counts a little: labels that differ in few
    molecules (naive and memory T cells) would else be lost from a z that only the likelihood pays for. (Our decision.)

    Parameters
    ----------
    autoencoder
        What is trained.
    n_umis
        UMIs of the training cells, which the prior is weighed against.
    n_labels
        Labels of each condition field.
    """

    def __init__(self, autoencoder: Autoencoder, n_umis: float, n_labels: Sequence[int] = ()) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        # of no use after training; they start at zero, so that nothing here is drawn at random
        self.readers = nn.ModuleList(nn.Linear(autoencoder.n_latent, n) for n in n_labels)
        for parameter in self.readers.parameters():
            nn.init.zeros_(parameter)
        # in training a share of each cell's molecules is scored
        self.decay = PRIOR_PRECISION / max(n_umis * (1.0 - sum(SHARE_READ) / 2), 1.0)

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> TwoViews:
        """Split each cell's molecules."""
        read, scored = split_counts(cells, rng.uniform(*SHARE_READ, cells.n_cells), rng)
        condition_BF = torch.from_numpy(cells.condition.astype(np.int64))
        return TwoViews(SparseCells.pack(read), SparseCells.pack(scored), condition_BF)

    prepare_heldout = prepare

    def gene_vectors(self) -> list[nn.Parameter]:
        """Parameters with one number per gene."""
        return self.autoencoder.gene_vectors()

    def learning_rate_ratios(self) -> dict[nn.Parameter, float]:
        """Slow down the two layers that have a row for each gene."""
        return dict.fromkeys(self.autoencoder.gene_layers(), GENE_LAYER_RATIO)

    def forward(self, inputs: TwoViews, generator: torch.Generator) -> LossOutput:
        """Compute the loss of one minibatch."""
        model, scored = self.autoencoder, inputs.scored
        raw_BZ = model.raw_latent(inputs.read)
        log_share_BG = model.log_share_of_raw(raw_BZ)
        log_mu_BG = log_share_BG + scored.depth_B.clamp_min(1e-3).log()[:, None]
        nll_B = negative_binomial_nll(log_mu_BG, model.log_theta_G, scored)
        loss = nll_B.sum() / scored.depth_B.sum().clamp_min(1.0)
        if self.training:
            loss = loss + 0.5 * self.decay * model.gene_layers()[-1].square().sum()
            for field, reader in enumerate(self.readers):
                code_B = inputs.condition_BF[:, field]
                nll_B = F.cross_entropy(reader(raw_BZ).float(), (code_B - 1).clamp_min(0), reduction="none")
                loss = loss + LABEL_WEIGHT * (nll_B * (code_B > 0)).mean()
        return LossOutput(loss, n_cells=scored.n_cells)


@dataclass(frozen=True, slots=True)
class LatentCells:
    """z, standardised log depth and condition codes of some cells."""

    z_BZ: torch.Tensor
    depth_B: torch.Tensor
    condition_BF: torch.Tensor

    def to(self, device: torch.device) -> LatentCells:
        """Return the same on another device."""
        return LatentCells(self.z_BZ.to(device), self.depth_B.to(device), self.condition_BF.to(device))


@dataclass(frozen=True, slots=True, eq=False)
class LatentTable:
    """z of all cells of a run, computed once: the autoencoder no longer changes.

    Parameters
    ----------
    z
        ``(n_views * n_cells, Z)`` float32, standardised; row i of each block of ``n_cells`` is the cell whose
        ``cell_index`` is i. Of several views of a cell one is looked up at random.
    depth
        ``(n_cells,)`` float32 standardised log depth.
    """

    z: NDArray[np.float32]
    depth: NDArray[np.float32]

    def of(self, cells: CellCounts, rng: np.random.Generator) -> LatentCells:
        """Look cells up."""
        n_cells = self.depth.size
        row = cells.cell_index
        if self.z.shape[0] > n_cells:
            row = row + n_cells * rng.integers(self.z.shape[0] // n_cells, size=row.size)
        return LatentCells(
            torch.from_numpy(self.z[row]),
            torch.from_numpy(self.depth[cells.cell_index]),
            torch.from_numpy(cells.condition.astype(np.int64)),
        )


class DenoiserObjective(nn.Module):
    """Squared error of velocity or noise, with fields left out at random.

    Times weigh as ``min(SNR, 5)`` does in the error of z: ``min(SNR, 5) / (SNR + 1)`` for the velocity, ``min(SNR, 5) /
    SNR`` for the noise (Hang et al. 2023); unweighted as published (Luo et al. 2024). Depth is left out (0) as
    often as a field.

    Parameters
    ----------
    denoiser
        What is trained.
    table
        z of all cells.
    n_times, schedule, prediction
        The process, and what is predicted.
    is_weighted
        Whether times weigh differently.
    """

    alpha_bar_T: torch.Tensor

    def __init__(
        self,
        denoiser: AnyDenoiser,
        table: LatentTable,
        n_times: int,
        *,
        schedule: Schedule = "cosine",
        prediction: Prediction = "v",
        is_weighted: bool = True,
    ) -> None:
        super().__init__()
        self.denoiser, self.table = denoiser, table
        self.prediction, self.is_weighted = prediction, is_weighted
        self.register_buffer("alpha_bar_T", alpha_bar(schedule, n_times))

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> LatentCells:
        """Look up z."""
        return self.table.of(cells, rng)

    prepare_heldout = prepare

    def forward(self, inputs: LatentCells, generator: torch.Generator) -> LossOutput:
        """Compute the loss of one minibatch."""
        z_BZ, device = inputs.z_BZ, inputs.z_BZ.device
        n_cells, n_fields = inputs.condition_BF.shape
        t_B = spread_times(n_cells, self.alpha_bar_T.numel(), generator, device)
        noise_BZ = torch.randn(z_BZ.shape, generator=generator, device=device)
        condition_BF, depth_B = inputs.condition_BF, inputs.depth_B
        if self.training:
            u = torch.rand((n_cells, n_fields + 2), generator=generator, device=device)
            is_out = u < CONDITION_DROPOUT
            condition_BF = condition_BF.masked_fill(is_out[:, :n_fields] | is_out[:, -1:], 0)
            depth_B = depth_B.masked_fill(is_out[:, n_fields], 0.0)
        alpha_bar_B = self.alpha_bar_T[t_B]
        found_BZ = self.denoiser(noised(z_BZ, noise_BZ, alpha_bar_B), t_B, depth_B, condition_BF).float()
        is_v = self.prediction == "v"
        target_BZ = velocity(z_BZ, noise_BZ, alpha_bar_B) if is_v else noise_BZ
        squared_B = (found_BZ - target_BZ).square().mean(dim=1)
        weight_B = torch.ones_like(squared_B)
        if self.is_weighted:
            snr_B = alpha_bar_B / (1.0 - alpha_bar_B)
            weight_B = snr_B.clamp(max=MIN_SNR_GAMMA) / (snr_B + 1.0 if is_v else snr_B)
        terms = {"velocity_mse" if is_v else "noise_mse": squared_B.mean().detach()}
        return LossOutput((weight_B * squared_B).mean(), terms, n_cells=n_cells)


class ClassifierObjective(nn.Module):
    """Cross-entropy of a field's label given noised z, at all noise levels; cells without a label do not count.

    Ours lets labels weigh alike whatever their numbers of cells: a guide that knows a rare type only as improbable
    guides badly.

    Parameters
    ----------
    classifier
        What is trained.
    table
        z of all cells.
    field
        Position of the field among the condition codes.
    n_times, schedule
        The process.
    weight_C
        ``(C,)`` weight of each class.
    guided_times
        Only times below this one are trained on; None: all.
    """

    alpha_bar_T: torch.Tensor
    weight_C: torch.Tensor

    def __init__(
        self,
        classifier: AnyClassifier,
        table: LatentTable,
        field: int,
        n_times: int,
        weight_C: NDArray[np.float32],
        *,
        schedule: Schedule = "cosine",
        guided_times: int | None = None,
    ) -> None:
        super().__init__()
        self.classifier, self.table, self.field = classifier, table, field
        self.register_buffer("alpha_bar_T", alpha_bar(schedule, n_times)[:guided_times].clone())
        self.register_buffer("weight_C", torch.from_numpy(weight_C))

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> LatentCells:
        """Look up z."""
        return self.table.of(cells, rng)

    prepare_heldout = prepare

    def forward(self, inputs: LatentCells, generator: torch.Generator) -> LossOutput:
        """Compute the loss of one minibatch."""
        z_BZ, code_B = inputs.z_BZ, inputs.condition_BF[:, self.field]
        t_B = spread_times(code_B.numel(), self.alpha_bar_T.numel(), generator, z_BZ.device)
        noise_BZ = torch.randn(z_BZ.shape, generator=generator, device=z_BZ.device)
        logits_BC = self.classifier(noised(z_BZ, noise_BZ, self.alpha_bar_T[t_B]), t_B).float()
        class_B = (code_B - 1).clamp_min(0)
        weight_B = self.weight_C[class_B] * (code_B > 0)
        nll_B = F.cross_entropy(logits_BC, class_B, reduction="none")
        loss = (weight_B * nll_B).sum() / weight_B.sum().clamp_min(1e-6)
        is_clean_B = (self.alpha_bar_T[t_B] > _CLEAN) & (code_B > 0)
        is_right_B = (logits_BC.argmax(dim=1) == class_B) & is_clean_B
        accuracy = is_right_B.sum() / is_clean_B.sum().clamp_min(1)
        return LossOutput(loss, {"accuracy_little_noise": accuracy.detach()}, n_cells=int(code_B.numel()))


_CLEAN = 0.9
