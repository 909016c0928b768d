"""Fine-tune the masked diffusion to draw perturbed cells, told what was done to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.config import LoopConfig, NativeConfig
from scdiva.data.perturbation_effects import conditions_of
from scdiva.data.perturbations import PerturbedCells
from scdiva.data.shifting import response_spread
from scdiva.errors import SourceError
from scdiva.models.scdiva.model import ScDiVa
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.models.scdiva.perturbation_tokens import PerturbationCoder
from scdiva.models.scdiva.perturbed_cells import CellDrawer, PerturbationDenoising
from scdiva.nn.precision import uses_bf16
from scdiva.types import CellCounts

N_STEPS, BATCH_SIZE = 200, 32
MIN_CELLS = 30
"""Cells, perturbed and control, of conditions that spread and depth are estimated from."""
_HELDOUT = 128
_MAX_PAIRS = 50
_SPLIT_STREAM, _CALIBRATION_STREAM = 170, 171  # tags of the random streams


@dataclass(frozen=True, slots=True, eq=False)
class _InMemory:
    """Cells as a collection; positions are ``cell_index``."""

    cells: CellCounts

    def __len__(self) -> int:
        return self.cells.n_cells

    def read(self, indices: NDArray[np.integer]) -> CellCounts:
        return self.cells.take(np.asarray(indices))

    def describe(self, indices: Sequence[int]) -> str:
        return ", ".join(f"cell {i}" for i in indices)


# a caller's inference mode would take the gradients away
@torch.inference_mode(False)
def fit_cells(
    data: PerturbedCells,
    model: ScDiVa,
    coder: PerturbationCoder,
    out_dir: str | Path,
    *,
    n_steps: int = N_STEPS,
    seed: int = 0,
    progress: bool = True,
) -> CellDrawer:
    """Fine-tune the whole network on perturbed and control cells; the same call resumes.

    Parameters
    ----------
    data
        Cells, in the order of the model's vocabulary.
    model
        A native model with a trunk; it is not changed.
    coder
        Turns perturbations into codes.
    out_dir
        Folder of the run.
    n_steps
        Steps of 32 cells.
    seed
        Seed.
    progress
        Show progress.

    Raises
    ------
    UnsupportedError, UntrainedHeadError
        The model cannot generate.
    SourceError
        There are too few cells.
    """
    from scdiva.training import fit

    model.check_generates()
    assert isinstance(model.config, NativeConfig)
    if data.n_cells < 4 * BATCH_SIZE:
        raise SourceError(
            f"{data.n_cells} cells to learn single cells from",
            expected=f"at least {4 * BATCH_SIZE}",
            fix="leave single cells out (--no-cells)",
        )
    cells = replace(data.cells, cell_index=np.arange(data.n_cells))
    codes = coder.codes(data.perturbations).take(torch.from_numpy(data.perturbation_code))
    objective = PerturbationDenoising(model, codes, n_names=len(coder.names), seed=seed)
    order = np.random.default_rng([seed, _SPLIT_STREAM]).permutation(data.n_cells)
    n_heldout = min(_HELDOUT, data.n_cells // 8)
    heldout, train = np.sort(order[:n_heldout]), np.sort(order[n_heldout:])
    every = max(1, n_steps // 4)
    config = LoopConfig.model_validate(
        {
            "seed": seed,
            "optim": {"lr": 5e-4, "gene_lr_ratio": 20.0, "warmup_steps": min(50, n_steps // 4), "ema_decay": 0.98},
            "training": {
                "max_steps": n_steps,
                "batch_size": BATCH_SIZE,
                "validate_every": every,
                "checkpoint_every": every,
                "n_validation_cells": 256,
                "device": model.device.type,
            },
        }
    )
    fit(
        objective,
        _InMemory(cells),
        train_indices=train,
        heldout_indices=heldout,
        config=config,
        out_dir=out_dir,
        progress=progress,
    )
    rng = np.random.default_rng([seed, _CALIBRATION_STREAM])
    objective.calibrate(cells.take(train), rng, use_bf16=uses_bf16("auto", "cpu"))
    spread, depth_ratio = _response(data)
    network = objective.network.to(model.device).eval()
    return CellDrawer(network, tokeniser_of(model.config, model.statistics), spread, depth_ratio)


def _response(data: PerturbedCells) -> tuple[float, float]:
    """Return how the strength of response spreads over cells, and how deep they are: medians of conditions."""
    spreads: list[float] = []
    ratios: list[float] = []
    for context, perturbation in conditions_of(data):
        here = data.context_code == context
        perturbed = np.flatnonzero(here & (data.perturbation_code == perturbation))
        control = np.flatnonzero(here & data.is_control)
        if min(perturbed.size, control.size) < MIN_CELLS or len(spreads) == _MAX_PAIRS:
            continue
        pair = data.cells.take(perturbed), data.cells.take(control)
        spreads.append(response_spread(*pair))
        ratios.append(float(pair[0].library_size.mean() / pair[1].library_size.mean()))
    return (float(np.median(spreads)), float(np.median(ratios))) if spreads else (0.0, 1.0)
