"""All tasks of a benchmark of annotation in one report, and what they come to.

    python benchmarks/annotation_summary.py OUT            # the folder that benchmarks/annotation.sh wrote

Reads the rows.jsonl of every folder in OUT and prints, in Markdown: macro-F1 of every task; medians over tasks of
differences from the best baseline of each task (the best of seven after the fact) and from each baseline on its own;
the calibration error by kind of split; open sets. Nothing is fitted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scdiva.baselines.annotation import BASELINES
from scdiva.tasks.annotation_report import NULL, OURS_AND_CHOSEN, TABLE, TITLES, AnnotationReport, Run
from scdiva.tasks.annotation_splits import KINDS
from scdiva.tasks.evaluation_rows import read_rows
from scdiva.tasks.open_set import METHODS as OPEN_SET_METHODS
from scdiva.tasks.open_set import REFERENCE, OpenSetReport, OpenSetRun, over_types_and_seeds
from scdiva.tasks.open_set import TABLE as OPEN_SET_TABLE
from scdiva.tasks.open_set import TITLES as OPEN_SET_TITLES

NAMES = {name: title.removeprefix("scDiVa").lstrip(", ") for name, title in TITLES.items()}
RIVALS = tuple(name for name in BASELINES if name not in (NULL, "majority"))


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--merge", type=Path, help="Table of merged labels: also their medians.")
    args = parser.parse_args()
    found: dict[str, Run] = {}
    opened: dict[str, OpenSetRun] = {}
    for path in sorted(args.out.glob("*/rows.jsonl")):
        for row in read_rows(path):
            if row.get("table", TABLE) == TABLE:
                run = Run.from_dict(row)
                found[f"{run.task}/{run.method}/{run.seed}"] = run  # the last one, if there are several versions
            elif row["table"] == OPEN_SET_TABLE:
                opening = OpenSetRun.from_dict(row)
                opened[f"{opening.task}/{opening.left_out}/{opening.method}/{opening.seed}"] = opening
    merge = None
    if args.merge is not None:
        lines = [line.split("\t") for line in args.merge.read_text(encoding="utf-8").splitlines() if line[:1] != "#"]
        merge = {line[0]: line[1] for line in lines if len(line) == 2}
    report = AnnotationReport(tuple(found.values()), merge=merge)
    show(report, "macro-F1, labels as they are")
    merged = report.merged()
    if merged is not None:
        show(merged, "macro-F1, merged labels")
    calibration(report)
    open_sets(OpenSetReport(tuple(opened.values())))


def show(report: AnnotationReport, title: str) -> None:
    """Print scores, and medians of differences."""
    ours = [name for name in OURS_AND_CHOSEN if name in report.methods]
    print(f"\n| {title} | best baseline | | {' | '.join(NAMES[name] for name in ours)} |")
    print("|---|---|---:|" + "---:|" * len(ours))
    groups: dict[str, list[str]] = {}
    for kind in KINDS:
        for task in report.kinds.get(kind, ()):
            groups.setdefault(f"{kind}, {n_per_type(task)}", []).append(task)
            best = report.best_baseline(task)
            cells = [marked(report, task, name) for name in ours]
            print(f"| {task} | {NAMES[best]} | {mean(report, task, best):.3f} | {' | '.join(cells)} |")
    print("\nBold: above the best baseline (95 % interval of the difference); †: below it.")
    few_or_across = [t for name, tasks in groups.items() for t in tasks if is_few(name) or name.startswith(KINDS[1])]
    groups["**few labels within sets, and across sets**"] = few_or_across
    print(f"\n| {title}: median over tasks of the difference from | | tasks | {' | '.join(NAMES[n] for n in ours)} |")
    print("|---|---|---:|" + "---:|" * len(ours))
    for name, tasks in groups.items():
        against = [("best of seven, after the fact", [mean(report, t, report.best_baseline(t)) for t in tasks])]
        if name.startswith("**"):
            against += [(NAMES[rival], [mean(report, t, rival) for t in tasks]) for rival in RIVALS]
        for rival, values in against:
            gaps = [[mean(report, t, method) for t in tasks] for method in ours]
            cells = [f"{np.median(np.array(gap) - np.array(values)):+.3f}" for gap in gaps]
            print(f"| {name} | {rival} | {len(tasks)} | {' | '.join(cells)} |")


def marked(report: AnnotationReport, task: str, method: str) -> str:
    """Return mean macro-F1, bold or marked where the interval of the difference from the best baseline excludes 0."""
    gap, text = report.difference(task, method), f"{mean(report, task, method):.3f}"
    if gap is None:
        return text
    return f"**{text}**" if gap.low > 0 else f"{text}†" if gap.high < 0 else text


def n_per_type(task: str) -> str:
    """Return "5 per type" or "all labels"."""
    return task.rsplit(", ", 1)[1] if task.endswith(" per type") else "all labels"


def is_few(group: str) -> bool:
    """Tell whether a group is of five labels per type within sets."""
    return group == f"{KINDS[0]}, 5 per type"


def mean(report: AnnotationReport, task: str, method: str | None) -> float:
    """Return mean macro-F1 over seeds."""
    values: Sequence[float] = report.values(task, method or "", "macro_f1")
    return float(np.mean(values)) if values else float("nan")


def calibration(report: AnnotationReport) -> None:
    """Print calibration errors by kind of split and number of labels."""
    print(f"\n| calibration error | cells | {' | '.join(NAMES[name] for name in report.methods)} |")
    print("|---|---:|" + "---:|" * len(report.methods))
    for kind, tasks in report.kinds.items():
        for size in dict.fromkeys(map(n_per_type, tasks)):
            some = [task for task in tasks if n_per_type(task) == size]
            errors = [report.calibration(name, some) for name in report.methods]
            cells = ["–" if e is None else f"{e.error.value:.3f}" for e in errors]
            n_cells = max(e.n_cells for e in errors if e is not None)
            print(f"| {kind}, {size} | {n_cells:,} | {' | '.join(cells)} |")


def open_sets(report: OpenSetReport) -> None:
    """Print AUROC by set, and of all sets together."""
    if not report.runs:
        return
    methods = [name for name in OPEN_SET_METHODS if name in report.methods]
    print(f"\n| open set, AUROC | types | {' | '.join(OPEN_SET_TITLES[name] for name in methods)} |")
    print("|---|---:|" + "---:|" * len(methods))
    for task in report.tasks:
        cells = [f"{report.mean(task, name):.3f}" for name in methods]
        print(f"| {task} | {len(report.types(task))} | {' | '.join(cells)} |")
    gaps = []
    for name in methods:
        values = np.concatenate([report.table(t, name) - report.table(t, REFERENCE) for t in report.tasks])
        gap = over_types_and_seeds(values)
        gaps.append(f"{gap.value:+.3f} ({gap.low:+.3f} to {gap.high:+.3f})")
    n_types = sum(len(report.types(task)) for task in report.tasks)
    print(f"| all types, minus {OPEN_SET_TITLES[REFERENCE]} | {n_types} | {' | '.join(gaps)} |")


if __name__ == "__main__":
    main()
