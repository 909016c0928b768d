"""Driver of test_two_processes.py: one process of some runs under torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.distributed.tensor import DTensor
from toy import Split, ToyObjective, TrunkObjective, toy_config

from scdiva.training import fit, record

TRUNK = {"batch_size": 8, "accumulate": 2, "n_devices": 2, "validate_every": 1}
OPTIM = {"schedule": "constant", "clip_norm": 0.5, "weight_decay": 0.1}


def held_share(tensors) -> float:
    """Share of the elements that this process holds."""
    tensors = list(tensors)
    held = sum((x.to_local() if isinstance(x, DTensor) else x).numel() for x in tensors)
    return held / sum(x.numel() for x in tensors)


class Recorder(Callback):
    """Cells and loss of each minibatch of this process, and what it holds of the model at the end."""

    def __init__(self) -> None:
        self.cells, self.losses, self.shares = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.cells.append(batch.cell_index.tolist())
        self.losses.append(float(pl_module.parts[-1].output.loss))

    def on_train_end(self, trainer, pl_module):
        moments = [state["exp_avg"] for state in trainer.optimizers[0].state.values()]
        for tensors in (pl_module.objective.parameters(), pl_module.ema.parameters(), moments):
            self.shares.append(held_share(tensors))


class Writes:
    """Files that this process puts in place."""

    def __init__(self) -> None:
        self.names: list[str] = []
        replace, start_log = Path.replace, record.RunLog.__init__

        def noted_replace(path, target):
            self.names.append(Path(target).name)
            return replace(path, target)

        def noted_log(run_log, folder, last_step):
            self.names.append("RunLog")
            start_log(run_log, folder, last_step)

        Path.replace, record.RunLog.__init__ = noted_replace, noted_log


class Report:
    """What one process tells the test."""

    def __init__(self, out: Path) -> None:
        self.out, self.rank, self.writes = out, int(os.environ["RANK"]), Writes()

    def run(self, name: str, objective: torch.nn.Module, config) -> None:
        split, recorder = Split(), Recorder()
        self.writes.names.clear()
        fit(
            objective,
            split.collection,
            train_indices=split.train,
            heldout_indices=split.heldout,
            config=config,
            out_dir=self.out / name,
            callbacks=[recorder],
            progress=False,
        )
        path = self.out / f"{name}-{config.training.max_steps}-{self.rank}"
        torch.save(objective.state_dict(), path.with_suffix(".pt"))
        seen = {name: getattr(recorder, name) for name in ("cells", "losses", "shares")}
        seen["writes"] = self.writes.names
        path.with_suffix(".json").write_text(json.dumps(seen))


def main() -> None:
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    report = Report(out)
    sys.modules[fit.__module__].measured_peak = lambda device, dtype: 1e6 * (1 + report.rank)
    for max_steps in (10, 20):  # the second call resumes
        report.run("toy", ToyObjective(), toy_config(max_steps=max_steps, n_devices=2))
        for strategy in ("ddp", "fsdp"):
            config = toy_config(optim=OPTIM, max_steps=max_steps, strategy=strategy, **TRUNK)
            report.run(strategy, TrunkObjective(), config)
    for strategy in ("ddp", "fsdp"):
        config = toy_config(optim=OPTIM, max_steps=20, strategy=strategy, **TRUNK)
        report.run(f"{strategy}-whole", TrunkObjective(), config)


if __name__ == "__main__":
    main()
