"""Reverse samplers of sets against distributions that are enumerated."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, chisquare

from scdiva.diffusion.samplers import Sampler, SetState, capped_inclusion, fixed_size_draw, hide, sample_sets
from small_models import N_GENES, Consistent, Inconsistent, Said, p_value

SURE = 1e-4
"""Least p-value of a test whose seeds are fixed."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def empty(n_cells: int, n_present: int, n_genes: int = N_GENES) -> SetState:
    return SetState.empty(torch.full((n_cells,), n_present), n_genes)


@pytest.fixture(scope="module")
def inconsistent() -> Inconsistent:
    return Inconsistent(seed=3)


@pytest.fixture(scope="module")
def expected(inconsistent) -> dict:
    return inconsistent.distribution((0,) * N_GENES, 3)


class TestTheDistribution:
    """Three of four genes, with counts of 1 or 2: 32 outcomes."""

    N_CELLS = 6000

    @pytest.mark.parametrize(
        "sampler",
        [
            Sampler("first-hitting"),
            Sampler("random", n_steps=3, grid="uniform"),
            Sampler("random", n_steps=60, grid="cosine"),
            Sampler("ancestral", n_steps=200, grid="uniform"),
        ],
        ids=lambda s: f"{s.strategy} {s.n_steps}",
    )
    def test_one_gene_at_a_time_is_the_random_order_distribution(self, sampler, inconsistent, expected):
        found = sample_sets(inconsistent.predict, empty(self.N_CELLS, 3), sampler, generator(1))
        assert p_value(found.count_BG, expected) > SURE

    def test_the_test_can_fail(self, inconsistent, expected):
        # all at once, and another model: both are found out
        at_once = sample_sets(inconsistent.predict, empty(self.N_CELLS, 3), Sampler(n_steps=1), generator(1))
        assert p_value(at_once.count_BG, expected) < 1e-10
        other = sample_sets(Inconsistent(4).predict, empty(self.N_CELLS, 3), Sampler("first-hitting"), generator(1))
        assert p_value(other.count_BG, expected) < 1e-10

    @pytest.mark.parametrize("strategy", ["random", "ancestral", "first-hitting", "confidence"])
    def test_the_last_gene_alone_is_exact_for_every_strategy(self, strategy, inconsistent):
        start = torch.tensor([[2, 0, 0, 1]], dtype=torch.int32).repeat(3000, 1)
        state = SetState(start, torch.ones(3000, dtype=torch.int64), torch.ones(3000, dtype=torch.float64))
        found = sample_sets(inconsistent.predict, state, Sampler(strategy, n_steps=4), generator(2))
        assert p_value(found.count_BG, inconsistent.distribution((2, 0, 0, 1), 1)) > SURE

    def test_cells_of_different_sizes_side_by_side(self, inconsistent):
        sizes = torch.arange(6000) % 3 + 1
        state = SetState.empty(sizes, N_GENES)
        found = sample_sets(inconsistent.predict, state, Sampler("first-hitting"), generator(3)).count_BG
        for size in (1, 2, 3):
            expected = inconsistent.distribution((0,) * N_GENES, size)
            assert p_value(found[sizes == size], expected) > SURE


class TestConsistentModel:
    """Two of four genes from a joint distribution whose conditionals the model knows."""

    @pytest.mark.parametrize(
        "sampler",
        [
            Sampler("first-hitting"),
            Sampler("first-hitting", gibbs_rounds=4, gibbs_share=0.5),
            Sampler("ancestral", n_steps=150, grid="uniform", remask=0.05),
        ],
        ids=["first-hitting", "with Gibbs rounds", "with remasking"],
    )
    def test_the_joint_distribution_comes_out(self, sampler):
        model = Consistent(seed=1)
        found = sample_sets(model.predict, empty(4000, 2), sampler, generator(5))
        assert p_value(found.count_BG, model.distribution()) > SURE

    def test_gibbs_rounds_repair_what_parallel_draws_spoilt(self):
        model = Consistent(seed=1)
        at_once, repaired = (
            sample_sets(
                model.predict, empty(6000, 2), Sampler(n_steps=1, gibbs_rounds=rounds, gibbs_share=0.5), generator(5)
            )
            for rounds in (0, 12)
        )
        assert p_value(at_once.count_BG, model.distribution()) < 1e-10
        assert p_value(repaired.count_BG, model.distribution()) > SURE

    def test_a_gibbs_round_redraws(self):
        model = Consistent(seed=1)
        before, after = (
            sample_sets(
                model.predict, empty(500, 2), Sampler("first-hitting", gibbs_rounds=r, gibbs_share=0.5), generator(5)
            )
            for r in (0, 1)
        )
        share = (before.count_BG != after.count_BG).any(dim=1).double().mean()
        assert 0.2 < share < 1

    def test_remasking_hides_again(self):
        # seen from the denoiser: the number of hidden genes goes up now and then
        seen = []
        model = Consistent(seed=1)

        def predict(state):
            seen.append(state.n_hidden_B.clone())
            return model.predict(state)

        sample_sets(predict, empty(200, 2), Sampler("ancestral", n_steps=30, remask=0.2), generator(5))
        assert (torch.diff(torch.stack(seen), dim=0) > 0).any()
        seen.clear()
        sample_sets(predict, empty(200, 2), Sampler("ancestral", n_steps=30), generator(5))
        assert (torch.diff(torch.stack(seen), dim=0) <= 0).all()


class Weights:
    """Inclusion in proportion to fixed weights, whatever is visible; the count says in which call it was drawn."""

    def __init__(self, n_genes: int = 12, seed: int = 0) -> None:
        self.weight_G = torch.rand(n_genes, generator=generator(seed), dtype=torch.float64) + 0.05
        self.seen: list[SetState] = []

    def __call__(self, state: SetState) -> Weights.Prediction:
        self.seen.append(state)
        weight_BG = self.weight_G.repeat(state.n_cells, 1).masked_fill(state.count_BG > 0, 0.0)
        return Weights.Prediction(capped_inclusion(weight_BG, state.n_hidden_B), len(self.seen))

    class Prediction:
        def __init__(self, inclusion_BG: torch.Tensor, n_calls: int) -> None:
            self.inclusion_BG, self.n_calls = inclusion_BG, n_calls

        def draw_counts(self, cell_X, gene_X, generator):
            return torch.full(cell_X.shape, self.n_calls, dtype=torch.int32)


SAMPLERS = st.builds(
    Sampler,
    strategy=st.sampled_from(["random", "confidence", "ancestral", "first-hitting"]),
    n_steps=st.integers(1, 9),
    grid=st.sampled_from(["uniform", "cosine"]),
    selection_noise=st.sampled_from([0.0, 1.0]),
    gibbs_rounds=st.integers(0, 2),
    gibbs_share=st.sampled_from([0.1, 0.5, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(sampler=SAMPLERS, sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_sizes_are_exact_and_no_gene_is_there_twice(sampler, sizes, seed):
    if sampler.strategy == "ancestral":
        sampler = replace(sampler, remask=[0.0, 0.3][seed % 2])
    model = Weights()
    end = sample_sets(model, SetState.empty(torch.tensor(sizes), 12), sampler, generator(seed))
    # a gene is a column: it is there once or not at all
    assert (end.count_BG > 0).sum(dim=1).tolist() == sizes
    assert end.n_hidden_B.tolist() == [0] * len(sizes)
    assert end.count_BG.dtype == torch.int32
    assert (end.t_B == 0).all()
    for state in model.seen:
        assert ((state.count_BG > 0).sum(dim=1) + state.n_hidden_B).tolist() == sizes


@pytest.mark.parametrize("strategy", ["random", "confidence", "ancestral", "first-hitting"])
def test_what_is_visible_stays_as_it_is(strategy):
    start = torch.zeros((50, 12), dtype=torch.int32)
    start[:, 3], start[::2, 7] = 41, 17
    n_hidden = torch.arange(50) % 9
    before = start.clone()
    state = SetState(start, n_hidden, torch.ones(50, dtype=torch.float64))
    end = sample_sets(Weights(), state, Sampler(strategy, n_steps=5), generator())
    np.testing.assert_array_equal(end.count_BG[before > 0], before[before > 0])
    assert ((end.count_BG > 0).sum(dim=1) == (before > 0).sum(dim=1) + n_hidden).all()
    assert torch.equal(state.count_BG, before)  # nor is the start changed


@pytest.mark.parametrize("strategy", ["random", "confidence", "ancestral", "first-hitting"])
def test_every_draw_comes_from_the_generator(strategy):
    one, same, other = (
        sample_sets(Weights(), empty(20, 5, 12), Sampler(strategy, n_steps=3, gibbs_rounds=1), generator(seed)).count_BG
        for seed in (7, 7, 8)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


class TestSteps:
    @pytest.mark.parametrize("strategy", ["random", "confidence"])
    @pytest.mark.parametrize("grid", ["uniform", "cosine"])
    def test_exact_numbers_follow_the_grid(self, strategy, grid):
        model, sampler = Weights(60), Sampler(strategy, n_steps=6, grid=grid)
        sample_sets(model, empty(3, 40, 60), sampler, generator())
        t = [1 - k / 6 if grid == "uniform" else np.cos(np.pi / 2 * k / 6) for k in range(6)]
        np.testing.assert_allclose(sampler.times(), [*t, 0])
        assert [state.n_hidden_B.tolist() for state in model.seen] == [[round(40 * s)] * 3 for s in t]
        np.testing.assert_allclose([state.t_B[0] for state in model.seen], t)

    def test_the_cosine_grid_reveals_few_genes_early(self):
        cosine, uniform = Sampler(grid="cosine").times(), Sampler(grid="uniform").times()
        assert all(c > u for c, u in zip(cosine[1:-1], uniform[1:-1], strict=True))

    def test_first_hitting_calls_the_network_once_per_gene_at_falling_times(self):
        model = Weights()
        sample_sets(model, empty(400, 8, 12), Sampler("first-hitting", n_steps=2), generator())
        assert len(model.seen) == 8
        t = torch.stack([state.t_B for state in model.seen])
        assert (torch.diff(t, dim=0) < 0).all()
        # the times are those of eight uniform numbers, largest first
        np.testing.assert_allclose(t.mean(dim=1), np.arange(8, 0, -1) / 9, atol=0.03)

    def test_ancestral_steps_reveal_each_gene_with_probability_t_minus_s_over_t(self):
        model = Weights()
        sample_sets(model, empty(3000, 10, 12), Sampler("ancestral", n_steps=5, grid="uniform"), generator())
        for k, state in enumerate(model.seen):
            assert float(state.n_hidden_B.double().mean()) == pytest.approx(10 * (1 - k / 5), abs=0.15)
        assert binomtest(int((model.seen[1].n_hidden_B == 10).sum()), 3000, 0.8**10).pvalue > SURE

    def test_plain_ancestral_sampling_written_once_more(self, inconsistent):
        """Without remasking the sampler is MDLM's, bit for bit: the same draws from the same generator."""
        sampler = Sampler("ancestral", n_steps=7, remask=0.0)
        found = sample_sets(inconsistent.predict, empty(300, 3), sampler, generator(4))
        own, state = generator(4), empty(300, 3)
        for t, s in pairwise(sampler.times()):
            state = state.at(t)
            said = inconsistent.predict(state)
            p = torch.full((300,), (t - s) / t if s > 0 else 1.0, dtype=torch.float64)
            k = torch.binomial(state.n_hidden_B.double(), p, generator=own).long()
            share = k / state.n_hidden_B.clamp_min(1)
            is_drawn = fixed_size_draw(said.inclusion_BG * share[:, None], k, own)
            cell, gene = is_drawn.nonzero(as_tuple=True)
            count = state.count_BG.clone()
            count[cell, gene] = said.draw_counts(cell, gene, own)
            state = replace(state, count_BG=count, n_hidden_B=state.n_hidden_B - k)
        assert torch.equal(found.count_BG, state.count_BG)


class TestConfidence:
    def first_step(self, noise: float, n_cells: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
        """Genes after the first of two steps, and the inclusion before it."""
        model = Weights()
        sampler = Sampler("confidence", n_steps=2, grid="uniform", selection_noise=noise)
        sample_sets(model, empty(n_cells, 6, 12), sampler, generator())
        before = capped_inclusion(model.weight_G[None], torch.tensor([6]))[0]
        return model.seen[1].count_BG > 0, before

    def test_with_much_noise_it_is_as_good_as_random(self):
        is_kept, inclusion = self.first_step(1e6)
        assert (is_kept.sum(dim=1) == 3).all()
        for gene in range(12):
            assert binomtest(int(is_kept[:, gene].sum()), 4000, float(inclusion[gene]) * 3 / 6).pvalue > SURE

    def test_without_noise_the_most_probable_of_the_drawn_are_kept(self):
        greedy, inclusion = self.first_step(0.0)
        noisy, _ = self.first_step(1e6)
        score = inclusion.clamp_min(1e-9).log()
        assert score.repeat(4000, 1)[greedy].mean() > score.repeat(4000, 1)[noisy].mean() + 0.1
        # the most probable gene is kept whenever it is drawn
        best = int(inclusion.argmax())
        assert binomtest(int(greedy[:, best].sum()), 4000, min(1.0, float(inclusion[best]))).pvalue > SURE

    def test_less_noise_is_greedier(self):
        score = []
        for noise in (0.0, 1.0, 10.0):
            is_kept, inclusion = self.first_step(noise)
            score.append(float(inclusion.log().repeat(4000, 1)[is_kept].mean()))
        assert score[0] > score[1] > score[2]


class TestHide:
    def test_every_choice_is_equally_likely(self):
        count = torch.tensor([[5, 0, 3, 1, 2, 0]], dtype=torch.int32).repeat(6000, 1)
        state = SetState(count, torch.ones(6000, dtype=torch.int64), torch.zeros(6000, dtype=torch.float64))
        after = hide(state, torch.full((6000,), 2), generator())
        assert (after.n_hidden_B == 3).all()
        assert ((after.count_BG == count) | (after.count_BG == 0)).all()
        sets, found = np.unique((after.count_BG > 0).numpy(), axis=0, return_counts=True)
        assert sets.shape[0] == 6
        assert chisquare(found).pvalue > SURE

    def test_as_many_as_each_cell_is_told(self):
        count = torch.ones((4, 9), dtype=torch.int32)
        state = SetState(count, torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.float64))
        after = hide(state, torch.tensor([0, 9, 4, 1]), generator())
        assert (after.count_BG == 0).sum(dim=1).tolist() == after.n_hidden_B.tolist() == [0, 9, 4, 1]
        assert (state.count_BG == 1).all()

    def test_among_some_genes_only(self):
        count = torch.ones((50, 9), dtype=torch.int32)
        among = torch.zeros((50, 9), dtype=torch.bool)
        among[:, :3] = True
        state = SetState(count, torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.float64))
        after = hide(state, torch.full((50,), 2), generator(), among_BG=among)
        assert (after.count_BG[:, 3:] == 1).all()
        assert (after.count_BG[:, :3] == 0).sum(dim=1).tolist() == [2] * 50

    def test_nothing_is_visible(self):
        state = empty(3, 4)
        assert torch.equal(hide(state, torch.zeros(3, dtype=torch.int64), generator()).count_BG, state.count_BG)


class TestFixedSizeDraw:
    def frequencies(self, weight: list[float], k: int, n: int = 20_000) -> np.ndarray:
        """Many calls: the order of the genes is that of a call."""
        rows, own = n // 50, generator(1)
        weight_BG = torch.tensor([weight], dtype=torch.float64).repeat(rows, 1)
        total = np.zeros(len(weight))
        for _ in range(50):
            drawn = fixed_size_draw(weight_BG, torch.full((rows,), k), own)
            assert (drawn.sum(dim=1) == k).all()
            total += drawn.sum(dim=0).numpy()
        return total

    @pytest.mark.parametrize(
        ("weight", "k", "target"),
        [
            ([1, 2, 3, 4], 1, [0.1, 0.2, 0.3, 0.4]),
            ([1, 2, 3, 4], 2, [0.2, 0.4, 0.6, 0.8]),
            ([0, 5, 0, 5, 10], 1, [0, 0.25, 0, 0.25, 0.5]),
            # capped at 1; the excess goes to the others in proportion
            ([1, 1, 2, 96], 2, [0.25, 0.25, 0.5, 1]),
            # capping one gene makes the next too probable
            ([1, 1, 6, 60], 3, [0.5, 0.5, 1, 1]),
            ([1e-9, 1, 1, 1], 2, [2e-9 / 3, 2 / 3, 2 / 3, 2 / 3]),
            ([3, 0, 2], 2, [1, 0, 1]),
            ([1, 2, 3], 3, [1, 1, 1]),
            ([1, 2, 3], 0, [0, 0, 0]),
        ],
    )
    def test_inclusion_frequencies_match_their_targets(self, weight, k, target):
        pi = capped_inclusion(torch.tensor([weight], dtype=torch.float64), torch.tensor([k]))[0]
        np.testing.assert_allclose(pi, target, rtol=1e-9)
        found = self.frequencies(weight, k)
        for n_found, p in zip(found, target, strict=True):
            if p in (0, 1):
                assert n_found == 20_000 * p
            else:
                assert binomtest(int(n_found), 20_000, p).pvalue > SURE

    def test_pairs_are_drawn_together_about_as_often_as_they_must(self):
        # of four equal genes two: no pair is impossible, as it would be in a fixed order
        own, both = generator(2), np.zeros((4, 4))
        for _ in range(600):
            drawn = fixed_size_draw(torch.ones((20, 4), dtype=torch.float64), torch.full((20,), 2), own).double()
            both += (drawn.T @ drawn).numpy()
        off = both[np.triu_indices(4, 1)] / 12_000
        np.testing.assert_allclose(off, 1 / 6, atol=0.02)

    def test_rows_are_drawn_with_their_own_weights_and_numbers(self):
        weight = torch.rand((200, 30), generator=generator(3), dtype=torch.float64)
        weight[:, ::3] = 0
        k = torch.arange(200) % 21
        drawn = fixed_size_draw(weight, k, generator(4))
        assert torch.equal(drawn.sum(dim=1), k)
        assert not drawn[:, ::3].any()

    @settings(max_examples=150, deadline=None)
    @given(
        exponents=st.lists(st.one_of(st.none(), st.floats(-200, 200)), min_size=1, max_size=12),
        share=st.floats(0, 1),
        seed=st.integers(0, 99),
    )
    def test_weights_of_any_size(self, exponents, share, seed):
        weight = torch.tensor([[0.0 if e is None else 10.0**e for e in exponents]], dtype=torch.float64)
        k = torch.tensor([round(share * int((weight > 0).sum()))])
        drawn = fixed_size_draw(weight, k, generator(seed))
        assert int(drawn.sum()) == int(k)
        assert not drawn[weight == 0].any()
        pi = capped_inclusion(weight, k)
        assert float(pi.sum()) == pytest.approx(float(k), rel=1e-6)
        assert ((pi >= 0) & (pi <= 1)).all()

    def test_counts_go_to_the_genes_that_were_drawn(self):
        # a count is asked of the very genes that are revealed, once each
        asked = []

        class Counted(Said):
            def draw_counts(self, cell_X, gene_X, generator):
                asked.append(torch.stack([cell_X, gene_X]))
                return (10 * cell_X + gene_X + 1).to(torch.int32)

        def predict(state):
            p = torch.full((state.n_cells, 6), 1.0, dtype=torch.float64).masked_fill(state.count_BG > 0, 0.0)
            return Counted(capped_inclusion(p, state.n_hidden_B), p)

        end = sample_sets(predict, empty(5, 4, 6), Sampler(n_steps=3), generator())
        cell, gene = end.count_BG.nonzero(as_tuple=True)
        assert torch.equal(end.count_BG[cell, gene].long(), 10 * cell + gene + 1)
        assert {tuple(pair) for pair in torch.cat(asked, dim=1).T.tolist()} == set(
            zip(cell.tolist(), gene.tolist(), strict=True)
        )
