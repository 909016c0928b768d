"""Build the table of the Cell Ontology that scdiva ships.

Usage::

    python scripts/build_cell_ontology.py --ref FILE [--out src/scdiva/data/ontology/cell_ontology.tsv.gz]

``FILE`` is a release of the Cell Ontology as gzip JSON: id to ``label``, ``synonyms``, ``ancestors`` (id to number of
steps), ``deprecated``, ``replaced_by``, ``consider``. The output is deterministic: rows are sorted and the gzip header
carries no time. What it holds and under which licence: ``src/scdiva/data/ontology/README.md``.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

HEADER = ("id", "label", "synonyms", "parents", "deprecated", "replaced_by", "consider")
ROOT = "CL:0000000"
OUT = Path(__file__).resolve().parents[1] / "src" / "scdiva" / "data" / "ontology" / "cell_ontology.tsv.gz"


def row(term_id: str, term: dict[str, Any]) -> tuple[str, ...]:
    """Return one row; lists are joined by ``|``."""
    parents = sorted(ancestor for ancestor, n_steps in term["ancestors"].items() if n_steps == 1)
    synonyms = sorted({name.strip() for name in term.get("synonyms", ())})
    return (
        term_id,
        term["label"].strip(),
        "|".join(synonyms),
        "|".join(parents),
        "1" if term["deprecated"] else "",
        term.get("replaced_by") or "",
        "|".join(term.get("consider", ())),
    )


def build(ref: Path, out: Path) -> None:
    """Build the table."""
    terms = json.loads(gzip.decompress(ref.read_bytes()))
    rows = [row(term_id, term) for term_id, term in terms.items()]
    # Parts of cells ("basophilic cytoplasm") are in the release too, below "cell" by other relations than "is a".
    parts = [fields for fields in rows if not fields[3] and not fields[4] and fields[0] != ROOT]
    kept = sorted(set(rows) - set(parts))
    assert not any(separator in field for fields in kept for field in fields for separator in "\t\n")
    text = "\n".join("\t".join(fields) for fields in [HEADER, *kept]) + "\n"
    out.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    left_out = ", ".join(fields[1] for fields in parts)
    print(f"{out.name}: {len(kept)} terms, {out.stat().st_size / 1024:.0f} KiB; left out: {left_out}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ref", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    build(arguments.ref, arguments.out)


if __name__ == "__main__":
    main()
