"""Two processes under torchrun train one model: with DDP, and with FSDP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_same_run, newest_checkpoint
from safetensors.torch import load_file
from toy import N_GENES, Split, ToyObjective, TrunkObjective, toy_config
from two_processes import OPTIM, TRUNK

from scdiva.errors import TrainingError
from scdiva.nn import Packing
from scdiva.training import fit
from scdiva.training.record import read_log

pytestmark = pytest.mark.slow
STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("two_processes")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = Path(__file__).parent / "two_processes.py"
    done = subprocess.run(
        [*command, str(script), str(out)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def told(runs: Path, name: str) -> list[dict]:
    """What the two processes report of a call."""
    return [json.loads((runs / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


def train_rows(runs: Path, name: str) -> list[dict[str, str]]:
    return [row for row in read_log(runs / name / "log.csv") if row["split"] == "train"]


@pytest.mark.parametrize("name", ["toy-20", "ddp-20", "fsdp-20"])
def test_both_processes_end_with_the_same_weights(runs, name):
    weights = [torch.load(runs / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    best = load_file(runs / name.removesuffix("-20") / "best.safetensors")
    assert best.keys() == weights[0].keys()
    for key, value in best.items():
        assert torch.equal(weights[0][key], value)
        assert torch.equal(weights[1][key], value)


def test_processes_take_disjoint_cells_and_losses_are_means_over_them(runs):
    reports = told(runs, "toy-10")
    rows = train_rows(runs, "toy")
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert int(rows[-1]["n_cells_seen"]) == 20 * 32
    seen = [set(np.concatenate(report["cells"][:7])) for report in reports]  # of an epoch of 7.5 steps
    assert not seen[0] & seen[1]
    for step in range(10):
        mean = np.mean([report["losses"][step] for report in reports])
        assert float(rows[step]["loss"]) == pytest.approx(mean, rel=1e-12)


def test_heldout_cells_are_shared_out_and_each_counted_once(runs, tmp_path):
    split = Split()
    fit(
        ToyObjective(),
        split.collection,
        train_indices=split.train,
        heldout_indices=split.heldout,
        config=toy_config(max_steps=1),
        out_dir=tmp_path,
        progress=False,
    )
    both, single = read_log(runs / "toy" / "log.csv"), read_log(tmp_path / "log.csv")
    assert both[0]["split"] == single[0]["split"] == "heldout"
    assert float(both[0]["loss"]) == pytest.approx(float(single[0]["loss"]), rel=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_do_what_one_would_with_all_their_cells(runs, strategy):
    reports = told(runs, f"{strategy}-whole-20")
    cells = np.array([report["cells"] for report in reports]).reshape(2, 20, 2, 8)  # process, step, minibatch, cell
    is_rare_used = (Split().collection.counts[:, 0].toarray()[cells, 0] == 9).any(-1)
    assert (is_rare_used.any(-1).sum(0) == 1).any(), "no step in which one process alone uses the parameter"
    assert (is_rare_used[..., 0] & ~is_rare_used[..., 1]).any(), "no step whose last minibatch leaves it unused"
    steps = cells.transpose(1, 0, 2, 3).reshape(20, 32)
    expected, average, norms, losses = by_hand(steps, unused_gradient_is_zero=strategy == "fsdp")
    state = newest_checkpoint(runs / f"{strategy}-whole")["state_dict"]
    for key, value in expected.items():
        torch.testing.assert_close(state[f"objective.{key}"], value, rtol=1e-5, atol=5e-6)
        torch.testing.assert_close(state[f"ema.module.{key}"], average[key], rtol=1e-5, atol=5e-6)
    rows = train_rows(runs, f"{strategy}-whole")
    np.testing.assert_allclose([float(row["loss"]) for row in rows], losses, rtol=1e-5)
    np.testing.assert_allclose([float(row["grad_norm"]) for row in rows], norms, rtol=1e-4)


def by_hand(steps: np.ndarray, *, unused_gradient_is_zero: bool) -> tuple[dict, dict, list[float], list[float]]:
    """Train on whole minibatches in one process, in plain torch; return weights, their average, norms and losses."""
    objective, cells = TrunkObjective(), Split().collection
    parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    decayed = [p for name, p in parameters.items() if p.ndim > 1 and "embed" not in name]
    free = [p for name, p in parameters.items() if p.ndim <= 1 or "embed" in name]
    groups = [
        {"params": decayed, "weight_decay": OPTIM["weight_decay"]},
        {"params": free, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    average = {name: p.detach().clone() for name, p in parameters.items()}
    norms, losses = [], []
    for n_done, step in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * min(1.0, (n_done + 1) / 3)
        optimizer.zero_grad()
        output = objective(objective.prepare(cells.read(step), np.random.default_rng(0)), torch.Generator())
        output.loss.backward()
        if unused_gradient_is_zero and objective.rare.grad is None:
            objective.rare.grad = torch.zeros_like(objective.rare)
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIM["clip_norm"])))
        losses.append(float(output.loss.detach()))
        optimizer.step()
        decay = min(0.9, (1 + n_done) / (10 + n_done))
        for name, p in parameters.items():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    return {name: p.detach() for name, p in parameters.items()}, average, norms, losses


def test_fsdp_halves_weights_average_and_moments(runs):
    for ddp, fsdp in zip(told(runs, "ddp-20"), told(runs, "fsdp-20"), strict=True):
        assert ddp["shares"] == [1.0] * 3
        assert all(0.45 < share < 0.55 for share in fsdp["shares"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_resumed_run_equals_an_uninterrupted_one(runs, strategy):
    assert_same_run(runs / strategy, runs / f"{strategy}-whole")


@pytest.mark.parametrize("name", ["toy", *STRATEGIES])
def test_only_the_first_process_writes_and_each_file_once(runs, name):
    first, second = told(runs, f"{name}-10")
    assert second["writes"] == []
    once = ["config.toml", "run.json", "RunLog", "step-00000005.ckpt", "step-00000010.ckpt", "result.json"]
    assert [first["writes"].count(file) for file in once] == [1] * len(once)
    n_best = len(list_of_improvements(runs / name, until=10))
    assert first["writes"].count("best.safetensors") == n_best > 0


def list_of_improvements(folder: Path, until: int) -> list[float]:
    best: list[float] = []
    for row in read_log(folder / "log.csv"):
        if row["split"] == "heldout" and int(row["step"]) <= until and (not best or float(row["loss"]) < best[-1]):
            best.append(float(row["loss"]))
    return best


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_and_peaks_are_summed_over_processes(runs, strategy):
    n_tokens = N_GENES - 1
    flops_per_token = TrunkObjective().trunk.flops(Packing((n_tokens,))) / n_tokens
    for row in train_rows(runs, strategy):
        tokens_per_s = float(row["tokens_per_s"])
        assert tokens_per_s == pytest.approx(n_tokens * float(row["cells_per_s"]), rel=1e-9)
        assert float(row["share_of_peak"]) == pytest.approx(3 * tokens_per_s * flops_per_token / 3e6, rel=1e-9)


def test_fsdp_is_refused_where_there_is_nothing_to_shard(tmp_path):
    split = Split()
    with pytest.raises(TrainingError, match="without transformer blocks"):
        fit(
            ToyObjective(),
            split.collection,
            train_indices=split.train,
            heldout_indices=split.heldout,
            config=toy_config(strategy="fsdp", n_devices=2),
            out_dir=tmp_path / "run",
            progress=False,
        )
    assert not (tmp_path / "run").exists()


def test_one_process_shares_nothing(tmp_path):
    split = Split()
    losses = {}
    for strategy in STRATEGIES:
        settings = TRUNK | {"n_devices": 1, "strategy": strategy, "max_steps": 3}
        result = fit(
            TrunkObjective(),
            split.collection,
            train_indices=split.train,
            heldout_indices=split.heldout,
            config=toy_config(**settings),
            out_dir=tmp_path / strategy,
            progress=False,
        )
        losses[strategy] = [row["loss"] for row in read_log(result.history)]
    assert losses["ddp"] == losses["fsdp"]
