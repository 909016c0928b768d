"""Pairs of simulated perturbations whose true interactions are known: who predicts those that are not additive?

    python benchmarks/perturbation_simulated.py OUT [--seeds 3]

Each seed is a simulation of its own (24 targets in 4 pathways, 120 pairs); a share of targets and pairs is held out, in
the groups of GEARS. Pairs that interact (saturation, synergy, suppression) are told from additive ones by the truth.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from scdiva.data.perturbation_sets import load_perturbed
from scdiva.data.perturbation_simulator import simulate_perturbations
from scdiva.models.base import load_model
from scdiva.tasks import evaluate_perturbation as task

METRICS = {"pearson_delta": "PearsonΔ", "dep": "DEP", "mse": "MSE"}
IS_LOWER_BETTER = {"mse"}


def interval(differences, rng):
    draws = rng.choice(differences, (2000, len(differences))).mean(axis=1)
    return np.quantile(draws, [0.025, 0.975])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", default="scdiva-blood-tiny")
    parser.add_argument("--methods", nargs="*", default=["scdiva", "scdiva_simple"])
    arguments = parser.parse_args()
    model = load_model(arguments.model, device="cpu")
    ours = {name: m for name, m in task.our_predictors(model).items() if name in arguments.methods}
    scores = defaultdict(dict)  # (kind of pair, metric, method) -> {pair of a seed: score}
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in range(arguments.seeds):
        simulated = simulate_perturbations(np.random.default_rng(seed), n_pairs=120)
        data = load_perturbed(
            simulated.to_adata(), model.vocabulary, perturbation_key="perturbation", control="control",
            kind="activation",
        ).data  # fmt: skip
        report = task.evaluate_perturbation(
            data,
            task.splits_of(data, "combination", seeds=(seed,)),
            predictors=ours,
            vocabulary=model.vocabulary,
            corpus=task.gene_features(model, model.vocabulary),
            rows_path=arguments.out / f"rows-{seed}.jsonl",
            on_row=lambda row: print(row, flush=True),
        )
        for row in report.rows:
            kind = simulated.interaction.get(row.perturbation)
            if kind is None:
                groups = ["unseen single"]
            else:
                groups = [f"{row.kind}: {'additive' if kind == 'additive' else 'interacting'}"]
                groups += [f"all pairs: {kind}"] + (["all pairs: interacting"] if kind != "additive" else [])
            for group in groups:
                for metric in METRICS:
                    scores[group, metric, row.method][seed, row.perturbation] = row.scores[metric]
    write(scores, arguments)


def write(scores, arguments):
    rng = np.random.default_rng(0)
    methods = list(dict.fromkeys(method for _, _, method in scores))
    lines = [
        f"# Simulated perturbations, {arguments.seeds} simulations",
        "",
        "Means over pairs. Intervals: bootstrap over pairs of the paired difference of the first method from the best "
        "baseline after the fact (ceiling, null and random condition aside).",
        "",
    ]
    found = {}
    ours = [m for m in methods if m in arguments.methods]
    for metric, title in METRICS.items():
        groups = sorted({group for group, m, _ in scores if m == metric})
        lines += [f"## {title}", "", "| | " + " | ".join(groups) + " |", "|---|" + "---:|" * len(groups)]
        for method in methods:
            cells = []
            for group in groups:
                values = np.array(list(scores[group, metric, method].values()), dtype=float)
                found[f"{group} | {metric} | {method}"] = float(np.nanmean(values))
                cells.append(f"{np.nanmean(values):.3f}")
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
        cells = []
        for group in groups:
            aside = {"ceiling", "ceiling_full_depth", "shuffled", "random_condition", *ours}
            judged = {m: np.nanmean(list(scores[group, metric, m].values())) for m in methods if m not in aside}
            best = (min if metric in IS_LOWER_BETTER else max)(judged, key=judged.get)
            first, other = scores[group, metric, ours[0]], scores[group, metric, best]
            differences = np.array([first[key] - other[key] for key in first], dtype=float)
            low, high = interval(differences[np.isfinite(differences)], rng)
            cells.append(f"{np.nanmean(differences):+.3f} ({low:+.3f} to {high:+.3f}) {best}, n = {len(differences)}")
        lines += [f"| {ours[0]} minus the best baseline | " + " | ".join(cells) + " |", ""]
    (arguments.out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (arguments.out / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(arguments.out / "report.md")


if __name__ == "__main__":
    main()
