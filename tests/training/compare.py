"""What the tests of interrupted and of parallel runs compare."""

from __future__ import annotations

from pathlib import Path

import torch

from scdiva.training.checkpoints import CheckpointFolder
from scdiva.training.record import read_log

_TIMED = {"cells_per_s", "tokens_per_s", "share_of_peak"}


def rows_without_times(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in _TIMED} for row in read_log(folder / "log.csv")]


def newest_checkpoint(folder: Path) -> dict:
    return torch.load(CheckpointFolder(folder / "checkpoints").newest_good()[1], weights_only=True)


def assert_same(left, right, where):
    # Loading may turn a tuple of settings into a list.
    assert type(left) is type(right) or {type(left), type(right)} == {list, tuple}, where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_same(*pair, f"{where}.{i}")
    else:
        assert left == right, where


def assert_same_run(left: Path, right: Path) -> None:
    """Log, newest checkpoint and kept weights are equal bit for bit, times aside."""
    assert rows_without_times(left) == rows_without_times(right)
    one, other = newest_checkpoint(left), newest_checkpoint(right)
    assert any(key.startswith("ema.") for key in one["state_dict"])
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(one[key], other[key], key)
    assert (left / "best.safetensors").read_bytes() == (right / "best.safetensors").read_bytes()
