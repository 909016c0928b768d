"""What the published token model is trained on.

Cross-entropy of the gene and ten times the squared error of the value, over masked tokens (arXiv 2602.03477).

Shape letters: B cells, N tokens of all cells together, R masked tokens, G genes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import nn

from scdiva.data.statistics import GeneStatistics
from scdiva.diffusion import exact_count_masks
from scdiva.genes import FIRST_GENE_ROW
from scdiva.models.scdiva.official import HEADS, Lat, OfficialHidden, OfficialNetwork, OfficialTokens
from scdiva.types import CellCounts, LossOutput

VALUE_WEIGHT = 10.0
"""Weight of the value term (arXiv 2602.03477)."""

REPLACED_SHARE = 0.9
"""Share of masked tokens that are replaced in training; the others stay visible and count (the published code)."""

SMALLEST_TIME = 1e-6
"""t ~ U(0, 1) is clamped to [1e-6, 1] (the published code)."""

HELDOUT_TIMES = (0.1, 0.5, 0.9)
"""Shares of hidden tokens on which held-out cells are scored."""

_PSEUDO_COUNT = 0.5


@dataclass(frozen=True, slots=True)
class MaskedTokens:
    """One minibatch of training.

    Parameters
    ----------
    tokens
        The cells.
    is_masked_N
        Tokens that are scored.
    is_hidden_N
        Those of them that the network does not see.
    """

    tokens: OfficialTokens
    is_masked_N: torch.Tensor
    is_hidden_N: torch.Tensor

    def to(self, device: torch.device) -> Self:
        """Return the same on another device."""
        return type(self)(self.tokens.to(device), self.is_masked_N.to(device), self.is_hidden_N.to(device))


@dataclass(frozen=True, slots=True)
class HeldoutTokens:
    """One minibatch of evaluation.

    Parameters
    ----------
    tokens
        The cells.
    masks
        For each of :data:`HELDOUT_TIMES`, bool ``(N,)``: tokens that are hidden and scored.
    """

    tokens: OfficialTokens
    masks: tuple[torch.Tensor, ...]

    def to(self, device: torch.device) -> Self:
        """Return the same on another device."""
        return type(self)(self.tokens.to(device), tuple(mask.to(device) for mask in self.masks))


class OfficialObjective(nn.Module):
    """The loss of the paper: CE + 10 MSE over all masked tokens of the minibatch.

    Masks are drawn where inputs are prepared, so that a run resumes exactly. Cells count by their number of masked
    tokens, as published; the latent token is the published one, which sees the answer.

    Parameters
    ----------
    network
        The network that is trained; heads that were marked untrained are trained from here on.
    statistics
        Gene statistics of the training corpus: they order the tokens and give the floor of the evaluation.
    """

    detection_share: torch.Tensor

    def __init__(self, network: OfficialNetwork, statistics: GeneStatistics) -> None:
        super().__init__()
        network.mark_trained(HEADS)
        self.network = network
        self.statistics = statistics
        detection = (statistics.n_detected + _PSEUDO_COUNT) / (statistics.n_cells + 2 * _PSEUDO_COUNT)
        self.register_buffer("detection_share", torch.from_numpy(detection / detection.sum()), persistent=False)

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> MaskedTokens:
        """Serialise cells and mask each token with probability t ~ U(0, 1), drawn per cell."""
        tokens = self.network.tokenise(cells, self.statistics, rng)
        n_tokens = sum(tokens.lengths)
        t = np.repeat(rng.random(tokens.n_cells).clip(SMALLEST_TIME, 1.0), tokens.lengths)
        is_masked = rng.random(n_tokens) < t
        is_hidden = is_masked & (rng.random(n_tokens) < REPLACED_SHARE)
        return MaskedTokens(tokens, torch.from_numpy(is_masked), torch.from_numpy(is_hidden))

    def prepare_heldout(self, cells: CellCounts, rng: np.random.Generator) -> HeldoutTokens:
        """Serialise cells and hide round(t n) of each cell's n tokens, at least one, at each held-out time."""
        tokens = self.network.tokenise(cells, self.statistics, rng)
        length = np.array(tokens.lengths, dtype=np.int64)
        masks = tuple(torch.from_numpy(exact_count_masks(length, t, rng).is_gene_masked_N) for t in HELDOUT_TIMES)
        return HeldoutTokens(tokens, masks)

    def forward(self, inputs: MaskedTokens | HeldoutTokens, generator: torch.Generator) -> LossOutput:
        """Return the loss.

        Parameters
        ----------
        inputs
            From :meth:`prepare` or :meth:`prepare_heldout`.
        generator
            Not used: the masks are in the inputs.

        Returns
        -------
        LossOutput
            In training, the terms ``identity_nll`` (nats) and ``value_mse``, means over all masked tokens of the
            minibatch. For held-out cells, means within cells and then over cells with tokens: at each time t
            ``identity_nll_t*`` with the published latent token, ``identity_nll_visible_t*`` with one that pools
            visible tokens, and ``identity_nll_floor_t*`` of the genes' detection frequencies without those that are
            visible in the cell (pseudo-count 0.5); besides ``identity_nll`` and ``value_mse``, means over the three
            times with the published latent token, which make the loss.
        """
        return self._score(inputs) if isinstance(inputs, HeldoutTokens) else self._train(inputs)

    def _train(self, inputs: MaskedTokens) -> LossOutput:
        tokens = inputs.tokens
        hidden = self.network(tokens, inputs.is_hidden_N)
        nll_R, square_R = self._losses(hidden, tokens, inputs.is_masked_N)
        # a minibatch of nearly empty cells may have no masked token at all: then the loss is zero
        n_masked = max(1, nll_R.numel())
        nll, mse = nll_R.sum() / n_masked, square_R.sum() / n_masked
        return self._output(tokens, nll, mse, {}, n_cells=tokens.n_cells, n_passes=1)

    def _score(self, inputs: HeldoutTokens) -> LossOutput:
        tokens = inputs.tokens
        n_scored = sum(length > 0 for length in tokens.lengths)
        terms: dict[str, torch.Tensor] = {}
        nlls, mses = [], []
        for t, is_hidden_N in zip(HELDOUT_TIMES, inputs.masks, strict=True):
            cell_R = tokens.cell_N[is_hidden_N]

            def mean(loss_R: torch.Tensor, cell_R: torch.Tensor = cell_R) -> torch.Tensor:
                return _mean_over_cells(loss_R, cell_R, tokens.n_cells, n_scored)

            lats: tuple[tuple[Lat, str], ...] = (("clean", ""), ("visible", "visible_"))
            for lat, prefix in lats:
                hidden = self.network(tokens, is_hidden_N, lat=lat)
                nll_R, square_R = self._losses(hidden, tokens, is_hidden_N)
                terms[f"identity_nll_{prefix}t{t}"] = mean(nll_R).detach()
                if lat == "clean":
                    nlls.append(mean(nll_R))
                    mses.append(mean(square_R))
            terms[f"identity_nll_floor_t{t}"] = mean(self._floor(tokens, is_hidden_N))
        nll, mse = torch.stack(nlls).mean(), torch.stack(mses).mean()
        return self._output(tokens, nll, mse, terms, n_cells=n_scored, n_passes=2 * len(HELDOUT_TIMES))

    def _losses(
        self, hidden: OfficialHidden, tokens: OfficialTokens, is_masked_N: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Identity NLL and squared error of the value of each masked token."""
        hidden_RD = hidden.token_ND[is_masked_N]
        error_R = self.network.values(hidden_RD) - tokens.value_N[is_masked_N]
        return self.network.identity_nll(hidden_RD, tokens.row_N[is_masked_N]), error_R.square()

    def _floor(self, tokens: OfficialTokens, is_hidden_N: torch.Tensor) -> torch.Tensor:
        """Identity NLL of hidden tokens under detection frequencies, visible genes excluded; ``(R,)`` float32."""
        share_N = self.detection_share[tokens.row_N - FIRST_GENE_ROW]
        visible_B = torch.zeros(tokens.n_cells, dtype=share_N.dtype, device=share_N.device)
        visible_B.index_add_(0, tokens.cell_N, share_N * ~is_hidden_N)
        share_R = share_N[is_hidden_N]
        # the rest holds the hidden gene itself: rounding must not make it smaller
        rest_R = torch.maximum(1.0 - visible_B[tokens.cell_N[is_hidden_N]], share_R)
        return (rest_R.log() - share_R.log()).float()

    def _output(
        self,
        tokens: OfficialTokens,
        nll: torch.Tensor,
        mse: torch.Tensor,
        terms: dict[str, torch.Tensor],
        *,
        n_cells: int,
        n_passes: int,
    ) -> LossOutput:
        packing = tokens.packing
        return LossOutput(
            loss=nll + VALUE_WEIGHT * mse,
            terms={"identity_nll": nll.detach(), "value_mse": mse.detach(), **terms},
            n_cells=n_cells,
            n_tokens=n_passes * packing.n_tokens,
            n_flops=n_passes * self.network.trunk.flops(packing),
        )


def _mean_over_cells(loss_R: torch.Tensor, cell_R: torch.Tensor, n_cells: int, n_scored: int) -> torch.Tensor:
    """Mean within each cell, then over the ``n_scored`` cells that have tokens."""
    n_masked_B = torch.bincount(cell_R, minlength=n_cells).clamp_min(1)
    return (loss_R / n_masked_B[cell_R]).sum() / max(n_scored, 1)
