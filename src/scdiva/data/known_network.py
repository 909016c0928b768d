"""Known regulation: which regulator is reported to act on which target, read from the tables of databases.

A table has a row per pair. Its regulators are in a column ``source``, ``tf`` or ``regulator``, its targets in
``target``; a column ``sign``, ``weight`` or ``mode`` says whether the target is activated or repressed. TRRUST,
CollecTRI, DoRothEA, OmniPath and the targets of ChIP peaks come in such tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scdiva.errors import SourceError, UnsupportedError
from scdiva.genes import GeneStatus, GeneVocabulary, align_genes

if TYPE_CHECKING:
    import pandas as pd

REGULATOR_COLUMNS = ("source", "tf", "regulator")
SIGN_COLUMNS = ("sign", "weight", "mode")
"""Tried in this order: "weight" is a number whose sign counts, "mode" a word."""
_WORDS = {"activation": 1, "stimulation": 1, "repression": -1, "inhibition": -1, "unknown": 0, "": 0, "nan": 0}
_SUFFIXES = (".tsv", ".tsv.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True, slots=True, eq=False)
class KnownNetwork:
    """Pairs of regulator and target that a database reports.

    Parameters
    ----------
    name
        Of the table.
    regulators, targets
        ``(n_edges,)`` gene symbols of the vocabulary; no pair twice, sorted by regulator, then target.
    sign
        ``(n_edges,)`` int8: +1 activates, -1 represses, 0 not known, or reported both ways equally often.
    has_signs
        Whether the table says anything of signs.
    n_rows
        Rows of the table.
    n_lost
        Rows whose regulator or target is no gene of the vocabulary (or could be several).
    n_merged
        Rows that name a pair that another row had named already (other spellings, other papers or cells).
    lost_regulators, lost_targets
        The names that were not found, sorted.
    """

    name: str
    regulators: NDArray[np.str_]
    targets: NDArray[np.str_]
    sign: NDArray[np.int8]
    has_signs: bool
    n_rows: int
    n_lost: int
    n_merged: int
    lost_regulators: tuple[str, ...]
    lost_targets: tuple[str, ...]

    @property
    def n_edges(self) -> int:
        """Number of pairs."""
        return int(self.regulators.size)

    def of(self, regulator: str) -> dict[str, int]:
        """Return the targets of a regulator with their signs; none where it is not in the table."""
        rows = self.regulators == regulator
        return dict(zip(self.targets[rows].tolist(), self.sign[rows].tolist(), strict=True))

    def __str__(self) -> str:
        names = len(self.lost_regulators), len(self.lost_targets)
        return (
            f"{self.name}: {self.n_edges:,} pairs of {np.unique(self.regulators).size:,} regulators, "
            f"{np.count_nonzero(self.sign):,} with a sign; of {self.n_rows:,} rows {self.n_merged:,} repeat a pair and "
            f"{self.n_lost:,} name no gene of the vocabulary ({names[0]} regulators, {names[1]} targets)"
        )


def read_truth(
    data: str | Path | pd.DataFrame, vocabulary: GeneVocabulary | None = None, *, name: str | None = None
) -> KnownNetwork:
    """Read a table of known regulation.

    Names become symbols of the vocabulary by the rules of :func:`scdiva.genes.align_genes` (aliases, former symbols,
    Ensembl ids). Rows of the same pair are one edge; its sign is that of most of them, 0 where as many say the one as
    the other (our decision). Where a table has several columns of signs, the first of "sign", "weight", "mode" counts.

    Parameters
    ----------
    data
        ``.tsv``, ``.csv`` (also ``.gz``) or ``.parquet`` (needs pyarrow), or a data frame.
    vocabulary
        The genes to find; the default vocabulary if left out.
    name
        What to call it; the name of the file if left out.

    Raises
    ------
    SourceError
        There is no such file, it has no columns of regulators and targets, no row is left, or a mode is no known word.
    UnsupportedError
        A ``.parquet`` without pyarrow.
    """
    table, found_name = _table(data)
    regulator_column = next((column for column in REGULATOR_COLUMNS if column in table), None)
    if regulator_column is None or "target" not in table:
        raise SourceError(
            f"{found_name} has the columns {', '.join(map(str, table.columns[:10]))}",
            expected=f"one of {', '.join(REGULATOR_COLUMNS)}, and target",
            fix="rename the columns of regulators and targets",
        )
    genes = vocabulary or GeneVocabulary.default()
    sign_column = next((column for column in SIGN_COLUMNS if column in table), None)
    sign = np.zeros(len(table), dtype=np.int64) if sign_column is None else _signs(table[sign_column], found_name)
    regulator, lost_regulators = _resolved(table[regulator_column], genes)
    target, lost_targets = _resolved(table["target"], genes)
    is_found = (regulator >= 0) & (target >= 0)
    if not is_found.any():
        raise SourceError(
            f"no row of {found_name} names two genes of the vocabulary",
            expected="human gene symbols or Ensembl ids",
            fix="check the columns",
        )
    pair, edge_of_row = np.unique(regulator[is_found] * genes.n_genes + target[is_found], return_inverse=True)
    total = np.bincount(edge_of_row, weights=sign[is_found], minlength=pair.size)
    names = np.asarray(genes.symbol, dtype=np.str_)
    regulators, targets = names[pair // genes.n_genes], names[pair % genes.n_genes]
    order = np.lexsort((targets, regulators))
    return KnownNetwork(
        name or found_name,
        regulators[order],
        targets[order],
        np.sign(total[order]).astype(np.int8),
        sign_column is not None,
        len(table),
        int(np.count_nonzero(~is_found)),
        int(np.count_nonzero(is_found)) - pair.size,
        lost_regulators,
        lost_targets,
    )


def _table(data: str | Path | pd.DataFrame) -> tuple[pd.DataFrame, str]:
    import pandas as pd

    if isinstance(data, pd.DataFrame):
        return data, "table"
    path = Path(data)
    suffix = next((suffix for suffix in sorted(_SUFFIXES, key=len, reverse=True) if path.name.endswith(suffix)), None)
    if suffix is None or not path.is_file():
        raise SourceError(
            f"{path} is no table of known regulation" if path.is_file() else f"there is no file {path}",
            expected=f"a file ending in {', '.join(_SUFFIXES)}",
            fix="check the path",
        )
    name = path.name.removesuffix(suffix)
    if suffix == ".parquet":
        try:
            return pd.read_parquet(path), name
        except ImportError as error:
            raise UnsupportedError(
                f"{path} is a .parquet, and pyarrow is not installed",
                expected="pyarrow, or a .tsv",
                fix="pip install pyarrow, or write the table as .tsv",
            ) from error
    try:
        # "NA" and the like are no missing values here, and no gene either
        table = pd.read_csv(path, sep="," if ".csv" in suffix else "\t", keep_default_na=False, low_memory=False)
    except (ValueError, OSError) as error:
        raise SourceError(
            f"{path} cannot be read: {str(error).splitlines()[0]}", expected="a table", fix="check the file"
        ) from error
    return table, name


def _signs(column: pd.Series[Any], name: str) -> NDArray[np.int64]:
    import pandas as pd

    numbers = pd.to_numeric(column, errors="coerce")
    text = column.astype(str).str.strip().str.lower()
    signs = np.sign(numbers).fillna(text.map(_WORDS))
    if signs.isna().any():
        raise SourceError(
            f"{name} calls a sign {text[signs.isna()].iloc[0]!r}",
            expected=f"a number, or one of {', '.join(word for word in _WORDS if word)}",
            fix="correct the column, or take it out",
        )
    return signs.to_numpy(dtype=np.int64)


def _resolved(column: pd.Series[Any], genes: GeneVocabulary) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the gene of each row (-1: none), and the names without one."""
    names, name_of_row = np.unique(column.astype(str).to_numpy(dtype=np.str_), return_inverse=True)
    # as typed lists are read, not as a file: no name may change what another one means
    aligned = align_genes(names.tolist(), genes)
    gene = np.where(aligned.status < GeneStatus.AMBIGUOUS, aligned.gene_of_source, -1).astype(np.int64)
    return gene[name_of_row], tuple(names[gene < 0].tolist())
