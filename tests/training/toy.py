"""A small objective and an in-memory collection for the tests of loader and loop."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from scdiva.config import DataConfig, LoopConfig, OptimConfig, TrainingConfig
from scdiva.nn import Packing, Transformer, init_transformer
from scdiva.types import CellCounts, LossOutput

N_GENES = 12


class MemoryCells:
    """Random counts in memory; remembers what was read."""

    def __init__(self, n_cells: int = 300, seed: int = 0) -> None:
        counts = sp.random(n_cells, N_GENES, density=0.5, format="csr", random_state=seed)
        counts.data = np.ceil(counts.data * 9)
        self.counts = counts.astype(np.int32)
        self.reads: list[np.ndarray] = []

    def __len__(self) -> int:
        return self.counts.shape[0]

    def read(self, indices: np.ndarray) -> CellCounts:
        self.reads.append(np.asarray(indices))
        counts = self.counts[indices]
        return CellCounts(
            counts=counts,
            library_size=np.asarray(counts.sum(1), dtype=np.float64).ravel(),
            cell_index=np.asarray(indices, dtype=np.int64),
            source_of_cell=np.zeros(len(indices), dtype=np.int32),
            is_measured=np.ones((1, N_GENES), dtype=bool),
        )

    def describe(self, indices: list[int]) -> str:
        return ", ".join(f"toy.h5ad cell {i}" for i in indices)


@dataclass(frozen=True)
class ToyInputs:
    x_BG: Tensor
    noise_B: Tensor

    def to(self, device: torch.device) -> ToyInputs:
        return ToyInputs(self.x_BG.to(device), self.noise_B.to(device))


class ToyObjective(nn.Module):
    """Predict the last gene from the others; uses every kind of randomness that the loop must make resumable."""

    def __init__(self, n_hidden: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.layers = nn.Sequential(
            nn.Linear(N_GENES - 1, n_hidden), nn.LayerNorm(n_hidden), nn.Dropout(0.1), nn.Linear(n_hidden, 1)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.long))

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> ToyInputs:
        x_BG = np.log1p(cells.counts.toarray()).astype(np.float32)
        return ToyInputs(torch.from_numpy(x_BG), torch.from_numpy(rng.normal(0, 0.1, len(x_BG)).astype(np.float32)))

    prepare_heldout = prepare

    def forward(self, inputs: ToyInputs, generator: torch.Generator) -> LossOutput:
        if self.training:
            self.n_seen += len(inputs.x_BG)
        x_BG = inputs.x_BG[:, :-1]
        x_BG = x_BG + 0.1 * torch.randn(x_BG.shape, generator=generator, device=x_BG.device)
        error_B = self.layers(x_BG)[:, 0] - inputs.x_BG[:, -1] - inputs.noise_B
        loss = error_B.square().mean()
        terms = {"mse": loss.detach(), "variance_floor": inputs.x_BG[:, -1].var(correction=0)}
        return LossOutput(loss, terms, len(x_BG))


class TrunkObjective(nn.Module):
    """Predict the last gene with a transformer over the others; a plain mean over cells, without randomness.

    Holds what is awkward for several processes: a scalar, a frozen parameter, and a parameter that most minibatches
    leave unused.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        self.trunk = Transformer(n_layers=2, width=16, n_heads=2, n_hidden=24)
        init_transformer(self.trunk, generator, std=0.2)
        self.gene_embedding = nn.Parameter(torch.randn(N_GENES - 1, 16, generator=generator))
        self.value = nn.Parameter(torch.randn(16, generator=generator))
        self.head = nn.Parameter(0.1 * torch.randn(16, 1, generator=generator))
        self.scale = nn.Parameter(torch.ones(()))
        self.rare = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("n_seen", torch.zeros((), dtype=torch.long))

    def prepare(self, cells: CellCounts, rng: np.random.Generator) -> ToyInputs:
        x_BG = np.log1p(cells.counts.toarray()).astype(np.float32)
        return ToyInputs(torch.from_numpy(x_BG), torch.zeros(len(x_BG)))

    prepare_heldout = prepare

    def forward(self, inputs: ToyInputs, generator: torch.Generator) -> LossOutput:
        if self.training:
            self.n_seen += len(inputs.x_BG)
        x_BG, target_B = inputs.x_BG[:, :-1], inputs.x_BG[:, -1]
        token_BGD = self.gene_embedding + x_BG[:, :, None] * self.value
        packing = Packing((N_GENES - 1,) * len(x_BG))
        state_BGD = self.trunk(token_BGD.flatten(0, 1), packing).view_as(token_BGD)
        predicted_B = self.scale * (state_BGD.mean(1) @ self.head)[:, 0] + self.frozen.sum()
        is_rare_B = (x_BG[:, 0] > 2.2).float()  # nine counts
        if is_rare_B.any():
            predicted_B = predicted_B + is_rare_B * self.rare.sum()
        loss = (predicted_B - target_B).square().mean()
        return LossOutput(loss, {"mse": loss.detach()}, len(x_BG), packing.n_tokens, self.trunk.flops(packing))


def toy_config(seed: int = 3, workers: int = 0, optim: dict | None = None, **training: object) -> LoopConfig:
    settings: dict = {
        "max_steps": 30,
        "batch_size": 16,
        "validate_every": 10,
        "checkpoint_every": 5,
        "log_every": 1,
        "device": "cpu",
        "precision": "fp32",
    }
    return LoopConfig(
        seed=seed,
        data=DataConfig(block_size=4, fetch_factor=2, num_workers=workers),
        optim=OptimConfig(**({"lr": 0.01, "warmup_steps": 3, "ema_decay": 0.9} | (optim or {}))),
        training=TrainingConfig(**(settings | training)),
    )


@dataclass
class Split:
    collection: MemoryCells = field(default_factory=MemoryCells)
    train: np.ndarray = field(default_factory=lambda: np.arange(240))
    heldout: np.ndarray = field(default_factory=lambda: np.arange(240, 300))
