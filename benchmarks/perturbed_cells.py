"""How real are drawn perturbed cells of a cell type that was never seen perturbed?

    python benchmarks/perturbed_cells.py --data perturb_kang_ifnb.h5ad --out docs/results/perturbed_cells --run DIR

The stimulated cells of some types are left out; scdiva-blood-tiny is fine-tuned on the rest, told what was done. Of
each type left out, one half of the stimulated cells is the sample that all others are judged against; the other half
is the ceiling, and its mean change the upper bound of a prediction. The other prediction is the mean change of the
types that were seen. Principal components are those of cells of other types. Rows are printed as they finish.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import scipy.sparse as sp
import torch

from scdiva.baselines.perturbation_cells import control_cells, negative_binomial_cells, shifted_cells
from scdiva.config import LoopConfig
from scdiva.data.output import replacing
from scdiva.data.perturbations import Perturbation
from scdiva.data.reader import open_counts
from scdiva.data.shifting import mean_log1p, response_spread
from scdiva.metrics.generation_classifiers import c2st_auc
from scdiva.metrics.generation_distances import energy_distance, mmd2
from scdiva.metrics.generation_genes import (
    correlation,
    gene_correlations,
    kolmogorov_smirnov,
    zero_fraction_error,
)
from scdiva.metrics.generation_space import ReferenceSpace, log_cp10k
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.inputs import Tokeniser
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.models.scdiva.perturbation_tokens import PerturbationCoder, PerturbationCodes
from scdiva.models.scdiva.perturbed_cells import PerturbationDenoising, PerturbedNetwork, draw_perturbed
from scdiva.training import fit
from scdiva.types import CellCounts

N_TREES, JUDGE_SEEDS = 200, (0, 1, 2)
N_CORRELATED = 200
IFNB = Perturbation(("IFNB",), "treatment")
CONTROL = Perturbation(())


class InMemory:
    """Cells as a collection; positions are ``cell_index``."""

    def __init__(self, cells: CellCounts) -> None:
        self.cells = replace(cells, cell_index=np.arange(cells.n_cells))

    def __len__(self) -> int:
        return self.cells.n_cells

    def read(self, indices: np.ndarray) -> CellCounts:
        return self.cells.take(np.asarray(indices))

    def describe(self, indices: list[int]) -> str:
        return ", ".join(map(str, indices))


def loop(seed: int, n_steps: int, batch_size: int) -> LoopConfig:
    every = max(1, n_steps // 4)
    return LoopConfig.model_validate(
        {
            "seed": seed,
            "optim": {"lr": 5e-4, "gene_lr_ratio": 20.0, "warmup_steps": min(50, n_steps // 4), "ema_decay": 0.98},
            "training": {
                "max_steps": n_steps,
                "batch_size": batch_size,
                "validate_every": every,
                "checkpoint_every": every,
                "n_validation_cells": 256,
                "device": "cpu",
            },
        }
    )


def mean_change(stimulated: CellCounts, control: CellCounts) -> np.ndarray:
    return mean_log1p(stimulated.counts, stimulated.library_size) - mean_log1p(control.counts, control.library_size)


def judged(
    made: sp.csr_matrix, real: sp.csr_matrix, control: sp.csr_matrix, space: ReferenceSpace, target: np.ndarray
) -> dict[str, float]:
    """All figures of one sample of cells against the real one, which has as many cells or more."""
    n = min(made.shape[0], real.shape[0])
    made, real = sp.csr_matrix(made[:n]), sp.csr_matrix(real[:n])
    values = [space.values(x) for x in (real, made)]
    points = [space.project(v) for v in values]
    logs = [log_cp10k(x) for x in (real, made, control)]
    means = [np.asarray(x.mean(axis=0), dtype=np.float64).ravel() for x in logs]
    is_used = np.bincount(real.indices, minlength=real.shape[1]) >= 3
    spread = np.asarray(logs[0].multiply(logs[0]).mean(axis=0)).ravel() - means[0] ** 2
    detected = np.bincount(real.indices, minlength=real.shape[1]) / n
    order = np.argsort(-np.where(detected >= 0.2, spread, 0), kind="stable")[:N_CORRELATED]
    pairs = [gene_correlations(x[:, order].toarray()) for x in logs[:2]]
    is_there = np.isfinite(pairs[0])
    changed = np.argsort(-np.abs(means[0] - means[2]), kind="stable")[:50]
    pairs_changed = [gene_correlations(x[:, changed].toarray()) for x in logs[:2]]
    changed_there = np.isfinite(pairs_changed[0])
    deviation = [np.sqrt(np.maximum(x.multiply(x).mean(axis=0) - np.square(x.mean(axis=0)), 0)) for x in logs[:2]]
    deviation = [np.asarray(x).ravel() for x in deviation]
    c2st = {
        f"c2st_{name}": float(
            np.mean([c2st_auc(*x, classifier=judge, seed=seed, n_trees=N_TREES) for seed in JUDGE_SEEDS])
        )
        for name, judge, x in (
            ("genes", "forest", values), ("components", "forest", points), ("logistic", "logistic", points)
        )
    }  # fmt: skip
    return {
        "energy": energy_distance(*points),
        "mmd2": mmd2(*points),
        **c2st,
        "correlations": correlation(pairs[0][is_there], np.nan_to_num(pairs[1][is_there]), by_rank=False),
        "correlations_changed": correlation(
            pairs_changed[0][changed_there], np.nan_to_num(pairs_changed[1][changed_there]), by_rank=False
        ),
        "sd_ratio_changed": float(np.median(deviation[1][changed] / np.maximum(deviation[0][changed], 1e-9))),
        "zero_fractions": zero_fraction_error(real, made, is_used),
        "zero_fractions_changed": zero_fraction_error(real[:, changed], made[:, changed], np.ones(50, bool)),
        "change_pearson": correlation(means[0] - means[2], means[1] - means[2], by_rank=False),
        "mean_error_predicted": float(np.abs(means[1] - target)[is_used].mean()),
        "library_ks": kolmogorov_smirnov(*(np.asarray(x.sum(axis=1), float).ravel() for x in (real, made))),
        "genes_ks": kolmogorov_smirnov(*(np.diff(x.indptr).astype(float) for x in (real, made))),
    }


@dataclass(frozen=True, slots=True)
class Trial:
    """One type and seed: control cells, the sample that is judged by, and the other half."""

    name: str
    seed: int
    stimulated: CellCounts
    control: CellCounts
    space: ReferenceSpace
    max_cells: int

    @property
    def halves(self) -> tuple[CellCounts, CellCounts]:
        order = np.random.default_rng([self.seed, 7]).permutation(self.stimulated.n_cells)
        half = order.size // 2
        return self.stimulated.take(order[:half]), self.stimulated.take(order[half : 2 * half])

    @property
    def real(self) -> CellCounts:
        return self.halves[0]

    @property
    def other_half(self) -> CellCounts:
        return self.halves[1]

    @property
    def n(self) -> int:
        return min(self.real.n_cells, self.max_cells)

    def judge(
        self, rows: list[dict[str, Any]], how: str, prediction: str, draw: Draw, change: np.ndarray | float
    ) -> None:
        """Draw, judge, keep and print."""
        began = time.monotonic()
        made = draw(self)
        seconds = time.monotonic() - began
        target = np.maximum(mean_log1p(self.control.counts, self.control.library_size) + change, 0)
        found = judged(made.counts, self.real.counts, self.control.counts, self.space, target)
        rows.append(
            {"type": self.name, "seed": self.seed, "cells": how, "prediction": prediction, **found, "seconds": seconds}
        )
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)


Draw = Callable[[Trial], CellCounts]


def methods(
    change: np.ndarray,
    spread: float,
    depth_ratio: float,
    network: PerturbedNetwork,
    tokeniser: Tokeniser,
    told: PerturbationCodes,
) -> list[tuple[str, Draw]]:
    """Name all that draw cells with a predicted change."""

    def independent(trial: Trial) -> CellCounts:
        counts = negative_binomial_cells(trial.control, change, trial.n, trial.seed)
        return replace(trial.control.take(np.zeros(trial.n, dtype=np.int64)), counts=counts)

    def diffusion(**options: Any) -> Draw:
        return lambda t: (
            draw_perturbed(
                network,
                tokeniser,
                told,
                t.control,
                change,
                n_cells=t.n,
                seed=t.seed,
                spread=spread,
                depth_ratio=depth_ratio,
                **options,
            ).cells
        )

    return [
        ("counts shifted", lambda t: shifted_cells(t.control, change, t.n, t.seed)),
        (
            "counts shifted, with spread and depth",
            lambda t: shifted_cells(t.control, change, t.n, t.seed, spread=spread, depth_ratio=depth_ratio),
        ),
        ("negative binomial", independent),
        ("scDiVa, half of the rising genes", diffusion()),
        ("scDiVa, everything", diffusion(redrawn="all", hidden_share=1.0)),
    ]


COLUMNS = {
    "energy": ("energy distance", 2),
    "mmd2": ("MMD²", 3),
    "c2st_genes": ("C2ST genes", 3),
    "c2st_components": ("C2ST components", 3),
    "c2st_logistic": ("C2ST logistic", 3),
    "correlations": ("correlations", 2),
    "correlations_changed": ("of changed genes", 2),
    "sd_ratio_changed": ("sd of changed genes / real", 2),
    "zero_fractions_changed": ("zero fractions of changed genes", 3),
    "change_pearson": ("change, Pearson", 3),
    "mean_error_predicted": ("mean against prediction", 3),
    "library_ks": ("library KS", 2),
    "seconds": ("s", 0),
}


def summary(rows: list[dict[str, Any]]) -> str:
    """Return a table for each type: means over seeds."""
    lines = []
    for name in dict.fromkeys(row["type"] for row in rows):
        lines += [
            f"### {name}",
            "",
            "| predicted change | cells | " + " | ".join(t for t, _ in COLUMNS.values()) + " |",
        ]
        lines += ["|---|---|" + "---:|" * len(COLUMNS)]
        of_type = [row for row in rows if row["type"] == name]
        for prediction, how in dict.fromkeys((row["prediction"], row["cells"]) for row in of_type):
            found = [row for row in of_type if (row["prediction"], row["cells"]) == (prediction, how)]
            values = [
                # without a prediction there is nothing to agree with
                f"{np.mean([row[key] for row in found]):.{digits}f}"
                if prediction or key != "mean_error_predicted"
                else "–"
                for key, (_, digits) in COLUMNS.items()
            ]
            lines.append(f"| {prediction or '–'} | {how} | " + " | ".join(values) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="scdiva-blood-tiny")
    parser.add_argument("--types", nargs="+", default=["CD14 Mono", "CD4 Naive T"])
    parser.add_argument(
        "--left-out", nargs="+", default=["CD14 Mono", "CD4 Naive T", "B"], help="types never seen perturbed"
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of the fine-tuning; taken up where it was left")
    parser.add_argument("--n-steps", type=int, default=240)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-cells", type=int, default=200, help="drawn cells of each type")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, required=True, help="result without suffix: .json, and the table printed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    adata = ad.read_h5ad(arguments.data)
    model = ScDiVa.from_pretrained(arguments.model, device="cpu")
    model = model.restricted(open_counts(adata, model.vocabulary).alignment.is_measured)
    cells = open_counts(adata, model.vocabulary).read(np.arange(adata.n_obs))
    cells = replace(cells, cell_index=np.arange(cells.n_cells))
    type_of = adata.obs["cell_type"].astype(str).to_numpy()
    is_stimulated = adata.obs["perturbation"].astype(str).to_numpy() != "control"
    is_left_out = is_stimulated & np.isin(type_of, arguments.left_out)

    coder = PerturbationCoder(model.vocabulary, IFNB.targets, 1)
    both = coder.codes([CONTROL, IFNB])
    of_cell = both.take(torch.from_numpy(is_stimulated.astype(np.int64)))
    objective = PerturbationDenoising(model, of_cell, n_names=1)
    rng = np.random.default_rng(0)
    usable = rng.permutation(np.flatnonzero(~is_left_out))
    heldout, train = np.sort(usable[:128]), np.sort(usable[128:])
    started = time.monotonic()
    fitted = fit(
        objective, InMemory(cells), train_indices=train, heldout_indices=heldout,
        config=loop(0, arguments.n_steps, arguments.batch_size), out_dir=arguments.run, progress=False,
    )  # fmt: skip
    print(f"fine-tuned: step {fitted.best_step} of {fitted.last_step}, {fitted.minutes:.1f} minutes", flush=True)
    objective.calibrate(cells.take(train), np.random.default_rng(1))
    print(f"calibrated after {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    tokeniser = tokeniser_of(model.config, model.statistics)
    told = both.take(torch.tensor([1]))

    pairs = {}
    for name in sorted(set(type_of)):
        rows_of = [np.flatnonzero((type_of == name) & (is_stimulated == is_with)) for is_with in (True, False)]
        pairs[str(name)] = (cells.take(rows_of[0]), cells.take(rows_of[1]))
    seen = [
        pair for name, pair in pairs.items() if name not in arguments.left_out and min(x.n_cells for x in pair) >= 30
    ]
    of_others = np.mean([mean_change(*pair) for pair in seen], axis=0)
    # the median: one type is a mixture of cells that respond and others
    spread = float(np.median([response_spread(*pair) for pair in seen]))
    depth_ratio = float(np.median([a.library_size.mean() / b.library_size.mean() for a, b in seen]))
    print(f"types that were seen: spread of the response {spread:.2f}, depth ratio {depth_ratio:.2f}", flush=True)
    rows: list[dict[str, Any]] = []
    for name in arguments.types:
        space = ReferenceSpace.fit(cells.counts[np.flatnonzero(type_of != name)], seed=0)
        for seed in arguments.seeds:
            trial = Trial(name, seed, *pairs[name], space, arguments.max_cells)
            trial.judge(rows, "real cells, other half", "", lambda t: t.other_half.take(np.arange(t.n)), 0.0)
            trial.judge(rows, "control cells", "", lambda t: control_cells(t.control, t.n, t.seed), 0.0)
            for prediction, change in (
                ("true", mean_change(trial.other_half, trial.control)), ("other types", of_others)
            ):  # fmt: skip
                for how, draw in methods(change, spread, depth_ratio, objective.network, tokeniser, told):
                    trial.judge(rows, how, prediction, draw, change)
    with replacing(arguments.out.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = summary(rows)
    print(table)
    with replacing(arguments.out.with_name(arguments.out.name + "_table.md")) as partial:
        partial.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
