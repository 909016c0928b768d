"""``impute``: how much of chosen genes to expect in every cell, whether the file measures them or not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.loader import ordered_blocks
from scdiva.data.reader import CountsReader, measured_share, reader_warnings
from scdiva.errors import ConfigError, GeneError, OutputError, SourceError
from scdiva.models.base import ImputedCounts, Imputer, OwnCounts
from scdiva.tasks.embed import BatchSize, _scatter, _with_back_off
from scdiva.types import CellCounts

Unit = Literal["log1p_cp10k", "counts"]

UNITS = {"log1p_cp10k": "log1p of expected CP10K", "counts": "expected counts at the cell's own depth"}
STATISTICS = ("", "_sd", "_q05", "_q95")
"""Endings of the slots: expectation; standard deviation of the expectation over half-samples of the cell; 5 % and 95 %
quantiles of counts drawn from the likelihood."""
_TAIL = 0.05
_AUTO_BLOCK = 1024
# samples x cells x genes of a block: 2 x 160 MB
_LARGEST_BLOCK = 40_000_000
_EMPTY = "{} cells have no UMI in the model's genes; what is imputed to them is the model's point of no information"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Imputation:
    """The result of :func:`impute`.

    Each mapping has the keys "", "_sd", "_q05", "_q95" (:data:`STATISTICS`), or "" alone without samples; all values
    are in the unit of the record.

    Parameters
    ----------
    measured
        CSR ``(n_cells, n_features)`` float32, in the file's own gene order; only the chosen genes' columns are filled.
        Empty mapping if no chosen gene is measured.
    unmeasured
        ``(n_cells, n_unmeasured)`` float32, of the chosen genes that have no column in the file.
    unmeasured_names
        Their names, as they were asked for.
    record
        What was done, for ``.uns``.
    """

    measured: Mapping[str, sp.csr_matrix]
    unmeasured: Mapping[str, NDArray[np.float32]]
    unmeasured_names: tuple[str, ...]
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Genes that are asked for, each once.

    ``genes`` are indices in the vocabulary, ``names`` what they were called, ``columns`` those of the file (-1: none).
    """

    genes: NDArray[np.int64]
    names: tuple[str, ...]
    columns: NDArray[np.int64]


def impute(
    reader: CountsReader,
    model: Imputer,
    *,
    genes: Sequence[str] | None,
    own_counts: OwnCounts = "used",
    unit: Unit = "log1p_cp10k",
    n_samples: int = 0,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    on_block: Callable[[int], None] | None = None,
) -> Imputation:
    """Impute chosen genes of all cells of a source, block by block.

    Parameters
    ----------
    reader
        Raw counts, aligned to the model's vocabulary. They are read block by block; the result is held in memory
        (4 bytes for each cell, chosen gene and statistic; of measured genes 8).
    model
        Any model that imputes.
    genes
        Symbols or Ensembl ids; None: all genes of the model that the file measures.
    own_counts
        "used": the gene's own count in a cell corrects what the rest of the cell says. "hidden": it is not looked at.
    unit
        "log1p_cp10k" or "counts".
    n_samples
        Half-samples of each cell: 0, or at least 2.
    seed
        Of the samples. No other cell, no batch size and no order of cells or genes changes a result.
    batch_size
        Cells per block; "auto" takes 1,024, fewer where samples of many genes would not fit.
    on_block
        Called with the number of cells done, for progress.

    Returns
    -------
    Imputation

    Raises
    ------
    GeneError
        A gene is unknown or not in the model's vocabulary, none is chosen, or the reader has another vocabulary.
    ConfigError
        Impossible ``n_samples``, ``batch_size``, ``unit`` or ``own_counts``.
    OutputError
        Measured genes were asked for, and the counts are those of ``.raw``.
    """
    if reader.alignment.vocabulary.fingerprint != model.vocabulary.fingerprint:
        raise GeneError(
            "the cells are aligned to another vocabulary than the model's",
            expected=f"fingerprint {model.vocabulary.fingerprint[:12]}",
            fix="open them with open_counts(data, model.vocabulary)",
        )
    _check(own_counts, unit, n_samples, batch_size)
    chosen = _chosen_genes(genes, reader, model)
    n_statistics = len(STATISTICS) if n_samples else 1
    run = partial(
        _impute_block,
        model=model,
        genes=chosen.genes,
        own_counts=own_counts,
        unit=unit,
        n_samples=n_samples,
        seed=seed,
    )
    found = np.empty((len(reader), n_statistics, chosen.genes.size), dtype=np.float32)
    n_counts, library_size, n_empty, start = 0.0, 0.0, 0, 0
    block = _block_size(n_samples * chosen.genes.size) if batch_size == "auto" else batch_size
    for cells in ordered_blocks(reader, block):
        found[start : start + cells.n_cells] = _with_back_off(run, cells, can_shrink=batch_size == "auto")[0]
        n_counts += float(cells.counts.sum())
        library_size += float(cells.library_size.sum())
        n_empty += int((np.diff(cells.counts.indptr) == 0).sum())
        start += cells.n_cells
        if on_block is not None:
            on_block(start)
    is_measured = chosen.columns >= 0
    unmeasured_names = tuple(name for name, is_in in zip(chosen.names, is_measured, strict=True) if not is_in)
    own_umis = reader.library_size_key is None
    record = {
        **model.provenance,
        "genes_asked_for": "all measured genes of the model" if genes is None else list(chosen.names),
        "n_genes": int(chosen.genes.size),
        **({"unmeasured_genes": list(unmeasured_names)} if unmeasured_names else {}),
        "own_counts": own_counts,
        "unit": UNITS[unit],
        "n_samples": n_samples,
        "seed": seed,
        "counts_in": reader.found.description,
        "coverage": n_counts / library_size if own_umis and library_size else reader.sampled_coverage,
        "measured_share": measured_share(reader, model),
        "library_size_key": reader.library_size_key or "",
        "n_empty_cells": n_empty,
        "genes": reader.alignment.counts(),
    }
    for warning in (*reader_warnings(reader, model), *([_EMPTY.format(n_empty)] if n_empty else [])):
        log.warning("%s: %s", reader.source.name, warning)
    measured: dict[str, sp.csr_matrix] = {}
    unmeasured: dict[str, NDArray[np.float32]] = {}
    for i, ending in enumerate(STATISTICS[:n_statistics]):
        if is_measured.any():
            columns = chosen.columns[is_measured]
            measured[ending] = _scatter(found[:, i, is_measured], columns, len(reader.is_gene))
        if not is_measured.all():
            unmeasured[ending] = np.ascontiguousarray(found[:, i, ~is_measured])
    return Imputation(measured, unmeasured, unmeasured_names, record)


def read_gene_list(path: str | Path) -> list[str]:
    """Read gene names from a text file: one per line; empty lines and lines that begin with ``#`` do not count.

    Raises
    ------
    SourceError
        The file cannot be read as text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} cannot be read as a list of genes ({error})",
            expected="a text file with one gene per line",
            fix="check the path",
        ) from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _check(own_counts: str, unit: str, n_samples: int, batch_size: BatchSize) -> None:
    if batch_size != "auto" and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}", expected="'auto' or a positive number", fix="leave it out")
    if n_samples < 0 or n_samples == 1:
        raise ConfigError(
            f"n_samples={n_samples}", expected="0 (expectations only) or at least 2", fix="20 give a usable spread"
        )
    for name, value, known in (("own_counts", own_counts, get_args(OwnCounts)), ("unit", unit, get_args(Unit))):
        if value not in known:
            raise ConfigError(f"{name}={value!r}", expected=" or ".join(map(repr, known)), fix="name one of these")


def _chosen_genes(names: Sequence[str] | None, reader: CountsReader, model: Imputer) -> _Chosen:
    columns = reader.alignment.source_of_gene()
    if names is None:
        found = np.flatnonzero(reader.alignment.is_measured)
        asked: Sequence[str] = [str(model.vocabulary.symbol[gene]) for gene in found]
    else:
        asked = (names,) if isinstance(names, str) else [str(name) for name in names]
        found = model.vocabulary.find(asked)
    if not len(asked):
        raise GeneError("no genes to impute", expected="at least one gene", fix="name genes, or ask for all of them")
    # a gene may be named twice, by symbol and by id; in the order of the vocabulary, whatever the order of the names:
    # draws of a cell are made gene after gene
    name_of = {int(gene): name for gene, name in reversed(list(zip(found, asked, strict=True)))}
    genes = np.array(sorted(name_of), dtype=np.int64)
    own = np.array([columns[int(gene)][0] if int(gene) in columns else -1 for gene in genes], dtype=np.int64)
    if (own >= 0).any() and reader.found.matrix.name == "raw.X":
        raise OutputError(
            "imputed expression of genes of .raw has no layer to go to",
            expected="counts in X or a layer",
            fix="move the counts to a layer",
        )
    return _Chosen(genes, tuple(name_of[int(gene)] for gene in genes), own)


def _block_size(n_values_per_cell: int) -> int:
    return int(np.clip(_LARGEST_BLOCK // max(n_values_per_cell, 1), 1, _AUTO_BLOCK))


def _impute_block(
    cells: CellCounts,
    *,
    model: Imputer,
    genes: NDArray[np.int64],
    own_counts: OwnCounts,
    unit: Unit,
    n_samples: int,
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return ``(n_cells, n_statistics, n_genes)`` in the unit that is asked for, and nothing else."""
    imputed = model.impute(cells, genes, own_counts=own_counts, n_samples=n_samples, seed=seed)
    return _statistics(imputed, unit), np.empty((cells.n_cells, 0), np.float32)


def _statistics(imputed: ImputedCounts, unit: Unit) -> NDArray[np.float32]:
    def in_unit(counts: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.log1p(counts * imputed.scale) if unit == "log1p_cp10k" else counts

    found = [in_unit(imputed.expected)]
    if len(imputed.resampled):
        found.append(in_unit(imputed.resampled).std(axis=0, ddof=1))
        # of counts, which the unit does not reorder: a quantile between two draws would be no count
        found.extend(in_unit(np.quantile(imputed.draws, q, axis=0, method="nearest")) for q in (_TAIL, 1 - _TAIL))
    return np.stack(found, axis=1).astype(np.float32)
