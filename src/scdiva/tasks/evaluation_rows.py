"""What evaluations have in common: rows on disk that a later run uses again, reports, means over seeds, versions."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scdiva.data.output import replacing
from scdiva.types import CellCounts

_KEY_DIGITS = 24


def row_key(*parts: Any) -> str:
    """Return a hash of everything that a row depends on: a row is used again only if it is the same.

    Parameters
    ----------
    parts
        Numbers, texts, and lists of them (JSON).
    """
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:_KEY_DIGITS]


def content_hash(cells: CellCounts, *columns: NDArray[np.str_]) -> str:
    """Return a hash of the counts, of which genes were measured, and of columns of text."""
    digest = hashlib.sha256()
    for array in (cells.counts.indptr, cells.counts.indices, cells.counts.data, cells.is_measured):
        digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
    for column in columns:
        digest.update(json.dumps(column.tolist()).encode())
    return digest.hexdigest()


def read_rows(path: Path | None) -> list[dict[str, Any]]:
    """Read ``rows.jsonl``; a last line that was cut off by a kill is left out, a missing file has no rows."""
    if path is None or not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to ``rows.jsonl``, on disk before it returns; a line that was cut off gives way."""
    if path.exists():
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            with replacing(path) as partial:
                partial.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_report(folder: Path, markdown: str, content: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.json``, each whole or not at all.

    Parameters
    ----------
    folder
        An existing folder.
    markdown
        The tables.
    content
        Plain dicts, lists and numbers; NaN is refused, write None.
    """
    targets = folder / "report.md", folder / "report.json"
    texts = markdown, json.dumps(content, indent=1, allow_nan=False) + "\n"
    for path, text in zip(targets, texts, strict=True):
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    return targets


def or_none(value: float) -> float | None:
    """Return a number for JSON: None where it is not finite."""
    return float(value) if np.isfinite(value) else None


def or_nan(value: float | None) -> float:
    """Read what :func:`or_none` made."""
    return float("nan") if value is None else float(value)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation over seeds; NaN where there is no value, or one only."""
    if not len(values):
        return float("nan"), float("nan")
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def mean_text(values: Sequence[float]) -> str:
    """Return "mean (sd)" over seeds; the mean alone of one seed, a dash of none."""
    mean, sd = mean_and_sd(values)
    if not np.isfinite(mean):
        return "–"
    return f"{mean:.3f}" + (f" ({sd:.3f})" if np.isfinite(sd) else "")


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that are installed, by the name of the distribution."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
