"""``reconstruct``: hide part of every cell and compare what a model makes of it with the truth.

The paper's rank-value task, whose published figures cannot be judged (its latent token sees the answer, and a sequence
with most tokens in place is near the truth whatever the model says), and beside it what can be decided: which genes are
hidden, and how much of each there is. Nothing is trained. Every figure stands next to those of simple guesses on the
same masks, a null control and, where there is one, a ceiling; docs/reconstruction.md defines all of them.

Two kinds of models (:mod:`scdiva.models.base`): of those that read sets, all detected genes of a cell are hidden or
visible; of those that read sequences, the cell is its L best-ranked genes, for the model and all it is compared with.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.baselines.reconstruction import N_NEIGHBOURS, GeneGuess, ReferenceCells, random_guess
from scdiva.data.loader import ordered_blocks
from scdiva.data.reader import CountsReader, measured_share, reader_warnings
from scdiva.data.statistics import CP10K, GeneStatistics
from scdiva.errors import ConfigError, GeneError, OutputError, SourceError, UnsupportedError
from scdiva.losses import inclusion_shift
from scdiva.metrics.embedding import paired_difference
from scdiva.metrics.reconstruction import NO_GENE, bleu, edit_distance, pearson, rank_correlation, spearman
from scdiva.models.base import HiddenPlaces, HiddenSet, Reconstructor
from scdiva.serialization import MAX_TOKENS, TokenOrder, log1p_cp10k, token_ranks
from scdiva.types import CellCounts

BatchSize = int | Literal["auto"]

MASK_RATIOS = (0.15, 0.5, 0.7, 0.9, 0.95, 1.0)
"""Shares of hidden tokens (our decision)."""

COPY, POPULATION, NEIGHBOURS = "copy: hidden places left empty", "population frequency", f"kNN-{N_NEIGHBOURS}"
LABEL, NULL = "same label (told the label)", "random genes (null)"
CEILING, ONE_UMI = "true genes, values of the model (ceiling)", "true genes, one UMI each (ceiling)"

METRICS = {
    "edits": ("L-Dist", 1),
    "edits_per_token": ("L-Dist / L", 3),
    "bleu": ("BLEU", 3),
    "rank_spearman": ("rank Spearman", 3),
    "recall": ("recall@M", 3),
    "top1": ("top-1", 3),
    "top5": ("top-5", 3),
    "place_top1": ("top-1 in its place", 3),
    "place_top5": ("top-5 in its place", 3),
    "identity_nll": ("identity, nats", 3),
    "value_spearman": ("value Spearman", 3),
    "value_pearson": ("value Pearson (pooled)", 3),
    "value_mae": ("value MAE", 3),
    "value_nll": ("value, nats", 3),
}
"""Name of each metric to its title and decimals; docs/reconstruction.md defines them."""

# dense rows of all genes per cell and method: 64 x 30,000 float64 are 15 MB
_AUTO_BLOCK = 64
_REFERENCE_CELLS = 10_000
_MASK_STREAM, _CELLS_STREAM, _REFERENCE_STREAM, _INTERVAL_STREAM = range(1, 5)
_UNKNOWN_LABELS = frozenset({"", "nan", "none", "<na>", "unassigned", "unknown"})
_COMPARED = ("recall", "identity_nll", "value_mae")

log = logging.getLogger(__name__)

CellScores = Mapping[str, NDArray[np.float64]]
"""Metric to the score of each cell; NaN where it cannot be measured."""


@dataclass(frozen=True, slots=True)
class ReconstructionRow:
    """One method at one share of hidden tokens.

    Parameters
    ----------
    mask_ratio
        Share of hidden tokens.
    method
        Which.
    saw_answer
        Whether anything that summarises the hidden tokens reached the method; None for what is no model.
    n_cells
        Cells that were judged.
    mean, error
        Metric to its mean over cells (of those in which it can be measured) and the standard error of that mean. What
        a method does not have is absent. ``value_pearson`` runs over all hidden values at once and has no error.
    """

    mask_ratio: float
    method: str
    saw_answer: bool | None
    n_cells: int
    mean: Mapping[str, float]
    error: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a model's mean score lies above that of a simple guess on the same cells and masks.

    Parameters
    ----------
    mask_ratio, method, against, metric
        What is compared.
    difference, low, high
        Mean over cells, and its 95 % bootstrap interval.
    """

    mask_ratio: float
    method: str
    against: str
    metric: str
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Reconstruction:
    """The result of :func:`reconstruct`.

    Parameters
    ----------
    rows
        Every share of hidden tokens by every method.
    differences
        The model against the simple guesses, cell by cell.
    record
        What was done, for ``.uns``: model, hash, cells, seed, reference, whether the model saw the answer.
    reconstructed
        CSR ``(n_cells, n_features)`` float32 log1p(CP10K) in the file's own gene order, at one share: visible genes as
        observed, and as many genes as are hidden, the most probable ones, with their expected values. None if not
        asked for.
    """

    rows: tuple[ReconstructionRow, ...]
    differences: tuple[Difference, ...]
    record: Mapping[str, Any]
    reconstructed: sp.csr_matrix | None = None

    @cached_property
    def _by_key(self) -> dict[tuple[float, str], ReconstructionRow]:
        return {(row.mask_ratio, row.method): row for row in self.rows}

    def row(self, mask_ratio: float, method: str) -> ReconstructionRow:
        """Return one row; KeyError if there is none."""
        return self._by_key[mask_ratio, method]

    def to_markdown(self) -> str:
        """Return one table per share of hidden tokens, and the differences."""
        shown = [name for name in METRICS if any(name in row.mean for row in self.rows)]
        titles = ["method", "LAT saw the answer", *(METRICS[name][0] for name in shown)]
        lines = [self._caption()]
        for ratio in dict.fromkeys(row.mask_ratio for row in self.rows):
            lines += ["", f"**{ratio:.0%} of the tokens hidden**", "", f"| {' | '.join(titles)} |"]
            lines.append(f"|---|---|{'---:|' * len(shown)}")
            for row in self.rows:
                if row.mask_ratio == ratio:
                    cells = [row.method, {None: "", True: "**yes**", False: "no"}[row.saw_answer]]
                    cells += [_number(row.mean.get(name), METRICS[name][1]) for name in shown]
                    lines.append(f"| {' | '.join(cells)} |")
        if self.differences:
            metrics = list(dict.fromkeys(found.metric for found in self.differences))
            lines += ["", "Model minus simple guess, mean over cells [95 % interval]:", ""]
            lines.append(f"| hidden | difference | {' | '.join(METRICS[name][0] for name in metrics)} |")
            lines.append(f"|---|---|{'---:|' * len(metrics)}")
            compared: dict[tuple[float, str, str], list[str]] = {}
            for found in self.differences:
                compared.setdefault((found.mask_ratio, found.method, found.against), []).append(
                    f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
                )
            lines += [
                f"| {ratio:.0%} | {method} - {against} | {' | '.join(cells)} |"
                for (ratio, method, against), cells in compared.items()
            ]
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Return record, rows and differences as JSON; what could not be measured is null."""
        rows = [
            {
                "mask_ratio": row.mask_ratio,
                "method": row.method,
                "lat_saw_answer": row.saw_answer,
                "n_cells": row.n_cells,
                "mean": {name: _finite(value) for name, value in row.mean.items()},
                "standard_error": {name: _finite(value) for name, value in row.error.items()},
            }
            for row in self.rows
        ]
        differences = [
            {name: getattr(found, name) for name in Difference.__dataclass_fields__} for found in self.differences
        ]
        return json.dumps({"record": dict(self.record), "rows": rows, "differences": differences}, indent=1)

    def table(self) -> dict[str, NDArray[Any]]:
        """Return the rows as columns, for ``.uns``: NaN where there is nothing."""
        return {
            "mask_ratio": np.array([row.mask_ratio for row in self.rows]),
            "method": np.array([row.method for row in self.rows], dtype=str),
            "lat_saw_answer": np.array(
                [{None: "", True: "yes", False: "no"}[row.saw_answer] for row in self.rows], dtype=str
            ),
            **{name: np.array([row.mean.get(name, np.nan) for row in self.rows]) for name in METRICS},
        }

    def _caption(self) -> str:
        record = self.record
        return (
            f"Model {record['model']}, hash {str(record['model_hash'])[:12]}; {record['n_cells']:,} cells of "
            f"{record['source']}, seed {record['seed']}; {record['tokens']}. Reference of the simple guesses: "
            f"{record['reference']}. Means over cells."
        )


def hidden_tokens(cells: CellCounts, mask_ratio: float, *, seed: int) -> NDArray[np.bool_]:
    """Tell which stored counts are hidden: round(t n) of each cell's n, at least one, gene and count together.

    Each cell has its own stream of randomness, by the seed and its position in the source: the mask depends on nothing
    else, and what is hidden at a share is hidden at all larger ones.

    Parameters
    ----------
    cells
        Raw counts in vocabulary order.
    mask_ratio
        t, share of hidden tokens.
    seed
        Seed of the masks.
    """
    n_stored = np.diff(cells.counts.indptr)
    is_hidden = np.zeros(int(n_stored.sum()), dtype=bool)
    start = 0
    for index, n in zip(cells.cell_index.tolist(), n_stored.tolist(), strict=True):
        n_hidden = min(n, max(1, round(mask_ratio * n)))
        order = np.random.default_rng([seed, _MASK_STREAM, index]).permutation(n)
        is_hidden[start + order[:n_hidden]] = True
        start += n
    return is_hidden


def reconstruct(
    reader: CountsReader,
    model: Reconstructor,
    *,
    mask_ratios: Sequence[float] = MASK_RATIOS,
    seed: int = 0,
    n_cells: int | None = None,
    reference: CountsReader | None = None,
    labels_key: str | None = None,
    max_tokens: int = MAX_TOKENS,
    layer_ratio: float | None = None,
    batch_size: BatchSize = "auto",
    on_block: Callable[[int], None] | None = None,
) -> Reconstruction:
    """Hide tokens of cells, have a model and simple guesses restore them, and compare.

    Parameters
    ----------
    reader
        Raw counts, aligned to the model's vocabulary.
    model
        Any model that says what is hidden.
    mask_ratios
        Shares of hidden tokens, above 0 and at most 1.
    seed
        Of the masks, of the choice of cells and of the null control.
    n_cells
        Judge a random choice of this many cells; None: all.
    reference
        Cells that the simple guesses know, aligned to the same vocabulary; None: all other cells of ``reader`` (of
        large files a random 10,000).
    labels_key
        Column of ``.obs`` (of both, where there is a reference): one more guess, which is told the label.
    max_tokens
        Length L to which sequences are cut before they are compared; a model of sequences has its own.
    layer_ratio
        Share at which the reconstructed expression is wanted; one of ``mask_ratios``.
    batch_size
        Cells at a time; "auto" takes 64. No influence on the result.
    on_block
        Called with the number of cells done, for progress.

    Returns
    -------
    Reconstruction

    Raises
    ------
    ConfigError
        An impossible share, size or number.
    GeneError
        The readers are aligned to another vocabulary than the model's.
    SourceError
        No cell has a count in the model's genes, or too few are left as a reference.
    KeyNotFoundError
        There is no column ``labels_key``.
    UntrainedHeadError, UnsupportedError
        The model cannot say what is hidden.
    OutputError
        A layer was asked for, and the counts are those of ``.raw``.
    """
    ratios = _checked_ratios(mask_ratios, layer_ratio)
    _check_sizes(n_cells, batch_size, max_tokens, layer_ratio, reader)
    _check_vocabulary(reader, model)
    order, length = _order_and_length(model, max_tokens)
    guesser = _Guesser.open(reader, reference, model, seed=seed, labels_key=labels_key)
    chosen = np.arange(len(reader))
    if n_cells is not None and n_cells < len(reader):
        chosen = np.sort(np.random.default_rng([seed, _CELLS_STREAM]).choice(len(reader), n_cells, replace=False))
    scores, saw_answer, layer = _Scores(), {}, _Layer()
    n_empty = n_done = n_cut = 0
    for block in ordered_blocks(reader, _AUTO_BLOCK if batch_size == "auto" else batch_size, indices=chosen):
        n_done += block.n_cells
        cells = block.take(np.flatnonzero(np.diff(block.counts.indptr) > 0))
        n_empty += block.n_cells - cells.n_cells
        n_cut += int((np.diff(cells.counts.indptr) > length).sum())
        cells = cut(cells, model.statistics, order, model.n_places)
        for ratio in ratios if cells.n_cells else ():
            is_hidden = hidden_tokens(cells, ratio, seed=seed)
            task = _Task(cells, is_hidden, model.statistics, order, length)
            for method, saw, found in _all_methods(task, model, guesser, seed):
                scores.add(ratio, method, found)
                saw_answer[method] = saw
                if ratio == layer_ratio and found.written is not None:
                    layer.add(method, found.written)
        if on_block is not None:
            on_block(n_done)
    if n_done == n_empty:
        raise SourceError(
            f"no cell of {reader.source.name} has a count in the model's genes",
            expected="cells with counts",
            fix="run scdiva check on the file",
        )
    tokens = (
        f"a cell is its {length:,} best-ranked genes" if model.n_places else f"sequences are cut to {length:,} genes"
    )
    record = {
        **model.provenance,
        "source": reader.source.name,
        "counts_in": reader.found.description,
        "measured_share": measured_share(reader, model),
        "library_size_key": reader.library_size_key or "",
        "genes": reader.alignment.counts(),
        "n_cells": n_done - n_empty,
        "n_empty_cells": n_empty,
        "n_cut_cells": n_cut,
        "seed": seed,
        "mask_ratios": list(ratios),
        "max_tokens": length,
        "token_order": order.value,
        "tokens": tokens,
        "layout": "sequence" if model.n_places else "set",
        "reference": guesser.description,
        "labels_key": labels_key or "",
        "lat_saw_answer": any(saw for saw in saw_answer.values()),
    }
    for warning in reader_warnings(reader, model):
        log.warning("%s: %s", reader.source.name, warning)
    if n_empty:
        log.warning("%s: %d cells have no UMI in the model's genes and are not judged", reader.source.name, n_empty)
    reconstructed = None
    if layer_ratio is not None:
        reconstructed = layer.in_columns_of(reader)
        record |= {"layer_mask_ratio": layer_ratio, "layer_method": layer.method, "layer_unit": "log1p(CP10K)"}
    return Reconstruction(
        rows=scores.rows(saw_answer),
        differences=scores.differences(seed),
        record=record,
        reconstructed=reconstructed,
    )


def cut(cells: CellCounts, statistics: GeneStatistics, order: TokenOrder, n_tokens: int | None) -> CellCounts:
    """Keep each cell's ``n_tokens`` best-ranked genes; None: all. Library sizes stay those of the whole cells."""
    if n_tokens is None or np.diff(cells.counts.indptr).max(initial=0) <= n_tokens:
        return cells
    return _without(cells, token_ranks(cells, statistics, order=order) >= n_tokens)


def _without(cells: CellCounts, is_left_out: NDArray[np.bool_]) -> CellCounts:
    counts = cells.counts
    indptr = np.concatenate([[0], np.cumsum(~is_left_out)])[counts.indptr]
    kept = sp.csr_matrix((counts.data[~is_left_out], counts.indices[~is_left_out], indptr), shape=counts.shape)
    return replace(cells, counts=kept)


@dataclass(frozen=True, slots=True)
class _Found:
    """Scores of the cells of a block, and what belongs to a method beside them."""

    scores: CellScores
    # true and expected values of all hidden tokens, for the pooled correlation
    values: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    # cell index, gene and value of the reconstructed cells
    written: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]] | None = None
    is_model: bool = False


class _Task:
    """Some cells with what is hidden of them; scores what is said of it."""

    def __init__(
        self,
        cells: CellCounts,
        is_hidden: NDArray[np.bool_],
        statistics: GeneStatistics,
        order: TokenOrder,
        length: int,
    ) -> None:
        self.cells, self.is_hidden, self.statistics, self.order, self.length = (
            cells,
            is_hidden,
            statistics,
            order,
            length,
        )
        counts = cells.counts
        self.cell_N = np.repeat(np.arange(cells.n_cells), np.diff(counts.indptr))
        self.gene_N, self.value_N = counts.indices.astype(np.int64), log1p_cp10k(cells)
        self.cell_M, self.gene_M = self.cell_N[is_hidden], self.gene_N[is_hidden]
        self.count_M, self.value_M = counts.data[is_hidden].astype(np.int64), self.value_N[is_hidden]
        self.n_hidden_B = np.bincount(self.cell_M, minlength=cells.n_cells)
        self.start_B = counts.indptr[:-1].astype(np.int64)
        self.visible = _without(cells, is_hidden)
        self.is_admissible = cells.is_measured[cells.source_of_cell]
        self.is_admissible[self.cell_N[~is_hidden], self.gene_N[~is_hidden]] = False
        self.truth, self.rank_N = self.serialized(self.cell_N, self.gene_N, self.value_N)

    def serialized(
        self, cell: NDArray[np.int64], gene: NDArray[np.int64], value: NDArray[np.float32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Order the genes of each cell by their scores: genes, best first, cell after cell; and the rank of each.

        Cells keep the number of their tokens.
        """
        place = np.lexsort((gene, cell))
        counts = sp.csr_matrix(
            (np.ones(gene.size, dtype=np.int32), gene[place].astype(np.int32), self.cells.counts.indptr),
            shape=self.cells.counts.shape,
        )
        # scores are ranked by their bit patterns, which negative numbers would upset
        positive = np.maximum(value[place], np.float32(0)) + np.float32(0)
        rank = np.empty(gene.size, dtype=np.int64)
        rank[place] = token_ranks(
            replace(self.cells, counts=counts), self.statistics, order=self.order, value=positive.astype(np.float32)
        )
        ordered = np.empty(gene.size, dtype=np.int64)
        ordered[self.start_B[cell] + rank] = gene
        return ordered, rank

    def in_places(self, gene_M: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the true sequences with other genes in the hidden places."""
        sequence = self.truth.copy()
        sequence[self.start_B[self.cell_M] + self.rank_N[self.is_hidden]] = gene_M
        return sequence

    def restored(self, cell_P: NDArray[np.int64], gene_P: NDArray[np.int64], value_P: NDArray[np.float32]) -> Any:
        """Return cell, gene and value of visible tokens as observed and restored ones as expected."""
        seen = ~self.is_hidden
        return (
            np.concatenate([self.cell_N[seen], cell_P]),
            np.concatenate([self.gene_N[seen], gene_P]),
            np.concatenate([self.value_N[seen], value_P]),
        )

    def of_sequences(self, predicted: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Compare sequences of the whole block, each cut to L."""
        names = ("edits", "edits_per_token", "bleu", "rank_spearman")
        found = np.empty((len(names), self.cells.n_cells))
        ends = self.cells.counts.indptr[1:]
        for cell, (start, end) in enumerate(zip(self.start_B, ends, strict=True)):
            rows = slice(start, min(end, start + self.length))
            a, b = self.truth[rows], predicted[rows]
            n_edits = edit_distance(a, b)
            found[:, cell] = n_edits, n_edits / a.size, bleu(a, b), rank_correlation(a, b)
        return dict(zip(names, found, strict=True))

    def of_genes(self, cell_P: NDArray[np.int64], gene_P: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Return the share of the hidden genes that is among the predicted ones."""
        is_predicted = np.zeros((self.cells.n_cells, self.cells.n_genes + 1), dtype=bool)
        is_predicted[cell_P, gene_P] = True  # the last column is "no gene"
        return {"recall": self.mean(is_predicted[self.cell_M, self.gene_M])}

    def of_likeliest(self, gene_BK: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
        """Return whether the most probable gene is hidden, and the share of the five most probable that is."""
        is_hidden = np.zeros((self.cells.n_cells, self.cells.n_genes + 1), dtype=bool)
        is_hidden[self.cell_M, self.gene_M] = True  # the last column is "no gene"
        hit = np.take_along_axis(is_hidden, gene_BK, axis=1)
        n_possible = np.minimum(self.n_hidden_B, gene_BK.shape[1])
        return {"top1": hit[:, 0].astype(np.float64), "top5": hit.sum(axis=1) / n_possible}

    def of_values(
        self, value_M: NDArray[np.float32], nll_M: NDArray[np.float32] | None
    ) -> dict[str, NDArray[np.float64]]:
        """Compare expected values of the true hidden genes with the truth."""
        found = {"value_mae": self.mean(np.abs(value_M - self.value_M))}
        if nll_M is not None:
            found["value_nll"] = self.mean(nll_M)
        ends = np.cumsum(self.n_hidden_B)
        found["value_spearman"] = np.array(
            [
                spearman(self.value_M[start:end], value_M[start:end])
                for start, end in zip(ends - self.n_hidden_B, ends, strict=True)
            ]
        )
        return found

    def mean(self, of_M: NDArray[np.floating] | NDArray[np.bool_]) -> NDArray[np.float64]:
        """Mean over each cell's hidden tokens."""
        return np.bincount(self.cell_M, weights=of_M, minlength=self.cells.n_cells) / self.n_hidden_B

    def of_set(self, said: HiddenSet) -> _Found:
        """Score what is said of a set of genes without places."""
        log_odds = np.where(self.is_admissible, said.log_odds, -np.inf)
        nll_M = _identity_nll(log_odds, self.is_admissible, self.n_hidden_B, self.cell_M, self.gene_M)
        likely = [_largest(row, max(n, 5)) for row, n in zip(log_odds, self.n_hidden_B, strict=True)]
        cell_P, gene_P = self.cell_M, np.concatenate([g[:n] for g, n in zip(likely, self.n_hidden_B, strict=True)])
        value_M = said.expected_values(self.cell_M, self.gene_M)
        cell, gene, value = self.restored(cell_P, gene_P, said.expected_values(cell_P, gene_P))
        top = np.full((self.cells.n_cells, 5), NO_GENE)
        for row, genes in enumerate(likely):
            is_possible = self.is_admissible[row, genes[:5]]
            top[row, : is_possible.size] = np.where(is_possible, genes[:5], NO_GENE)
        scores = {
            **self.of_sequences(self.serialized(cell, gene, value)[0]),
            **self.of_genes(cell_P, gene_P),
            **self.of_likeliest(top),
            "identity_nll": self.mean(nll_M),
            **self.of_values(value_M, said.value_nll(self.cell_M, self.gene_M, self.count_M)),
        }
        return _Found(scores, (self.value_M, value_M), (self.cells.cell_index[cell], gene, value))

    def of_places(self, said: HiddenPlaces, gene_M: NDArray[np.int64]) -> _Found:
        """Score what is said of places, with one of its two choices of genes."""
        scores = {
            **self.of_sequences(self.in_places(gene_M)),
            **self.of_genes(self.cell_M, gene_M),
            **self.of_likeliest(said.likeliest),
            "place_top1": self.mean(said.rank < 1),
            "place_top5": self.mean(said.rank < 5),
            "identity_nll": self.mean(said.identity_nll),
            **self.of_values(said.value, said.value_nll),
        }
        written = None
        if gene_M is said.distinct:
            cell, gene, value = self.restored(self.cell_M, gene_M, said.distinct_value)
            written = (self.cells.cell_index[cell], gene, value)
        return _Found(scores, (self.value_M, said.value), written, is_model=True)

    def of_oracle(self, value_M: NDArray[np.float32]) -> _Found:
        """Score the true genes with expected values in their own order: what wrong values alone cost."""
        restored = self.restored(self.cell_M, self.gene_M, value_M)
        return _Found({**self.of_sequences(self.serialized(*restored)[0]), **self.of_genes(self.cell_M, self.gene_M)})

    def one_umi(self) -> NDArray[np.float32]:
        """Return the value that each hidden gene would have with one UMI."""
        return np.log1p(CP10K / self.cells.library_size)[self.cell_M].astype(np.float32)

    def of_copy(self) -> _Found:
        """Score the visible tokens in their places and nothing in the hidden ones."""
        empty = np.full(self.cell_M.size, NO_GENE)
        return _Found({**self.of_sequences(self.in_places(empty)), **self.of_genes(self.cell_M, empty)})


def _all_methods(
    task: _Task, model: Reconstructor, guesser: _Guesser, seed: int
) -> Iterator[tuple[str, bool | None, _Found]]:
    """Yield (method, whether it saw the answer, what was found) of the model and everything beside it."""
    oracles: list[tuple[str, bool | None, _Found]] = []
    name = str(model.provenance["model"])
    for variant, said in model.predict_hidden(task.cells, task.is_hidden).items():
        title = f"{name}, {variant}" if variant else name
        suffix = f": {variant}" if variant else ""
        if isinstance(said, HiddenPlaces):
            for how, gene_M in (("argmax", said.best), ("no gene twice", said.distinct)):
                yield f"{title}, {how}", said.saw_answer, task.of_places(said, gene_M)
            oracles.append((CEILING + suffix, said.saw_answer, task.of_oracle(said.value)))
        else:
            found = task.of_set(said)
            yield title, False, replace(found, is_model=True)
            assert found.values is not None
            oracles.append((CEILING + suffix, False, task.of_oracle(found.values[1])))
    yield COPY, None, task.of_copy()
    for method, guess in guesser.guesses(task.visible, seed).items():
        yield method, None, replace(task.of_set(guess), written=None)
    yield from oracles
    yield ONE_UMI, None, task.of_oracle(task.one_umi())


@dataclass(frozen=True, slots=True)
class _Guesser:
    """The simple guesses with their reference."""

    reference: ReferenceCells
    description: str
    # codes of the labels of all cells of the judged file, and of the reference cells
    labels: tuple[NDArray[np.int64], NDArray[np.int64]] | None

    @classmethod
    def open(
        cls,
        reader: CountsReader,
        reference: CountsReader | None,
        model: Reconstructor,
        *,
        seed: int,
        labels_key: str | None,
    ) -> _Guesser:
        """Read the reference: other cells, or those of the judged file, each of which is left out of its own guess."""
        known = reader if reference is None else reference
        _check_vocabulary(known, model)
        indices = np.arange(len(known))
        if indices.size > _REFERENCE_CELLS:
            rng = np.random.default_rng([seed, _REFERENCE_STREAM])
            indices = np.sort(rng.choice(indices.size, _REFERENCE_CELLS, replace=False))
        cells = known.read(indices)
        has_counts = np.diff(cells.counts.indptr) > 0
        cells, indices = cells.take(np.flatnonzero(has_counts)), indices[has_counts]
        if cells.n_cells < 2:
            raise SourceError(
                f"{cells.n_cells} cells with counts in {known.source.name} to guess from",
                expected="at least two",
                fix="name a reference",
            )
        order, _ = _order_and_length(model, MAX_TOKENS)
        prepared = ReferenceCells.of(cut(cells, model.statistics, order, model.n_places), is_left_out=reference is None)
        labels = None
        if labels_key is not None:
            of_file, of_known = (_labels(r, labels_key) for r in (reader, known))
            codes = {name: code for code, name in enumerate(sorted((set(of_file) | set(of_known)) - {""}))} | {"": -1}
            labels = np.array([codes[n] for n in of_file]), np.array([codes[n] for n in of_known[indices]])
        whose = f"{cells.n_cells:,} cells of {known.source.name}"
        if reference is None:
            # where the reference is a random choice, a judged cell need not be in it
            whose = f"the other {cells.n_cells - 1:,} cells of the same file"
            if len(known) > _REFERENCE_CELLS:
                whose = f"{cells.n_cells:,} random cells of the same file, each but for itself"
        return cls(prepared, whose, labels)

    def guesses(self, visible: CellCounts, seed: int) -> dict[str, GeneGuess]:
        """Return each simple guess of some cells; only their visible tokens are there to be read."""
        population = self.reference.population(visible)
        found = {POPULATION: population, NEIGHBOURS: self.reference.neighbours(visible, population)}
        if self.labels is not None:
            found[LABEL] = self.reference.same_label(
                visible, population, self.labels[0][visible.cell_index], self.labels[1]
            )
        return found | {NULL: random_guess(visible, population, seed=seed)}


def _labels(reader: CountsReader, key: str) -> NDArray[Any]:
    """Labels of all cells of a file; "" where unknown."""
    names = reader.source.column(key).astype("string").fillna("").to_numpy(dtype=str)
    return np.where([name.lower() in _UNKNOWN_LABELS for name in names], "", names)


class _Scores:
    """Scores of cells by share and method, block after block."""

    def __init__(self) -> None:
        self._parts: dict[tuple[float, str], list[_Found]] = {}
        self._models: dict[str, None] = {}

    def add(self, ratio: float, method: str, found: _Found) -> None:
        self._parts.setdefault((ratio, method), []).append(replace(found, written=None))
        if found.is_model:
            self._models[method] = None

    def of_cells(self, ratio: float, method: str) -> dict[str, NDArray[np.float64]]:
        parts = self._parts[ratio, method]
        return {name: np.concatenate([part.scores[name] for part in parts]) for name in parts[0].scores}

    def rows(self, saw_answer: Mapping[str, bool | None]) -> tuple[ReconstructionRow, ...]:
        rows = []
        for (ratio, method), parts in sorted(self._parts.items(), key=lambda item: item[0][0]):
            of_cells = self.of_cells(ratio, method)
            mean = {name: _mean(scores) for name, scores in of_cells.items()}
            error = {name: _standard_error(scores) for name, scores in of_cells.items()}
            pairs = [part.values for part in parts if part.values is not None]
            if pairs:
                mean["value_pearson"] = pearson(*(np.concatenate(values) for values in zip(*pairs, strict=True)))
            n_cells = next(iter(of_cells.values())).size
            rows.append(ReconstructionRow(ratio, method, saw_answer[method], n_cells, mean, error))
        return tuple(rows)

    def differences(self, seed: int) -> tuple[Difference, ...]:
        found = []
        for ratio in sorted({ratio for ratio, _ in self._parts}):
            for method in self._models:
                ours = self.of_cells(ratio, method)
                for against in (POPULATION, NEIGHBOURS):
                    other = self.of_cells(ratio, against)
                    for metric in _COMPARED:
                        is_there = np.isfinite(ours[metric]) & np.isfinite(other[metric])
                        rng = np.random.default_rng([seed, _INTERVAL_STREAM])
                        interval = paired_difference(ours[metric][is_there], other[metric][is_there], rng=rng)
                        found.append(Difference(ratio, method, against, metric, *interval))
        return tuple(found)


class _Layer:
    """Reconstructed cells, block after block, by method."""

    def __init__(self) -> None:
        self._parts: dict[str, list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]]] = {}

    @property
    def method(self) -> str:
        """The method that is written: of several variants of a model the last, which does not see the answer."""
        return list(self._parts)[-1]

    def add(self, method: str, written: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]) -> None:
        self._parts.setdefault(method, []).append(written)

    def in_columns_of(self, reader: CountsReader) -> sp.csr_matrix:
        """Put the cells into rows and columns of the file; of several columns of one gene the first gets its value."""
        column_of_gene = np.full(reader.alignment.is_measured.size, -1, dtype=np.int64)
        for known, columns in reader.alignment.source_of_gene().items():
            column_of_gene[known] = columns[0]
        cell, gene, value = (np.concatenate(parts) for parts in zip(*self._parts[self.method], strict=True))
        result = sp.csr_matrix((value, (cell, column_of_gene[gene])), shape=(len(reader), len(reader.is_gene)))
        result.sort_indices()
        return result


def _identity_nll(
    log_odds: NDArray[np.floating],
    is_admissible: NDArray[np.bool_],
    n_hidden: NDArray[np.int64],
    cell_M: NDArray[np.int64],
    gene_M: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Nats of each hidden gene: -log(p / m), with p the inclusion probabilities of m hidden genes."""
    logit_BG = torch.from_numpy(np.asarray(log_odds, dtype=np.float32))
    shift_B = inclusion_shift(logit_BG, torch.from_numpy(is_admissible), torch.from_numpy(n_hidden))
    cell, gene = torch.from_numpy(cell_M), torch.from_numpy(gene_M)
    log_p_M = F.logsigmoid(logit_BG[cell, gene] + shift_B[cell])
    return np.asarray(torch.log(torch.from_numpy(n_hidden).float())[cell] - log_p_M)


def _largest(row: NDArray[np.floating], n: int) -> NDArray[np.int64]:
    """Return where the n largest are, largest first; of equal ones the first."""
    n = min(n, row.size)
    # a whole sort of a vocabulary per cell and method would cost more than the model
    threshold = np.partition(row, row.size - n)[row.size - n]
    above, equal = np.flatnonzero(row > threshold), np.flatnonzero(row == threshold)
    chosen = np.concatenate([above, equal[: n - above.size]])
    return chosen[np.argsort(-row[chosen], kind="stable")]


def _mean(scores: NDArray[np.float64]) -> float:
    is_there = np.isfinite(scores)
    return float(scores[is_there].mean()) if is_there.any() else float("nan")


def _standard_error(scores: NDArray[np.float64]) -> float:
    scores = scores[np.isfinite(scores)]
    return float(scores.std(ddof=1) / math.sqrt(scores.size)) if scores.size > 1 else float("nan")


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _checked_ratios(mask_ratios: Sequence[float], layer_ratio: float | None) -> tuple[float, ...]:
    ratios = tuple(sorted({float(ratio) for ratio in mask_ratios}))
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise ConfigError(
            f"mask_ratios={list(mask_ratios)}",
            expected="shares of hidden tokens above 0 and at most 1",
            fix="for example 0.15, 0.5, 0.9",
        )
    if layer_ratio is not None and layer_ratio not in ratios:
        raise ConfigError(
            f"a layer at a share of {layer_ratio:g}, which is not among {', '.join(f'{r:g}' for r in ratios)}",
            expected="one of the shares of hidden tokens",
            fix="name it in both",
        )
    return ratios


def _check_sizes(
    n_cells: int | None, batch_size: BatchSize, max_tokens: int, layer_ratio: float | None, reader: CountsReader
) -> None:
    for name, value in (("n_cells", n_cells), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value != "auto" and int(value) < 1:
            raise ConfigError(f"{name}={value}", expected="a positive number", fix="leave it out")
    if layer_ratio is None:
        return
    if n_cells is not None and n_cells < len(reader):
        raise ConfigError(
            f"a layer of {len(reader)} cells, of which {n_cells} are reconstructed",
            expected="all cells, for a layer",
            fix="leave n_cells out, or do without the layer",
        )
    if reader.found.matrix.name == "raw.X":
        raise OutputError(
            "the reconstruction of counts in .raw has no layer to go to",
            expected="counts in X or a layer",
            fix="ask for no layer, or move the counts to a layer",
        )


def _check_vocabulary(reader: CountsReader, model: Reconstructor) -> None:
    if reader.alignment.vocabulary.fingerprint != model.vocabulary.fingerprint:
        raise GeneError(
            f"the cells of {reader.source.name} are aligned to another vocabulary than the model's",
            expected=f"fingerprint {model.vocabulary.fingerprint[:12]}",
            fix="open them with open_counts(data, model.vocabulary)",
        )


def _order_and_length(model: Reconstructor, max_tokens: int) -> tuple[TokenOrder, int]:
    """Order of the compared sequences, and their largest length: a model's own where its tokens have places."""
    if model.n_places is None:
        return TokenOrder.ENTROPY, max_tokens
    order = TokenOrder(model.token_order)
    if order is TokenOrder.RANDOM:
        raise UnsupportedError(
            "a model of randomly ordered tokens has no sequence to reconstruct",
            expected="order = entropy or expression",
            fix="use another model",
        )
    return order, model.n_places
