"""How gene names are written: prefixes, versions, and what spreadsheets do to them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

#: Genome prefix that a multi-genome reference puts before human genes (Seurat turns ``_`` into ``-``).
HUMAN_PREFIX = re.compile(r"^(?:GRCh3[78](?:\.p\d+)?|hg19|hg38)(?:_+|-+|\.+)(?=.)", re.IGNORECASE)
#: The same for mouse genes.
MOUSE_PREFIX = re.compile(r"^(?:GRCm3[89](?:\.p\d+)?|mm9|mm10|mm39)(?:_+|-+|\.+)(?=.)", re.IGNORECASE)

_ENSEMBL = re.compile(r"^(ENSG\d{11})(?:\.\d+)?(?:_PAR_Y)?$")
_MONTHS = "jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
_EXCEL = re.compile(rf"^(?:\d{{1,2}}-(?:{_MONTHS})|(?:{_MONTHS})-\d{{1,2}})$", re.IGNORECASE)


def as_strings(values: Iterable[Any]) -> list[str]:
    """Return a list of str; None, NaN and NA become the empty string, bytes are decoded; one string is one name."""
    if isinstance(values, str):
        return [values]
    items = values.tolist() if hasattr(values, "tolist") else list(values)
    return [item if type(item) is str else _as_string(item) for item in items]


def is_excel_damaged(name: str) -> bool:
    """Return whether a spreadsheet turned the gene name into a date (``2-Sep`` for SEPT2, ``Mar-01`` for MARCH1)."""
    return _EXCEL.match(name) is not None


def strip_version(ensembl: str) -> str:
    """Return an Ensembl id without version and ``_PAR_Y``: both copies of a pseudoautosomal gene are one gene."""
    if len(ensembl) == 15:
        return ensembl
    match = _ENSEMBL.match(ensembl.strip())
    return match.group(1) if match else ensembl.strip()


def _as_string(item: Any) -> str:
    if isinstance(item, bytes):
        return item.decode()
    return "" if item is None or str(item) in ("nan", "<NA>") else str(item)
