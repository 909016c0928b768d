"""``check``: what is in a file, and whether it can be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from scdiva.data.reader import (
    MIN_COVERAGE,
    CountsReader,
    KnownGenes,
    gene_identifiers,
    measured_share,
    open_counts,
    reader_warnings,
    refuse_low_coverage,
)
from scdiva.data.source import CellSource, open_source
from scdiva.errors import GeneError, ScaleError, ScdivaError
from scdiva.genes import GeneStatus, GeneVocabulary

if TYPE_CHECKING:
    from scdiva.data.source import DataLike

_BLOCK = 2048


@dataclass(frozen=True, slots=True)
class Summary:
    """Minimum, median and maximum over cells."""

    minimum: float
    median: float
    maximum: float


@dataclass(frozen=True, slots=True, repr=False)
class CheckReport:
    """What is in a source, and the verdict.

    Parameters
    ----------
    name
        The source.
    n_cells, n_features
        Size of the file.
    is_usable
        The verdict: whether embed, annotate and the other commands take it as it is.
    problem
        ``found``, ``expected`` and ``fix`` of what stands in the way; ``None`` if it is usable.
    warnings
        What does not stand in the way but should be known.
    counts_in
        Where the raw counts are and how they are obtained.
    n_genes
        Features that are genes (10x files also hold antibodies and peaks).
    n_duplicated_gene_names
        Gene names that occur more than once.
    gene_ids
        ``.var`` column with Ensembl ids, if one is used beside the names.
    genes
        Columns by how they were resolved; see :meth:`scdiva.genes.GeneAlignment.counts`.
    coverage
        Share of all UMIs that lies in genes of the vocabulary.
    largest_unmatched
        The unmatched genes with most UMIs, and their share of all UMIs.
    library_size, genes_per_cell
        UMIs and detected genes per cell, over all genes of the file.
    n_empty_cells
        Cells without a single UMI in the vocabulary's genes.
    vocabulary_fingerprint, genes_of
        Names the vocabulary: of a model, or the full one.
    measured_share
        Share of the model's expected UMIs in genes that the file measures; only where a model was named.
    """

    name: str
    n_cells: int
    n_features: int
    is_usable: bool
    problem: Mapping[str, str] | None
    warnings: tuple[str, ...] = ()
    counts_in: str | None = None
    n_genes: int | None = None
    n_duplicated_gene_names: int | None = None
    gene_ids: str | None = None
    genes: Mapping[str, int] | None = None
    coverage: float | None = None
    largest_unmatched: Mapping[str, float] | None = None
    library_size: Summary | None = None
    genes_per_cell: Summary | None = None
    n_empty_cells: int | None = None
    vocabulary_fingerprint: str | None = None
    genes_of: str = "the full vocabulary"
    measured_share: float | None = None

    def __str__(self) -> str:
        """Return the report as text."""
        lines = [f"{self.name}: {self.n_cells:,} cells x {self.n_features:,} features"]

        def add(label: str, value: str) -> None:
            lines.append(f"  {label:<22}{value}")

        if self.counts_in is not None:
            add("counts", self.counts_in)
        genes = self.genes
        if genes is not None and self.coverage is not None:
            add("UMIs covered", f"{self.coverage:.2%} by the genes of {self.genes_of}")
            parts = {
                "by Ensembl id": genes["by_id"],
                "by symbol": genes["by_symbol"],
                "by alias": genes["by_alias"],
                "moved id": genes["moved"],
                "former symbol": genes["by_history"],
            }
            add("genes matched", f"{genes['n_used']:,} ({', '.join(f'{n:,} {k}' for k, n in parts.items() if n)})")
            rest = {
                "ambiguous": genes["ambiguous"],
                "known, not in the vocabulary": genes["outside"],
                "unknown": genes["missing"],
                "no genes (antibodies, peaks)": genes["not_genes"],
            }
            add("not matched", ", ".join(f"{n:,} {k}" for k, n in rest.items() if n) or "none")
            if genes["n_merged"]:
                add("summed", f"{genes['n_merged']:,} columns into the gene of another column")
        if self.largest_unmatched:
            shown = list(self.largest_unmatched.items())[:5]
            add("largest unmatched", ", ".join(f"{name} ({share:.2%})" for name, share in shown))
        for label, summary in (("UMIs per cell", self.library_size), ("genes per cell", self.genes_per_cell)):
            if summary is not None:
                add(label, f"median {summary.median:,.0f} ({summary.minimum:,.0f} to {summary.maximum:,.0f})")
        if self.n_empty_cells:
            add("empty cells", f"{self.n_empty_cells:,}")
        for warning in self.warnings:
            add("note", warning)
        if self.problem is None:
            add("verdict", "usable as it is")
        else:
            add("verdict", "NOT usable")
            for key in ("found", "expected", "fix"):
                add(f"  {key}", self.problem[key])
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers (JSON)."""
        return asdict(self)


def check(
    data: DataLike,
    model: KnownGenes | None = None,
    *,
    layer: str | None = None,
    library_size_key: str | None = None,
    min_coverage: float = MIN_COVERAGE,
) -> CheckReport:
    """Look through a whole source and tell what is in it.

    Parameters
    ----------
    data
        AnnData or path.
    model
        Judge by the genes of this model, as embed will; by the full vocabulary if left out.
    layer, library_size_key, min_coverage
        As in :func:`scdiva.data.reader.open_counts`.

    Returns
    -------
    CheckReport
        With ``is_usable`` False where scales or genes stand in the way.

    Raises
    ------
    SourceError, KeyNotFoundError
        The source cannot be read at all, or the layer or column does not exist.
    """
    source = open_source(data)
    vocabulary = GeneVocabulary.default() if model is None else model.vocabulary
    genes_of = "the full vocabulary" if model is None else str(getattr(model, "name", "the model"))
    n_features = next(iter(source.matrices.values())).shape[1]
    try:
        reader = open_counts(source, vocabulary, layer=layer, library_size_key=library_size_key, min_coverage=0.0)
        return _full_report(source, reader, model, genes_of, min_coverage)
    except (ScaleError, GeneError) as error:
        return CheckReport(source.name, source.n_cells, n_features, is_usable=False, problem=_as_problem(error))


def _full_report(
    source: CellSource, reader: CountsReader, model: KnownGenes | None, genes_of: str, min_coverage: float
) -> CheckReport:
    alignment, matrix = reader.alignment, reader.found.matrix
    column_totals = np.zeros(matrix.shape[1])
    library_size, genes_per_cell = np.zeros(source.n_cells), np.zeros(source.n_cells)
    n_empty = 0
    for start in range(0, source.n_cells, _BLOCK):
        stop = min(start + _BLOCK, source.n_cells)
        raw = reader.raw_rows(start, stop)
        column_totals += np.asarray(raw.sum(axis=0)).ravel()
        cells = reader.aligned(raw, np.arange(start, stop))
        library_size[start:stop] = cells.library_size
        genes_per_cell[start:stop] = (raw != 0) @ reader.is_gene.astype(np.float64)
        n_empty += int((np.diff(cells.counts.indptr) == 0).sum())
    column_totals *= reader.is_gene
    genes = {**alignment.counts(), "not_genes": int((~reader.is_gene).sum())}
    genes["missing"] -= genes["not_genes"]  # features that are no genes were blanked, which reads as missing
    total = max(column_totals.sum(), 1.0)
    unused = np.flatnonzero((alignment.gene_of_source < 0) & (column_totals > 0))
    unused = unused[np.argsort(-column_totals[unused], kind="stable")[:10]]
    names = matrix.var.index.astype(str)
    problem: ScdivaError | None = None
    try:
        refuse_low_coverage(alignment, column_totals, min_coverage, source.name)
    except GeneError as error:
        problem = error
    return CheckReport(
        name=source.name,
        n_cells=source.n_cells,
        n_features=matrix.shape[1],
        is_usable=problem is None,
        problem=None if problem is None else _as_problem(problem),
        warnings=_warnings(reader, model, genes, n_empty, int(names.duplicated().sum())),
        counts_in=reader.found.description,
        n_genes=int(reader.is_gene.sum()),
        n_duplicated_gene_names=int(names.duplicated().sum()),
        gene_ids=gene_identifiers(matrix.var)[2],
        genes=genes,
        coverage=alignment.umi_share(column_totals),
        largest_unmatched={str(names[int(i)]): float(column_totals[i] / total) for i in unused},
        library_size=_summary(library_size),
        genes_per_cell=_summary(genes_per_cell),
        n_empty_cells=n_empty,
        vocabulary_fingerprint=alignment.vocabulary.fingerprint,
        genes_of=genes_of,
        measured_share=None if model is None else measured_share(reader, model),
    )


def _warnings(
    reader: CountsReader, model: KnownGenes | None, genes: Mapping[str, int], n_empty: int, n_duplicated: int
) -> tuple[str, ...]:
    found = []
    if not reader.found.scale.is_counts:
        found.append(f"{reader.found.matrix.name} is not raw counts; they are recovered exactly, cell by cell")
    elif reader.found.matrix.name != "X":
        found.append(f"X does not hold raw counts; {reader.found.matrix.name} does and is used")
    if n_empty:
        found.append(f"{n_empty} cells have no UMI in any gene of the vocabulary: sc.pp.filter_cells(min_genes=1)")
    if n_duplicated:
        found.append(f"{n_duplicated} gene names occur more than once; columns of one gene are summed")
    if genes["n_excel_damaged"]:
        found.append(
            f"{genes['n_excel_damaged']} gene names were turned into dates by a spreadsheet (such as 2-Sep): "
            "take the names from the original file"
        )
    if genes["ambiguous"]:
        shown = ", ".join(reader.alignment.names_with(GeneStatus.AMBIGUOUS)[:5])
        found.append(f"{genes['ambiguous']} gene names are ambiguous and not used ({shown}): use Ensembl ids")
    return (*found, *reader_warnings(reader, model))


def _summary(values: np.ndarray) -> Summary:
    return Summary(float(values.min()), float(np.median(values)), float(values.max()))


def _as_problem(error: ScdivaError) -> dict[str, str]:
    return {"found": error.found, "expected": error.expected, "fix": error.fix}
