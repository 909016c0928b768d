"""Denoisers so small that everything they can say is enumerated: what samplers and estimators are judged against.

``Inconsistent`` says of the next gene, and of its count, something that depends on what is visible, and that is the
conditional of no joint distribution: what comes out depends on the order in which genes are revealed, so that a sampler
that gets the order wrong is found out. ``Consistent`` tells the exact conditionals of a given joint distribution.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import torch
from scipy.stats import chisquare

from scdiva.diffusion.samplers import Predict, SetState

N_GENES, COUNTS = 4, (1, 2)

Set = tuple[int, ...]
"""Counts of all genes; 0 where a gene is not there."""


@dataclass(frozen=True)
class Said:
    """A prediction: inclusion probabilities, and of each gene the probability that its count is 2."""

    inclusion_BG: torch.Tensor
    p_two_BG: torch.Tensor

    def draw_counts(self, cell_X, gene_X, generator):
        u = torch.rand(cell_X.shape, generator=generator, dtype=torch.float64)
        return 1 + (u < self.p_two_BG[cell_X, gene_X]).to(torch.int32)


class Inconsistent:
    """Random logits of the visible counts."""

    def __init__(self, seed: int = 0, n_genes: int = N_GENES) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.n_genes = n_genes
        self.own, self.own_two = torch.randn(2, n_genes, generator=generator, dtype=torch.float64)
        self.of, self.of_two = torch.randn(2, n_genes, n_genes, generator=generator, dtype=torch.float64)

    def said(self, count_BG: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Distribution of the next gene, and of each gene the probability that its count is 2."""
        count_BG = count_BG.double()
        logit_BG = (self.own + count_BG @ self.of.T).masked_fill(count_BG > 0, float("-inf"))
        return logit_BG.softmax(dim=1), torch.sigmoid(self.own_two + count_BG @ self.of_two.T)

    @property
    def predict(self) -> Predict:
        def predict(state: SetState) -> Said:
            p_BG, p_two_BG = self.said(state.count_BG)
            return Said(p_BG.nan_to_num() * state.n_hidden_B[:, None], p_two_BG)

        return predict

    def distribution(self, start: Set, n_hidden: int) -> dict[Set, float]:
        """Probability of each set when genes are revealed one by one."""
        if n_hidden == 0:
            return {start: 1.0}
        found: dict[Set, float] = defaultdict(float)
        p_BG, p_two_BG = self.said(torch.tensor([start]))
        for gene in np.flatnonzero(np.array(start) == 0):
            for count, p_count in zip(COUNTS, (1 - p_two_BG[0, gene], p_two_BG[0, gene]), strict=True):
                then = (*start[:gene], count, *start[gene + 1 :])
                for end, p in self.distribution(then, n_hidden - 1).items():
                    found[end] += float(p_BG[0, gene] * p_count) * p
        return found


class Consistent:
    """The conditionals of a joint distribution over the sets of ``n_present`` genes."""

    def __init__(self, seed: int = 0, n_present: int = 2) -> None:
        self.sets = [
            tuple(dict(zip(chosen, counts, strict=True)).get(g, 0) for g in range(N_GENES))
            for chosen in combinations(range(N_GENES), n_present)
            for counts in product(COUNTS, repeat=n_present)
        ]
        self.p = np.random.default_rng(seed).dirichlet(np.ones(len(self.sets)))

    @property
    def predict(self) -> Predict:
        sets_SG, p_S = torch.tensor(self.sets), torch.from_numpy(self.p)

        def predict(state: SetState) -> Said:
            count_BG = state.count_BG
            agrees_BS = ((count_BG[:, None] == 0) | (count_BG[:, None] == sets_SG)).all(dim=2)
            weight_BS = agrees_BS * p_S
            weight_BS = weight_BS / weight_BS.sum(dim=1, keepdim=True)
            inclusion_BG = (weight_BS @ (sets_SG > 0).double()).masked_fill(count_BG > 0, 0.0)
            two_BG = weight_BS @ (sets_SG == 2).double()
            return Said(inclusion_BG, two_BG / inclusion_BG.clamp_min(1e-300))

        return predict

    def distribution(self) -> dict[Set, float]:
        """Probability of each set."""
        return dict(zip(self.sets, self.p.tolist(), strict=True))


def p_value(found: torch.Tensor, expected: dict[Set, float]) -> float:
    """Chi-square test of rows against probabilities; outcomes that are expected less than five times count as one."""
    rows, n_times = np.unique(found.numpy(), axis=0, return_counts=True)
    n_found = {tuple(row.tolist()): n for row, n in zip(rows, n_times, strict=True)}
    assert set(n_found) <= set(expected), "an outcome that has no probability"
    n = found.shape[0]
    pairs = sorted((n * p, n_found.get(outcome, 0)) for outcome, p in expected.items())
    rare = [pair for pair in pairs if pair[0] < 5]
    often = [pair for pair in pairs if pair[0] >= 5]
    if rare:
        often.append((sum(e for e, _ in rare), sum(o for _, o in rare)))
    e, o = np.array(often).T
    return float(chisquare(o, e * o.sum() / e.sum()).pvalue)
