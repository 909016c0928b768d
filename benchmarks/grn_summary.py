"""Put the reports of benchmarks/grn.sh together: the tables of docs/results/grn.md.

    python benchmarks/grn_summary.py OUT > tables.md

OUT is the folder that benchmarks/grn.sh wrote.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SETS = {
    "pbmc": "two blood sets, 5,878 cells (methods chosen here)",
    "breast_immune_spectra_1k": "immune cells of a breast tumour, 1,000 cells",
    "pbmc4k_soupx_1.1k": "blood, 1,151 cells (the donor of one batch of the first set)",
    "pancreas_baron_h1": "pancreas, another tissue, 1,937 cells",
}
TRUTHS = {
    "grn_union_signed": "union",
    "grn_collectri": "CollecTRI",
    "grn_trrust_v2_human": "TRRUST",
    "grn_encode_tfchip_subset": "ENCODE ChIP",
}
METHODS = {
    "spearman": "co-expression (Spearman)",
    "covariance": "co-expression (covariance)",
    "variability": "variability of the two genes alone",
    "response": "**scDiVa response**",
    "response_shuffled": "scDiVa response, shuffled cells",
    "spearman_shuffled": "Spearman, shuffled cells (null)",
}
TRUNK = {
    "spearman": METHODS["spearman"],
    "attention": "attention",
    "embedding": "states of the trunk",
    "gene_embedding": "gene embeddings, cosine",
    "knockout": "knock-out (100 cells of each regulator)",
    "response": METHODS["response"],
}
REGRESSIONS = {
    "spearman": METHODS["spearman"],
    "boosting": "boosted regression (as GRNBoost2)",
    "extra_trees": "extremely randomised trees (as GENIE3)",
    "response": METHODS["response"],
}


def number(row: dict[str, Any], name: str, digits: int = 2) -> str:
    return f"{row[name][0]:.{digits}f}" if row.get(name) else "–"


def interval(row: dict[str, Any], name: str, digits: int = 2) -> str:
    if not row.get(name):
        return "–"
    value, low, high = row[name]
    return f"{value:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"


def share_above(report: dict[str, Any], truth: str, method: str, is_sample: bool) -> str:
    """Return the share of regulators whose AUPRC ratio is above co-expression's."""
    by_method: dict[str, list[list[float]]] = {}
    for row in report["regulators"]:
        if row["truth"] == truth and row["is_sample"] == is_sample:
            by_method.setdefault(row["method"], []).append(row["auprc_ratio"])
    ours, other = (np.mean(by_method[name], axis=0) for name in (method, "spearman"))
    return f"{np.mean(ours > other):.0%}"


def table(report: dict[str, Any], methods: dict[str, str], *, is_sample: bool = False) -> list[str]:
    lines = [
        "| truth | method | AUPRC ratio | minus co-expression | regulators above it | pooled | minus co-expression | "
        "early precision ratio | degree-matched AUROC | minus co-expression | above genes alone |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for truth, title in TRUTHS.items():
        rows = {
            row["method"]: row for row in report["summary"] if row["truth"] == truth and row["is_sample"] == is_sample
        }
        if not rows:
            continue
        some = next(iter(rows.values()))
        size = f"{title}: {some['n_regulators']} regulators, {some['n_edges']:,} edges"
        for method, name in methods.items():
            if method not in rows:
                continue
            row = rows[method]
            cells = [
                size,
                name,
                number(row, "auprc_ratio"),
                interval(row, "auprc_difference"),
                "–" if method == "spearman" else share_above(report, truth, method, is_sample),
                number(row, "auprc_ratio_pooled"),
                interval(row, "auprc_difference_pooled"),
                number(row, "early_ratio"),
                number(row, "matched", 3),
                interval(row, "matched_difference", 3),
                interval(row, "above_genes"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
            size = ""
    return [*lines, ""]


def sign_table(reports: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| set | truth | method | edges (not told) | accuracy | always activation | balanced accuracy | "
        "minus Spearman's sign, same edges |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, report in reports.items():
        for row in report["summary"]:
            if row["method"] not in ("spearman", "response") or not row["signs"] or row["is_sample"]:
                continue
            signs = row["signs"]
            balanced = signs["balanced_accuracy"]
            cells = [
                name,
                TRUTHS[row["truth"]],
                METHODS[row["method"]],
                f"{signs['n_edges']:,} ({signs['n_undecided']:,})",
                f"{signs['accuracy'][0]:.3f}",
                f"{signs['constant_plus']:.3f}",
                f"{balanced[0]:.3f} ({balanced[1]:.3f} to {balanced[2]:.3f})",
                interval(row, "sign_difference", 3),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def read(folder: Path, *names: str) -> dict[str, Any] | None:
    """Return reports as one; None where there is none."""
    found = [folder / name / "report.json" for name in names]
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in found if path.exists()]
    if not reports:
        return None
    return {part: [row for report in reports for row in report[part]] for part in ("summary", "regulators")}


def main() -> None:
    folder = Path(sys.argv[1])
    reports = {name: report for name in SETS if (report := read(folder, name)) is not None}
    lines: list[str] = []
    for name, report in reports.items():
        lines += [f"### {name}: {SETS[name]}", "", *table(report, METHODS)]
    lines += ["## Signs", "", *sign_table(reports)]
    trunk = read(folder, *(f"breast_immune_spectra_1k_{each}" for each in ("attention", "knockout")))
    if trunk is not None:
        lines += ["## The other methods of scdiva grn, on the breast set", "", *table(trunk, TRUNK)]
    for name, size in (("regressions", "200"), ("boosting", "all")):
        regressions = read(folder, f"breast_immune_spectra_1k_{name}")
        if regressions is not None:
            lines += [f"## Regressions, on {size} targets of the breast set", ""]
            lines += table(regressions, REGRESSIONS, is_sample=True)
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    main()
