"""Who attends to whom: attention of a native trunk, summed over cells for pairs of genes.

Cells are read whole, nothing of them hidden. Scaled dot-product attention gives no weights, so that they are computed
here from what goes into each layer: softmax(Q K^T / sqrt(d)), one cell after the other. Layers and heads are averaged,
or multiplied along the layers (attention rollout: Abnar & Zuidema, arXiv:2005.00928). A row of the result is a gene
that attends (the query: a target), a column one that is attended to (the key: a regulator).

Three things are taken out of the weights before they are summed (our decisions):

- *special tokens* ([LAT], conditions, [QUERY]) are no genes: the mass on them is left out (and told in
  ``special_share``), and so is a gene's attention to itself; each row is brought back to the sum 1 over the other genes
  of the cell;
- *sinks*: some genes are attended to by all others. What is expected of a pair in one cell is the mean attention that
  all other genes of this very cell pay to the key; it is summed over the same cells as what is observed;
- *co-occurrence*: both are summed over the cells that have both genes, and nothing else is.

Shape letters: B cells, L gene tokens of one cell, A all tokens of one cell, H heads, R regulators, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.errors import ConfigError, UnsupportedError
from scdiva.models.scdiva.inputs import MaskedCells, Tokeniser
from scdiva.models.scdiva.model import ScDiVa
from scdiva.models.scdiva.native import NativeNetwork, Trunk
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.nn.transformer import Attention, Block, Transformer
from scdiva.serialization import token_ranks
from scdiva.types import CellCounts

_BLOCK = 64
_BLOCK_WEIGHTS = 2**25
"""Cells, and attention weights of them all (128 MB), that are held at a time; no influence on the result."""
_FEWEST_TOKENS = 3
"""A cell of two genes says nothing: each attends to the other."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSums:
    """Attention summed over cells.

    Parameters
    ----------
    observed_RT
        float64 sum, over the cells that have both genes, of the target's attention to the regulator.
    expected_RT
        float64 sum, over the same cells, of what all other genes of the cell pay to the regulator on average.
    n_cells_RT
        int32 cells that have both.
    received_R
        float64 sum, over the cells that express the regulator, of the mean attention that the other genes pay to it, in
        multiples of what each gene would get if all got the same.
    n_cells_R
        int64 cells that express the regulator.
    special_share
        Share of the genes' attention that went to tokens that are no genes.
    """

    observed_RT: NDArray[np.float64]
    expected_RT: NDArray[np.float64]
    n_cells_RT: NDArray[np.int32]
    received_R: NDArray[np.float64]
    n_cells_R: NDArray[np.int64]
    special_share: float


def set_trunk(model: ScDiVa, task: str) -> tuple[NativeNetwork, Trunk]:
    """Return the network of a model that reads sets with a trunk, and the trunk.

    Raises
    ------
    UnsupportedError
        The model is not native, has no trunk, or reads sequences; names the task.
    """
    network = model.native(task)
    if network.trunk is None or network.trunk.is_sequence:
        raise UnsupportedError(
            f"{model.name} {'has no trunk' if network.trunk is None else 'reads sequences'}: it does not do {task}",
            expected="a native model with a trunk that reads sets (scdiva inspect: model, trunk)",
            fix="use a model such as scdiva-blood-tiny",
        )
    return network, network.trunk


def read_cells(
    model: ScDiVa, cells: CellCounts, always: NDArray[np.int64], max_tokens: int | None
) -> Iterator[tuple[CellCounts, MaskedCells]]:
    """Read whole cells in blocks, told no condition.

    Parameters
    ----------
    model
        A native model.
    cells
        Raw counts.
    always
        Genes that are read wherever they are expressed.
    max_tokens
        Further genes that the trunk reads of each cell, the best-ranked; None: all of them.

    Yields
    ------
    CellCounts, MaskedCells
        Some cells, and how the trunk reads them.
    """
    everything = replace(tokeniser_of(model.config, model.statistics), max_tokens=cells.n_genes)  # type: ignore[arg-type]
    is_always = np.zeros(cells.n_genes, dtype=bool)
    is_always[always] = True
    for rows in _blocks(np.diff(cells.counts.indptr)):
        block = cells.take(rows)
        block = replace(block, condition=np.zeros((block.n_cells, model.labels.n_fields), dtype=np.int32))
        # the generator is used by orders at random only
        masked = everything.unmasked(block, np.random.default_rng(0))
        if max_tokens is not None:
            is_read = is_always[block.counts.indices] | is_among_best(block, everything, max_tokens)
            masked = only_tokens(masked, is_read)
        yield block, masked.to(model.device)


def _blocks(n_tokens: NDArray[np.integer]) -> Iterator[NDArray[np.int64]]:
    """Cut cells into blocks of bounded size."""
    block: list[int] = []
    weights = 0
    for row, n in enumerate(n_tokens.astype(np.int64).tolist()):
        if block and (len(block) == _BLOCK or weights + n * n > _BLOCK_WEIGHTS):
            yield np.array(block, dtype=np.int64)
            block, weights = [], 0
        block.append(row)
        weights += n * n
    if block:
        yield np.array(block, dtype=np.int64)


def is_among_best(cells: CellCounts, tokeniser: Tokeniser, max_tokens: int) -> NDArray[np.bool_]:
    """Tell which stored counts are among the best-ranked of their cell, ``(nnz,)``."""
    rank = token_ranks(cells, tokeniser.statistics, order=tokeniser.order, rng=np.random.default_rng(0))
    return np.asarray(rank < max_tokens)


def only_tokens(cells: MaskedCells, is_read_N: NDArray[np.bool_]) -> MaskedCells:
    """Return cells of which the trunk reads some of the visible tokens only; all else that it is told stays."""
    cell_N = np.repeat(np.arange(cells.n_cells), cells.lengths)
    kept = torch.from_numpy(np.flatnonzero(is_read_N))
    return replace(
        cells,
        lengths=tuple(np.bincount(cell_N[is_read_N], minlength=cells.n_cells).tolist()),
        gene_N=cells.gene_N[kept],
        value_N=cells.value_N[kept],
        position_N=cells.position_N[kept],
        is_value_masked_N=cells.is_value_masked_N[kept],
    )


@torch.inference_mode()
def attention_sums(
    model: ScDiVa,
    cells: CellCounts,
    regulators: NDArray[np.int64],
    targets: NDArray[np.int64],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    rollout: bool = False,
    max_tokens: int | None = None,
    on_cells: Callable[[int], None] | None = None,
) -> AttentionSums:
    """Sum the attention of targets to regulators over cells.

    Parameters
    ----------
    model
        A native model with a trunk.
    cells
        Raw counts in the order of its vocabulary.
    regulators, targets
        ``(R,)`` and ``(T,)`` gene indices.
    layers, heads
        Positions of layers and heads, negative ones from the end; None: all. Means are taken over them. A rollout
        multiplies the chosen layers, the first first.
    rollout
        Multiply the layers, each half attention, half what the token was (the residual stream), in place of their mean.
    max_tokens
        Genes that the trunk reads of each cell, the best-ranked, besides the regulators; None: all.
    on_cells
        Called with the number of cells done, for progress.

    Returns
    -------
    AttentionSums
        Sums in float64: the order of cells and their batch-mates do not matter.

    Raises
    ------
    UnsupportedError
        The model has no trunk that reads sets.
    ConfigError
        There is no such layer or head.
    """
    network, trunk = set_trunk(model, "attention between genes")
    chosen_layers = _chosen(layers, len(trunk.transformer.layers), "layers")
    chosen_heads = _chosen(heads, trunk.transformer.n_heads, "heads")
    shape = (regulators.size, targets.size)
    observed, expected = np.zeros(shape), np.zeros(shape)
    n_cells = np.zeros(shape, dtype=np.int32)
    received, n_expressing = np.zeros(regulators.size), np.zeros(regulators.size, dtype=np.int64)
    row_of_gene = np.full(cells.n_genes, -1, dtype=np.int64)
    row_of_gene[regulators] = np.arange(regulators.size)
    column_of_gene = np.full(cells.n_genes, -1, dtype=np.int64)
    column_of_gene[targets] = np.arange(targets.size)
    on_specials, n_rows, done = 0.0, 0, 0
    for block, masked in read_cells(model, cells, regulators, max_tokens):
        weights = _attention_of_cells(network, trunk, masked, chosen_layers, chosen_heads, rollout)
        genes = np.split(masked.gene_N.cpu().numpy(), np.cumsum(masked.lengths)[:-1])
        for weight_AA, gene_L in zip(weights, genes, strict=True):
            if gene_L.size < _FEWEST_TOKENS:
                continue
            between_LL, specials = _between_genes(weight_AA, gene_L.size)
            on_specials, n_rows = on_specials + specials, n_rows + gene_L.size
            keys = np.flatnonzero(row_of_gene[gene_L] >= 0)
            queries = np.flatnonzero(column_of_gene[gene_L] >= 0)
            if not keys.size:
                continue
            # popularity of a key among the *other* genes: its own row is 0 there
            n_others = gene_L.size - 1
            at_keys = torch.from_numpy(keys).to(between_LL.device)
            popularity = (between_LL.sum(dim=0)[at_keys] / n_others).double().cpu().numpy()
            received[row_of_gene[gene_L[keys]]] += popularity * n_others
            n_expressing[row_of_gene[gene_L[keys]]] += 1
            weight = between_LL[:, at_keys].double().cpu().numpy()[queries].T
            at = np.ix_(row_of_gene[gene_L[keys]], column_of_gene[gene_L[queries]])
            observed[at] += weight
            expected[at] += popularity[:, None]
            n_cells[at] += 1
        done += block.n_cells
        if on_cells is not None:
            on_cells(done)
    return AttentionSums(observed, expected, n_cells, received, n_expressing, on_specials / max(n_rows, 1))


def _chosen(wanted: Sequence[int] | None, n_there: int, what: str) -> list[int]:
    if wanted is None:
        return list(range(n_there))
    if len(wanted) == 0 or any(not -n_there <= i < n_there for i in wanted):
        raise ConfigError(
            f"attention {what} {list(wanted)}",
            expected=f"at least one of 0 ... {n_there - 1} (or negative, from the end)",
            fix="name others, or leave them out",
        )
    return sorted({i % n_there for i in wanted})


def _attention_of_cells(
    network: NativeNetwork, trunk: Trunk, cells: MaskedCells, layers: list[int], heads: list[int], rollout: bool
) -> list[torch.Tensor]:
    """Return the attention weights of each cell, ``(A, A)`` over its special tokens and then its genes."""
    found: list[torch.Tensor] = []

    def take(index: int, weights: list[torch.Tensor]) -> None:
        if index not in layers:
            return
        if not found:
            found.extend(weights)
            return
        for i, weight_AA in enumerate(weights):
            found[i] = weight_AA @ found[i] if rollout else found[i] + weight_AA

    with _watched(trunk.transformer, heads, rollout, take):
        trunk(cells, network.latent(cells), network.anchor.gene_embedding, network.mean_log_depth)
    return found if rollout else [weight_AA / len(layers) for weight_AA in found]


@contextmanager
def _watched(
    transformer: Transformer, heads: list[int], rollout: bool, take: Callable[[int, list[torch.Tensor]], None]
) -> Iterator[None]:
    """Compute the weights of every layer from what goes into it, while the transformer runs."""

    def watch(index: int) -> Any:
        def before(module: Any, args: Any) -> None:
            attention = cast(Attention, module)
            x_TD, packing, _ = args
            n_tokens, width = x_TD.shape
            q_THK, k_THK, _ = (
                attention.qkv(x_TD).view(n_tokens, 3, attention.n_heads, width // attention.n_heads).unbind(1)
            )
            q_THK = q_THK[:, heads].float() * q_THK.shape[-1] ** -0.5
            weights = []
            for q_AHK, k_AHK in zip(
                q_THK.split(packing.lengths), k_THK[:, heads].float().split(packing.lengths), strict=True
            ):
                weight_AA = torch.softmax(q_AHK.transpose(0, 1) @ k_AHK.permute(1, 2, 0), dim=-1).mean(dim=0)
                if rollout:
                    weight_AA = 0.5 * (weight_AA + torch.eye(weight_AA.shape[0], device=weight_AA.device))
                weights.append(weight_AA)
            take(index, weights)

        return before

    hooks = [
        cast(Block, layer).attention.register_forward_pre_hook(watch(i)) for i, layer in enumerate(transformer.layers)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _between_genes(weight_AA: torch.Tensor, n_genes: int) -> tuple[torch.Tensor, float]:
    """Attention of genes to other genes, rows of sum 1, ``(L, L)``; and the mass of all rows on special tokens."""
    # gene tokens come after the special ones
    n_special = weight_AA.shape[0] - n_genes
    rows_LA = weight_AA[n_special:]
    between_LL = rows_LA[:, n_special:].clone()
    between_LL.fill_diagonal_(0.0)
    between_LL /= between_LL.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return between_LL, float(rows_LA[:, :n_special].sum(dtype=torch.float64))


__all__ = ["AttentionSums", "attention_sums", "is_among_best", "only_tokens", "read_cells", "set_trunk"]
