"""How fast does a training step run? Cells per second beside a straightforward implementation of the published step.

    python benchmarks/speed.py [--sizes tiny base] [--threads 1] [--steps 8] [--out docs/results/speed]

The straightforward step is what one writes from the paper: every cell padded to L tokens, a latent token from the mean
of the embeddings, masked tokens in their places, logits over the whole vocabulary at every position, cross-entropy with
``ignore_index``, squared error of the values, fp32, AdamW. It is spared dropout, which the published one has.
``straightforward-bf16`` is the same under bf16 autocast: it tells what the arithmetic alone is worth.

All see the same random cells, in the same minibatches; making inputs of cells is not timed. Each measurement runs in a
process of its own, whose peak memory is read at its end. Operations are those of all matrix products, forward and
backward, as torch counts them during the warm-up; their peak is the best of square matrix products in the arithmetic of
the step, measured in the same process before and after. Tokens are those of the trunk, without padding: ours reads
visible tokens only, so cells per second is the honest ratio. "Trunk alone" is the forward and backward pass of our
transformer on the same sequences.

Shape letters: B cells, L positions, D width, H heads, K width of a head, V rows of the vocabulary, G genes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention
from torch.utils import flop_counter

from scdiva.config import NativeConfig, NativeObjectiveConfig, TrunkConfig
from scdiva.data.statistics import GeneStatistics
from scdiva.models.scdiva.init import init_network, simple_model
from scdiva.models.scdiva.native import NativeNetwork
from scdiva.models.scdiva.objectives import NativeObjective
from scdiva.nn import Packing
from scdiva.types import CellCounts


@dataclass(frozen=True)
class Size:
    """A model and the cells it is measured on; ``n_genes`` without the five special rows of the vocabulary."""

    name: str
    n_layers: int
    width: int
    n_heads: int
    n_hidden: int
    max_tokens: int
    n_genes: int
    batch_size: int
    median_genes: int  # detected genes per cell are log-normal around this
    least_genes: int


SIZES = {
    "tiny": Size("tiny", 4, 192, 3, 512, 256, 28_223, 16, 1_000, 1),
    "base": Size("base", 12, 512, 8, 2048, 1200, 41_813, 4, 2_000, 1_200),  # every position holds a gene
}
N_SPECIALS, FIRST_GENE = 5, 2  # rows 0 and 1 are PAD and MASK


# runs loss, gradients and AdamW on minibatch i; returns its numbers of cells and tokens
Step = Callable[[int], tuple[int, int]]


def random_minibatches(size: Size, n_minibatches: int) -> list[CellCounts]:
    """Draw cells: gene sets by popularity without replacement, counts of 1 and more, all genes measured."""
    rng = np.random.default_rng(0)
    log_popularity_G = rng.normal(0.0, 2.0, size.n_genes)
    minibatches = []
    for _ in range(n_minibatches):
        n_genes = np.rint(size.median_genes * rng.lognormal(0.0, 0.4, size.batch_size)).astype(int)
        n_genes = n_genes.clip(size.least_genes, size.n_genes)
        # Gumbel-top-k draws without replacement
        ranked = [np.argsort(-(log_popularity_G + rng.gumbel(size=size.n_genes))) for _ in range(size.batch_size)]
        genes = np.concatenate([np.sort(order[:n]) for order, n in zip(ranked, n_genes, strict=True)])
        data, indptr = rng.geometric(0.5, genes.size).astype(np.int32), np.concatenate([[0], np.cumsum(n_genes)])
        counts = sp.csr_matrix((data, genes, indptr), shape=(size.batch_size, size.n_genes))
        library_size = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
        source, is_measured = np.zeros(size.batch_size, dtype=np.int32), np.ones((1, size.n_genes), dtype=bool)
        minibatches.append(CellCounts(counts, library_size, np.arange(size.batch_size), source, is_measured))
    return minibatches


def padded_tokens(cells: CellCounts, max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(B, L)`` vocabulary rows (0: padding) and log1p(CP10K) values of each cell's highest genes."""
    row_BL = np.zeros((cells.n_cells, max_tokens), dtype=np.int64)
    value_BL = np.zeros((cells.n_cells, max_tokens), dtype=np.float32)
    for i in range(cells.n_cells):
        part = slice(cells.counts.indptr[i], cells.counts.indptr[i + 1])
        order = np.argsort(-cells.counts.data[part], kind="stable")[:max_tokens]
        row_BL[i, : order.size] = cells.counts.indices[part][order] + FIRST_GENE
        value_BL[i, : order.size] = np.log1p(1e4 * cells.counts.data[part][order] / cells.library_size[i])
    return torch.from_numpy(row_BL), torch.from_numpy(value_BL)


def rotate(x_BHLK: torch.Tensor, angle_LK: torch.Tensor) -> torch.Tensor:
    first, second = x_BHLK.chunk(2, dim=-1)
    return x_BHLK * angle_LK.cos() + torch.cat([-second, first], dim=-1) * angle_LK.sin()


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        width, self.n_heads = size.width, size.n_heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, size.n_hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.n_hidden, width, bias=False)

    def forward(self, x_BLD: torch.Tensor, is_token_BL: torch.Tensor, angle_LK: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x_BLD)
        q, k, v = (f(normed).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mask = is_token_BL[:, None, None, :]
        attended = F.scaled_dot_product_attention(rotate(q, angle_LK), rotate(k, angle_LK), v, attn_mask=mask)
        x_BLD = x_BLD + self.o(attended.transpose(1, 2).flatten(2))
        normed = self.norm2(x_BLD)
        return x_BLD + self.down(F.silu(self.gate(normed)) * self.up(normed))


class StraightforwardNetwork(nn.Module):
    """The published token model; 94,482,433 parameters at the base size."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, n_rows, head_width = size.width, size.n_genes + N_SPECIALS, size.width // size.n_heads
        self.gene = nn.Embedding(n_rows, width)
        self.value = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width))
        self.gene_mask, self.value_mask = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.project = nn.Linear(width, width, bias=False)
        self.latent = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.n_layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.gene_head = nn.Linear(width, n_rows, bias=False)
        self.value_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        position = torch.arange(size.max_tokens + 1)[:, None]  # the latent token is at 0
        angle = position * 10_000.0 ** -(torch.arange(0, head_width, 2) / head_width)
        self.register_buffer("angle_LK", torch.cat([angle, angle], dim=-1))

    def forward(
        self, row_BL: torch.Tensor, value_BL: torch.Tensor, is_hidden_BL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        is_token_BL, hidden = row_BL != 0, is_hidden_BL[..., None]
        gene, value = self.gene(row_BL), self.value(value_BL[..., None])
        latent = self.latent(((gene + value) * is_token_BL[..., None]).sum(1) / is_token_BL.sum(1, keepdim=True))
        x = self.project(torch.where(hidden, self.gene_mask, gene) + torch.where(hidden, self.value_mask, value))
        x = torch.cat([latent[:, None], x], dim=1)
        is_token_BL = F.pad(is_token_BL, (1, 0), value=True)
        for block in self.blocks:
            x = block(x, is_token_BL, self.angle_LK)
        x = self.norm(x)[:, 1:]
        return self.gene_head(x), self.value_head(x)[..., 0]


def straightforward(size: Size, n_minibatches: int, *, bf16: bool = False) -> tuple[Step, str]:
    """The published training step as one would write it down, and its arithmetic ("fp32" or "bf16")."""
    generator = torch.Generator().manual_seed(0)
    network = StraightforwardNetwork(size)
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-4)
    minibatches = [padded_tokens(cells, size.max_tokens) for cells in random_minibatches(size, n_minibatches)]

    def step(number: int) -> tuple[int, int]:
        row_BL, value_BL = minibatches[number]
        is_token_BL = row_BL != 0
        t_B1 = torch.rand((len(row_BL), 1), generator=generator)
        is_masked_BL = (torch.rand(row_BL.shape, generator=generator) < t_B1) & is_token_BL
        is_hidden_BL = is_masked_BL & (torch.rand(row_BL.shape, generator=generator) < 0.9)  # the 90/10 rule
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logit_BLV, predicted_BL = network(row_BL, value_BL, is_hidden_BL)
            target_BL = row_BL.masked_fill(~is_masked_BL, -100)
            loss = F.cross_entropy(logit_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=-100)
            loss = loss + 10 * F.mse_loss(predicted_BL[is_masked_BL].float(), value_BL[is_masked_BL])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return len(row_BL), int(is_token_BL.sum()) + len(row_BL)

    return step, "bf16" if bf16 else "fp32"


def native_objective(size: Size, cells: CellCounts) -> NativeObjective:
    """The native objective at the same sizes, at its start, without the SVD (which no speed depends on)."""
    statistics = GeneStatistics.from_cells(cells)
    trunk = TrunkConfig(
        n_layers=size.n_layers,
        width=size.width,
        n_heads=size.n_heads,
        n_hidden=size.n_hidden,
        max_tokens=size.max_tokens,
    )
    model = NativeConfig(n_embedding=min(size.width, 512), trunk=trunk)
    network = NativeNetwork(size.n_genes, model)
    depths = np.asarray(cells.counts.sum(axis=1)).ravel()
    simple = simple_model(statistics, np.full(size.n_genes, cells.n_cells), depths)
    init_network(network, statistics, simple, None, 0, seed=0)
    return NativeObjective(network, NativeObjectiveConfig(), model, statistics, simple)


def ours(size: Size, n_minibatches: int) -> tuple[Step, str]:
    """The native training step at the same sizes, on the same cells, bf16 autocast."""
    minibatches = random_minibatches(size, n_minibatches)
    objective = native_objective(size, minibatches[0])
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-4, fused=True)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    prepared = [objective.prepare(cells, rng) for cells in minibatches]

    def step(number: int) -> tuple[int, int]:
        with torch.autocast("cpu", torch.bfloat16):
            output = objective(prepared[number], generator)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.step()
        return output.n_cells, output.n_tokens

    return step, "bf16"


def trunk_alone(size: Size, n_minibatches: int) -> tuple[Step, str]:
    """Forward and backward pass of the native trunk's transformer on the sequences of the same training steps."""
    minibatches = random_minibatches(size, n_minibatches)
    objective = native_objective(size, minibatches[0])
    rng = np.random.default_rng(0)
    transformer = objective.network.trunk.transformer
    packings = []
    for cells in minibatches:
        masked = objective.prepare(cells, rng).cells
        packings.append(Packing(tuple(n + 5 for n in masked.lengths)))  # [LAT], depths, number of genes, [QUERY]

    def step(number: int) -> tuple[int, int]:
        packing = packings[number]
        x_TD = torch.ones((packing.n_tokens, size.width), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            h_TD = transformer(x_TD, packing)
        h_TD.sum().backward()
        return len(packing.lengths), packing.n_tokens

    return step, "bf16"


IMPLEMENTATIONS: dict[str, Callable[[Size, int], tuple[Step, str]]] = {
    "straightforward": straightforward,
    "straightforward-bf16": lambda size, n: straightforward(size, n, bf16=True),
    "ours": ours,
    "ours, trunk alone": trunk_alone,
}


def measured_peak(precision: str, seconds: float = 0.3) -> float:
    """Best floating-point operations per second of square matrix products with the threads of this process."""
    best = 0.0
    for n in (512, 1024, 2048):
        a = torch.ones((n, n), dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            a @ a
            best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
ATTENTION_FLOPS = {  # torch itself counts the kernels of GPUs only
    _CPU_ATTENTION: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
    _CPU_ATTENTION_BACKWARD: lambda g, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(g, q, k, v),
}


def measure(implementation: str, size: Size, n_warmup: int, n_steps: int) -> dict[str, object]:
    """Measure in this process; medians over the steps after the warm-up."""
    torch.manual_seed(0)
    step, precision = IMPLEMENTATIONS[implementation](size, n_warmup + n_steps)
    peak = measured_peak(precision)
    with flop_counter.FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        for i in range(n_warmup):
            step(i)
    flops = counter.get_total_flops() / n_warmup
    rates = []
    for i in range(n_warmup, n_warmup + n_steps):
        started = time.perf_counter()
        n_cells, n_tokens = step(i)
        seconds = time.perf_counter() - started
        rates.append((n_cells / seconds, n_tokens / seconds, flops / seconds))
    cells_per_s, tokens_per_s, flops_per_s = map(statistics.median, zip(*rates, strict=True))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts kilobytes
    peak = max(peak, measured_peak(precision))
    return {
        "implementation": implementation, "size": size.name, "L": size.max_tokens, "batch_size": size.batch_size,
        "cells_per_s": cells_per_s, "tokens_per_s": tokens_per_s, "peak_memory_gb": memory / 1e9,
        "share_of_peak": flops_per_s / peak,
        "precision": precision, "peak_gflop_per_s": peak / 1e9, "gflop_per_step": flops / 1e9,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip


def table(rows: list[dict[str, object]]) -> str:
    """Markdown; the ratio is that of cells per second to the straightforward implementation in fp32."""
    base = {row["size"]: row["cells_per_s"] for row in rows if row["implementation"] == "straightforward"}
    lines = ["| implementation | size | L | cells/s | tokens/s | peak memory GB | share of matmul peak | ratio |"]
    lines.append("|---|---|" + "---:|" * 6)
    for row in rows:
        ratio = f"{row['cells_per_s'] / base[row['size']]:.2f}" if row["size"] in base else "-"
        lines.append(
            f"| {row['implementation']} | {row['size']} | {row['L']:,} | {row['cells_per_s']:.2f} | "
            f"{row['tokens_per_s']:,.0f} | {row['peak_memory_gb']:.2f} | "
            f"{row['share_of_peak']:.1%} of {row['precision']} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--batch-size", type=int, help="left out: 16 (tiny), 4 (base)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before those that are timed, at least 1")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if min(arguments.warmup, arguments.steps) < 1:
        parser.error("--warmup and --steps are at least 1")
    if arguments.child:
        torch.set_num_threads(arguments.threads)
        size, (implementation,) = SIZES[arguments.sizes[0]], arguments.implementations
        size = replace(size, batch_size=arguments.batch_size or size.batch_size)
        print(json.dumps(measure(implementation, size, arguments.warmup, arguments.steps)))
        return
    rows, failed = [], []
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads)}
    for size, implementation in itertools.product(arguments.sizes, arguments.implementations):
        # of an option that is there twice the last counts: the others go on as they are
        command = [sys.executable, *sys.argv, "--child", "--sizes", size, "--implementations", implementation]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed.append(f"{implementation} ({size})")
        else:
            rows.append(json.loads(done.stdout.splitlines()[-1]))
    print(table(rows), end="")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
