"""The native network as a denoiser of cells in the making: the ``predict`` of the samplers in ``scdiva.diffusion``.

Guidance (arXiv 2507.08965) works in log-probability space and, for counts, on log-means (our decision):

    log p = log p_all + sum_j (w_j(t) - 1) (log p_j - log p_0),     w_j(t) = 1 + (w_j - 1) (1 - t)

p_all knows all wanted conditions, p_j only the jth and p_0 none. With every w_j = 1 this is plain conditioning on all
of them, with one condition it is classifier-free guidance; strong guidance early, when nearly everything is hidden,
hurts, and so it grows as genes appear. Each p is normalised before they are combined: guidance changes what is
revealed, never how fast. (The combination for several conditions is our decision.)

Shape letters: B cells, G genes, C condition fields, J networks calls that guidance combines, Z latent, X drawn genes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from scdiva.diffusion import Masks
from scdiva.diffusion.counts import draw_ztnb
from scdiva.diffusion.samplers import Predict, SetState
from scdiva.losses import inclusion_probabilities, inclusion_shift
from scdiva.models.scdiva.inputs import MaskedCells, Tokeniser
from scdiva.models.scdiva.native import DenoiserOutput, NativeNetwork
from scdiva.types import CellCounts


@dataclass(frozen=True, slots=True)
class Wish:
    """What the network is told of some cells that are to be generated.

    Parameters
    ----------
    depth
        ``(B,)`` UMIs in genes of the vocabulary; the network is told, and nothing is forced to add up to it.
    library_size
        ``(B,)`` UMIs over all genes.
    condition
        ``(B, C)`` codes; 0 is unknown.
    is_measured
        ``(B, G)`` genes that the cell may have.
    weight
        ``(C,)`` guidance weight of each field.
    z
        ``(B, Z)`` z of the cells; None: z pools the genes that are visible so far, or is the learned null.
    z_depth
        ``(B,)`` UMIs behind each ``z``.
    is_null
        z is the learned null.
    """

    depth: NDArray[np.integer]
    library_size: NDArray[np.float64]
    condition: NDArray[np.int32]
    is_measured: NDArray[np.bool_]
    weight: NDArray[np.float64]
    z: NDArray[np.float32] | None = None
    z_depth: NDArray[np.float32] | None = None
    is_null: bool = False


@dataclass(frozen=True, slots=True)
class GuidedPrediction:
    """What the network says of some cells under one or several sets of conditions.

    Parameters
    ----------
    network
        The network.
    outputs
        J outputs for the same cells.
    weight_JB
        float32 weight of each; they sum to 1 over J.
    inclusion_BG
        float64 probability of each gene to be hidden.
    direction_JBE
        What the trunk adds to log-means of hidden genes, for each output; None without a trunk.
    """

    network: NativeNetwork
    outputs: tuple[DenoiserOutput, ...]
    weight_JB: torch.Tensor
    inclusion_BG: torch.Tensor
    direction_JBE: tuple[torch.Tensor, ...] | None

    @classmethod
    def of(
        cls, network: NativeNetwork, cells: MaskedCells, outputs: tuple[DenoiserOutput, ...], weight_JB: torch.Tensor
    ) -> GuidedPrediction:
        """Combine outputs."""
        if len(outputs) == 1:
            inclusion_BG = network.gene_probabilities(cells, outputs[0])
        else:
            logit_BG = torch.zeros_like(outputs[0].gene_logit_BG, dtype=torch.float32)
            for output, weight_B in zip(outputs, weight_JB, strict=True):
                own_BG = output.gene_logit_BG.float()
                shift_B = inclusion_shift(own_BG, cells.is_admissible_BG, cells.n_hidden_B)
                logit_BG += weight_B[:, None] * (own_BG + shift_B[:, None])
            inclusion_BG = inclusion_probabilities(logit_BG, cells.is_admissible_BG, cells.n_hidden_B)
        directions = None
        if network.trunk is not None:
            trunk = network.trunk
            directions = tuple(trunk.value_direction(output.states.query_BD) for output in outputs if output.states)
        return cls(network, outputs, weight_JB, inclusion_BG.double(), directions)

    def draw_counts(self, cell_X: torch.Tensor, gene_X: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw counts of hidden genes from the value likelihood."""
        log_mean_X = torch.zeros(cell_X.numel(), dtype=torch.float32, device=cell_X.device)
        log_theta_X = torch.zeros_like(log_mean_X)
        for j, output in enumerate(self.outputs):
            direction = None if self.direction_JBE is None else self.direction_JBE[j][cell_X]
            own_X = self.network.log_mean(output, cell_X, gene_X, direction).float()
            log_mean_X += self.weight_JB[j, cell_X] * own_X
            if j == 0:  # guidance moves means only: dispersions are those of all conditions together
                log_theta_X = self.network.log_dispersion(output, cell_X, gene_X, direction).float()
        return draw_ztnb(log_mean_X, log_theta_X, generator).to(torch.int32)


def denoiser(network: NativeNetwork, tokeniser: Tokeniser, wish: Wish) -> Predict:
    """Return ``predict`` for some cells."""
    device = network.null_latent.device
    guided = [i for i in range(wish.weight.size) if wish.weight[i] != 1.0 and wish.condition[:, i].any()]
    conditions = [wish.condition]
    for i in guided:
        alone = np.zeros_like(wish.condition)
        alone[:, i] = wish.condition[:, i]
        conditions.append(alone)
    if guided:
        conditions.append(np.zeros_like(wish.condition))
    codes = [torch.from_numpy(condition.astype(np.int64)).to(device) for condition in conditions]
    z = None if wish.z is None else torch.from_numpy(np.asarray(wish.z, dtype=np.float32)).to(device)

    def predict(state: SetState) -> GuidedPrediction:
        cells = visible_cells(state, tokeniser, wish).to(device)
        outputs = tuple(network(replace(cells, condition_BC=code), z) for code in codes)
        return GuidedPrediction.of(network, cells, outputs, _weights(wish, guided, state.t_B.float()))

    return predict


def _weights(wish: Wish, guided: list[int], t_B: torch.Tensor) -> torch.Tensor:
    """Weight of each network call: 1 for all conditions together, w_j(t) - 1 for each, minus their sum for none."""
    extra = [(float(wish.weight[i]) - 1.0) * (1.0 - t_B) for i in guided]
    weights = [torch.ones_like(t_B), *extra]
    if extra:
        weights.append(-torch.stack(extra).sum(dim=0))
    return torch.stack(weights)


def visible_cells(state: SetState, tokeniser: Tokeniser, wish: Wish) -> MaskedCells:
    """Return what the network sees of cells in the making; the path is that of training."""
    counts = sp.csr_matrix(state.count_BG.cpu().numpy())
    n_cells, n_hidden_B = state.n_cells, state.n_hidden_B.cpu()
    visible = CellCounts(
        counts=counts,
        library_size=wish.library_size,
        cell_index=np.arange(n_cells),
        source_of_cell=np.arange(n_cells, dtype=np.int32),
        is_measured=wish.is_measured,
        condition=wish.condition,
    )
    nothing = np.zeros(counts.nnz, dtype=bool)
    # the generator is used by the random order of the ordering ablation only
    cells, _ = tokeniser.corrupt(
        visible,
        Masks(nothing, nothing, n_hidden_B.numpy()),
        np.random.default_rng(0),
        is_null=np.full(n_cells, wish.is_null),
    )
    cells = replace(
        cells, depth_B=torch.from_numpy(wish.depth.astype(np.float32)), n_genes_B=cells.n_genes_B + n_hidden_B
    )
    if wish.z_depth is not None:
        cells = replace(cells, anchor_depth_B=torch.from_numpy(np.asarray(wish.z_depth, dtype=np.float32)))
    return cells
