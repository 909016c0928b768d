"""The published token model and its objective, against a plain NumPy twin that reads the published tensor names."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import twins
import twins_official as official_twins
from scdiva.config import DenseConfig, OfficialConfig
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import UntrainedHeadError
from scdiva.genes import GeneVocabulary
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva import official as official_module
from scdiva.models.scdiva.convert import convert
from scdiva.models.scdiva.dense import DenseNetwork
from scdiva.models.scdiva.official import OfficialNetwork, OfficialTokens
from scdiva.models.scdiva.official_objective import HELDOUT_TIMES, OfficialObjective

N_GENES, WIDTH, N_HIDDEN, N_LAYERS = 30, 128, 96, 2
LENGTHS = (6, 1, 0, 13)
SMALL = {"n_layers": 2, "width": 16, "n_heads": 2, "n_hidden": 24, "max_tokens": 12}


def small_network(**changes) -> OfficialNetwork:
    return OfficialNetwork(N_GENES, OfficialConfig(architecture="official", **(SMALL | changes)))


def random_network(**changes) -> OfficialNetwork:
    """Weights large enough that every part of the network matters."""
    network = small_network(**changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    return official_twins.random_token_weights(N_GENES, WIDTH, N_HIDDEN, N_LAYERS, np.random.default_rng(0))


@pytest.fixture(scope="module")
def converted(published, tmp_path_factory) -> ScDiVa:
    folder = tmp_path_factory.mktemp("official")
    save_file(published, folder / "model.safetensors")
    ids = GeneVocabulary.default().ensembl_id[:N_GENES]
    (folder / "genes.tsv").write_text("\n".join(ids))
    convert(folder / "model.safetensors", folder / "bundle", vocabulary=folder / "genes.tsv")
    return ScDiVa.from_pretrained(folder / "bundle", device="cpu")


@pytest.fixture(scope="module")
def tokens() -> OfficialTokens:
    rng = np.random.default_rng(1)
    rows = [rng.choice(np.arange(2, N_GENES + 2), length, replace=False) for length in LENGTHS]
    return OfficialTokens(
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(rng.uniform(0.1, 6, sum(LENGTHS)).astype(np.float32)),
        LENGTHS,
    )


@pytest.fixture(scope="module")
def is_hidden() -> torch.Tensor:
    """Some tokens of the first cell, the only one of the second, all of the fourth."""
    return torch.from_numpy(np.r_[np.random.default_rng(2).random(6) < 0.5, True, np.ones(13, dtype=bool)])


@pytest.fixture(scope="module")
def cells():
    """Cells of up to 30 genes; some have more than the 12 tokens that the small network keeps, one is empty."""
    rng = np.random.default_rng(4)
    counts = rng.poisson(rng.lognormal(-0.5, 1.0, N_GENES), (24, N_GENES))
    counts[5] = 0
    return twins.cell_counts(counts, counts.sum(axis=1) + 50)


@pytest.fixture(scope="module")
def statistics(cells) -> GeneStatistics:
    return GeneStatistics.from_cells(cells)


class TestSize:
    @pytest.mark.parametrize(("is_head_tied", "expected"), [(False, 94_482_433), (True, 73_071_617)])
    def test_the_token_model_has_the_published_number_of_parameters(self, is_head_tied, expected):
        config = OfficialConfig(architecture="official", is_head_tied=is_head_tied)
        with torch.device("meta"):
            network = OfficialNetwork(GeneVocabulary.default().n_genes, config)
        assert sum(p.numel() for p in network.parameters()) == expected
        assert sum(t.numel() for t in network.state_dict().values()) == expected

    def test_the_dense_model_has_the_published_number_of_parameters(self):
        with torch.device("meta"):
            network = DenseNetwork(GeneVocabulary.default().n_genes, DenseConfig(architecture="official-dense"))
        assert sum(p.numel() for p in network.parameters()) == 93_523_134


class TestForward:
    @pytest.mark.parametrize("lat", ["clean", "visible"])
    @pytest.mark.parametrize("has_mask", [True, False])
    def test_converted_weights_give_what_the_twin_computes(
        self, published, converted, tokens, is_hidden, lat, has_mask
    ):
        network = converted.network
        hide = is_hidden if has_mask else None
        with torch.no_grad():
            hidden = network(tokens, hide, lat=lat)
            logits, values = network.gene_logits(hidden.token_ND), network.values(hidden.token_ND)
        is_hidden_N = (is_hidden if has_mask else torch.zeros_like(is_hidden)).numpy()
        start = 0
        for cell, length in enumerate(LENGTHS):
            own = slice(start, start + length)
            start += length
            expected, expected_logits, expected_values = official_twins.token_model(
                published, tokens.row_N[own].numpy(), tokens.value_N[own].numpy(), is_hidden_N[own], lat
            )
            np.testing.assert_allclose(hidden.lat_BD[cell], expected[0], atol=1e-5)
            np.testing.assert_allclose(hidden.token_ND[own], expected[1:], atol=1e-5)
            np.testing.assert_allclose(logits[own], expected_logits, atol=1e-5)
            np.testing.assert_allclose(values[own], expected_values, atol=1e-5)

    def test_every_published_tensor_matters(self, published, tokens, is_hidden):
        # a twin that ignored a tensor could not vouch for it
        def outputs(weights):
            rows, values = tokens.row_N[:6].numpy(), tokens.value_N[:6].numpy()
            return np.concatenate(
                [part.ravel() for part in official_twins.token_model(weights, rows, values, is_hidden[:6].numpy())]
            )

        before, rng = outputs(published), np.random.default_rng(0)
        for name, tensor in published.items():
            changed = tensor * rng.uniform(0.5, 1.5, tensor.shape)
            assert not np.allclose(outputs({**published, name: changed}), before, atol=1e-6), name

    def test_the_published_latent_token_sees_the_answer_and_the_visible_one_does_not(self, tokens, is_hidden):
        network = random_network()
        other = dataclasses.replace(
            tokens,
            value_N=torch.where(is_hidden, tokens.value_N + 1, tokens.value_N),
            row_N=torch.where(is_hidden, (tokens.row_N + 3) % N_GENES + 2, tokens.row_N),
        )
        with torch.no_grad():
            clean = [network(t, is_hidden).token_ND for t in (tokens, other)]
            visible = [network(t, is_hidden, lat="visible").token_ND for t in (tokens, other)]
        assert (clean[0] - clean[1]).abs().max() > 1e-3
        assert torch.equal(*visible)

    def test_without_masks_both_latent_tokens_are_the_same(self, tokens):
        network = random_network()
        with torch.no_grad():
            assert torch.equal(network(tokens).lat_BD, network(tokens, lat="visible").lat_BD)

    def test_order_matters_to_a_sequence(self, tokens):
        network = random_network()
        turned = OfficialTokens(tokens.row_N.flip(0), tokens.value_N.flip(0), LENGTHS[::-1])
        with torch.no_grad():
            assert (network(tokens).lat_BD - network(turned).lat_BD.flip(0)).abs().max() > 1e-4

    def test_logits_exist_for_few_tokens_at_a_time(self, tokens, monkeypatch):
        network = random_network()
        with torch.no_grad():
            hidden = network(tokens).token_ND
        whole = hidden.clone().requires_grad_()
        logits = network.gene_logits(whole)
        expected = torch.nn.functional.cross_entropy(logits, tokens.row_N, reduction="none")
        weight = network.gene_head.weight
        expected_gradients = torch.autograd.grad(expected.square().sum(), (whole, weight))

        monkeypatch.setattr(official_module, "_LOGIT_ROWS", 7)
        n_rows, original = [], network.gene_logits
        monkeypatch.setattr(network, "gene_logits", lambda h: n_rows.append(len(h)) or original(h))
        parts = hidden.clone().requires_grad_()
        found = network.identity_nll(parts, tokens.row_N)
        gradients = torch.autograd.grad(found.square().sum(), (parts, weight))
        assert max(n_rows) == 7
        assert sum(n_rows) == 2 * len(hidden)  # once forward, once again backward: logits were not kept
        torch.testing.assert_close(found, expected)
        for one, other in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(one, other)

    def test_a_tied_head_is_the_gene_embedding(self, tokens):
        network = random_network(is_head_tied=True)
        assert not any("gene_head" in name for name in network.state_dict())
        with torch.no_grad():
            hidden = network(tokens).token_ND
            torch.testing.assert_close(network.gene_logits(hidden), hidden @ network.gene_embedding.weight.T)

    def test_dropout_is_at_work_in_training_only(self, tokens):
        network = random_network(dropout=0.4)
        with torch.no_grad():
            assert torch.equal(network(tokens).lat_BD, network(tokens).lat_BD)
            network.train()
            assert not torch.equal(network(tokens).lat_BD, network(tokens).lat_BD)


class TestStart:
    def test_networks_start_equal_whatever_else_was_drawn(self):
        first = small_network().state_dict()
        torch.rand(5)
        for name, tensor in small_network().state_dict().items():
            assert torch.equal(tensor, first[name]), name

    def test_masks_and_biases_start_at_zero_and_weights_do_not(self):
        for name, tensor in small_network().named_parameters():
            is_norm = "norm" in name or name == "latent_encoder.1.weight"
            if is_norm:
                assert (tensor == 1).all(), name
            elif tensor.ndim == 1:
                assert (tensor == 0).all(), name
            else:
                assert 0.005 < float(tensor.detach().std()) < 0.03, name

    def test_another_generator_gives_another_start(self):
        network = small_network()
        before = network.gene_embedding.weight.clone()
        official_module.init_official(network, torch.Generator().manual_seed(1))
        assert not torch.equal(network.gene_embedding.weight, before)


class TestEmbedding:
    @pytest.mark.parametrize("order", ["entropy", "expression", "random"])
    def test_it_depends_on_the_cell_alone_and_not_on_the_mode(self, cells, statistics, order, monkeypatch):
        network = random_network(order=order, dropout=0.5)
        together = network.embed(cells, statistics)
        assert together.shape == (24, network.n_latent)
        shuffled = np.random.default_rng(0).permutation(24)
        torch.testing.assert_close(
            network.embed(cells.take(shuffled), statistics), together[shuffled], atol=1e-5, rtol=0
        )
        alone = torch.cat([network.embed(cells.take(np.array([i])), statistics) for i in range(24)])
        torch.testing.assert_close(alone, together, atol=1e-5, rtol=0)
        monkeypatch.setattr(official_module, "_CELLS", 5)
        torch.testing.assert_close(network.embed(cells, statistics), together, atol=1e-5, rtol=0)
        network.train()
        torch.testing.assert_close(network.embed(cells, statistics), together, atol=1e-5, rtol=0)
        assert network.training
        assert network.trunk.layers[0].training
        assert network.embed(cells.take(np.array([], dtype=int)), statistics).shape == (0, network.n_latent)

    def test_it_is_the_latent_token_of_the_serialised_cell(self, published, converted, cells):
        dense, library_size = cells.counts.toarray(), cells.library_size
        z = converted.embed(cells)
        for cell in (0, 5, 23):
            tokens = twins.tokens_of_cell(dense[cell], library_size[cell], np.ones(N_GENES), 1200, "expression")
            rows, values = np.array([t[0] for t in tokens], dtype=int), np.array([t[1] for t in tokens])
            expected, _, _ = official_twins.token_model(published, rows, values, np.zeros(len(rows), dtype=bool))
            np.testing.assert_allclose(z[cell], expected[0], atol=1e-5)

    def test_longer_cells_keep_their_best_tokens(self, cells, statistics):
        network = random_network()
        tokens = network.tokenise(cells, statistics)
        n_detected = np.diff(cells.counts.indptr)
        assert n_detected.max() > 12
        assert tokens.lengths == tuple(np.minimum(n_detected, 12))


class TestHeads:
    def test_a_head_that_was_never_trained_raises(self, tokens):
        network = random_network()
        with torch.no_grad():
            hidden = network(tokens).token_ND
            network.mark_trained(["value"])
            network.values(hidden)
            for call in (network.gene_logits, lambda h: network.identity_nll(h, tokens.row_N)):
                with pytest.raises(UntrainedHeadError, match="gene head"):
                    call(hidden)
            network.mark_trained(["trunk", "gene"])
            network.gene_logits(hidden)
            with pytest.raises(UntrainedHeadError, match="value head"):
                network.values(hidden)

    def test_training_makes_it_usable(self, cells, statistics):
        network = random_network()
        network.mark_trained([])
        objective = OfficialObjective(network, statistics)
        with torch.no_grad():
            loss = objective(objective.prepare(cells, np.random.default_rng(0)), torch.Generator()).loss
        assert float(loss) > 0


class TestTraining:
    @pytest.fixture
    def objective(self, statistics) -> OfficialObjective:
        return OfficialObjective(random_network(), statistics)

    def test_the_loss_is_cross_entropy_and_ten_times_the_squared_error_over_all_masked_tokens(
        self, published, converted, cells
    ):
        objective = OfficialObjective(converted.network, converted.statistics)
        inputs = objective.prepare(cells, np.random.default_rng(0))
        nll, square, start = [], [], 0
        for length in inputs.tokens.lengths:
            own = slice(start, start + length)
            start += length
            rows, values = inputs.tokens.row_N[own].numpy(), inputs.tokens.value_N[own].numpy()
            _, logits, predicted = official_twins.token_model(published, rows, values, inputs.is_hidden_N[own].numpy())
            for at in np.flatnonzero(inputs.is_masked_N[own].numpy()):
                nll.append(np.log(np.exp(logits[at]).sum()) - logits[at, rows[at]])
                square.append((predicted[at] - values[at]) ** 2)
        output = objective(inputs, torch.Generator())
        assert len(nll) > 50
        assert float(output.terms["identity_nll"]) == pytest.approx(np.mean(nll), abs=1e-5)
        assert float(output.terms["value_mse"]) == pytest.approx(np.mean(square), rel=1e-5)
        assert float(output.loss.detach()) == pytest.approx(np.mean(nll) + 10 * np.mean(square), rel=1e-5)
        assert output.n_cells == 24
        assert output.n_tokens == 24 + sum(inputs.tokens.lengths)
        assert output.n_flops == converted.network.trunk.flops(inputs.tokens.packing) > 0

    def test_masks_are_those_of_the_paper(self, objective, cells):
        rng = np.random.default_rng(0)
        big = cells.take(np.tile(np.arange(24), 100))
        inputs = objective.prepare(big, rng)
        is_masked, is_hidden = inputs.is_masked_N.numpy(), inputs.is_hidden_N.numpy()
        assert not (is_hidden & ~is_masked).any()
        assert is_hidden.sum() / is_masked.sum() == pytest.approx(0.9, abs=0.01)
        assert is_masked.mean() == pytest.approx(0.5, abs=0.02)
        # t differs between cells and is uniform: the share of masked tokens is spread far wider than one t's coins
        share = np.array(
            [part.mean() for part in np.split(is_masked, np.cumsum(inputs.tokens.lengths)[:-1]) if part.size]
        )
        assert np.quantile(share, [0.1, 0.9]) == pytest.approx([0.1, 0.9], abs=0.06)

    def test_preparation_is_seeded_and_the_loss_takes_no_further_randomness(self, objective, cells):
        def loss(seed, noise):
            inputs = objective.prepare(cells, np.random.default_rng(seed))
            return float(objective(inputs, torch.Generator().manual_seed(noise)).loss.detach())

        assert loss(0, 0) == loss(0, 1)
        assert loss(0, 0) != loss(1, 0)

    def test_every_part_can_learn_from_its_start(self, cells, statistics):
        network = small_network()
        objective = OfficialObjective(network, statistics).train()
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        optimiser = torch.optim.Adam(objective.parameters(), lr=3e-3)
        rng = np.random.default_rng(0)
        losses = []
        for _ in range(40):
            optimiser.zero_grad()
            loss = objective(objective.prepare(cells, rng), torch.Generator()).loss
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert [name for name, p in network.named_parameters() if torch.equal(p, before[name])] == []
        assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])

    def test_cells_without_tokens_have_no_loss_and_do_not_break_the_others(self, objective, cells):
        inputs = objective.prepare(cells.take(np.array([5, 5])), np.random.default_rng(0))
        output = objective(inputs, torch.Generator())
        assert float(output.loss.detach()) == 0
        output.loss.backward()
        assert output.n_tokens == 2

    def test_inputs_move_as_a_whole(self, objective, cells):
        for inputs in (
            objective.prepare(cells, np.random.default_rng(0)),
            objective.prepare_heldout(cells, np.random.default_rng(0)),
        ):
            moved = inputs.to(torch.device("meta"))
            assert moved.tokens.row_N.device.type == moved.tokens.value_N.device.type == "meta"
            masks = moved.masks if hasattr(moved, "masks") else (moved.is_masked_N, moved.is_hidden_N)
            assert {mask.device.type for mask in masks} == {"meta"}


class TestHeldout:
    @pytest.fixture
    def objective(self, statistics) -> OfficialObjective:
        return OfficialObjective(random_network(), statistics).eval()

    @pytest.fixture
    def inputs(self, objective, cells):
        return objective.prepare_heldout(cells, np.random.default_rng(0))

    @pytest.fixture
    def output(self, objective, inputs):
        with torch.inference_mode():
            return objective(inputs, torch.Generator())

    def test_masks_hide_fixed_numbers_of_tokens(self, objective, inputs, cells):
        ends = np.cumsum(inputs.tokens.lengths)[:-1]
        for t, mask in zip(HELDOUT_TIMES, inputs.masks, strict=True):
            for length, part in zip(inputs.tokens.lengths, np.split(mask.numpy(), ends), strict=True):
                assert part.sum() == min(length, max(1, round(t * length)))
        again = objective.prepare_heldout(cells, np.random.default_rng(0))
        assert all(map(torch.equal, inputs.masks, again.masks))
        other = objective.prepare_heldout(cells, np.random.default_rng(1))
        assert not all(map(torch.equal, inputs.masks, other.masks))

    def test_terms_are_means_within_cells_and_then_over_cells(self, objective, inputs, output, statistics):
        tokens, network = inputs.tokens, objective.network
        cell = tokens.cell_N.numpy()
        detection = (statistics.n_detected + 0.5) / (statistics.n_cells + 1)
        expected: dict[str, float] = {}
        squares = []
        for t, mask in zip(HELDOUT_TIMES, inputs.masks, strict=True):
            hide = mask.numpy()
            with torch.no_grad():
                outputs = {lat: network(tokens, mask, lat=lat).token_ND for lat in ("clean", "visible")}
                logits = {lat: network.gene_logits(h).double().numpy() for lat, h in outputs.items()}
                square = (network.values(outputs["clean"]) - tokens.value_N).square().numpy()
            per_cell = {"": [], "visible_": [], "floor_": [], "square": []}
            for c in range(24):
                own = np.flatnonzero((cell == c) & hide)
                if own.size == 0:
                    continue
                rows = tokens.row_N.numpy()[own]
                for key, lat in (("", "clean"), ("visible_", "visible")):
                    share = np.exp(logits[lat][own])
                    per_cell[key].append(np.mean(-np.log(share[range(own.size), rows] / share.sum(axis=1))))
                seen = tokens.row_N.numpy()[(cell == c) & ~hide] - 2
                hidden_genes = np.setdiff1d(np.arange(N_GENES), seen)
                per_cell["floor_"].append(np.mean(-np.log(detection[rows - 2] / detection[hidden_genes].sum())))
                per_cell["square"].append(square[own].mean())
            squares.append(np.mean(per_cell.pop("square")))
            expected |= {f"identity_nll_{key}t{t}": np.mean(values) for key, values in per_cell.items()}
        expected["value_mse"] = np.mean(squares)
        expected["identity_nll"] = np.mean([expected[f"identity_nll_t{t}"] for t in HELDOUT_TIMES])
        assert set(output.terms) == set(expected)
        for name, value in expected.items():
            assert float(output.terms[name]) == pytest.approx(value, rel=1e-4), name
        assert float(output.loss) == pytest.approx(expected["identity_nll"] + 10 * expected["value_mse"], rel=1e-4)
        assert output.n_cells == 23  # the empty cell has nothing to predict
        assert output.n_tokens == 6 * (24 + sum(tokens.lengths))

    def test_the_floor_of_a_gene_never_seen_is_finite(self, cells, inputs):
        objective = OfficialObjective(small_network(), GeneStatistics.empty(N_GENES))
        with torch.inference_mode():
            terms = objective.eval()(inputs, torch.Generator()).terms
        n_tokens = np.array(inputs.tokens.lengths)
        n_hidden = np.maximum(1, np.rint(0.5 * n_tokens))[n_tokens > 0]
        # every gene alike: one of those that are not visible
        expected = np.log(N_GENES - n_tokens[n_tokens > 0] + n_hidden).mean()
        assert float(terms["identity_nll_floor_t0.5"]) == pytest.approx(expected, rel=1e-5)

    def test_only_empty_cells_score_nothing(self, objective, cells):
        inputs = objective.prepare_heldout(cells.take(np.array([5])), np.random.default_rng(0))
        with torch.inference_mode():
            output = objective(inputs, torch.Generator())
        assert output.n_cells == 0
        assert all(float(value) == 0 for value in output.terms.values())
