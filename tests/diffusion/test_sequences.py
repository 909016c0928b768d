"""Reverse samplers of sequences: exact one by one, and never a gene twice whatever is predicted."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scdiva.diffusion import sequences
from scdiva.diffusion.samplers import Sampler
from scdiva.diffusion.sequences import NO_GENE, SequenceState, sample_sequences
from scdiva.errors import ConfigError
from small_models import p_value

N_PLACES, N_GENES = 3, 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def hidden(n_cells: int, n_places: int = N_PLACES, n_genes: int = N_GENES) -> SequenceState:
    nothing = torch.zeros((n_cells, n_places), dtype=torch.int64)
    every = torch.ones((n_cells, n_places), dtype=torch.bool)
    return SequenceState.start(nothing, nothing, every, torch.ones((n_cells, n_genes), dtype=torch.bool))


class Said:
    """Logits of each place, and of each gene in it the probability that its count is 2."""

    def __init__(self, logit_BLG: torch.Tensor, p_two_BLG: torch.Tensor) -> None:
        self.logit_BLG, self.p_two_BLG = logit_BLG, p_two_BLG

    def log_prob(self, cell_X, place_X):
        return self.logit_BLG[cell_X, place_X]

    def draw_counts(self, cell_X, place_X, gene_X, generator):
        u = torch.rand(cell_X.shape, generator=generator, dtype=torch.float64)
        return 1 + (u < self.p_two_BLG[cell_X, place_X, gene_X]).to(torch.int32)


class Denoiser:
    """What a place says depends on what stands in the others: on their places, genes and counts."""

    def __init__(self, seed: int = 0) -> None:
        shape = (N_PLACES, N_GENES)
        self.own, self.own_two = torch.randn(2, *shape, generator=generator(seed), dtype=torch.float64)
        self.of, self.of_two = torch.randn(2, *shape, *shape, generator=generator(seed + 1), dtype=torch.float64)

    def said(self, gene_BL: torch.Tensor, count_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one_hot = torch.nn.functional.one_hot(gene_BL.clamp_min(0), N_GENES) * count_BL[:, :, None]
        x = one_hot.double().flatten(1)
        logit_BLG, two_BLG = (
            own + (x @ of.flatten(2).flatten(0, 1).T).view(-1, N_PLACES, N_GENES)
            for own, of in ((self.own, self.of), (self.own_two, self.of_two))
        )
        return logit_BLG, torch.sigmoid(two_BLG)

    def predict(self, state: SequenceState) -> Said:
        return Said(*self.said(state.gene_BL, state.count_BL))

    def distribution(self, gene: tuple, count: tuple) -> dict[tuple, float]:
        """Probability of each (genes, counts) when hidden places are revealed one by one in random order."""
        places = [place for place, g in enumerate(gene) if g == NO_GENE]
        if not places:
            return {(*gene, *count): 1.0}
        found: dict[tuple, float] = defaultdict(float)
        logit, two = self.said(torch.tensor([gene]), torch.tensor([count]))
        left = [g for g in range(N_GENES) if g not in gene]
        for place in places:
            p = logit[0, place, left].softmax(dim=0)
            for g, p_gene in zip(left, p.tolist(), strict=True):
                p_two = float(two[0, place, g])
                for c, p_count in ((1, 1 - p_two), (2, p_two)):
                    then = (
                        tuple(g if at == place else x for at, x in enumerate(gene)),
                        tuple(c if at == place else x for at, x in enumerate(count)),
                    )
                    for end, rest in self.distribution(*then).items():
                        found[end] += p_gene * p_count * rest / len(places)
        return found


def rows_of(state: SequenceState) -> torch.Tensor:
    return torch.cat([state.gene_BL, state.count_BL], dim=1)


ONE_BY_ONE = [
    Sampler("first-hitting"),
    Sampler("random", n_steps=3, grid="uniform"),
    Sampler("random", n_steps=40, grid="cosine"),
]


class TestTheDistribution:
    @pytest.mark.parametrize("sampler", ONE_BY_ONE, ids=lambda s: f"{s.strategy} {s.n_steps}")
    def test_one_place_at_a_time_is_the_random_order_distribution(self, sampler):
        denoiser = Denoiser()
        found = sample_sequences(denoiser.predict, hidden(8000), sampler, generator(1))
        expected = denoiser.distribution((NO_GENE,) * N_PLACES, (0,) * N_PLACES)
        assert p_value(rows_of(found), expected) > 1e-4

    def test_the_test_can_fail(self):
        denoiser = Denoiser()
        expected = denoiser.distribution((NO_GENE,) * N_PLACES, (0,) * N_PLACES)
        for other in (Denoiser(3).predict, denoiser.predict):  # another model, and all places at once
            found = sample_sequences(other, hidden(8000), Sampler(n_steps=1), generator(1))
            assert p_value(rows_of(found), expected) < 1e-10

    @pytest.mark.parametrize("strategy", ["random", "confidence", "first-hitting"])
    def test_the_last_place_alone_is_exact_for_every_strategy(self, strategy):
        gene, count = torch.tensor([[2, 9, 0]]).repeat(3000, 1), torch.tensor([[2, 9, 1]]).repeat(3000, 1)
        is_hidden = torch.tensor([[False, True, False]]).repeat(3000, 1)
        start = SequenceState.start(gene, count, is_hidden, torch.ones((3000, N_GENES), dtype=torch.bool))
        denoiser = Denoiser()
        found = sample_sequences(denoiser.predict, start, Sampler(strategy, n_steps=4), generator(2))
        assert p_value(rows_of(found), denoiser.distribution((2, NO_GENE, 0), (2, 0, 1))) > 1e-4

    def test_places_that_do_not_matter_to_each_other_are_drawn_at_once(self):
        # each place wants a gene of its own: no collisions, and one step is exact
        logit = torch.log(torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 0.2, 0.8]], dtype=torch.float64))

        def predict(state):
            return Said(logit.expand(state.gene_BL.shape[0], -1, -1), torch.zeros((4000, 2, 4)))

        found = sample_sequences(predict, hidden(4000, 2), Sampler(n_steps=1), generator())
        expected = {(a, b, 1, 1): float(logit[0, a].exp() * logit[1, b].exp()) for a in (0, 1) for b in (2, 3)}
        assert p_value(rows_of(found), expected) > 1e-4


class Adversary:
    """Every place of a cell prefers the same gene, by far; which one depends on what is visible."""

    def __init__(self, n_genes: int, strength: float) -> None:
        self.n_genes, self.strength, self.seen = n_genes, strength, []

    def __call__(self, state: SequenceState) -> Said:
        self.seen.append(state)
        logit = torch.zeros((*state.gene_BL.shape, self.n_genes), dtype=torch.float32)
        logit[:, :, len(self.seen) % self.n_genes] = self.strength
        return Said(logit, torch.full_like(logit, 0.5))


SAMPLERS = st.builds(
    Sampler,
    strategy=st.sampled_from(["random", "confidence", "first-hitting"]),
    n_steps=st.integers(1, 8),
    grid=st.sampled_from(["uniform", "cosine"]),
    selection_noise=st.sampled_from([0.0, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(
    sampler=SAMPLERS,
    n_places=st.integers(1, 9),
    n_spare=st.integers(0, 3),
    strength=st.sampled_from([0.0, 3.0, 700.0, 1e30]),
    seed=st.integers(0, 99),
)
def test_no_gene_is_ever_there_twice(sampler, n_places, n_spare, strength, seed):
    rng = np.random.default_rng(seed)
    n_cells, n_genes = 5, n_places + n_spare
    # some places visible, some absent: cells of different lengths
    gene = torch.from_numpy(np.stack([rng.permutation(n_genes)[:n_places] for _ in range(n_cells)]))
    kind = torch.from_numpy(rng.integers(0, 4, (n_cells, n_places)))
    is_hidden, is_absent = kind >= 2, kind == 1
    gene[is_absent] = NO_GENE
    count = torch.from_numpy(rng.integers(1, 9, (n_cells, n_places)))
    start = SequenceState.start(gene, count, is_hidden, torch.ones((n_cells, n_genes), dtype=torch.bool))
    before = (start.gene_BL.clone(), start.count_BL.clone())
    model = Adversary(n_genes, strength)
    end = sample_sequences(model, start, sampler, generator(seed))
    for state in (*model.seen, end):
        for row in state.gene_BL.tolist():
            present = [g for g in row if g != NO_GENE]
            assert len(set(present)) == len(present)
        # what is visible never changes
        is_visible = before[0] != NO_GENE
        assert torch.equal(state.gene_BL[is_visible], before[0][is_visible])
        assert torch.equal(state.count_BL[is_visible], before[1][is_visible])
    assert not end.is_hidden_BL.any()
    assert torch.equal(end.gene_BL == NO_GENE, is_absent)
    assert torch.equal(end.count_BL > 0, ~is_absent)
    assert torch.equal(start.gene_BL, before[0])


def test_genes_that_are_not_measured_are_never_drawn():
    measured = torch.tensor([[True, False, True, True, False]]).repeat(200, 1)
    nothing = torch.zeros((200, 3), dtype=torch.int64)
    start = SequenceState.start(nothing, nothing, nothing == 0, measured)
    for strategy in ("random", "confidence", "first-hitting"):
        end = sample_sequences(Adversary(5, 50.0), start, Sampler(strategy, n_steps=2), generator())
        assert set(end.gene_BL.unique().tolist()) == {0, 2, 3}


def test_losers_of_a_collision_stay_hidden_for_the_next_step():
    model = Adversary(9, 1e4)  # one winner per cell and step
    sample_sequences(model, hidden(4, 6, 9), Sampler("random", n_steps=3, grid="uniform"), generator())
    assert [state.n_hidden_B.tolist() for state in model.seen] == [[6] * 4, [5] * 4, [4] * 4]
    assert [float(state.t_B[0]) for state in model.seen] == pytest.approx([1, 2 / 3, 1 / 3])


def test_without_collisions_the_numbers_follow_the_grid():
    def predict(state):
        seen.append(state.n_hidden_B.tolist())
        logit = torch.full((6, 6), float("-inf")).fill_diagonal_(0.0)
        return Said(logit.expand(4, -1, -1), torch.zeros((4, 6, 6)))

    for strategy in ("random", "confidence"):
        seen: list = []
        end = sample_sequences(predict, hidden(4, 6, 6), Sampler(strategy, n_steps=3, grid="uniform"), generator())
        assert seen == [[6] * 4, [4] * 4, [2] * 4]
        assert end.gene_BL.tolist() == [list(range(6))] * 4


def test_the_most_confident_place_keeps_the_gene():
    # both places draw gene 0, the second more surely; in the last round the first takes what is left
    logit = torch.tensor([[1.0, 0.0], [40.0, 0.0]])

    def predict(state):
        return Said(logit.expand(2000, -1, -1), torch.zeros((2000, 2, 2)))

    end = sample_sequences(predict, hidden(2000, 2, 2), Sampler(n_steps=1), generator())
    assert (end.gene_BL[:, 1] == 0).all()


def test_confidence_reveals_sure_places_first():
    logit = torch.zeros((6, 20))
    logit[[1, 4], [3, 7]] = 30.0

    def predict(state):
        seen.append(state)
        return Said(logit.expand(50, -1, -1), torch.zeros((50, 6, 20)))

    seen: list = []
    sampler = Sampler("confidence", n_steps=3, grid="uniform", selection_noise=0.0)
    sample_sequences(predict, hidden(50, 6, 20), sampler, generator())
    assert seen[1].gene_BL[:, [1, 4]].tolist() == [[3, 7]] * 50
    assert (seen[1].n_hidden_B == 4).all()


def test_rows_of_all_genes_exist_for_some_places_at_a_time(monkeypatch):
    sizes = []

    class Watched(Said):
        def log_prob(self, cell_X, place_X):
            sizes.append(cell_X.numel())
            return super().log_prob(cell_X, place_X)

    def predict(state):
        logit = torch.randn((*state.gene_BL.shape, 30), generator=generator(5))
        return Watched(logit, torch.full_like(logit, 0.5))

    monkeypatch.setattr(sequences, "_PLACES", 7)
    end = sample_sequences(predict, hidden(8, 10, 30), Sampler("confidence", n_steps=2), generator())
    assert max(sizes) == 7
    assert all(len(set(row)) == 10 for row in end.gene_BL.tolist())


@pytest.mark.parametrize("strategy", ["random", "confidence", "first-hitting"])
def test_every_draw_comes_from_the_generator(strategy):
    one, same, other = (
        rows_of(sample_sequences(Denoiser().predict, hidden(30), Sampler(strategy, n_steps=2), generator(seed)))
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    "sampler", [Sampler("ancestral"), Sampler("ancestral", remask=0.1), Sampler(gibbs_rounds=1)], ids=str
)
def test_what_is_for_sets_only_is_refused(sampler):
    with pytest.raises(ConfigError, match="set layout"):
        sample_sequences(Denoiser().predict, hidden(2), sampler, generator())


def test_an_impossible_prediction_or_start_is_refused():
    def predict(state):
        logit = torch.full((2, 2, 4), float("-inf"))
        logit[:, :, 0] = 0.0  # two places, and one gene for both
        return Said(logit, torch.zeros((2, 2, 4)))

    with pytest.raises(ValueError, match="no probability"):
        sample_sequences(predict, hidden(2, 2), Sampler(n_steps=1), generator())
    with pytest.raises(ValueError, match="more hidden places"):
        hidden(2, 5, 4)
    twice = torch.tensor([[1, 1, 0]])
    with pytest.raises(ValueError, match="two places"):
        SequenceState.start(twice, twice, twice == 0, torch.ones((1, 4), dtype=torch.bool))
