"""Baselines of perturbation effects: what each predicts, and that none looks at what is held out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from perturbed import N_GENES, perturbed_cells, vocabulary
from scdiva.baselines import perturbation as baselines
from scdiva.data.perturbation_effects import effects_of
from scdiva.data.perturbations import Perturbation, PerturbedCells
from scdiva.errors import ConfigError

CORPUS = np.random.default_rng(9).normal(size=(N_GENES, 7))


def made(name: str) -> baselines.Additive:
    return baselines.make(name, vocabulary=vocabulary(), corpus=CORPUS, seed=0)


def without(cells: PerturbedCells, perturbation: int, context: int | None = None) -> np.ndarray:
    is_out = cells.perturbation_code == perturbation
    if context is not None:
        is_out &= cells.context_code == context
    return np.flatnonzero(~is_out)


def control_of(cells: PerturbedCells, context: int) -> PerturbedCells:
    return cells.take(np.flatnonzero(cells.is_control & (cells.context_code == context)))


SCHEMES = {
    "unseen_context": (1, 2, 2),
    "unseen_single": (3, 0, None),
    "combination": (5, 1, None),
    "seen": (2, 0, None),
}


@pytest.fixture(scope="module")
def cells() -> PerturbedCells:
    return perturbed_cells(contexts=("a", "b", "c", "d"))


def changes(cells: PerturbedCells) -> dict[tuple[str, str], np.ndarray]:
    return {(e.perturbation.name, e.context): e.change for e in effects_of(cells)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", baselines.BASELINES)
def test_every_baseline_predicts_finite_changes_and_sees_training_cells_only(name, scheme, cells):
    perturbation, context, held = SCHEMES[scheme]
    if scheme == "unseen_context":
        # nothing perturbed in the context; its control cells are there to predict from
        rows = np.flatnonzero((cells.context_code != held) | cells.is_control)
    elif scheme == "seen":
        own = np.flatnonzero((cells.perturbation_code == perturbation) & (cells.context_code == context))
        rows = np.setdiff1d(np.arange(cells.n_cells), own[::2])
    else:
        rows = without(cells, perturbation)

    def predicted(data: PerturbedCells) -> np.ndarray:
        predictor = made(name).fit(data.take(rows))
        return predictor.predict(data.perturbations[perturbation], data.contexts[context], control_of(data, context))

    assert isinstance(made(name), baselines.EffectPredictor)
    found = predicted(cells)
    assert found.shape == (N_GENES,)
    assert np.isfinite(found).all()
    # other held-out cells: the same prediction
    counts = cells.cells.counts.tolil()
    held_out = np.setdiff1d(np.arange(cells.n_cells), rows)
    assert held_out.size
    counts[held_out] = 7
    other = replace(cells, cells=replace(cells.cells, counts=counts.tocsr().astype(np.int32)))
    np.testing.assert_array_equal(found, predicted(other))


def test_no_change_and_the_mean(cells):
    rows = without(cells, 3)
    train = cells.take(rows)
    asked = cells.perturbations[3], "b", control_of(cells, 1)
    assert not made("no_change").fit(train).predict(*asked).any()
    in_b = [change for (_, context), change in changes(train).items() if context == "b"]
    assert len(in_b) == 4
    np.testing.assert_allclose(made("mean").fit(train).predict(*asked), np.mean(in_b, axis=0))
    np.testing.assert_allclose(made("additive").fit(train).predict(*asked), np.mean(in_b, axis=0))


def test_additive_adds_single_perturbations(cells):
    train = cells.take(without(cells, 5))
    combination, known = cells.perturbations[5], changes(train)
    one, two = combination.targets
    found = made("additive").fit(train).predict(combination, "a", control_of(cells, 0))
    np.testing.assert_allclose(found, known[one, "a"] + known[two, "a"])
    # Poisson cells of multiplied rates: the sum says nearly everything
    truth = changes(cells)[combination.name, "a"]
    assert np.corrcoef(found, truth)[0, 1] > 0.9
    # a single perturbation that was never seen counts as the mean
    fewer = cells.take(without(cells.take(without(cells, 5)), 1))
    fewer = train.take(np.flatnonzero(train.perturbation_code != 1))
    known = changes(fewer)
    mean = np.mean([change for (_, context), change in known.items() if context == "a"], axis=0)
    seen = next(name for name in (one, two) if (name, "a") in known)
    found = made("additive").fit(fewer).predict(combination, "a", control_of(cells, 0))
    np.testing.assert_allclose(found, known[seen, "a"] + mean)


def test_other_contexts_are_carried_over(cells):
    train = cells.take(np.flatnonzero((cells.context_code != 2) | cells.is_control))
    asked = cells.perturbations[1], "c", control_of(cells, 2)
    known = changes(train)
    elsewhere = [known[cells.perturbations[1].name, context] for context in "abd"]
    np.testing.assert_allclose(made("additive").fit(train).predict(*asked), np.mean(elsewhere, axis=0))
    nearest = made("nearest_context").fit(train).predict(*asked)
    assert sum(np.array_equal(nearest, change) for change in elsewhere) == 1


def test_the_nearest_context_is_the_one_with_like_control_cells():
    effects = {g: np.random.default_rng(g).normal(size=N_GENES) for g in range(6)}
    one = perturbed_cells(((0,),), contexts=("a", "b"), effects=effects, seed=1)
    # a new context that is b drawn again
    fit = made("nearest_context").fit(one)
    again = replace(control_of(one, 1), contexts=("a", "new"))
    found = fit.predict(one.perturbations[1], "new", again)
    np.testing.assert_array_equal(found, changes(one)[one.perturbations[1].name, "b"])


def test_gene_features_find_the_perturbation_that_is_alike():
    effects = {g: np.random.default_rng(g % 2).normal(size=N_GENES) for g in range(6)}
    cells = perturbed_cells(((0,), (1,), (2,), (3,), (4,)), effects=effects)
    features = np.random.default_rng(0).normal(0, 0.05, (N_GENES, 4))
    features[:6, 0] += [1, 0, 1, 0, 1, 0]
    features[:6, 1] += [0, 1, 0, 1, 0, 1]
    rows = without(cells, 5)  # gene 4, which does what 0 and 2 do
    truth = changes(cells)[cells.perturbations[5].name, ""]
    mean = baselines.make("mean").fit(cells.take(rows)).predict(cells.perturbations[5], "", control_of(cells, 0))
    for name in ("nearest_perturbation", "ridge_corpus", "random_forest_corpus"):
        predictor = baselines.BASELINES[name](vocabulary=vocabulary(), embedding=features).fit(cells.take(rows))
        found = predictor.predict(cells.perturbations[5], "", control_of(cells, 0))
        assert np.corrcoef(found, truth)[0, 1] > np.corrcoef(mean, truth)[0, 1] + 0.1, name


def test_without_features_the_mean_is_predicted(cells):
    train = cells.take(without(cells, 3))
    unknown = Perturbation(("no such gene",))
    mean = made("mean").fit(train).predict(unknown, "a", control_of(cells, 0))
    for name in ("nearest_perturbation", "ridge", "random_forest", "knn"):
        np.testing.assert_allclose(made(name).fit(train).predict(unknown, "a", control_of(cells, 0)), mean)


def test_ridge_is_scikit_learns_and_chooses_by_leave_one_out():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 4))
    y = x @ rng.normal(size=(4, 20)) + rng.normal(0, 0.1, (9, 20))
    query = rng.normal(size=4)
    found = baselines.ridge_from(x, y, query)
    scale = ((x - x.mean(axis=0)) ** 2).sum() / 9
    options = {p: Ridge(p * scale) for p in baselines.PENALTIES}

    def error(penalty):
        rest = [np.delete(np.arange(9), i) for i in range(9)]
        fits = [options[penalty].fit(x[r], y[r]).predict(x[[i]])[0] for i, r in enumerate(rest)]
        return ((np.array(fits) - y) ** 2).sum()

    best = min(options, key=error)
    np.testing.assert_allclose(found, options[best].fit(x, y).predict(query[None])[0], rtol=1e-6)
    # features without meaning: the mean
    noise = rng.normal(size=(9, 20))
    np.testing.assert_allclose(baselines.ridge_from(rng.normal(size=(9, 200)), noise, rng.normal(size=200)),
                               noise.mean(axis=0), atol=0.5)  # fmt: skip


def test_the_null_knows_nothing(cells):
    train = cells.take(without(cells, 5))
    truth = changes(cells)[cells.perturbations[5].name, "a"]
    asked = cells.perturbations[5], "a", control_of(cells, 0)
    null, additive = (made(name).fit(train).predict(*asked) for name in ("shuffled", "additive"))
    assert abs(np.corrcoef(null, truth)[0, 1]) < 0.6 < np.corrcoef(additive, truth)[0, 1]
    assert np.abs(null).mean() < 0.3 * np.abs(truth).mean()


def test_doses_of_one_treatment_stand_in_for_each_other():
    cells = perturbed_cells(((0,), (1,)))
    dosed = replace(cells, perturbations=(cells.perturbations[0], Perturbation(("drug",), "treatment", 1.0),
                                          Perturbation(("other",), "treatment")))  # fmt: skip
    fitted = made("additive").fit(dosed)
    found = fitted.predict(Perturbation(("drug",), "treatment", 2.0), "", control_of(dosed, 0))
    np.testing.assert_array_equal(found, changes(dosed)["drug@1", ""])


def test_refusals(cells):
    with pytest.raises(ConfigError, match="nonsense"):
        baselines.make("nonsense")
    with pytest.raises(ConfigError, match="gene features"):
        baselines.make("knn_corpus")
    with pytest.raises(ConfigError, match="embedding of 3 genes"):
        baselines.BASELINES["knn"](vocabulary=vocabulary(), embedding=np.ones((3, 2))).fit(cells)
    with pytest.raises(ConfigError, match="no training condition"):
        made("mean").fit(control_of(cells, 0))
