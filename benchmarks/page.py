"""A page of results: its words are written by hand and stay, its tables are written by a command."""

from __future__ import annotations

from pathlib import Path

from scdiva.data.output import replacing


def write_page(path: Path, title: str, tables: str) -> None:
    """Write title, the words that stand between the title and the first ``##`` of the page as it is, and the tables."""
    words = ""
    if path.exists():
        words = path.read_text(encoding="utf-8").partition("\n## ")[0].partition("\n")[2].strip()
    with replacing(path) as partial:
        partial.write_text(f"# {title}\n\n{words + chr(10) * 2 if words else ''}{tables.strip()}\n", encoding="utf-8")
