"""Golden tiny runs: a refactor that claims to change nothing reproduces these losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scdiva.config import RunConfig
from scdiva.datasets import synthetic_cells
from scdiva.tasks.pretrain import pretrain
from scdiva.training.record import read_log

# float32 on a CPU; other BLAS libraries differ in the sixth digit
CLOSE = 1e-4


def run(folder: Path, **changes: dict[str, Any]) -> list[dict[str, str]]:
    """Train on 300 synthetic cells, and return the log."""
    synthetic_cells(300, 200, seed=5).write_h5ad(folder / "cells.h5ad")
    values: dict[str, dict[str, Any]] = {
        "data": {
            "root": str(folder),
            "files": ({"path": "cells.h5ad", "batch_key": "batch"},),
            "heldout_fraction": 0.3,
        },
        "model": {"n_latent": 6, "n_embedding": 8, "n_hidden": 16},
        "objective": {"kl_weight": 1e-3, "latent_noise": 0.1},
        "optim": {"lr": 1e-2, "warmup_steps": 3},
        "training": {
            "max_steps": 10,
            "batch_size": 32,
            "validate_every": 5,
            "log_every": 2,
            "precision": "fp32",
            "device": "cpu",
        },
    }
    for section, more in changes.items():
        values[section] |= more
    config = RunConfig.model_validate({"seed": 7, **values})
    return read_log(pretrain(config, folder / "run", progress=False).fit.history)


def column(rows: list[dict[str, str]], split: str, name: str) -> list[float]:
    return [float(row[name]) for row in rows if row["split"] == split]


def test_a_tiny_run_of_anchor_and_profile_decoder(tmp_path):
    rows = run(tmp_path, objective={"identity_weight": 0.0, "value_weight": 0.0})
    # nats per UMI at steps 2, 4, ..., 10 and 0, 5, 10
    training = [4.0436, 4.00438, 3.97568, 3.96287, 3.95515]
    heldout = [4.0043, 3.94949, 3.91598]
    assert column(rows, "train", "profile_nll") == pytest.approx(training, rel=CLOSE)
    assert column(rows, "heldout", "profile_nll") == pytest.approx(heldout, rel=CLOSE)


def test_a_tiny_run_with_a_trunk_and_conditions(tmp_path):
    trunk = {"n_layers": 2, "width": 16, "n_heads": 2, "n_hidden": 24, "max_tokens": 60}
    rows = run(
        tmp_path,
        data={"conditions": ("cell_type",)},
        model={"trunk": trunk},
        training={"batch_size": 16, "accumulate": 2, "n_validation_cells": 48},
    )
    # at steps 2, 4, ..., 10 and 0, 5, 10
    golden = {
        ("train", "identity_nll"): [4.60529, 4.72468, 4.66316, 4.5992, 4.64603],
        ("train", "value_nll"): [2.03888, 1.96245, 1.997, 1.96499, 2.01663],
        ("train", "profile_nll"): [4.05926, 3.99023, 3.95337, 4.02069, 3.93279],
        ("heldout", "identity_nll_t0.5"): [4.65402, 4.65445, 4.65465],
        ("heldout", "identity_nll_t0.5_floor"): [4.65402, 4.65402, 4.65402],
        ("heldout", "value_nll_t0.5"): [2.37289, 2.35765, 2.35227],
        ("heldout", "value_mae_t0.9"): [0.45813, 0.45498, 0.46134],
        ("heldout", "profile_nll"): [3.9902, 3.92868, 3.90131],
    }
    for (split, name), values in golden.items():
        assert column(rows, split, name) == pytest.approx(values, rel=CLOSE), (split, name)
