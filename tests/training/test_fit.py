from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from compare import assert_same_run
from lightning.pytorch import Callback
from safetensors.torch import load_file
from toy import N_GENES, MemoryCells, Split, ToyObjective, TrunkObjective, toy_config

from scdiva.errors import NonFiniteLossError, OutputError, TrainingError
from scdiva.nn import Packing
from scdiva.training import draw_curve, fit, uses_bf16
from scdiva.training.checkpoints import CheckpointFolder
from scdiva.training.fit import FitResult
from scdiva.training.record import ProgressReport, RunLog, WeightedMeans, read_log
from scdiva.types import LossOutput


@pytest.fixture(autouse=True)
def _one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def run(out: Path, config=None, objective=None, split=None, **options) -> tuple[FitResult, torch.nn.Module]:
    split, objective = split or Split(), objective or ToyObjective()
    result = fit(
        objective,
        split.collection,
        train_indices=split.train,
        heldout_indices=split.heldout,
        config=config or toy_config(),
        out_dir=out,
        **options,
    )
    return result, objective


def losses(result: FitResult, split: str = "train") -> dict[int, float]:
    return {int(row["step"]): float(row["loss"]) for row in read_log(result.history) if row["split"] == split}


class Explodes(ToyObjective):
    """Gives NaN in one training step."""

    def __init__(self, step: int, value: float = math.nan) -> None:
        super().__init__()
        self.bad_step, self.value, self.n_calls = step, value, 0

    def forward(self, inputs, generator) -> LossOutput:
        output = super().forward(inputs, generator)
        self.n_calls += self.training
        return LossOutput(output.loss * (self.value if self.n_calls == self.bad_step else 1.0), {}, output.n_cells)


class GetsWorse(ToyObjective):
    """Its held-out loss is lowest at a chosen step; the weight drifts by one per step."""

    def __init__(self, best_step: int) -> None:
        super().__init__()
        self.best_step = best_step
        self.drift = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs, generator) -> LossOutput:
        output = super().forward(inputs, generator)
        if self.training:
            return LossOutput(output.loss * 0 - self.drift, {}, output.n_cells)
        return LossOutput((self.drift - self.best_step).abs(), {}, output.n_cells)


def test_a_run_learns_and_leaves_its_files(tmp_path):
    result, objective = run(tmp_path, toy_config(max_steps=120, validate_every=20))
    heldout = losses(result, "heldout")
    assert list(heldout) == [0, 20, 40, 60, 80, 100, 120]
    assert result.best_value == min(heldout.values()) < 0.7 * heldout[0]
    assert heldout[result.best_step] == result.best_value
    assert (result.last_step, result.n_cells, result.stopped_because) == (120, 120 * 16, "max_steps")
    assert not objective.training
    best = load_file(result.best_weights)
    assert all(torch.equal(best[name], value) for name, value in objective.state_dict().items())
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.toml", "run.json", "result.json", "curve.png", "log.csv", "tensorboard"} <= names
    assert "lightning_logs" not in names
    row = read_log(result.history)[1]
    assert list(row) == [
        "step",
        "split",
        "loss",
        "mse",
        "variance_floor",
        "lr",
        "grad_norm",
        "cells_per_s",
        "n_cells_seen",
    ]
    assert (float(row["lr"]), int(row["n_cells_seen"])) == (pytest.approx(0.01 / 3), 16)


def test_nothing_reaches_the_users_terminal(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path)
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("lightning.pytorch").level != logging.ERROR


def test_global_random_state_is_left_alone(tmp_path):
    objective = ToyObjective()
    before = torch.get_rng_state()
    run(tmp_path, objective=objective)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_finished_run_returns_at_once(tmp_path):
    first, trained = run(tmp_path)
    split = Split()
    second, objective = run(tmp_path, split=split)
    assert second == first
    assert split.collection.reads == []
    assert torch.equal(objective.layers[0].weight, trained.layers[0].weight)


def test_more_steps_go_on_from_the_end(tmp_path):
    constant = {"schedule": "constant"}
    run(tmp_path / "a", toy_config(optim=constant, max_steps=12, checkpoint_every=100))
    extended, _ = run(tmp_path / "a", toy_config(optim=constant, max_steps=30, checkpoint_every=100, log_every=3))
    whole, _ = run(tmp_path / "b", toy_config(optim=constant, max_steps=30))
    assert extended.last_step == 30
    assert extended.minutes > 0
    tail = {step: loss for step, loss in losses(extended).items() if step <= 12}
    assert tail == {step: loss for step, loss in losses(whole).items() if step <= 12}
    assert losses(extended, "heldout")[30] == losses(whole, "heldout")[30]


def test_rows_of_the_log_are_means_over_their_steps(tmp_path):
    every, _ = run(tmp_path / "a", toy_config(log_every=1))
    fifth, _ = run(tmp_path / "b", toy_config(log_every=5))
    single = losses(every)
    for step, loss in losses(fifth).items():
        assert loss == pytest.approx(np.mean([single[s] for s in range(step - 4, step + 1)]), rel=1e-12)


def test_accumulated_minibatches_are_one_large_one(tmp_path):
    # One epoch is one step, so both take the same cells; dropout, noise and order have no part in this objective.
    split = Split(train=np.arange(16))
    settings = {"optim": {"warmup_steps": 0}, "max_steps": 4, "validate_every": 1}
    large, one = run(tmp_path / "a", toy_config(batch_size=16, **settings), TrunkObjective(), split)
    small, other = run(tmp_path / "b", toy_config(batch_size=8, accumulate=2, **settings), TrunkObjective(), split)
    for row, twin in zip(read_log(large.history), read_log(small.history), strict=True):
        # AdamW forgets the scale of a gradient; its norm does not.
        for key in ("step", "loss", "grad_norm", "lr", "n_cells_seen"):
            assert (float(row[key]) if row[key] else None) == pytest.approx(float(twin[key]) if twin[key] else None)
    assert (small.last_step, small.n_cells) == (large.last_step, large.n_cells) == (4, 64)
    start = dict(TrunkObjective().named_parameters())
    for key, value in one.named_parameters():
        torch.testing.assert_close(value, dict(other.named_parameters())[key], rtol=1e-5, atol=1e-6)
    assert not torch.equal(one.head, start["head"])


def test_rows_of_the_log_are_means_over_all_accumulated_minibatches(tmp_path):
    class Losses(Callback):
        def __init__(self):
            self.values, self.steps = [], []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.values.append(float(pl_module.parts[-1].output.loss))
            self.steps.append(trainer.global_step)

    recorder = Losses()
    result, _ = run(tmp_path, toy_config(accumulate=3, log_every=2, max_steps=10), callbacks=[recorder])
    assert recorder.steps == [(i + 1) // 3 for i in range(30)]
    for step, loss in losses(result).items():
        assert loss == pytest.approx(np.mean(recorder.values[3 * step - 6 : 3 * step]), rel=1e-12)
    assert result.n_cells == 10 * 3 * 16


def test_an_interrupted_accumulation_starts_again_at_its_step(tmp_path):
    class Interrupts(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch.number == 20:  # the second of three minibatches of step 7
                raise KeyboardInterrupt

    config = toy_config(accumulate=3, max_steps=12, checkpoint_every=4, log_every=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", config, callbacks=[Interrupts()])
    resumed, _ = run(tmp_path / "a", config, callbacks=[recorder := Recorder()])
    assert min(recorder.cells) == 4
    assert_same_run(resumed.history.parent, run(tmp_path / "b", config)[0].history.parent)


def test_the_failed_one_of_accumulated_minibatches_is_named(tmp_path):
    config = toy_config(accumulate=3)
    with pytest.raises(NonFiniteLossError, match="at step 5") as caught:
        run(tmp_path / "a", config, Explodes(14))
    numbered = {}

    class Numbers(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            numbered[batch.number] = batch.cell_index

    run(tmp_path / "b", config, callbacks=[Numbers()])
    assert ", ".join(f"toy.h5ad cell {i}" for i in numbered[13][:5]) + " and 11 more" in caught.value.found


def test_held_out_cells_have_their_own_preparation(tmp_path):
    class Exam(ToyObjective):
        def prepare_heldout(self, cells, rng):
            inputs = self.prepare(cells, rng)
            return type(inputs)(inputs.x_BG, torch.full_like(inputs.noise_B, 1e3))

    result, _ = run(tmp_path, objective=Exam())
    assert min(losses(result, "heldout").values()) > 1e5 > max(losses(result).values())


def test_throughput_is_logged_where_the_objective_reports_it(tmp_path, monkeypatch, caplog):
    measured = []

    def peak(device, dtype):
        measured.append((device.type, dtype))
        return 2e6

    monkeypatch.setattr(sys.modules[fit.__module__], "measured_peak", peak)
    caplog.set_level(logging.INFO)
    for max_steps in (6, 9):
        config = toy_config(accumulate=2, log_every=3, max_steps=max_steps)
        result, _ = run(tmp_path / "a", config, TrunkObjective())
        assert len(measured) == max_steps // 3 - 1  # once per call
    assert measured[0] == ("cpu", torch.float32)
    rows = [row for row in read_log(result.history) if row["split"] == "train"]
    assert len(rows) == 3
    n_tokens = N_GENES - 1
    flops_per_token = TrunkObjective().trunk.flops(Packing((n_tokens,))) / n_tokens
    for row in rows:
        tokens_per_s = float(row["tokens_per_s"])
        assert tokens_per_s == pytest.approx(n_tokens * float(row["cells_per_s"]), rel=1e-9)
        assert float(row["share_of_peak"]) == pytest.approx(3 * tokens_per_s * flops_per_token / 2e6, rel=1e-9)
    assert "tokens per s" in caplog.text
    assert "share of peak" in caplog.text
    silent, _ = run(tmp_path / "b")
    assert not {"tokens_per_s", "share_of_peak"} & read_log(silent.history)[-1].keys()
    assert len(measured) == 2


def test_another_configuration_is_refused(tmp_path):
    run(tmp_path)
    for config, keys in [
        (toy_config(optim={"lr": 0.02, "clip_norm": 2.0}), r"optim\.clip_norm, optim\.lr"),
        (toy_config(seed=9), "seed"),
        (toy_config(batch_size=8), r"training\.batch_size"),
        (toy_config(accumulate=2), r"training\.accumulate"),
        (toy_config(strategy="fsdp"), r"training\.strategy"),
    ]:
        with pytest.raises(TrainingError, match=keys):
            run(tmp_path, config)


def test_other_cells_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(TrainingError, match="other cells"):
        run(tmp_path, split=Split(train=np.arange(230)))


def test_overlap_of_train_and_heldout_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="61 held-out cells"):
        run(tmp_path, split=Split(train=np.arange(301), collection=MemoryCells(301), heldout=np.arange(240, 301)))


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OutputError, match="taken"):
        run(tmp_path / "taken")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no checksum", "empty checksum"])
def test_a_damaged_checkpoint_is_skipped(tmp_path, damage, caplog):
    whole, _ = run(tmp_path / "a", toy_config(checkpoint_every=4))
    run(tmp_path / "b", toy_config(checkpoint_every=4))
    folder = CheckpointFolder(tmp_path / "b" / "checkpoints")
    step, newest = folder.newest_good()
    assert step == 30
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    elif damage == "no checksum":
        newest.with_suffix(".sha256").unlink()
    else:
        newest.with_suffix(".sha256").write_text("")
    (tmp_path / "b" / "result.json").unlink()
    assert folder.newest_good()[0] == 28
    assert "step-00000030.ckpt is damaged" in caplog.text
    again, _ = run(tmp_path / "b", toy_config(checkpoint_every=4))
    assert (losses(again), losses(again, "heldout")) == (losses(whole), losses(whole, "heldout"))


def test_checkpoints_hold_no_objects(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, ("true",))

    folder = CheckpointFolder(tmp_path)
    folder.io.save_checkpoint({"x": Evil()}, folder.path(1))
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        folder.io.load_checkpoint(folder.path(1), weights_only=False)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, value):
    with pytest.raises(NonFiniteLossError) as caught:
        run(tmp_path, objective=Explodes(13, value))
    found = caught.value.found
    assert "at step 13" in found
    assert "toy.h5ad cell" in found
    assert "and 11 more" in found
    assert "step-00000010.ckpt" in found
    assert CheckpointFolder(tmp_path / "checkpoints").newest_good()[0] == 10
    # The named cells are those of step 13 of a healthy run.
    result, _ = run(tmp_path / "healthy", callbacks=[recorder := Recorder()])
    assert ", ".join(f"toy.h5ad cell {i}" for i in recorder.cells[13][:5]) in found
    # From the checkpoint on, with the cause gone, the run is as if nothing had happened.
    repaired, _ = run(tmp_path)
    assert losses(repaired) == losses(result)


def test_a_heldout_loss_that_is_not_finite_stops_the_run(tmp_path):
    class Broken(ToyObjective):
        def forward(self, inputs, generator):
            output = super().forward(inputs, generator)
            return output if self.training else LossOutput(output.loss * math.nan, {}, output.n_cells)

    with pytest.raises(NonFiniteLossError, match=r"held-out loss is nan after step 0; cells: toy.h5ad cell 240"):
        run(tmp_path, objective=Broken())


def test_ctrl_c_stays_ctrl_c_and_the_run_can_go_on(tmp_path):
    class Interrupts(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 13:
                raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", callbacks=[Interrupts()])
    assert signal.getsignal(signal.SIGINT) == before
    assert losses(run(tmp_path / "a")[0]) == losses(run(tmp_path / "b")[0])


class Recorder(Callback):
    def __init__(self) -> None:
        self.cells = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.cells[trainer.global_step] = batch.cell_index.tolist()


def drifting(**training) -> object:
    # AdamW without warm-up or decay moves a parameter with a constant gradient by lr per step.
    optim = {"lr": 1.0, "warmup_steps": 0, "schedule": "constant", "ema_decay": 0.0, "weight_decay": 0.0}
    return toy_config(optim=optim, **({"validate_every": 2, "max_steps": 40} | training))


def test_patience_stops_and_restores_the_best(tmp_path):
    result, objective = run(tmp_path, drifting(patience=3), GetsWorse(best_step=8))
    assert (result.stopped_because, result.best_step, result.last_step) == ("patience", 8, 14)
    assert float(objective.drift.detach()) == pytest.approx(8, rel=1e-4)
    again, _ = run(tmp_path, drifting(patience=3, max_steps=100), GetsWorse(best_step=8))
    assert again == result


def test_the_initial_weights_can_be_the_best(tmp_path):
    result, objective = run(tmp_path, drifting(patience=2), GetsWorse(best_step=-5))
    assert (result.best_step, result.last_step) == (0, 4)
    assert float(objective.drift.detach()) == 0.0


def test_monitor_another_term(tmp_path):
    result, _ = run(tmp_path / "a", monitor="variance_floor")
    assert result.best_step == 0  # a constant of the data never improves
    with pytest.raises(TrainingError, match=r"'accuracy'.*loss, mse, variance_floor"):
        run(tmp_path / "b", monitor="accuracy")


def test_without_heldout_cells_the_last_weights_are_kept(tmp_path):
    split = Split(heldout=np.empty(0, dtype=np.int64))
    result, objective = run(tmp_path, toy_config(optim={"ema_decay": 0.0}), split=split)
    assert (result.best_step, result.best_value) == (30, None)
    last = torch.load(tmp_path / "checkpoints" / "step-00000030.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(last["objective.layers.0.weight"], objective.layers[0].weight)
    with pytest.raises(TrainingError, match="patience"):
        run(tmp_path / "b", toy_config(patience=1), split=split)


def test_max_minutes_counts_over_calls(tmp_path):
    result, _ = run(tmp_path, toy_config(max_minutes=1e-9))
    assert (result.stopped_because, result.last_step) == ("max_minutes", 0)
    again, _ = run(tmp_path, toy_config(max_minutes=1e-9))
    assert again == result
    more, _ = run(tmp_path, toy_config(max_minutes=0.0))
    assert (more.stopped_because, more.last_step) == ("max_steps", 30)
    assert losses(more) == losses(run(tmp_path / "b")[0])


def test_the_value_that_is_kept_is_that_of_the_averaged_weights(tmp_path):
    result, objective = run(tmp_path)
    last = torch.load(tmp_path / "checkpoints" / "step-00000030.ckpt", weights_only=True)["state_dict"]
    kept = load_file(result.best_weights)["layers.0.weight"]
    if result.best_step == 30:
        assert torch.equal(kept, last["ema.module.layers.0.weight"])
    assert not torch.equal(last["ema.module.layers.0.weight"], last["objective.layers.0.weight"])
    assert objective.n_seen == result.best_step * 16  # buffers are copied, not averaged


def test_tied_weights_survive(tmp_path):
    class Tied(ToyObjective):
        def __init__(self):
            super().__init__()
            self.same = self.layers[0]

    _, objective = run(tmp_path, objective=Tied())
    assert objective.same is objective.layers[0]


def test_tiny_corpus_and_workers(tmp_path):
    split = Split(collection=MemoryCells(6), train=np.arange(5), heldout=np.array([5]))
    result, _ = run(tmp_path, toy_config(workers=2), split=split)
    assert (result.last_step, result.n_cells) == (30, 150)


def test_bf16_runs(tmp_path):
    fp32, _ = run(tmp_path / "a", toy_config(precision="fp32"))
    bf16, _ = run(tmp_path / "b", toy_config(precision="bf16"))
    assert losses(bf16) != losses(fp32)
    assert bf16.best_value == pytest.approx(fp32.best_value, rel=0.1)


def test_precision_by_name():
    assert uses_bf16("bf16", "cpu")
    assert not uses_bf16("fp32", "cuda")
    assert uses_bf16("auto", "cpu") in (True, False)


def test_cuda_is_refused_where_there_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(TrainingError, match="0 CUDA devices"):
        run(tmp_path, toy_config(device="cuda"))


@pytest.mark.parametrize("n_devices", [1, 3])
def test_torchrun_with_another_number_of_processes_is_refused(tmp_path, monkeypatch, n_devices):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=f"2 processes per machine, and training.n_devices = {n_devices}"):
        run(tmp_path / "run", toy_config(n_devices=n_devices))
    assert not (tmp_path / "run").exists()


def test_old_checkpoints_are_deleted(tmp_path):
    run(tmp_path, toy_config(checkpoint_every=3, keep_checkpoints=3))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    steps = (24, 27, 30)
    assert names == [f"step-{step:08d}.{end}" for step in steps for end in ("ckpt", "sha256")]


def test_log_drops_cut_rows_and_takes_new_columns(tmp_path):
    writer = RunLog(tmp_path, last_step=-1)
    writer.write(1, "train", {"loss": 1.0, "lr": 0.1})
    writer.write(2, "train", {"loss": 0.1 + 0.2, "identity": 3.0, "lr": 0.1})
    writer.write(3, "train", {"loss": 0.5})
    writer.close()
    with writer.path.open("a") as file:
        file.write("1,tra")  # killed while writing
    resumed = RunLog(tmp_path, last_step=2)
    resumed.close()
    rows = read_log(resumed.path)
    assert [row["step"] for row in rows] == ["1", "2"]
    assert (rows[0]["identity"], float(rows[1]["loss"])) == ("", 0.1 + 0.2)


def test_weighted_means():
    means = WeightedMeans()
    means.add({"loss": torch.tensor(1.0), "only here": torch.tensor(5.0)}, 1)
    means.add({"loss": torch.tensor(4.0)}, 2)
    means.add({"loss": torch.tensor(99.0)}, 0)
    assert means.over_processes() == {"loss": 3.0, "only here": 5.0}
    copied = WeightedMeans()
    copied.load_state_dict(json.loads(json.dumps(means.state_dict())), torch.device("cpu"))
    assert copied.over_processes() == means.over_processes()


def test_curve_needs_rows_and_draws_floors(tmp_path):
    result, _ = run(tmp_path)
    draw_curve(result.history, tmp_path / "x.png", key="mse")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(TrainingError, match="accuracy"):
        draw_curve(result.history, tmp_path / "y.png", key="accuracy")
    assert not (tmp_path / "y.png").exists()


def test_progress_writes_lines_where_there_is_no_terminal(caplog):
    caplog.set_level(logging.INFO)
    report = ProgressReport(is_on=True, every_seconds=0)
    report.start(0, 10)
    report.update(1)
    report.update(2, loss=0.123456, cells_per_s=1000.0)
    report.stop()
    assert caplog.messages == ["step 2 of 10: loss 0.1235, cells per s 1000"]


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    report = ProgressReport(is_on=True)
    report.start(0, 10)
    report.update(5, loss=0.5)
    assert report._bar is not None
    assert report._bar.tasks[0].completed == 5
    assert report._bar.tasks[0].description == "loss 0.5"
    report.stop()
