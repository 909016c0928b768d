"""Small cells, masks and native networks for tests; no part of a network is zero."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

import twins
from scdiva.config import NativeConfig, NativeObjectiveConfig, TrunkConfig
from scdiva.data.statistics import GeneStatistics
from scdiva.diffusion import Masks
from scdiva.models.scdiva.init import init_network, simple_model
from scdiva.models.scdiva.inputs import MaskedCells, Targets, Tokeniser
from scdiva.models.scdiva.native import DenoiserOutput, NativeNetwork, SimpleModel
from scdiva.models.scdiva.objectives import NativeObjective, tokeniser_of
from scdiva.types import CellCounts

N_GENES = 40
LABEL_SIZES = (3, 2)


def dense_counts(n_cells: int = 60, n_genes: int = N_GENES, seed: int = 0) -> np.ndarray:
    """Cells of three types; the last is empty and the one before it has one gene."""
    rng = np.random.default_rng(seed)
    rate = rng.lognormal(-0.5, 1, n_genes) * np.where(rng.random((3, n_genes)) < 0.2, 10.0, 1.0)
    counts = rng.poisson(rate[rng.integers(3, size=n_cells)])
    counts[-2:] = 0
    counts[-2, 3] = 4
    return counts


def with_labels(cells: CellCounts, seed: int = 0) -> CellCounts:
    """Give cells random codes of :data:`LABEL_SIZES` condition fields, some of them unknown."""
    rng = np.random.default_rng(seed)
    condition = np.stack([rng.integers(0, size + 1, cells.n_cells) for size in LABEL_SIZES], axis=1)
    return CellCounts(
        cells.counts, cells.library_size, cells.cell_index, cells.source_of_cell, cells.is_measured,
        condition.astype(np.int32),
    )  # fmt: skip


def simple_of(cells: CellCounts, statistics: GeneStatistics) -> SimpleModel:
    n_measured = cells.is_measured[cells.source_of_cell].sum(axis=0)
    return simple_model(statistics, n_measured, np.asarray(cells.counts.sum(axis=1)).ravel())


@dataclass(frozen=True)
class Built:
    """A network with what belongs to it."""

    network: NativeNetwork
    config: NativeConfig
    statistics: GeneStatistics
    simple: SimpleModel

    @property
    def tokeniser(self) -> Tokeniser:
        return tokeniser_of(self.config, self.statistics)

    def objective(self, **settings: Any) -> NativeObjective:
        config = NativeObjectiveConfig(**settings)
        return NativeObjective(self.network, config, self.config, self.statistics, self.simple).eval()


TRUNK = {"n_layers": 2, "width": 16, "n_heads": 2, "n_hidden": 24}


def build(cells: CellCounts, *, label_sizes=(), has_trunk: bool = True, **trunk: Any) -> Built:
    """A network at its start."""
    config = NativeConfig(
        n_latent=6, n_embedding=8, n_hidden=12, trunk=TrunkConfig(**({**TRUNK, **trunk} if has_trunk else trunk))
    )
    statistics = GeneStatistics.from_cells(cells)
    simple = simple_of(cells, statistics)
    network = NativeNetwork(cells.n_genes, config, label_sizes)
    init_network(network, statistics, simple, [cells], 6, seed=0)
    return Built(network.eval(), config, statistics, simple)


@torch.no_grad()
def stir(built: Built, size: float = 0.3, seed: int = 0) -> Built:
    """Add noise to every weight: nothing is zero any more, and every path matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.network.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator)
    return built


def masks_of(cells: CellCounts, is_hidden: np.ndarray, is_value_masked: np.ndarray) -> Masks:
    """Masks of the stored counts from dense ``(n_cells, n_genes)`` ones."""
    counts = cells.counts.toarray() > 0
    return Masks(is_hidden[counts], (is_hidden | is_value_masked)[counts], (is_hidden & counts).sum(axis=1))


def random_masks(dense: np.ndarray, rng: np.random.Generator, p_hidden=0.4, p_value=0.3) -> tuple[Any, Any]:
    """Dense masks: genes that are hidden, and visible genes whose values are."""
    is_hidden = (dense > 0) & (rng.random(dense.shape) < p_hidden)
    return is_hidden, (dense > 0) & ~is_hidden & (rng.random(dense.shape) < p_value)


def tensors_of(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and number in nested dataclasses, by its dotted name."""
    if is_dataclass(value):
        found: dict[str, Any] = {}
        for field in fields(value):
            found |= tensors_of(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)
        return found
    return {name: value}


@torch.no_grad()
def predictions(built: Built, cells: MaskedCells) -> dict[str, torch.Tensor]:
    """Everything the network says about some cells: its output, gene probabilities, and every gene's value."""
    network = built.network
    output: DenoiserOutput = network(cells)
    found = {name: x for name, x in tensors_of(output).items() if isinstance(x, torch.Tensor)}
    found["probability_BG"] = network.gene_probabilities(cells, output)
    gene, cell = torch.arange(network.n_genes), torch.arange(cells.n_cells)
    direction = None
    if network.trunk is not None and output.states is not None:
        direction = network.trunk.value_direction(output.states.query_BD).repeat_interleave(network.n_genes, dim=0)
        token_cell = cell.repeat_interleave(torch.tensor(cells.lengths, dtype=torch.int64))
        own = network.trunk.value_direction(output.states.token_ND)
        found["token_log_mean_N"] = network.log_mean(output, token_cell, cells.gene_N, own)
    found["log_mean_BG"] = network.log_mean(
        output, cell.repeat_interleave(network.n_genes), gene.repeat(cells.n_cells), direction
    ).view(cells.n_cells, -1)
    return found


def corrupt(built: Built, cells: CellCounts, is_hidden, is_value_masked, **options) -> tuple[MaskedCells, Targets]:
    """Hide what dense masks say."""
    masks = masks_of(cells, is_hidden, is_value_masked)
    return built.tokeniser.corrupt(cells, masks, np.random.default_rng(0), **options)


__all__ = [
    "LABEL_SIZES", "N_GENES", "Built", "build", "corrupt", "dense_counts", "masks_of", "predictions", "random_masks",
    "simple_of", "stir", "tensors_of", "twins", "with_labels",
]  # fmt: skip
