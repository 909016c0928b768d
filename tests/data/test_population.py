"""Sizes of generated cells: drawn jointly, from cells of the condition, as real as those are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import twins
from scdiva.data.population import CellSizes, read_arrays
from scdiva.errors import BundleError

# two fields; every record has a size that no other has
CONDITION = np.array([[1, 1]] * 40 + [[1, 2]] * 30 + [[2, 1]] * 20 + [[3, 0]] * 10, dtype=np.int32)
N = CONDITION.shape[0]


@pytest.fixture
def sizes() -> CellSizes:
    rng = np.random.default_rng(0)
    n_genes = rng.permutation(np.arange(100, 100 + N)).astype(np.int32)
    depth = (n_genes * 3 + rng.integers(0, 3, N)).astype(np.int32)
    source = (np.arange(N) % 2).astype(np.int32)
    is_measured = np.ones((2, 1001), dtype=bool)
    is_measured[1, 900:] = False
    return CellSizes(n_genes, depth, depth * 1.25, CONDITION, source, is_measured)


def records(sizes: CellSizes, rows: np.ndarray) -> set[tuple]:
    return set(
        zip(*(getattr(sizes, k)[rows].tolist() for k in ("n_genes", "depth", "library_size", "source")), strict=True)
    )


def wanted(*codes: int, n: int = 25) -> np.ndarray:
    return np.tile(np.array(codes, dtype=np.int32), (n, 1))


class TestCollecting:
    def cells(self, n_cells: int, seed: int, measured: np.ndarray, condition: int):
        dense = np.random.default_rng(seed).poisson(0.7, (n_cells, 30)) * measured
        dense[0] = 0  # an empty cell
        cells = twins.cell_counts(dense, library_size=dense.sum(axis=1) * 2 + 1, measured=measured)
        return replace(cells, condition=np.full((n_cells, 1), condition, dtype=np.int32)), dense

    def test_blocks_become_records(self):
        all_genes, some = np.ones(30, dtype=bool), np.arange(30) < 21
        parts = [self.cells(40, 1, all_genes, 1), self.cells(30, 2, some, 2), self.cells(20, 3, all_genes, 3)]
        found = CellSizes.of([cells for cells, _ in parts], np.random.default_rng(0))
        dense = np.concatenate([d[1:] for _, d in parts])
        np.testing.assert_array_equal(found.n_genes, (dense > 0).sum(axis=1))
        np.testing.assert_array_equal(found.depth, dense.sum(axis=1))
        np.testing.assert_array_equal(found.library_size, dense.sum(axis=1) * 2 + 1)
        np.testing.assert_array_equal(found.condition[:, 0], np.repeat([1, 2, 3], [39, 29, 19]))
        # equal masks are one
        np.testing.assert_array_equal(found.is_measured, [all_genes, some])
        np.testing.assert_array_equal(found.source, np.repeat([0, 1, 0], [39, 29, 19]))

    def test_large_corpora_are_sampled(self, monkeypatch):
        monkeypatch.setattr("scdiva.data.population.MAX_RECORDS", 15)
        cells, dense = self.cells(200, 1, np.ones(30, dtype=bool), 1)
        one, same, other = (CellSizes.of([cells], np.random.default_rng(seed)) for seed in (0, 0, 1))
        assert one.n_records == 15
        np.testing.assert_array_equal(one.depth, same.depth)
        assert not np.array_equal(one.depth, other.depth)
        assert set(one.depth) <= set(dense.sum(axis=1))


class TestMatching:
    @pytest.mark.parametrize(
        ("codes", "n", "is_met"),
        [
            ((0, 0), 100, (True, True)),
            ((1, 0), 70, (True, True)),
            ((1, 2), 30, (True, True)),
            ((0, 1), 60, (True, True)),
            ((3, 0), 10, (True, True)),
            # nobody is (2, 2): the label that more records have is kept
            ((2, 2), 30, (False, True)),
            # nobody is (3, 1) either; of 60 and 10
            ((3, 1), 60, (False, True)),
            # nor is anybody 4
            ((4, 0), 100, (False, True)),
            ((4, 2), 30, (False, True)),
        ],
    )
    def test_records_of_a_condition(self, codes, n, is_met, sizes):
        rows, met = sizes.matching(np.array(codes))
        assert rows.size == n
        assert met.tolist() == list(is_met)
        for i, code in enumerate(codes):
            if code and met[i]:
                assert (sizes.condition[rows, i] == code).all()

    def test_the_label_that_says_most_of_depth_is_kept(self, sizes):
        # cells of the second field's label 2 are ten times as deep; more cells have its label 1
        depth = np.where(CONDITION[:, 1] == 2, 10, 1) * sizes.depth
        rows, met = replace(sizes, depth=depth.astype(np.int32)).matching(np.array([3, 1]))
        assert met.tolist() == [False, True]
        assert (CONDITION[rows, 1] == 1).all()
        by_type = np.where(CONDITION[:, 0] == 3, 10, 1) * sizes.depth
        rows, met = replace(sizes, depth=by_type.astype(np.int32)).matching(np.array([3, 1]))
        assert met.tolist() == [True, False]
        assert (CONDITION[rows, 0] == 3).all()


class TestDraw:
    def test_whole_records_of_the_condition(self, sizes):
        for codes in ((1, 2), (2, 0), (0, 1), (0, 0)):
            drawn = sizes.draw(wanted(*codes), np.random.default_rng(1))
            rows, _ = sizes.matching(np.array(codes))
            found = set(
                zip(
                    drawn.n_genes.tolist(),
                    drawn.depth.tolist(),
                    drawn.library_size.tolist(),
                    drawn.source.tolist(),
                    strict=True,
                )
            )
            assert found <= records(sizes, rows)
            assert drawn.n_genes.dtype == drawn.depth.dtype == np.int64

    def test_a_relaxed_condition_draws_from_what_is_left_of_it(self, sizes):
        drawn = sizes.draw(wanted(2, 2), np.random.default_rng(1))
        assert set(drawn.n_genes) <= set(sizes.n_genes[CONDITION[:, 1] == 2])

    def test_cells_of_several_conditions_each_get_their_own(self, sizes):
        codes = np.concatenate([wanted(1, 2, n=10), wanted(3, 0, n=10), wanted(2, 1, n=10)])
        order = np.random.default_rng(0).permutation(30)
        drawn = sizes.draw(codes[order], np.random.default_rng(1))
        for i, code in enumerate(codes[order]):
            rows, _ = sizes.matching(code)
            assert drawn.n_genes[i] in sizes.n_genes[rows]

    def test_without_replacement_as_far_as_the_records_go(self, sizes):
        drawn = sizes.draw(wanted(2, 1, n=20), np.random.default_rng(1))
        assert sorted(drawn.n_genes) == sorted(sizes.n_genes[CONDITION[:, 0] == 2])
        more = sizes.draw(wanted(2, 1, n=50), np.random.default_rng(1))
        times = np.unique(more.n_genes, return_counts=True)[1]
        assert times.size == 20
        assert set(times) == {2, 3}

    def test_seeded(self, sizes):
        one, same, other = (sizes.draw(wanted(1, 0), np.random.default_rng(s)).n_genes for s in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)


class TestGivenSizes:
    def test_both(self, sizes):
        drawn = sizes.draw(wanted(1, 0), np.random.default_rng(0), n_genes=50, depth=np.arange(25) + 70)
        assert (drawn.n_genes == 50).all()
        np.testing.assert_array_equal(drawn.depth, np.arange(25) + 70)
        # genes outside the vocabulary keep their share of the library
        np.testing.assert_allclose(drawn.library_size, drawn.depth * 1.25)

    @pytest.mark.parametrize(("given", "other"), [("n_genes", "depth"), ("depth", "n_genes")])
    def test_of_one_the_other_comes_from_records_near_it(self, given, other, sizes):
        # of 70 records the 32 nearest; sizes of 100 to 200 genes go with three times as many UMIs
        values = np.where(np.arange(200) % 2, 190, 110) * (3 if given == "depth" else 1)
        drawn = sizes.draw(wanted(1, 0, n=200), np.random.default_rng(0), **{given: values})
        np.testing.assert_array_equal(getattr(drawn, given), values)
        found = getattr(drawn, other) / (3 if other == "depth" else 1)
        assert (found[::2] < 160).all()
        assert (found[1::2] > 140).all()
        assert np.unique(found).size > 20
        assert set(getattr(drawn, other)) <= set(getattr(sizes, other)[CONDITION[:, 0] == 1])
        if given == "n_genes":  # a whole record but for the number of genes
            np.testing.assert_allclose(drawn.library_size, drawn.depth * 1.25)

    def test_far_outside_of_what_was_seen(self, sizes):
        few = sizes.draw(wanted(3, 0, n=50), np.random.default_rng(0), depth=1)
        many = sizes.draw(wanted(3, 0, n=50), np.random.default_rng(0), depth=10**6)
        assert set(few.n_genes) <= set(sizes.n_genes[90:])  # fewer records than are near: all of them
        assert (many.depth == 10**6).all()


class TestStorage:
    def test_arrays_round_trip(self, sizes, tmp_path):
        np.savez_compressed(tmp_path / "a.npz", **sizes.arrays())
        found = CellSizes.from_arrays(read_arrays(tmp_path / "a.npz", list(sizes.arrays())))
        for name in ("n_genes", "depth", "library_size", "condition", "source", "is_measured"):
            np.testing.assert_array_equal(getattr(found, name), getattr(sizes, name))
            assert getattr(found, name).dtype == getattr(sizes, name).dtype

    def test_fewer_genes(self, sizes):
        is_kept = np.arange(1001) % 7 == 0
        smaller = sizes.take_genes(is_kept)
        np.testing.assert_array_equal(smaller.is_measured, sizes.is_measured[:, is_kept])
        np.testing.assert_array_equal(smaller.n_genes, sizes.n_genes)

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", b"\x80\x04pickle"])
    def test_damaged_files_are_refused(self, content, tmp_path):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(BundleError, match=r"a\.npz is damaged"):
            read_arrays(tmp_path / "a.npz", ["n_genes"])

    def test_a_missing_array_is_named(self, tmp_path):
        np.savez(tmp_path / "a.npz", depth=np.ones(3))
        with pytest.raises(BundleError, match="lacks n_genes"):
            read_arrays(tmp_path / "a.npz", ["n_genes", "depth"])

    def test_objects_are_refused(self, tmp_path):
        np.savez(tmp_path / "a.npz", n_genes=np.array([{}], dtype=object))
        with pytest.raises(BundleError, match="damaged"):
            read_arrays(tmp_path / "a.npz", ["n_genes"])
