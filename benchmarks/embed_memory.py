"""Embedding from disk in flat memory: cells per second and peak memory over the number of cells.

    python benchmarks/embed_memory.py [--cells 10000 100000] [--model NAME] [--folder runs/embed_memory]

Generates .h5ad files with the count distribution of pbmc3k (cells drawn with replacement, thinned at random so that no
two are equal), then runs `scdiva embed` on each in a process of its own and reads that process's peak memory. The
model's share is the peak of a process that embeds 100 cells.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.io import sparse_dataset, write_elem

from scdiva.datasets import pbmc3k

_BLOCK = 5000

# resource.ru_maxrss of a child that is this very command
_CHILD = """
import resource, sys
sys.argv = ["scdiva", "embed", sys.argv[1], sys.argv[2], "--overwrite", "--model", sys.argv[3]]
from scdiva.cli import main
try:
    main()
except SystemExit as stop:
    if stop.code:
        raise
print("PEAK_KB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def generate(path: Path, n_cells: int) -> None:
    """Write a file of n_cells block by block, so that making it does not need the memory either."""
    source = pbmc3k()
    counts = sp.csr_matrix(source.X)
    rng = np.random.default_rng(n_cells)
    obs = pd.DataFrame(index=[f"cell_{i}" for i in range(n_cells)])
    partial = path.with_suffix(".part")
    with h5py.File(partial, "w") as file:
        for start in range(0, n_cells, _BLOCK):
            size = min(_BLOCK, n_cells - start)
            block = counts[rng.integers(counts.shape[0], size=size)].copy()
            block.data = rng.binomial(block.data, np.repeat(rng.uniform(0.7, 1.0, size), np.diff(block.indptr)))
            block.data = block.data.astype(np.int32)
            block.eliminate_zeros()
            if start == 0:
                write_elem(file, "/", ad.AnnData(X=block, obs=obs.iloc[:size], var=source.var))
            else:
                sparse_dataset(file["X"]).append(block)
        del file["obs"]
        write_elem(file, "obs", obs)
    partial.rename(path)


def run(path: Path, model: str) -> tuple[float, float, str]:
    out = path.with_name(path.stem + "_out.h5ad")
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(path), str(out), model], capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - started
    out.unlink()
    peak = float(done.stdout.rsplit("PEAK_KB", 1)[1]) / 1024
    return seconds, peak, done.stdout.splitlines()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="*", default=[10_000, 100_000])
    parser.add_argument("--model", default="scdiva-blood-tiny")
    parser.add_argument("--folder", type=Path, default=Path("runs/embed_memory"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    base = None
    for n_cells in [100, *arguments.cells]:
        path = arguments.folder / f"cells_{n_cells}.h5ad"
        if not path.exists():
            generate(path, n_cells)
        seconds, peak, line = run(path, arguments.model)
        base = base or (seconds, peak)
        extra = (
            ""
            if n_cells == 100
            else (
                f"; {n_cells / max(seconds - base[0], 1e-9):,.0f} cells/s after start-up; "
                f"{peak - base[1]:,.0f} MB above the model"
            )
        )
        size = path.stat().st_size / 1e6
        print(f"{n_cells:>9,} cells, {size:,.0f} MB on disk: {seconds:.1f} s, peak {peak:,.0f} MB{extra}")
        print(f"          {line}")


if __name__ == "__main__":
    main()
