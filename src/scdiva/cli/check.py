"""``scdiva check FILE``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from scdiva.cli.common import CoverageOption, FileArgument, LayerOption, LibrarySizeOption

if TYPE_CHECKING:
    from scdiva.pp import CheckReport


def check(
    file: FileArgument,
    layer: LayerOption = None,
    library_size_key: LibrarySizeOption = None,
    min_coverage: CoverageOption = 0.5,
    model: Annotated[
        str | None, typer.Option("--model", help="Check against this model's genes instead of the full vocabulary.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Tell what is in FILE: counts or not, genes matched, share of UMIs covered, and whether it can be used."""
    from scdiva.pp import check as run

    vocabulary = None
    if model is not None:
        from scdiva.models.bundle import find_bundle, read_bundle

        vocabulary = read_bundle(find_bundle(model)).vocabulary
    report = run(file, vocabulary, layer=layer, library_size_key=library_size_key, min_coverage=min_coverage)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else _text(report))
    if not report.is_usable:
        raise typer.Exit(2)


def _text(report: CheckReport) -> str:
    lines = [f"{report.name}: {report.n_cells:,} cells x {report.n_features:,} features"]

    def add(label: str, value: str) -> None:
        lines.append(f"  {label:<22}{value}")

    if report.counts_in is not None:
        add("counts", report.counts_in)
    genes = report.genes
    if genes is not None and report.coverage is not None:
        add("UMIs covered", f"{report.coverage:.2%}")
        parts = {
            "by Ensembl id": genes["by_id"],
            "by symbol": genes["by_symbol"],
            "by alias": genes["by_alias"],
            "moved id": genes["moved"],
            "former symbol": genes["by_history"],
        }
        add("genes matched", f"{genes['n_used']:,} ({', '.join(f'{n:,} {k}' for k, n in parts.items() if n)})")
        rest = {
            "ambiguous": genes["ambiguous"],
            "known, not in the vocabulary": genes["outside"],
            "unknown": genes["missing"],
            "no genes (antibodies, peaks)": genes["not_genes"],
        }
        add("not matched", ", ".join(f"{n:,} {k}" for k, n in rest.items() if n) or "none")
        if genes["n_merged"]:
            add("summed", f"{genes['n_merged']:,} columns into the gene of another column")
    if report.largest_unmatched:
        shown = list(report.largest_unmatched.items())[:5]
        add("largest unmatched", ", ".join(f"{name} ({share:.2%})" for name, share in shown))
    for label, summary in (("UMIs per cell", report.library_size), ("genes per cell", report.genes_per_cell)):
        if summary is not None:
            add(label, f"median {summary.median:,.0f} ({summary.minimum:,.0f} to {summary.maximum:,.0f})")
    if report.n_empty_cells:
        add("empty cells", f"{report.n_empty_cells:,}")
    for warning in report.warnings:
        add("note", warning)
    if report.problem is None:
        add("verdict", "usable as it is")
    else:
        add("verdict", "NOT usable")
        for key in ("found", "expected", "fix"):
            add(f"  {key}", report.problem[key])
    return "\n".join(lines)
