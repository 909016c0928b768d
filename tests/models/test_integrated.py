"""Neighbours in an integrated embedding: the encoder that is kept is the integrated model's."""

from __future__ import annotations

import numpy as np
import pytest

from scdiva.models.scdiva.integrated import IntegratedIndex
from scdiva.tasks.integrate import integrate_cells
from scdiva.types import CellCounts, joined


@pytest.fixture(scope="module")
def sides(_cells, tiny_model) -> tuple[CellCounts, CellCounts, np.ndarray]:
    from scdiva.data.reader import open_counts

    cells = open_counts(_cells, tiny_model.vocabulary).read(np.arange(120))
    is_shared = cells.is_measured.all(axis=0)
    is_shared[np.flatnonzero(is_shared)[:20]] = False  # genes that one side does not measure
    one, two = (cells.take(rows).with_genes(is_shared) for rows in (np.arange(70), np.arange(70, 120)))
    return one, two, np.unique(_cells.obs["cell_type"].astype(str), return_inverse=True)[1]


@pytest.fixture(scope="module")
def integrated(sides, tiny_model):
    one, two, _ = sides
    cells = joined(one, two)
    batch = np.repeat(["reference", "query"], [one.n_cells, two.n_cells])
    return integrate_cells(cells, batch, tiny_model, seed=0), cells


@pytest.fixture(scope="module")
def index(sides, integrated) -> IntegratedIndex:
    found, cells = integrated
    model = found.model
    is_read = np.asarray(cells.is_measured.all(axis=0))
    return IntegratedIndex.fit(model.network, model.config, is_read, found.z[:70], sides[2][:70], 3)


def test_cells_are_where_the_integrated_model_has_them(index, integrated):
    found, cells = integrated
    np.testing.assert_allclose(index.embed(cells), found.z, atol=1e-5)
    # the genes that one side lacks are read by neither
    assert index.is_read.sum() == found.model.vocabulary.n_genes


def test_types_of_the_other_side_are_found(index, sides):
    _, query, code = sides
    z = np.zeros((query.n_cells, 1), dtype=np.float32)  # z of the model as it comes is not looked at
    for found in (index, index.adapted(query, z, learns=True)):
        assert (found.calls(query, z).probability.argmax(axis=1) == code[70:]).mean() > 0.9
    assert index.adapted(query, z, learns=False) is index


def test_learning_on_keeps_the_mean_confidence(index, sides):
    _, query, _ = sides
    z = np.zeros((query.n_cells, 1), dtype=np.float32)
    learnt = index.adapted(query, z, learns=True)
    assert learnt.regression is not None
    one, two = (found.calls(query, z).probability.max(axis=1).mean() for found in (index, learnt))
    assert two == pytest.approx(one, abs=0.02)


def test_saved_and_read_it_says_the_same(index, sides):
    _, query, _ = sides
    z = np.zeros((query.n_cells, 1), dtype=np.float32)
    again = IntegratedIndex.from_arrays(index.arrays(), 3)
    np.testing.assert_array_equal(again.calls(query, z).probability, index.calls(query, z).probability)
    one, two = (found.adapted(query, z, learns=True).calls(query, z) for found in (index, again))
    np.testing.assert_array_equal(one.probability, two.probability)
