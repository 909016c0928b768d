"""A golden tiny run: a refactor that claims to change nothing reproduces these losses."""

from __future__ import annotations

import pytest

from scdiva.config import RunConfig
from scdiva.datasets import synthetic_cells
from scdiva.tasks.pretrain import pretrain
from scdiva.training.record import read_log

# nats per UMI at steps 2, 4, ..., 10, float32 on a CPU; other BLAS libraries differ in the sixth digit
GOLDEN_TRAINING = [4.0436, 4.00438, 3.97568, 3.96287, 3.95515]
GOLDEN_HELDOUT = [4.0043, 3.94949, 3.91598]


def test_a_tiny_run_reproduces_its_losses(tmp_path):
    synthetic_cells(300, 200, seed=5).write_h5ad(tmp_path / "cells.h5ad")
    config = RunConfig.model_validate(
        {
            "seed": 7,
            "data": {
                "root": str(tmp_path),
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
    )
    trained = pretrain(config, tmp_path / "run", progress=False)
    rows = read_log(trained.fit.history)
    training = [float(row["profile_nll"]) for row in rows if row["split"] == "train"]
    heldout = [float(row["profile_nll"]) for row in rows if row["split"] == "heldout"]
    assert training == pytest.approx(GOLDEN_TRAINING, rel=1e-4)
    assert heldout == pytest.approx(GOLDEN_HELDOUT, rel=1e-4)
