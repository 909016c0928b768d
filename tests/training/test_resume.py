"""A run that is killed at any moment and started again equals one that was never interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scdiva.training.checkpoints import CheckpointFolder
from scdiva.training.record import read_log

HERE = Path(__file__).parent


def rows_without_times(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "cells_per_s"} for row in read_log(folder / "log.csv")]


def assert_same(left, right, where="checkpoint"):
    assert type(left) is type(right), where
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


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, workers):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    script = HERE / "kill_and_resume.py"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(workers)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    rows = rows_without_times(killed)
    assert rows == rows_without_times(whole)
    assert [int(row["step"]) for row in rows if row["split"] == "train"] == list(range(2, 61, 2))
    assert [int(row["step"]) for row in rows if row["split"] == "heldout"] == [0, *range(9, 60, 9), 60]

    left, right = (
        torch.load(CheckpointFolder(folder / "checkpoints").newest_good()[1], weights_only=True)
        for folder in (whole, killed)
    )
    assert any(key.startswith("ema.") for key in left["state_dict"])
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same(left[key], right[key])
    assert (whole / "best.safetensors").read_bytes() == (killed / "best.safetensors").read_bytes()
    assert not [path for path in killed.rglob(".tmp-*") if path.parent.name == "checkpoints"]
    assert len(list((killed / "checkpoints").glob("*.ckpt"))) == 2
