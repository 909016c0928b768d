"""The native network: what it may see, what it must not depend on, and what it starts at."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch

import native_cells as nc
import twins
from scdiva.config import NativeConfig, OfficialConfig, TrunkConfig
from scdiva.data.conditions import ConditionLabels
from scdiva.data.reader import open_counts
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import ConfigError, UnsupportedError
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.init import grow
from scdiva.models.scdiva.model import build_network
from scdiva.models.scdiva.native import NativeNetwork
from scdiva.nn import Packing

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TREATMENTS = ("view", "visible", "null")


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    return nc.dense_counts()


@pytest.fixture(scope="module")
def cells(dense):
    return nc.with_labels(twins.cell_counts(dense, dense.sum(axis=1) + 10))


def treat(treatment: str, n_cells: int, view) -> dict:
    every, none = np.ones(n_cells, dtype=bool), np.zeros(n_cells, dtype=bool)
    return {
        "view": {"view": view, "reads_view": every},
        "visible": {"is_null": none},
        "null": {"is_null": every},
    }[treatment]


class TestNoLeak:
    """What is hidden changes nothing, bit for bit. Depth and the number of hidden genes are known, and stay."""

    @pytest.fixture
    def two(self, dense):
        """Cells that differ in hidden genes, their counts, and hidden values of visible genes; equal totals."""
        rng = np.random.default_rng(5)
        first = dense[:20].copy()
        is_hidden, is_value_masked = nc.random_masks(first, rng)
        second = np.where(is_hidden | is_value_masked, 0, first)
        is_hidden_there = np.zeros_like(is_hidden)
        for i in range(len(first)):
            free = np.flatnonzero((first[i] == 0) | is_hidden[i])
            genes = rng.choice(free, is_hidden[i].sum(), replace=False)
            is_hidden_there[i, genes] = True
            unknown = np.concatenate([genes, np.flatnonzero(is_value_masked[i])]).astype(int)
            total = first[i].sum() - second[i].sum()
            if unknown.size:
                second[i, unknown] = 1 + rng.multinomial(total - unknown.size, rng.dirichlet(np.ones(unknown.size)))
        assert (first.sum(axis=1) == second.sum(axis=1)).all()
        assert (first != second).any(axis=1).all()
        assert (is_hidden != is_hidden_there).any()
        return (first, is_hidden), (second, is_hidden_there), is_value_masked

    def seen(self, built: nc.Built, dense: np.ndarray, is_hidden, is_value_masked, view, treatment: str):
        cells = nc.with_labels(twins.cell_counts(dense, dense.sum(axis=1) + 10))
        options = treat(treatment, len(dense), view)
        return nc.corrupt(built, cells, is_hidden, is_value_masked, **options)[0]

    @pytest.mark.parametrize("order", ["entropy", "expression"])
    @pytest.mark.parametrize("max_tokens", [1000, 4])
    @pytest.mark.parametrize("treatment", TREATMENTS)
    def test_what_is_hidden_changes_no_output(self, treatment, max_tokens, order, two, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES, max_tokens=max_tokens, order=order))
        (first, is_hidden), (second, is_hidden_there), is_value_masked = two
        view = twins.cell_counts(np.random.default_rng(1).poisson(1.0, first.shape))
        one = self.seen(built, first, is_hidden, is_value_masked, view, treatment)
        other = self.seen(built, second, is_hidden_there, is_value_masked, view, treatment)
        assert max(one.lengths) == min(max_tokens, ((first > 0) & ~is_hidden).sum(axis=1).max())
        for name, tensor in nc.tensors_of(one).items():
            same = nc.tensors_of(other)[name]
            assert tensor == same if isinstance(tensor, tuple) else torch.equal(tensor, same), name
        predicted = nc.predictions(built, other)
        for name, tensor in nc.predictions(built, one).items():
            assert torch.equal(tensor, predicted[name]), name

    @pytest.mark.parametrize("treatment", TREATMENTS)
    def test_what_is_visible_does_change_them(self, treatment, two, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES))
        (first, is_hidden), _, is_value_masked = two
        view = twins.cell_counts(np.random.default_rng(1).poisson(1.0, first.shape))
        changed = first.copy()
        for i in range(len(first)):  # one count moves between two visible genes
            known = np.flatnonzero((first[i] > 0) & ~is_hidden[i] & ~is_value_masked[i])
            changed[i, known[0]] += 1
            changed[i, known[np.argmax(first[i, known[1:]]) + 1]] -= 1
        changed = np.where((first > 0) & (changed == 0), first, changed)
        moved = (changed != first).any(axis=1) & (changed.sum(axis=1) == first.sum(axis=1))
        assert moved.sum() > 5
        before = nc.predictions(built, self.seen(built, first, is_hidden, is_value_masked, view, treatment))
        after = nc.predictions(built, self.seen(built, changed, is_hidden, is_value_masked, view, treatment))
        for name in ("gene_logit_BG", "states.query_BD", "log_mean_BG"):
            assert (before[name] != after[name]).flatten(1).any(dim=1)[moved].all(), name
        is_equal = (before["latent_BZ"] == after["latent_BZ"]).all(dim=1)
        assert (is_equal == (treatment != "visible"))[moved].all()

    def test_z_of_the_other_view_is_that_of_its_cells(self, two, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES))
        (first, is_hidden), _, is_value_masked = two
        view = twins.cell_counts(np.random.default_rng(1).poisson(1.0, first.shape))
        masked = self.seen(built, first, is_hidden, is_value_masked, view, "view")
        model = ScDiVa(built.network, built.config, _vocabulary(), built.statistics, labels=_two_fields())
        np.testing.assert_allclose(nc.predictions(built, masked)["latent_BZ"], model.embed(view), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(masked.anchor_depth_B, view.counts.sum(axis=1).A1)

    def test_each_cell_is_treated_for_itself(self, two, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES))
        (first, is_hidden), _, is_value_masked = two
        view = twins.cell_counts(np.random.default_rng(1).poisson(1.0, first.shape))
        treatment = np.arange(len(first)) % 3
        counts = nc.with_labels(twins.cell_counts(first, first.sum(axis=1) + 10))
        options = {"view": view, "reads_view": treatment == 0, "is_null": treatment == 2}
        mixed = nc.predictions(built, nc.corrupt(built, counts, is_hidden, is_value_masked, **options)[0])
        for i, name in enumerate(TREATMENTS):
            alone = nc.predictions(built, self.seen(built, first, is_hidden, is_value_masked, view, name))
            rows = torch.from_numpy(treatment == i)
            for key in ("latent_BZ", "gene_logit_BG", "log_mean_BG"):
                torch.testing.assert_close(mixed[key][rows], alone[key][rows], **CLOSE)


def _vocabulary():
    from scdiva.genes import GeneVocabulary

    return GeneVocabulary.default().subset(np.arange(nc.N_GENES))


def _two_fields() -> ConditionLabels:
    return ConditionLabels(tuple((f"field {i}", tuple("abc"[:n])) for i, n in enumerate(nc.LABEL_SIZES)))


class TestSets:
    @pytest.mark.parametrize("max_tokens", [1000, 5])
    def test_renumbering_the_genes_renumbers_the_predictions(self, max_tokens, dense, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES, max_tokens=max_tokens))
        order = np.random.default_rng(0).permutation(nc.N_GENES)
        is_hidden, is_value_masked = nc.random_masks(dense, np.random.default_rng(1))
        before = nc.predictions(built, nc.corrupt(built, cells, is_hidden, is_value_masked)[0])
        network = NativeNetwork(nc.N_GENES, built.config, nc.LABEL_SIZES).eval()
        weights = {
            name: tensor[order] if tensor.ndim and tensor.shape[0] == nc.N_GENES else tensor
            for name, tensor in built.network.state_dict().items()
        }
        network.load_state_dict(weights)
        moved = nc.Built(network, built.config, built.statistics.take(order), built.simple)
        counts = replace(nc.with_labels(twins.cell_counts(dense[:, order])), library_size=cells.library_size)
        after = nc.predictions(moved, nc.corrupt(moved, counts, is_hidden[:, order], is_value_masked[:, order])[0])
        for name in ("latent_BZ", "states.lat_BD", "states.query_BD"):
            torch.testing.assert_close(after[name], before[name], **CLOSE)
        for name in ("gene_logit_BG", "log_rate_BG", "log_mean_BG", "probability_BG"):
            torch.testing.assert_close(after[name], before[name][:, order], **CLOSE)

    @pytest.mark.parametrize(("layout", "max_tokens"), [("set", 6), ("sequence", 100)])
    def test_a_cell_does_not_depend_on_its_batch_mates(self, layout, max_tokens, dense, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES, max_tokens=max_tokens, layout=layout))
        is_hidden, is_value_masked = nc.random_masks(dense, np.random.default_rng(1), p_hidden=0.1)
        together = nc.predictions(built, nc.corrupt(built, cells, is_hidden, is_value_masked)[0])
        names = [name for name in together if name.endswith(("_BG", "_BZ", "_BD", "_B"))]
        assert "states.query_BD" in names
        order = np.random.default_rng(3).permutation(len(dense))
        masked = nc.corrupt(built, cells.take(order), is_hidden[order], is_value_masked[order])[0]
        shuffled = nc.predictions(built, masked)
        for name in names:
            torch.testing.assert_close(shuffled[name], together[name][order], **CLOSE)
        for i in (0, 17, 58, 59):
            rows = np.array([i])
            masked = nc.corrupt(built, cells.take(rows), is_hidden[rows], is_value_masked[rows])[0]
            alone = nc.predictions(built, masked)
            for name in names:
                torch.testing.assert_close(alone[name], together[name][rows], **CLOSE)

    def test_all_hidden_genes_share_one_distribution_that_depends_on_what_is_visible(self, dense, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES))
        is_hidden, is_value_masked = nc.random_masks(dense, np.random.default_rng(1))
        masked, _ = nc.corrupt(built, cells, is_hidden, is_value_masked)
        p = nc.predictions(built, masked)["probability_BG"]
        assert p.shape == (len(dense), nc.N_GENES)
        assert float((p[0] - p[1]).abs().max()) > 0.05

    def test_the_sequence_layout_does_see_positions(self, dense, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES, layout="sequence"))
        nothing = np.zeros_like(dense, dtype=bool)
        masked, _ = nc.corrupt(built, cells, nothing, nothing)
        assert masked.position_N[: masked.lengths[0]].sort().values.tolist() == list(range(masked.lengths[0]))
        flipped = replace(masked, position_N=masked.position_N.flip(0))
        before, after = (nc.predictions(built, x)["states.lat_BD"] for x in (masked, flipped))
        assert float((before - after).abs().max()) > 1e-2


class TestTokens:
    """What the trunk reads, written out for one cell at a time."""

    def read(self, network: NativeNetwork, cells, i: int, z: torch.Tensor) -> torch.Tensor:
        trunk, mean = network.trunk, network.mean_log_depth

        def number(embedding, x: torch.Tensor, is_given: bool = True) -> torch.Tensor:
            hidden = embedding.up.weight[:, 0] * x + embedding.up.bias
            return embedding.down(hidden * torch.sigmoid(hidden)) if is_given else embedding.unknown

        labels = [table.weight[cells.condition_BC[i, j]] for j, table in enumerate(trunk.labels)]
        depth = number(trunk.depth, torch.log1p(cells.depth_B[i]) - mean, bool(cells.is_depth_given_B[i]))
        anchor_depth = torch.log1p(cells.anchor_depth_B[i]) - mean
        tokens = []
        for n in range(sum(cells.lengths[:i]), sum(cells.lengths[: i + 1])):
            hidden = trunk.value_up.weight[:, 0] * cells.value_N[n] + trunk.value_up.bias
            film = trunk.value_down(hidden * torch.sigmoid(hidden))
            scale, shift = (trunk.value_mask if cells.is_value_masked_N[n] else film).chunk(2)
            gene = trunk.gene.weight @ network.anchor.gene_embedding[cells.gene_N[n]]
            tokens.append(gene * (1 + scale) + shift)
        return torch.stack(
            [
                trunk.lat(z[i]),
                *labels,
                depth,
                number(trunk.anchor_depth, anchor_depth, not bool(cells.is_null_B[i])),
                number(trunk.n_genes, torch.log1p(cells.n_genes_B[i]) - 7, bool(cells.is_n_genes_given_B[i])),
                *tokens,
                trunk.query + number(trunk.n_hidden, torch.log1p(cells.n_hidden_B[i]) - 7),
            ]
        )

    def test_states_are_those_of_the_written_tokens(self, dense, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES))
        network = built.network
        is_hidden, is_value_masked = nc.random_masks(dense, np.random.default_rng(1))
        is_null = np.arange(len(dense)) % 3 == 1
        options = {"is_null": is_null, "condition_dropout": 0.3}
        masked, _ = nc.corrupt(built, cells, is_hidden, is_value_masked, **options)
        with torch.no_grad():
            output = network(masked)
            for i in (0, 1, 2, 3, 4, 58, 59):
                x = self.read(network, masked, i, output.latent_BZ)
                states = network.trunk.transformer(x, Packing((len(x),)))
                torch.testing.assert_close(output.states.lat_BD[i], states[0], **CLOSE)
                torch.testing.assert_close(output.states.query_BD[i], states[-1], **CLOSE)
                first = sum(masked.lengths[:i])
                own = output.states.token_ND[first : first + masked.lengths[i]]
                torch.testing.assert_close(own, states[6:-1], **CLOSE)
        assert not masked.is_depth_given_B.all()
        assert torch.equal(output.latent_BZ[1], network.null_latent)

    def test_logits_are_the_written_sum(self, dense, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES))
        network, embedding = built.network, built.network.anchor.gene_embedding
        is_hidden, is_value_masked = nc.random_masks(dense, np.random.default_rng(1))
        masked, _ = nc.corrupt(built, cells, is_hidden, is_value_masked)
        with torch.no_grad():
            output = network(masked)
            deviation = output.log_rate_BG - network.anchor.log_profile
            depth = torch.log1p(masked.depth_B) - network.mean_log_depth
            expected = (
                network.detection_logit
                + network.identity_offset
                + depth[:, None] * network.identity_slope
                + network.deviation_scale * deviation
                + network.trunk.query_direction(output.states.query_BD) @ embedding.T
            )
        torch.testing.assert_close(output.gene_logit_BG, expected, **CLOSE)
        frequency = (dense > 0).mean(axis=0)
        assert np.corrcoef(network.detection_logit, np.log(frequency / (1 - frequency + 1e-2)))[0, 1] > 0.99


class TestMass:
    """Where probability may be: on measured genes that are not visible, and on each of them."""

    def check(self, built: nc.Built, cells, is_hidden) -> torch.Tensor:
        nothing = np.zeros_like(is_hidden)
        masked, _ = nc.corrupt(built, cells, is_hidden, nothing)
        p = nc.predictions(built, masked)["probability_BG"]
        dense = cells.counts.toarray()
        is_visible = (dense > 0) & ~is_hidden
        may = cells.is_measured[cells.source_of_cell] & ~is_visible
        np.testing.assert_array_equal(masked.is_admissible_BG.numpy(), may)
        m = is_hidden.sum(axis=1)
        assert torch.isfinite(p).all()
        assert (p.numpy()[~may] == 0).all()
        np.testing.assert_allclose(p.sum(dim=1), m, rtol=2e-5, atol=1e-5)
        assert (p.numpy()[may & (m > 0)[:, None]] > 0).all()
        assert (p.numpy() <= 1).all()
        return p

    @pytest.fixture
    def half_measured(self, dense):
        is_measured = np.arange(nc.N_GENES) % 4 != 1
        dense = dense * is_measured
        return nc.with_labels(twins.cell_counts(dense, dense.sum(axis=1) + 10, is_measured))

    @pytest.mark.parametrize("max_tokens", [1000, 3])
    def test_on_random_masks(self, max_tokens, half_measured):
        built = nc.stir(nc.build(half_measured, label_sizes=nc.LABEL_SIZES, max_tokens=max_tokens))
        dense = half_measured.counts.toarray()
        for seed, share in enumerate((0.1, 0.5, 0.9)):
            self.check(built, half_measured, nc.random_masks(dense, np.random.default_rng(seed), share)[0])

    def test_nothing_everything_and_single_genes(self, half_measured):
        built = nc.stir(nc.build(half_measured, label_sizes=nc.LABEL_SIZES))
        dense = half_measured.counts.toarray()
        assert (dense[-2] > 0).sum() == 1
        assert dense[-1].sum() == 0
        self.check(built, half_measured, np.zeros_like(dense, dtype=bool))
        self.check(built, half_measured, dense > 0)
        one = np.zeros_like(dense, dtype=bool)
        one[np.arange(len(dense) - 1), dense[:-1].argmax(axis=1)] = True
        self.check(built, half_measured, one)

    def test_every_admissible_gene_is_hidden(self, half_measured):
        built = nc.stir(nc.build(half_measured, label_sizes=nc.LABEL_SIZES))
        is_measured = half_measured.is_measured[0]
        cells = nc.with_labels(twins.cell_counts(np.tile(is_measured * 2, (3, 1)), None, is_measured))
        is_hidden = np.tile(is_measured, (3, 1))
        is_hidden[1, 10:] = False
        p = self.check(built, cells, is_hidden)
        np.testing.assert_allclose(p, is_hidden, atol=1e-4)


class TestStart:
    def test_every_part_starts_equal_whatever_else_was_drawn(self):
        config = NativeConfig(n_latent=4, n_embedding=6, n_hidden=8, trunk=TrunkConfig(**nc.TRUNK))
        first = NativeNetwork(20, config, (3,)).state_dict()
        torch.rand(7)
        second = NativeNetwork(20, config, (3,)).state_dict()
        for name, tensor in second.items():
            assert torch.equal(tensor, first[name]), name

    @pytest.mark.parametrize("layout", ["set", "sequence"])
    def test_at_the_start_the_trunk_adds_nothing(self, layout, dense, cells):
        is_hidden, is_value_masked = nc.random_masks(dense, np.random.default_rng(1))
        with_trunk = nc.build(cells, label_sizes=nc.LABEL_SIZES, layout=layout)
        without = nc.build(cells, has_trunk=False)
        one, two = (
            nc.predictions(built, nc.corrupt(built, cells, is_hidden, is_value_masked)[0])
            for built in (with_trunk, without)
        )
        for name in ("latent_BZ", "gene_logit_BG", "log_rate_BG", "log_mean_BG", "probability_BG"):
            assert torch.equal(one[name], two[name]), name
        logit = torch.from_numpy(np.log((dense > 0).sum(axis=0) + 0.5) - np.log((dense == 0).sum(axis=0) + 0.5))
        torch.testing.assert_close(one["gene_logit_BG"][0], logit.float(), rtol=1e-4, atol=1e-5)
        share = torch.softmax(torch.from_numpy(with_trunk.statistics.log_mean_profile()), dim=0)
        expected = torch.from_numpy(dense.sum(axis=1)).clamp_min(1)[:, None] * share
        torch.testing.assert_close(one["log_mean_BG"].exp().double(), expected, rtol=1e-4, atol=1e-6)

    def test_the_dispersions_explain_the_detection(self):
        # genes of one true dispersion: what the simple model takes from mean and detection is that dispersion
        rng = np.random.default_rng(0)
        rate = rng.uniform(0.5, 3.0, 80)
        depth = rng.lognormal(0, 0.3, 4000)
        theta = 0.8
        mean = depth[:, None] * rate
        dense = rng.negative_binomial(theta, theta / (theta + mean))
        cells = twins.cell_counts(dense)
        simple = nc.simple_of(cells, GeneStatistics.from_cells(cells))
        assert float(simple.log_theta_G.median()) == pytest.approx(np.log(theta), abs=0.15)


class TestValues:
    def test_the_head_is_told_the_gene(self, dense, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES))
        is_hidden, is_value_masked = nc.random_masks(dense, np.random.default_rng(1))
        masked, _ = nc.corrupt(built, cells, is_hidden, is_value_masked)
        with torch.no_grad():
            output = built.network(masked)
            gene, cell = torch.arange(nc.N_GENES), torch.zeros(nc.N_GENES, dtype=torch.int64)
            direction = built.network.trunk.value_direction(output.states.query_BD)[cell]
            residual = built.network.log_mean(output, cell, gene, direction) - built.network.log_mean(
                output, cell, gene, None
            )
        assert float(residual.std()) > 0.1  # one state of one cell, other genes, other corrections

    def test_a_profile_that_is_all_of_one_gene_gives_it_the_whole_depth(self, cells):
        built = nc.build(cells)
        with torch.no_grad():
            built.network.anchor.log_profile.fill_(-50.0)
            built.network.anchor.log_profile[7] = 0.0
        dense = cells.counts.toarray()
        nothing = np.zeros_like(dense, dtype=bool)
        masked, _ = nc.corrupt(built, cells, nothing, nothing)
        found = nc.predictions(built, masked)["log_mean_BG"][:, 7].exp()
        np.testing.assert_allclose(found, np.maximum(dense.sum(axis=1), 1), rtol=1e-4)

    def test_unmeasured_genes_take_no_share_of_the_depth(self, dense):
        is_measured = np.arange(nc.N_GENES) < 30
        dense = dense * is_measured
        whole, half = twins.cell_counts(dense), twins.cell_counts(dense, measured=is_measured)
        built = nc.build(whole)
        with torch.no_grad():
            built.network.anchor.log_profile.zero_()
        nothing = np.zeros_like(dense, dtype=bool)
        found = [
            nc.predictions(built, nc.corrupt(built, c, nothing, nothing)[0])["log_mean_BG"][0, 0].exp()
            for c in (whole, half)
        ]
        assert float(found[1] / found[0]) == pytest.approx(40 / 30, rel=1e-5)


class TestConditions:
    def test_labels_change_predictions_and_fields_are_told_apart(self, dense, cells):
        built = nc.stir(nc.build(cells, label_sizes=nc.LABEL_SIZES))
        is_hidden, is_value_masked = nc.random_masks(dense, np.random.default_rng(1))
        found = []
        for codes in ([0, 0], [1, 0], [2, 0], [0, 1], [3, 2]):
            labelled = replace(cells, condition=np.tile(np.array(codes, dtype=np.int32), (len(dense), 1)))
            masked, _ = nc.corrupt(built, labelled, is_hidden, is_value_masked)
            found.append(nc.predictions(built, masked))
        for i in range(len(found)):
            for j in range(i):
                for name in ("gene_logit_BG", "log_mean_BG"):
                    assert float((found[i][name] - found[j][name]).abs().max()) > 1e-3, (i, j, name)
        assert torch.equal(found[0]["latent_BZ"], found[4]["latent_BZ"])  # z is of the counts alone

    def test_a_trained_model_uses_the_labels_that_it_knows(self, adata, tiny_trunk_model):
        model = tiny_trunk_model
        counts = open_counts(adata, model.vocabulary).with_conditions(model.labels, {}).read(np.arange(120))
        known = nc.predictions(nc.Built(model.network, model.config, model.statistics, None), model.unmasked(counts))
        unknown_counts = replace(counts, condition=np.zeros_like(counts.condition))
        unknown = nc.predictions(
            nc.Built(model.network, model.config, model.statistics, None), model.unmasked(unknown_counts)
        )
        assert float((known["gene_logit_BG"] - unknown["gene_logit_BG"]).abs().max()) > 1e-3

    def test_a_network_without_a_trunk_takes_none(self):
        labels = ConditionLabels((("cell_type", ("B cell",)),))
        with pytest.raises(ConfigError, match="cell_type"):
            build_network(20, NativeConfig(), labels)
        with pytest.raises(ConfigError, match="cell_type"):
            build_network(20, OfficialConfig(architecture="official"), labels)
        network = build_network(20, NativeConfig(trunk=TrunkConfig(**nc.TRUNK)), labels)
        assert [tuple(e.weight.shape) for e in network.trunk.labels] == [(2, 16)]


class TestGrowth:
    """A network that starts at a model: whatever the model knew, it still says."""

    @pytest.fixture
    def counts(self, adata, tiny_model):
        return open_counts(adata, tiny_model.vocabulary).read(np.arange(40))

    def predict(self, network, model: ScDiVa, counts, trunk: TrunkConfig | None = None) -> dict[str, torch.Tensor]:
        config = model.config if trunk is None else model.config.model_copy(update={"trunk": trunk})
        built = nc.Built(network, config, model.statistics, None)
        dense = counts.counts.toarray()
        return nc.predictions(built, nc.corrupt(built, counts, *nc.random_masks(dense, np.random.default_rng(0)))[0])

    def test_a_trunk_adds_nothing_at_first(self, tiny_model, counts):
        trunk = TrunkConfig(n_layers=2, width=16, n_heads=2, n_hidden=32)
        labels = ConditionLabels((("cell_type", ("a", "b")),))
        config = tiny_model.config.model_copy(update={"trunk": trunk})
        network = build_network(210, config, labels).eval()
        grow(network, tiny_model, labels)
        before = self.predict(tiny_model.network, tiny_model, counts)
        labelled = replace(counts, condition=np.ones((40, 1), dtype=np.int32))
        after = self.predict(network, tiny_model, labelled, trunk)
        for name in ("latent_BZ", "gene_logit_BG", "log_rate_BG", "log_mean_BG", "probability_BG"):
            assert torch.equal(after[name], before[name]), name
        assert float(before["log_rate_BG"].std(dim=0).max()) > 0.1  # the model says something about cells

    def test_more_labels_keep_what_is_said_of_the_old_ones(self, tiny_trunk_model, counts):
        model = tiny_trunk_model
        more = model.labels.merged(ConditionLabels((("cell_type", ("type 9", "type 8")),)))
        assert more.labels("cell_type") == ("type 0", "type 1", "type 2", "type 9", "type 8")
        network = build_network(210, model.config, more).eval()
        grow(network, model, more)
        codes = (np.arange(40) % 4).astype(np.int32)[:, None]
        labelled = replace(counts, condition=codes)
        before, after = (self.predict(n, model, labelled) for n in (model.network, network))
        for name, tensor in before.items():
            assert torch.equal(after[name], tensor), name
        new = self.predict(network, model, replace(counts, condition=np.full((40, 1), 4, dtype=np.int32)))
        assert not torch.equal(new["gene_logit_BG"], before["gene_logit_BG"])

    def test_another_field_can_be_added(self, tiny_trunk_model, counts):
        labels = tiny_trunk_model.labels.merged(ConditionLabels((("tissue", ("blood",)),)))
        network = build_network(210, tiny_trunk_model.config, labels).eval()
        grow(network, tiny_trunk_model, labels)
        own = tiny_trunk_model.network.state_dict()
        for name, tensor in network.state_dict().items():
            assert name == "trunk.labels.1.weight" or torch.equal(tensor, own[name]), name
        labelled = replace(counts, condition=np.ones((40, 2), dtype=np.int32))
        assert torch.isfinite(self.predict(network, tiny_trunk_model, labelled)["gene_logit_BG"]).all()

    @pytest.mark.parametrize("change", [{"n_latent": 9}, {"n_hidden": 17}, {"trunk": TrunkConfig()}])
    def test_a_weight_that_does_not_fit_is_named(self, change, tiny_trunk_model):
        model = tiny_trunk_model
        config = model.config.model_copy(update=change)
        labels = ConditionLabels.none() if "trunk" in change else model.labels
        network = build_network(210, config, labels)
        with pytest.raises(ConfigError, match=r"(anchor|trunk)\.|null_latent") as caught:
            grow(network, model, labels)
        assert "tiny" in str(caught.value)


class TestCellState:
    def test_is_a_layer_norm_of_z_and_lat(self, adata, tiny_trunk_model):
        model = tiny_trunk_model
        counts = open_counts(adata, model.vocabulary).with_conditions(model.labels, {}).read(np.arange(120))
        state = model.cell_state(counts)
        assert state.shape == (120, 8 + 16)
        assert state.dtype == np.float32
        np.testing.assert_allclose(state.mean(axis=1), 0, atol=1e-5)
        np.testing.assert_allclose(state.std(axis=1), 1, atol=1e-2)
        np.testing.assert_array_equal(model.cell_state(counts), state)
        for rows in (np.array([5]), np.arange(119, -1, -1)):
            np.testing.assert_allclose(model.cell_state(counts.take(rows)), state[rows], atol=1e-4)
        z = model.embed(counts)
        assert np.corrcoef(state[3, :8], z[3])[0, 1] > 0.999

    def test_gene_order_and_missing_labels(self, adata, tiny_trunk_model):
        model = tiny_trunk_model
        order = np.random.default_rng(0).permutation(adata.n_vars)
        # read without labels: every condition is unknown
        counts, moved = (open_counts(a, model.vocabulary).read(np.arange(30)) for a in (adata, adata[:, order].copy()))
        np.testing.assert_array_equal(model.cell_state(counts), model.cell_state(moved))
        named = replace(counts, condition=np.ones((30, 1), dtype=np.int32))
        assert np.abs(model.cell_state(named) - model.cell_state(counts)).max() > 1e-4
        unknown = replace(counts, condition=np.zeros((30, 1), dtype=np.int32))
        np.testing.assert_array_equal(model.cell_state(unknown), model.cell_state(counts))

    def test_without_a_trunk_it_is_z(self, adata, tiny_model):
        counts = open_counts(adata, tiny_model.vocabulary).read(np.arange(30))
        state, z = tiny_model.cell_state(counts), tiny_model.embed(counts)
        expected = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(state, expected, atol=1e-4)

    def test_empty_cells_have_one(self, tiny_trunk_model):
        state = tiny_trunk_model.cell_state(twins.cell_counts(np.zeros((2, 210)), [0, 40]))
        assert np.isfinite(state).all()
        np.testing.assert_array_equal(state[0], state[1])

    def test_the_published_architecture_has_none(self, adata, tiny_model):
        config = OfficialConfig(architecture="official", n_layers=1, width=8, n_heads=2, n_hidden=8, max_tokens=16)
        model = ScDiVa(build_network(210, config), config, tiny_model.vocabulary, tiny_model.statistics)
        counts = open_counts(adata, model.vocabulary).read(np.arange(3))
        assert model.embed(counts).shape == (3, 8)
        with pytest.raises(UnsupportedError, match="cell states"):
            model.cell_state(counts)
        with pytest.raises(UnsupportedError, match="profile"):
            model.expected_profile(np.zeros((1, 8), dtype=np.float32), np.array([0]))


class TestAutoregression:
    """Five genes, cells of three: few enough to enumerate every order and every mask."""

    @pytest.fixture
    def tiny(self) -> nc.Built:
        rng = np.random.default_rng(0)
        dense = (rng.random((50, 5)) < [0.9, 0.7, 0.5, 0.4, 0.6]).astype(int)
        return nc.stir(nc.build(twins.cell_counts(dense)), size=0.5)

    def next_gene(self, built: nc.Built, visible: tuple[int, ...]) -> np.ndarray:
        """p(next gene | visible genes) of a cell of three genes with one UMI each."""
        hidden = [g for g in range(5) if g not in visible][: 3 - len(visible)]  # any: the network must not know which
        dense = np.zeros((1, 5), dtype=int)
        dense[0, [*visible, *hidden]] = 1
        is_hidden = np.zeros_like(dense, dtype=bool)
        is_hidden[0, hidden] = True
        masked, _ = nc.corrupt(built, twins.cell_counts(dense), is_hidden, np.zeros_like(is_hidden))
        return nc.predictions(built, masked)["probability_BG"][0].double().numpy() / len(hidden)

    def test_the_chain_of_predictions_is_a_distribution(self, tiny):
        total = sum(
            self.next_gene(tiny, ())[a] * self.next_gene(tiny, (a,))[b] * self.next_gene(tiny, (a, b))[c]
            for a, b, c in permutations(range(5), 3)
        )
        assert total == pytest.approx(1.0, abs=1e-5)
        assert np.abs(self.next_gene(tiny, (0,)) - self.next_gene(tiny, (1,))).max() > 0.05
        np.testing.assert_allclose(self.next_gene(tiny, (1, 3)), self.next_gene(tiny, (3, 1)))
