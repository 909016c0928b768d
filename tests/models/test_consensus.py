"""A consensus of annotators: who is believed on a query, and what no member can do alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.models.annotators import Calibration, Calls, Consensus, HeldOut, Probe, ReferenceIndex
from scdiva.models.annotators.consensus import of_member
from scdiva.types import CellCounts

K = 3


def made(n: int, seed: int) -> tuple[CellCounts, NDArray[np.float32], NDArray[np.int32]]:
    """Cells of three types, told apart by 20 of 60 genes each, and a z that says the same."""
    rng = np.random.default_rng(seed)
    code = rng.integers(K, size=n).astype(np.int32)
    rate = np.full((K, 60), 0.3)
    for k in range(K):
        rate[k, 20 * k : 20 * k + 20] = 0.8
    counts = sp.csr_matrix(rng.poisson(rate[code]).astype(np.int32))
    cells = CellCounts(
        counts=counts,
        library_size=np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(),
        cell_index=np.arange(n),
        source_of_cell=np.zeros(n, dtype=np.int32),
        is_measured=np.ones((1, 60), dtype=bool),
    )
    z = np.eye(K, 8, dtype=np.float32)[code] * 2.5 + rng.normal(size=(n, 8)).astype(np.float32)
    return cells, z, code


@dataclass(frozen=True)
class Stubborn:
    """A member that says of every cell the same, whatever it is; on the reference it was right."""

    said: NDArray[np.float32]
    held_out: HeldOut
    calibration: Calibration = field(default_factory=Calibration.none)
    method: str = "stubborn"

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        n = cells.n_cells
        return Calls(np.tile(self.said, (n, 1)), np.zeros(n, dtype=np.float32))

    def adapted(self, cells: CellCounts, z: NDArray[np.float32], *, learns: bool) -> Stubborn:
        return self

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"said": self.said}


def right(code: NDArray[np.integer]) -> HeldOut:
    return HeldOut(np.log(np.where(np.eye(K, dtype=bool)[code], 0.9, 0.05)), np.ones(code.size))


@pytest.fixture(scope="module")
def members() -> tuple[Probe, ReferenceIndex, NDArray[np.int32]]:
    cells, z, code = made(150, 0)
    return Probe.fit(cells, z, code, K, seed=0), ReferenceIndex.fit(z, code, K), code


@pytest.fixture(scope="module")
def consensus(members) -> Consensus:
    probe, index, code = members
    certain = np.array([1.0, 0.0, 0.0], dtype=np.float32)
    return Consensus.fit(probe, index, Stubborn(certain, right(code)), code)


def test_who_is_contradicted_is_believed_less(consensus):
    cells, z, code = made(200, 1)
    found = consensus.adapted(cells, z, learns=False)
    *others, stubborn = found.weight
    assert stubborn < min(others) / 4
    assert found.weight.sum() == pytest.approx(1)
    assert found.agreement[-1] == pytest.approx((code == 0).mean(), abs=0.03)
    assert (found.calls(cells, z).probability.argmax(axis=1) == code).mean() > 0.95


def test_no_member_has_a_veto(consensus):
    # also with equal weights: the stubborn one gives two types a probability of zero
    cells, z, code = made(200, 1)
    calls = consensus.calls(cells, z)
    assert (calls.probability.argmax(axis=1) == code).mean() > 0.9
    assert np.isfinite(calls.novelty).all()


def test_it_is_calibrated_on_what_each_held_out(members):
    probe, index, code = members
    found = Consensus.fit(probe, index, index, code)
    cells, z, _ = made(600, 2)
    calls = found.calls(cells, z)
    np.testing.assert_allclose(calls.probability.sum(axis=1), 1, atol=1e-5)
    assert found.calibration.temperature != 1
    # about 5 % of known cells are unknown, as asked for
    assert 0.005 < (calls.novelty > found.calibration.threshold).mean() < 0.15
    strict = Consensus.fit(probe, index, index, code, false_unknown_rate=0.3)
    assert strict.calibration.threshold < found.calibration.threshold


def test_a_cell_does_not_depend_on_the_others_once_it_is_adapted(consensus):
    cells, z, _ = made(120, 4)
    found = consensus.adapted(cells, z, learns=True)
    rows = np.array([70, 3, 51])
    part, whole = found.calls(cells.take(rows), z[rows]), found.calls(cells, z)
    np.testing.assert_allclose(part.probability, whole.probability[rows], atol=1e-5)


def test_adapting_to_one_query_does_not_change_the_next(consensus):
    cells, z, _ = made(120, 5)
    before = consensus.calls(cells, z).probability
    consensus.adapted(cells, z + 1, learns=True)
    np.testing.assert_array_equal(consensus.calls(cells, z).probability, before)


def test_saved_and_read_it_says_the_same(consensus):
    arrays = consensus.arrays()
    np.testing.assert_array_equal(of_member(arrays, "integrated")["said"], consensus.integrated.said)
    again = Consensus.from_arrays(arrays, K, consensus.integrated)
    cells, z, _ = made(60, 6)
    np.testing.assert_array_equal(again.calls(cells, z).probability, consensus.calls(cells, z).probability)
    one, two = (each.adapted(cells, z, learns=True).calls(cells, z) for each in (consensus, again))
    np.testing.assert_array_equal(one.probability, two.probability)


def test_where_nothing_could_be_held_out_nothing_is_unknown(members):
    cells, z, code = made(3, 7)
    probe = replace(members[0], held_out=None)
    index = replace(members[1], held_out=None)
    found = Consensus.fit(probe, index, Stubborn(np.full(K, 1 / 3, dtype=np.float32), right(code)), code)
    assert not (found.calls(cells, z).novelty > found.calibration.threshold).any()
