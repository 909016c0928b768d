from __future__ import annotations

import sys
from importlib.util import find_spec

import numpy as np
import pytest
import scipy.sparse as sp

import twins
from scdiva.baselines import annotation as baselines
from scdiva.data.components import log_cp10k, variable_genes
from scdiva.datasets import synthetic_cells
from scdiva.errors import ConfigError, UnsupportedError

HERE = sorted(set(baselines.BASELINES) - {"celltypist"})
INFORMED = sorted(set(HERE) - {"majority", "shuffled"})


@pytest.fixture(scope="module")
def cells() -> tuple[sp.csr_matrix, np.ndarray]:
    cells = synthetic_cells(360, 150, n_types=3, n_batches=1, mean_depth=400.0, seed=5)
    return sp.csr_matrix(cells.X), cells.obs["cell_type"].astype(str).to_numpy()


@pytest.fixture(scope="module")
def split(cells):
    counts, labels = cells
    return counts[:240], labels[:240], counts[240:], labels[240:]


def assert_keeps_its_word(found: baselines.Predictions, train_labels, n_test: int) -> None:
    assert found.classes.tolist() == sorted(set(train_labels))
    assert found.probabilities.shape == (n_test, found.classes.size)
    assert (found.probabilities >= 0).all()
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1.0, atol=1e-6)
    np.testing.assert_array_equal(found.label, found.classes[found.probabilities.argmax(axis=1)])


@pytest.mark.parametrize("name", HERE)
def test_probabilities_are_in_the_order_of_the_classes_and_deterministic(name, split):
    train, labels, test, _ = split
    found, again = (baselines.BASELINES[name](train, labels, test, seed=3) for _ in range(2))
    assert_keeps_its_word(found, labels, 120)
    np.testing.assert_array_equal(found.probabilities, again.probabilities)


@pytest.mark.parametrize("name", INFORMED)
def test_types_are_told_apart(name, split):
    train, labels, test, truth = split
    assert (baselines.BASELINES[name](train, labels, test, seed=0).label == truth).mean() > 0.95


@pytest.mark.parametrize("name", sorted(set(INFORMED) - {"logistic_pca_of_all"}))
def test_a_test_cell_is_judged_on_its_own(name, split):
    train, labels, test, _ = split
    whole = baselines.BASELINES[name](train, labels, test, seed=0)
    alone = baselines.BASELINES[name](train, labels, test[[7]], seed=0)
    np.testing.assert_allclose(alone.probabilities, whole.probabilities[[7]], atol=1e-5)


@pytest.mark.parametrize("name", INFORMED)
def test_five_cells_per_type_and_a_type_of_one_cell(name, split):
    train, labels, test, truth = split
    few = np.concatenate([np.flatnonzero(labels == kind)[:5] for kind in np.unique(labels)])
    with_lonely = labels[few].copy()
    with_lonely[0] = "lonely"
    found = baselines.BASELINES[name](train[few], with_lonely, test, seed=0)
    assert_keeps_its_word(found, with_lonely, 120)
    assert (found.label == truth).mean() > (0.3 if name == "knn_pca" else 0.7)


@pytest.mark.parametrize("name", HERE)
def test_a_single_class_is_certain(name, split):
    train, _, test, _ = split
    found = baselines.BASELINES[name](train[:1], ["B cell"], test, seed=0)
    assert set(found.label) == {"B cell"}
    np.testing.assert_array_equal(found.probabilities, 1.0)


@pytest.mark.parametrize("name", HERE)
def test_empty_cells_and_no_test_cells(name, split):
    train, labels, test, _ = split
    empty = sp.csr_matrix((2, train.shape[1]), dtype=np.int32)
    found = baselines.BASELINES[name](sp.vstack([train, empty]).tocsr(), [*labels, "x", "x"], empty, seed=0)
    assert np.isfinite(found.probabilities).all()
    assert baselines.BASELINES[name](train, labels, test[:0], seed=0).probabilities.shape == (0, 3)


def test_majority_is_the_commonest_label_at_its_frequency(split):
    train, _, test, _ = split
    found = baselines.majority(train[:4], ["b", "a", "b", "c"], test, seed=0)
    assert set(found.label) == {"b"}
    np.testing.assert_allclose(found.probabilities[0], [0.25, 0.5, 0.25])


def test_the_null_knows_no_types(split):
    train, labels, test, truth = split
    right = [(baselines.shuffled(train, labels, test, seed=s).label == truth).mean() for s in range(4)]
    assert abs(np.mean(right) - 1 / 3) < 0.2
    one, other = (baselines.shuffled(train, labels, test, seed=s).probabilities for s in (0, 1))
    assert (one != other).any()


def test_knn_probabilities_are_shares_of_fifteen_votes(split):
    train, labels, test, _ = split
    votes = baselines.knn_pca(train, labels, test, seed=0).probabilities * 15
    np.testing.assert_allclose(votes, np.rint(votes), atol=1e-9)


def test_log_values_equal_the_twin(cells):
    counts = cells[0].toarray()
    np.testing.assert_allclose(
        log_cp10k(cells[0]).toarray(), np.log1p(twins.cp10k(counts, counts.sum(axis=1))), rtol=1e-6
    )


def test_variable_genes_are_chosen_among_the_detected(cells):
    values = log_cp10k(cells[0])
    detected = np.flatnonzero(values.toarray().any(axis=0))
    np.testing.assert_array_equal(variable_genes(values), detected)
    ten = variable_genes(values, n_genes=10)
    assert ten.size == 10
    rng = np.random.default_rng(0)
    rate = np.tile(rng.lognormal(1, 1, 200), (300, 1))
    rate[:, :10] *= rng.gamma(0.3, 1 / 0.3, (300, 10))
    found = variable_genes(log_cp10k(sp.csr_matrix(rng.poisson(rate))), n_genes=10)
    assert np.isin(np.arange(10), found).mean() >= 0.8


def test_variable_genes_of_batches_do_not_depend_on_batches_of_a_few_cells(cells):
    values = log_cp10k(cells[0])
    batch = np.where(np.arange(360) < 180, "a", "b")
    batch[:2] = "tiny"
    found = variable_genes(values, batches=batch, n_genes=30)
    np.testing.assert_array_equal(found, variable_genes(values[2:], batches=batch[2:], n_genes=30))
    everybody_small = np.arange(360).astype(str)
    np.testing.assert_array_equal(
        variable_genes(values, batches=everybody_small, n_genes=30), variable_genes(values, n_genes=30)
    )


@pytest.mark.parametrize("name", HERE)
def test_what_does_not_fit_is_refused(name, split):
    train, labels, test, _ = split
    fit_predict = baselines.BASELINES[name]
    with pytest.raises(ConfigError, match="239 labels"):
        fit_predict(train, labels[1:], test, seed=0)
    with pytest.raises(ConfigError, match="149 in the test cells"):
        fit_predict(train, labels, test[:, 1:], seed=0)
    with pytest.raises(ConfigError, match="0 training cells"):
        fit_predict(train[:0], [], test, seed=0)


def test_every_baseline_has_a_title():
    assert list(baselines.TITLES) == list(baselines.BASELINES)


def test_without_celltypist_the_extra_is_named(split, monkeypatch):
    train, labels, test, _ = split
    monkeypatch.setitem(sys.modules, "celltypist", None)
    monkeypatch.setattr("scdiva.baselines.common.find_spec", lambda module: None)
    with pytest.raises(UnsupportedError, match=r"pip install 'scdiva\[eval\]'"):
        baselines.celltypist(train, labels, test, seed=0)


@pytest.mark.skipif(find_spec("celltypist") is None, reason="needs CellTypist")
def test_celltypist_tells_types_apart(split):
    import logging

    train, labels, test, truth = split
    try:
        baselines.require_celltypist()
    except UnsupportedError as error:
        pytest.skip(str(error))
    handlers = list(logging.getLogger().handlers)
    found = baselines.celltypist(train, labels, test, seed=0)
    assert_keeps_its_word(found, labels, 120)
    assert (found.label == truth).mean() > 0.95
    assert logging.getLogger().handlers == handlers
    two = labels != "type 2"
    assert_keeps_its_word(baselines.celltypist(train[two], labels[two], test, seed=0), labels[two], 120)
