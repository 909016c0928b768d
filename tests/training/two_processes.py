"""Driver of test_two_processes_train_one_model: one process of a run under torchrun."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback
from toy import Split, ToyObjective, toy_config

from scdiva.training import fit


class Recorder(Callback):
    def __init__(self) -> None:
        self.cells, self.losses = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.cells.append(batch.cell_index.tolist())
        self.losses.append(float(outputs["loss"]))


def main() -> None:
    out, max_steps, rank = Path(sys.argv[1]), int(sys.argv[2]), os.environ["RANK"]
    torch.set_num_threads(1)
    objective, split, recorder = ToyObjective(), Split(), Recorder()
    fit(
        objective,
        split.collection,
        train_indices=split.train,
        heldout_indices=split.heldout,
        config=toy_config(max_steps=max_steps, n_devices=2),
        out_dir=out / "run",
        callbacks=[recorder],
        progress=False,
    )
    torch.save(objective.state_dict(), out / f"rank-{rank}.pt")
    for name in ("cells", "losses"):
        path = out / f"{name}-{rank}.json"
        if not path.exists():
            path.write_text(json.dumps(getattr(recorder, name)))


if __name__ == "__main__":
    main()
