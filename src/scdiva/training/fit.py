"""Train an objective on a collection of cells: one call, resumable at any moment by the same call.

A run is a folder::

    config.toml          the configuration; a later call must agree with it
    run.json             fingerprint of the cells and number of processes; a later call must agree with it
    checkpoints/         the newest few, with checksums
    log.csv tensorboard/ losses over steps
    best.safetensors     averaged weights with the lowest held-out loss so far
    result.json          written when the run is finished
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from scdiva.config import LoopConfig, TrainingConfig, atomic_path, changed_keys, load_config, save_config
from scdiva.data.loader import Minibatch, MinibatchLoader, fixed_minibatches
from scdiva.errors import NonFiniteLossError, OutputError, TrainingError
from scdiva.nn.precision import uses_bf16
from scdiva.training.checkpoints import CheckpointFolder
from scdiva.training.curve import draw_curve
from scdiva.training.module import StepPart, TrainingModule, learning_rate_factor
from scdiva.training.peak import measured_peak
from scdiva.training.record import ProgressReport, RunLog, WeightedMeans, read_log
from scdiva.training.sharding import check_shardable, whole_state
from scdiva.types import CellCollection, LossOutput, Objective

log = logging.getLogger(__name__)

StopReason = Literal["max_steps", "patience", "max_minutes"]

# Settings that change how long a run goes on, what it writes and what it is called, not what it computes.
_FREE_KEYS = frozenset({"name", "description", "licence", "data.root"}) | frozenset(
    f"training.{name}" for name in ("max_steps", "max_minutes", "log_every", "checkpoint_every", "keep_checkpoints")
)
_N_NAMED_CELLS = 5
# A backward pass computes two products for each one of the forward pass: for the inputs and for the weights.
_PASSES_PER_STEP = 3


@dataclass(frozen=True, slots=True)
class FitResult:
    """Outcome of a run.

    Parameters
    ----------
    best_step
        Steps after which the kept weights were reached; 0: before training.
    best_value
        Their held-out value of the monitored term; None without held-out cells.
    last_step
        Steps of the whole run, over all calls.
    n_cells
        Cells seen in these steps, repetitions counted.
    cells_per_s
        Cells per second of training, evaluation and checkpoints not counted.
    minutes
        Wall-clock minutes of the whole run, over all calls.
    stopped_because
        ``"max_steps"``, ``"patience"`` or ``"max_minutes"``.
    history
        ``log.csv``.
    best_weights
        ``best.safetensors``: the weights that the objective holds now.
    """

    best_step: int
    best_value: float | None
    last_step: int
    n_cells: int
    cells_per_s: float
    minutes: float
    stopped_because: StopReason
    history: Path
    best_weights: Path


def fit(
    objective: Objective,
    collection: CellCollection,
    *,
    train_indices: NDArray[np.integer] | Sequence[int],
    heldout_indices: NDArray[np.integer] | Sequence[int],
    config: LoopConfig,
    out_dir: str | Path,
    monitor: str = "loss",
    identity: Mapping[str, str] | None = None,
    callbacks: Sequence[pl.Callback] = (),
    progress: bool = True,
) -> FitResult:
    """Train an objective; the same call again goes on where the last one was interrupted.

    Resuming is exact: on the same machine every loss and weight equals that of an uninterrupted run. The objective
    must start from the same weights in each call.

    Parameters
    ----------
    objective
        The loss with its model (an ``nn.Module``). Holds the best weights afterwards, on the CPU, in eval mode. With
        ``training.strategy = "fsdp"`` a sharded copy of it is trained.
    collection
        Where cells are read.
    train_indices, heldout_indices
        Cells to train on and to judge by, as positions in the collection; disjoint. Without held-out cells the last
        weights are kept.
    config
        ``seed``, ``data``, ``optim`` and ``training`` are used; all of it is compared with the folder's configuration.
    out_dir
        Folder of the run.
    identity
        What else the folder belongs to, by name: fingerprints of the cells' content or of the initial weights. A later
        call with other values is refused.
    monitor
        Which held-out value is minimised: ``"loss"``, a term of the loss, or what the objective's
        ``heldout_summary(values)``, if it has one, makes of their means over the held-out cells.
    callbacks
        Further Lightning callbacks. ``on_train_batch_end`` comes after each minibatch, which with
        ``training.accumulate`` is a part of an optimiser step.
    progress
        Show a bar on a terminal, or log a line every minute elsewhere.

    Returns
    -------
    FitResult
        What was reached, and where the files are.

    Raises
    ------
    TrainingError
        The folder holds a run with another configuration or other cells, or a setting is impossible here.
    NonFiniteLossError
        The loss or its gradient became NaN or infinite.
    """
    out = Path(out_dir)
    training = config.training
    train, heldout = (np.asarray(indices, dtype=np.int64) for indices in (train_indices, heldout_indices))
    _check_arguments(train, heldout, config)
    device = _resolve_device(training)
    n_nodes = _machines(training)
    world_size = n_nodes * training.n_devices
    is_sharded = training.strategy == "fsdp" and world_size > 1
    if is_sharded:
        check_shardable(cast(nn.Module, objective))
    cells = _fingerprint(collection, train, heldout)
    _claim_folder(out, config, {"cells": cells, "n_processes": world_size, **(identity or {})})

    finished = _finished(out, training)
    if finished is None:
        checkpoints = CheckpointFolder(out / "checkpoints", training.keep_checkpoints)
        newest = checkpoints.newest_good()
        loop = _Loop(
            objective,
            collection,
            heldout,
            config,
            out,
            monitor,
            checkpoints,
            ProgressReport(is_on=progress and rank_zero_only.rank == 0),
            n_train=len(train),
            n_processes=world_size,
        )
        module = TrainingModule(
            # Sharding is for good: what the caller holds must stay an ordinary module.
            copy.deepcopy(objective) if is_sharded else objective,
            config.optim,
            max_steps=training.max_steps,
            seed=config.seed,
            accumulate=training.accumulate,
            check=loop.check_finite,
        )
        with _tamed_lightning():
            trainer = pl.Trainer(
                max_steps=training.max_steps,
                max_epochs=-1,
                accelerator=device,
                devices=training.n_devices,
                num_nodes=n_nodes,
                strategy=_strategy(world_size, is_sharded=is_sharded),
                accumulate_grad_batches=training.accumulate,
                precision="bf16-mixed" if uses_bf16(training.precision, device) else "32-true",
                callbacks=[loop, *callbacks],
                plugins=[checkpoints.io],
                default_root_dir=out,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                num_sanity_val_steps=0,
                use_distributed_sampler=False,
            )
            trainer.fit(
                module,
                datamodule=_TrainingData(collection, train, objective, config),
                ckpt_path=newest and newest[1],
                weights_only=True,
            )
            finished = loop.finish(trainer)
            trainer.strategy.barrier("scdiva.fit")
    load_model(cast(nn.Module, objective), out / "best.safetensors", strict=True)
    cast(nn.Module, objective).eval()
    return finished


class _TrainingData(pl.LightningDataModule):
    """Gives Lightning the stream of minibatches, from the step that was restored."""

    def __init__(
        self, collection: CellCollection, indices: NDArray[np.int64], objective: Objective, config: LoopConfig
    ) -> None:
        super().__init__()
        self._collection, self._indices, self._objective, self._config = collection, indices, objective, config

    def train_dataloader(self) -> MinibatchLoader:
        data, trainer = self._config.data, self.trainer
        return MinibatchLoader(
            self._collection,
            self._indices,
            self._objective.prepare,
            batch_size=self._config.training.batch_size,
            seed=self._config.seed,
            block_size=data.block_size,
            fetch_factor=data.fetch_factor,
            num_workers=data.num_workers,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=trainer.global_step * self._config.training.accumulate,
        )


class _Loop(pl.Callback):
    """What happens between optimiser steps, in this order: log, evaluate, checkpoint, stop."""

    def __init__(
        self,
        objective: Objective,
        collection: CellCollection,
        heldout: NDArray[np.int64],
        config: LoopConfig,
        out: Path,
        monitor: str,
        checkpoints: CheckpointFolder,
        progress: ProgressReport,
        *,
        n_train: int,
        n_processes: int,
    ) -> None:
        self.objective = objective
        self.collection, self.heldout, self.config, self.out = collection, heldout, config, out
        self.monitor, self.checkpoints, self.progress = monitor, checkpoints, progress
        self.minibatches_per_step = n_processes * config.training.accumulate
        self.cells_per_step = self.minibatches_per_step * min(config.training.batch_size, n_train // n_processes)
        self.means = WeightedMeans()
        self.n_tokens = self.n_flops = 0  # of this process since the last row of the log
        self.peak: float | None = None  # FLOP/s of all processes, measured when it is first needed
        self.best_value: float | None = None
        self.n_without_gain = 0  # evaluations since the best one
        self.minutes_before = 0.0  # of earlier calls
        self.train_seconds = 0.0
        self.began = time.monotonic()
        self.stopped_because: StopReason | None = None
        self.restored: Mapping[str, Any] | None = None
        self.run_log: RunLog | None = None  # of the first process; "log" is taken: Lightning sets it on callbacks

    @property
    def minutes(self) -> float:
        """Minutes of the whole run so far."""
        return self.minutes_before + (time.monotonic() - self.began) / 60

    def state_dict(self) -> dict[str, Any]:
        return {
            "means": self.means.state_dict(),
            "best_value": self.best_value,
            "n_without_gain": self.n_without_gain,
            "minutes": self.minutes,
            "train_seconds": self.train_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.restored = state_dict
        self.best_value = state_dict["best_value"]
        self.n_without_gain = state_dict["n_without_gain"]
        self.minutes_before = state_dict["minutes"]
        self.train_seconds = state_dict["train_seconds"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step, training = trainer.global_step, self.config.training
        if self.restored is not None:
            self.means.load_state_dict(self.restored["means"], pl_module.device)
            log.info("resuming after step %d", step)
        self.evaluation = fixed_minibatches(
            self.collection,
            self.heldout,
            self.objective.prepare_heldout,
            batch_size=training.batch_size,
            seed=self.config.seed,
            max_cells=training.n_validation_cells,
        )
        if trainer.is_global_zero:
            self.checkpoints.discard_after(step)
            self.run_log = RunLog(self.out, last_step=step if self.restored else -1)
        self.progress.start(step, training.max_steps)
        if self.restored is None:
            # The initial weights are a candidate, too: a start from a strong simple model may be hard to beat.
            self._evaluate(trainer, pl_module)
        self._stop_if_due(trainer)
        self.mark, self.rate_from = time.monotonic(), (step, self.train_seconds)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Minibatch, batch_idx: int
    ) -> None:
        module = cast(TrainingModule, pl_module)
        if not module.is_step_done:
            return
        self.train_seconds += time.monotonic() - self.mark
        step, training = trainer.global_step, self.config.training
        for output in (part.output for part in module.parts):
            self.means.add({"loss": output.loss, **output.terms, "grad_norm": module.grad_norm}, output.n_cells)
            self.n_tokens += output.n_tokens
            self.n_flops += output.n_flops
        if step % training.log_every == 0:
            self._log_training(trainer)
        self.progress.update(step)
        self._stop_if_due(trainer)
        if step % training.validate_every == 0 or self.stopped_because:
            self._evaluate(trainer, pl_module)
            self._stop_if_due(trainer)
        if step % training.checkpoint_every == 0 or self.stopped_because:
            if self.run_log is not None:
                self.run_log.sync()
            trainer.save_checkpoint(self.checkpoints.path(step))
            if trainer.is_global_zero:
                self.checkpoints.prune()
        self.mark = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._close()

    def check_finite(self, parts: Sequence[StepPart], grad_norm: Tensor) -> None:
        """Stop before a loss or gradient that is not finite reaches the weights."""
        losses = torch.stack([part.output.loss for part in parts])
        if not torch.isfinite(losses.sum() + grad_norm):
            # Where all losses are finite the gradient is not, and any of the minibatches may be the cause.
            culprits = [part for part in parts if not torch.isfinite(part.output.loss)][:1] or list(parts)
            loss = float(torch.stack([part.output.loss for part in culprits]).mean())
            step = parts[0].number // self.minibatches_per_step + 1
            what = f"the loss is {loss:g} and the norm of its gradient {float(grad_norm):g} at step {step}"
            raise self._not_finite(what, np.concatenate([part.cell_index for part in culprits]))

    def finish(self, trainer: pl.Trainer) -> FitResult:
        """Write ``result.json`` and the curve."""
        step = trainer.global_step
        with safe_open(self.out / "best.safetensors", framework="pt") as file:
            best = json.loads(file.metadata()["scdiva"])
        n_cells = step * self.cells_per_step
        result = FitResult(
            best_step=best["step"],
            best_value=best["value"],
            last_step=step,
            n_cells=n_cells,
            cells_per_s=n_cells / max(self.train_seconds, 1e-9),
            minutes=self.minutes,
            stopped_because=self.stopped_because or "max_steps",
            history=self.out / "log.csv",
            best_weights=self.out / "best.safetensors",
        )
        if trainer.is_global_zero:
            if any(row.get(self.monitor) for row in read_log(result.history)):
                draw_curve(result.history, self.out / "curve.png", key=self.monitor)
            _write_json(self.out / "result.json", {k: v for k, v in asdict(result).items() if not isinstance(v, Path)})
        return result

    def _log_training(self, trainer: pl.Trainer) -> None:
        step = trainer.global_step
        values = self.means.over_processes()
        self.means.clear()
        n_steps, seconds = step - self.rate_from[0], max(self.train_seconds - self.rate_from[1], 1e-9)
        self.rate_from = (step, self.train_seconds)
        rates = {"cells_per_s": n_steps * self.cells_per_step / seconds, **self._trunk_rates(trainer, seconds)}
        # The rate that this step used: Lightning has already moved the schedule on.
        factor = learning_rate_factor(step - 1, config=self.config.optim, max_steps=self.config.training.max_steps)
        values |= {
            "lr": self.config.optim.lr * factor,
            **rates,
            "n_cells_seen": step * self.cells_per_step,
        }
        if self.run_log is not None:
            self.run_log.write(step, "train", values)
        self.progress.update(step, loss=values["loss"], **rates)

    def _trunk_rates(self, trainer: pl.Trainer, seconds: float) -> dict[str, float]:
        """Return what the trunk did in a time, where the objective reports it, and start to count again."""
        device = trainer.strategy.root_device
        n_tokens, n_flops = _sum_over_processes(trainer, [self.n_tokens, self.n_flops], device)
        self.n_tokens = self.n_flops = 0
        rates = {"tokens_per_s": n_tokens / seconds} if n_tokens else {}
        if n_flops:
            if self.peak is None:
                dtype = torch.bfloat16 if uses_bf16(self.config.training.precision, device.type) else torch.float32
                # All at once: processes that share the cores of a machine share its peak.
                trainer.strategy.barrier("scdiva.peak")
                (self.peak,) = _sum_over_processes(trainer, [measured_peak(device, dtype)], device)
            rates["share_of_peak"] = _PASSES_PER_STEP * n_flops / seconds / self.peak
        return rates

    def _evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Average the held-out loss over all processes; keep the weights if they are the best so far."""
        if not self.evaluation:
            self._keep_weights(trainer, pl_module, None)
            return
        step, n_batches, means, bad = trainer.global_step, len(self.evaluation), WeightedMeans(), None
        # Every process makes the same number of calls, as collective strategies require; a repeated minibatch that
        # fills the last round has no weight.
        for first in range(0, n_batches, trainer.world_size):
            number = first + trainer.global_rank
            batch = self.evaluation[min(number, n_batches - 1)]
            with torch.no_grad():
                output = cast(LossOutput, trainer.strategy.validation_step(batch.to(pl_module.device)))
            means.add({"loss": output.loss, **output.terms}, output.n_cells if number < n_batches else 0)
            if bad is None and not torch.isfinite(output.loss):
                bad = batch
        values = means.over_processes()
        # what is no mean over cells (a macro-F1) may be a function of such means
        if callable(summary := getattr(self.objective, "heldout_summary", None)):
            values = summary(values)
        if not math.isfinite(values["loss"]):
            what = f"the held-out loss is {values['loss']:g} after step {step}"
            raise self._not_finite(what, None if bad is None else bad.cell_index)
        if self.monitor not in values:
            raise TrainingError(
                f"the objective has no value {self.monitor!r} to monitor",
                expected="one of " + ", ".join(values),
                fix="name one of these",
            )
        if self.run_log is not None:
            self.run_log.write(step, "heldout", values)
        self.progress.update(step, **{f"held-out {self.monitor}": values[self.monitor]})
        if self.best_value is None or values[self.monitor] < self.best_value:
            self.best_value, self.n_without_gain = values[self.monitor], 0
            self._keep_weights(trainer, pl_module, self.best_value)
        else:
            self.n_without_gain += 1

    def _keep_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule, value: float | None) -> None:
        module = cast(TrainingModule, pl_module)
        model = module.evaluated
        if module.is_sharded:
            state = whole_state(model)
            if trainer.is_global_zero:
                model = cast(nn.Module, self.objective)
                model.load_state_dict(state)
        if trainer.is_global_zero:
            # One entry: safetensors writes several in random order, and equal runs should give equal files.
            metadata = {"scdiva": json.dumps({"step": trainer.global_step, "value": value})}
            with atomic_path(self.out / "best.safetensors") as temporary:
                save_model(model, str(temporary), metadata)

    def _stop_if_due(self, trainer: pl.Trainer) -> None:
        step, training = trainer.global_step, self.config.training
        if training.patience and self.n_without_gain >= training.patience:
            self.stopped_because = "patience"
        elif step >= training.max_steps:
            self.stopped_because = "max_steps"
        elif (
            training.max_minutes
            and step % training.log_every == 0
            # Clocks differ between processes: the first one decides.
            and trainer.strategy.broadcast(self.minutes >= training.max_minutes)
        ):
            self.stopped_because = "max_minutes"
        trainer.should_stop = trainer.should_stop or self.stopped_because is not None

    def _not_finite(self, what: str, cell_index: NDArray[np.int64] | None) -> NonFiniteLossError:
        cells = "cells of another process"
        if cell_index is not None:
            named = self.collection.describe([int(i) for i in cell_index[:_N_NAMED_CELLS]])
            n_more = len(cell_index) - _N_NAMED_CELLS
            cells = f"cells: {named}" + (f" and {n_more} more" if n_more > 0 else "")
        good = self.checkpoints.newest_good()
        return NonFiniteLossError(
            f"{what}; {cells}; last good checkpoint: {good[1] if good else 'none yet'}",
            expected="finite numbers",
            fix="look at these cells with `scdiva check`; if they are fine, lower optim.lr and start in a new folder",
        )

    def _close(self) -> None:
        self.progress.stop()
        if self.run_log is not None:
            self.run_log.close()
            self.run_log = None


def _resolve_device(training: TrainingConfig) -> str:
    device = training.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    n_there = torch.cuda.device_count() if device == "cuda" else training.n_devices
    if n_there < training.n_devices:
        raise TrainingError(
            f"training.n_devices = {training.n_devices} on {n_there} CUDA devices",
            expected="at most as many as this machine has",
            fix='lower training.n_devices, or set training.device = "cpu"',
        )
    return device


def _machines(training: TrainingConfig) -> int:
    """Return how many machines torchrun runs on; 1 without it."""
    n_started = int(os.environ.get("LOCAL_WORLD_SIZE", training.n_devices))
    if n_started != training.n_devices:
        # With fewer devices than processes, each process would train a model of its own into the same folder.
        raise TrainingError(
            f"torchrun started {n_started} processes per machine, and training.n_devices = {training.n_devices}",
            expected="the same number",
            fix=f"set training.n_devices = {n_started}, or torchrun --nproc_per_node={training.n_devices}",
        )
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def _strategy(world_size: int, *, is_sharded: bool) -> Strategy | str:
    if world_size == 1:
        return "auto"
    if is_sharded:
        # A checkpoint is one file with the whole state, collected and written by the first process as in any other run.
        return ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    # A step may leave parts of a model unused, other parts in each process.
    return DDPStrategy(find_unused_parameters=True)


def _sum_over_processes(trainer: pl.Trainer, values: Sequence[float], device: torch.device) -> list[float]:
    """Sum numbers over processes; a collective call."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    return cast(list[float], trainer.strategy.reduce(tensor, reduce_op="sum").tolist())


def _check_arguments(train: NDArray[np.int64], heldout: NDArray[np.int64], config: LoopConfig) -> None:
    n_shared = len(np.intersect1d(train, heldout))
    if n_shared:
        raise TrainingError(
            f"{n_shared} held-out cells are also trained on",
            expected="disjoint train and held-out cells",
            fix="split the cells again",
        )
    if config.training.patience and not len(heldout):
        raise TrainingError(
            f"training.patience = {config.training.patience} without held-out cells",
            expected="held-out cells to judge by",
            fix="raise data.heldout_fraction, or set training.patience = 0",
        )


def _claim_folder(out: Path, config: LoopConfig, identity: dict[str, Any]) -> None:
    """Check that the folder is new or holds this very run; write down what it holds."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"cannot make the folder {out}: {error.strerror}", expected="a folder to write to", fix="choose another"
        ) from error
    start_fresh = "choose another folder for a new run, or set the old values to go on with this one"
    if (out / "config.toml").exists():
        saved = load_config(out / "config.toml", type(config))
        changed = [key for key in changed_keys(saved, config) if key not in _FREE_KEYS]
        if changed:
            raise TrainingError(
                f"{out} holds a run with other values of {', '.join(changed)}",
                expected="the configuration in its config.toml; only " + ", ".join(sorted(_FREE_KEYS)) + " may change",
                fix=start_fresh,
            )
    if (out / "run.json").exists():
        saved_identity = json.loads((out / "run.json").read_text(encoding="utf-8"))
        changed = [key.replace("_", " ") for key in identity if saved_identity.get(key) != identity[key]]
        if changed:
            raise TrainingError(
                f"{out} holds a run with other {' and '.join(changed)}",
                expected=f"the same {' and '.join(changed)} in every call",
                fix=start_fresh,
            )
    if rank_zero_only.rank == 0:
        save_config(config, out / "config.toml")
        _write_json(out / "run.json", identity)


def _finished(out: Path, training: TrainingConfig) -> FitResult | None:
    """Return the result of a run that has nothing left to do."""
    path = out / "result.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        result = FitResult(**values, history=out / "log.csv", best_weights=out / "best.safetensors")
    except (OSError, ValueError, TypeError):
        return None
    is_out_of_time = bool(training.max_minutes) and result.minutes >= training.max_minutes
    is_done = result.stopped_because == "patience" or result.last_step >= training.max_steps or is_out_of_time
    if is_done and result.best_weights.exists():
        return result
    if rank_zero_only.rank == 0:
        path.unlink()
    return None


def _fingerprint(collection: CellCollection, train: NDArray[np.int64], heldout: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(f"{len(collection)} {len(train)}".encode())
    for indices in (train, heldout):
        digest.update(np.sort(indices).tobytes())
    return digest.hexdigest()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _tamed_lightning() -> Iterator[None]:
    """Keep Lightning's tips and hardware lines from the user (its warnings are about choices made here), and Ctrl-C."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    on_interrupt = signal.getsignal(signal.SIGINT)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", category=PossibleUserWarning)
            yield
    except SystemExit as error:
        # Lightning answers Ctrl-C with sys.exit and leaves Ctrl-C switched off: bad manners in a notebook.
        if isinstance(error.__context__, KeyboardInterrupt):
            signal.signal(signal.SIGINT, on_interrupt)
            raise KeyboardInterrupt from None
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
