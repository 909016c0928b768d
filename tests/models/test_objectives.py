"""What the native network is trained on: views, masks, terms, floors, and the bound that the terms estimate."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, permutations
from math import comb

import numpy as np
import pytest
import torch
from scipy.special import beta

import native_cells as nc
import twins
from scdiva.config import NativeConfig, NativeObjectiveConfig
from scdiva.data.statistics import GeneStatistics
from scdiva.diffusion import draw_masks, stratified_times
from scdiva.losses import inclusion_probabilities, profile_nll, ztnb_expected_log1p, ztnb_nll
from scdiva.models.scdiva.objectives import HELDOUT_TIMES, DenoisedCells, NativeObjective, SplitViews
from scdiva.serialization import token_ranks
from scdiva.types import LossOutput

ANCHOR_ONLY = {"identity_weight": 0.0, "value_weight": 0.0}


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    return nc.dense_counts()


@pytest.fixture(scope="module")
def cells(dense):
    return nc.with_labels(twins.cell_counts(dense, dense.sum(axis=1) + 10))


@pytest.fixture
def built(cells) -> nc.Built:
    return nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES))


def score(objective: NativeObjective, inputs, seed: int = 0) -> LossOutput:
    with torch.no_grad():
        return objective(inputs, torch.Generator().manual_seed(seed))


def train(objective: NativeObjective, cells, n_steps: int, lr: float = 0.01) -> list[float]:
    objective.train()
    optimiser = torch.optim.Adam(objective.parameters(), lr=lr)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(n_steps):
        optimiser.zero_grad()
        loss = objective(objective.prepare(cells, rng), generator).loss
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    objective.eval()
    return losses


def whole(inputs: DenoisedCells, n_cells: int) -> np.ndarray:
    """The denoised cells as dense counts, put together from what is visible and from the answers."""
    masked, targets = inputs.cells, inputs.targets
    found = np.zeros((n_cells, nc.N_GENES))
    cell = np.repeat(np.arange(n_cells), masked.lengths)
    found[cell, masked.gene_N.numpy()] = -1  # visible, count unknown here
    for where in ("M", "V"):
        index, gene, count = (getattr(targets, f"{name}_{where}").numpy() for name in ("cell", "gene", "count"))
        found[index, gene] = count
    return found


class TestPreparation:
    def test_z_sees_one_view_and_the_other_is_scored(self, built, dense, cells):
        inputs = built.objective(p_split=1.0, p_visible=0.0).prepare(cells, np.random.default_rng(0))
        b = np.zeros_like(dense)
        profile = inputs.profile
        b[profile.cell_N.numpy(), profile.gene_N.numpy()] = profile.count_N.numpy()
        a = dense - b
        assert (a >= 0).all()
        assert (a.sum(axis=1) != 0).mean() > 0.9
        assert (b.sum(axis=1) != 0).mean() > 0.9
        anchor = inputs.cells.anchor
        np.testing.assert_array_equal(anchor.gene_N.numpy(), np.concatenate([np.flatnonzero(row) for row in a]))
        np.testing.assert_array_equal(inputs.cells.anchor_depth_B.numpy(), a.sum(axis=1))
        np.testing.assert_array_equal(inputs.cells.depth_B.numpy(), b.sum(axis=1))
        np.testing.assert_array_equal(inputs.cells.n_genes_B.numpy(), (b > 0).sum(axis=1))
        np.testing.assert_array_equal(whole(inputs, len(dense)) != 0, b > 0)  # what is denoised is view B, too
        assert not inputs.cells.is_null_B.any()

    def test_the_share_of_view_a_is_spread_over_its_range(self, built, cells):
        objective = built.objective(p_split=1.0, p_visible=0.0, rho_min=0.2, rho_max=0.6)
        share = []
        for seed in range(8):
            inputs = objective.prepare(cells, np.random.default_rng(seed))
            a, b = inputs.cells.anchor_depth_B.numpy()[:-2], inputs.cells.depth_B.numpy()[:-2]
            share.append(a / (a + b))
        mean = np.concatenate(share)
        assert 0.37 < mean.mean() < 0.43
        assert 0.1 < mean.std() < 0.17  # that of a uniform distribution is 0.115; counting adds some

    def test_without_a_view_the_whole_cell_is_denoised(self, built, dense, cells):
        for settings, is_null in (
            ({"p_split": 0.0, "p_visible": 1.0}, False),
            ({"p_split": 0.0, "p_visible": 0.0}, True),
        ):
            inputs = built.objective(**settings).prepare(cells, np.random.default_rng(0))
            np.testing.assert_array_equal(whole(inputs, len(dense)) != 0, dense > 0)
            np.testing.assert_array_equal(inputs.cells.depth_B.numpy(), dense.sum(axis=1))
            assert (inputs.cells.is_null_B == is_null).all()
            assert inputs.profile.cell_N.numel() == 0  # the profile would be scored on what z has seen
            if is_null:
                assert inputs.cells.anchor.gene_N.numel() == 0
            else:  # z pools the tokens that are visible with their values, and no others
                known = ~inputs.cells.is_value_masked_N
                assert torch.equal(inputs.cells.anchor.gene_N, inputs.cells.gene_N[known])
                assert torch.equal(inputs.cells.anchor.value_N, inputs.cells.value_N[known])

    def test_treatments_and_kinds_come_in_their_shares(self, built, cells):
        objective = built.objective(p_split=0.5, p_visible=0.3)
        many = cells.take(np.tile(np.arange(50), 60))
        inputs = objective.prepare(many, np.random.default_rng(0))
        is_null = inputs.cells.is_null_B.numpy()
        is_split = np.bincount(inputs.profile.cell_N.numpy(), minlength=3000) > 0
        assert is_null.mean() == pytest.approx(0.2, abs=0.03)
        assert is_split.mean() == pytest.approx(0.5, abs=0.03)
        assert not (is_null & is_split).any()
        n_hidden, n_genes = inputs.cells.n_hidden_B.numpy(), inputs.cells.n_genes_B.numpy()
        assert (n_hidden == 0).mean() == pytest.approx(0.3, abs=0.03)  # values only
        n_values = np.bincount(inputs.targets.cell_V.numpy(), minlength=3000)
        assert ((n_hidden > 0) & (n_values > 0)).mean() == pytest.approx(0.2 * 0.5, abs=0.04)  # staged
        # everything, and joint masks that happen to hide everything
        assert 0.1 <= (n_hidden == n_genes).mean() < 0.2

    def test_conditions_are_dropped_field_by_field_and_all_at_once(self, built, cells):
        many = cells.take(np.tile(np.arange(50), 60))
        many = replace(many, condition=np.maximum(many.condition, 1))
        rates = {}
        for rate in (0.0, 0.3, 0.999999):
            seen = built.objective(condition_dropout=rate).prepare(many, np.random.default_rng(0)).cells
            is_given = np.column_stack(
                [seen.condition_BC.numpy() > 0, seen.is_depth_given_B.numpy(), seen.is_n_genes_given_B.numpy()]
            )
            kept = seen.condition_BC.numpy()
            assert ((kept == many.condition) | (kept == 0)).all()
            rates[rate] = is_given
        assert rates[0.0].all()
        assert not rates[0.999999].any()
        np.testing.assert_allclose(rates[0.3].mean(axis=0), 0.49, atol=0.03)
        for i, j in combinations(range(4), 2):  # not 0.49 squared: all are dropped together, too
            assert (rates[0.3][:, i] & rates[0.3][:, j]).mean() == pytest.approx(0.7**3, abs=0.03)

    def test_what_is_not_told_is_not_seen(self, built, cells):
        inputs = built.objective(p_split=0.0, p_visible=0.0).prepare(cells, np.random.default_rng(0)).cells
        hidden = replace(
            inputs,
            is_depth_given_B=torch.zeros_like(inputs.is_depth_given_B),
            is_n_genes_given_B=torch.zeros_like(inputs.is_n_genes_given_B),
        )
        other = replace(hidden, depth_B=hidden.depth_B + 100, n_genes_B=hidden.n_genes_B + 5)
        told = replace(inputs, depth_B=inputs.depth_B + 100, n_genes_B=inputs.n_genes_B + 5)
        with torch.no_grad():
            one, two, three, four = (built.network(x) for x in (hidden, other, inputs, told))
        assert torch.equal(one.gene_logit_BG, two.gene_logit_BG)
        assert torch.equal(one.states.query_BD, two.states.query_BD)
        assert not torch.equal(three.gene_logit_BG, four.gene_logit_BG)

    def test_preparation_is_seeded(self, built, cells):
        objective = built.objective()
        one, again, other = (nc.tensors_of(objective.prepare(cells, np.random.default_rng(s))) for s in (0, 0, 1))
        for name, tensor in one.items():
            assert tensor == again[name] if isinstance(tensor, tuple) else torch.equal(tensor, again[name]), name
        assert one["cells.lengths"] != other["cells.lengths"]

    def test_held_out_cells_are_masked_at_fixed_shares_with_z_from_visible_tokens(self, built, dense, cells):
        inputs = built.objective().prepare_heldout(cells, np.random.default_rng(0))
        assert len(inputs.at) == 3
        n = (dense > 0).sum(axis=1)
        for t, at in zip(HELDOUT_TIMES, inputs.at, strict=True):
            expected = np.where(n > 0, np.maximum(1, np.rint(t * n)), 0)
            np.testing.assert_array_equal(at.cells.n_hidden_B.numpy(), expected)
            np.testing.assert_array_equal(at.cells.condition_BC.numpy(), cells.condition)
            assert torch.equal(at.cells.anchor.gene_N, at.cells.gene_N)
            assert not at.cells.is_null_B.any()
            assert at.cells.is_depth_given_B.all()

    def test_every_hidden_gene_is_a_target_though_the_trunk_reads_few_tokens(self, dense, cells):
        built = nc.build(cells, label_sizes=nc.LABEL_SIZES, max_tokens=3)
        inputs = built.objective().prepare_heldout(cells, np.random.default_rng(0))
        full = nc.build(cells, label_sizes=nc.LABEL_SIZES).objective().prepare_heldout(cells, np.random.default_rng(0))
        for at, other in zip(inputs.at, full.at, strict=True):
            assert max(at.cells.lengths) == 3
            assert torch.equal(at.targets.gene_M, other.targets.gene_M)
            assert torch.equal(at.cells.is_admissible_BG, other.cells.is_admissible_BG)  # cut off is not hidden
            assert torch.equal(at.cells.anchor.gene_N, other.cells.anchor.gene_N)


class TestTerms:
    """The terms of the loss, once more from the predictions, cell by cell."""

    def twin(self, built: nc.Built, inputs: DenoisedCells) -> dict[str, float]:
        network, cells, targets = built.network, inputs.cells, inputs.targets
        with torch.no_grad():
            output = network(cells)
            p = inclusion_probabilities(output.gene_logit_BG, cells.is_admissible_BG, cells.n_hidden_B)
        starts = np.cumsum([0, *cells.lengths])
        identity, value = [], []
        for i in range(cells.n_cells):
            genes = targets.gene_M[targets.cell_M == i]
            if len(genes):
                identity.append(float(-(p[i, genes] / len(genes)).log().mean()))
            losses = []
            for where, states in (("M", output.states.query_BD), ("V", output.states.token_ND)):
                mine = (getattr(targets, f"cell_{where}") == i).nonzero()[:, 0]
                for j in mine:
                    gene, count = getattr(targets, f"gene_{where}")[j], getattr(targets, f"count_{where}")[j]
                    state = i  # the query of the cell
                    if where == "V":  # the token of the gene itself
                        own = cells.gene_N[starts[i] : starts[i + 1]] == gene
                        state = starts[i] + int(own.nonzero())
                        assert bool(cells.is_value_masked_N[state])
                        assert float(cells.value_N[state]) == 0
                    with torch.no_grad():
                        direction = network.trunk.value_direction(states[state])
                        embedded = network.anchor.gene_embedding[gene]
                        measured = output.log_rate_BG[i][cells.is_measured_BG[i]]
                        log_mean = (
                            torch.log(cells.depth_B[i]) + output.log_rate_BG[i, gene] - measured.logsumexp(0)
                            + network.value_offset[gene] + direction[:-1] @ embedded + direction[-1]
                        )  # fmt: skip
                        losses.append(float(ztnb_nll(count, log_mean, network.log_theta[gene])))
            if losses:
                value.append(np.mean(losses))
        scored = torch.unique(inputs.profile.cell_N)
        profile = inputs.profile
        nll = profile_nll(output.log_rate_BG, profile.cell_N, profile.gene_N, profile.count_N, profile.is_measured_BG)
        return {
            "identity_nll": float(np.mean(identity)),
            "value_nll": float(np.mean(value)),
            "profile_nll": float(nll[scored].mean()),
        }

    @pytest.mark.parametrize("seed", [0, 1])
    def test_terms_equal_their_definition(self, seed, built, cells):
        objective = built.objective(identity_weight=0.7, value_weight=2.0, profile_weight=0.3)
        inputs = objective.prepare(cells, np.random.default_rng(seed))
        assert inputs.targets.cell_V.numel() > 20
        expected, found = self.twin(built, inputs), score(objective, inputs)
        for name, value in expected.items():
            assert float(found.terms[name]) == pytest.approx(value, rel=1e-4), name
        weighted = 0.7 * expected["identity_nll"] + 2.0 * expected["value_nll"] + 0.3 * expected["profile_nll"]
        assert float(found.loss) == pytest.approx(weighted, rel=1e-4)
        assert found.n_cells == len(inputs.cells.lengths)

    def test_as_many_hidden_genes_as_cells(self, built, cells):
        # three cells with four, one and one of six hidden genes... the query of a cell stands for all of its own
        dense = np.zeros((3, nc.N_GENES), dtype=int)
        dense[:, :6] = [[3, 1, 2, 1, 5, 2], [1, 2, 1, 1, 1, 7], [2, 1, 4, 3, 1, 1]]
        is_hidden = np.zeros_like(dense, dtype=bool)
        is_hidden[0, [0, 4]] = is_hidden[2, 2] = True
        few = nc.with_labels(twins.cell_counts(dense))
        masked, targets = nc.corrupt(built, few, is_hidden, np.zeros_like(is_hidden))
        assert targets.cell_M.tolist() == [0, 0, 2]
        inputs = DenoisedCells(masked, targets, built.objective().prepare(few, np.random.default_rng(0)).profile)
        found = score(built.objective(), inputs).terms["value_nll"]
        assert float(found) == pytest.approx(self.twin(built, inputs)["value_nll"], rel=1e-5)

    def test_cells_count_alike_whatever_they_hide(self, built, cells):
        objective = built.objective()
        inputs = objective.prepare(cells, np.random.default_rng(0))
        nlls = []
        for i in range(cells.n_cells):
            alone = hidden_alone(inputs, i)
            if int(alone.cells.n_hidden_B):
                output = built.network(alone.cells)
                nlls.append(float(objective._identity(output, alone.cells, alone.targets)[0].detach()))
        assert float(score(objective, inputs).terms["identity_nll"]) == pytest.approx(np.mean(nlls), rel=1e-4)

    def test_held_out_terms_and_floors_equal_their_definition(self, built, dense, cells):
        objective = built.objective()
        inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
        found = score(objective, inputs)
        floor = nc.build(cells, label_sizes=nc.LABEL_SIZES)  # the network at its start is the floor
        for t, at in zip(HELDOUT_TIMES, inputs.at, strict=True):
            for name, network in ((f"_t{t}", built), (f"_t{t}_floor", floor)):
                expected = self.twin(network, at)
                for term in ("identity_nll", "value_nll"):
                    assert float(found.terms[f"{term}{name}"]) == pytest.approx(expected[term], rel=1e-4), name
        loss = float(found.terms["profile_nll"]) + np.mean(
            [float(found.terms[f"identity_nll_t{t}"] + found.terms[f"value_nll_t{t}"]) for t in HELDOUT_TIMES]
        )
        assert float(found.loss) == pytest.approx(loss, rel=1e-5)

    def test_the_error_of_values_is_in_log1p_cp10k(self, built, cells):
        objective = built.objective()
        inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
        at = inputs.at[1]
        with torch.no_grad():
            output = built.network(at.cells)
            direction = built.network.trunk.value_direction(output.states.query_BD)[at.targets.cell_M]
            log_mean = built.network.log_mean(output, at.targets.cell_M, at.targets.gene_M, direction)
            # the library, which has ten UMIs of genes beyond the vocabulary
            scale = torch.from_numpy(1e4 / cells.library_size[at.targets.cell_M]).float()
            expected = ztnb_expected_log1p(log_mean, built.network.log_theta[at.targets.gene_M], scale)
        error = (expected - at.targets.value_M).abs().numpy()
        cell = at.targets.cell_M.numpy()
        mean = np.mean([error[cell == i].mean() for i in np.unique(cell)])
        assert float(score(objective, inputs).terms["value_mae_t0.5"]) == pytest.approx(mean, rel=1e-4)

    def test_the_floor_of_the_error_is_the_gene_mean_with_an_offset_of_the_cell(self, built, dense, cells):
        objective = built.objective()
        inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
        at = inputs.at[0]
        detected = (dense > 0).sum(axis=0)
        cp10k = twins.cp10k(dense, cells.library_size)
        mean_value = np.log1p(cp10k.sum(axis=0) / np.maximum(detected, 1))
        errors = []
        value = np.log1p(cp10k)
        cell, gene = at.targets.cell_M.numpy(), at.targets.gene_M.numpy()
        for i in np.unique(cell):
            hidden = gene[cell == i]
            known = np.setdiff1d(np.flatnonzero(dense[i]), hidden)
            offset = (value[i, known] - mean_value[known]).mean() if known.size else 0.0
            errors.append(np.abs(mean_value[hidden] + offset - value[i, hidden]).mean())
        found = score(objective, inputs).terms["value_mae_t0.1_floor"]
        assert float(found) == pytest.approx(np.mean(errors), rel=1e-4)

    def test_floors_do_not_move_with_training(self, cells):
        built = nc.build(cells, label_sizes=nc.LABEL_SIZES)
        objective = built.objective()
        inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
        before = score(objective, inputs).terms
        nc.stir(built)
        after = score(objective, inputs).terms
        for name in before:
            assert (float(after[name]) == float(before[name])) == name.endswith("_floor"), name

    def test_what_the_trunk_did_is_counted(self, built, cells):
        objective = built.objective()
        inputs = objective.prepare(cells, np.random.default_rng(0))
        found = score(objective, inputs)
        n_special = 1 + len(nc.LABEL_SIZES) + 3 + 1  # [LAT], conditions and three numbers, [QUERY]
        assert found.n_tokens == sum(inputs.cells.lengths) + n_special * cells.n_cells
        assert found.n_flops > 0
        split = score(
            built.objective(**ANCHOR_ONLY), built.objective(**ANCHOR_ONLY).prepare(cells, np.random.default_rng(0))
        )
        assert (split.n_tokens, split.n_flops) == (0, 0)

    def test_cells_without_counts_and_minibatches_of_them(self, built, cells):
        for rows in ([59], [58], [59, 58], [59, 3, 59]):
            for _ in range(5):
                objective = built.objective()
                few = cells.take(np.array(rows))
                for inputs in (
                    objective.prepare(few, np.random.default_rng(_)),
                    objective.prepare_heldout(few, np.random.default_rng(_)),
                ):
                    output = objective(inputs, torch.Generator())
                    assert torch.isfinite(output.loss)
                    assert all(torch.isfinite(term) for term in output.terms.values())
                    gradients = torch.autograd.grad(
                        output.loss, list(objective.parameters()), allow_unused=True, materialize_grads=True
                    )
                    assert all(torch.isfinite(gradient).all() for gradient in gradients)


class TestSequenceLayout:
    """Hidden tokens have places of their own (the ordering ablation)."""

    @pytest.fixture
    def built(self, cells) -> nc.Built:
        return nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES, layout="sequence"))

    def test_a_slot_is_the_place_of_its_gene(self, built, cells):
        for at in built.objective().prepare_heldout(cells, np.random.default_rng(0)).at:
            masked, targets = at.cells, at.targets
            rank = np.full((60, nc.N_GENES), -1)
            cell = np.repeat(np.arange(60), np.diff(cells.counts.indptr))
            rank[cell, cells.counts.indices] = token_ranks(cells, built.statistics)
            slot_cell = np.repeat(np.arange(60), masked.slot_lengths)
            np.testing.assert_array_equal(masked.slot_lengths, masked.n_hidden_B)
            np.testing.assert_array_equal(slot_cell[targets.slot_M], targets.cell_M)
            np.testing.assert_array_equal(masked.slot_position_S[targets.slot_M], rank[targets.cell_M, targets.gene_M])
            token_cell = np.repeat(np.arange(60), masked.lengths)
            np.testing.assert_array_equal(masked.position_N, rank[token_cell, masked.gene_N])

    def test_terms_equal_their_definition(self, built, cells):
        network, objective = built.network, built.objective()
        inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
        found, at = score(objective, inputs), inputs.at[1]
        with torch.no_grad():
            output = network(at.cells)
            state = output.states.slot_SD[at.targets.slot_M]
            p = inclusion_probabilities(output.gene_logit_BG, at.cells.is_admissible_BG, at.cells.n_hidden_B)
            shift = network.trunk.query_direction(state) @ network.anchor.gene_embedding.T
            log_p = torch.log_softmax(p[at.targets.cell_M].double().log() + shift.double(), dim=1)
            identity = -log_p[torch.arange(len(state)), at.targets.gene_M]
            direction = network.trunk.value_direction(state)
            log_mean = network.log_mean(output, at.targets.cell_M, at.targets.gene_M, direction)
            value = ztnb_nll(at.targets.count_M, log_mean, network.log_theta[at.targets.gene_M])
        for name, loss in (("identity_nll", identity), ("value_nll", value)):
            mean = np.mean([float(loss[at.targets.cell_M == i].mean()) for i in torch.unique(at.targets.cell_M)])
            assert float(found.terms[f"{name}_t0.5"]) == pytest.approx(mean, rel=1e-4)

    def test_slots_of_one_cell_differ(self, built, cells):
        at = built.objective().prepare_heldout(cells, np.random.default_rng(0)).at[1]
        with torch.no_grad():
            states = built.network(at.cells).states.slot_SD[: at.cells.slot_lengths[0]]
        assert float(states.std(dim=0).max()) > 0.05

    def test_a_choice_of_the_slots_is_scored(self, built, cells, monkeypatch):
        monkeypatch.setattr("scdiva.models.scdiva.inputs.MAX_SCORED_SLOTS", 2)
        objective = built.objective()
        times = [0] * nc.N_GENES
        for seed in range(40):
            at = objective.prepare_heldout(cells.take(np.array([0, 59, 1])), np.random.default_rng(seed)).at[2]
            per_cell = np.bincount(at.targets.cell_M, minlength=3)
            np.testing.assert_array_equal(per_cell, [2, 0, 2])
            np.testing.assert_array_equal(at.cells.slot_lengths, at.cells.n_hidden_B)  # all are there to be read
            assert torch.isfinite(score(objective, at).loss)
            for gene in at.targets.gene_M[at.targets.cell_M == 0].tolist():
                times[gene] += 1
        assert sum(n > 0 for n in times) > 0.7 * (cells.counts[0] > 0).sum()  # not always the same


def hidden_alone(inputs: DenoisedCells, i: int) -> DenoisedCells:
    """One cell of a minibatch, with its hidden genes."""
    cells, targets = inputs.cells, inputs.targets
    tokens = slice(sum(cells.lengths[:i]), sum(cells.lengths[: i + 1]))
    ends = [*cells.anchor.offset_B.tolist(), cells.anchor.gene_N.numel()]
    pooled = slice(ends[i], ends[i + 1])
    anchor = replace(
        cells.anchor,
        gene_N=cells.anchor.gene_N[pooled],
        value_N=cells.anchor.value_N[pooled],
        offset_B=torch.tensor([0]),
    )
    rows = {
        name: tensor[i : i + 1]
        for name, tensor in nc.tensors_of(cells).items()
        if "." not in name and name.endswith(("_B", "_BC", "_BG"))
    }
    read = {name: getattr(cells, name)[tokens] for name in ("gene_N", "value_N", "position_N", "is_value_masked_N")}
    is_mine = targets.cell_M == i
    return DenoisedCells(
        replace(cells, anchor=anchor, lengths=cells.lengths[i : i + 1], slot_lengths=(0,), **rows, **read),
        replace(targets, cell_M=torch.zeros_like(targets.cell_M[is_mine]), gene_M=targets.gene_M[is_mine]),
        inputs.profile,
    )


class TestStart:
    """At step 0 the network is the simple model, to the last digits that a sum over genes leaves."""

    @pytest.mark.parametrize("layout", ["set", "sequence"])
    @pytest.mark.parametrize("has_trunk", [True, False])
    @pytest.mark.parametrize("max_tokens", [1000, 5])
    def test_held_out_terms_equal_their_floors(self, layout, has_trunk, max_tokens, cells):
        labels = nc.LABEL_SIZES if has_trunk else ()
        built = nc.build(cells, label_sizes=labels, has_trunk=has_trunk, layout=layout, max_tokens=max_tokens)
        objective = built.objective()
        terms = score(objective, objective.prepare_heldout(cells, np.random.default_rng(0))).terms
        names = ["profile_nll", *(f"{x}_nll_t{t}" for x in ("identity", "value") for t in HELDOUT_TIMES)]
        assert set(names) <= set(terms)
        for name in names:
            assert float(terms[name]) == pytest.approx(float(terms[f"{name}_floor"]), abs=1e-5), name

    def test_the_floor_of_identity_is_that_of_detection_frequencies(self, dense, cells):
        objective = nc.build(cells, has_trunk=False).objective()
        inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
        at = inputs.at[1]
        frequency = ((dense > 0).sum(axis=0) + 0.5) / (len(dense) + 1)
        nlls = []
        for i in range(len(dense)):
            hidden = at.targets.gene_M[at.targets.cell_M == i].numpy()
            if hidden.size == 0:
                continue
            may = at.cells.is_admissible_BG[i].numpy()
            lower, upper = -60.0, 60.0
            for _ in range(100):
                c = (lower + upper) / 2
                p = np.where(may, 1 / (1 + np.exp(-c) * (1 / frequency - 1)), 0)
                lower, upper = (c, upper) if p.sum() < hidden.size else (lower, c)
            nlls.append(-np.log(p[hidden] / hidden.size).mean())
        found = score(objective, inputs).terms["identity_nll_t0.5_floor"]
        assert float(found) == pytest.approx(np.mean(nlls), rel=1e-4)

    def test_a_trunk_on_a_trained_model_starts_at_that_model(self, adata, tiny_model):
        from scdiva.config import TrunkConfig
        from scdiva.data.conditions import ConditionLabels
        from scdiva.data.reader import open_counts
        from scdiva.models.scdiva.init import grow
        from scdiva.models.scdiva.model import build_network

        counts = open_counts(adata, tiny_model.vocabulary).read(np.arange(60))
        labels = ConditionLabels((("cell_type", ("a", "b")),))
        config = tiny_model.config.model_copy(update={"trunk": TrunkConfig(**nc.TRUNK)})
        network = build_network(210, config, labels)
        grow(network, tiny_model, labels)
        simple = nc.simple_of(counts, GeneStatistics.from_cells(counts))
        terms = []
        for model, sizes in ((tiny_model.network, tiny_model.config), (network, config)):
            objective = NativeObjective(model, NativeObjectiveConfig(), sizes, tiny_model.statistics, simple).eval()
            counts = replace(counts, condition=np.ones((60, 1), dtype=np.int32))
            terms.append(score(objective, objective.prepare_heldout(counts, np.random.default_rng(0))).terms)
        assert set(terms[0]) == set(terms[1])
        for name, value in terms[0].items():
            assert float(terms[1][name]) == pytest.approx(float(value), abs=1e-5), name
        assert float(terms[0]["profile_nll"]) < float(terms[0]["profile_nll_floor"]) - 0.01


class TestTraining:
    def test_every_weight_can_learn(self, cells):
        for layout in ("set", "sequence"):
            built = nc.build(cells, label_sizes=nc.LABEL_SIZES, layout=layout)
            before = {name: p.detach().clone() for name, p in built.network.named_parameters()}
            train(built.objective(condition_dropout=0.3), cells.take(np.arange(30, 60)), n_steps=6)
            still = {name for name, p in built.network.named_parameters() if torch.equal(p, before[name])}
            # a slot exists in the sequence layout only; how many genes are hidden is never unknown
            assert still == ({"trunk.slot"} if layout == "set" else set()) | {"trunk.n_hidden.unknown"}, layout

    @pytest.mark.parametrize("options", [{}, {"layout": "sequence"}, {"value_likelihood": "mse"}, {"max_tokens": 8}])
    def test_training_beats_the_start(self, options, cells):
        built = nc.build(cells, label_sizes=nc.LABEL_SIZES, **options)
        objective = built.objective()
        inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
        before = float(score(objective, inputs).loss)
        losses = train(objective, cells.take(np.arange(30)), n_steps=40, lr=0.02)
        assert np.isfinite(losses).all()
        after = score(objective, inputs)
        assert float(after.loss) < before - 0.1
        for name in ("identity_nll_t0.5", "value_nll_t0.5"):
            assert float(after.terms[name]) < float(after.terms[f"{name}_floor"]), name

    def test_labels_tell_what_generation_needs(self, dense):
        # cells of two types that differ in their genes; z is null and everything is hidden: only the label can tell
        rng = np.random.default_rng(0)
        cell_type = rng.integers(2, size=40)
        rate = np.where(np.arange(nc.N_GENES) // 20 == cell_type[:, None], 3.0, 0.05)
        counts = replace(twins.cell_counts(rng.poisson(rate)), condition=(cell_type[:, None] + 1).astype(np.int32))
        built = nc.build(counts, label_sizes=(2,), n_layers=1)
        settings = {"p_split": 0.0, "p_visible": 0.0, "p_joint": 0.0, "p_values": 0.0, "p_staged": 0.0}
        objective = built.objective(**settings, condition_dropout=0.2)
        train(objective, counts, n_steps=40, lr=0.02)
        wrong = replace(counts, condition=3 - counts.condition)
        unknown = replace(counts, condition=np.zeros_like(counts.condition))
        right, mistaken, not_told = (
            float(
                score(
                    built.objective(**settings, condition_dropout=0.0),
                    built.objective(**settings, condition_dropout=0.0).prepare(c, np.random.default_rng(1)),
                ).terms["identity_nll"]
            )
            for c in (counts, wrong, unknown)
        )
        assert right < not_told - 0.2
        assert not_told < mistaken - 0.2

    def test_squared_error_is_scored_against_the_gene_mean(self, cells):
        built = nc.build(cells, label_sizes=nc.LABEL_SIZES, value_likelihood="mse")
        objective = built.objective()
        inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
        before = score(objective, inputs).terms
        at = inputs.at[1]
        floor = objective._floor_value(at.cells, at.targets)
        assert float(before["value_nll_t0.5_floor"]) == pytest.approx(float(floor[0][floor[1]].mean()), rel=1e-5)
        assert float(before["value_nll_t0.5_floor"]) != pytest.approx(float(before["value_mae_t0.5_floor"]), rel=1e-3)
        train(objective, cells.take(np.arange(30)), n_steps=20)
        assert float(score(objective, inputs).terms["value_nll_t0.5"]) < float(before["value_nll_t0.5"]) - 0.01

    def test_noise_and_penalty_are_for_training_and_seeded(self, built, cells):
        objective = built.objective(latent_noise=0.5, kl_weight=0.1).train()
        inputs = objective.prepare(cells, np.random.default_rng(0))
        assert float(score(objective, inputs, 0).loss) == float(score(objective, inputs, 0).loss)
        assert float(score(objective, inputs, 0).loss) != float(score(objective, inputs, 1).loss)
        objective.eval()
        assert float(score(objective, inputs, 0).loss) == float(score(objective, inputs, 1).loss)


class TestAnchorOnly:
    """Without weight on identity and values: anchor and profile decoder on split views."""

    @pytest.fixture
    def objective(self, cells) -> NativeObjective:
        objective = nc.build(cells, has_trunk=False).objective(**ANCHOR_ONLY)
        train(objective, cells, n_steps=5)
        return objective

    def test_the_encoder_never_sees_what_the_decoder_is_scored_on(self, objective, cells):
        inputs = objective.prepare(cells, np.random.default_rng(0))
        assert isinstance(inputs, SplitViews)
        profile = inputs.profile
        changed = replace(
            inputs, profile=replace(profile, gene_N=profile.gene_N.flip(0), count_N=profile.count_N.flip(0) * 7)
        )
        seen = []
        original = objective.network.anchor.encode
        objective.network.anchor.encode = lambda pooled: seen.append(original(pooled)) or seen[-1]
        first, second = score(objective, inputs), score(objective, changed)
        assert torch.equal(seen[0], seen[1])
        assert float(first.loss) != float(second.loss)

    def test_the_two_views_are_the_cell(self, objective, dense, cells):
        inputs = objective.prepare(cells, np.random.default_rng(3))
        b = np.zeros_like(dense)
        b[inputs.profile.cell_N.numpy(), inputs.profile.gene_N.numpy()] = inputs.profile.count_N.numpy()
        a = dense - b
        assert (a >= 0).all()
        np.testing.assert_array_equal(inputs.view_a.gene_N.numpy(), np.concatenate([np.flatnonzero(row) for row in a]))

    def test_the_loss_is_the_twin_on_view_b_and_the_floor_its_mean_profile(self, objective, cells):
        inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
        assert inputs.at == ()
        output = score(objective, inputs)
        split, anchor = inputs.split, objective.network.anchor
        b = torch.zeros(60, nc.N_GENES, dtype=torch.float64)
        b[split.profile.cell_N, split.profile.gene_N] = split.profile.count_N.double()
        view = split.view_a
        with torch.no_grad():
            log_rate = anchor.log_rates(anchor.encode(anchor.pool(view.gene_N, view.value_N, view.offset_B)))
        is_measured = split.profile.is_measured_BG
        expected = twins.profile_nll(log_rate, b, is_measured).mean()
        profile = torch.from_numpy(objective.tokeniser.statistics.log_mean_profile()).expand(60, -1)
        floor = twins.profile_nll(profile, b, is_measured).mean()
        assert set(output.terms) == {"profile_nll", "profile_nll_floor"}
        assert float(output.loss) == pytest.approx(float(expected), rel=1e-5)
        assert float(output.terms["profile_nll_floor"]) == pytest.approx(float(floor), rel=1e-5)
        assert output.n_cells == 60

    def test_the_kl_term_is_that_of_a_diagonal_normal(self, cells):
        objective = nc.build(cells, has_trunk=False).objective(**ANCHOR_ONLY, kl_weight=0.1)
        inputs = objective.prepare(cells, np.random.default_rng(0))
        anchor, view = objective.network.anchor, inputs.view_a
        with torch.no_grad():
            mean = anchor.encode(anchor.pool(view.gene_N, view.value_N, view.offset_B))
        posterior = torch.distributions.Normal(mean, torch.full_like(mean, float(np.exp(-2.0))))
        kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(dim=1).mean()
        found = score(objective, inputs)
        assert float(found.terms["kl"]) == pytest.approx(float(kl), rel=1e-5)
        assert float(found.loss) == pytest.approx(float(found.terms["profile_nll"]), rel=1e-6)  # not when judged
        trained = score(objective.train(), inputs)
        assert float(trained.loss - trained.terms["profile_nll"]) == pytest.approx(0.1 * float(kl), rel=1e-4)

    def test_genes_that_a_file_does_not_measure_are_unknown_not_zero(self, objective, dense):
        measured = np.arange(nc.N_GENES) < 25
        half = twins.cell_counts(dense * measured, measured=measured)
        inputs = objective.prepare(half, np.random.default_rng(0))
        before = float(score(objective, inputs).loss)
        with torch.no_grad():
            objective.network.anchor.log_profile[25:] += 9.0
        assert float(score(objective, inputs).loss) == pytest.approx(before, rel=1e-6)


class TestBound:
    """Five genes, cells of three: the estimators of the bound against the sum over all orders of generation."""

    GENES, N = (0, 2, 3), 3

    @pytest.fixture
    def tiny(self) -> nc.Built:
        rng = np.random.default_rng(0)
        dense = (rng.random((50, 5)) < [0.9, 0.7, 0.5, 0.4, 0.6]).astype(int)
        return nc.stir(nc.build(twins.cell_counts(dense)), size=0.5)

    def cell(self, n_copies: int = 1):
        dense = np.zeros((n_copies, 5), dtype=int)
        dense[:, self.GENES] = [2, 1, 1]
        return twins.cell_counts(dense)

    def nll(self, built: nc.Built, hidden: tuple[int, ...]) -> dict[int, float]:
        """-log p(gene | visible) of each hidden gene, from the network's own distribution."""
        is_hidden = np.zeros((1, 5), dtype=bool)
        is_hidden[0, list(hidden)] = True
        masked, _ = nc.corrupt(built, self.cell(), is_hidden, np.zeros_like(is_hidden))
        p = nc.predictions(built, masked)["probability_BG"][0].double() / len(hidden)
        return {gene: float(-p[gene].log()) for gene in hidden}

    def masks(self):
        return [mask for m in range(1, self.N + 1) for mask in combinations(self.GENES, m)]

    def exact(self, built: nc.Built) -> float:
        """Mean over all orders of the NLL of revealing one gene after the other."""
        totals = []
        for order in permutations(self.GENES):
            totals.append(sum(self.nll(built, tuple(sorted(order[k:])))[order[k]] for k in range(self.N)))
        assert np.std(totals) > 0.01  # the order matters: the average is needed
        return float(np.mean(totals))

    def standard_error(self, nll_of: dict[tuple[int, ...], float], n_cells: int) -> float:
        """Standard error of three times the mean of independent masks."""
        weight = np.array([1 / (3 * comb(3, len(mask))) for mask in nll_of])
        nll = np.array(list(nll_of.values()))
        return 3 * float(np.sqrt((weight * nll**2).sum() - (weight * nll).sum() ** 2)) / n_cells**0.5

    def test_exact_counts_and_bernoulli_masks_give_the_any_order_likelihood(self, tiny):
        exact = self.exact(tiny)
        sums = {mask: sum(self.nll(tiny, mask).values()) for mask in self.masks()}
        # m uniform on 1..n, a mean over hidden genes, times n
        counted = np.mean([np.mean([sums[mask] / m for mask in sums if len(mask) == m]) for m in range(1, self.N + 1)])
        assert self.N * counted == pytest.approx(exact, rel=1e-6)
        # independent coins with weight 1/t: the integral of t^(m - 1) (1 - t)^(n - m) is a beta function
        coins = sum(total * beta(len(mask), self.N - len(mask) + 1) for mask, total in sums.items())
        assert coins == pytest.approx(exact, rel=1e-6)
        assert beta(2, 2) == pytest.approx(1 / (2 * comb(3, 2)))

    def test_the_training_loss_is_an_estimate_of_it(self, tiny):
        exact = self.exact(tiny)
        objective = tiny.objective(p_split=0.0, p_visible=1.0, p_joint=1.0, p_values=0.0, p_staged=0.0)
        inputs = replace_conditions(objective.prepare(self.cell(6000), np.random.default_rng(0)))
        np.testing.assert_allclose(np.bincount(inputs.cells.n_hidden_B.numpy()), [0, 2000, 2000, 2000], atol=1)
        found = score(objective, inputs).terms["identity_nll"]
        nll_of = {mask: np.mean(list(self.nll(tiny, mask).values())) for mask in self.masks()}
        assert self.N * float(found) == pytest.approx(exact, abs=4 * self.standard_error(nll_of, 6000))

    def test_masks_and_weights_of_the_forward_process(self, tiny):
        # the same in two parts: the masks, and the loss of each
        exact, rng, n_cells = self.exact(tiny), np.random.default_rng(1), 4000
        objective = tiny.objective()
        nll_of = {mask: np.mean(list(self.nll(tiny, mask).values())) for mask in self.masks()}
        masks = draw_masks(np.full(n_cells, 3), np.zeros(n_cells, int), stratified_times(n_cells, rng), rng)
        hidden = masks.is_gene_masked_N.reshape(-1, 3)
        estimate = 3 * np.mean([nll_of[tuple(np.array(self.GENES)[row])] for row in hidden])
        assert estimate == pytest.approx(exact, abs=4 * self.standard_error(nll_of, n_cells))
        masked, targets = tiny.tokeniser.corrupt(self.cell(n_cells), masks, rng)
        with torch.no_grad():
            nll_B, _ = objective._identity(tiny.network(masked), masked, targets)
        expected = [nll_of[tuple(np.array(self.GENES)[row])] for row in hidden[:50]]
        np.testing.assert_allclose(nll_B[:50], expected, rtol=1e-4)
        assert 3 * float(nll_B.mean()) == pytest.approx(estimate, rel=1e-4)


def replace_conditions(inputs: DenoisedCells) -> DenoisedCells:
    """Tell the network depth and number of genes, as in evaluation."""
    given = torch.ones_like(inputs.cells.is_depth_given_B)
    return replace(inputs, cells=replace(inputs.cells, is_depth_given_B=given, is_n_genes_given_B=given))


def test_the_default_settings_are_the_documented_ones():
    settings = NativeObjectiveConfig()
    assert (settings.p_split, settings.p_visible) == (0.5, 0.3)
    assert (settings.p_joint, settings.p_values, settings.p_staged) == (0.4, 0.3, 0.2)
    assert NativeConfig().trunk.n_layers == 0
