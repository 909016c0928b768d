"""What a network adds to the simple predictors of a perturbation, gene by gene and control cell by control cell.

The trunk reads a control cell, unmasked, with the [PERT] tokens of what is done to it. Then every gene of the panel is
asked for, whether the cell's tokens hold it or not (a gene-query regressor; scDiVa's paper names a regressor, its form
is our decision): the correction of gene j in cell b is

    a(s_b) · B e_j + MLP([s_b; e_j; v_bj; mean control value of j; what the simple predictors say of j])

with s_b = LayerNorm([z; h_LAT; mean h_PERT]) and scores of what the simple predictors say along the main effects of
training, and e_j the gene's embedding and its weights in these main effects. Both parts are zero at the start: before
the first step the prediction is that of the simple predictors, and a step is kept only where it does better on
conditions that were held out.

Shape letters: B control cells, P genes of the panel, E gene embedding, S state, H hidden, R rank, K places.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.config import NativeConfig
from scdiva.models.scdiva.classifier import native_trunk
from scdiva.models.scdiva.inputs import MaskedCells, OnDevice
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.models.scdiva.perturbation_tokens import PerturbationCoder, PerturbationCodes, PerturbationTokens
from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts, LossOutput

if TYPE_CHECKING:
    from scdiva.models.scdiva.model import ScDiVa

N_HIDDEN, RANK = 48, 16
"""Width of the regressor's MLP, and rank of its bilinear part."""
TOP_GENES = 50
"""Most changed genes of a condition that the ranking part of the loss puts before others."""
RANK_WEIGHT, SIGN_WEIGHT, TEMPERATURE = 0.5, 0.1, 0.1
WEIGHT_FLOOR = 0.05
DROPOUT = 0.2
"""On what the regressor reads of a cell and of its perturbation: training conditions are few."""
MAX_TOKENS = 128
"""Best-ranked tokens of a control cell that the trunk reads; [PERT] tokens are not among them and never dropped."""
N_DESCRIBED = 3
"""Numbers per main effect that say what the simple predictors say (``BasePredictor.described``)."""
TRUNK_RATIO = 0.1
"""Learning rate of the trunk's layers, as a multiple of the regressor's."""


class GeneQueryRegressor(nn.Module):
    """Correction of every gene of a panel, zero at the start.

    Parameters
    ----------
    n_state, n_embedding
        S and E.
    generator
        Randomness of the start.
    """

    def __init__(self, n_state: int, n_embedding: int, generator: torch.Generator) -> None:
        super().__init__()
        self.of_state = nn.Linear(n_state, N_HIDDEN)
        self.of_gene = nn.Linear(n_embedding, N_HIDDEN, bias=False)
        self.of_values = nn.Linear(3, N_HIDDEN, bias=False)
        self.out = nn.Linear(N_HIDDEN, 1)
        self.left = nn.Linear(n_state, RANK)
        self.right = nn.Linear(n_embedding, RANK, bias=False)
        for layer in (self.of_state, self.of_gene, self.of_values, self.right):
            nn.init.uniform_(layer.weight, -(layer.in_features**-0.5), layer.in_features**-0.5, generator=generator)
        nn.init.zeros_(self.of_state.bias)
        for layer in (self.out, self.left):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, state_BS: torch.Tensor, gene_PE: torch.Tensor, values_BP3: torch.Tensor) -> torch.Tensor:
        """Return corrections, ``(B, P)``."""
        hidden_BPH = self.of_state(state_BS)[:, None] + self.of_gene(gene_PE)[None] + self.of_values(values_BP3)
        bilinear_BP = self.left(state_BS) @ self.right(gene_PE).T
        return self.out(F.silu(hidden_BPH)).squeeze(-1) + bilinear_BP


@dataclass(frozen=True, slots=True)
class ControlInputs(OnDevice):
    """Control cells and what is done to them.

    Parameters
    ----------
    cells
        What the trunk reads.
    codes
        Perturbations.
    values_BP3
        float32: each gene's log1p(CP10K) in the cell, its mean over control cells, and the simple predictors' change.
    described_BX
        float32: what the simple predictors say, in few numbers.
    target_BP, weight_BP
        float32 measured change and weight of each gene; no columns where nothing is to be learned.
    """

    cells: MaskedCells
    codes: PerturbationCodes
    values_BP3: torch.Tensor
    described_BX: torch.Tensor
    target_BP: torch.Tensor
    weight_BP: torch.Tensor


class PerturbationNetwork(nn.Module):
    """The native network with [PERT] tokens and a gene-query regressor; a copy, the model stays as it is.

    Parameters
    ----------
    model
        A native model with a trunk.
    coder
        Turns perturbations into codes.
    panel
        ``(P,)`` genes of the vocabulary that are predicted.
    axes
        ``(K, P)`` main effects of training, orthonormal.
    n_trained_layers
        Last layers of the trunk that are trained; all in the paper.
    seed
        Of the start.

    Raises
    ------
    UnsupportedError
        The model is not native, or has no trunk.
    """

    def __init__(
        self,
        model: ScDiVa,
        coder: PerturbationCoder,
        panel: NDArray[np.integer],
        axes: NDArray[np.floating],
        *,
        n_trained_layers: int,
        seed: int = 0,
    ) -> None:
        super().__init__()
        native, trunk = native_trunk(model, "perturbation prediction")
        assert isinstance(model.config, NativeConfig)
        generator = torch.Generator().manual_seed(seed)
        network = copy.deepcopy(native).requires_grad_(False)
        width = trunk.transformer.width
        # PyTorch's layers draw their first weights from the global generator, which is the caller's
        with torch.random.fork_rng(devices=[]):
            self.tokens = PerturbationTokens(width, len(coder.names), generator)
            n_state = network.n_latent + 2 * width + N_DESCRIBED * axes.shape[0]
            self.regressor = GeneQueryRegressor(n_state, network.n_embedding + axes.shape[0], generator)
        assert network.trunk is not None
        if n_trained_layers:
            network.trunk.transformer.norm.requires_grad_(True)
            network.trunk.transformer.layers[-n_trained_layers:].requires_grad_(True)
        self.network = network
        self.coder = coder
        tokeniser = tokeniser_of(model.config, model.statistics)
        self.tokeniser = replace(tokeniser, max_tokens=min(tokeniser.max_tokens, MAX_TOKENS))
        self.register_buffer("panel", torch.from_numpy(np.asarray(panel, dtype=np.int64)), persistent=False)
        # of order one, as embeddings are
        weight_PK = torch.from_numpy(np.asarray(axes, dtype=np.float32).T * np.float32(axes.shape[1] ** 0.5))
        self.register_buffer("weight_PK", weight_PK, persistent=False)
        self.to(model.device)

    panel: torch.Tensor
    weight_PK: torch.Tensor

    def states(self, cells: MaskedCells, codes: PerturbationCodes) -> torch.Tensor:
        """Return LayerNorm([z; h_LAT; mean h_PERT]), ``(B, S)``."""
        network = self.network
        trunk = network.trunk
        assert trunk is not None
        z_BZ = network.latent(cells)
        tokens_BKD = self.tokens(codes, trunk.gene, network.anchor.gene_embedding)
        said = trunk(cells, z_BZ, network.anchor.gene_embedding, network.mean_log_depth, extra_BKD=tokens_BKD)
        is_there_BK = (codes.what_BK > 0)[..., None]
        pert_BD = (said.extra_BKD * is_there_BK).sum(dim=1) / is_there_BK.sum(dim=1).clamp_min(1)
        joined = torch.cat([z_BZ, said.lat_BD.float(), pert_BD.float()], dim=1)
        return F.layer_norm(joined, joined.shape[1:])

    def forward(self, inputs: ControlInputs) -> torch.Tensor:
        """Return what is added to the simple predictors' change, ``(B, P)``."""
        gene_PE = torch.cat([self.network.anchor.gene_embedding[self.panel], self.weight_PK], dim=1)
        state_BS = torch.cat([self.states(inputs.cells, inputs.codes), inputs.described_BX], dim=1)
        state_BS = F.dropout(state_BS, DROPOUT, self.training)
        return self.regressor(state_BS, gene_PE, inputs.values_BP3).float()

    def inputs(
        self,
        cells: CellCounts,
        codes: PerturbationCodes,
        control_mean_BP: NDArray[np.floating],
        base_BP: NDArray[np.floating],
        described_BX: NDArray[np.floating],
        target_BP: NDArray[np.floating] | None = None,
        weight_BP: NDArray[np.floating] | None = None,
    ) -> ControlInputs:
        """Pack control cells; every argument has a row per cell."""
        n_fields = 0 if self.network.trunk is None else len(self.network.trunk.labels)
        counts = cells.counts.copy()
        counts.data = log1p_cp10k(cells)
        values_BP = counts[:, self.panel.cpu().numpy()].toarray()
        untold = np.zeros((cells.n_cells, n_fields), dtype=np.int32)
        told = CellCounts(
            cells.counts, cells.library_size, cells.cell_index, cells.source_of_cell, cells.is_measured, untold
        )
        nothing = np.zeros((cells.n_cells, 0), dtype=np.float32)
        three = np.stack([values_BP, control_mean_BP, base_BP], axis=-1).astype(np.float32)
        as_tensor = torch.from_numpy
        return ControlInputs(
            # the generator is used by the random order of the ordering ablation only
            self.tokeniser.unmasked(told, np.random.default_rng(0)),
            codes,
            as_tensor(three),
            as_tensor(np.ascontiguousarray(described_BX, dtype=np.float32)),
            as_tensor(nothing if target_BP is None else np.asarray(target_BP, dtype=np.float32)),
            as_tensor(nothing if weight_BP is None else np.asarray(weight_BP, dtype=np.float32)),
        )

    def trained(self) -> dict[str, torch.Tensor]:
        """Return the weights that are not the base model's, by name."""
        return {
            name: parameter.detach().float().cpu() for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }  # fmt: skip

    @torch.no_grad()
    def load_trained(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Take over what :meth:`trained` returned."""
        own = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def gene_weights(score: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return weights of genes in the loss: squared, min-max-scaled |score|, at least :data:`WEIGHT_FLOOR`.

    As in the calibrated metrics of Mejia et al. 2025 (arXiv:2506.22641), with a floor (our decision).

    Parameters
    ----------
    score
        ``(P,)`` t statistics of a perturbation against all others, or against control where there is no other.
    """
    size = np.abs(score)
    low, high = float(size.min()), float(size.max())
    scaled = (size - low) / (high - low) if high > low else np.ones_like(size)
    return np.asarray(np.maximum(scaled**2, WEIGHT_FLOOR))


class PerturbationObjective(nn.Module):
    """Weighted squared error of changes, plus a ranking of the most changed genes and their signs.

    Every item of the training set is one control cell with one condition of its context and batch (see
    ``scdiva.tasks.perturb``). The simple predictors' change of a condition is what they say of it when it is left out,
    so that the network learns what they miss, not what they have memorised.

    Parameters
    ----------
    network
        What is trained.
    codes
        Perturbation of every condition, one row each.
    condition
        ``(items,)`` condition of each item, by ``cells.cell_index``.
    control_mean, base, target, weight
        ``(conditions, P)``.
    described
        ``(conditions, X)``.
    """

    def __init__(
        self,
        network: PerturbationNetwork,
        codes: PerturbationCodes,
        condition: NDArray[np.integer],
        control_mean: NDArray[np.floating],
        base: NDArray[np.floating],
        target: NDArray[np.floating],
        weight: NDArray[np.floating],
        described: NDArray[np.floating],
    ) -> None:
        super().__init__()
        self.network = network
        self.codes = codes
        self.condition = np.asarray(condition, dtype=np.int64)
        self.control_mean, self.base, self.target, self.weight = control_mean, base, target, weight
        self.described = described

    def learning_rate_ratios(self) -> dict[nn.Parameter, float]:
        """Return multiples of the learning rate: of the trunk's layers."""
        trunk = self.network.network
        return dict.fromkeys((p for p in trunk.parameters() if p.requires_grad), TRUNK_RATIO)

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> ControlInputs:
        """Pack control cells with the conditions of their items."""
        rows = self.condition[cells.cell_index]
        return self.network.inputs(
            cells,
            self.codes.take(torch.from_numpy(rows)),
            self.control_mean[rows],
            self.base[rows],
            self.described[rows],
            self.target[rows],
            self.weight[rows],
        )

    prepare_heldout = prepare

    def forward(self, inputs: ControlInputs, generator: torch.Generator) -> LossOutput:
        """Return the loss; terms ``wmse`` and, of the simple predictors alone, ``wmse_floor``."""
        base_BP, target_BP, weight_BP = inputs.values_BP3[..., 2], inputs.target_BP, inputs.weight_BP
        change_BP = base_BP + self.network(inputs)
        weight_BP = weight_BP / weight_BP.sum(dim=1, keepdim=True)
        wmse = (weight_BP * (change_BP - target_BP) ** 2).sum(dim=1).mean()
        floor = (weight_BP * (base_BP - target_BP) ** 2).sum(dim=1).mean()
        terms = {"wmse": wmse.detach(), "wmse_floor": floor}
        loss = wmse
        if self.training:
            ranking, sign = ranking_loss(change_BP, target_BP, generator)
            loss = wmse + RANK_WEIGHT * ranking + SIGN_WEIGHT * sign
            terms |= {"ranking": ranking.detach(), "sign": sign.detach()}
        return LossOutput(loss, terms, inputs.cells.n_cells)


def ranking_loss(
    change_BP: torch.Tensor, target_BP: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how badly the most changed genes are told from others by size, and how badly their signs are.

    Pairwise logistic loss on |change| of each of the :data:`TOP_GENES` most changed genes against as many random others
    ("DE-aware ranking" of scDiVa, arXiv 2602.03477; its form is our decision).

    Parameters
    ----------
    change_BP, target_BP
        Predicted and measured changes.
    generator
        Draws the others.
    """
    n_genes = target_BP.shape[1]
    k = min(TOP_GENES, max(1, n_genes // 10))
    order_BP = target_BP.abs().argsort(dim=1, descending=True)
    top_BK = order_BP[:, :k]
    drawn = torch.randint(k, n_genes, (k,), generator=generator, device=change_BP.device)
    other_BK = order_BP[:, drawn]
    top_change = change_BP.gather(1, top_BK)
    size_top, size_other = top_change.abs(), change_BP.gather(1, other_BK).abs()
    ranking = F.softplus(-(size_top[:, :, None] - size_other[:, None, :]) / TEMPERATURE).mean()
    sign = F.softplus(-top_change * target_BP.gather(1, top_BK).sign() / TEMPERATURE).mean()
    return TEMPERATURE * ranking, TEMPERATURE * sign


def blocks_of(n: int, size: int) -> Sequence[NDArray[np.int64]]:
    """Return row numbers, block by block."""
    return [np.arange(first, min(first + size, n)) for first in range(0, n, size)]


def panel_of(network: PerturbationNetwork) -> NDArray[np.int64]:
    """Return the genes that a network predicts."""
    return cast("NDArray[np.int64]", network.panel.cpu().numpy())
