"""Print, as a Markdown table, how well the genes of every .h5ad file in a folder align to the default vocabulary.

Usage::

    python scripts/gene_coverage_table.py DIR [--misses N]

``--misses N`` also lists the N unresolved names with the most counts of every file. The Ensembl ids are read from the
column ``ensembl_id`` of ``.var`` where there is one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import h5py
import numpy as np
import scipy.sparse as sp

from scdiva.genes import GeneAlignment, GeneStatus, GeneVocabulary, align_genes, detect_species


def read_genes(path: Path) -> tuple[list[str], list[str] | None, np.ndarray]:
    """Read gene names, Ensembl ids if any, and the total counts of each gene."""
    with h5py.File(path) as file:
        var = file["var"]
        names = [str(name) for name in var[var.attrs["_index"]].asstr()[:]]
        ids = [str(name) for name in var["ensembl_id"].asstr()[:]] if "ensembl_id" in var else None
        x = file["X"]
        if isinstance(x, h5py.Dataset):
            return names, ids, np.asarray(x[:]).sum(axis=0)
        kind = sp.csr_matrix if x.attrs["encoding-type"] == "csr_matrix" else sp.csc_matrix
        counts = kind((x["data"][:], x["indices"][:], x["indptr"][:]), shape=tuple(x.attrs["shape"]))
    return names, ids, np.asarray(counts.sum(axis=0, dtype=np.int64)).ravel()


def coverage(path: Path, vocabulary: GeneVocabulary) -> tuple[GeneAlignment, np.ndarray, str]:
    """Align the genes of one file; return the alignment, the counts of each column and the species."""
    names, ids, totals = read_genes(path)
    return align_genes(names, vocabulary, ids=ids), totals, detect_species(names, ids)


def table(folder: Path, n_misses: int = 0) -> list[str]:
    """Return the lines of the table."""
    vocabulary = GeneVocabulary.default()
    column_of_key = {
        "n_source": "genes",
        "by_id": "by id",
        "by_symbol": "by symbol",
        "by_alias": "alias",
        "moved": "moved",
        "by_history": "history",
        "ambiguous": "ambiguous",
        "outside": "outside",
        "missing": "missing",
        "n_merged": "merged",
    }
    lines = [f"| file | {' | '.join(column_of_key.values())} | UMI share |", "|---" + "|--:" * 11 + "|"]
    for path in sorted(folder.glob("*.h5ad")):
        alignment, totals, species = coverage(path, vocabulary)
        counts = alignment.counts()
        cells = [
            path.stem + ("" if species == "human" else f" ({species})"),
            *(f"{counts[key]:,}" for key in column_of_key),
        ]
        lines.append(f"| {' | '.join(cells)} | {alignment.umi_share(totals):.4f} |")
        unused = np.flatnonzero(alignment.gene_of_source < 0)
        for column in unused[np.argsort(-totals[unused], kind="stable")][:n_misses].tolist():
            status = GeneStatus(int(alignment.status[column])).name
            lines.append(f"    {alignment.names[column]}  {status}  {totals[column] / totals.sum():.5f}")
    return lines


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of .h5ad files with raw counts in X")
    parser.add_argument("--misses", type=int, default=0, help="unresolved names to list for every file")
    arguments = parser.parse_args()
    print("\n".join(table(arguments.folder, arguments.misses)))


if __name__ == "__main__":
    main()
