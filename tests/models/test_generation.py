"""The native network as a denoiser: guidance, where z comes from, and what it sees."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch

import native_cells
import twins
from native_cells import LABEL_SIZES, N_GENES, build, dense_counts, stir, tensors_of, with_labels
from scdiva.config import NativeObjectiveConfig
from scdiva.diffusion.samplers import Sampler, SetState, sample_sets
from scdiva.errors import UnsupportedError, UntrainedHeadError
from scdiva.losses import inclusion_probabilities
from scdiva.models.scdiva import generation
from scdiva.models.scdiva.generation import GuidedPrediction, Wish, denoiser, visible_cells
from scdiva.models.scdiva.objectives import DenoisedCells

N_CELLS = 12
MEASURED = np.arange(N_GENES) % 9 != 4


@pytest.fixture(scope="module")
def cells():
    dense = dense_counts(60) * MEASURED
    return with_labels(twins.cell_counts(dense, library_size=dense.sum(axis=1) * 1.3 + 1, measured=MEASURED))


@pytest.fixture(scope="module")
def built(cells):
    """A network with two condition fields, in which nothing is zero."""
    return stir(build(cells, label_sizes=LABEL_SIZES))


def wish_of(n: int = N_CELLS, **changes: Any) -> Wish:
    rng = np.random.default_rng(1)
    usual = {
        "depth": rng.integers(50, 400, n),
        "library_size": rng.integers(400, 600, n).astype(float),
        "condition": np.tile(np.array([[2, 1]], dtype=np.int32), (n, 1)),
        "is_measured": np.tile(MEASURED, (n, 1)),
        "weight": np.ones(2),
    }
    return Wish(**{**usual, **changes})


def state_of(n: int = N_CELLS, t: float = 0.4, n_hidden: int = 9, seed: int = 0) -> SetState:
    """Some genes visible."""
    rng = np.random.default_rng(seed)
    count = rng.poisson(0.6, (n, N_GENES)) * MEASURED
    count[0] = 0
    return SetState(
        torch.from_numpy(count.astype(np.int32)), torch.full((n,), n_hidden), torch.full((n,), t, dtype=torch.float64)
    )


@torch.no_grad()
def said(built, state: SetState, wish: Wish) -> GuidedPrediction:
    return denoiser(built.network, built.tokeniser, wish)(state)


@torch.no_grad()
def plain(built, state: SetState, wish: Wish, condition) -> tuple[torch.Tensor, Any, Any]:
    """Inclusion, network output and cells under some condition codes: one call of the network."""
    z = None if wish.z is None else torch.from_numpy(wish.z)
    cells = visible_cells(state, built.tokeniser, wish)
    cells = replace(cells, condition_BC=torch.from_numpy(np.asarray(condition)).long())
    output = built.network(cells, z)
    return built.network.gene_probabilities(cells, output), output, cells


def log_odds(p: torch.Tensor) -> torch.Tensor:
    return p.double().log() - torch.log1p(-p.double())


@pytest.fixture
def means(monkeypatch):
    """Log-means and log inverse dispersions that counts are drawn with."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def draw(log_mean, log_theta, generator):
        seen.append((log_mean, log_theta))
        return torch.ones_like(log_mean, dtype=torch.int64)

    monkeypatch.setattr(generation, "draw_ztnb", draw)
    return seen


EVERY = (torch.arange(N_CELLS).repeat_interleave(N_GENES), torch.arange(N_GENES).repeat(N_CELLS))


class TestInclusion:
    @pytest.mark.parametrize("weight", [(1.0, 1.0), (3.0, 1.0), (0.0, 2.5)])
    def test_rows_sum_to_what_is_hidden_and_the_visible_have_none(self, weight, built):
        state = replace(state_of(), n_hidden_B=torch.arange(N_CELLS) % 10)
        inclusion = said(built, state, wish_of(weight=np.array(weight))).inclusion_BG
        np.testing.assert_allclose(inclusion.sum(dim=1), state.n_hidden_B, rtol=1e-4, atol=1e-5)
        assert (inclusion[state.count_BG > 0] == 0).all()
        assert (inclusion[:, ~torch.from_numpy(MEASURED)] == 0).all()
        assert ((inclusion >= 0) & (inclusion <= 1 + 1e-6)).all()

    def test_a_cell_of_all_measured_genes(self, built):
        n = int(MEASURED.sum())
        state = SetState.empty(torch.full((N_CELLS,), n), N_GENES)
        end = sample_sets(denoiser(built.network, built.tokeniser, wish_of()), state, Sampler(n_steps=3), generator())
        assert torch.equal(end.count_BG > 0, torch.from_numpy(np.tile(MEASURED, (N_CELLS, 1))))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestGuidance:
    @pytest.mark.parametrize("weight", [(1.0, 1.0), (5.0, 7.0)])
    def test_weight_1_or_no_condition_is_plain_conditioning_bit_for_bit(self, weight, built, means):
        # weights of fields without a condition do nothing
        condition = np.zeros((N_CELLS, 2), dtype=np.int32) if weight != (1.0, 1.0) else wish_of().condition
        state, wish = state_of(), wish_of(condition=condition, weight=np.array(weight))
        found = said(built, state, wish)
        inclusion, output, _ = plain(built, state, wish, condition)
        assert len(found.outputs) == 1
        assert torch.equal(found.inclusion_BG, inclusion.double())
        with torch.no_grad():
            found.draw_counts(*EVERY, generator())
            direction = built.network.trunk.value_direction(output.states.query_BD)[EVERY[0]]
            assert torch.equal(means[0][0], built.network.log_mean(output, *EVERY, direction))
            assert torch.equal(means[0][1], built.network.log_dispersion(output, *EVERY, direction))

    def test_whole_cells_with_weight_1_are_those_without_guidance(self, built):
        ends = []
        for weight in (np.ones(2), np.array([1.0, 1.0 + 1e-12])):
            predict = denoiser(built.network, built.tokeniser, wish_of(weight=weight))
            with torch.no_grad():
                ends.append(
                    sample_sets(predict, SetState.empty(torch.full((N_CELLS,), 9), N_GENES), Sampler(), generator())
                )
        assert torch.equal(ends[0].count_BG, ends[1].count_BG)

    @pytest.mark.parametrize("t", [0.0, 0.25, 1.0])
    @pytest.mark.parametrize("weight", [(3.0, 1.0), (0.5, 2.0), (0.0, 4.0)])
    def test_equals_the_formula(self, t, weight, built, means):
        state, wish = state_of(t=t), wish_of(weight=np.array(weight))
        found = said(built, state, wish)
        both, first, second, none = ([2, 1], [2, 0], [0, 1], [0, 0])
        of = {name: plain(built, state, wish, np.tile(c, (N_CELLS, 1))) for name, c in
              (("all", both), (0, first), (1, second), ("none", none))}  # fmt: skip
        extra = [(w - 1) * (1 - t) for w in weight]
        # each p is normalised, then combined, then normalised again
        admissible = of["all"][2].is_admissible_BG
        logit = log_odds(of["all"][0]) + sum(extra[j] * (log_odds(of[j][0]) - log_odds(of["none"][0])) for j in (0, 1))
        logit = logit.masked_fill(~admissible, 0.0).float()
        expected = inclusion_probabilities(logit, admissible, state.n_hidden_B)
        np.testing.assert_allclose(found.inclusion_BG, expected, rtol=2e-3, atol=1e-6)
        with torch.no_grad():
            found.draw_counts(*EVERY, generator())
            log_mean = {
                name: built.network.log_mean(
                    output, *EVERY, built.network.trunk.value_direction(output.states.query_BD)[EVERY[0]]
                )
                for name, (_, output, _) in of.items()
            }
        wanted = log_mean["all"] + sum(extra[j] * (log_mean[j] - log_mean["none"]) for j in (0, 1))
        np.testing.assert_allclose(means[0][0], wanted, atol=2e-4)

    def test_a_weight_of_0_ends_without_the_condition(self, built):
        one = np.tile(np.array([[2, 0]], dtype=np.int32), (N_CELLS, 1))
        none = np.zeros_like(one)
        for t, like in ((0.0, none), (1.0, one)):
            state = state_of(t=t)
            found = said(built, state, wish_of(condition=one, weight=np.array([0.0, 1.0]))).inclusion_BG
            expected, _, _ = plain(built, state, wish_of(), like)
            np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)
        assert not np.allclose(
            plain(built, state, wish_of(), one)[0], plain(built, state, wish_of(), none)[0], rtol=0.02
        )

    def test_a_strong_weight_moves_away_from_no_condition(self, built):
        state = state_of(t=0.0)
        one = np.tile(np.array([[2, 0]], dtype=np.int32), (N_CELLS, 1))
        weak, strong = (
            said(built, state, wish_of(condition=one, weight=np.array([w, 1.0]))).inclusion_BG for w in (1.0, 4.0)
        )
        none, _, cells = plain(built, state, wish_of(), np.zeros_like(one))
        admissible = cells.is_admissible_BG
        towards = (log_odds(weak) - log_odds(none))[admissible]
        moved = (log_odds(strong) - log_odds(weak))[admissible]
        assert np.corrcoef(towards, moved)[0, 1] > 0.99
        assert moved.abs().mean() > 2 * towards.abs().mean()

    def test_it_grows_as_genes_appear(self, built):
        distance = []
        for t in (0.9, 0.5, 0.1):
            state = state_of(t=t)
            plainly, guided = (said(built, state, wish_of(weight=np.array([w, 1.0]))).inclusion_BG for w in (1.0, 4.0))
            distance.append(float((guided - plainly).abs().mean()))
        assert distance[0] < distance[1] < distance[2]

    def test_cells_that_lack_the_condition_are_not_guided_by_it(self, built):
        condition = np.tile(np.array([[2, 0]], dtype=np.int32), (N_CELLS, 1))
        condition[5:] = 0
        state = state_of(t=0.0)
        plainly, guided = (
            said(built, state, wish_of(condition=condition, weight=np.array([w, 1.0]))).inclusion_BG for w in (1.0, 4.0)
        )
        np.testing.assert_allclose(guided[5:], plainly[5:], rtol=1e-3, atol=1e-6)
        assert (guided[1:5] - plainly[1:5]).abs().max() > 1e-3

    def test_without_a_trunk_nothing_is_conditioned(self, cells):
        bare = stir(build(cells, has_trunk=False))
        state = state_of()
        wish = wish_of(condition=np.zeros((N_CELLS, 0), dtype=np.int32), weight=np.zeros(0))
        end = sample_sets(denoiser(bare.network, bare.tokeniser, wish), state, Sampler(n_steps=3), generator())
        assert (end.n_hidden_B == 0).all()


class TestWhereZComesFrom:
    def outputs(self, built, **changes):
        return said(built, state_of(), wish_of(**changes)).outputs[0]

    def test_visible_null_and_given_z_differ(self, built):
        z = np.random.default_rng(0).normal(size=(N_CELLS, 6)).astype(np.float32)
        visible, null, given = (
            self.outputs(built, **changes)
            for changes in ({}, {"is_null": True}, {"z": z, "z_depth": np.full(N_CELLS, 200.0)})
        )
        np.testing.assert_array_equal(given.latent_BZ, z)
        assert torch.equal(null.latent_BZ, built.network.null_latent.detach().expand(N_CELLS, -1))
        logits = [output.gene_logit_BG for output in (visible, null, given)]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert (logits[i] - logits[j]).abs().max() > 1e-3

    def test_visible_z_is_that_of_the_visible_genes(self, built):
        state = state_of()
        counts = sp.csr_matrix(state.count_BG.numpy())
        wish = wish_of()
        cells = twins.cell_counts(counts.toarray(), library_size=wish.library_size)
        packed = native_cells.corrupt(
            built, with_labels(cells), np.zeros(counts.shape, bool), np.zeros(counts.shape, bool)
        )
        with torch.no_grad():
            expected = built.network.latent(packed[0])
        np.testing.assert_allclose(self.outputs(built).latent_BZ, expected, atol=1e-5)

    def test_visible_z_changes_as_genes_appear_and_a_given_one_does_not(self, built):
        z = np.zeros((N_CELLS, 6), dtype=np.float32)
        for changes, is_same in (({}, False), ({"z": z, "z_depth": np.ones(N_CELLS)}, True), ({"is_null": True}, True)):
            predict = denoiser(built.network, built.tokeniser, wish_of(**changes))
            with torch.no_grad():
                one, two = (predict(state_of(seed=seed)).outputs[0].latent_BZ for seed in (1, 2))
            assert torch.equal(one, two) is is_same

    def test_the_depth_behind_a_given_z_is_told(self, built):
        z = np.zeros((N_CELLS, 6), dtype=np.float32)
        few, many = (self.outputs(built, z=z, z_depth=np.full(N_CELLS, d)) for d in (10.0, 5000.0))
        assert (few.gene_logit_BG - many.gene_logit_BG).abs().max() > 1e-4


class TestWhatTheNetworkSees:
    @pytest.mark.parametrize("max_tokens", [64, 5])
    def test_equals_what_training_makes_of_the_same_visible_tokens(self, max_tokens, cells):
        built = stir(build(cells, label_sizes=LABEL_SIZES, max_tokens=max_tokens))
        some = cells.take(np.arange(N_CELLS))
        dense = some.counts.toarray()
        is_hidden = (dense > 0) & (np.random.default_rng(3).random(dense.shape) < 0.5)
        nothing = np.zeros_like(is_hidden)
        trained, _ = native_cells.corrupt(built, some, is_hidden, nothing)
        state = SetState(
            torch.from_numpy(np.where(is_hidden, 0, dense)),
            torch.from_numpy(is_hidden.sum(axis=1)),
            torch.full((N_CELLS,), 0.5, dtype=torch.float64),
        )
        wish = Wish(
            depth=dense.sum(axis=1), library_size=some.library_size, condition=some.condition,
            is_measured=some.is_measured[some.source_of_cell], weight=np.ones(2),
        )  # fmt: skip
        seen, expected = tensors_of(visible_cells(state, built.tokeniser, wish)), tensors_of(trained)
        assert seen.keys() == expected.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(seen[name], value), name
                assert seen[name].dtype == value.dtype, name
            else:
                assert seen[name] == value, name

    def test_the_wish_is_told(self, built):
        state = state_of()
        wish = wish_of(z=np.zeros((N_CELLS, 6), dtype=np.float32), z_depth=np.arange(N_CELLS) + 7.0)
        cells = visible_cells(state, built.tokeniser, wish)
        np.testing.assert_array_equal(cells.depth_B, wish.depth)
        np.testing.assert_array_equal(cells.anchor_depth_B, wish.z_depth)
        np.testing.assert_array_equal(cells.n_genes_B, (state.count_BG > 0).sum(dim=1) + 9)
        np.testing.assert_array_equal(cells.condition_BC, wish.condition)
        assert not cells.is_null_B.any()
        assert visible_cells(state, built.tokeniser, wish_of(is_null=True)).is_null_B.all()


class TestDraw:
    """``ScDiVa.draw``: networks, samplers and wishes together."""

    def wish(self, model, n: int = 4) -> Wish:
        n_genes = model.vocabulary.n_genes
        return Wish(
            depth=np.full(n, 300), library_size=np.full(n, 320.0),
            condition=np.ones((n, model.labels.n_fields), dtype=np.int32),
            is_measured=np.tile(np.arange(n_genes) < 150, (n, 1)), weight=np.ones(model.labels.n_fields),
        )  # fmt: skip

    @pytest.mark.parametrize("name", ["tiny_model", "tiny_trunk_model"])
    @pytest.mark.parametrize("strategy", ["random", "confidence", "ancestral", "first-hitting"])
    def test_counts_of_measured_genes_in_exact_numbers(self, name, strategy, request):
        model = request.getfixturevalue(name)
        n_genes = np.array([1, 9, 12, 0] if strategy == "first-hitting" else [1, 20, 150, 0])
        counts = model.draw(self.wish(model), n_genes, Sampler(strategy, n_steps=4), seed=3)
        assert counts.dtype == np.int32
        assert (np.diff(counts.indptr) == n_genes).all()
        assert counts.data.min() >= 1
        assert counts.indices.max() < 150
        again, other = (model.draw(self.wish(model), n_genes, Sampler(strategy, n_steps=4), seed=s) for s in (3, 4))
        assert (counts != again).nnz == 0
        assert (counts != other).nnz > 0

    def test_the_global_generator_is_not_touched(self, tiny_model):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        tiny_model.draw(self.wish(tiny_model), np.full(4, 5), Sampler(), seed=1)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("head", ["identity", "value"])
    def test_untrained_heads_are_refused(self, head, tiny_model):
        heads = [name for name in tiny_model.details["trained_heads"] if name != head]
        from scdiva.models.scdiva import ScDiVa

        model = ScDiVa(tiny_model.network, tiny_model.config, tiny_model.vocabulary, tiny_model.statistics,
                       details={**tiny_model.details, "trained_heads": heads})  # fmt: skip
        with pytest.raises(UntrainedHeadError, match=head):
            model.check_generates()

    @pytest.mark.parametrize("change", [{"value_likelihood": "mse"}, {"layout": "sequence"}])
    def test_other_kinds_are_refused(self, change, tiny_trunk_model):
        from scdiva.models.scdiva import ScDiVa

        of = tiny_trunk_model
        config = of.config.model_copy(update={"trunk": of.config.trunk.model_copy(update=change)})
        model = ScDiVa(of.network, config, of.vocabulary, of.statistics, details=of.details, labels=of.labels)
        with pytest.raises(UnsupportedError, match="layout"):
            model.check_generates()


class TestWholeCells:
    """``p_whole``: cells that are denoised as they are generated, whole and from a z of their own."""

    def prepared(self, built, cells, **shares) -> DenoisedCells:
        objective = built.objective(**shares)
        inputs = objective.prepare(cells, np.random.default_rng(0))
        assert isinstance(inputs, DenoisedCells)
        return inputs

    def test_the_whole_cell_is_denoised_and_z_comes_from_a_view(self, built, cells):
        found = self.prepared(built, cells, p_split=0.0, p_whole=1.0, p_visible=0.0, condition_dropout=0.0)
        depth = np.asarray(cells.counts.sum(axis=1)).ravel()
        np.testing.assert_array_equal(found.cells.depth_B, depth)
        np.testing.assert_array_equal(found.cells.n_genes_B, np.diff(cells.counts.indptr))
        share = (found.cells.anchor_depth_B.numpy() / np.maximum(depth, 1))[depth > 50]
        assert ((share > 0.01) & (share < 0.99)).all()
        assert 0.3 < share.mean() < 0.7
        assert not found.cells.is_null_B.any()

    def test_the_profile_decoder_is_not_scored_on_them(self, built, cells):
        # its answer would hold what z has seen
        found = self.prepared(built, cells, p_split=0.0, p_whole=1.0, p_visible=0.0)
        assert found.profile.cell_N.numel() == 0
        mixed = self.prepared(built, cells, p_split=0.4, p_whole=0.4, p_visible=0.2)
        scored = set(mixed.profile.cell_N.tolist())
        depth = np.asarray(cells.counts.sum(axis=1)).ravel()
        whole = set(np.flatnonzero(mixed.cells.depth_B.numpy() == depth))
        assert scored
        assert scored.isdisjoint(whole)

    def test_z_never_sees_the_cell_itself_but_its_view(self, built, cells):
        found = self.prepared(built, cells, p_split=0.0, p_whole=1.0, p_visible=0.0)
        again = self.prepared(built, cells, p_split=1.0, p_whole=0.0, p_visible=0.0)
        # the same view A as where the rest is denoised
        for name in ("gene_N", "offset_B"):
            assert torch.equal(getattr(found.cells.anchor, name), getattr(again.cells.anchor, name))
        assert torch.equal(found.cells.anchor_depth_B, again.cells.anchor_depth_B)
        np.testing.assert_array_equal(
            again.cells.anchor_depth_B + again.cells.depth_B, np.asarray(cells.counts.sum(axis=1)).ravel()
        )

    def test_shares_of_the_four_ways(self, built, cells):
        many = cells.take(np.random.default_rng(0).integers(0, 58, 1500))
        found = self.prepared(built, many, p_split=0.3, p_whole=0.4, p_visible=0.2)
        depth = np.asarray(many.counts.sum(axis=1)).ravel()
        is_whole = found.cells.depth_B.numpy() == depth
        is_null = found.cells.is_null_B.numpy()
        assert is_null.mean() == pytest.approx(0.1, abs=0.03)
        assert (~is_whole).mean() == pytest.approx(0.3, abs=0.04)

    def test_shares_above_one_are_refused(self):
        with pytest.raises(ValueError, match="p_whole"):
            NativeObjectiveConfig(p_split=0.5, p_visible=0.3, p_whole=0.3)

    def test_it_can_be_trained(self, built, cells):
        objective = built.objective(p_split=0.2, p_whole=0.8, p_visible=0.0)
        output = objective(objective.prepare(cells, np.random.default_rng(0)), generator())
        assert torch.isfinite(output.loss)
        assert float(output.terms["identity_nll"]) > 0
