"""A run that is killed at any moment and started again equals one that was never interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from compare import assert_same_run, rows_without_times

HERE = Path(__file__).parent


@pytest.mark.parametrize(("workers", "accumulate"), [(0, 1), (2, 3)])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, workers, accumulate):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(HERE / "kill_and_resume.py"), str(tmp_path), str(workers), str(accumulate)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    assert_same_run(killed, whole)
    rows = rows_without_times(killed)
    assert [int(row["step"]) for row in rows if row["split"] == "train"] == list(range(2, 61, 2))
    assert [int(row["step"]) for row in rows if row["split"] == "heldout"] == [0, *range(9, 60, 9), 60]
    assert int(rows[-2]["n_cells_seen"]) == 60 * 16 * accumulate
    assert not [path for path in killed.rglob(".tmp-*") if path.parent.name == "checkpoints"]
    assert len(list((killed / "checkpoints").glob("*.ckpt"))) == 2
