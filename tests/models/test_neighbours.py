from __future__ import annotations

import numpy as np
import pytest

from scdiva.models.neighbours import BatchNeighbours, cells_per_kind


@pytest.fixture
def points() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three types in two batches; the third type is in the first batch only."""
    rng = np.random.default_rng(0)
    kind = np.repeat([0, 1, 2], [60, 40, 20])
    batch = np.where(kind < 2, np.arange(120) % 2, 0)
    centre = np.array([[5.0, 0, 0, 0], [0, 5, 0, 0], [0, 0, 5, 0]])
    shift = np.array([[0.0, 0, 0, 0], [0, 0, 0, 1.5]])
    return centre[kind] + shift[batch] + 0.3 * rng.normal(size=(120, 4)), batch, kind


class TestNeighbours:
    def test_within_the_batch_and_not_the_cell_itself(self, points):
        x, batch, kind = points
        found = BatchNeighbours.find(x, batch, k_within=5, k_across=5)
        rows = np.arange(120)
        assert found.within.shape == (120, 5)
        assert (batch[found.within] == batch[:, None]).all()
        assert (kind[found.within] == kind[:, None]).all()
        assert (found.within != rows[:, None]).all()
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        for i in (0, 61, 119):  # by hand
            others = np.flatnonzero((batch == batch[i]) & (rows != i))
            nearest = others[np.argsort(-(unit[others] @ unit[i]))[:5]]
            assert set(found.within[i]) == set(nearest)

    def test_mutual_nearest_neighbours_are_of_one_type_and_a_lonely_type_has_none(self, points):
        x, batch, kind = points
        found = BatchNeighbours.find(x, batch, k_within=5, k_across=5)
        row, column = found.across.nonzero()
        assert found.n_pairs == row.size // 2 > 50
        assert (batch[row] != batch[column]).all()
        assert (kind[row] == kind[column]).all()
        assert not found.has_across[kind == 2].any()
        assert abs(found.across - found.across.T).nnz == 0

    def test_mutual_means_both_ways(self, points):
        x, batch, _ = points
        found = BatchNeighbours.find(x, batch, k_within=1, k_across=3)
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        one, two = np.flatnonzero(batch == 0), np.flatnonzero(batch == 1)
        similarity = unit[one] @ unit[two].T
        there = np.argsort(-similarity, axis=1)[:, :3]
        back = np.argsort(-similarity, axis=0)[:3].T
        pairs = {(one[i], two[j]) for i in range(one.size) for j in there[i] if i in back[j]}
        row, column = found.across[one].nonzero()
        assert {(one[i], j) for i, j in zip(row, column, strict=True)} == pairs

    def test_the_only_cell_of_a_batch(self):
        x = np.random.default_rng(0).normal(size=(6, 3))
        found = BatchNeighbours.find(x, np.array([0, 0, 0, 0, 0, 1]), k_within=8, k_across=2)
        assert (found.within[5] == 5).all()
        assert np.unique(found.within[0]).size == 1  # one neighbour of five cells, again and again

    def test_a_small_batch_is_not_chosen_by_all(self):
        rng = np.random.default_rng(0)
        kind = np.repeat([0, 1, 2, 3], 30)
        batch = (np.arange(120) % 6 == 0).astype(int)
        x = 3 * np.eye(4)[kind] + 0.3 * rng.normal(size=(120, 4))
        x[:, :2] += 4 * batch[:, None]  # the batch's own shift makes its cells lie together
        found = BatchNeighbours.find(x, batch, k_within=15, k_across=20)
        assert np.diff(found.across.indptr).max() <= 2


class TestPartners:
    def test_shares(self, points):
        x, batch, _ = points
        found = BatchNeighbours.find(x, batch, k_within=5, k_across=5)
        rows = np.repeat(np.flatnonzero(found.has_across), 100)
        partner = found.partners(rows, np.random.default_rng(0), p_self=0.2, p_across=0.5)
        assert (partner == rows).mean() == pytest.approx(0.2, abs=0.02)
        assert (batch[partner] != batch[rows]).mean() == pytest.approx(0.5, abs=0.02)
        is_across = batch[partner] != batch[rows]
        assert (np.asarray(found.across[rows[is_across], partner[is_across]]) == 1).all()

    def test_a_cell_without_a_pair_gets_a_neighbour_of_its_own_batch(self, points):
        x, batch, kind = points
        found = BatchNeighbours.find(x, batch, k_within=5, k_across=5)
        rows = np.repeat(np.flatnonzero(kind == 2), 20)
        partner = found.partners(rows, np.random.default_rng(0), p_self=0.0, p_across=1.0)
        assert (batch[partner] == 0).all()
        assert (kind[partner] == 2).all()


class TestKinds:
    def test_rare_kinds_are_told_from_abundant_ones(self):
        rng = np.random.default_rng(0)
        kind = np.repeat([0, 1, 2], [400, 60, 40])
        x = 4 * np.eye(3)[kind] + 0.3 * rng.normal(size=(500, 3))
        size = cells_per_kind(x, 3, seed=0)
        np.testing.assert_array_equal(size, np.bincount(kind)[kind])

    def test_few_cells_are_of_one_kind(self):
        assert (cells_per_kind(np.eye(30), 3, seed=0) == 30).all()
