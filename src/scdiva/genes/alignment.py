"""Alignment: which column of a file is which gene of the vocabulary, and an honest report about the rest."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scdiva.errors import GeneError
from scdiva.genes.names import HUMAN_PREFIX, as_strings, is_excel_damaged, strip_version
from scdiva.genes.tables_io import HumanGenes, human_genes, make_names_symbols, old_names
from scdiva.genes.vocabulary import GeneVocabulary


class GeneStatus(IntEnum):
    """How a source column was resolved. Columns with a status below ``AMBIGUOUS`` are used, the others are not."""

    BY_ID = 0
    """By its Ensembl id."""
    BY_SYMBOL = 1
    """By the current GENCODE 48 symbol."""
    BY_ALIAS = 2
    """By an alias that belongs to one gene only."""
    MOVED = 3
    """By a retired or moved Ensembl id, at the id that the gene has today."""
    BY_HISTORY = 4
    """By a symbol that the gene carried in an earlier annotation release."""
    AMBIGUOUS = 5
    """Several genes could be meant; none was taken."""
    OUTSIDE = 6
    """A known human gene that this vocabulary does not have."""
    MISSING = 7
    """Not a known human gene name."""


_ENSEMBL_WITHIN = re.compile(r"(?<![A-Za-z0-9])(ENSG\d{11})(?:\.\d+)?(?![0-9A-Za-z])")
_MADE_UNIQUE = re.compile(r"^(.+)[-.]\d{1,3}$")
_ORF = re.compile(r"^C(\d{1,2}|X|Y)ORF(\d+[A-Z]?)$")


@dataclass(frozen=True, slots=True, eq=False)
class GeneAlignment:
    """Which vocabulary gene each column of a source is; made by :func:`align_genes`.

    Parameters
    ----------
    vocabulary
        The vocabulary that was aligned to; G genes.
    names
        ``(n_source,)`` str: the column names as they were given.
    gene_of_source
        ``(n_source,)`` int32: gene index of each source column, -1 where the column is not used.
    status
        ``(n_source,)`` int8: a :class:`GeneStatus` for each source column.
    """

    vocabulary: GeneVocabulary
    names: NDArray[np.str_]
    gene_of_source: NDArray[np.int32]
    status: NDArray[np.int8]

    @property
    def n_source(self) -> int:
        """Number of source columns."""
        return int(self.names.shape[0])

    @property
    def is_measured(self) -> NDArray[np.bool_]:
        """``(G,)`` bool: genes that the source has a column for. A gene without one is unknown, not zero."""
        measured = np.zeros(self.vocabulary.n_genes, dtype=np.bool_)
        measured[self.gene_of_source[self.gene_of_source >= 0]] = True
        return measured

    @property
    def n_vocabulary_genes_present(self) -> int:
        """Number of vocabulary genes that the source has a column for."""
        return int(np.count_nonzero(self.is_measured))

    def apply(self, X: Any) -> sp.csr_matrix:
        """Bring counts into vocabulary order.

        Parameters
        ----------
        X
            ``(n_cells, n_source)`` counts, any SciPy sparse format (CSR is fastest) or a dense array. Never modified.

        Returns
        -------
        scipy.sparse.csr_matrix
            ``(n_cells, G)``: columns of one gene summed, unused columns dropped, indices sorted, no explicit zeros.
            The dtype is kept, except that booleans and integers of less than 32 bits become int32, so that sums fit.

        Raises
        ------
        GeneError
            ``X`` has another number of columns than the alignment.
        """
        counts: Any = X if sp.issparse(X) else sp.csr_matrix(np.atleast_2d(np.asarray(X)))
        if counts.shape[1] != self.n_source:
            raise GeneError(
                f"counts with {counts.shape[1]} columns",
                expected=f"{self.n_source} columns, one per name that was aligned",
                fix="align the genes of this very matrix; the order of columns is the order of names",
            )
        counts = counts.tocsr()
        dtype = counts.data.dtype
        if dtype.kind in "bui" and dtype.itemsize < 4:
            dtype = np.dtype(np.int32)
        gene_of_entry = self.gene_of_source[counts.indices]
        is_kept = (gene_of_entry >= 0) & (counts.data != 0)
        n_kept_before = np.zeros(is_kept.size + 1, dtype=np.int64)
        np.cumsum(is_kept, out=n_kept_before[1:])
        aligned = sp.csr_matrix(
            (counts.data[is_kept].astype(dtype, copy=False), gene_of_entry[is_kept], n_kept_before[counts.indptr]),
            shape=(counts.shape[0], self.vocabulary.n_genes),
        )
        aligned.sum_duplicates()
        aligned.eliminate_zeros()
        return aligned

    def counts(self) -> dict[str, int]:
        """Return the numbers of the report.

        Returns
        -------
        dict[str, int]
            ``n_source`` columns; how many of them per status (``by_id``, ``by_symbol``, ``by_alias``, ``moved``,
            ``by_history``, ``ambiguous``, ``outside``, ``missing``); ``n_used`` columns; ``n_genes`` vocabulary genes
            that got at least one column; ``n_merged`` columns that were summed into the gene of another column;
            ``n_excel_damaged`` names that a spreadsheet turned into dates.
        """
        per_status = np.bincount(self.status, minlength=len(GeneStatus))
        n_used = int(np.count_nonzero(self.gene_of_source >= 0))
        n_genes = self.n_vocabulary_genes_present
        return {
            "n_source": self.n_source,
            **{status.name.lower(): int(per_status[status]) for status in GeneStatus},
            "n_used": n_used,
            "n_genes": n_genes,
            "n_merged": n_used - n_genes,
            "n_excel_damaged": sum(1 for name in self.names.tolist() if is_excel_damaged(name)),
        }

    def names_with(self, status: GeneStatus) -> list[str]:
        """Return the names of the source columns that have the status, in source order."""
        return [str(name) for name in self.names[self.status == int(status)]]

    def umi_share(self, column_totals: ArrayLike) -> float:
        """Return the share of all counts that lands in the vocabulary.

        Parameters
        ----------
        column_totals
            ``(n_source,)`` total counts of each source column.

        Returns
        -------
        float
            0 to 1; 0.0 if there are no counts at all.

        Raises
        ------
        GeneError
            The totals are not one number per source column.
        """
        totals = np.asarray(column_totals, dtype=np.float64).ravel()
        if totals.shape != (self.n_source,):
            raise GeneError(
                f"{totals.size} column totals",
                expected=f"{self.n_source}, one per source column",
                fix="sum the counts over cells: X.sum(axis=0)",
            )
        total = float(totals.sum())
        return float(totals[self.gene_of_source >= 0].sum()) / total if total > 0 else 0.0

    def source_of_gene(self) -> dict[int, tuple[int, ...]]:
        """Return the source columns of every vocabulary gene that has some.

        Returns
        -------
        dict[int, tuple[int, ...]]
            Gene index, ascending, to its source columns, ascending; several where columns are summed.
        """
        columns = np.flatnonzero(self.gene_of_source >= 0)
        genes = self.gene_of_source[columns]
        order = np.argsort(genes, kind="stable")
        found: dict[int, tuple[int, ...]] = {}
        for gene, column in zip(genes[order].tolist(), columns[order].tolist(), strict=True):
            found[gene] = (*found.get(gene, ()), column)
        return found


def align_genes(names: Iterable[str], vocabulary: GeneVocabulary, *, ids: Iterable[str] | None = None) -> GeneAlignment:
    """Find the vocabulary gene of each column of a source.

    A column is resolved by its Ensembl id if it has one that is known, and else by its name. An id or name is tried
    as: (1) a retired Ensembl id, at its successor; (2) a current Ensembl id, without its version; (3) a current
    GENCODE 48 symbol; (4) an alias of exactly one gene; (5) a symbol of an earlier release. Only a name that none of
    these know is taken apart: genome prefixes (``GRCh38_``, ``hg19_``), an Ensembl id within the name
    (``TBCE_ENSG00000284770``), R's ``make.names`` (``HLA.DRA``), and the suffixes that make names unique (``TBCE-1``,
    ``TBCE.1``), these only if the name without suffix is a column too. Upper and lower case differ, because ``Cd3d``
    is a mouse gene; ``C1ORF112`` for ``C1orf112`` is the only exception.

    Several genes of the vocabulary may share a symbol. The one whose Ensembl id is in more annotation releases is
    taken, because it is the one that a file without ids was most likely counted with (for MATR3 the old id, for CD99
    the X copy, for CAST the id that all files have); among equally old ones the one of the lowest tier (protein-coding
    before lncRNA before pseudogene), then the one that has had the symbol in more releases; otherwise the column is
    ambiguous and not used.

    An Ensembl id that is still current but gave its symbol to another id is followed only if the column's name is that
    symbol and no column of the source has the other id: a file that says ``ENSG00000145075`` and ``CCDC39`` means
    ``ENSG00000284862``.

    The steps and their order: our decision, see ``docs/genes.md``. The result does not depend on the order of columns.

    Parameters
    ----------
    names
        ``(n_source,)`` column names (``var_names``): symbols, Ensembl ids or a mixture; need not be unique.
    vocabulary
        The vocabulary to align to.
    ids
        ``(n_source,)`` Ensembl ids of the same columns where known; empty, ``None`` or NaN where not.

    Returns
    -------
    GeneAlignment
        Gene index and status of each column.

    Raises
    ------
    GeneError
        No names, or not as many ids as names.
    """
    name_list = as_strings(names)
    if not name_list:
        raise GeneError("no gene names", expected="at least one column", fix="give the var_names of the data")
    id_list = None if ids is None else as_strings(ids)
    if id_list is not None and len(id_list) != len(name_list):
        raise GeneError(
            f"{len(id_list)} Ensembl ids for {len(name_list)} names",
            expected="one id per name (empty where unknown)",
            fix="take both from the same .var table",
        )
    resolver = _Resolver(vocabulary, name_list, id_list)
    results = resolver.resolve_all()
    gene_of_source = np.array([gene for gene, _ in results], dtype=np.int32)
    status = np.array([code for _, code in results], dtype=np.int8)
    gene_of_source.flags.writeable = False
    status.flags.writeable = False
    return GeneAlignment(vocabulary, np.array(name_list, dtype=np.str_), gene_of_source, status)


# One result of a look-up: gene index (-1: none) and status.
_Result = tuple[int, GeneStatus]
_MISSING: _Result = (-1, GeneStatus.MISSING)
_AMBIGUOUS: _Result = (-1, GeneStatus.AMBIGUOUS)
_OUTSIDE: _Result = (-1, GeneStatus.OUTSIDE)


@dataclass(frozen=True, slots=True)
class _VocabularyIndex:
    """A vocabulary, looked up through the human gene table.

    ``gene_of_table`` maps table indices to gene indices (-1: not in the vocabulary); ``foreign_ids`` holds the genes
    that GENCODE 48 does not have.
    """

    gene_of_table: list[int]
    foreign_ids: dict[str, int]


@functools.lru_cache(maxsize=8)
def _index_vocabulary(vocabulary: GeneVocabulary) -> _VocabularyIndex:
    # Cached by fingerprint, so nothing here may depend on the symbols.
    index_of_id = human_genes().index_of_id
    gene_of_table = [-1] * len(index_of_id)
    foreign_ids: dict[str, int] = {}
    for gene, ensembl_id in enumerate(vocabulary.ensembl_id.tolist()):
        index = index_of_id.get(ensembl_id)
        if index is not None:
            gene_of_table[index] = gene
        else:
            foreign_ids[ensembl_id] = gene
    return _VocabularyIndex(gene_of_table, foreign_ids)


class _Resolver:
    """Resolves the columns of one source; a column's result depends on the set of columns, not on their order."""

    def __init__(self, vocabulary: GeneVocabulary, names: Sequence[str], ids: Sequence[str] | None) -> None:
        self.names = names
        self.ids = ids
        self.genes: HumanGenes = human_genes()
        self.old = old_names()
        self.index = _index_vocabulary(vocabulary)
        self.foreign_symbols: dict[str, tuple[int, ...]] = {}
        for ensembl_id, gene in self.index.foreign_ids.items():
            symbol = str(vocabulary.symbol[gene])
            if symbol and symbol != ensembl_id:
                self.foreign_symbols[symbol] = (*self.foreign_symbols.get(symbol, ()), gene)
        self.all_names = frozenset(names)
        self.all_ids: frozenset[str] = frozenset() if ids is None else frozenset(map(strip_version, ids))
        self._by_name: dict[str, _Result] = {}

    def resolve_all(self) -> list[_Result]:
        if self.ids is None:
            return [self.by_name(name) for name in self.names]
        return [self.by_id_then_name(ensembl, name) for ensembl, name in zip(self.ids, self.names, strict=True)]

    def by_id_then_name(self, ensembl: str, name: str) -> _Result:
        by_id = self.by_id(ensembl, name) if ensembl else _MISSING
        if by_id[1] != GeneStatus.MISSING and by_id[1] != GeneStatus.AMBIGUOUS:
            return by_id
        by_name = self.by_name(name)
        # An id that fits several genes does not turn into "unknown" because the name is unknown.
        return by_id if by_name[1] == GeneStatus.MISSING else by_name

    def by_id(self, ensembl: str, name: str | None) -> _Result:
        """Resolve an Ensembl id; the name of the same column, if any, helps where the id alone is not clear."""
        core = strip_version(ensembl)
        index = self.genes.index_of_id.get(core)
        moves = self.old.moves.get(core)
        if index is not None:
            if moves is not None and name is not None:
                for old_symbol, target in moves:
                    if old_symbol == name and self.genes.ensembl_id[target] not in self.all_ids:
                        return self._gene_or_outside(target, GeneStatus.MOVED)
            return self._gene_or_outside(index, GeneStatus.BY_ID)
        if core in self.index.foreign_ids:
            return self.index.foreign_ids[core], GeneStatus.BY_ID
        if moves is not None:
            named = tuple(target for old_symbol, target in moves if old_symbol == name)
            return self._choose(named or tuple(target for _, target in moves), GeneStatus.MOVED)
        # A copy of a gene on an alternative haplotype, retired without successor: the gene that has its symbol.
        symbols = self.old.old_symbols_of_id.get(core)
        if symbols is not None:
            results = {self._by_known_name(symbol) for symbol in symbols}
            genes = {gene for gene, _ in results if gene >= 0}
            if len(genes) == 1:
                return genes.pop(), GeneStatus.BY_HISTORY
            if len(genes) > 1:
                return _AMBIGUOUS
            return _OUTSIDE
        human = HUMAN_PREFIX.sub("", core) if "_" in core or "-" in core else core
        return self.by_id(human, name) if human != core else _MISSING

    def by_name(self, name: str) -> _Result:
        result = self._by_name.get(name)
        if result is None:
            result = self._by_known_name(name)
            if result[1] == GeneStatus.MISSING:
                result = self._by_parts(name)
            elif result[1] == GeneStatus.AMBIGUOUS:
                # NKX6.1 is an alias of two genes, and what R makes of NKX6-1.
                parts = self._by_parts(name)
                result = parts if parts[0] >= 0 else result
            self._by_name[name] = result
        return result

    def _by_known_name(self, name: str) -> _Result:
        """Resolve a name as it stands."""
        indices = self.genes.indices_of_symbol.get(name)
        if indices is not None:
            result = self._choose(indices, GeneStatus.BY_SYMBOL)
            if result[1] != GeneStatus.OUTSIDE or name not in self.foreign_symbols:
                return result
        foreign = self.foreign_symbols.get(name)
        if foreign is not None:
            return (foreign[0], GeneStatus.BY_SYMBOL) if len(foreign) == 1 else _AMBIGUOUS
        if name in self.index.foreign_ids:
            return self.index.foreign_ids[name], GeneStatus.BY_ID
        if name.startswith("ENSG"):
            return self.by_id(name, None)
        symbols = self.old.symbols_of_alias.get(name)
        if symbols is not None and "|" not in symbols:
            return self._choose(self._indices_of_symbol(symbols), GeneStatus.BY_ALIAS)
        indices = self.old.indices_of_old_symbol.get(name)
        if indices is not None:
            return self._choose(indices, GeneStatus.BY_HISTORY)
        if symbols is None:
            return _MISSING
        meant = [index for symbol in symbols.split("|") for index in self._indices_of_symbol(symbol)]
        return _AMBIGUOUS if any(self.index.gene_of_table[index] >= 0 for index in meant) else _OUTSIDE

    def _indices_of_symbol(self, symbol: str) -> tuple[int, ...]:
        """Return the table indices of a current symbol; a gene without symbol goes by its Ensembl id."""
        indices = self.genes.indices_of_symbol.get(symbol)
        return indices if indices is not None else (self.genes.index_of_id[symbol],)

    def _by_parts(self, name: str) -> _Result:
        """Resolve a name that is no known name as it stands."""
        if is_excel_damaged(name):
            return _MISSING
        bare = HUMAN_PREFIX.sub("", name.strip())
        if bare != name:
            return self.by_name(bare)
        within = _ENSEMBL_WITHIN.search(name)
        if within is not None:
            return self.by_id(within.group(1), None)
        orf = _ORF.match(name)
        if orf is not None:
            return self._by_known_name(f"C{orf.group(1)}orf{orf.group(2)}")
        if "." in name or "-" in name or name.startswith("X"):
            meant = make_names_symbols().get(name)
            if meant is not None:
                return self._by_known_name(meant)
        unique = _MADE_UNIQUE.match(name)
        if unique is not None and (unique.group(1) in self.all_names or unique.group(1) in self.old.once_shared):
            return self.by_name(unique.group(1))
        return _MISSING

    def _gene_or_outside(self, index: int, status: GeneStatus) -> _Result:
        gene = self.index.gene_of_table[index]
        return (gene, status) if gene >= 0 else _OUTSIDE

    def _choose(self, indices: tuple[int, ...], status: GeneStatus) -> _Result:
        """Choose among the genes (table indices) that a name may mean."""
        if len(indices) == 1:
            return self._gene_or_outside(indices[0], status)
        inside = [index for index in indices if self.index.gene_of_table[index] >= 0]
        if not inside:
            return _OUTSIDE
        # The id that more annotations have is the one that a file without ids was most likely counted with; only
        # genes that share their symbol today are told apart by age and tier.
        if len(inside) > 1 and len({self.genes.symbol[index] for index in inside}) == 1:
            genes = self.genes
            ranks = [(-int(genes.n_releases[i]), int(genes.tier[i]), -int(genes.n_symbol[i])) for i in inside]
            inside = [index for index, rank in zip(inside, ranks, strict=True) if rank == min(ranks)]
        if len(inside) > 1:
            return _AMBIGUOUS
        return self.index.gene_of_table[inside[0]], status
