"""The masked diffusion told what was done: training, drawing, and agreement with a predicted mean."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from scdiva.config import NativeObjectiveConfig
from scdiva.data.perturbations import Perturbation
from scdiva.data.reader import open_counts
from scdiva.data.shifting import mean_log1p
from scdiva.diffusion.samplers import Sampler
from scdiva.errors import ConfigError, UnsupportedError
from scdiva.models.scdiva.objectives import HELDOUT_TIMES, DenoisedCells, NativeObjective, tokeniser_of
from scdiva.models.scdiva.perturbation_tokens import PerturbationCoder
from scdiva.models.scdiva.perturbed_cells import (
    PerturbationDenoising,
    PerturbedNetwork,
    ToldCells,
    draw_perturbed,
    untold,
)
from scdiva.types import CellCounts


@pytest.fixture(scope="module")
def control(_cells, tiny_trunk_model) -> CellCounts:
    return open_counts(_cells, tiny_trunk_model.vocabulary).read(np.arange(_cells.n_obs))


@pytest.fixture(scope="module")
def rising(tiny_trunk_model, control) -> dict[int, np.ndarray]:
    """Genes that each of two perturbations raises: genes that go together, as programmes do.

    What the trunk says of hidden genes goes through their embeddings, of 8 dimensions here.
    """
    embedding = tiny_trunk_model.network.anchor.gene_embedding.detach().numpy()[:, 1]
    order = np.argsort(np.where(control.is_measured[0], embedding, 0.0))
    return {1: order[:20], 2: order[-20:]}


@pytest.fixture(scope="module")
def cells(control, rising) -> CellCounts:
    """Control cells, cells of perturbation 1, and cells of perturbation 2."""
    rng = np.random.default_rng(0)
    parts = [control.counts]
    for genes in rising.values():
        extra = np.zeros(control.counts.shape, dtype=np.int32)
        extra[:, genes] = rng.poisson(3.0, (control.n_cells, genes.size))
        parts.append(sp.csr_matrix(control.counts + sp.csr_matrix(extra), dtype=np.int32))
    counts = sp.csr_matrix(sp.vstack(parts, format="csr"))
    counts.sort_indices()
    return CellCounts(
        counts,
        np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(),
        np.arange(counts.shape[0]),
        np.zeros(counts.shape[0], dtype=np.int32),
        control.is_measured,
        np.tile(control.condition, (3, 1)),
    )


@pytest.fixture(scope="module")
def codes(tiny_trunk_model):
    """Control, a gene of the vocabulary, and a drug."""
    vocabulary = tiny_trunk_model.vocabulary
    coder = PerturbationCoder(vocabulary, ("drug",), 2)
    gene = str(vocabulary.symbol[20])
    return coder.codes([Perturbation(()), Perturbation((gene,), "activation"), Perturbation(("drug",), "treatment")])


def of_cells(codes, cells):
    return codes.take(torch.arange(3).repeat_interleave(cells.n_cells // 3))


def objective_of(model, codes, cells, **options) -> PerturbationDenoising:
    return PerturbationDenoising(model, of_cells(codes, cells), n_names=1, **options)


def train(objective, cells, n_steps: int, lr: float = 0.01) -> list[float]:
    optimiser = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=lr)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    losses = []
    objective.train()
    for _ in range(n_steps):
        optimiser.zero_grad()
        said = objective(objective.prepare(cells.take(rng.permutation(cells.n_cells)[:48]), rng), generator)
        said.loss.backward()
        optimiser.step()
        losses.append(float(said.loss.detach()))
    objective.eval()
    return losses


@pytest.fixture(scope="module")
def trained(tiny_trunk_model, codes, cells) -> PerturbationDenoising:
    # much of the time z is the learned null: nothing but the tokens tells what was done
    config = NativeObjectiveConfig(p_split=0.2, p_visible=0.2, p_whole=0.1)
    objective = objective_of(tiny_trunk_model, codes, cells, config=config)
    train(objective, cells, 120, lr=0.02)
    objective.calibrate(cells, np.random.default_rng(0))
    return objective


@pytest.fixture(scope="module")
def draw(trained, tiny_trunk_model, codes, control):
    tokeniser = tokeniser_of(tiny_trunk_model.config, tiny_trunk_model.statistics)

    def drawn(row: int, change, n_cells=70, cells=control, **options):
        options = {"sampler": Sampler(n_steps=3), "n_pilot": 120, "redrawn": "changed", "hidden_share": 1.0, **options}
        one = codes.take(torch.tensor([row]))
        return draw_perturbed(trained.network, tokeniser, one, cells, change, n_cells=n_cells, **options)

    return drawn


@pytest.fixture(scope="module")
def change(cells, control) -> np.ndarray:
    """The true change of perturbation 1."""
    rows = slice(control.n_cells, 2 * control.n_cells)
    of = mean_log1p(cells.counts[rows], cells.library_size[rows]) - mean_log1p(control.counts, control.library_size)
    return np.where(control.is_measured[0], of, np.nan).astype(np.float32)


class TestObjective:
    def test_a_copy_is_trained_and_it_starts_at_the_model(self, tiny_trunk_model, codes, cells):
        objective = objective_of(tiny_trunk_model, codes, cells)
        before = {k: v.clone() for k, v in tiny_trunk_model.network.state_dict().items()}
        own = objective.network.state_dict()
        assert all(torch.equal(own[name], value) for name, value in before.items())
        train(objective, cells, 2)
        after = tiny_trunk_model.network.state_dict()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not torch.equal(objective.network.null_latent, after["null_latent"])
        assert torch.equal(objective.network.anchor.gene_embedding, after["anchor.gene_embedding"])

    def test_masks_and_views_are_those_of_the_native_objective(self, tiny_trunk_model, codes, cells):
        """So is its guarantee: nothing that is scored reaches the network but totals."""
        objective = objective_of(tiny_trunk_model, codes, cells)
        ours = objective.prepare(cells, np.random.default_rng(3))
        theirs = NativeObjective.prepare(objective, cells, np.random.default_rng(3))
        assert isinstance(ours, DenoisedCells)
        assert isinstance(ours.cells, ToldCells)
        for name in ("gene_N", "value_N", "n_hidden_B", "is_admissible_BG", "depth_B"):
            assert torch.equal(getattr(ours.cells, name), getattr(theirs.cells, name))
        assert torch.equal(ours.cells.anchor.value_N, theirs.cells.anchor.value_N)
        assert torch.equal(ours.targets.gene_M, theirs.targets.gene_M)

    def test_codes_are_those_of_the_cells_whatever_they_hide(self, tiny_trunk_model, codes, cells):
        """The one thing that is read beside a native cell is no function of its counts."""
        objective = objective_of(tiny_trunk_model, codes, cells, dropout=0.0)
        rows = np.array([130, 0, 250])
        others = cells.take(np.array([0, 250, 130]))
        one = objective.prepare(cells.take(rows), np.random.default_rng(5)).cells.codes
        other = objective.prepare(replace(others, cell_index=rows), np.random.default_rng(5)).cells.codes
        assert torch.equal(one.what_BK, other.what_BK)
        assert torch.equal(one.what_BK, objective.codes.what_BK[torch.from_numpy(rows)])

    def test_a_share_of_the_cells_is_not_told(self, tiny_trunk_model, codes, cells):
        objective = objective_of(tiny_trunk_model, codes, cells, dropout=0.3)
        many = cells.take(np.arange(1200) % cells.n_cells)
        told = objective.prepare(many, np.random.default_rng(0)).cells.codes.what_BK[:, 0] > 0
        assert abs(float(told.float().mean()) - 0.7) < 0.05
        heldout = objective.prepare_heldout(cells, np.random.default_rng(0))
        assert len(heldout.at) == len(HELDOUT_TIMES)
        assert all(torch.equal(at.cells.codes.what_BK, objective.codes.what_BK) for at in heldout.at)

    def test_preparation_is_seeded_and_moves(self, tiny_trunk_model, codes, cells):
        objective = objective_of(tiny_trunk_model, codes, cells)
        one, again = (objective.prepare(cells, np.random.default_rng(1)) for _ in range(2))
        assert torch.equal(one.cells.codes.what_BK, again.cells.codes.what_BK)
        assert isinstance(one.to(torch.device("cpu")).cells, ToldCells)

    def test_training_beats_the_start_and_knows_what_was_done(self, tiny_trunk_model, codes, cells, trained):
        def loss(objective, codes=None) -> float:
            inputs = objective.prepare_heldout(cells, np.random.default_rng(0))
            if codes is not None:
                inputs = replace(inputs, at=tuple(replace(a, cells=replace(a.cells, codes=codes)) for a in inputs.at))
            with torch.no_grad():
                said = objective(inputs, torch.Generator())
            assert not any(name.endswith("_floor") for name in said.terms)
            return float(said.terms["identity_nll_t0.9"])

        start = loss(objective_of(tiny_trunk_model, codes, cells).eval())
        wrong = loss(trained, codes.take(torch.tensor([0, 2, 1]).repeat_interleave(cells.n_cells // 3)))
        nobody = loss(trained, untold(of_cells(codes, cells), torch.zeros(cells.n_cells, dtype=torch.bool)))
        right = loss(trained)
        assert right < start - 0.015
        assert right < nobody - 0.003
        assert nobody < wrong

    def test_last_layers_alone(self, tiny_trunk_model, codes, cells):
        objective = objective_of(tiny_trunk_model, codes, cells, trained="last", n_layers=1)
        names = {name for name, p in objective.network.named_parameters() if p.requires_grad}
        assert any(name.startswith("trunk.transformer.layers.1.") for name in names)
        assert not any(name.startswith(("trunk.transformer.layers.0.", "anchor.encoder")) for name in names)
        assert {"identity_offset", "value_offset", "log_theta", "tokens.control"} <= names
        assert "anchor.gene_embedding" not in names
        losses = train(objective, cells, 20)
        assert np.mean(losses[-5:]) < np.mean(losses[:5])

    @pytest.mark.parametrize("options", [{"trained": "last", "n_layers": 3}, {"dropout": 1.0}])
    def test_impossible_settings(self, options, tiny_trunk_model, codes, cells):
        with pytest.raises(ConfigError):
            objective_of(tiny_trunk_model, codes, cells, **options)

    def test_a_model_without_a_trunk(self, tiny_model):
        with pytest.raises(UnsupportedError, match="no trunk"):
            PerturbedNetwork.of(tiny_model, 0)

    def test_the_token_is_needed(self, trained, cells):
        inputs = NativeObjective.prepare(trained, cells.take(np.arange(4)), np.random.default_rng(0))
        with pytest.raises(TypeError, match="ToldCells"):
            trained.network(inputs.cells)


class TestDrawing:
    @pytest.mark.parametrize("redrawn", ["changed", "rising", "all"])
    def test_integer_counts_of_measured_genes(self, redrawn, draw, change, control):
        found = draw(1, change, redrawn=redrawn, n_rounds=1)
        counts = found.cells.counts
        assert counts.shape == (70, control.n_genes)
        assert counts.dtype == np.int32
        assert (counts.data > 0).all()
        assert counts.has_sorted_indices
        is_measured = control.is_measured[0]
        assert not is_measured.all()
        assert counts[:, ~is_measured].nnz == 0
        assert not found.is_redrawn_G[~is_measured].any()
        assert set(found.cells.cell_index) <= set(control.cell_index)

    def test_equal_seeds_give_equal_cells(self, draw, change):
        one, again, other = (draw(1, change, seed=seed, n_rounds=1, spread=0.3).cells.counts for seed in (1, 1, 2))
        assert (one != again).nnz == 0
        assert (one != other).nnz > 0

    def test_whole_groups_do_not_depend_on_what_follows(self, draw, change):
        """Cells are moved and drawn 64 at a time with one random stream each."""
        few, many = (draw(1, change, n_cells=n, n_rounds=0) for n in (64, 100))
        assert np.array_equal(few.cells.cell_index, many.cells.cell_index[:64])
        assert (few.cells.counts != many.cells.counts[:64]).nnz == 0

    def test_what_does_not_change_stays_as_in_the_control_cell(self, draw, control):
        change = np.zeros(control.n_genes)
        change[30] = 0.8
        found = draw(1, change, n_rounds=0)
        assert found.is_redrawn_G.sum() == 1
        start = control.counts[found.cells.cell_index]
        others = np.arange(control.n_genes) != 30
        # other genes gain the few molecules that make up for larger libraries
        assert abs(found.cells.counts[:, others] - start[:, others]).sum() < 0.02 * start.sum()

    def test_no_change_gives_control_cells(self, draw, control):
        found = draw(0, np.zeros(control.n_genes))
        assert not found.is_redrawn_G.any()
        assert (found.cells.counts != control.counts[found.cells.cell_index]).nnz == 0

    @pytest.mark.parametrize("redrawn", ["changed", "all"])
    def test_the_mean_agrees_with_the_prediction(self, redrawn, draw, change, control):
        found = draw(1, change, n_cells=240, redrawn=redrawn)
        genes = found.is_redrawn_G & (found.target_G > 0.3)
        error = np.abs(mean_log1p(found.cells.counts, found.cells.library_size) - found.target_G)[genes]
        before = np.abs(mean_log1p(control.counts, control.library_size) - found.target_G)[genes]
        assert genes.sum() > 15
        assert error.mean() < 0.15
        assert error.mean() < before.mean() / 2

    def test_pilot_rounds_bring_the_mean_nearer_to_a_prediction_the_network_does_not_share(self, draw, change):
        """It is told perturbation 2, whose genes are others, and the prediction is that of 1."""

        def error(n_rounds: int) -> float:
            found = draw(2, change, n_cells=240, n_rounds=n_rounds)
            means = mean_log1p(found.cells.counts, found.cells.library_size)
            return float(np.abs(means - found.target_G)[found.is_redrawn_G].mean())

        assert error(3) < 0.6 * error(0)

    def test_what_was_done_matters(self, draw, control, rising):
        """With no change predicted and everything drawn, the tokens alone tell the cells apart."""
        nothing = np.zeros(control.n_genes)
        found = [draw(row, nothing, redrawn="all", n_rounds=0, n_cells=128).cells for row in (1, 2)]
        means = [mean_log1p(cells.counts, cells.library_size) for cells in found]
        difference = means[0] - means[1]
        assert difference[rising[1]].mean() > 0.1
        assert difference[rising[2]].mean() < -0.1

    def test_the_spread_of_the_response_stays(self, draw, change):
        """Half of what rises is drawn again: the other half tells how strongly a cell responds."""

        def strength_varies(spread: float) -> float:
            found = draw(1, change, n_cells=192, redrawn="rising", hidden_share=0.5, spread=spread)
            gained = found.cells.counts[:, found.is_redrawn_G].sum(axis=1)
            return float(np.std(np.asarray(gained).ravel() / found.cells.library_size))

        assert strength_varies(0.6) > 1.3 * strength_varies(0.0)

    def test_guidance_pushes_further(self, draw, control, rising):
        nothing = np.zeros(control.n_genes)

        def difference(guidance: float) -> float:
            options = {"redrawn": "all", "n_rounds": 0, "n_cells": 192, "guidance": guidance}
            cells = [draw(row, nothing, **options).cells for row in (1, 2)]
            means = [mean_log1p(x.counts, x.library_size) for x in cells]
            return float((means[0] - means[1])[rising[1]].mean() - (means[0] - means[1])[rising[2]].mean())

        assert difference(3.0) > difference(1.0) + 0.05

    def test_what_is_outside_the_genes_stays_in_the_library(self, draw, change, control):
        wider = replace(control, library_size=control.library_size + 500)
        found = draw(1, change, cells=wider, n_rounds=0).cells

        def outside(cells):
            return cells.library_size - np.asarray(cells.counts.sum(axis=1)).ravel()

        np.testing.assert_allclose(outside(found), outside(wider)[found.cell_index])

    def test_half_of_what_changes_can_be_kept(self, draw, change):
        whole, half = (draw(1, change, n_rounds=0, hidden_share=share).cells.counts for share in (1.0, 0.5))
        moved = draw(1, change, n_rounds=0, hidden_share=0.0).cells.counts
        assert 0 < abs(half - moved).sum() < 0.75 * abs(whole - moved).sum()

    @pytest.mark.parametrize(
        "options",
        [{"n_cells": 0}, {"n_rounds": -1}, {"seed": -1}, {"n_pilot": 0}, {"hidden_share": 1.5}, {"spread": -0.1}],
    )
    def test_impossible_numbers(self, options, draw, change):
        with pytest.raises(ConfigError):
            draw(1, change, **options)

    def test_one_perturbation_at_a_time(self, trained, tiny_trunk_model, codes, control, change):
        tokeniser = tokeniser_of(tiny_trunk_model.config, tiny_trunk_model.statistics)
        with pytest.raises(ConfigError, match="codes of 3"):
            draw_perturbed(trained.network, tokeniser, codes, control, change, n_cells=1)
