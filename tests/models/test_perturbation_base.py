"""Simple predictors of perturbations against formulas written out, and what they know of a left-out condition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.data.perturbations import Perturbation
from scdiva.models.scdiva import perturbation_base as base
from scdiva.models.scdiva.perturbation_base import (
    BasePredictor,
    ContextState,
    MeasuredEffect,
    TargetFeatures,
    at_own_level,
    fit_weights,
    kernel_ridge,
    shrunk,
)

G = 30
RNG = np.random.default_rng(0)
EMBEDDING = RNG.normal(size=(G, 5))
TARGETS = TargetFeatures({f"g{i}": i for i in range(G)}, EMBEDDING, {"g0": [0, 2], "g1": [2]}, 3)


def state(seed: int = 0, n_cells: int = 50) -> ContextState:
    rng = np.random.default_rng([7, seed])
    values = rng.gamma(1.0, 1.0, (n_cells, G)) * (rng.random((n_cells, G)) < 0.7)
    mean, variance = values.mean(axis=0), values.var(axis=0)
    return ContextState(mean, variance, rng.normal(size=3), rng.normal(size=2), n_cells, sp.csr_matrix(values))


def effect(name: str, context: str = "a", *, change=None, n_cells: int = 40, dose=None, kind="knockout"):
    seed = [ord(c) for c in name + context] + ([] if dose is None else [int(dose)])
    rng = np.random.default_rng(seed)
    return MeasuredEffect(
        Perturbation(tuple(sorted(name.split("+"))), kind, dose),
        context,
        rng.normal(size=G) if change is None else change,
        rng.uniform(0.01, 0.1, G),
        n_cells,
    )


def predictor(effects, contexts=("a",), *, n_control: int = 50) -> BasePredictor:
    states = {name: state(ord(name), n_control) for name in contexts}
    loadings = np.random.default_rng(1).normal(size=(G, 4))
    loadings[5] = 0.0
    spread = np.full(G, 0.5)
    return BasePredictor(tuple(effects), states, TARGETS, {f"g{i}": i for i in range(G)}, spread, loadings)


def ask(name: str, dose=None, kind="knockout") -> Perturbation:
    return Perturbation(tuple(sorted(name.split("+"))), kind, dose)


# --- formulas ---


def explicit_ridge(features, changes, precision, query, penalty):
    """Weighted least squares on weighted-centred features with the penalty in units of their mean square."""
    weight = precision / precision.mean()
    centre, mean = (np.average(x, axis=0, weights=precision) for x in (features, changes))
    x = features - centre
    scale = np.average((x**2).sum(axis=1), weights=precision)
    gram = x.T @ (weight[:, None] * x) + penalty * scale * np.eye(x.shape[1])
    coefficient = np.linalg.solve(gram, x.T @ (weight[:, None] * (changes - mean)))
    return mean + (query - centre) @ coefficient


@pytest.mark.parametrize("penalty", [0.1, 3.0])
def test_kernel_ridge_is_weighted_ridge_regression(penalty):
    rng = np.random.default_rng(3)
    effects = [effect(f"g{i}") for i in range(6)]
    features, query, precision = rng.normal(size=(6, 4)), rng.normal(size=4), rng.uniform(2, 30, 6)
    expected = explicit_ridge(features, np.stack([e.change for e in effects]), precision, query, penalty)
    assert np.allclose(kernel_ridge(features, effects, precision, query, penalty), expected)


def test_kernel_ridge_without_differences_between_features_is_the_weighted_mean():
    effects, precision = [effect(f"g{i}") for i in range(3)], np.array([1.0, 2.0, 5.0])
    mean = np.average([e.change for e in effects], axis=0, weights=precision)
    assert np.allclose(kernel_ridge(np.ones((3, 2)), effects, precision, np.full(2, 9.0), 1.0), mean)
    # and so it is with a large penalty
    features = RNG.normal(size=(3, 2))
    assert np.allclose(kernel_ridge(features, effects, precision, np.ones(2), 1e9), mean, atol=1e-6)


def test_shrunk_keeps_what_is_large_and_takes_what_is_noise():
    change, noise = np.array([3.0, -3.0, 0.1, 0.0, 1.0]), np.array([0.01, 0.01, 1.0, 0.0, 1.0])
    found = shrunk(change, noise)
    assert found == pytest.approx([3 * 9 / 9.01, -3 * 9 / 9.01, 0.001 / 1.01, 0.0, 0.5])
    assert np.array_equal(shrunk(change, np.zeros(5)), change)


def test_at_own_level_moves_induced_genes_towards_a_common_end_and_scales_reduced_ones():
    change, level, own = np.array([1.0, 1.0, -1.0, -1.0]), np.full(4, 1.0), np.array([2.0, 1.0, 2.0, 0.0])
    up = 1.0 + 0.3 * (1 / 2.05) * (1.0 - 2.0)
    expected = [up, 1.0, -((2.05 / 1.05) ** 0.3), -(0.3**0.3)]
    assert at_own_level(change, level, own) == pytest.approx(expected)


def test_response_is_the_covariance_with_a_score_without_a_gene_s_own_part():
    cells = state(n_cells=200)
    assert cells.values is not None
    force = np.random.default_rng(2).normal(size=G)
    dense = cells.values.toarray()
    covariance = np.cov(dense.T, bias=True)
    spread = np.sqrt(force @ covariance @ force)
    slope = np.array([sum(covariance[i, j] * force[j] for j in range(G) if j != i) for i in range(G)]) / spread
    assert np.allclose(cells.response(force), shrunk(slope, 3 * cells.variance / 200))
    assert not cells.response(np.zeros(G)).any()
    assert not replace(cells, values=None).response(force).any()
    assert not state(n_cells=base.MIN_CELLS - 1).response(force).any()


def test_precision_is_that_of_both_groups_of_cells():
    known = predictor([effect("g0", n_cells=25)], n_control=100)
    assert known.effects[0].precision(known.states) == pytest.approx(1 / (1 / 25 + 1 / 100))


# --- weights ---


def problems(n: int, noise: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        truth = rng.standard_t(3, size=200)
        said = {"right": truth + 0.1 * rng.normal(size=200), "wrong": rng.normal(size=200)}
        found.append((said, truth + noise * rng.normal(size=200)))
    return found


def test_weights_prefer_the_right_predictor_and_are_not_negative():
    found = fit_weights(problems(8, 0.1), ("right", "wrong"))
    assert found.n_problems == 8
    assert found.weight.shape == (3, 2)
    assert (found.weight >= 0).all()
    assert (found.weight[:, 0] > 0.8).all()
    assert (found.weight[:2, 1] < 0.3).all()  # where both say much there are few genes, and equal weights pull
    said, truth = problems(1, 0.0, seed=9)[0]
    assert np.mean((found.combine(said) - truth) ** 2) < 0.3 * np.mean(
        (0.5 * (said["right"] + said["wrong"]) - truth) ** 2
    )


def test_weights_minimise_what_they_say_they_do():
    """Against a general solver of the penalised problem in one bin."""
    from scipy.optimize import minimize

    some = problems(4, 0.5, seed=3)
    found = fit_weights(some, ("right", "wrong"))
    x = np.concatenate([np.stack([said["right"], said["wrong"]], axis=1) for said, _ in some])
    y = np.concatenate([truth for _, truth in some])
    rows = np.searchsorted(found.limits, np.abs(x.mean(axis=1))) == 1
    ridge = base.EQUAL_WEIGHT * np.trace(x[rows].T @ x[rows]) / 2

    def loss(w):
        return ((x[rows] @ w - y[rows]) ** 2).sum() + ridge * ((w - 0.5) ** 2).sum()

    best = minimize(loss, [0.5, 0.5], bounds=[(0, None)] * 2, tol=1e-12)
    assert found.weight[1] == pytest.approx(best.x, abs=1e-4)


def test_weights_are_equal_with_too_few_problems_and_combine_takes_the_mean():
    found = fit_weights(problems(base.MIN_LEFT_OUT - 1, 0.1), ("right", "wrong"))
    assert found.n_problems == 0
    said = problems(1, 0.0)[0][0]
    assert np.allclose(found.combine(said), 0.5 * (said["right"] + said["wrong"]))


def test_combine_weighs_small_and_large_predictions_by_their_own_weights():
    weights = base.Weights(("x", "y"), np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1.0]), 5)
    said = {"x": np.array([0.1, 3.0]), "y": np.array([0.3, 5.0])}
    assert np.allclose(weights.combine(said), [0.1, 5.0])


# --- questions ---


def test_questions_are_told_apart():
    known = predictor(
        [effect("g0"), effect("g1"), effect("g0+g1"), effect("g2", "b"), effect("drug", dose=1.0, kind="treatment")],
        ("a", "b"),
    )
    for name, context, question in (
        ("g0", "a", "seen"),
        ("g0", "b", "context"),
        ("g2", "a", "context"),
        ("g0+g1", "a", "seen"),
        ("g0+g1", "b", "context"),
        ("g3", "a", "single"),
        ("g0+g2", "a", "combination"),
        ("g0+g9", "a", "combination"),
        ("g8+g9", "a", "combination"),
        ("g0", "never", "context"),
    ):
        assert known.question(ask(name), context) == question, (name, context)
    # of another kind nothing was seen; of another dose, something was
    assert known.question(ask("g0", kind="activation"), "a") == "single"
    assert known.question(ask("drug", 1.0, "treatment"), "a") == "seen"
    assert known.question(ask("drug", 9.0, "treatment"), "a") == "seen"
    assert known.question(ask("drug", 9.0, "treatment"), "b") == "context"


def test_a_dose_that_was_measured_is_not_mixed_with_others():
    low, high = effect("drug", dose=1.0, kind="treatment"), effect("drug", dose=9.0, kind="treatment")
    known = predictor([low, high])
    assert np.allclose(known.said(low.perturbation, "a", known.states["a"])["measured"], low.change)
    between = known.said(ask("drug", 3.0, "treatment"), "a", known.states["a"])
    assert np.allclose(between["measured"], (low.change + high.change) / 2)
    assert np.allclose(
        between["measured, noise shrunk"], shrunk((low.change + high.change) / 2, (low.noise + high.noise) / 4)
    )


# --- predictors of each question ---


def test_what_was_seen_is_repeated():
    known = predictor([effect("g0"), effect("g0", "b")], ("a", "b"))
    said = known.said(ask("g0"), "a", known.states["a"])
    own = known.effects[0]
    assert np.array_equal(said["measured"], own.change)
    assert np.allclose(known.predict(ask("g0"), "a"), (own.change + shrunk(own.change, own.noise)) / 2)


def test_predictors_of_a_context():
    contexts = ("a", "b", "c", "d")
    known = predictor([effect("g0", c, n_cells=20 + 10 * i) for i, c in enumerate("abc")], contexts)
    new = known.states["d"]
    same = known.effects
    said = known.said(ask("g0"), "d", new)
    precision = np.array([e.precision(known.states) for e in same])
    changes = np.stack([e.change for e in same])
    for name in ("components", "z"):
        features = np.stack([getattr(known.states[c], name) for c in "abc"])
        for penalty in base.PENALTIES:
            expected = explicit_ridge(features, changes, precision, getattr(new, name), penalty)
            assert np.allclose(said[f"ridge on {name}, {penalty:g}"], expected)
        usual = explicit_ridge(features, changes, precision, getattr(new, name), 1.0)
        means = np.stack([known.states[c].mean for c in "abc"])
        level = np.maximum(explicit_ridge(features, means, precision, getattr(new, name), 1.0), 0)
        assert np.allclose(said[f"ridge on {name}, own level"], at_own_level(usual, level, new.mean))
    distance = [((known.states[c].components - new.components) ** 2).sum() for c in "abc"]
    assert np.array_equal(said["nearest"], changes[int(np.argmin(distance))])
    middle = said["ridge on components, 1"]
    noise = np.mean([e.noise for e in same], axis=0) / 3
    assert np.allclose(said["ridge, noise shrunk"], shrunk(middle, 4 * noise))
    assert np.allclose(said["ridge with linear response"], middle + new.response(middle / (0.5 + 0.05)))


def test_the_nearest_context_has_enough_cells_where_any_has():
    known = predictor([effect("g0", "a", n_cells=2), effect("g0", "b")], ("a", "b", "c"))
    like_a = replace(known.states["c"], components=known.states["a"].components)
    assert np.array_equal(known.said(ask("g0"), "c", like_a)["nearest"], known.effects[1].change)
    alone = predictor([effect("g0", "a", n_cells=2)], ("a", "c"))
    assert np.array_equal(alone.said(ask("g0"), "c", like_a)["nearest"], alone.effects[0].change)


def test_predictors_of_an_unseen_single():
    known = predictor([effect(f"g{i}", n_cells=20 + i) for i in range(6)] + [effect("g0+g1")])
    singles = known.effects[:6]
    said = known.said(ask("g7"), "a", known.states["a"])
    mean = np.mean([e.change for e in singles], axis=0)
    assert np.allclose(said["mean"], mean)
    precision = np.array([e.precision(known.states) for e in singles])

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def expected(rows, features, query, penalty):
        effects = [singles[i] for i in rows]
        weight = np.minimum(precision[rows], np.median(precision))
        return explicit_ridge(features, np.stack([e.change for e in effects]), weight, query, penalty)

    everything, varying = list(range(6)), [0, 1, 2, 3, 4]  # gene 5 has no loadings
    for penalty in base.TARGET_PENALTIES:
        of = expected(everything, unit(EMBEDDING[:6]), unit(EMBEDDING[7]), penalty)
        assert np.allclose(said[f"ridge on gene embedding, {penalty:g}"], of)
        of = expected(varying, unit(known.loadings[varying]), unit(known.loadings[7]), penalty)
        assert np.allclose(said[f"ridge on loadings, {penalty:g}"], of)
        sets = np.zeros((6, 3))
        sets[0, [0, 2]] = sets[1, 2] = 1
        assert np.allclose(said[f"ridge on gene sets, {penalty:g}"], expected(everything, sets, np.zeros(3), penalty))
    alone = np.zeros(G)
    alone[7] = 1.0
    response = known.states["a"].response(alone)
    assert np.allclose(said["mean with co-variation"], mean - response)  # a knock-out goes against what co-varies
    # of a target without features there is the mean, whatever is asked
    unknown = known.said(ask("no gene"), "a", known.states["a"])
    for name in ("ridge on gene embedding, 1", "ridge on loadings, 1", "mean with co-variation"):
        assert np.allclose(unknown[name], mean)


def test_activation_goes_with_what_co_varies():
    known = predictor([effect(f"g{i}", kind="activation") for i in range(4)])
    said = known.said(ask("g7", kind="activation"), "a", known.states["a"])
    force = np.zeros(G)
    force[7] = 1.0
    assert np.allclose(said["mean with co-variation"] - said["mean"], known.states["a"].response(force))


def test_predictors_of_a_combination():
    known = predictor([effect("g0"), effect("g1"), effect("g2")])
    first, second, _ = known.effects
    said = known.said(ask("g0+g1"), "a", known.states["a"])
    assert np.allclose(said["additive"], first.change + second.change)
    noise = np.mean([e.noise for e in known.effects], axis=0)
    assert np.allclose(said["additive, noise shrunk"], shrunk(first.change, noise) + shrunk(second.change, noise))
    larger = np.where(np.abs(first.change) >= np.abs(second.change), first.change, second.change)
    assert np.array_equal(said["larger part"], larger)
    assert np.array_equal(said["additive with interactions"], said["additive"])  # no pair to learn from
    three = known.said(ask("g0+g1+g2"), "a", known.states["a"])
    assert np.allclose(three["additive"], sum(e.change for e in known.effects))


def test_a_part_that_was_never_seen_is_predicted():
    known = predictor([effect(f"g{i}") for i in range(5)])
    said = known.said(ask("g0+g9"), "a", known.states["a"])
    assert np.allclose(said["additive"], known.effects[0].change + known.predict(ask("g9"), "a"))


def pairs_with(interaction: float, noise: float = 0.02):
    """Singles along two axes, and pairs with a product of the scores along these in a third direction."""
    rng = np.random.default_rng(5)
    axes = np.linalg.qr(rng.normal(size=(G, 3)))[0].T
    scores = rng.normal(size=(8, 2)) * 2
    singles = [effect(f"g{i}", change=scores[i] @ axes[:2] + noise * rng.normal(size=G)) for i in range(8)]
    pairs = []
    for i in range(8):
        for j in range(i):
            product = scores[i, 0] * scores[j, 1] + scores[i, 1] * scores[j, 0]
            change = (scores[i] + scores[j]) @ axes[:2] + interaction * product * axes[2] + noise * rng.normal(size=G)
            pairs.append(effect(f"g{j}+g{i}", change=change))
    return singles, pairs


def test_a_planted_interaction_is_found():
    singles, pairs = pairs_with(0.5)
    known = predictor([*singles, *pairs[:-4]])
    missed = {"additive": 0.0, "additive with interactions": 0.0}
    for held in pairs[-4:]:
        said = known.said(held.perturbation, "a", known.states["a"])
        for name in missed:
            missed[name] += ((said[name] - held.change) ** 2).sum()
    assert missed["additive with interactions"] < 0.1 * missed["additive"]


def test_interactions_are_ridge_regressions_on_products_of_different_parts():
    singles, pairs = pairs_with(0.5, noise=0.3)
    known = predictor([*singles, *pairs])
    alone = {e.perturbation.targets[0]: e.change for e in singles}
    axes = np.linalg.svd(np.stack(list(alone.values())), full_matrices=False)[2][:4]

    def products(parts):
        scores = [axes @ part for part in parts]
        return [
            sum(a[k] * b[m] for i, a in enumerate(scores) for j, b in enumerate(scores) if i != j)
            for k in range(4)
            for m in range(k, 4)
        ]

    parts_of = [[alone[target] for target in e.perturbation.targets] for e in pairs]
    x = np.array([products(of) for of in parts_of])
    y = np.stack([e.change - sum(of) for e, of in zip(pairs, parts_of, strict=True)])
    scale = np.sqrt((x**2).mean(axis=0))
    x = x / scale
    unit = (x**2).sum() / len(x)

    def fitted(rows, penalty, query):
        gram = x[rows].T @ x[rows] + penalty * unit * np.eye(10)
        return query @ np.linalg.solve(gram, x[rows].T @ y[rows])

    def missed(penalty):
        rest = [np.delete(np.arange(len(x)), i) for i in range(len(x))]
        return sum(((y[i] - fitted(rest[i], penalty, x[i])) ** 2).sum() for i in range(len(x)))

    best = min((0.01, 0.03, 0.1, 0.3, 1.0, 3.0), key=missed)
    for parts in ([alone["g0"], alone["g1"]], [alone["g0"], alone["g1"], alone["g2"]]):
        expected = fitted(np.arange(len(x)), best, np.array(products(parts)) / scale)
        assert np.allclose(known._interaction(parts, "a"), expected)


def test_interactions_are_learned_from_pairs_whose_parts_were_measured():
    singles, pairs = pairs_with(0.5)
    of_7 = [p for p in pairs if "g7" in p.perturbation.targets]
    others = [p for p in pairs if "g7" not in p.perturbation.targets]
    known, fewer = predictor([*singles[:7], *pairs]), predictor([*singles[:7], *others])
    parts = [e.change for e in singles[:2]]
    assert of_7
    assert np.allclose(known._interaction(parts, "a"), fewer._interaction(parts, "a"))
    assert known._interaction(parts, "a").any()


def test_without_an_interaction_next_to_none_is_said():
    singles, pairs = pairs_with(0.0)
    known = predictor([*singles, *pairs[:-1]])
    parts = [e.change for e in singles[:2]]
    # pure noise in what pairs do beyond the sum: no interaction does best on pairs that are left out
    assert np.abs(known._interaction(parts, "a")).max() < 0.05
    exact, sums = pairs_with(0.0, noise=0.0)
    exactly = predictor([*exact, *sums[:-1]])
    assert np.abs(exactly._interaction([e.change for e in exact[:2]], "a")).max() < 1e-9


def test_interactions_left_out_in_closed_form_are_those_of_refits():
    """The identity that the choice of the penalty rests on."""
    rng = np.random.default_rng(2)
    x, y, penalty = rng.normal(size=(9, 4)), rng.normal(size=(9, 3)), 0.7
    inverse = np.linalg.inv(x @ x.T + penalty * np.eye(9))
    missed = inverse @ y / np.diag(inverse)[:, None]
    for i in range(9):
        rest = np.delete(np.arange(9), i)
        gram = x[rest].T @ x[rest] + penalty * np.eye(4)
        assert np.allclose(missed[i], y[i] - x[i] @ np.linalg.solve(gram, x[rest].T @ y[rest]))


# --- left out ---


def many():
    names = [f"g{i}" for i in range(5)]
    singles = [effect(name, c) for c in "abcde" for name in names]
    return [*singles, *(effect(f"g{i}+g{j}", "a") for i in range(5) for j in range(i))]


@pytest.mark.parametrize("question", ["context", "single", "combination"])
def test_what_is_said_of_a_left_out_condition_does_not_depend_on_it(question):
    effects = many() if question == "context" else [e for e in many() if e.context == "a"]
    known = predictor(effects, "abcde")
    left = known.left_out(question)
    assert len(left) >= base.MIN_LEFT_OUT
    said, change, own = left[0]
    assert np.array_equal(change, own.change)
    changed = [replace(e, change=e.change + 5.0, noise=e.noise * 9) if e is own else e for e in effects]
    again = predictor(changed, "abcde")
    again.weights = {q: w for q, w in known.weights.items() if q == "single"}
    (other,) = [
        s for s, _, e in again.left_out(question) if e.perturbation == own.perturbation and e.context == own.context
    ]
    assert said.keys() == other.keys()
    for name in said:
        assert np.allclose(said[name], other[name]), name


def test_a_left_out_gene_takes_its_combinations_along_and_a_context_all_it_shows():
    known = predictor([e for e in many() if e.context == "a"])
    rest = known._without(known.effects[0], "single")
    assert rest is not None
    assert all("g0" not in e.perturbation.targets for e in rest)
    of_pair = known._without(known.effects[-1], "combination")
    assert of_pair is not None
    assert len(of_pair) == len(known.effects) - 1
    everywhere = predictor(many(), "abcde")
    rest = everywhere._without(everywhere.effects[0], "context")
    assert rest is not None
    assert {e.context for e in rest} == set("bcde")
    assert everywhere._without(everywhere.effects[0], "combination") is None


def test_conditions_of_few_cells_are_not_left_out_and_no_more_than_the_most_are(monkeypatch):
    few = predictor([replace(e, n_cells=3) if i < 3 else e for i, e in enumerate(many()[:5])])
    assert len(few.left_out("single")) == 2
    monkeypatch.setattr(base, "MAX_LEFT_OUT", 4)
    known = predictor(many(), "abcde")
    first, second = known.left_out("combination"), known.left_out("combination")
    assert len(first) == 4
    assert [e for _, _, e in first] == [e for _, _, e in second]


def test_weights_of_a_question_are_fitted_when_first_needed_to_what_is_left_out():
    known = predictor([e for e in many() if e.context == "a"])
    assert "single" not in known.weights
    known.predict(ask("g9"), "a")
    fitted = known.weights["single"]
    assert fitted.n_problems == 5
    other = predictor([e for e in many() if e.context == "a"])
    other.fit_weights("single", other.left_out("single"))
    assert np.allclose(other.weights["single"].weight, fitted.weight)


# --- what the network is told ---


def test_described_scores():
    known = predictor([effect(f"g{i}") for i in range(6)])
    known.fit_axes()
    assert np.allclose(known.axes @ known.axes.T, np.eye(known.axes.shape[0]))
    scores = np.stack([e.change for e in known.effects]) @ known.axes.T
    assert np.allclose(known.axis_scale, np.sqrt((scores**2).mean(axis=0)))
    k = known.axes.shape[0]
    at = known.states["a"]
    pair = known.described(ask("g0+g1"), "a", at, np.zeros(G))
    own = scores[:2] / known.axis_scale
    assert np.allclose(pair[:k], own.sum(axis=0))
    assert np.allclose(pair[k : 2 * k], own[0] * own[1])
    assert np.allclose(np.abs(pair[2 * k :]), np.abs(own).max(axis=0))
    single = known.described(ask("g9"), "a", at, known.effects[2].change)
    assert np.allclose(single[:k], scores[2] / known.axis_scale)
    assert np.allclose(single[k : 2 * k], 0)
