"""Attention, knock-outs and gene states beside plain, slow twins that read one cell at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import twins
from scdiva.diffusion import Masks
from scdiva.errors import ConfigError, UnsupportedError
from scdiva.models.scdiva.attention import attention_sums
from scdiva.models.scdiva.gene_states import mean_gene_states
from scdiva.models.scdiva.knockout import N_FOLDS, KnockoutSums, content_order, knockout_sums
from scdiva.models.scdiva.objectives import tokeniser_of

CLOSE = {"rtol": 2e-4, "atol": 1e-7}


@pytest.fixture(scope="module")
def cells(_cells, tiny_trunk_model):
    from scdiva.data.reader import open_counts

    return open_counts(_cells, tiny_trunk_model.vocabulary).read(np.arange(24))


@pytest.fixture(scope="module")
def genes(cells):
    """Five regulators, and thirty targets, two of which are regulators."""
    often = np.argsort(-np.bincount(cells.counts.indices, minlength=cells.n_genes), kind="stable")
    return np.sort(often[3:8]), np.sort(often[6:36])


def one_cell(model, cells, row, *, hidden=(), n_hidden=None):
    """One cell as the network reads it, all its genes, some of them hidden."""
    cell = cells.take(np.array([row]))
    cell = replace(cell, condition=np.zeros((1, model.labels.n_fields), dtype=np.int32))
    is_hidden = np.isin(cell.counts.indices, hidden)
    n = int(is_hidden.sum()) if n_hidden is None else n_hidden
    tokeniser = replace(tokeniser_of(model.config, model.statistics), max_tokens=10_000)
    return tokeniser.corrupt(cell, Masks(is_hidden, is_hidden, np.array([n])), np.random.default_rng(0))[0]


@torch.no_grad()
def weights_of(model, masked):
    """``(layers, heads, A, A)`` attention of one cell, layer by layer, from the equations; and its final states."""
    network = model.network
    trunk, transformer = network.trunk, network.trunk.transformer
    special = torch.stack(trunk._special_tokens(masked, network.latent(masked), network.mean_log_depth), dim=1)[0]
    x = torch.cat([special, trunk._gene_tokens(masked, network.anchor.gene_embedding)])
    found = []
    for layer in transformer.layers:
        q, k, v = (
            part.view(len(x), transformer.n_heads, -1) for part in layer.attention.qkv(layer.norm1(x)).chunk(3, dim=1)
        )
        heads = [torch.softmax(q[:, h] @ k[:, h].T / q.shape[-1] ** 0.5, dim=1) for h in range(transformer.n_heads)]
        found.append(torch.stack(heads))
        attended = torch.stack([a @ v[:, h] for h, a in enumerate(heads)], dim=1).reshape(len(x), -1)
        x = x + layer.attention.out(attended)
        x = x + layer.mlp(layer.norm2(x))
    return torch.stack(found).numpy().astype(float), transformer.norm(x).numpy(), len(special)


def slow_sums(model, cells, regulators, targets, weigh):
    observed, expected, n = (np.zeros((regulators.size, targets.size)) for _ in range(3))
    share = []
    for row in range(cells.n_cells):
        masked = one_cell(model, cells, row)
        all_weights, _, n_special = weights_of(model, masked)
        weight = weigh(all_weights)
        names = masked.gene_N.numpy().tolist()
        share.extend(weight[n_special:, :n_special].sum(axis=1))
        between = weight[n_special:, n_special:] * (1 - np.eye(len(names)))
        between /= between.sum(axis=1, keepdims=True)
        for r, regulator in enumerate(regulators):
            for t, target in enumerate(targets):
                if regulator in names and target in names:
                    i, j = names.index(target), names.index(regulator)
                    observed[r, t] += between[i, j]
                    expected[r, t] += np.mean([between[k, j] for k in range(len(names)) if k != j])
                    n[r, t] += 1
    return observed, expected, n, np.mean(share)


def rolled(weights):
    a = np.eye(weights.shape[-1])
    for layer in weights:
        a = (0.5 * layer.mean(axis=0) + 0.5 * np.eye(len(a))) @ a
    return a


class TestAttention:
    @pytest.mark.parametrize(
        ("options", "weigh"),
        [
            ({}, lambda w: w.mean(axis=(0, 1))),
            ({"layers": (-1,), "heads": (0,)}, lambda w: w[1, 0]),
            ({"rollout": True}, rolled),
        ],
        ids=["mean", "one head", "rollout"],
    )
    def test_is_that_of_the_equations(self, options, weigh, cells, genes, tiny_trunk_model):
        found = attention_sums(tiny_trunk_model, cells, *genes, **options)
        observed, expected, n, share = slow_sums(tiny_trunk_model, cells, *genes, weigh)
        np.testing.assert_allclose(found.observed_RT, observed, **CLOSE)
        different = np.not_equal.outer(*genes)  # nothing is asked of a gene and itself
        np.testing.assert_allclose(found.expected_RT[different], expected[different], **CLOSE)
        np.testing.assert_array_equal(found.n_cells_RT, n)
        assert found.n_cells_R.tolist() == [int((cells.counts[:, r] > 0).sum()) for r in genes[0]]
        assert (found.received_R > 0).all()
        assert found.special_share == pytest.approx(share, rel=1e-4)
        assert 0 < found.special_share < 1

    def test_leaves_the_model_as_it_was(self, cells, genes, tiny_trunk_model):
        before = tiny_trunk_model.embed(cells)
        attention_sums(tiny_trunk_model, cells, *genes)
        np.testing.assert_array_equal(tiny_trunk_model.embed(cells), before)
        assert not any(m._forward_pre_hooks for m in tiny_trunk_model.network.modules())

    def test_does_not_depend_on_order_or_block(self, cells, genes, tiny_trunk_model, monkeypatch):
        whole = attention_sums(tiny_trunk_model, cells, *genes, max_tokens=20)
        monkeypatch.setattr("scdiva.models.scdiva.attention._BLOCK", 5)
        other = attention_sums(
            tiny_trunk_model, cells.take(np.random.default_rng(0).permutation(24)), *genes, max_tokens=20
        )
        np.testing.assert_allclose(other.observed_RT, whole.observed_RT, rtol=1e-4)
        np.testing.assert_array_equal(other.n_cells_RT, whole.n_cells_RT)

    def test_regulators_are_read_whatever_their_rank(self, cells, genes, tiny_trunk_model):
        few = attention_sums(tiny_trunk_model, cells, *genes, max_tokens=3)
        regulators, targets = genes
        own = np.isin(targets, regulators)
        everything = attention_sums(tiny_trunk_model, cells, *genes)
        np.testing.assert_array_equal(few.n_cells_RT[:, own], everything.n_cells_RT[:, own])
        assert few.n_cells_RT[:, ~own].sum() < everything.n_cells_RT[:, ~own].sum()

    def test_cells_of_hardly_any_gene_say_nothing(self, cells, genes, tiny_trunk_model):
        dense = cells.counts.toarray()[:4]
        dense[1], dense[2] = 0, 0
        dense[2, genes[0][0]] = 5
        few = replace(twins.cell_counts(dense), is_measured=cells.is_measured)
        found = attention_sums(tiny_trunk_model, few, *genes)
        full = attention_sums(tiny_trunk_model, few.take(np.array([0, 3])), *genes)
        np.testing.assert_allclose(found.observed_RT, full.observed_RT, rtol=1e-4)
        assert np.isfinite(knockout_sums(tiny_trunk_model, few, *genes).total_RT).all()
        assert mean_gene_states(tiny_trunk_model, few, genes[1])[1].max() <= 3

    def test_refuses_what_is_not_there(self, cells, genes, tiny_trunk_model, tiny_model):
        with pytest.raises(ConfigError, match="layers"):
            attention_sums(tiny_trunk_model, cells, *genes, layers=(2,))
        with pytest.raises(ConfigError, match="heads"):
            attention_sums(tiny_trunk_model, cells, *genes, heads=())
        with pytest.raises(UnsupportedError, match="no trunk"):
            attention_sums(tiny_model, cells, *genes)


def test_attention_received_is_a_multiple_of_an_equal_share(cells, tiny_trunk_model):
    """Over all genes of one cell it is 1 on average: rows sum to 1."""
    one = cells.take(np.array([0]))
    everyone = one.counts.indices.astype(np.int64)
    found = attention_sums(tiny_trunk_model, one, everyone, everyone[:0])
    assert found.received_R.mean() == pytest.approx(1.0, rel=1e-4)


def test_gene_states_are_means_over_cells(cells, genes, tiny_trunk_model):
    found, n = mean_gene_states(tiny_trunk_model, cells, genes[1])
    states = {int(g): [] for g in genes[1]}
    for row in range(cells.n_cells):
        masked = one_cell(tiny_trunk_model, cells, row)
        _, h, n_special = weights_of(tiny_trunk_model, masked)
        for i, g in enumerate(masked.gene_N.tolist()):
            if g in states:
                states[g].append(h[n_special + i])
    np.testing.assert_allclose(found, [np.mean(s, axis=0) for s in states.values()], rtol=1e-3, atol=1e-5)
    np.testing.assert_array_equal(n, [len(s) for s in states.values()])


@torch.no_grad()
def log_share(model, masked, target, targets, read_out):
    """Log share of one target among all, straight from the network's own log-means."""
    network = model.network
    output = network(masked)
    rates = output.log_rate_BG[0, torch.from_numpy(targets)].double()
    share = output.log_rate_BG[0, target].double() - rates.logsumexp(dim=0)
    if read_out == "profile":
        return float(share)
    direction = network.trunk.value_direction(output.states.query_BD)
    where = (torch.zeros(1, dtype=torch.int64), torch.tensor([target]))
    corrected, plain = (float(network.log_mean(output, *where, d)) for d in (direction, None))
    return float(share) + corrected - plain


class TestKnockout:
    @pytest.mark.parametrize("read_out", ["profile", "value"])
    def test_is_the_difference_of_two_readings(self, read_out, cells, genes, tiny_trunk_model):
        import zlib

        regulators, targets = genes
        ids = tiny_trunk_model.vocabulary.ensembl_id
        fold = np.array([zlib.crc32(str(name).encode()) % N_FOLDS for name in ids])
        found = knockout_sums(tiny_trunk_model, cells, regulators, targets, read_out=read_out)
        expressed = cells.counts[:, regulators].toarray() > 0
        np.testing.assert_array_equal(found.n_cells_R, expressed.sum(axis=0))
        pairs = [(0, 3), (1, 10), (2, 17), (4, 29)]
        # a regulator and a target of one fold, and of two
        assert len({bool(fold[regulators[r]] == fold[targets[t]]) for r, t in pairs}) == 2
        for r, t in pairs:
            effects = []
            for row in np.flatnonzero(expressed[:, r]):
                hidden = np.flatnonzero(fold == fold[targets[t]])
                hidden = hidden[hidden != regulators[r]]
                n = int(np.isin(hidden, cells.counts[row].indices).sum())
                said = []
                for gone in (hidden, np.append(hidden, regulators[r])):
                    masked = one_cell(tiny_trunk_model, cells, row, hidden=gone, n_hidden=n)
                    all_of_fold = one_cell(
                        tiny_trunk_model, cells, row, hidden=np.flatnonzero(fold == fold[targets[t]])
                    )
                    depth = all_of_fold.anchor_depth_B
                    masked = replace(masked, anchor_depth_B=depth)
                    said.append(log_share(tiny_trunk_model, masked, int(targets[t]), targets, read_out))
                effects.append(said[0] - said[1])
            assert found.total_RT[r, t] == pytest.approx(np.sum(effects), rel=1e-3, abs=2e-5)
            assert found.square_RT[r, t] == pytest.approx(np.square(effects).sum(), rel=2e-3, abs=1e-6)

    def test_a_targets_own_count_has_no_say(self, cells, genes, tiny_trunk_model):
        """More molecules of a target, at equal totals: nothing that is said of it changes."""
        regulators, targets = genes
        target = next(int(t) for t in targets if t not in regulators)
        dense = cells.counts.toarray()
        dense[:, target] += 3 * (dense[:, target] > 0)
        changed = replace(twins.cell_counts(dense, cells.library_size), is_measured=cells.is_measured)
        at = int(np.flatnonzero(targets == target)[0])
        kept = np.array([at])
        one, other = (
            knockout_sums(tiny_trunk_model, c, regulators, targets[kept], read_out="profile").total_RT
            for c in (cells, changed)
        )
        np.testing.assert_allclose(one, other, atol=1e-6)

    def test_does_not_depend_on_order(self, cells, genes, tiny_trunk_model):
        order = np.random.default_rng(0).permutation(24)
        one, other = (knockout_sums(tiny_trunk_model, c, *genes, max_cells=5) for c in (cells, cells.take(order)))
        np.testing.assert_allclose(one.total_RT, other.total_RT, atol=1e-6)
        assert one.n_cells_R.max() == 5
        alone = knockout_sums(tiny_trunk_model, cells, genes[0][:1], genes[1], max_cells=5)
        np.testing.assert_allclose(alone.total_RT[0], one.total_RT[0], atol=1e-6)

    def test_standard_errors_are_those_of_a_mean(self):
        effects = np.random.default_rng(0).normal(size=(9, 2, 3))
        sums = KnockoutSums(effects.sum(axis=0), np.square(effects).sum(axis=0), np.array([9, 9]))
        np.testing.assert_allclose(sums.mean_RT, effects.mean(axis=0))
        np.testing.assert_allclose(sums.standard_error_RT, effects.std(axis=0, ddof=1) / 3)

    def test_without_a_trunk_the_profile_decoder_is_left(self, cells, genes, tiny_model):
        assert np.isfinite(knockout_sums(tiny_model, cells, *genes).total_RT).all()
        with pytest.raises(UnsupportedError, match="no trunk"):
            knockout_sums(tiny_model, cells, *genes, read_out="value")


def test_cells_are_ordered_by_what_is_in_them(cells):
    order = np.random.default_rng(1).permutation(24)
    np.testing.assert_array_equal(content_order(cells.take(order)), content_order(cells)[order])
    assert sorted(content_order(cells)) == list(range(24))
