"""Samplers of the latent diffusion: seconds, and how real the cells are, in one run.

    scdiva evaluate generation FILE --labels-key cell_type --seeds 3 --methods scdiffusion --out DIR
    python benchmarks/scdiffusion_samplers.py DIR --out docs/results/scdiffusion_samplers.md

DIR holds the fitted models (``models/scdiffusion-seed-K``) and the training and held-out cells of each seed. Each
sampler makes cells of the held-out cells' labels; beside them z of a Gaussian mixture per label, which needs no
diffusion, and real cells.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from page import write_page

import scdiva as sd
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.metrics import generation as metrics
from scdiva.metrics.generation_classifiers import c2st_auc
from scdiva.metrics.generation_space import LabelledCells
from scdiva.tasks.evaluate_generation import GenerationData

SAMPLERS = {
    "DPM-Solver++, 10 steps": sd.LatentSampler("dpm", 10),
    "DPM-Solver++, 25 steps (default)": sd.LatentSampler("dpm", 25),
    "DPM-Solver++, 50 steps": sd.LatentSampler("dpm", 50),
    "DDIM, 50 steps": sd.LatentSampler("ddim", 50),
    "DDPM, 1,000 steps": sd.LatentSampler("ddpm", 1000),
}
MIXTURE, REAL = "Gaussian mixture per label, no diffusion", "real cells"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines: list[str] = []
    for folder in arguments.folders:
        found: dict[str, list[tuple[float, ...]]] = {}
        for seed in range(arguments.seeds):
            for name, row in _seed(folder, arguments.labels_key, seed, arguments.trees).items():
                found.setdefault(name, []).append(row)
        slowest = np.mean([row[0] for row in found["DDPM, 1,000 steps"]])
        lines += ["", f"## {folder.name}, {arguments.seeds} seeds", ""]
        lines += ["| z from | C2ST genes | C2ST components | called as asked | seconds for z | times as fast as DDPM |"]
        lines += ["|---|---:|---:|---:|---:|---:|"]
        for name, rows in found.items():
            table = np.array(rows)
            values = [f"{table[:, i].mean():.3f} ± {table[:, i].std(ddof=1):.3f}" for i in (1, 2, 3)]
            seconds = table[:, 0].mean()
            speed = [f"{seconds:.1f}", f"{slowest / seconds:.0f}"] if name in SAMPLERS else ["–", "–"]
            lines.append(f"| {name} | {' | '.join([*values, *speed])} |")
            print(lines[-1], flush=True)
    write_page(arguments.out, "Samplers of the latent diffusion", "\n".join(lines))


def _seed(folder: Path, labels_key: str, seed: int, n_trees: int) -> dict[str, tuple[float, ...]]:
    train_file = ad.read_h5ad(folder / "cells" / f"seed-{seed}" / "train.h5ad")
    train, heldout = (
        GenerationData.open(cells, labels_key, min_cells=1)
        for cells in (train_file, ad.read_h5ad(folder / "cells" / f"seed-{seed}" / "heldout.h5ad"))
    )
    is_sample = train_file.obs["is_sample"].to_numpy(dtype=bool)
    reference = metrics.RealismReference.fit(train.cells, is_sample, seed=seed)
    model = sd.ScDiffusion.from_pretrained(folder / "models" / f"scdiffusion-seed-{seed}" / "bundle", device="cpu")
    wanted = pd.DataFrame({labels_key: heldout.cells.labels})
    condition = np.stack([model.labels.encode(dict(row)) for row in wanted.to_dict("records")])
    sizes = model.population.sizes.draw(condition, np.random.default_rng(seed))
    of_gene = open_counts(open_source(train_file), model.vocabulary, min_coverage=0).alignment.source_of_gene()
    column = np.array([of_gene[gene][0] for gene in range(model.vocabulary.n_genes)])

    def judged(made: LabelledCells, *, is_real: bool = False) -> tuple[float, ...]:
        real, ours = metrics.match_types(heldout.cells, made, np.random.default_rng(seed))
        a, b = reference.space.values(real.counts), reference.space.values(ours.counts)
        aucs = [
            c2st_auc(x, y, classifier="forest", seed=seed, n_trees=n_trees)
            for x, y in ((a, b), (reference.space.project(a), reference.space.project(b)))
        ]
        assert reference.classifier is not None
        values, cells = (a, real) if is_real else (b, ours)  # the classifier has seen the sample
        return *aucs, float((reference.classifier.predict(values) == cells.labels).mean())

    def decoded(z: np.ndarray) -> LabelledCells:
        drawn = model.decode(z, sizes.depth, np.random.default_rng(seed)).tocoo()
        shape = (len(wanted), train.cells.counts.shape[1])
        where = (drawn.row, column[drawn.col])
        return LabelledCells(sp.csr_matrix((drawn.data, where), shape=shape, dtype=np.int32), heldout.cells.labels)

    draws: dict[str, Callable[[], np.ndarray]] = {
        name: lambda sampler=sampler: model.sample_latents(
            condition, sizes.depth, torch.Generator().manual_seed(seed), sampler=sampler
        )
        for name, sampler in SAMPLERS.items()
    }
    draws[MIXTURE] = lambda: model.population.prior.sample(
        condition, np.stack([sizes.depth, sizes.n_genes], axis=1), np.random.default_rng(seed)
    )
    draws["DPM-Solver++, 10 steps"]()  # warm up
    rows = {}
    for name, draw in draws.items():
        began = time.perf_counter()
        z = draw()
        seconds = time.perf_counter() - began
        rows[name] = (seconds, *judged(decoded(z)))
    rows[REAL] = (0.0, *judged(reference.sample, is_real=True))
    return rows


if __name__ == "__main__":
    main()
