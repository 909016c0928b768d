"""The classifier on the native network: what it starts at, what is trained, and how it is judged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from scdiva.config import OptimConfig
from scdiva.data.reader import open_counts
from scdiva.errors import BundleError, ConfigError, UnsupportedError
from scdiva.models.annotators import Calibration, Features, Regression
from scdiva.models.scdiva.classifier import (
    MONITOR,
    CellClassifier,
    ClassifierObjective,
    Design,
    FirstTokenBlock,
    class_weights,
)
from scdiva.models.scdiva.finetuned import Components, FineTuned
from scdiva.nn import Packing, Transformer, init_transformer
from scdiva.nn.transformer import rotary_tables
from scdiva.training.module import parameter_groups
from scdiva.types import CellCounts, LossOutput

FINETUNE, LORA = Design(1, 0, 64), Design(0, 2, 64)
N_CLASSES = 3


@pytest.fixture(scope="module")
def cells(_cells, tiny_trunk_model) -> CellCounts:
    found = open_counts(_cells, tiny_trunk_model.vocabulary).read(np.arange(60))
    return replace(found, cell_index=np.arange(60))


@pytest.fixture(scope="module")
def code(_cells) -> np.ndarray:
    return _cells.obs["cell_type"].cat.codes.to_numpy()[:60].astype(np.int64)


def objective_of(model, code, design: Design, **options) -> ClassifierObjective:
    return ClassifierObjective(CellClassifier(model, N_CLASSES, design), code, np.ones(N_CLASSES), **options)


def trained_steps(objective: ClassifierObjective, cells: CellCounts, n_steps: int) -> list[set[str]]:
    """Take steps without weight decay; which trained weights differ from the start after each."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    start = {name: p.detach().clone() for name, p in objective.named_parameters()}
    parameters = [p for p in objective.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    moved = []
    objective.train()
    for _ in range(n_steps):
        optimiser.zero_grad()
        objective(objective.prepare(cells, rng), generator).loss.backward()
        optimiser.step()
        now = dict(objective.named_parameters())
        moved.append({name for name, before in start.items() if not torch.equal(now[name], before)})
    objective.eval()
    return moved


@pytest.mark.parametrize("has_positions", [False, True])
def test_the_first_token_is_what_the_whole_block_makes_of_it(has_positions):
    transformer = Transformer(n_layers=1, width=16, n_heads=2, n_hidden=24)
    init_transformer(transformer, torch.Generator().manual_seed(1), std=0.3)
    packing = Packing((5, 1, 9))
    x_TD = torch.randn(15, 16, generator=torch.Generator().manual_seed(0))
    position_T = torch.cat([torch.arange(n) for n in packing.lengths])
    rotary = rotary_tables(position_T, 8) if has_positions else None
    whole = transformer.layers[0](x_TD, packing, rotary)
    part = FirstTokenBlock(transformer.layers[0])(x_TD, packing, rotary)
    torch.testing.assert_close(part[packing.starts], whole[packing.starts], rtol=1e-5, atol=1e-5)
    others = sorted(set(range(15)) - set(packing.starts))
    assert torch.equal(part[others], x_TD[others])


@pytest.mark.parametrize("design", [FINETUNE, LORA, Design(0, 0, 64)], ids=["finetune", "lora", "head"])
class TestEveryDesign:
    def test_states_start_at_those_of_the_model(self, design, tiny_trunk_model, cells):
        state, _ = CellClassifier(tiny_trunk_model, N_CLASSES, design).eval().said(cells)
        np.testing.assert_allclose(state, tiny_trunk_model.cell_state(cells), rtol=1e-4, atol=1e-5)

    def test_logits_start_at_the_regression(self, design, tiny_trunk_model, cells):
        classifier = CellClassifier(tiny_trunk_model, N_CLASSES, design).eval()
        rng = np.random.default_rng(0)
        state, flat = classifier.said(cells)
        np.testing.assert_allclose(flat, -np.log(N_CLASSES), rtol=1e-6)
        coef, intercept = rng.normal(size=(state.shape[1], N_CLASSES)), rng.normal(size=N_CLASSES)
        classifier.head.start(coef, intercept)
        logit = state @ coef + intercept
        expected = logit - np.log(np.exp(logit).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(classifier.said(cells)[1], expected, rtol=1e-4, atol=1e-4)

    def test_training_leaves_the_model_and_all_that_is_frozen_alone(self, design, tiny_trunk_model, cells, code):
        before = {name: tensor.clone() for name, tensor in tiny_trunk_model.network.state_dict().items()}
        objective = objective_of(tiny_trunk_model, code, design)
        frozen = {name for name, p in objective.named_parameters() if not p.requires_grad}
        assert any("anchor" in name for name in frozen)
        assert not trained_steps(objective, cells, 2)[-1] & frozen
        assert all(torch.equal(before[name], t) for name, t in tiny_trunk_model.network.state_dict().items())

    def test_other_cells_do_not_matter(self, design, tiny_trunk_model, cells, code):
        objective = objective_of(tiny_trunk_model, code, design)
        trained_steps(objective, cells, 2)
        state, log_p = objective.classifier.said(cells)
        some = np.array([17, 3, 44])
        part_state, part = objective.classifier.said(cells.take(some))
        np.testing.assert_allclose(part_state, state[some], atol=1e-5)
        np.testing.assert_allclose(part, log_p[some], atol=1e-5)

    def test_saved_and_loaded_it_says_the_same(self, design, tiny_trunk_model, cells, code, tmp_path):
        objective = objective_of(tiny_trunk_model, code, design)
        trained_steps(objective, cells, 3)
        width = objective.classifier.head.linear.in_features
        annotator = FineTuned(
            "finetune",
            design,
            objective.classifier.trained(),
            np.random.default_rng(0).normal(size=(N_CLASSES, width)).astype(np.float32),
            np.eye(width, dtype=np.float32),
            Calibration(1.5, np.array([1.0, 2.0]), np.array([3.0, 4.0]), 5.0),
        )
        z = tiny_trunk_model.embed(cells)
        network = annotator.on(tiny_trunk_model).said(cells, z)[0]
        np.testing.assert_array_equal(network, objective.classifier.said(cells)[1])
        if design is LORA:
            features = Features.fit((cells, z), seed=0)
            components = Components.fit(features, cells, z, code, N_CLASSES, np.ones(60))
            annotator = replace(annotator, components=components)
            both = annotator.on(tiny_trunk_model).said(cells, z)[0]
            joint = features.of(cells, z)["joint"]
            own = Regression.fit(joint, code, N_CLASSES, None, 0.03).log_probability(joint)
            np.testing.assert_allclose(both, (network + own) / 2, rtol=1e-4, atol=1e-4)
        np.savez(tmp_path / "a.npz", **annotator.arrays())
        with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
            again = FineTuned.from_arrays(dict(archive), "finetune")
        assert again.design == design
        one, two = (found.on(tiny_trunk_model).calls(cells, z) for found in (annotator, again))
        np.testing.assert_array_equal(one.probability, two.probability)
        np.testing.assert_array_equal(one.novelty, two.novelty)


def test_the_last_layers_are_trained_and_no_others(tiny_trunk_model, cells, code):
    objective = objective_of(tiny_trunk_model, code, FINETUNE)
    trained = set(objective.classifier.trained())
    trunk = "network.trunk.transformer"
    assert {name for name in trunk_names(trained) if ".layers." in name} == {
        name for name, _ in objective.classifier.named_parameters() if name.startswith(f"{trunk}.layers.1.")
    }
    assert f"{trunk}.norm.weight" in trained
    # the head's MLP writes nothing at first: what is below it moves from the second step on
    head = {f"classifier.head.{name}" for name, _ in objective.classifier.head.named_parameters()}
    moved = trained_steps(objective, cells, 3)[-1]
    assert moved == {f"classifier.{name}" for name in trained}
    assert head <= moved


def trunk_names(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith("network.")}


def test_every_adapter_is_trained(tiny_trunk_model, cells, code):
    objective = objective_of(tiny_trunk_model, code, LORA)
    rng = np.random.default_rng(0)
    # a head at zero would give nothing below it a gradient; the task starts it at a regression
    objective.classifier.head.start(rng.normal(size=(24, N_CLASSES)), np.zeros(N_CLASSES))
    adapters = {f"classifier.{name}" for name in trunk_names(set(objective.classifier.trained()))}
    assert len(adapters) == 2 * 4 * 2  # layers, linear layers, tensors
    first, second = trained_steps(objective, cells, 2)
    # B is zero at the start: A has no gradient before B has moved
    assert first & adapters == {name for name in adapters if name.endswith(".up")}
    assert second & adapters == adapters


def test_learning_rates(tiny_trunk_model, code):
    objective = objective_of(tiny_trunk_model, code, FINETUNE, trunk_ratio=0.1)
    groups = parameter_groups(objective, 0.01, lr=1e-3)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert len(rate) == len(named)
    for name, parameter in named.items():
        assert rate[id(parameter)] == pytest.approx(1e-3 if ".head." in name else 1e-4), name
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(named["classifier.head.linear.weight"])] == 0.01
    assert decay[id(named["classifier.head.linear.bias"])] == 0.0
    assert OptimConfig().lr not in rate.values()


class TestJudgement:
    def judged(self, truth, logit) -> dict[str, float]:
        """What the loop makes of held-out minibatches of unequal size."""
        objective = object.__new__(ClassifierObjective)
        torch.nn.Module.__init__(objective)
        objective.register_buffer("class_weight", torch.ones(logit.shape[1]))
        objective.classifier = lambda cells: (None, torch.from_numpy(logit[cells.rows]).float())
        objective.eval()
        totals: dict[str, float] = {}
        for rows in np.split(np.arange(truth.size), [7, 20]):
            output = ClassifierObjective.forward(objective, FakeInputs(FakeCells(rows), truth), torch.Generator())
            assert isinstance(output, LossOutput)
            for name, value in {"loss": output.loss, **output.terms}.items():
                totals[name] = totals.get(name, 0.0) + float(value) * rows.size / truth.size
        return objective.heldout_summary(totals)

    def test_macro_f1_is_exact_whatever_the_minibatches(self):
        rng = np.random.default_rng(0)
        truth = rng.choice([0, 1, 2, 4], 50, p=[0.6, 0.3, 0.06, 0.04])  # no cell of class 3
        logit = rng.normal(size=(50, 5)) + 1.2 * np.eye(5)[truth]
        found = self.judged(truth, logit)
        called = logit.argmax(axis=1)
        assert (called == 3).any()
        assert found["macro_f1"] == pytest.approx(f1_score(truth, called, labels=np.unique(truth), average="macro"))
        assert found["accuracy"] == pytest.approx((called == truth).mean())
        assert set(found) == {"loss", "nll", "accuracy", "macro_f1", MONITOR}

    def test_the_likelihood_breaks_ties_and_nothing_more(self):
        truth = np.arange(40) % 2
        sure, unsure, wrong = 4.0 * np.eye(2)[truth], 0.5 * np.eye(2)[truth], 4.0 * np.eye(2)[truth]
        wrong[0] = wrong[0, ::-1]
        one, two, three = (self.judged(truth, logit)[MONITOR] for logit in (sure, unsure, wrong))
        assert one < two < three


class FakeCells:
    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.n_cells = rows, rows.size


class FakeInputs:
    def __init__(self, cells: FakeCells, truth: np.ndarray) -> None:
        self.cells, self.code_B = cells, torch.from_numpy(truth[cells.rows])


def test_training_terms_are_few(tiny_trunk_model, cells, code):
    objective = objective_of(tiny_trunk_model, code, FINETUNE)
    inputs = objective.prepare(cells, np.random.default_rng(0))
    objective.train()
    assert set(objective(inputs, torch.Generator()).terms) == {"nll", "accuracy"}


def test_weights_of_classes():
    code = np.repeat([0, 1, 2], [90, 9, 1])
    np.testing.assert_array_equal(class_weights(code, 3, is_balanced=False), 1.0)
    weight = class_weights(code, 3, is_balanced=True)
    assert weight[code].mean() == pytest.approx(1.0)
    assert weight[1] / weight[0] == pytest.approx(10**0.5)
    assert weight[2] / weight[1] == pytest.approx(3.0)


class TestWhatCannotBe:
    def test_a_model_without_a_trunk(self, tiny_model):
        with pytest.raises(UnsupportedError, match="no trunk"):
            CellClassifier(tiny_model, N_CLASSES, FINETUNE)

    @pytest.mark.parametrize(
        ("design", "words"),
        [(Design(3, 0, 64), "3 layers"), (Design(0, 99, 64), "rank 99"), (Design(1, 0, 0), "max_tokens")],
    )
    def test_an_impossible_design(self, design, words, tiny_trunk_model):
        with pytest.raises(ConfigError, match=words):
            CellClassifier(tiny_trunk_model, N_CLASSES, design)

    def test_weights_that_do_not_fit(self, tiny_trunk_model):
        weights = CellClassifier(tiny_trunk_model, N_CLASSES, FINETUNE).trained()
        other = CellClassifier(tiny_trunk_model, N_CLASSES, LORA)
        with pytest.raises(BundleError, match="do not fit"):
            other.load_trained(weights)
        more = CellClassifier(tiny_trunk_model, N_CLASSES + 1, FINETUNE)
        with pytest.raises(BundleError, match=r"head\.linear"):
            more.load_trained(weights)
