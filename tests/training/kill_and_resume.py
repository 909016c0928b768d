"""Driver of test_resume.py: runs a fit in forked children that die by SIGKILL, until one run is complete.

Everything is imported once; each child starts from the same state as a new process would.
"""

from __future__ import annotations

import io
import os
import random
import signal
import sys
import threading
from pathlib import Path

import torch
from toy import Split, ToyObjective, toy_config

from scdiva.training import checkpoints, fit, record


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def install(kill: str) -> None:
    """Make this process die at a moment such as "step:13"."""
    what, _, number = kill.partition(":")
    if what == "step":
        original_forward = ToyObjective.forward
        n_calls = 0

        def forward(self, inputs, generator):
            nonlocal n_calls
            n_calls += self.training
            if n_calls == int(number):
                die()
            return original_forward(self, inputs, generator)

        ToyObjective.forward = forward
    elif what == "write":  # in the middle of the n-th checkpoint of this process
        original_save = torch.save
        n_saves = 0

        def save(obj, file):
            nonlocal n_saves
            n_saves += 1
            if n_saves == int(number):
                buffer = io.BytesIO()
                original_save(obj, buffer)
                file.write(buffer.getvalue()[: len(buffer.getvalue()) // 2])
                file.flush()
                die()
            original_save(obj, file)

        torch.save = save
    elif what == "rename":  # checksum in place, checkpoint not
        original_replace = Path.replace

        def replace(self, target):
            if Path(target).name.endswith(f"{int(number):08d}.ckpt"):
                die()
            return original_replace(self, target)

        Path.replace = replace
    elif what == "row":  # half a row in the log
        original_write = record.RunLog.write

        def write(self, step, split, values):
            if step == int(number):
                self._file.write("1")
                self._file.flush()
                die()
            original_write(self, step, split, values)

        record.RunLog.write = write
    elif what == "after":  # any moment: this many milliseconds after training has begun
        original_start = record.ProgressReport.start

        def start(self, step, max_steps):
            original_start(self, step, max_steps)
            threading.Timer(int(number) / 1000, die).start()

        record.ProgressReport.start = start


def run(out: Path, workers: int, accumulate: int, kill: str) -> bool:
    """Run in a child; return whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            install(kill)
            split = Split()
            every = {"checkpoint_every": 7, "validate_every": 9, "log_every": 2}
            config = toy_config(workers=workers, accumulate=accumulate, max_steps=60, **every)
            fit(
                ToyObjective(),
                split.collection,
                train_indices=split.train,
                heldout_indices=split.heldout,
                config=config,
                out_dir=out,
                progress=False,
            )
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not (os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0):
        sys.exit(f"the child failed at {kill!r}")
    return not os.WIFSIGNALED(status)


def main() -> None:
    out, workers, accumulate = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    assert checkpoints.torch is torch
    assert run(out / "whole", workers, accumulate, "")
    delays = random.Random(workers)
    kills = ["step:5", "row:10", "write:1", "step:12", "write:2", "rename:28", "step:1", "row:30", "write:3"]
    kills += [f"after:{delays.randrange(1, 200)}" for _ in range(3)]
    for kill in kills:
        assert not run(out / "killed", workers, accumulate, kill) or kill.startswith("after"), f"{kill} did not kill"
    assert run(out / "killed", workers, accumulate, "")


if __name__ == "__main__":
    main()
