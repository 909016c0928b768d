from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from scdiva.metrics import paper_protocol as protocol
from scdiva.metrics.generation_space import LabelledCells, NotMeasurableError


def draw(n_per_type: int, seed: int, *, shift: float = 1.0) -> LabelledCells:
    """Poisson cells of two types; ``shift`` multiplies every fourth gene."""
    rng = np.random.default_rng(seed)
    rate = np.random.default_rng(99).lognormal(0.5, 1.0, 60) + np.zeros((2, 1))
    rate[1, :10] *= 5
    rate[:, ::4] *= shift
    kinds = np.repeat([0, 1], n_per_type)
    return LabelledCells(sp.csr_matrix(rng.poisson(rate[kinds]).astype(np.int32)), np.array(["a", "b"])[kinds])


def scores(generated, real=None):
    real = draw(60, 0) if real is None else real
    found = protocol.protocol_scores(real, generated, protocol.genes_of(real.counts), seed=0, n_trees=20)
    return {name: score.value for name, score in found.items()}


def test_cells_of_one_distribution_pass_and_shifted_ones_do_not():
    same, shifted = scores(draw(60, 1)), scores(draw(60, 1, shift=2.5))
    assert set(same) == set(protocol.METRICS)
    assert same["scc"] > 0.95 > shifted["scc"]
    assert same["pcc"] > 0.98 > shifted["pcc"]
    assert same["mmd"] < 0.5 * shifted["mmd"]
    assert same["ilisi"] > 0.7  # that of shifted cells is not low, see graph_ilisi
    for judge in ("forest_auc", "knn_auc"):
        assert same[judge] == pytest.approx(0.5, abs=0.15)
        assert shifted[judge] > 0.85


def test_genes_that_fewer_than_three_cells_have_are_left_out():
    counts = sp.csr_matrix(np.array([[1, 1, 0], [1, 2, 0], [1, 0, 0]]))
    np.testing.assert_array_equal(protocol.genes_of(counts), [0])


def test_the_graph_reaches_as_many_neighbours_as_lisi_needs():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(140, 5))
    assert protocol.graph_ilisi(points[:70], points[70:]) > 0.7
    assert protocol.graph_ilisi(points[:70], points[70:] + 50) == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(NotMeasurableError, match="90"):
        protocol.graph_ilisi(points[:20], points[20:40])


def test_edges_are_those_of_the_fuzzy_set():
    points = np.random.default_rng(0).normal(size=(30, 3))
    graph = protocol.connectivities(points, 5).toarray()
    np.testing.assert_allclose(graph, graph.T)
    distance = np.linalg.norm(points[:, None] - points, axis=2)
    # 1 to the nearest other; none to a cell that is among the four nearest of neither
    nearest = (distance + np.diag(np.full(30, np.inf))).argmin(axis=1)
    np.testing.assert_allclose(graph[np.arange(30), nearest], 1.0)
    order = distance.argsort(axis=1)[:, 1:5]
    is_near = np.zeros((30, 30), dtype=bool)
    is_near[np.arange(30)[:, None], order] = True
    np.testing.assert_array_equal(graph > 0, is_near | is_near.T)
    # edges in one direction only are the cell's own: they add up to log2(5)
    beyond = np.take_along_axis(distance, order, axis=1) - distance[np.arange(30), nearest][:, None]
    row = next(i for i in range(30) if not is_near.T[i, order[i, 1:]].any())
    assert graph[row, order[row]].sum() == pytest.approx(np.log2(5), abs=1e-4)
    assert (np.diff(graph[row, order[row]][np.argsort(beyond[row])]) <= 0).all()


def test_what_cannot_be_measured_has_a_reason():
    few = draw(3, 0)
    found = protocol.protocol_scores(few, draw(3, 1), protocol.genes_of(few.counts), seed=0, n_trees=2)
    for name in ("ilisi", "forest_auc", "knn_auc"):
        assert np.isnan(found[name].value)
        assert found[name].reason
    nothing = LabelledCells(sp.csr_matrix((6, 60), dtype=np.int32), few.labels)
    found = protocol.protocol_scores(nothing, nothing, np.arange(60), seed=0, n_trees=2)
    assert all(np.isnan(score.value) and score.reason for score in found.values())
