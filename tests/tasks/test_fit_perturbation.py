"""Fine-tuning on perturbed cells: what is learned, what the record says, and what is saved."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import files_under
from perturbation_models import native_model, simulated
from perturbed import perturbed_cells, vocabulary
from scdiva.data.perturbation_effects import effects_of
from scdiva.data.perturbations import Perturbation, PerturbedCells
from scdiva.errors import BundleError, ConfigError, OutputError, SourceError, TrainingError, UnsupportedError
from scdiva.models.base import load_model
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.perturbation_base import MeasuredEffect, fit_weights
from scdiva.models.scdiva.perturbation_model import PerturbationModel
from scdiva.models.scdiva.perturbation_network import gene_weights
from scdiva.tasks import fit_perturbation as task
from scdiva.tasks.fit_perturbation import FineTunedPredictor, PerturbationTraining, fit_perturbation

SIMPLE = PerturbationTraining(network=False)
QUICK = PerturbationTraining(max_steps=4, batch_size=16)


@pytest.fixture(scope="module")
def screen():
    return simulated()


@pytest.fixture(scope="module")
def model(screen):
    return native_model(screen.vocabulary, screen.data.cells)


@pytest.fixture(scope="module")
def fitted(screen, model):
    return fit_perturbation(screen.data, model, options=SIMPLE, progress=False)


@pytest.fixture(scope="module")
def with_network(screen, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return fit_perturbation(screen.data, model, options=QUICK, out_dir=folder, progress=False), folder


def without(data: PerturbedCells, names) -> PerturbedCells:
    code = [i for i, p in enumerate(data.perturbations) if p.name in names]
    return data.take(np.flatnonzero(~np.isin(data.perturbation_code, code)))


def control_of(data: PerturbedCells, context: str | None = None):
    rows = data.is_control
    if context is not None:
        rows = rows & (data.context_code == data.contexts.index(context))
    return data.cells.take(np.flatnonzero(rows))


def truth(screen, name: str, context: int = 0):
    """Expected change of mean log1p(CP10K), from the measured cells of the whole set."""
    (found,) = [
        e for e in effects_of(screen.data)
        if e.perturbation.name == name and e.context == screen.data.contexts[context]
    ]  # fmt: skip
    return found.change


# --- what is learned ---


def test_interacting_pairs_are_predicted_better_than_by_their_sum():
    screen = simulated(1, n_pairs=60, n_cells=60)
    held = list(screen.interacting)[::5]
    train = without(screen.data, held)
    found = fit_perturbation(train, native_model(screen.vocabulary, train.cells), options=SIMPLE, progress=False)
    singles = {e.perturbation.name: e.change for e in effects_of(train)}
    ours = sums = 0.0
    for name in held:
        perturbation = Perturbation(tuple(name.split("+")))
        said = found.predict(perturbation, control_of(train), "cells")
        assert said.question == "combination"
        right = truth(screen, name)
        ours += ((said.change - right) ** 2).sum()
        sums += ((sum(singles[target] for target in perturbation.targets) - right) ** 2).sum()
    assert len(held) >= 5
    assert ours < 0.8 * sums


def test_unseen_genes_are_predicted_better_than_by_the_mean():
    screen = simulated(2, n_targets=24, n_pairs=0, n_control=400, n_cells=60)
    names = [p.name for p in screen.data.perturbations[1:]]
    held = names[::4]
    train = without(screen.data, held)
    found = fit_perturbation(train, native_model(screen.vocabulary, train.cells), options=SIMPLE, progress=False)
    mean = np.mean([e.change for e in effects_of(train)], axis=0)
    ours = of_mean = 0.0
    for name in held:
        said = found.predict(Perturbation((name,)), control_of(train), "cells")
        assert said.question == "single"
        ours += ((said.change - truth(screen, name)) ** 2).sum()
        of_mean += ((mean - truth(screen, name)) ** 2).sum()
    assert ours < 0.8 * of_mean


def test_a_context_that_was_never_perturbed_is_predicted_better_than_by_no_change():
    screen = simulated(3, contexts=("a", "b", "c", "d", "e"), n_targets=6, n_pairs=0, n_cells=50, n_control=60)
    data = screen.data
    is_new = (data.context_code == 4) & ~data.is_control
    train = data.take(np.flatnonzero(~is_new))
    found = fit_perturbation(train, native_model(screen.vocabulary, train.cells), options=SIMPLE, progress=False)
    assert found.contexts == ("a", "b", "c", "d", "e")
    assert found.details["fine_tuning"]["left_out"]["context"] == 24
    for name in [p.name for p in data.perturbations[1:]]:
        said = found.predict(Perturbation((name,)), control_of(data, "e"), "e")
        assert said.question == "context"
        right = truth(screen, name, 4)
        assert np.corrcoef(said.change, right)[0, 1] > 0.5
        assert ((said.change - right) ** 2).sum() < 0.8 * (right**2).sum()


def test_what_was_seen_is_repeated_and_its_genes_move(screen, fitted):
    name = screen.data.perturbations[1].name
    said = fitted.predict(Perturbation((name,)), control_of(screen.data), "cells")
    assert said.question == "seen"
    assert np.corrcoef(said.change, truth(screen, name))[0, 1] > 0.98
    gene = screen.vocabulary.symbol.tolist().index(name)
    assert said.change[gene] < -0.3
    assert said.control_mean[gene] > 0
    assert np.array_equal(said.change, said.base)
    assert not said.spread_cells.any()


def test_effects_are_those_that_evaluations_measure(screen, fitted):
    ours = {(e.perturbation, e.context): e for e in fitted.predictor.effects}
    theirs = effects_of(screen.data)
    assert len(ours) == len(theirs)
    for effect in theirs:
        own = ours[effect.perturbation, effect.context]
        assert np.allclose(own.change, effect.change, atol=1e-5)
        assert own.n_cells == effect.n_cells
        assert (own.noise > 0).all()


def test_effects_are_matched_by_batch():
    """Batches that differ a lot, with perturbed cells in one of them only."""
    cells = perturbed_cells(n_cells=40, n_batches=2)
    counts = cells.cells.counts.toarray()
    gene = 7
    counts[cells.batch_code == 1, gene] += 50
    shifted = replace(
        cells.cells, counts=type(cells.cells.counts)(counts), library_size=counts.sum(axis=1).astype(np.float64)
    )
    keep = cells.is_control | (cells.batch_code == 1)
    data = replace(cells, cells=shifted).take(np.flatnonzero(keep))
    found = fit_perturbation(data, native_model(vocabulary(), data.cells), options=SIMPLE, progress=False)
    for effect, own in zip(effects_of(data), found.predictor.effects, strict=True):
        assert np.allclose(effect.change, own.change, atol=1e-5)
    # a batch of perturbed cells without control cells is compared with all control cells of the context
    lone = data.take(np.flatnonzero(~(data.is_control & (data.batch_code == 1))))
    again = fit_perturbation(lone, native_model(vocabulary(), lone.cells), options=SIMPLE, progress=False)
    for effect, own in zip(again.predictor.effects, found.predictor.effects, strict=True):
        assert effect.change[gene] > own.change[gene] + 0.5


def test_the_order_of_cells_does_not_matter(screen, model, fitted):
    rows = np.random.default_rng(0).permutation(screen.data.n_cells)
    other = fit_perturbation(screen.data.take(rows), model, options=SIMPLE, progress=False)
    gene = next(s for s in screen.vocabulary.symbol if s not in screen.pathway)
    first, second = list(screen.pathway)[:2]
    for targets in ((gene,), (first, gene), tuple(sorted((first, second)))):
        asked = Perturbation(tuple(sorted(targets)))
        one, two = (m.predict(asked, control_of(screen.data), "cells").change for m in (fitted, other))
        # the last digits of small components depend on the order, and some trees split elsewhere
        assert np.allclose(one, two, atol=1e-2), targets


def test_the_same_call_gives_the_same_model(screen, model, fitted, with_network):
    again = fit_perturbation(screen.data, model, options=SIMPLE, progress=False)
    asked, control = Perturbation(("TP53",)), control_of(screen.data)
    asked = Perturbation((next(s for s in screen.vocabulary.symbol if s not in screen.pathway),))
    assert np.array_equal(again.predict(asked, control).change, fitted.predict(asked, control).change)
    networks = fit_perturbation(screen.data, model, options=QUICK, progress=False)
    assert networks.weights_hash() == with_network[0].weights_hash()


def test_the_model_that_is_fine_tuned_stays_as_it_is(screen, model, with_network):
    before = model.weights_hash()
    fit_perturbation(screen.data, model, options=QUICK, progress=False)
    assert model.weights_hash() == before
    assert not any(p.grad is not None for p in model.module.parameters())


def test_a_caller_s_inference_mode_does_not_stop_training(screen, model, with_network):
    with torch.inference_mode():
        found = fit_perturbation(screen.data, model, options=QUICK, progress=False)
    assert found.weights_hash() == with_network[0].weights_hash()


# --- the network, its gate and the record ---


def test_the_record_says_what_was_trained(with_network, screen):
    found, _ = with_network
    record = found.details["fine_tuning"]
    assert record["n_cells"] == screen.data.n_cells
    assert record["n_conditions"] == len(found.predictor.effects) == 36
    assert record["left_out"] == {"context": 0, "single": 12, "combination": 24}
    own = record["network_0"]
    assert own["n_conditions"] + own["n_heldout_conditions"] == 36
    assert own["n_heldout_conditions"] == 9
    assert own["n_steps"] == 4
    assert record["gate"] == [own["gate"]] == list(found.gate)
    assert 0.0 <= own["gate"] <= 1.0
    assert ("network" in record) == (own["gate"] == 0.0)


def test_several_networks_have_seeds_of_their_own(screen, model, with_network, tmp_path):
    options = replace(QUICK, n_networks=2)
    found = fit_perturbation(screen.data, model, options=options, out_dir=tmp_path / "run", progress=False)
    first, second = (network.trained() for network in found.networks)
    alone = with_network[0].networks[0].trained()
    assert all(torch.equal(first[name], alone[name]) for name in first)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert len(found.gate) == len(found.details["fine_tuning"]["gate"]) == 2
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["network-0", "network-1"]
    both = with_gates(found, list(found.networks), [1.0, 1.0])
    both.save_pretrained(tmp_path / "bundle")
    same_predictions(both, load_model(tmp_path / "bundle", device="cpu"), screen)


def test_an_interrupted_run_goes_on_to_the_same_end(screen, model, with_network, tmp_path, monkeypatch):
    import scdiva.training as training

    whole = training.fit

    def stopped(*args, config, **kwargs):
        half = config.model_copy(update={"training": config.training.model_copy(update={"max_steps": 2})})
        whole(*args, config=half, **kwargs)
        raise KeyboardInterrupt

    options = replace(QUICK, max_steps=4)
    monkeypatch.setattr(training, "fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit_perturbation(screen.data, model, options=options, out_dir=tmp_path, progress=False)
    monkeypatch.setattr(training, "fit", whole)
    found = fit_perturbation(screen.data, model, options=options, out_dir=tmp_path, progress=False)
    assert found.details["fine_tuning"]["network_0"]["n_steps"] == 4
    assert len(found.networks) == 1


def with_gates(found, networks, gates) -> PerturbationModel:
    return PerturbationModel(
        found.base, found.predictor, found.reader, found.coder, networks, gates, found.expected_error,
        details=found.details,
    )  # fmt: skip


def test_a_network_that_is_not_borne_out_is_not_used(with_network, screen):
    network = copy.deepcopy(with_network[0].networks[0])
    with torch.no_grad():
        network.regressor.out.bias += 0.25
    asked, control = Perturbation((screen.vocabulary.symbol[0],)), control_of(screen.data)
    none, whole, mixed = (
        with_gates(with_network[0], [network] * len(gates), gates).predict(asked, control)
        for gates in ([0.0], [1.0], [1.0, 0.0])
    )
    assert np.array_equal(none.change, none.base)
    added = whole.change - whole.base
    assert 0.1 < added.mean() < 0.4
    assert np.allclose(mixed.change - mixed.base, added / 2, atol=1e-5)
    assert np.allclose(mixed.spread_seeds, np.abs(added) / 2, atol=1e-5)
    assert not whole.spread_seeds.any()
    assert (whole.spread_cells > 0).any()


def test_what_was_measured_or_never_tried_is_not_corrected(with_network, screen):
    network = copy.deepcopy(with_network[0].networks[0])
    with torch.no_grad():
        network.regressor.out.bias += 0.25
    model = with_gates(with_network[0], [network], [1.0])
    name, control = screen.data.perturbations[1].name, control_of(screen.data)
    for context, question in (("cells", "seen"), ("new", "context")):
        found = model.predict(Perturbation((name,)), control, context)
        assert found.question == question
        assert np.array_equal(found.change, found.base)
        # of what was measured there is a standard error
        assert np.isnan(found.error).all() == (question == "context")


def test_too_few_conditions_train_no_network_and_the_record_says_so():
    data = perturbed_cells(n_cells=30)
    found = fit_perturbation(data, native_model(vocabulary(), data.cells), options=QUICK, progress=False)
    record = found.details["fine_tuning"]
    assert not len(found.networks)
    assert "not trained: 5 left-out conditions, 12 are needed" in record["network"]
    assert record["gate"] == []
    off = fit_perturbation(data, native_model(vocabulary(), data.cells), options=SIMPLE, progress=False)
    assert "network" not in off.details["fine_tuning"]


def item(effect, question="context"):
    return task._Item(effect, np.zeros_like(effect.change), np.zeros_like(effect.change), question)


def items(units):
    return [item(MeasuredEffect(Perturbation((what,)), c, np.ones(3), np.ones(3), 20)) for what, c in units]


def test_contexts_are_held_out_whole_and_no_answer_is_on_both_sides():
    left = items([(f"g{i}", c) for c in "abcd" for i in range(4)])
    trained, held = task._held_out(left, 0.25, 0)
    assert {item.effect.context for item, h in zip(left, held, strict=True) if h}.isdisjoint(
        {item.effect.context for item, t in zip(left, trained, strict=True) if t}
    )
    assert held.sum() == 4
    assert trained.sum() == 12
    # the same conditions once more, left out by gene
    again = [replace(item, question="single") for item in left]
    both = [*left, *again]
    for seed in range(5):
        trained, held = task._held_out(both, 0.25, seed)
        answers = [{id(item.effect) for item, c in zip(both, chosen, strict=True) if c} for chosen in (trained, held)]
        assert answers[0].isdisjoint(answers[1])
        assert trained.any()
        assert held.any()
    # with one context nothing remains to learn from
    trained, held = task._held_out(items([(f"g{i}", "a") for i in range(20)]), 0.25, 0)
    assert trained.all()
    assert not held.any()
    trained, held = task._held_out(items([("g0", "a"), ("g1", "b")]), 0.99, 0)
    assert trained.sum() == held.sum() == 1


def test_no_network_is_trained_where_nothing_is_left_to_judge_it_by():
    """One context with enough cells, three with few: all that is left out is of one context."""
    genes = tuple((g,) for g in range(12))
    data = perturbed_cells(
        genes, contexts=("a", "b", "c", "d"), n_cells=20, effects={g: np.full(60, 0.1) for g in range(12)}
    )
    rng = np.random.default_rng(0)
    keep = np.ones(data.n_cells, dtype=bool)
    for c in (1, 2, 3):
        for p in range(1, 13):
            own = np.flatnonzero((data.context_code == c) & (data.perturbation_code == p))
            keep[rng.permutation(own)[3:]] = False
    data = replace(data.take(np.flatnonzero(keep)))
    treated = replace(data, perturbations=tuple(replace(p, kind="treatment") for p in data.perturbations))
    found = fit_perturbation(treated, native_model(vocabulary(), data.cells), options=QUICK, progress=False)
    assert found.details["fine_tuning"]["left_out"]["context"] == 12
    assert "no left-out conditions would remain" in found.details["fine_tuning"]["network"]


def test_a_drug_that_is_left_out_altogether_teaches_the_network_nothing(monkeypatch):
    """Never seen, its vector would be a random one: such conditions are no example of what is asked later."""
    data = perturbed_cells(tuple((g,) for g in range(6)) * 1, n_cells=20)
    data = replace(data, perturbations=tuple(replace(p, kind="treatment") for p in data.perturbations))
    monkeypatch.setattr(task, "MIN_CONDITIONS", 3)
    found = fit_perturbation(data, native_model(vocabulary(), data.cells), options=QUICK, progress=False)
    assert "not trained: 0 left-out conditions" in found.details["fine_tuning"]["network"]


def test_what_is_said_of_left_out_conditions_is_weighed_without_them(screen, model):
    """A predictor that happens to know one condition's answer must not be believed for it."""
    predictor = fit_perturbation(screen.data, model, options=SIMPLE, progress=False).predictor
    problems = predictor.left_out("single")
    own, units = problems[0][2], sorted(effect.perturbation.name for _, _, effect in problems)
    fold = {name: i % 5 for i, name in enumerate(units)}
    rest = [(said, c) for said, c, e in problems if fold[e.perturbation.name] != fold[own.perturbation.name]]
    assert 0 < len(rest) < len(problems)
    known = {**problems[0][0], "mean": own.change}
    expected = fit_weights(rest, tuple(known)).combine(known)
    predictor.left_out = lambda question: [(known, own.change, own), *problems[1:]] if question == "single" else []
    (item,) = [i for i in task._left_out(predictor) if i.effect is own]
    assert np.allclose(item.base, expected)
    assert not np.allclose(item.base, predictor.weights["single"].combine(known))


def test_gates_are_the_best_factor_on_held_out_conditions(monkeypatch):
    left = items([(f"g{i}", "a") for i in range(4)])
    wanted = [np.array([2.0, 0.0, 0.0]), np.array([0.0, 2.0, 0.0])]

    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.scale = 1.0

        def forward(self, inputs):
            return self.scale * inputs

    class Objective:
        weight = np.array([[1.0, 1.0, 1.0]] * 4)

        def prepare(self, cells, rng):
            return torch.tensor(np.stack([wanted[cells % 2]] * 3))

    class Collection:
        def read(self, rows):
            return int(rows[0])

    network = Fixed()
    effects = [replace(i.effect, change=wanted[n % 2]) for n, i in enumerate(left)]
    left = [replace(i, effect=e) for i, e in zip(left, effects, strict=True)]
    is_held, condition = np.array([True, True, False, False]), np.arange(4)
    for scale, gate in ((1.0, 1.0), (2.0, 0.5), (0.25, 1.0), (-1.0, 0.0), (0.0, 0.0)):
        network.scale = scale
        found, explained = task._gate(network, Objective(), Collection(), left, is_held, condition)
        assert found == pytest.approx(gate), scale
        added = gate * scale
        assert explained == pytest.approx(1 - (1 - added) ** 2)


def test_weights_of_genes_are_of_what_sets_a_condition_apart():
    left = items([(f"g{i}", "a") for i in range(5)])
    common = np.array([5.0, 0.0, 0.0])
    changes = [common + (np.array([0, 0, 3.0]) if i == 0 else 0) for i in range(5)]
    left = [replace(i, effect=replace(i.effect, change=c)) for i, c in zip(left, changes, strict=True)]
    found = task._weights(left)
    assert found[0].argmax() == 2
    assert np.allclose(found[0], gene_weights(np.array([0, 0, 3.0]) / np.sqrt(1 + 1e-6)))
    # with too few others to tell, against control
    assert task._weights(left[:2])[0].argmax() == 0


def test_pairs_of_conditions_and_control_cells_are_of_one_context_and_its_batches():
    data = perturbed_cells(((0,), (1,)), contexts=("a", "b"), n_cells=20, n_batches=3)
    perturbed_0 = (data.perturbation_code == 1) & (data.batch_code != 0)
    data = data.take(np.flatnonzero(~perturbed_0))  # the first perturbation is in the first batch only
    asked = [(p, c) for p in (1, 2) for c in "ab"]
    left = [item(MeasuredEffect(data.perturbations[p], c, np.zeros(60), np.ones(60), 20), "single") for p, c in asked]
    condition, row = task._paired(data, left, np.random.default_rng(0))
    assert np.bincount(condition).tolist() == [task._CONTROLS_PER_CONDITION] * 4
    assert data.is_control[row].all()
    assert (np.array(data.contexts)[data.context_code[row]] == np.array(list("abab"))[condition]).all()
    assert set(data.batch_code[row[condition < 2]].tolist()) == {0}
    assert set(data.batch_code[row[condition >= 2]].tolist()) == {0, 1, 2}


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_steps": 0}, "max_steps = 0"),
        ({"n_networks": 0}, "n_networks = 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"patience": 0}, "patience"),
        ({"lr": 0.0}, "lr"),
        ({"heldout_fraction": 1.0}, "heldout_fraction"),
        ({"max_targets": 1}, "max_targets = 1"),
        ({"max_targets": 0}, "max_targets = 0"),
        ({"n_trained_layers": 3}, "3 layers"),
        ({"n_trained_layers": -1}, "-1 layers"),
    ],
)
def test_impossible_options_are_refused(screen, model, options, words):
    with pytest.raises(ConfigError, match=words):
        fit_perturbation(screen.data, model, options=replace(QUICK, **options), progress=False)


def test_data_without_effects_are_refused(screen, model):
    data = screen.data
    with pytest.raises(SourceError, match="0 control cells"):
        fit_perturbation(data.take(np.flatnonzero(~data.is_control)), model, options=SIMPLE)
    with pytest.raises(SourceError, match="no perturbation has cells"):
        fit_perturbation(data.take(np.flatnonzero(data.is_control)), model, options=SIMPLE)
    two = perturbed_cells(contexts=("a", "b"), n_cells=10)
    apart = two.take(np.flatnonzero(two.is_control == (two.context_code == 0)))
    with pytest.raises(SourceError, match="no perturbation has cells"):
        fit_perturbation(apart, native_model(vocabulary(), two.cells), options=SIMPLE)


def test_a_model_without_a_trunk_is_refused(screen):
    plain = native_model(screen.vocabulary, screen.data.cells, has_trunk=False)
    with pytest.raises(UnsupportedError, match="trunk"):
        fit_perturbation(screen.data, plain, options=QUICK, progress=False)


def test_very_little_data_is_enough_to_answer():
    """One perturbation, two cells, one control cell."""
    data = perturbed_cells(((0,),), n_cells=20)
    rows = [*np.flatnonzero(data.is_control)[:1], *np.flatnonzero(~data.is_control)[:2]]
    few = data.take(np.array(rows))
    found = fit_perturbation(few, native_model(vocabulary(), data.cells), options=QUICK, progress=False)
    symbols = vocabulary().symbol
    assert np.isfinite(found.predict(Perturbation((symbols[0],)), control_of(few)).change).all()
    for targets in ((symbols[1],), tuple(sorted(symbols[:2]))):
        with pytest.raises(UnsupportedError, match="1 single perturbation"):
            found.predict(Perturbation(targets), control_of(few))
    assert found.details["metrics"] == {}


# --- resuming ---


def test_the_same_call_resumes_and_another_is_refused(screen, model, with_network):
    found, folder = with_network
    before = files_under(folder)
    again = fit_perturbation(screen.data, model, options=QUICK, out_dir=folder, progress=False)
    assert again.weights_hash() == found.weights_hash()
    assert again.gate == found.gate
    assert files_under(folder) == before
    with pytest.raises(TrainingError):
        fit_perturbation(screen.data, model, options=replace(QUICK, n_trained_layers=2), out_dir=folder, progress=False)
    other = native_model(screen.vocabulary, screen.data.cells)
    with torch.no_grad():
        next(other.module.parameters()).add_(0.1)
    with pytest.raises(TrainingError):
        fit_perturbation(screen.data, other, options=QUICK, out_dir=folder, progress=False)
    some = screen.data.take(np.arange(screen.data.n_cells - 1))
    with pytest.raises(TrainingError):
        fit_perturbation(some, model, options=QUICK, out_dir=folder, progress=False)


# --- save and load ---


def same_predictions(one, two, screen):
    gene = next(s for s in screen.vocabulary.symbol if s not in screen.pathway)
    first = next(iter(screen.pathway))
    for targets in ((first,), (gene,), tuple(sorted((first, gene)))):
        for context in ("cells", "new"):
            a, b = (m.predict(Perturbation(targets), control_of(screen.data), context) for m in (one, two))
            assert a.question == b.question
            for name in ("change", "base", "control_mean", "error", "spread_cells", "spread_seeds"):
                assert np.allclose(getattr(a, name), getattr(b, name), atol=2e-5, equal_nan=True), (targets, name)


@pytest.mark.parametrize("has_network", [False, True])
def test_saved_and_loaded_it_says_the_same(screen, fitted, with_network, tmp_path, has_network):
    found = with_network[0] if has_network else fitted
    if has_network:  # as if held-out conditions had borne it out
        found = with_gates(found, list(found.networks), [0.5])
    found.save_pretrained(tmp_path / "bundle")
    loaded = load_model(tmp_path / "bundle", device="cpu")
    assert isinstance(loaded, PerturbationModel)
    assert len(loaded.networks) == has_network
    assert loaded.gate == found.gate
    assert loaded.perturbations == found.perturbations
    assert loaded.contexts == found.contexts
    assert loaded.details["metrics"] == found.details["metrics"]
    assert loaded.bundle_hash
    assert not found.bundle_hash
    assert loaded.n_parameters == found.n_parameters
    assert loaded.name == "small-perturbation"
    same_predictions(found, loaded, screen)
    # and once more
    loaded.save_pretrained(tmp_path / "again")
    same_predictions(loaded, load_model(tmp_path / "again", device="cpu"), screen)
    with pytest.raises(OutputError, match="exists"):
        found.save_pretrained(tmp_path / "bundle")


def test_the_card_says_how_well_it_went_and_beside_what(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "bundle")
    card = (tmp_path / "bundle" / "README.md").read_text()
    metrics = fitted.details["metrics"]
    assert metrics["left_out_single_pearson_delta"] > metrics["left_out_single_pearson_delta_floor"]
    for name, value in metrics.items():
        assert f"{value:.4f}" in card, name
    assert "sd.tl.perturb" in card
    assert "baseline can be as good" in card
    config = json.loads((tmp_path / "bundle" / "config.json").read_text())
    assert config["family"] == "scdiva-perturbation"
    assert config["fine_tuning"]["left_out"]["single"] == 12


def test_a_damaged_bundle_is_refused(fitted, with_network, tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "bundle"
    with_network[0].save_pretrained(path)

    def rewritten(file: str, change) -> None:
        import hashlib

        change(path / file)
        manifest = json.loads((path / "manifest.json").read_text())
        manifest[file] = hashlib.sha256((path / file).read_bytes()).hexdigest()
        (path / "manifest.json").write_text(json.dumps(manifest))

    # clones: the file is mapped into memory, and is about to be overwritten
    weights = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    broken = dict(weights)
    broken.pop("base.change")
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        PerturbationModel.from_pretrained(path, device="cpu")
    cases = [
        broken,
        {**weights, "base.change": weights["base.change"][:, :-1].contiguous()},
        {**weights, "more": torch.zeros(1)},
        {name: t for name, t in weights.items() if not name.startswith("network.0.tokens")},
    ]
    for case in cases:
        rewritten("model.safetensors", lambda file, case=case: save_file(case, file))
        with pytest.raises(BundleError):
            PerturbationModel.from_pretrained(path, device="cpu")
    rewritten("model.safetensors", lambda file: save_file(weights, file))
    assert PerturbationModel.from_pretrained(path, device="cpu").gate == with_network[0].gate
    with pytest.raises(BundleError, match="family"):
        ScDiVa.from_pretrained(path, device="cpu")
    (path / "codec" / "README.md").write_text("changed")
    with pytest.raises(BundleError, match="codec"):
        PerturbationModel.from_pretrained(path, device="cpu")


def test_nothing_half_written_stays_when_saving_fails(fitted, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(type(fitted.base), "save_pretrained", fails)
    with pytest.raises(RuntimeError, match="disk full"):
        fitted.save_pretrained(tmp_path / "bundle")
    assert not list(tmp_path.iterdir())


# --- as a predictor of evaluations ---


def test_as_evaluations_want_it(screen, model):
    predictor = FineTunedPredictor(model, SIMPLE)
    asked = screen.data.perturbations[1]
    control = screen.data.take(np.flatnonzero(screen.data.is_control))
    with pytest.raises(ConfigError, match="not fitted"):
        predictor.predict(asked, "cells", control)
    found = predictor.fit(screen.data).predict(asked, "cells", control)
    assert found.shape == (screen.vocabulary.n_genes,)
    assert np.isfinite(found).all()
    assert np.corrcoef(found, truth(screen, asked.name))[0, 1] > 0.98


def test_genes_that_training_did_not_measure_are_not_predicted(screen, model):
    is_measured = np.ones((1, 150), dtype=bool)
    is_measured[0, [3, 9]] = False
    cells = screen.data.cells.with_genes(is_measured[0])
    found = fit_perturbation(replace(screen.data, cells=cells), model, options=SIMPLE, progress=False)
    said = found.predict(screen.data.perturbations[1], cells.take(np.flatnonzero(screen.data.is_control)), "cells")
    assert np.flatnonzero(np.isnan(said.change)).tolist() == [3, 9]
    assert np.flatnonzero(np.isnan(said.base)).tolist() == [3, 9]
