"""Build the gene tables that scdiva ships, from the reference tables they are taken from.

Usage::

    python scripts/build_gene_tables.py --ref DIR [--out src/scdiva/genes/tables]

``DIR`` holds ``human_genes_gencode48.tsv.gz``, ``vocab_candidate_41818.tsv.gz``, ``ensembl_id_moves.tsv.gz``,
``ensembl_symbol_history.tsv.gz``, ``gene_aliases.tsv.gz``, ``orthologs_human_mouse_one2one.tsv.gz``,
``mouse_genes_gencodeM37.tsv.gz`` and ``genesets_msigdb_hallmark_v7.5.1.json.gz``. The output is deterministic: rows are
sorted and the gzip header carries no time.
What each output holds, from which source and under which licence: ``src/scdiva/genes/tables/README.md``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

# A reference table must never bring these columns into the package (licence, or not ours to give on).
NOT_SHIPPED = ("entrez", "description", "hgnc_approved_2022")

ENSEMBL_LIKE = re.compile(r"ENS[A-Z]*G\d{11}")
# What a spreadsheet makes of MARCH1 or SEPT2: several genes can end there, so such aliases are left out.
DATE_LIKE = re.compile(
    r"^(\d{1,4}[-/.]\d{1,2}([-/.]\d{1,4})?|\d{1,2}-(MAR|SEP|DEC|OCT|FEB|APR|NOV)[A-Z]*|(MAR|SEP|DEC|OCT|FEB|APR|NOV)-\d{1,2})$",
    re.IGNORECASE,
)
MOUSE_SYSTEMATIC = re.compile(r"^(Gm\d+|[A-Z0-9]+Rik\d*|ENSMUSG\d+)$")
MOUSE_BIOTYPES = ("protein_coding", "lncRNA", "IG_C_gene", "IG_V_gene", "TR_C_gene", "TR_V_gene", "Mt_rRNA", "Mt_tRNA")


def read(ref: Path, name: str) -> pd.DataFrame:
    """Read one reference table as strings; an empty field is an empty string."""
    table = pd.read_csv(ref / name, sep="\t", dtype=str, keep_default_na=False, na_filter=False)
    return table.drop(columns=[column for column in NOT_SHIPPED if column in table.columns])


def write(path: Path, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write sorted, unique rows as a gzip TSV whose bytes depend on the rows only."""
    lines = ["\t".join(header), *("\t".join(row) for row in sorted({tuple(row) for row in rows}))]
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"{path.name}: {len(lines) - 1} rows, {path.stat().st_size / 1024:.0f} KiB")


def build(ref: Path, out: Path) -> None:
    """Build all tables."""
    out.mkdir(parents=True, exist_ok=True)
    genes = read(ref, "human_genes_gencode48.tsv.gz")
    ranked = read(ref, "vocab_candidate_41818.tsv.gz")
    moves = read(ref, "ensembl_id_moves.tsv.gz")
    history = read(ref, "ensembl_symbol_history.tsv.gz")
    aliases = read(ref, "gene_aliases.tsv.gz")
    orthologs = read(ref, "orthologs_human_mouse_one2one.tsv.gz")
    mouse = read(ref, "mouse_genes_gencodeM37.tsv.gz")

    tier_of_id = dict(zip(ranked["ensembl_id"], ranked["tier"], strict=True))
    symbol_of_id = dict(zip(genes["ensembl_id"], genes["symbol"], strict=True))
    current_symbols = set(genes["symbol"])
    releases_of_id: dict[str, set[str]] = {}
    n_with_symbol: dict[tuple[str, str], int] = {}
    for ensembl_id, symbol, release in zip(history["ensembl_id"], history["symbol"], history["release"], strict=True):
        releases = release.split("|")
        releases_of_id.setdefault(ensembl_id, set()).update(releases)
        n_with_symbol[ensembl_id, symbol] = len(releases)

    def flag(value: str) -> str:
        return "1" if value == "True" else ""

    write(
        out / "human_genes.tsv.gz",
        ("ensembl_id", "symbol", "biotype", "chrom", "is_tf", "is_mito", "is_ribo", "tier", "n_releases", "n_symbol"),
        (
            (
                row.ensembl_id,
                "" if row.symbol == row.ensembl_id else row.symbol,
                row.biotype,
                row.chrom,
                flag(row.is_tf_lambert2018),
                flag(row.is_mito),
                flag(row.is_ribo),
                tier_of_id.get(row.ensembl_id, ""),
                str(len(releases_of_id.get(row.ensembl_id, ()))),
                str(n_with_symbol.get((row.ensembl_id, row.symbol), 0)),
            )
            for row in genes.itertuples()
        ),
    )

    write(
        out / "ensembl_id_moves.tsv.gz",
        ("ensembl_id", "old_symbol", "current_id"),
        zip(moves["ensembl_id"], moves["symbol"], moves["current_id"], strict=True),
    )

    write(
        out / "symbol_history.tsv.gz",
        ("old_symbol", "ensembl_id"),
        (
            (symbol, ensembl_id)
            for ensembl_id, symbol in zip(history["ensembl_id"], history["symbol"], strict=True)
            if symbol != symbol_of_id.get(ensembl_id) and not ENSEMBL_LIKE.search(symbol)
        ),
    )

    write(
        out / "gene_aliases.tsv.gz",
        ("alias", "symbols"),
        (
            (alias, symbols)
            for alias, symbols in zip(aliases["alias"], aliases["symbols"], strict=True)
            if alias not in current_symbols and not ENSEMBL_LIKE.search(alias) and not DATE_LIKE.match(alias)
        ),
    )

    successor = dict(zip(moves["ensembl_id"], moves["current_id"], strict=True))
    human_of_mouse_symbol = {
        symbol: current
        for symbol, human_id in zip(orthologs["ms"], orthologs["h"], strict=True)
        if (current := human_id if human_id in symbol_of_id else successor.get(human_id)) is not None
    }
    named = mouse.loc[mouse["biotype"].isin(MOUSE_BIOTYPES), "symbol"]
    symbols = {s for s in named if s and not MOUSE_SYSTEMATIC.match(s)} | {s for s in human_of_mouse_symbol if s}
    write(
        out / "mouse_symbols.tsv.gz",
        ("mouse_symbol", "human_ensembl_id"),
        ((symbol, human_of_mouse_symbol.get(symbol, "")) for symbol in symbols),
    )

    packed = (ref / "genesets_msigdb_hallmark_v7.5.1.json.gz").read_bytes()
    sets = {
        name.removeprefix("HALLMARK_"): sorted(found) for name, found in json.loads(gzip.decompress(packed)).items()
    }
    text = json.dumps(dict(sorted(sets.items())), separators=(",", ":"))
    (out / "hallmark_sets.json.gz").write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    print(f"hallmark_sets.json.gz: {len(sets)} sets")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", type=Path, required=True, help="folder of the reference tables")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "src" / "scdiva" / "genes" / "tables",
        help="folder to write the shipped tables to",
    )
    arguments = parser.parse_args()
    build(arguments.ref, arguments.out)


if __name__ == "__main__":
    main()
