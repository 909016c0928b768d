from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdiva.data.splits import hold_out
from scdiva.errors import SourceError


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_every_cell_is_on_one_side(groups, fraction, seed):
    train, heldout = hold_out(groups, fraction, np.random.default_rng(seed))
    np.testing.assert_array_equal(np.sort(np.concatenate([train, heldout])), np.arange(len(groups)))
    assert len(train) >= 1
    assert len(heldout) >= 1
    assert (np.diff(train) > 0).all()
    assert (np.diff(heldout) > 0).all()


def test_whole_groups_are_held_out_and_the_share_is_near_the_wanted_one():
    groups = np.repeat([f"donor {i}" for i in range(10)], 20)
    train, heldout = hold_out(groups, 0.2, np.random.default_rng(0))
    assert set(groups[train]).isdisjoint(groups[heldout])
    assert len(heldout) == 40


@pytest.mark.parametrize("seed", range(8))
def test_a_group_much_larger_than_wanted_is_never_held_out(seed):
    groups = np.array(["large"] * 90 + ["small"] * 10)
    _, heldout = hold_out(groups, 0.1, np.random.default_rng(seed))
    assert set(groups[heldout]) == {"small"}


def test_one_group_is_split_by_cells():
    train, heldout = hold_out(["a"] * 50, 0.1, np.random.default_rng(0))
    assert (len(train), len(heldout)) == (45, 5)


def test_the_split_is_seeded():
    groups = np.repeat(np.arange(12), 5)
    first, again, *others = (hold_out(groups, 0.2, np.random.default_rng(s))[1] for s in (0, 0, 1, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert any(set(first) != set(other) for other in others)


@pytest.mark.parametrize("groups", [[], ["a"]])
def test_fewer_than_two_cells_cannot_be_split(groups):
    with pytest.raises(SourceError, match=f"{len(groups)} cell"):
        hold_out(groups, 0.5, np.random.default_rng(0))
