"""What do more steps of the sampler buy? Quality and cells/s against the number of steps, in one run.

    python benchmarks/generation.py --data FILE --model BUNDLE --out docs/results/generation_steps

BUNDLE is a model that ``scdiva evaluate generation FILE --out DIR`` fine-tuned on the training cells of seed 0
(``DIR/models/seed-0/bundle``); the split is made again from the seed. Each number of steps makes the same cells wanted,
and is judged by the C2ST of ``scdiva evaluate generation`` (random forest on variable genes and on components) against
held-out cells, with real training cells as the ceiling. Rows are printed as they finish.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from scdiva.data.output import replacing
from scdiva.diffusion.samplers import Sampler
from scdiva.metrics.generation_classifiers import c2st_auc
from scdiva.metrics.generation_genes import library_size_ks, zero_fraction_error
from scdiva.metrics.generation_space import LabelledCells, ReferenceSpace
from scdiva.models.scdiva import ScDiVa
from scdiva.pl import steps as draw_steps
from scdiva.tasks.evaluate_generation import GenerationData, known_cells, split_cells
from scdiva.tasks.generate import generate, plan_cells

N_TREES = 300
SEEDS = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    n_steps: int
    n_cells: int
    cells_per_s: float
    c2st_genes: list[float]
    c2st_components: list[float]
    library_size_ks: float
    zero_fraction_error: float

    def __str__(self) -> str:
        genes, components = np.array(self.c2st_genes), np.array(self.c2st_components)
        return (
            f"| {self.name} | {self.n_cells} | {self.cells_per_s:.1f} | {genes.mean():.3f} ± {genes.std():.3f} | "
            f"{components.mean():.3f} ± {components.std():.3f} | {self.library_size_ks:.3f} | "
            f"{self.zero_fraction_error:.4f} |"
        )


HEADER = (
    "| steps | cells | cells/s | C2ST AUC, variable genes | C2ST AUC, components | library KS | zero-fraction error |\n"
    "|---|---:|---:|---:|---:|---:|---:|"
)


def judged(
    name: str, n_steps: int, real: LabelledCells, made: LabelledCells, space: ReferenceSpace, speed: float
) -> Row:
    values = [space.values(cells.counts) for cells in (real, made)]
    points = [space.project(value) for value in values]
    is_used = np.asarray(real.counts.sum(axis=0)).ravel() >= 0
    return Row(
        name,
        n_steps,
        made.n_cells,
        speed,
        [c2st_auc(*values, classifier="forest", seed=seed, n_trees=N_TREES) for seed in SEEDS],
        [c2st_auc(*points, classifier="forest", seed=seed, n_trees=N_TREES) for seed in SEEDS],
        library_size_ks(real, made),
        zero_fraction_error(real.counts, made.counts, is_used),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--labels-key", default="cell_type")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--n-cells", type=int, default=400, help="held-out cells, and as many generated ones")
    parser.add_argument("--n-exact", type=int, default=100, help="cells of the row of one gene at a time; 0: none")
    parser.add_argument("--out", type=Path, required=True, help="result without suffix: .md, .json and .png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = ScDiVa.from_pretrained(arguments.model, device="cpu")
    known, what = known_cells(arguments.data, model.vocabulary, arguments.labels_key)
    print(what, flush=True)
    data = GenerationData.open(known, arguments.labels_key)
    split = split_cells(data.cells.labels, 0.7, 0)
    third = data.cells.take(split.train[~split.is_sample])
    space = ReferenceSpace.fit(third.counts, seed=0)
    rng = np.random.default_rng(0)
    chosen = rng.permutation(split.heldout)[: arguments.n_cells]
    real = data.cells.take(np.sort(chosen))

    def made(sampler: Sampler, labels: np.ndarray) -> tuple[LabelledCells, float]:
        table = pd.DataFrame({arguments.labels_key: labels})
        started = time.perf_counter()
        cells = generate(model, plan_cells(model, table, None, sampler=sampler, seed=0))
        speed = cells.n_obs / (time.perf_counter() - started)
        assert cells.n_vars == data.cells.counts.shape[1]  # the genes of the model, in its order
        return LabelledCells(cells.X, labels), speed

    print(HEADER, flush=True)
    # real training cells of the same types in the place of generated ones
    sample = data.cells.take(split.train[split.is_sample])
    rows_of = {name: list(rng.permutation(np.flatnonzero(sample.labels == name))) for name in np.unique(real.labels)}
    order = [rows_of[name].pop() for name in real.labels if rows_of[name]]
    ceiling = judged("real cells", 0, real, sample.take(np.array(order)), space, float("nan"))
    print(ceiling, flush=True)
    rows = []
    for n_steps in arguments.steps:
        cells, speed = made(Sampler(n_steps=n_steps), real.labels)
        rows.append(judged(str(n_steps), n_steps, real, cells, space, speed))
        print(rows[-1], flush=True)
    exact = None
    if arguments.n_exact:
        few = real.take(np.sort(rng.permutation(real.n_cells)[: arguments.n_exact]))
        cells, speed = made(Sampler("first-hitting"), few.labels)
        mean_genes = int(np.diff(cells.counts.indptr).mean())
        exact = judged("one gene at a time", mean_genes, few, cells, space, speed)
        print(exact, flush=True)
        cells, speed = made(Sampler(), few.labels)
        fair = judged(f"{Sampler().n_steps}, as many cells", Sampler().n_steps, few, cells, space, speed)
        print(fair, flush=True)
    found = [ceiling, *rows, *([exact, fair] if exact else [])]
    text = f"# Steps against quality: {arguments.data.stem}\n\n{HEADER}\n" + "\n".join(map(str, found)) + "\n"
    for suffix, content in ((".md", text), (".json", json.dumps([asdict(row) for row in found], indent=2) + "\n")):
        with replacing(arguments.out.with_suffix(suffix)) as partial:
            partial.write_text(content, encoding="utf-8")
    draw_steps(
        [row.n_steps for row in rows],
        [row.c2st_genes for row in rows],
        [row.cells_per_s for row in rows],
        arguments.out.with_suffix(".png"),
        baselines={"real cells": float(np.mean(ceiling.c2st_genes))},
    )


if __name__ == "__main__":
    main()
