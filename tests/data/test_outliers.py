"""Isolated counts are set back; markers of types, also of rare ones, are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import scipy.sparse as sp

from scdiva.data.outliers import SMALLEST_CAP, cap_isolated, isolated_caps
from scdiva.types import CellCounts


def _cells(counts: np.ndarray) -> CellCounts:
    sparse = sp.csr_matrix(counts.astype(np.int32))
    return CellCounts(
        counts=sparse,
        library_size=np.asarray(sparse.sum(axis=1), dtype=np.float64).ravel() + 5.0,
        cell_index=np.arange(len(counts)),
        source_of_cell=np.zeros(len(counts), dtype=np.int32),
        is_measured=np.ones((1, counts.shape[1]), dtype=bool),
    )


def test_an_isolated_count_is_set_back_and_leaves_the_totals() -> None:
    counts = np.random.default_rng(0).poisson(0.5, (400, 3))
    counts[7, 1] = 45
    capped, n = cap_isolated(_cells(counts))
    assert n == 1
    expected = counts.copy()
    expected[7, 1] = 4 * np.sort(counts[:, 1])[-3]  # the third largest, of 400 cells
    np.testing.assert_array_equal(capped.counts.toarray(), expected)
    np.testing.assert_array_equal(capped.library_size, expected.sum(axis=1) + 5.0)


def test_a_marker_of_a_rare_type_stays() -> None:
    counts = np.zeros((400, 2), dtype=int)
    counts[:, 0] = 1
    counts[:4, 1] = [60, 80, 100, 120]  # one percent of the cells
    cells = _cells(counts)
    assert cap_isolated(cells) == (cells, 0)


def test_few_cells_of_small_counts_and_genes_without_any_have_the_smallest_cap() -> None:
    counts = np.zeros((50, 3), dtype=int)
    counts[:2, 0] = 30
    counts[:20, 1] = 1
    assert isolated_caps(sp.csr_matrix(counts)).tolist() == [SMALLEST_CAP] * 3


def test_the_cells_given_are_not_changed() -> None:
    counts = np.ones((50, 1), dtype=int)
    counts[0, 0] = 90
    cells = _cells(counts)
    cap_isolated(cells)
    assert cells.counts[0, 0] == 90


def test_a_marker_of_a_rare_label_stays_and_a_jackpot_in_its_cells_does_not() -> None:
    counts = np.random.default_rng(0).poisson(0.5, (4000, 3))
    counts[:10, 1] = np.linspace(60, 120, 10)  # fewer cells than k, which is 20
    counts[4, 2] = 90
    label = np.repeat([1, 2], [10, 3990])
    # the rare label is in the second field; in the first one all cells are alike
    labelled = replace(_cells(counts), condition=np.stack([np.ones(4000, int), label], axis=1).astype(np.int32))
    capped, n = cap_isolated(labelled)
    assert n == 1
    expected = counts.copy()
    expected[4, 2] = max(SMALLEST_CAP, 4 * np.sort(counts[:, 2])[-20], 4 * np.sort(counts[:10, 2])[-3])
    np.testing.assert_array_equal(capped.counts.toarray(), expected)
    unlabelled, n = cap_isolated(replace(labelled, condition=np.zeros((4000, 2), np.int32)))
    assert n == 11
    assert unlabelled.counts[:10, 1].max() < 60
