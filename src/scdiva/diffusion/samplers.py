"""Reverse samplers of the set layout: from nothing to a set of genes with counts.

All hidden genes of a set share one predictive distribution: with m of them still hidden, gene g is among them with
probability p_g (the p_g sum to m), and one hidden gene is g with probability p_g / m. A sampler repeats: predict, draw
some of the hidden genes, draw their counts. It knows the network only as a function ``predict``, holds no gene twice by
construction, and draws all noise in float64: float32 noise truncates tails and makes cells too typical (arXiv
2409.02908).

=================  ================================================================================================
``random``         exact numbers: after each step as many genes are hidden as the grid says; which are revealed is
                   random. The default.
``confidence``     exact numbers; all hidden genes are drawn, and those are kept that were most probable, with Gumbel
                   noise that fades (MaskGIT). Greedy: cells come out too typical.
``ancestral``      each hidden gene is revealed with probability (t - s) / t: the reverse process itself (MDLM).
``first-hitting``  one gene at a time: exact, one network call per gene; the reference.
=================  ================================================================================================

Parallel draws are fixed-size unequal-probability (systematic) samples, not Gumbel-top-k, which would draw common genes
too rarely (design, section 4). Remasking (ReMDM) and Gibbs rounds can follow. Not offered: P2 self-planning, which
needs predictions for visible genes, and the set layout has none.

Shape letters: B cells, G genes, X drawn genes of all cells together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, Protocol

import numpy as np
import torch

Strategy = Literal["random", "confidence", "ancestral", "first-hitting"]
Grid = Literal["uniform", "cosine"]


@dataclass(frozen=True, slots=True)
class SetState:
    """Cells in the making.

    Parameters
    ----------
    count_BG
        int32 counts of the genes that are visible; 0 elsewhere. A visible gene has a count of at least 1.
    n_hidden_B
        int64 number of genes that are still to be drawn.
    t_B
        float64 time of each cell: 1 at the start, 0 at the end. The network does not need it (what is hidden tells);
        guidance does.
    """

    count_BG: torch.Tensor
    n_hidden_B: torch.Tensor
    t_B: torch.Tensor

    @classmethod
    def empty(cls, n_genes_B: torch.Tensor, n_vocabulary_genes: int) -> SetState:
        """Return cells of which everything is hidden."""
        count = torch.zeros((n_genes_B.numel(), n_vocabulary_genes), dtype=torch.int32, device=n_genes_B.device)
        return cls(count, n_genes_B.to(torch.int64), torch.ones_like(n_genes_B, dtype=torch.float64))

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.n_hidden_B.numel())

    def at(self, t: float) -> SetState:
        """Return the same cells at another time."""
        return replace(self, t_B=torch.full_like(self.t_B, t))


class SetPrediction(Protocol):
    """What a denoiser says of cells in the making."""

    @property
    def inclusion_BG(self) -> torch.Tensor:
        """Probability of each gene to be hidden in the cell; rows sum to ``n_hidden_B``; 0 for visible genes."""
        ...

    def draw_counts(self, cell_X: torch.Tensor, gene_X: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draw counts, at least 1, of some genes of some cells, ``(X,)`` int32."""
        ...


Predict = Callable[[SetState], SetPrediction]


@dataclass(frozen=True, slots=True)
class Sampler:
    """How cells are drawn.

    Parameters
    ----------
    strategy
        Which genes are revealed in a step; see the top of this file.
    n_steps
        Network calls (``first-hitting``: one per gene, whatever stands here).
    grid
        Times between steps: ``"uniform"``, t_k = 1 - k / T, or ``"cosine"``, cos(pi/2 k / T): few genes early, many
        late.
    selection_noise
        Scale of the Gumbel noise on log-probabilities by which ``confidence`` keeps genes; fades as t.
    remask
        Largest probability that a visible gene is hidden again in a step (ReMDM "cap"; 0: never). ``ancestral`` only.
    gibbs_rounds, gibbs_share
        Rounds, after the last step, in which a random share of the genes is hidden and drawn again.
    """

    strategy: Strategy = "random"
    n_steps: int = 16
    grid: Grid = "cosine"
    selection_noise: float = 1.0
    remask: float = 0.0
    gibbs_rounds: int = 0
    gibbs_share: float = 0.1

    def times(self) -> list[float]:
        """Return the grid, from 1 to 0."""
        k = np.arange(self.n_steps + 1) / self.n_steps
        t = 1.0 - k if self.grid == "uniform" else np.cos(0.5 * np.pi * k)
        t[-1] = 0.0
        return [float(value) for value in t]


def sample_sets(predict: Predict, start: SetState, sampler: Sampler, generator: torch.Generator) -> SetState:
    """Draw all that is hidden.

    Parameters
    ----------
    predict
        The denoiser.
    start
        Cells at their start; what is visible already stays as it is (unless ``remask`` or ``gibbs_rounds`` say so).
    sampler
        How.
    generator
        Source of all randomness, on the device of the cells.

    Returns
    -------
    SetState
        Nothing is hidden any more; each cell has as many genes as were visible and hidden at the start.
    """
    n_total_B = start.n_hidden_B
    state = start
    if sampler.strategy == "first-hitting":
        while bool((state.n_hidden_B > 0).any()):
            # of n hidden genes the next is revealed at t u^(1/n)
            u_B = torch.rand(state.t_B.shape, generator=generator, device=state.t_B.device, dtype=torch.float64)
            state = replace(state, t_B=state.t_B * u_B ** (1.0 / state.n_hidden_B.clamp_min(1)))
            state = _reveal(predict(state), state, (state.n_hidden_B > 0).to(torch.int64), generator)
    else:
        for t, s in pairwise(sampler.times()):
            state = _step(predict, state, n_total_B, (t, s), sampler, generator)
    for _ in range(sampler.gibbs_rounds):
        n_visible_B = (state.count_BG > 0).sum(dim=1)
        again = torch.round(sampler.gibbs_share * n_visible_B).to(torch.int64)
        state = hide(state, again, generator)
        state = _reveal(predict(state.at(sampler.gibbs_share)), state, state.n_hidden_B, generator)
    return state.at(0.0)


def _step(
    predict: Predict,
    state: SetState,
    n_total_B: torch.Tensor,
    times: tuple[float, float],
    sampler: Sampler,
    generator: torch.Generator,
) -> SetState:
    """Go from time t to time s."""
    t, s = times
    state = state.at(t)
    prediction = predict(state)
    if sampler.strategy != "ancestral":
        k_B = state.n_hidden_B - torch.round(n_total_B * s).to(torch.int64)
        if sampler.strategy == "random":
            return _reveal(prediction, state, k_B, generator)
        return _reveal_confident(prediction, state, k_B, sampler.selection_noise * t, generator)
    # alpha = 1 - t; remasking of sigma of the visible needs as many more reveals (ReMDM)
    sigma = min(sampler.remask, 1.0, s / (1.0 - t) if t < 1.0 else 1.0) if s > 0 else 0.0
    # rounding must not leave anything hidden in the last step
    probability = min(1.0, ((1.0 - s) - (1.0 - sigma) * (1.0 - t)) / t) if s > 0 else 1.0
    k_B = _binomial(state.n_hidden_B, probability, generator)
    was_visible_BG = state.count_BG > 0
    state = _reveal(prediction, state, k_B, generator)
    if sigma > 0:
        n_again_B = _binomial(was_visible_BG.sum(dim=1), sigma, generator)
        state = hide(state, n_again_B, generator, among_BG=was_visible_BG)
    return state


def _reveal(prediction: SetPrediction, state: SetState, k_B: torch.Tensor, generator: torch.Generator) -> SetState:
    """Draw k of the hidden genes of each cell, and their counts."""
    inclusion_BG = prediction.inclusion_BG.double()
    share_B = k_B / state.n_hidden_B.clamp_min(1)
    is_drawn_BG = fixed_size_draw(inclusion_BG * share_B[:, None], k_B, generator)
    return _with_counts(prediction, state, is_drawn_BG, generator)


def _reveal_confident(
    prediction: SetPrediction, state: SetState, k_B: torch.Tensor, noise: float, generator: torch.Generator
) -> SetState:
    """Draw all hidden genes of each cell and keep the k most probable, by log-probability with Gumbel noise."""
    inclusion_BG = prediction.inclusion_BG.double()
    is_candidate_BG = fixed_size_draw(inclusion_BG, state.n_hidden_B, generator)
    cell_X, gene_X = is_candidate_BG.nonzero(as_tuple=True)
    u_X = torch.rand(cell_X.numel(), generator=generator, device=cell_X.device, dtype=torch.float64)
    gumbel_X = -torch.log(-torch.log(u_X.clamp(1e-300, 1.0 - 1e-16)))
    score_X = inclusion_BG[cell_X, gene_X].clamp_min(1e-300).log() + noise * gumbel_X
    is_kept_X = _rank_in_cell(cell_X, -score_X) < k_B[cell_X]
    is_drawn_BG = torch.zeros_like(is_candidate_BG)
    is_drawn_BG[cell_X[is_kept_X], gene_X[is_kept_X]] = True
    return _with_counts(prediction, state, is_drawn_BG, generator)


def _with_counts(
    prediction: SetPrediction, state: SetState, is_drawn_BG: torch.Tensor, generator: torch.Generator
) -> SetState:
    cell_X, gene_X = is_drawn_BG.nonzero(as_tuple=True)
    count_BG = state.count_BG.clone()
    count_BG[cell_X, gene_X] = prediction.draw_counts(cell_X, gene_X, generator).to(count_BG.dtype)
    return replace(state, count_BG=count_BG, n_hidden_B=state.n_hidden_B - is_drawn_BG.sum(dim=1))


def hide(
    state: SetState, k_B: torch.Tensor, generator: torch.Generator, *, among_BG: torch.Tensor | None = None
) -> SetState:
    """Hide k visible genes of each cell, chosen uniformly; their counts are forgotten.

    Parameters
    ----------
    state
        Cells.
    k_B
        How many of each; at most the number there is.
    generator
        Source of randomness.
    among_BG
        Genes to choose from; all visible ones if left out.
    """
    cell_X, gene_X = (state.count_BG > 0 if among_BG is None else among_BG).nonzero(as_tuple=True)
    order_X = torch.rand(cell_X.numel(), generator=generator, device=cell_X.device, dtype=torch.float64)
    is_hidden_X = _rank_in_cell(cell_X, order_X) < k_B[cell_X]
    count_BG = state.count_BG.clone()
    count_BG[cell_X[is_hidden_X], gene_X[is_hidden_X]] = 0
    n_now_B = torch.bincount(cell_X[is_hidden_X], minlength=state.n_cells)
    return replace(state, count_BG=count_BG, n_hidden_B=state.n_hidden_B + n_now_B)


def fixed_size_draw(weight_BG: torch.Tensor, k_B: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw exactly k distinct genes of each cell with given inclusion probabilities; bool ``(B, G)``.

    Systematic sampling in a random order of the genes (Madow 1949; Hartley and Rao 1962): gene g is drawn with
    probability ``min(1, a w_g)``, a such that these sum to k, exactly. The order is drawn anew in each call and shared
    by its cells, the starting points are not.

    Parameters
    ----------
    weight_BG
        float64, proportional to the inclusion probabilities; at least k of a row are positive.
    k_B
        int64 number of genes to draw.
    generator
        Source of randomness.
    """
    n_cells, n_genes = weight_BG.shape
    pi_BG = capped_inclusion(weight_BG, k_B)
    order_G = torch.randperm(n_genes, generator=generator, device=weight_BG.device)
    start_B = torch.rand(n_cells, generator=generator, device=weight_BG.device, dtype=torch.float64)
    edge_BG = pi_BG[:, order_G].cumsum(dim=1)
    # the last edge is k by construction; rounding must not cost or add a gene
    edge_BG = torch.minimum(edge_BG, k_B[:, None].double())
    edge_BG[:, -1] = k_B
    passed_BG = torch.floor(edge_BG - start_B[:, None]).to(torch.int64) + 1  # grid points u, u + 1, ... below the edge
    passed_BG = torch.minimum(passed_BG.clamp_min(0), k_B[:, None])
    is_drawn_BG = torch.zeros((n_cells, n_genes), dtype=torch.bool, device=weight_BG.device)
    is_drawn_BG[:, order_G] = torch.diff(passed_BG, dim=1, prepend=passed_BG.new_zeros((n_cells, 1))) > 0
    missing_B = k_B - is_drawn_BG.sum(dim=1)
    if bool((missing_B != 0).any()):  # two grid points in one gene of probability 1 + rounding, or a gene of weight 0
        is_drawn_BG = _repaired(is_drawn_BG, pi_BG, k_B)
    return is_drawn_BG


def _repaired(is_drawn_BG: torch.Tensor, pi_BG: torch.Tensor, k_B: torch.Tensor) -> torch.Tensor:
    """Make rows that rounding left short complete by the most probable genes that are missing."""
    score_BG = torch.where(is_drawn_BG, pi_BG + 2.0, pi_BG)
    rank_BG = score_BG.argsort(dim=1, descending=True).argsort(dim=1)
    return rank_BG < k_B[:, None]


def capped_inclusion(weight_BG: torch.Tensor, k_B: torch.Tensor) -> torch.Tensor:
    """Return inclusion probabilities ``min(1, a w_g)`` that sum to k, float64 ``(B, G)``.

    The excess over 1 goes to the other genes in proportion to their weights.
    """
    k_B = k_B.double()
    is_full_BG = torch.zeros_like(weight_BG, dtype=torch.bool)
    while True:
        rest_BG = weight_BG.masked_fill(is_full_BG, 0.0)
        room_B = k_B - is_full_BG.sum(dim=1)
        scale_B = room_B / rest_BG.sum(dim=1).clamp_min(1e-300)
        pi_BG = torch.where(is_full_BG, 1.0, rest_BG * scale_B[:, None])
        over_BG = (pi_BG > 1.0) & ~is_full_BG
        if not bool(over_BG.any()):
            return pi_BG
        is_full_BG |= over_BG


def _binomial(n_B: torch.Tensor, p: float, generator: torch.Generator) -> torch.Tensor:
    draws = torch.binomial(n_B.double(), torch.full_like(n_B, p, dtype=torch.float64), generator=generator)
    return draws.to(torch.int64)


def _rank_in_cell(cell_X: torch.Tensor, key_X: torch.Tensor) -> torch.Tensor:
    """Rank of each element among those of its cell, smallest key first; cells are in ascending order."""
    if cell_X.numel() == 0:
        return cell_X
    by_key = torch.argsort(key_X, stable=True)
    order = by_key[torch.argsort(cell_X[by_key], stable=True)]
    sizes = torch.bincount(cell_X)
    place = torch.arange(cell_X.numel(), device=cell_X.device) - (sizes.cumsum(0) - sizes)[cell_X]
    rank = torch.empty_like(cell_X)
    rank[order] = place
    return rank
