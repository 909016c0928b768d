"""Tables of docs/results/perturbation.md from what benchmarks/perturbation.sh measured.

python benchmarks/perturbation_page.py OUT docs/results/perturbation.md
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from page import write_page

COLUMNS = {
    "pearson_delta": 3, "demse": 3, "dep": 3, "c_dep": 3, "auprc": 3, "lfc_spearman": 3, "hit_rate_20": 3,
    "pearson_perturbed": 3, "weighted_mse": 3, "weighted_r2": 2, "centroid_accuracy": 3, "pds_l1": 3, "e_distance": 3,
}  # fmt: skip
SETS = {
    "kang": "Kang: interferon beta, one cell type held out (7 types)",
    "kang_author": "Kang, cells as their authors annotated them (6 types)",
    "papalexi": "Papalexi: one knock-out held out (25, panel of 303 genes)",
    "papalexi_network": "Papalexi in five folds, with the network (one seed)",
    "gasperini": "Gasperini: one promoter held out (10, panel of 366 genes)",
    "gasperini_seen": "Gasperini: the same promoters, other cells",
}
OURS = ("scdiva", "scdiva_simple")


def tables(report: dict) -> str:
    """Tables of one report: means, and ours minus the best baseline."""
    metrics, titles = report["metrics"], report["titles"]
    titles = {**titles, "ceiling_full_depth": "ceiling at full depth (Spearman-Brown)"}
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in report["summary"]):
        of_kind = [row for row in report["summary"] if row["kind"] == kind]
        value = {(row["method"], row["metric"]): row for row in of_kind}
        shown = [m for m in COLUMNS if any(row["metric"] == m and row["mean"] is not None for row in of_kind)]
        n = max(row["n_conditions"] for row in of_kind)
        lines += [f"*{kind}*, {n} conditions:", ""]
        heads = [metrics[m]["title"] + (" ↑" if metrics[m]["is_higher_better"] else " ↓") for m in shown]
        lines += ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(shown)]
        for method in dict.fromkeys(row["method"] for row in of_kind):
            cells = []
            for metric in shown:
                row = value.get((method, metric))
                mean = None if row is None else row["mean"]
                cells.append("–" if mean is None else f"{mean:.{COLUMNS[metric]}f}")
            name = titles.get(method, method)
            lines.append(f"| {'**' + name + '**' if method in OURS else name} | " + " | ".join(cells) + " |")
        for method in OURS:
            cells = []
            for metric in shown:
                row = value.get((method, metric))
                d = None if row is None else row.get("minus_best_baseline")
                if not d or d["value"] is None:
                    cells.append("–")
                    continue
                name = titles.get(d["baseline"], d["baseline"])
                cells.append(f"{d['value']:+.3f} ({d['low']:+.3f} to {d['high']:+.3f}) {name}")
            if any(cell != "–" for cell in cells):
                title = titles.get(method, method)
                lines.append(f"| {title}, minus the best baseline (95 %) | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("page", type=Path)
    arguments = parser.parse_args()
    parts = []
    for folder, title in SETS.items():
        text = (arguments.results / folder / "report.json").read_text(encoding="utf-8")
        parts += [f"## {title}", "", tables(json.loads(text))]
    simulated = (arguments.results / "simulated" / "report.md").read_text(encoding="utf-8")
    parts.append(simulated.replace("\n## ", "\n### ").replace("# Simulated", "## Simulated", 1))
    write_page(arguments.page, "Effects of perturbations", "\n".join(parts))
    print(arguments.page)


if __name__ == "__main__":
    main()
