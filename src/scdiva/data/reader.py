"""From a source to raw counts in vocabulary order: find the counts, align the genes, read blocks, join sources."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.conditions import ConditionLabels, condition_codes
from scdiva.data.scale import Scale, detect_scale
from scdiva.data.source import CellSource, Matrix, open_source
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import GeneError, KeyNotFoundError, ScaleError, ScdivaError, SourceError
from scdiva.genes import GeneAlignment, GeneVocabulary, align_genes, detect_species, require_human
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from scdiva.data.source import DataLike

MIN_COVERAGE = 0.5
"""Default smallest share of UMIs that must land in the vocabulary."""

# columns in which the field keeps Ensembl ids (scanpy's readers, CELLxGENE, our own files)
_ID_COLUMNS = ("ensembl_id", "gene_ids", "gene_id", "feature_id", "ensembl", "ensembl_ids", "ENSEMBL")
# below this share of the model's expected UMIs, embeddings drift away from those of all genes (our decision)
_MEASURED_SHARE = 0.7
# with fewer genes than this, the sum over them says little about a cell's depth
_FEW_GENES = 2000
_N_SAMPLED_BLOCKS = 8
_SAMPLED_BLOCK = 128


class KnownGenes(Protocol):
    """Genes with their statistics in a training corpus: a model, or a bundle without its weights."""

    @property
    def vocabulary(self) -> GeneVocabulary:
        """Genes in order."""
        ...

    @property
    def statistics(self) -> GeneStatistics:
        """Their statistics."""
        ...


@dataclass(frozen=True, slots=True)
class FoundCounts:
    """Which matrix of a source holds the counts, and on which scale it is."""

    matrix: Matrix
    scale: Scale

    @property
    def description(self) -> str:
        """One phrase for reports and provenance."""
        return f"{self.matrix.name}: {self.scale.description}"


def sample_rows(matrix: Matrix) -> sp.csr_matrix:
    """Read up to 1,024 rows in eight blocks spread evenly over a matrix."""
    n_cells = matrix.shape[0]
    if n_cells <= _N_SAMPLED_BLOCKS * _SAMPLED_BLOCK:
        return matrix.rows(0, n_cells)
    starts = np.linspace(0, n_cells - _SAMPLED_BLOCK, _N_SAMPLED_BLOCKS).astype(int)
    return sp.csr_matrix(sp.vstack([matrix.rows(a, a + _SAMPLED_BLOCK) for a in starts]))


def find_counts(source: CellSource, layer: str | None = None) -> FoundCounts:
    """Find the raw counts of a source.

    With a ``layer`` only that one is looked at. Otherwise, in this order: X, a layer or ``raw.X`` that holds raw
    counts; then X, a layer or ``raw.X`` from which raw counts can be recovered exactly.

    Raises
    ------
    ScaleError
        Nothing of the kind; the error speaks of X (or of the layer that was asked for).
    KeyNotFoundError
        The layer does not exist.
    """
    if layer is not None:
        matrix = source.matrix(layer)
        return FoundCounts(matrix, detect_scale(sample_rows(matrix), matrix.name))
    found: list[FoundCounts] = []
    errors: list[ScdivaError] = []
    for matrix in source.matrices.values():
        try:
            candidate = FoundCounts(matrix, detect_scale(sample_rows(matrix), matrix.name))
        except ScaleError as error:
            errors.append(error)
            continue
        if candidate.scale.is_counts:
            return candidate
        found.append(candidate)
    if found:
        return found[0]
    raise errors[0]


def gene_identifiers(var: pd.DataFrame) -> tuple[NDArray[np.str_], NDArray[np.str_] | None, str | None]:
    """Return the names of the genes, a parallel array of Ensembl ids if ``.var`` has one, and its column."""
    names = var.index.astype(str).to_numpy(dtype=str)
    for key in _ID_COLUMNS:
        if key in var.columns:
            ids = var[key].astype("string").fillna("").to_numpy(dtype=str)
            if np.char.startswith(ids, "ENS").mean() > 0.5:
                return names, ids, key
    return names, None, None


def is_gene_expression(var: pd.DataFrame) -> NDArray[np.bool_]:
    """Tell genes from antibodies, peaks and guides, where ``.var`` says (10x's feature types)."""
    for key in ("feature_types", "feature_type", "modality"):
        if key in var.columns:
            kind = var[key].astype(str).str.lower()
            is_gene = kind.isin(["gene expression", "gene", "gex"])
            if is_gene.any():
                return is_gene.to_numpy()
    return np.ones(len(var), dtype=bool)


@dataclass(frozen=True, slots=True)
class CountsReader:
    """Reads the raw counts of one source in vocabulary order.

    Build it with :func:`open_counts`. It is a ``CellCollection``.

    Parameters
    ----------
    source
        The cells.
    found
        Which matrix, on which scale.
    alignment
        From the columns of that matrix to the vocabulary.
    is_gene
        ``(n_features,)`` bool: columns that are genes (antibodies and peaks are left out, and counted).
    library_size_key
        Column of ``.obs`` with the library size; ``None`` to sum over the genes of the file.
    sampled_coverage
        Share of UMIs in genes of the vocabulary, over the sample of cells that was looked at on opening.
    conditions
        Fields and labels that cells are coded by; none by default.
    condition_columns
        Column of ``.obs`` of a field; a field that is not named is looked for under its own name.

    Attributes
    ----------
    condition
        ``(n_cells, n_fields)`` int32 codes of all cells of the source, made once; 0 is unknown.
    """

    source: CellSource
    found: FoundCounts
    alignment: GeneAlignment
    is_gene: NDArray[np.bool_]
    library_size_key: str | None = None
    sampled_coverage: float = float("nan")
    conditions: ConditionLabels = field(default_factory=ConditionLabels.none)
    condition_columns: Mapping[str, str] = field(default_factory=dict)
    condition: NDArray[np.int32] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Look up the condition codes of all cells."""
        codes = condition_codes(self.source, self.conditions, self.condition_columns)
        object.__setattr__(self, "condition", codes)

    def with_conditions(
        self, conditions: ConditionLabels, condition_columns: Mapping[str, str] | None = None
    ) -> CountsReader:
        """Return a reader of the same counts that codes its cells by other conditions.

        Labels are collected from files that are open (:func:`~scdiva.data.conditions.collect_labels`), so a reader
        learns of them afterwards.

        Raises
        ------
        ConfigError
            A column is named for something that is no condition field.
        KeyNotFoundError
            A named column does not exist.
        """
        return replace(self, conditions=conditions, condition_columns=dict(condition_columns or {}))

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.source.n_cells

    def raw_rows(self, start: int, stop: int) -> sp.csr_matrix:
        """Read raw counts ``start:stop`` in the file's own gene order (all features), int32 CSR."""
        return self.found.scale.to_counts(self.found.matrix.rows(start, stop), self.found.matrix.name)

    def read(self, indices: NDArray[np.integer]) -> CellCounts:
        """Read the given cells, in the given order."""
        raw = self.found.scale.to_counts(self.found.matrix.take(indices), self.found.matrix.name)
        return self.aligned(raw, np.asarray(indices, dtype=np.int64))

    def aligned(self, raw: sp.csr_matrix, indices: NDArray[np.int64]) -> CellCounts:
        """Bring raw rows of this source into vocabulary order."""
        # a matrix-vector product: sums the genes only, without a copy of the block
        library_size = np.asarray(raw @ self.is_gene.astype(np.float64)).ravel()
        if self.library_size_key is not None:
            named = self.source.column(self.library_size_key).to_numpy(dtype=np.float64)[indices]
            n_smaller = int((named < library_size - 0.5).sum())
            if n_smaller:
                raise KeyNotFoundError(
                    f".obs[{self.library_size_key!r}] of {self.source.name} is smaller than the sum of the counts in "
                    f"{n_smaller} of {indices.size} cells",
                    expected="each cell's total UMIs, over all genes of the experiment",
                    fix="name another column or leave library_size_key out",
                )
            library_size = named
        return CellCounts(
            counts=self.alignment.apply(raw),
            library_size=library_size,
            cell_index=indices,
            source_of_cell=np.zeros(indices.size, dtype=np.int32),
            is_measured=self.alignment.is_measured[None, :],
            condition=self.condition[indices],
        )

    def describe(self, indices: Sequence[int]) -> str:
        """Name the given cells: source and cell name."""
        shown = ", ".join(f"{self.source.obs.index[i]} (row {i})" for i in list(indices)[:3])
        more = f" and {len(indices) - 3} more" if len(indices) > 3 else ""
        return f"{self.source.name}: {shown}{more}"


def open_counts(
    data: DataLike | CellSource,
    vocabulary: GeneVocabulary,
    *,
    layer: str | None = None,
    library_size_key: str | None = None,
    min_coverage: float = MIN_COVERAGE,
    conditions: ConditionLabels | None = None,
    condition_columns: Mapping[str, str] | None = None,
) -> CountsReader:
    """Open a source for reading raw counts in vocabulary order; refuse what cannot be read so.

    Parameters
    ----------
    data
        AnnData, path, or an open source.
    vocabulary
        The genes to align to.
    layer
        Where the counts are; ``None`` to have them found (:func:`find_counts`), ``"raw"`` for ``adata.raw``.
    library_size_key
        Column of ``.obs`` with each cell's total UMIs, for files that hold a gene panel only.
    min_coverage
        Smallest share of the file's UMIs, over a sample of cells, that must land in the vocabulary.
    conditions
        Fields and labels that cells are coded by; ``None``: none.
    condition_columns
        Column of ``.obs`` of a field; a field that is not named is looked for under its own name, and is unknown for
        all cells where there is no such column.

    Raises
    ------
    SourceError, KeyNotFoundError, ScaleError
        See :func:`~scdiva.data.source.open_source`, :func:`find_counts` and
        :func:`~scdiva.data.conditions.condition_columns`.
    ConfigError
        A column is named for something that is no condition field.
    GeneError
        Mouse or unknown genes, or too small a share of UMIs covered.
    """
    source = data if isinstance(data, CellSource) else open_source(data)
    found = find_counts(source, layer)
    var = found.matrix.var
    names, ids, _ = gene_identifiers(var)
    is_gene = is_gene_expression(var)
    _refuse_transposed(source, names)
    require_human(names[is_gene], None if ids is None else ids[is_gene])
    # features that are no genes must not match one by name (antibody "CD4")
    blank = np.where(is_gene, names, "")
    alignment = align_genes(blank, vocabulary, ids=None if ids is None else np.where(is_gene, ids, ""))
    if library_size_key is not None:
        _check_library_size(source, library_size_key)
    sample = found.scale.to_counts(sample_rows(found.matrix), found.matrix.name)
    totals = np.asarray(sample.sum(axis=0), dtype=np.float64).ravel() * is_gene
    refuse_low_coverage(alignment, totals, min_coverage, source.name)
    return CountsReader(
        source,
        found,
        alignment,
        is_gene,
        library_size_key,
        alignment.umi_share(totals),
        conditions=conditions or ConditionLabels.none(),
        condition_columns=dict(condition_columns or {}),
    )


def measured_share(reader: CountsReader, model: KnownGenes) -> float:
    """Return the share of a model's expected UMIs, by its corpus's mean profile, in genes that a source measures."""
    mean = model.statistics.mean
    return float(mean[reader.alignment.is_measured].sum() / max(mean.sum(), 1e-300))


def reader_warnings(reader: CountsReader, model: KnownGenes | None) -> list[str]:
    """Say what does not stand in the way of reading, but should be known before a result is believed."""
    found = []
    scale = reader.found.scale
    if not scale.is_counts and not scale.has_constant_total:
        found.append(
            "the normalised values do not add up to the same total in every cell: genes were dropped after "
            "normalisation; depths and CP10K are those of the genes that are left. Prefer .raw or the full matrix"
        )
    if model is not None:
        share = measured_share(reader, model)
        if share < _MEASURED_SHARE:
            found.append(
                f"the file measures genes that carry only {share:.0%} of the UMIs the model expects: a gene panel or a "
                "selection of genes. Embeddings of it are not comparable with those of whole transcriptomes"
            )
    elif reader.alignment.n_vocabulary_genes_present < _FEW_GENES and reader.library_size_key is None:
        found.append(
            f"only {reader.alignment.n_vocabulary_genes_present} genes of the vocabulary are measured: if this is a "
            "panel of a larger experiment, name the .obs column with each cell's total UMIs (library_size_key)"
        )
    return found


def refuse_low_coverage(
    alignment: GeneAlignment, column_totals: NDArray[np.float64], min_coverage: float, name: str
) -> None:
    """Raise GeneError if too small a share of the UMIs lands in the vocabulary."""
    share = alignment.umi_share(column_totals)
    if share < min_coverage:
        n_used = int((alignment.gene_of_source >= 0).sum())
        unused = np.flatnonzero((alignment.gene_of_source < 0) & (column_totals > 0))
        top = unused[np.argsort(-column_totals[unused], kind="stable")[:5]]
        raise GeneError(
            f"{name}: only {share:.1%} of the UMIs lie in genes of the vocabulary ({n_used} of "
            f"{len(alignment.gene_of_source)} columns matched; largest unmatched: "
            f"{', '.join(str(alignment.names[i]) for i in top) or 'none'})",
            expected=f"at least {min_coverage:.0%} (min_coverage)",
            fix="check that .var_names are human gene symbols or Ensembl ids, or lower min_coverage on purpose",
        )


def _refuse_transposed(source: CellSource, names: NDArray[np.str_]) -> None:
    if detect_species(names) == "unknown" and detect_species(source.obs.index.astype(str)) != "unknown":
        raise GeneError(
            f"the .obs_names of {source.name} are genes (e.g. {source.obs.index[0]!r}), and its .var_names are not",
            expected="cells in rows, genes in columns",
            fix="transpose it: adata = adata.T",
        )


def _check_library_size(source: CellSource, key: str) -> None:
    column = source.column(key)
    if not pd.api.types.is_numeric_dtype(column) or not (np.isfinite(column) & (column > 0)).all():
        raise KeyNotFoundError(
            f".obs[{key!r}] of {source.name} is not a positive number for every cell",
            expected="each cell's total UMIs",
            fix="name another column or leave library_size_key out",
        )


@dataclass(frozen=True, slots=True)
class CellCorpus:
    """Several readers as one collection of cells, one after the other.

    Parameters
    ----------
    readers
        All aligned to the same vocabulary, and with the same condition labels.
    rows
        For each reader, the cells that belong to the corpus (sorted), or ``None`` for all.
    """

    readers: tuple[CountsReader, ...]
    rows: tuple[NDArray[np.int64] | None, ...]

    def __post_init__(self) -> None:
        """Check that all readers speak of the same genes and conditions."""
        if not self.readers:
            raise SourceError("a corpus of no files", expected="at least one source", fix="name files or a folder")
        prints = {reader.alignment.vocabulary.fingerprint for reader in self.readers}
        if len(prints) != 1:
            raise GeneError(
                "the files are aligned to different vocabularies",
                expected="one vocabulary",
                fix="open them all with the same GeneVocabulary",
            )
        if any(reader.conditions != self.readers[0].conditions for reader in self.readers):
            raise SourceError(
                "the files code their cells by different condition labels",
                expected="the same fields and labels in the same order",
                fix="give the readers one ConditionLabels (with_conditions)",
            )

    @property
    def vocabulary(self) -> GeneVocabulary:
        """The common vocabulary."""
        return self.readers[0].alignment.vocabulary

    @property
    def conditions(self) -> ConditionLabels:
        """The common condition fields and labels."""
        return self.readers[0].conditions

    def with_conditions(
        self, conditions: ConditionLabels, columns_per_reader: Sequence[Mapping[str, str]] | None = None
    ) -> CellCorpus:
        """Return the same cells, coded by other conditions.

        Parameters
        ----------
        conditions
            Fields and labels.
        columns_per_reader
            For each source, the ``.obs`` column of a field; None: every field is looked for under its own name.

        Raises
        ------
        ConfigError, KeyNotFoundError
            See :meth:`CountsReader.with_conditions`.
        """
        columns = [{}] * len(self.readers) if columns_per_reader is None else columns_per_reader
        readers = tuple(
            reader.with_conditions(conditions, named) for reader, named in zip(self.readers, columns, strict=True)
        )
        return replace(self, readers=readers)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """``(n_sources,)`` number of cells that each source contributes."""
        return np.array([len(reader) if rows is None else rows.size for reader, rows in self._parts()])

    def __len__(self) -> int:
        """Return the number of cells."""
        return int(self.sizes.sum())

    def _parts(self) -> Iterator[tuple[CountsReader, NDArray[np.int64] | None]]:
        return zip(self.readers, self.rows, strict=True)

    def _locate(self, indices: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        offsets = np.concatenate([[0], np.cumsum(self.sizes)])
        source = np.searchsorted(offsets, indices, side="right") - 1
        return source, np.asarray(indices) - offsets[source]

    def _source_row(self, source: int, local: NDArray[np.int64]) -> NDArray[np.int64]:
        rows = self.rows[source]
        return local if rows is None else rows[local]

    def read(self, indices: NDArray[np.integer]) -> CellCounts:
        """Read the given cells of the corpus, in the given order."""
        positions = np.asarray(indices, dtype=np.int64)
        source, local = self._locate(positions)
        present = np.unique(source)
        parts = [self.readers[s].read(self._source_row(s, local[source == s])) for s in present]
        order = np.concatenate([np.flatnonzero(source == s) for s in present])
        inverse = np.empty_like(order)
        inverse[order] = np.arange(order.size)
        return CellCounts(
            counts=sp.csr_matrix(sp.vstack([part.counts for part in parts], format="csr")[inverse]),
            library_size=np.concatenate([part.library_size for part in parts])[inverse],
            cell_index=positions,
            source_of_cell=source.astype(np.int32),
            is_measured=np.stack([reader.alignment.is_measured for reader in self.readers]),
            condition=np.concatenate([part.condition for part in parts])[inverse],
        )

    def groups(self, keys: Sequence[str | None]) -> NDArray[np.str_]:
        """``(n_cells,)`` "source/batch" of every cell, for held-out splits.

        Parameters
        ----------
        keys
            For each source, the ``.obs`` column with the experimental batch, or ``None``: the source is one batch.
        """
        names: list[NDArray[np.str_]] = []
        sources = [reader.source.name for reader in self.readers]
        for i, ((reader, rows), key) in enumerate(zip(self._parts(), keys, strict=True)):
            source = reader.source
            name = source.name if sources.count(source.name) == 1 else f"{source.name}#{i}"
            batch = np.full(len(reader), "") if key is None else source.column(key).astype(str).to_numpy(dtype=str)
            names.append(np.char.add(f"{name}/", batch if rows is None else batch[rows]))
        return np.concatenate(names)

    def describe(self, indices: Sequence[int]) -> str:
        """Name the given cells: source and cell name."""
        source, local = self._locate(np.asarray(list(indices)))
        named = [self.readers[s].describe(list(self._source_row(s, local[source == s]))) for s in np.unique(source)]
        return "; ".join(named)


@dataclass(frozen=True, slots=True)
class CellsInMemory:
    """Cells that were read already: the same collection, without the disk."""

    cells: CellCounts
    origin: CellCorpus | CountsReader

    @classmethod
    def of(cls, collection: CellCorpus | CountsReader) -> CellsInMemory:
        """Read a whole collection once."""
        return cls(collection.read(np.arange(len(collection))), collection)

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.cells.n_cells

    def read(self, indices: NDArray[np.integer]) -> CellCounts:
        """Take the given cells, in the given order."""
        return self.cells.take(np.asarray(indices))

    def describe(self, indices: Sequence[int]) -> str:
        """Name the given cells."""
        return self.origin.describe(indices)


@dataclass(frozen=True, slots=True)
class NamedCells:
    """A choice of the cells of a source, in memory, as a collection: positions in it are ``cell_index``.

    Parameters
    ----------
    cells
        The cells.
    name
        Of the source.
    row
        ``(n_cells,)`` rows of the cells in the source; None: they are not known, and positions are told.
    """

    cells: CellCounts
    name: str
    row: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.cells.n_cells

    def read(self, indices: NDArray[np.integer]) -> CellCounts:
        """Take the given cells, in the given order."""
        return self.cells.take(np.asarray(indices))

    def describe(self, indices: Sequence[int]) -> str:
        """Name the given cells."""
        rows = indices if self.row is None else [int(self.row[i]) for i in indices]
        return f"{self.name}, cells {', '.join(map(str, rows))}"


def list_sources(paths: Sequence[str | Path]) -> list[Path]:
    """Expand folders of files into the files they hold; 10x folders and zarr stores stay what they are."""
    found: list[Path] = []
    for path in map(Path, paths):
        is_store = path.suffix == ".zarr" or (path.is_dir() and any(path.glob("*matrix.mtx*")))
        if path.is_dir() and not is_store and not (path / "zarr.json").exists():
            inside = sorted(
                itertools.chain(path.glob("*.h5ad"), path.glob("*.zarr"), path.glob("*.h5")), key=lambda p: p.name
            )
            if not inside:
                raise SourceError(
                    f"the folder {path} holds no .h5ad, .zarr or .h5 file", expected="files of cells", fix="check it"
                )
            found.extend(inside)
        else:
            found.append(path)
    return found


def open_corpus(
    data: Sequence[DataLike] | DataLike,
    vocabulary: GeneVocabulary,
    *,
    layer: str | None = None,
    min_coverage: float = MIN_COVERAGE,
) -> CellCorpus:
    """Open one source, a list of sources or a folder of files as one corpus.

    Raises
    ------
    SourceError, KeyNotFoundError, ScaleError, GeneError
        Whatever the first unusable source raises.
    """
    items: list[DataLike] = []
    for item in [data] if isinstance(data, (str, Path)) or not isinstance(data, Sequence) else list(data):
        items.extend(list_sources([item]) if isinstance(item, (str, Path)) else [item])
    readers = tuple(open_counts(item, vocabulary, layer=layer, min_coverage=min_coverage) for item in items)
    return CellCorpus(readers, tuple(None for _ in readers))
