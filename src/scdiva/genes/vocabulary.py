"""The gene vocabulary: which genes a model knows, in which order, and which token stands for which gene."""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdiva.errors import BundleError, GeneError
from scdiva.genes.tables_io import UNRANKED, human_genes

if TYPE_CHECKING:
    import pandas as pd

#: Row of the PAD token: fills short cells up to the length of a minibatch, never attended to.
PAD_ROW = 0
#: Row of the MASK token: stands where a gene or value is hidden.
MASK_ROW = 1
#: Row of the first gene; gene g has row ``FIRST_GENE_ROW + g``.
FIRST_GENE_ROW = 2
#: Reserved rows after the genes: PAD-FILL, BOS, EOS.
N_ROWS_AFTER_GENES = 3

# The ranked table has 41,818 genes and the model 41,818 rows: the last five genes give way to the five special rows.
_N_DEFAULT_GENES = 41_818 - FIRST_GENE_ROW - N_ROWS_AFTER_GENES
_ROW_LAYOUT = "scdiva-rows-1:PAD,MASK,genes,PAD-FILL,BOS,EOS"
_TSV_HEADER = ("row", "ensembl_id", "symbol")


@dataclass(frozen=True, slots=True, eq=False)
class GeneVocabulary:
    """The genes that a model knows, in the order of its token table.

    ``g`` in 0 to G-1 is a *gene index*: the column of a counts matrix in vocabulary order. ``g + 2`` is the gene's
    *row*: its token id. Row 0 is PAD, row 1 is MASK; after the genes come PAD-FILL, BOS and EOS. Two vocabularies are
    equal if their fingerprints are.

    Parameters
    ----------
    ensembl_id
        ``(G,)`` str: unique Ensembl gene ids without version. They define the vocabulary.
    symbol
        ``(G,)`` str: a symbol for people to read. Symbols need not be unique (MATR3 and CD99 have two Ensembl ids
        each) and change between annotation releases.

    Raises
    ------
    BundleError
        The two arrays differ in length, are empty, or an id is empty or there twice.
    """

    PAD_ROW: ClassVar[int] = PAD_ROW
    MASK_ROW: ClassVar[int] = MASK_ROW
    FIRST_GENE_ROW: ClassVar[int] = FIRST_GENE_ROW
    N_ROWS_AFTER_GENES: ClassVar[int] = N_ROWS_AFTER_GENES

    ensembl_id: NDArray[np.str_]
    symbol: NDArray[np.str_]
    fingerprint: str = field(init=False)
    """Sha256 hex over the row layout and the ordered Ensembl ids; symbols, which change, are not in it."""

    def __post_init__(self) -> None:
        ids = np.array(self.ensembl_id, dtype=np.str_)
        symbols = np.array(self.symbol, dtype=np.str_)
        if ids.ndim != 1 or ids.shape != symbols.shape or ids.size == 0:
            raise BundleError(
                f"a vocabulary with ensembl_id of shape {ids.shape} and symbol of shape {symbols.shape}",
                expected="two one-dimensional arrays of the same length, with at least one gene",
                fix="give one symbol per Ensembl id (the id itself where a gene has no symbol)",
            )
        if bool((ids == "").any()):
            raise BundleError(
                f"an empty Ensembl id at gene index {int(np.argmax(ids == ''))}",
                expected="an id for every gene",
                fix="drop the gene or give its id",
            )
        unique, n_times = np.unique(ids, return_counts=True)
        if unique.size != ids.size:
            raise BundleError(
                f"{int((n_times > 1).sum())} Ensembl ids more than once, first {unique[n_times > 1][0]}",
                expected="every Ensembl id once",
                fix="remove the duplicates; a gene has one row",
            )
        ids.flags.writeable = False
        symbols.flags.writeable = False
        text = "\n".join([_ROW_LAYOUT, *ids.tolist()])
        object.__setattr__(self, "ensembl_id", ids)
        object.__setattr__(self, "symbol", symbols)
        object.__setattr__(self, "fingerprint", hashlib.sha256(text.encode()).hexdigest())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GeneVocabulary):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __len__(self) -> int:
        return self.n_genes

    def __repr__(self) -> str:
        return f"GeneVocabulary(n_genes={self.n_genes}, n_rows={self.n_rows}, fingerprint={self.fingerprint[:12]})"

    @classmethod
    def default(cls) -> GeneVocabulary:
        """Return the vocabulary that scdiva ships: 41,813 human genes, 41,818 rows.

        The genes are the first 41,813 of a ranking by tier (protein-coding genes first, then IG/TR and mitochondrial
        genes, lncRNA, small RNA with HGNC ids, pseudogenes that other models know), and by Ensembl id within a tier.
        The ranking is our own decision; the count of rows is the paper's. Made once per process.
        """
        return _default_vocabulary()

    @property
    def n_genes(self) -> int:
        """G: number of genes, special rows not counted."""
        return int(self.ensembl_id.shape[0])

    @property
    def n_rows(self) -> int:
        """Number of rows of a token table: the genes and five special rows."""
        return FIRST_GENE_ROW + self.n_genes + N_ROWS_AFTER_GENES

    @property
    def pad_fill_row(self) -> int:
        """Row of the reserved PAD-FILL token."""
        return FIRST_GENE_ROW + self.n_genes

    @property
    def bos_row(self) -> int:
        """Row of the reserved begin-of-sequence token."""
        return FIRST_GENE_ROW + self.n_genes + 1

    @property
    def eos_row(self) -> int:
        """Row of the reserved end-of-sequence token."""
        return FIRST_GENE_ROW + self.n_genes + 2

    def row_of_gene(self, genes: ArrayLike) -> NDArray[np.int64]:
        """Return the rows of the given gene indices.

        Parameters
        ----------
        genes
            Gene indices, any shape.

        Returns
        -------
        numpy.ndarray
            int64, same shape.

        Raises
        ------
        GeneError
            An index is not in 0 to G-1.
        """
        index = np.asarray(genes, dtype=np.int64)
        _check_range(index, 0, self.n_genes, "gene index")
        return index + FIRST_GENE_ROW

    def gene_of_row(self, rows: ArrayLike) -> NDArray[np.int64]:
        """Return the gene indices of the given rows.

        Parameters
        ----------
        rows
            Rows of genes, any shape; special rows are not genes.

        Returns
        -------
        numpy.ndarray
            int64, same shape.

        Raises
        ------
        GeneError
            A row is a special row or does not exist.
        """
        row = np.asarray(rows, dtype=np.int64)
        _check_range(row, FIRST_GENE_ROW, FIRST_GENE_ROW + self.n_genes, "gene row")
        return row - FIRST_GENE_ROW

    def subset(self, genes: ArrayLike) -> GeneVocabulary:
        """Return a vocabulary of some of the genes, in the order of this one.

        Parameters
        ----------
        genes
            Boolean mask ``(G,)``, or gene indices in any order, each once.

        Raises
        ------
        GeneError
            The mask has the wrong length, or an index is out of range, there twice, or missing altogether.
        """
        chosen = np.asarray(genes)
        if chosen.dtype == np.bool_:
            if chosen.shape != (self.n_genes,):
                raise GeneError(
                    f"a mask of shape {chosen.shape}",
                    expected=f"({self.n_genes},), one entry per vocabulary gene",
                    fix="build the mask from this vocabulary",
                )
            index = np.flatnonzero(chosen)
        else:
            index = np.sort(chosen.astype(np.int64).ravel())
            _check_range(index, 0, self.n_genes, "gene index")
            if bool((np.diff(index) == 0).any()):
                raise GeneError(
                    f"gene index {int(index[:-1][np.diff(index) == 0][0])} more than once",
                    expected="every gene once",
                    fix="remove the duplicates (numpy.unique)",
                )
        if index.size == 0:
            raise GeneError("an empty choice of genes", expected="at least one gene", fix="choose some genes")
        return GeneVocabulary(self.ensembl_id[index], self.symbol[index])

    def find(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the gene indices of names that a person typed.

        Symbols, Ensembl ids (with or without version), former symbols and unambiguous aliases are understood, as in
        :func:`scdiva.genes.align_genes`; upper and lower case differ.

        Parameters
        ----------
        names
            Gene names; a single string is one name.

        Returns
        -------
        numpy.ndarray
            ``(len(names),)`` int64 gene indices.

        Raises
        ------
        GeneError
            A name is unknown, ambiguous or outside this vocabulary; close matches are suggested.
        """
        from scdiva.genes.alignment import GeneStatus, align_genes

        wanted = [names] if isinstance(names, str) else [str(name) for name in names]
        if not wanted:
            return np.zeros(0, dtype=np.int64)
        # One by one: a typed list is no file, so no name may change what another one means.
        found = np.full(len(wanted), -1, dtype=np.int64)
        problems: list[str] = []
        hints: list[str] = []
        for position, name in enumerate(wanted):
            alignment = align_genes([name], self)
            gene = int(alignment.gene_of_source[0])
            if gene >= 0:
                found[position] = gene
                continue
            status = GeneStatus(int(alignment.status[0]))
            reason = {GeneStatus.AMBIGUOUS: "ambiguous", GeneStatus.OUTSIDE: "not in this vocabulary"}
            problems.append(f"{name!r} ({reason.get(status, 'unknown')})")
            close = self._close_matches(name) if status == GeneStatus.MISSING and len(hints) < 5 else []
            if close:
                hints.append(f"for {name!r} did you mean {', '.join(close)}?")
        if problems:
            shown = ", ".join(problems[:10]) + (f" and {len(problems) - 10} more" if len(problems) > 10 else "")
            raise GeneError(
                f"{len(problems)} of {len(wanted)} gene names cannot be used: {shown}",
                expected=f"human gene symbols or Ensembl ids among the {self.n_genes} genes of the vocabulary",
                fix=" ".join(hints) or "check the spelling, or use the Ensembl id",
            )
        return found

    def annotation(self) -> pd.DataFrame:
        """Return what is known about each gene of the vocabulary.

        Returns
        -------
        pandas.DataFrame
            G rows in vocabulary order, index ``ensembl_id``; columns ``symbol``, ``biotype``, ``chrom`` (empty for an
            id that GENCODE 48 does not have), ``is_tf``, ``is_mito``, ``is_ribo``.
        """
        import pandas as pd

        genes = human_genes()
        index = np.array([genes.index_of_id.get(name, -1) for name in self.ensembl_id.tolist()], dtype=np.int64)
        known = index >= 0
        frame = pd.DataFrame({"symbol": self.symbol}, index=pd.Index(self.ensembl_id, name="ensembl_id"))
        for column in ("biotype", "chrom"):
            values: list[str] = getattr(genes, column)
            frame[column] = [values[i] if i >= 0 else "" for i in index.tolist()]
        for column in ("is_tf", "is_mito", "is_ribo"):
            flags: NDArray[np.bool_] = getattr(genes, column)
            frame[column] = flags[index] & known
        return frame

    def write_tsv(self, path: str | Path) -> None:
        """Write ``row, ensembl_id, symbol`` as a tab-separated file, one gene a line; special rows are not written.

        Parameters
        ----------
        path
            File to write; an existing one is replaced.
        """
        rows = range(FIRST_GENE_ROW, FIRST_GENE_ROW + self.n_genes)
        lines = ["\t".join(_TSV_HEADER)]
        lines += [
            f"{r}\t{i}\t{s}" for r, i, s in zip(rows, self.ensembl_id.tolist(), self.symbol.tolist(), strict=True)
        ]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")

    @classmethod
    def read_tsv(cls, path: str | Path) -> GeneVocabulary:
        """Read a vocabulary that :meth:`write_tsv` wrote.

        Parameters
        ----------
        path
            File to read.

        Raises
        ------
        BundleError
            The file does not exist, has other columns, rows that do not count up from 2, or an id twice.
        """
        path = Path(path)
        fix = "take the vocabulary file of the bundle again, or write it anew with GeneVocabulary.write_tsv"
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(
                f"{path} cannot be read ({error})", expected="a tab-separated vocabulary file", fix=fix
            ) from error
        if not lines or tuple(lines[0].split("\t")) != _TSV_HEADER:
            raise BundleError(
                f"{path} starts with {lines[0][:80]!r}" if lines else f"{path} is empty",
                expected="the header 'row<TAB>ensembl_id<TAB>symbol'",
                fix=fix,
            )
        fields = [line.split("\t") for line in lines[1:]]
        for position, parts in enumerate(fields):
            row = FIRST_GENE_ROW + position
            if len(parts) != len(_TSV_HEADER) or parts[0] != str(row) or not parts[1]:
                raise BundleError(
                    f"{path} line {position + 2} is {lines[position + 1][:80]!r}",
                    expected=f"row {row}, an Ensembl id and a symbol: rows count up from {FIRST_GENE_ROW}",
                    fix=fix,
                )
        if not fields:
            raise BundleError(f"{path} lists no genes", expected="at least one gene", fix=fix)
        _, ids, symbols = zip(*fields, strict=True)
        return cls(np.array(ids, dtype=np.str_), np.array(symbols, dtype=np.str_))

    def _close_matches(self, name: str) -> list[str]:
        """Return up to three symbols that look like the name; another case of it first."""
        symbols = list(dict.fromkeys(self.symbol.tolist()))
        upper = name.upper()
        same = [symbol for symbol in symbols if symbol.upper() == upper]
        near = [symbol for symbol in symbols if abs(len(symbol) - len(name)) <= 2]
        return (same + [s for s in difflib.get_close_matches(upper, near, n=3, cutoff=0.7) if s not in same])[:3]


def _check_range(values: NDArray[np.int64], low: int, high: int, what: str) -> None:
    if values.size and (int(values.min()) < low or int(values.max()) >= high):
        wrong = values[(values < low) | (values >= high)].ravel()[0]
        raise GeneError(
            f"{what} {int(wrong)}", expected=f"{low} to {high - 1}", fix="use an index that this vocabulary made"
        )


@functools.cache
def _default_vocabulary() -> GeneVocabulary:
    genes = human_genes()
    ranked = np.flatnonzero(genes.tier < UNRANKED)
    # The table is sorted by Ensembl id, so a stable sort by tier is the order (tier, ensembl_id).
    order = ranked[np.argsort(genes.tier[ranked], kind="stable")][:_N_DEFAULT_GENES].tolist()
    return GeneVocabulary(
        np.array([genes.ensembl_id[i] for i in order], dtype=np.str_),
        np.array([genes.symbol[i] for i in order], dtype=np.str_),
    )
