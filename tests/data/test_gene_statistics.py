from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import twins
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import BundleError

FIELDS = ("n_cells", "sum_cp10k", "sum_xlogx", "n_detected", "sum_counts")


def some_counts(n_cells: int = 50, n_genes: int = 30, seed: int = 0) -> np.ndarray:
    dense = np.random.default_rng(seed).negative_binomial(1, 0.4, (n_cells, n_genes))
    dense[4] = 0  # an empty cell
    dense[:, 7] = 0  # a gene never seen
    dense[:, 8] = 0
    dense[3, 8] = 5  # a gene of one cell
    return dense


def of(dense: np.ndarray, **options) -> GeneStatistics:
    return GeneStatistics.from_cells(twins.cell_counts(dense, **options))


@settings(max_examples=25, deadline=None)
@given(
    arrays(np.int64, st.tuples(st.integers(2, 8), st.integers(1, 6)), elements=st.integers(0, 60)), st.integers(1, 7)
)
def test_streaming_equals_the_dense_definition(dense, block):
    blocks = [twins.cell_counts(dense[i : i + block]) for i in range(0, len(dense), block)]
    found = GeneStatistics.from_blocks(blocks)
    np.testing.assert_allclose(found.normalised_entropy, twins.normalised_entropy(dense), atol=1e-9)
    n_cells = max((dense.sum(axis=1) > 0).sum(), 1)
    np.testing.assert_allclose(found.mean, twins.cp10k(dense).sum(axis=0) / n_cells, rtol=1e-9)
    np.testing.assert_array_equal(found.detection, (dense > 0).sum(axis=0) / n_cells)
    np.testing.assert_array_equal(found.sum_counts, dense.sum(axis=0))


def test_empty_cells_and_unseen_genes_do_not_count():
    found = of(some_counts())
    assert found.n_cells == 49
    np.testing.assert_allclose(found.normalised_entropy, twins.normalised_entropy(some_counts()), atol=1e-9)
    assert found.normalised_entropy[7] == 1
    assert found.normalised_entropy[8] < 1e-9


def test_entropy_of_simple_genes():
    dense = np.zeros((8, 4), dtype=int)
    dense[:, 0] = 10  # everywhere alike: H = ln 8
    dense[2, 1] = 10  # in one cell: H = 0
    dense[[0, 5], 2] = 10  # in two cells alike: H = ln 2
    found = of(dense, library_size=np.full(8, 100))
    np.testing.assert_allclose(found.entropy, [np.log(8), 0, np.log(2), 0], atol=1e-12)
    np.testing.assert_allclose(found.normalised_entropy, [1, 0, np.log(2) / np.log(8), 1], atol=1e-12)


def test_entropy_does_not_measure_depth():
    dense = some_counts()
    deeper = dense * np.arange(1, len(dense) + 1)[:, None]
    np.testing.assert_allclose(of(deeper).normalised_entropy, of(dense).normalised_entropy, atol=1e-9)


def test_shards_merge_exactly_in_any_order():
    dense = some_counts() * 4
    library = np.full(len(dense), 1e4)  # CP10K values are then integers and their sums exact
    whole = of(dense, library_size=library)
    parts = [of(dense[i : i + 13], library_size=library[i : i + 13]) for i in range(0, 50, 13)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        merged = GeneStatistics.empty(30)
        for i in order:
            merged = merged + parts[i]
        for name in FIELDS:
            if name == "sum_xlogx":
                np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-12)
            else:
                np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name))


def test_library_size_over_the_whole_file_is_what_normalises():
    dense = some_counts()
    library = dense.sum(axis=1) + 100
    np.testing.assert_allclose(
        of(dense, library_size=library).sum_cp10k, twins.cp10k(dense, library).sum(axis=0), rtol=1e-12
    )


def test_mean_profile_is_a_distribution_and_gives_unseen_genes_a_little():
    share = np.exp(of(some_counts()).log_mean_profile())
    assert share.sum() == pytest.approx(1)
    assert 0 < share[7] == share.min()
    one_count = np.exp(of(some_counts()).log_mean_profile(pseudo_count=1.0))
    assert one_count[7] > share[7]


def test_taking_genes_keeps_their_values():
    whole, genes = of(some_counts()), np.array([5, 2, 8])
    part = whole.take(genes)
    assert part.n_cells == whole.n_cells
    np.testing.assert_array_equal(part.normalised_entropy, whole.normalised_entropy[genes])


def test_saved_statistics_load_equal(tmp_path):
    whole = of(some_counts())
    whole.save(tmp_path / "s.npz")
    again = GeneStatistics.load(tmp_path / "s.npz")
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
        assert np.asarray(getattr(again, name)).dtype == np.asarray(getattr(whole, name)).dtype


def test_files_that_are_not_statistics_are_refused(tmp_path):
    whole = of(some_counts())
    arrays_of = {name: np.asarray(getattr(whole, name)) for name in FIELDS}
    np.savez(tmp_path / "missing.npz", **{k: v for k, v in arrays_of.items() if k != "sum_xlogx"})
    with pytest.raises(BundleError, match="sum_xlogx"):
        GeneStatistics.load(tmp_path / "missing.npz")
    np.savez(tmp_path / "short.npz", **{**arrays_of, "n_detected": arrays_of["n_detected"][:-1]})
    with pytest.raises(BundleError, match="differ in length"):
        GeneStatistics.load(tmp_path / "short.npz")


def test_a_pickled_array_is_never_unpickled(tmp_path):
    whole = of(some_counts())
    np.savez(
        tmp_path / "evil.npz",
        **{name: np.asarray(getattr(whole, name)) for name in FIELDS[:-1]},
        sum_counts=np.array([{"a": 1}], dtype=object),
    )
    with pytest.raises((BundleError, ValueError), match=r"pickle|damaged|Object"):
        GeneStatistics.load(tmp_path / "evil.npz")


def test_statistics_of_no_blocks_are_refused():
    with pytest.raises(ValueError, match="no cells"):
        GeneStatistics.from_blocks([])
