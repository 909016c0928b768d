from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from scdiva.data.scale import ScaleKind, detect_scale
from scdiva.errors import ScaleError


def counts(n_cells: int = 40, n_genes: int = 60, seed: int = 0) -> np.ndarray:
    """Counts in which every cell has a gene with exactly one molecule, as real cells have."""
    dense = np.random.default_rng(seed).poisson(2.0, (n_cells, n_genes)) * 3
    dense[:, 0] = 1
    return dense


def normalised(dense: np.ndarray, target: float = 1e4) -> np.ndarray:
    return dense * (target / dense.sum(axis=1, keepdims=True))


FORWARD = {
    ScaleKind.LOG1P: lambda x: np.log1p(normalised(x)),
    ScaleKind.NORMALISED: normalised,
    ScaleKind.LOG2P1: lambda x: np.log2(1 + normalised(x)),
    ScaleKind.LOG10P1: lambda x: np.log10(1 + normalised(x)),
}


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint16, np.float32, np.float64])
def test_integers_of_any_dtype_are_counts_and_stay_what_they_are(dtype):
    block = sp.csr_matrix(counts().astype(dtype))
    scale = detect_scale(block, "X")
    assert scale.kind is ScaleKind.COUNTS
    back = scale.to_counts(block, "X")
    assert back.dtype == np.int32
    np.testing.assert_array_equal(back.toarray(), counts())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", list(FORWARD))
def test_normalised_data_are_recognised_and_inverted_exactly(kind, dtype):
    block = sp.csr_matrix(FORWARD[kind](counts()).astype(dtype))
    scale = detect_scale(block, "X")
    assert scale.kind is kind
    assert not scale.is_counts
    np.testing.assert_array_equal(scale.to_counts(block, "X").toarray(), counts())
    assert "inverted to raw counts exactly" in scale.description


@pytest.mark.parametrize("target", [1.0, 100.0, 1e6])
def test_any_target_sum_is_inverted(target):
    block = sp.csr_matrix(np.log1p(normalised(counts(), target)))
    np.testing.assert_array_equal(detect_scale(block, "X").to_counts(block, "X").toarray(), counts())


@pytest.mark.parametrize("divisor", [2, 3])
def test_a_cell_whose_smallest_count_is_above_one_is_solved_by_its_other_counts(divisor):
    dense = counts()
    dense[0] = np.where(dense[0] > 0, dense[0] * 6 + divisor, 0)
    dense[0, :2] = divisor, 1 + 2 * divisor
    block = sp.csr_matrix(np.log1p(normalised(dense)))
    np.testing.assert_array_equal(detect_scale(block, "X").to_counts(block, "X").toarray(), dense)


@settings(max_examples=25, deadline=None)
@given(arrays(np.int64, (6, 12), elements=st.integers(0, 500)))
def test_log_normalised_counts_round_trip_whatever_they_are(dense):
    dense[:, 0] = 1
    block = sp.csr_matrix(np.log1p(normalised(dense)).astype(np.float32))
    scale = detect_scale(block, "X")
    np.testing.assert_array_equal(scale.to_counts(block, "X").toarray(), dense)


def broken(change) -> sp.csr_matrix:
    dense = counts().astype(np.float64)
    return sp.csr_matrix(change(dense))


def set_value(value):
    def change(dense):
        dense[3, 5] = value
        return dense

    return change


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (broken(set_value(np.nan)), "NaN or infinite"),
        (broken(set_value(np.inf)), "NaN or infinite"),
        (broken(lambda x: (x - x.mean(0)) / x.std(0).clip(1)), "negative"),
        (broken(lambda x: np.abs((x - x.mean(0)) / x.std(0).clip(1))), "do not go back"),
        (broken(lambda x: x * 0.73 + np.random.default_rng(1).uniform(0, 1, x.shape) * (x > 0)), "do not go back"),
        (broken(lambda x: np.log1p(normalised(x / np.linspace(500, 9000, x.shape[1])))), "do not go back"),
        (broken(lambda x: x * 0), "all zero"),
        (sp.csr_matrix((np.random.default_rng(0).random((60, 60)) < 0.5).astype(int)), "0 and 1"),
    ],
    ids=["nan", "infinity", "scaled", "scaled, clipped", "ambient-corrected", "TPM", "all zero", "presence/absence"],
)
def test_what_is_not_counts_is_refused_and_says_why(block, words):
    with pytest.raises(ScaleError, match=words) as error:
        detect_scale(block, "layers['x']")
    assert "layers['x']" in error.value.found
    assert error.value.expected
    assert error.value.fix


def test_a_dense_object_matrix_is_refused():
    block = sp.csr_matrix(counts())
    block.data = block.data.astype(object)
    with pytest.raises(ScaleError, match="dtype object"):
        detect_scale(block, "X")


def test_a_bad_block_after_a_good_sample_is_refused_when_it_is_read():
    good = sp.csr_matrix(counts())
    scale = detect_scale(good, "X")
    bad = good.astype(float)
    bad.data[7] += 0.5
    with pytest.raises(ScaleError, match="non-integer"):
        scale.to_counts(bad, "X")
    logged = detect_scale(sp.csr_matrix(np.log1p(normalised(counts()))), "X")
    with pytest.raises(ScaleError, match="not exactly invertible"):
        logged.to_counts(sp.csr_matrix(np.random.default_rng(0).uniform(0, 3, (4, 60))), "X")


def test_counts_beyond_int32_are_refused():
    block = sp.csr_matrix(np.array([[1.0, 3e9]]))
    with pytest.raises(ScaleError, match="3e"):
        detect_scale(block, "X").to_counts(block, "X")


def test_the_block_itself_is_left_alone():
    block = sp.csr_matrix(np.log1p(normalised(counts())))
    before = block.copy()
    detect_scale(block, "X").to_counts(block, "X")
    np.testing.assert_array_equal(block.toarray(), before.toarray())
