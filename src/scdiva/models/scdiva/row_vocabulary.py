"""Which gene has which row of published weights: the file that their user must supply."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scdiva.errors import BundleError, GeneError
from scdiva.genes import FIRST_GENE_ROW, N_ROWS_AFTER_GENES, GeneStatus, GeneVocabulary, align_genes
from scdiva.genes.tables_io import human_genes

N_SPECIAL_ROWS = FIRST_GENE_ROW + N_ROWS_AFTER_GENES
"""Rows of published weights that are no genes: two before the genes, three after."""

_SHOWN = 20
_ENSEMBL = re.compile(r"ENSG\d{11}(\.\d+)?")
_HEADER_WORDS = frozenset(
    [
        *("row", "rows", "index", "token", "token_id", "id", "gene", "genes", "gene_id", "gene_ids", "ensembl"),
        *("ensembl_id", "ensembl_gene_id", "feature_id", "symbol", "symbols", "gene_symbol", "gene_symbols"),
        *("gene_name", "gene_names", "feature_name", "name"),
    ]
)


@dataclass(frozen=True, slots=True)
class RowVocabulary:
    """The genes of published weights, in the order of their rows.

    Parameters
    ----------
    vocabulary
        In that order.
    unknown_ids
        Ensembl ids that scdiva's gene tables do not list as current, kept as they are: data with the same ids find
        them.
    """

    vocabulary: GeneVocabulary
    unknown_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Line:
    """A gene of a vocabulary file: line number, Ensembl id without version and symbol; one may be empty."""

    number: int
    ensembl_id: str
    symbol: str

    @property
    def name(self) -> str:
        return self.symbol or self.ensembl_id


def read_row_vocabulary(path: str | Path, n_genes: int) -> RowVocabulary:
    """Read which gene has which row of published weights.

    Ensembl ids and symbols are looked up in scdiva's gene tables, as those of any data file: retired ids become the
    ids that replaced them, unless these have a row of their own, and symbols become Ensembl ids.

    Parameters
    ----------
    path
        See :func:`scdiva.models.scdiva.convert.convert`.
    n_genes
        Genes of the weights: rows without the five special ones.

    Raises
    ------
    BundleError
        The file cannot be read, has another number of lines, or is no such list.
    GeneError
        It names unknown or ambiguous genes, or a gene twice.
    """
    path = Path(path)
    lines = _gene_lines(path, n_genes)
    chosen, problems = _resolve(lines)
    if problems:
        raise GeneError(
            f"{len(problems)} lines of {path.name} name no gene: {listed(problems)}",
            expected="human Ensembl ids, or symbols that mean one human gene",
            fix="give the Ensembl ids of these lines",
        )
    lines_of_id: dict[str, list[_Line]] = {}
    for line, (ensembl_id, _) in zip(lines, chosen, strict=True):
        lines_of_id.setdefault(ensembl_id, []).append(line)
    twice = [
        f"{ensembl_id} in " + " and ".join(f"line {line.number} ({line.name})" for line in same)
        for ensembl_id, same in lines_of_id.items()
        if len(same) > 1
    ]
    if twice:
        raise GeneError(
            f"{len(twice)} genes are in {path.name} more than once: {listed(twice)}",
            expected="every gene once",
            fix="a gene has one row: correct the lines, or give both lines their Ensembl ids",
        )
    ids, symbols = zip(*chosen, strict=True)
    vocabulary = GeneVocabulary(np.array(ids, dtype=np.str_), np.array(symbols, dtype=np.str_))
    known = set(_all_genes().ensembl_id.tolist())
    return RowVocabulary(vocabulary, tuple(ensembl_id for ensembl_id in ids if ensembl_id not in known))


def _gene_lines(path: Path, n_genes: int) -> list[_Line]:
    """Read the lines of the genes, without header, row numbers and special rows."""
    fix = "give one gene per line, in the order of the rows of the weights: Ensembl id, symbol, or both with a tab"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} cannot be read ({error})", expected="a tab-separated text file", fix=fix) from error
    rows = [[cell.strip() for cell in line.split("\t")] for line in text.rstrip().splitlines()]
    first = 1
    if rows and all(cell.lower() in _HEADER_WORDS for cell in rows[0] if cell) and any(rows[0]):
        rows, first = rows[1:], 2
    if len(rows) not in (n_genes, n_genes + N_SPECIAL_ROWS):
        raise BundleError(
            f"{path.name} lists {len(rows):,} rows",
            expected=f"{n_genes:,} genes, or all {n_genes + N_SPECIAL_ROWS:,} rows of the weights",
            fix=fix,
        )
    rows = _without_row_numbers(rows, path, fix)
    numbered = list(enumerate(rows, start=first))
    if len(rows) != n_genes:
        _check_special(numbered[:FIRST_GENE_ROW] + numbered[-N_ROWS_AFTER_GENES:], path)
        numbered = numbered[FIRST_GENE_ROW:-N_ROWS_AFTER_GENES]
    lines = []
    for number, cells in numbered:
        # once: the symbol of a gene without symbol is often its id
        ids = list(dict.fromkeys(cell.partition(".")[0] for cell in cells if _ENSEMBL.fullmatch(cell)))
        names = [cell for cell in cells if cell and not _ENSEMBL.fullmatch(cell)]
        if len(ids) > 1 or len(names) > 1 or not ids + names:
            raise BundleError(
                f"line {number} of {path.name} is {' | '.join(cells)!r}",
                expected="an Ensembl id, a symbol, or one of each",
                fix=fix,
            )
        lines.append(_Line(number, *(part[0] if part else "" for part in (ids, names))))
    return lines


def _without_row_numbers(rows: list[list[str]], path: Path, fix: str) -> list[list[str]]:
    """Drop a first column of row numbers; they must count up, from 0 or from the first gene's row."""
    if not all(row[0].isdecimal() for row in rows):
        return rows
    numbers = [int(row[0]) for row in rows]
    if numbers[0] not in (0, FIRST_GENE_ROW) or numbers != list(range(numbers[0], numbers[0] + len(rows))):
        raise BundleError(
            f"the first column of {path.name} holds numbers that do not count up from 0 or {FIRST_GENE_ROW}",
            expected="rows in order",
            fix=fix,
        )
    return [row[1:] for row in rows]


def _check_special(numbered: list[tuple[int, list[str]]], path: Path) -> None:
    """Refuse genes where the special rows must be: the file would be shifted."""
    names = [cell for _, cells in numbered for cell in cells if cell]
    # current names only: somebody may once have called a gene EOS
    found = align_genes(names, _all_genes()) if names else None
    genes = [] if found is None else found.names_with(GeneStatus.BY_ID) + found.names_with(GeneStatus.BY_SYMBOL)
    if genes:
        raise BundleError(
            f"{path.name} has genes in special rows: {listed(genes)}",
            expected="PAD and MASK in the first two rows, PAD-FILL, BOS and EOS in the last three",
            fix="list the rows in the order of the weights, or the genes alone",
        )


def _resolve(lines: Sequence[_Line]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return Ensembl id and symbol of every line, and a word on each line that names no gene."""
    names, ids = [line.name for line in lines], [line.ensembl_id for line in lines]
    default, every = GeneVocabulary.default(), _all_genes()
    # the default vocabulary first: a symbol that several genes share means the one that data are counted with
    first, second = (align_genes(names, vocabulary, ids=ids) for vocabulary in (default, every))
    resolved = np.where(
        first.gene_of_source >= 0,
        default.ensembl_id[first.gene_of_source],
        np.where(second.gene_of_source >= 0, every.ensembl_id[second.gene_of_source], ""),
    ).tolist()
    n_lines = Counter(resolved)
    symbol_of = dict(zip(every.ensembl_id.tolist(), every.symbol.tolist(), strict=True))
    chosen, problems = [], []
    for line, ensembl_id, status in zip(lines, resolved, second.status.tolist(), strict=True):
        if line.ensembl_id and (not ensembl_id or n_lines[ensembl_id] > 1):
            # unknown, or its successor has a row of its own: the id stays what it is
            ensembl_id = line.ensembl_id
        if not ensembl_id:
            why = "ambiguous" if status == GeneStatus.AMBIGUOUS else "unknown"
            problems.append(f"line {line.number} {line.name!r} ({why})")
        chosen.append((ensembl_id, line.symbol or symbol_of.get(ensembl_id, ensembl_id)))
    return chosen, problems


@functools.cache
def _all_genes() -> GeneVocabulary:
    """Return all human genes that scdiva's tables know, whether or not its own vocabulary has them."""
    table = human_genes()
    return GeneVocabulary(np.array(table.ensembl_id), np.array(table.symbol))


def listed(names: Sequence[str]) -> str:
    """Join up to twenty names, and tell how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
