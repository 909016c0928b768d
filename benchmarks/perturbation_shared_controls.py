"""PearsonΔ with control cells shared between prediction and truth, and with separate ones.

python benchmarks/perturbation_shared_controls.py DATA

Kang: interferon beta, one cell type held out at a time (as reported elsewhere: one set of control cells on both sides).
Papalexi: the mean of other knock-outs, and half of the cells against the other half.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from scdiva.baselines.perturbation import ridge_from
from scdiva.data.perturbation_effects import ControlMeans, Effect, log_values
from scdiva.data.perturbation_sets import load_perturbed
from scdiva.genes import GeneVocabulary

N_DRAWS = 5


def measured(cells, min_cells: int, is_shared: bool, rng: np.random.Generator) -> dict[str, float]:
    genes = np.flatnonzero(cells.is_measured)
    values = log_values(cells)[:, genes]
    batch = cells.batch_code
    truth, seen, halves = {}, {}, {}
    for c in range(len(cells.contexts)):
        control = rng.permutation(np.flatnonzero(cells.is_control & (cells.context_code == c)))
        if control.size < min_cells:
            continue
        one, two = (control, control) if is_shared else np.array_split(control, 2)
        ours, theirs = (ControlMeans.of(values[rows], batch[rows]) for rows in (one, two))
        for p in range(1, len(cells.perturbations)):
            rows = rng.permutation(np.flatnonzero((cells.perturbation_code == p) & (cells.context_code == c)))
            if rows.size < min_cells:
                continue
            truth[p, c] = Effect.of(cells, values, rows, theirs).change
            seen[p, c] = Effect.of(cells, values, rows, ours)
            pair = np.array_split(rows, 2)
            halves[p, c] = [
                Effect.of(cells, values, half, m).change for half, m in zip(pair, (ours, theirs), strict=True)
            ]
    found: dict[str, list[float]] = {"ceiling": [np.corrcoef(*pair)[0, 1] for pair in halves.values()]}
    for key, change in truth.items():
        others = [effect for other, effect in seen.items() if other != key]
        predicted = {"mean of others": np.mean([e.change for e in others], axis=0)}
        if len(cells.contexts) > 1:
            state = seen[key].control_mean
            near = min(others, key=lambda e: float(((e.control_mean - state) ** 2).sum()))
            predicted["nearest context"] = near.change
            x, y = np.stack([e.control_mean for e in others]), np.stack([e.change for e in others])
            predicted["ridge"] = ridge_from(x, y, state)
        for name, prediction in predicted.items():
            found.setdefault(name, []).append(np.corrcoef(change, prediction)[0, 1])
    return {name: float(np.mean(scores)) for name, scores in found.items()}


def main(folder: Path) -> None:
    genes = GeneVocabulary.default()
    sets = {
        "Kang": ("perturb_kang_ifnb.h5ad", {"kind": "treatment", "context_key": "cell_type"}),
        "Papalexi": (
            "perturb_papalexi_eccite303.h5ad",
            {"batch_key": "batch", "library_size_key": "n_umis_full", "min_coverage": 0.0},
        ),
    }
    for name, (file, keys) in sets.items():
        cells = load_perturbed(folder / file, genes, perturbation_key="perturbation", control="control", **keys).data
        for is_shared in (True, False):
            rng = np.random.default_rng(0)
            runs = [measured(cells, 20, is_shared, rng) for _ in range(N_DRAWS)]
            scores = {method: f"{np.mean([run[method] for run in runs]):.3f}" for method in runs[0]}
            print(name, "shared" if is_shared else "separate", scores, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
