"""``embed``: from raw counts to the latent z of every cell, and denoised expression of chosen genes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.loader import ordered_blocks
from scdiva.data.reader import CountsReader, measured_share, reader_warnings
from scdiva.errors import ConfigError, GeneError, OutputError, ScdivaError
from scdiva.models.base import Embedder, ProfileDecoder
from scdiva.types import CellCounts

BatchSize = int | Literal["auto"]

_AUTO_BLOCK = 1024
"""Cells per block; larger ones cost memory and gain no speed."""
_SMALLEST_BLOCK = 32
_EMPTY = "{} cells have no UMI in the model's genes; all of them are at the model's point of no information"
_Block = tuple[NDArray[np.float32], NDArray[np.float32]]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Embedding:
    """The result of :func:`embed`.

    Parameters
    ----------
    z
        ``(n_cells, n_latent)`` float32.
    denoised
        CSR ``(n_cells, n_features)`` float32 log1p of expected CP10K, in the file's own gene order; only the chosen
        genes' columns are filled. ``None`` if no genes were asked for.
    record
        What was done, for ``.uns``: model, hash, vocabulary, coverage, counts, version.
    """

    z: NDArray[np.float32]
    denoised: sp.csr_matrix | None
    record: Mapping[str, Any]


def embed(
    reader: CountsReader,
    model: Embedder,
    *,
    batch_size: BatchSize = "auto",
    denoise: Sequence[str] = (),
    on_block: Callable[[int], None] | None = None,
) -> Embedding:
    """Embed all cells of a source, block by block.

    Parameters
    ----------
    reader
        Raw counts, aligned to the model's vocabulary.
    model
        Any model that embeds.
    batch_size
        Cells per block; "auto" takes 1,024 and halves it when a GPU runs out of memory. No influence on the result.
    denoise
        Genes (symbols or Ensembl ids) whose denoised expression is wanted; they must be in the file.
    on_block
        Called with the number of cells done, for progress.

    Returns
    -------
    Embedding

    Raises
    ------
    GeneError
        The reader is aligned to another vocabulary, or a gene to denoise is unknown to the model or not in the file.
    ConfigError
        ``batch_size`` is not positive.
    OutputError
        Genes to denoise were asked for, and the counts are those of ``.raw``.
    """
    if reader.alignment.vocabulary.fingerprint != model.vocabulary.fingerprint:
        raise GeneError(
            "the cells are aligned to another vocabulary than the model's",
            expected=f"fingerprint {model.vocabulary.fingerprint[:12]}",
            fix="open them with open_counts(data, model.vocabulary)",
        )
    if batch_size != "auto" and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}", expected="'auto' or a positive number", fix="leave it out")
    names = (denoise,) if isinstance(denoise, str) else tuple(denoise)
    decoder, genes, columns = _genes_to_denoise(names, reader, model)
    run = partial(_embed_block, model=model, decoder=decoder, genes=genes)
    z = np.empty((len(reader), model.n_latent), dtype=np.float32)
    expected = np.empty((len(reader), genes.size), dtype=np.float32)
    n_counts, library_size, n_empty, start = 0.0, 0.0, 0, 0
    for cells in ordered_blocks(reader, _AUTO_BLOCK if batch_size == "auto" else batch_size):
        rows = slice(start, start + cells.n_cells)
        z[rows], expected[rows] = _with_back_off(run, cells, can_shrink=batch_size == "auto")
        n_counts += float(cells.counts.sum())
        library_size += float(cells.library_size.sum())
        n_empty += int((np.diff(cells.counts.indptr) == 0).sum())
        start += cells.n_cells
        if on_block is not None:
            on_block(start)
    own_umis = reader.library_size_key is None
    record = {
        **model.provenance,
        "n_latent": model.n_latent,
        "counts_in": reader.found.description,
        "coverage": n_counts / library_size if own_umis and library_size else reader.sampled_coverage,
        "measured_share": measured_share(reader, model),
        "library_size_key": reader.library_size_key or "",
        "n_empty_cells": n_empty,
        "genes": reader.alignment.counts(),
    }
    for warning in (*reader_warnings(reader, model), *([_EMPTY.format(n_empty)] if n_empty else [])):
        log.warning("%s: %s", reader.source.name, warning)
    denoised = None
    if genes.size:
        denoised = _scatter(np.log1p(expected), columns, len(reader.is_gene))
        record["denoised_genes"] = list(names)
        record["denoised_unit"] = "log1p of expected CP10K"
    return Embedding(z, denoised, record)


def embed_cells(model: Embedder, cells: CellCounts) -> NDArray[np.float32]:
    """Embed cells that are in memory, block by block; ``(n_cells, n_latent)``."""
    starts = range(0, cells.n_cells, _AUTO_BLOCK)
    blocks = (np.arange(start, min(start + _AUTO_BLOCK, cells.n_cells)) for start in starts)
    parts = [model.embed(cells.take(rows)) for rows in blocks]
    return np.concatenate(parts) if parts else np.empty((0, model.n_latent), dtype=np.float32)


def _embed_block(
    cells: CellCounts, *, model: Embedder, decoder: ProfileDecoder | None, genes: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return z and the expected CP10K of the genes to denoise (no columns if there are none)."""
    z = model.embed(cells)
    return z, np.empty((cells.n_cells, 0), np.float32) if decoder is None else decoder.expected_profile(z, genes)


def _genes_to_denoise(
    names: Sequence[str], reader: CountsReader, model: Embedder
) -> tuple[ProfileDecoder | None, NDArray[np.int64], NDArray[np.int64]]:
    """Return the model as a decoder, gene indices and the file's column of each."""
    if not names:
        return None, np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    if not isinstance(model, ProfileDecoder):
        raise GeneError(
            f"{type(model).__name__} cannot denoise", expected="a model with a profile decoder", fix="use scDiVa"
        )
    if reader.found.matrix.name == "raw.X":
        raise OutputError(
            "denoised expression of genes of .raw has no layer to go to",
            expected="counts in X or a layer",
            fix="ask for no genes to denoise, or move the counts to a layer",
        )
    genes = model.vocabulary.find(names)
    columns = reader.alignment.source_of_gene()
    absent = [name for name, gene in zip(names, genes, strict=True) if int(gene) not in columns]
    if absent:
        raise GeneError(
            f"{', '.join(absent)} to denoise: not among the genes of {reader.source.name}",
            expected="genes of the file, since the result is a layer of it",
            fix="leave them out, or call model.expected_profile for genes the file does not have",
        )
    # a gene may be named twice, by symbol and by id: its column is written once
    genes = np.array(list(dict.fromkeys(int(gene) for gene in genes)), dtype=np.int64)
    return model, genes, np.array([columns[int(gene)][0] for gene in genes], dtype=np.int64)


def _scatter(values: NDArray[np.float32], columns: NDArray[np.int64], n_features: int) -> sp.csr_matrix:
    n_cells, n_chosen = values.shape
    order = np.argsort(columns)
    return sp.csr_matrix(
        (
            values[:, order].ravel(),
            np.tile(columns[order], n_cells),
            np.arange(0, n_cells * n_chosen + 1, n_chosen),
        ),
        shape=(n_cells, n_features),
    )


def _with_back_off(run: Callable[[CellCounts], _Block], cells: CellCounts, *, can_shrink: bool) -> _Block:
    """Run a block; when the device is out of memory, run its halves instead."""
    # deferred: torch is loaded by the model anyway, and the error class is all that is needed of it
    import torch

    try:
        return run(cells)
    except torch.cuda.OutOfMemoryError as error:
        if not can_shrink or cells.n_cells <= _SMALLEST_BLOCK:
            raise ScdivaError(
                f"the device has no memory for a block of {cells.n_cells} cells",
                expected="enough free memory",
                fix="free the device, give a smaller batch_size, or use device='cpu'",
            ) from error
    torch.cuda.empty_cache()
    half = cells.n_cells // 2
    parts = (np.arange(half), np.arange(half, cells.n_cells))
    first, second = (_with_back_off(run, cells.take(rows), can_shrink=True) for rows in parts)
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])
