"""Reverse samplers of the sequence layout: from hidden places to genes with counts, one gene per place.

The counterpart of :mod:`scdiva.diffusion.samplers` for models whose tokens have places. Each hidden place has a
distribution of its own, and two places may draw the same gene. How collisions are resolved is our decision: each place
draws by itself, draws are sorted by confidence, the first place keeps the gene, and the losers stay hidden for the next
step. Genes that are visible have no mass, so that no gene is ever there twice. What is still hidden in the last step is
drawn without replacement: losers draw again without the genes that are taken, until none is left (our decision; an
argmax in its place would make the last genes too typical).

=================  ================================================================================================
``random``         a random choice of the hidden places draws; which, nobody's confidence decides.
``confidence``     all hidden places draw; those are kept that were most probable, with Gumbel noise that fades.
``first-hitting``  one place at a time: exact, one network call per place; the reference.
=================  ================================================================================================

After each step as many places are hidden as the grid says, and the losers of collisions, who catch up later.
``ancestral``, remasking and Gibbs rounds are for sets: their rates would be those of a process without collisions.

A row of all genes exists for a few hundred places at a time only: a prediction is a function of places (38 GB of logits
otherwise). Noise and probabilities are float64, as for sets.

Shape letters: B cells, L places, G genes, X some places of all cells together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch

from scdiva.diffusion.samplers import Sampler
from scdiva.errors import ConfigError

NO_GENE = -1
"""Stands in ``gene_BL`` where a place is hidden, or where a cell has no place."""

_PLACES = 256
"""Places whose rows of all genes exist at the same time: 256 x 41,818 float64 are 86 MB."""


@dataclass(frozen=True, slots=True)
class SequenceState:
    """Sequences in the making.

    Parameters
    ----------
    gene_BL
        int64 gene of each visible place, all different within a cell; :data:`NO_GENE` elsewhere.
    count_BL
        int32 counts of the visible places, at least 1; 0 elsewhere.
    is_hidden_BL
        Places that are still to be drawn. A place that is neither hidden nor visible does not exist: cells may be of
        different lengths.
    is_admissible_BG
        Genes that a hidden place may hold: measured, and not visible.
    t_B
        float64 time of each cell: 1 at the start, 0 at the end.
    """

    gene_BL: torch.Tensor
    count_BL: torch.Tensor
    is_hidden_BL: torch.Tensor
    is_admissible_BG: torch.Tensor
    t_B: torch.Tensor

    @classmethod
    def start(
        cls, gene_BL: torch.Tensor, count_BL: torch.Tensor, is_hidden_BL: torch.Tensor, is_measured_BG: torch.Tensor
    ) -> SequenceState:
        """Return cells at their start; what stands in hidden places is forgotten.

        Raises
        ------
        ValueError
            A cell has more hidden places than genes that may stand in them, or a visible gene twice.
        """
        gene_BL = gene_BL.to(torch.int64).masked_fill(is_hidden_BL, NO_GENE)
        cell_X, place_X = (gene_BL != NO_GENE).nonzero(as_tuple=True)
        is_visible_BG = torch.zeros_like(is_measured_BG)
        is_visible_BG[cell_X, gene_BL[cell_X, place_X]] = True
        if int(is_visible_BG.sum()) != cell_X.numel():
            raise ValueError("a visible gene stands in two places of a cell")
        is_admissible_BG = is_measured_BG & ~is_visible_BG
        if bool((is_hidden_BL.sum(dim=1) > is_admissible_BG.sum(dim=1)).any()):
            raise ValueError("a cell has more hidden places than genes that are measured and not visible")
        return cls(
            gene_BL=gene_BL,
            count_BL=count_BL.to(torch.int32).masked_fill(gene_BL == NO_GENE, 0),
            is_hidden_BL=is_hidden_BL,
            is_admissible_BG=is_admissible_BG,
            t_B=torch.ones(gene_BL.shape[0], dtype=torch.float64, device=gene_BL.device),
        )

    @property
    def n_hidden_B(self) -> torch.Tensor:
        """int64 number of hidden places of each cell."""
        return self.is_hidden_BL.sum(dim=1)

    def at(self, t: float) -> SequenceState:
        """Return the same cells at another time."""
        return replace(self, t_B=torch.full_like(self.t_B, t))


class SequencePrediction(Protocol):
    """What a denoiser says of the hidden places of some cells."""

    def log_prob(self, cell_X: torch.Tensor, place_X: torch.Tensor) -> torch.Tensor:
        """Log-probability of each gene in some hidden places, ``(X, G)``; need not be normalised.

        Every place gives every admissible gene some probability.
        """
        ...

    def draw_counts(
        self, cell_X: torch.Tensor, place_X: torch.Tensor, gene_X: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Draw counts, at least 1, of some genes in some hidden places, ``(X,)`` int32."""
        ...


PredictSequences = Callable[[SequenceState], SequencePrediction]


@dataclass(frozen=True, slots=True)
class _Draws:
    """Genes that some places drew, with the log-probability of each."""

    cell_X: torch.Tensor
    place_X: torch.Tensor
    gene_X: torch.Tensor
    score_X: torch.Tensor

    def take(self, chosen: torch.Tensor) -> _Draws:
        return _Draws(self.cell_X[chosen], self.place_X[chosen], self.gene_X[chosen], self.score_X[chosen])


def sample_sequences(
    predict: PredictSequences, start: SequenceState, sampler: Sampler, generator: torch.Generator
) -> SequenceState:
    """Draw all that is hidden.

    Parameters
    ----------
    predict
        The denoiser.
    start
        Cells at their start; what is visible stays as it is.
    sampler
        How: strategy, steps, grid and selection noise.
    generator
        Source of all randomness, on the device of the cells.

    Returns
    -------
    SequenceState
        Nothing is hidden any more, and no cell has a gene twice.

    Raises
    ------
    ConfigError
        A strategy that is for sets only, remasking, or Gibbs rounds.
    ValueError
        A place gives no probability to any gene that is left.
    """
    _check(sampler)
    if sampler.strategy == "first-hitting":
        return _one_by_one(predict, start, generator)
    n_total_B = start.n_hidden_B
    state, times = start, sampler.times()
    for t, s in pairwise(times):
        state = state.at(t)
        prediction = predict(state)
        if s == 0:
            state = _finish(prediction, state, generator)
            continue
        k_B = (state.n_hidden_B - torch.round(n_total_B * s).to(torch.int64)).clamp_min(0)
        if sampler.strategy == "random":
            cell_X, place_X = _random_places(state, k_B, generator)
            draws = _winners(state, _draw(prediction, state, cell_X, place_X, generator))
        else:
            cell_X, place_X = state.is_hidden_BL.nonzero(as_tuple=True)
            draws = _winners(state, _draw(prediction, state, cell_X, place_X, generator))
            noise_X = sampler.selection_noise * t * _gumbel(draws.score_X.shape, state, generator)
            draws = draws.take(_rank_in_cell(state, draws, -(draws.score_X + noise_X)) < k_B[draws.cell_X])
        state = _reveal(prediction, state, draws, generator)
    return state.at(0.0)


def _one_by_one(predict: PredictSequences, start: SequenceState, generator: torch.Generator) -> SequenceState:
    """Reveal one place of each cell at a time."""
    state = start
    while bool(state.is_hidden_BL.any()):
        # of n hidden places the next is revealed at t u^(1/n)
        u_B = torch.rand(state.t_B.shape, generator=generator, device=state.t_B.device, dtype=torch.float64)
        n_hidden_B = state.n_hidden_B
        state = replace(state, t_B=state.t_B * u_B ** (1.0 / n_hidden_B.clamp_min(1)))
        prediction = predict(state)
        cell_X, place_X = _random_places(state, torch.ones_like(n_hidden_B), generator)
        state = _reveal(prediction, state, _draw(prediction, state, cell_X, place_X, generator), generator)
    return state.at(0.0)


def _check(sampler: Sampler) -> None:
    if sampler.strategy == "ancestral" or sampler.remask > 0 or sampler.gibbs_rounds > 0:
        raise ConfigError(
            f"sequences by strategy {sampler.strategy!r}, remask={sampler.remask}, gibbs_rounds={sampler.gibbs_rounds}",
            expected="random, confidence or first-hitting, without remasking and Gibbs rounds",
            fix="leave these to models of the set layout",
        )


def _random_places(
    state: SequenceState, k_B: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose k hidden places of each cell uniformly, or all there are: (cell, place)."""
    order_BL = torch.rand(
        state.is_hidden_BL.shape, generator=generator, device=state.is_hidden_BL.device, dtype=torch.float64
    )
    rank_BL = order_BL.masked_fill(~state.is_hidden_BL, 2.0).argsort(dim=1).argsort(dim=1)
    cell_X, place_X = (state.is_hidden_BL & (rank_BL < k_B[:, None])).nonzero(as_tuple=True)
    return cell_X, place_X


def _draw(
    prediction: SequencePrediction,
    state: SequenceState,
    cell_X: torch.Tensor,
    place_X: torch.Tensor,
    generator: torch.Generator,
) -> _Draws:
    """Let some places draw a gene each, by themselves."""
    genes, scores = [cell_X.new_zeros(0)], [torch.zeros(0, dtype=torch.float64, device=cell_X.device)]
    for first in range(0, cell_X.numel(), _PLACES):
        cell, place = cell_X[first : first + _PLACES], place_X[first : first + _PLACES]
        log_p_XG = prediction.log_prob(cell, place).double()
        log_p_XG = log_p_XG.masked_fill(~state.is_admissible_BG[cell], float("-inf")).log_softmax(dim=1)
        if bool(log_p_XG[:, 0].isnan().any()):
            raise ValueError("a hidden place gives no probability to any gene that is left")
        gene = (log_p_XG + _gumbel(log_p_XG.shape, state, generator)).argmax(dim=1)
        genes.append(gene)
        scores.append(log_p_XG.gather(1, gene[:, None]).squeeze(1))
    return _Draws(cell_X, place_X, torch.cat(genes), torch.cat(scores))


def _winners(state: SequenceState, draws: _Draws) -> _Draws:
    """Keep, of the places of a cell that drew the same gene, the most confident one."""
    by_score = torch.argsort(draws.score_X, descending=True, stable=True)
    key_X = draws.cell_X * state.is_admissible_BG.shape[1] + draws.gene_X
    order = by_score[torch.argsort(key_X[by_score], stable=True)]
    is_first = torch.ones_like(order, dtype=torch.bool)
    is_first[1:] = key_X[order][1:] != key_X[order][:-1]
    return draws.take(order[is_first].sort().values)


def _finish(prediction: SequencePrediction, state: SequenceState, generator: torch.Generator) -> SequenceState:
    """Draw every hidden place without replacement: losers of a round draw again from what is left."""
    while bool(state.is_hidden_BL.any()):
        cell_X, place_X = state.is_hidden_BL.nonzero(as_tuple=True)
        draws = _winners(state, _draw(prediction, state, cell_X, place_X, generator))
        state = _reveal(prediction, state, draws, generator)
    return state


def _reveal(
    prediction: SequencePrediction, state: SequenceState, draws: _Draws, generator: torch.Generator
) -> SequenceState:
    """Put genes into their places, with counts."""
    cell_X, place_X, gene_X = draws.cell_X, draws.place_X, draws.gene_X
    gene_BL, count_BL = state.gene_BL.clone(), state.count_BL.clone()
    is_hidden_BL, is_admissible_BG = state.is_hidden_BL.clone(), state.is_admissible_BG.clone()
    gene_BL[cell_X, place_X] = gene_X
    count_BL[cell_X, place_X] = prediction.draw_counts(cell_X, place_X, gene_X, generator).to(count_BL.dtype)
    is_hidden_BL[cell_X, place_X] = False
    is_admissible_BG[cell_X, gene_X] = False
    return replace(
        state, gene_BL=gene_BL, count_BL=count_BL, is_hidden_BL=is_hidden_BL, is_admissible_BG=is_admissible_BG
    )


def _rank_in_cell(state: SequenceState, draws: _Draws, key_X: torch.Tensor) -> torch.Tensor:
    """Rank of each draw among those of its cell, smallest key first."""
    key_BL = torch.full(state.is_hidden_BL.shape, float("inf"), dtype=torch.float64, device=key_X.device)
    key_BL[draws.cell_X, draws.place_X] = key_X
    return key_BL.argsort(dim=1, stable=True).argsort(dim=1)[draws.cell_X, draws.place_X]


def _gumbel(shape: torch.Size, state: SequenceState, generator: torch.Generator) -> torch.Tensor:
    """float64 Gumbel noise."""
    u = torch.rand(shape, generator=generator, device=state.t_B.device, dtype=torch.float64)
    return -torch.log(-torch.log(u.clamp(1e-300, 1.0 - 1e-16)))
