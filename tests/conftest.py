"""Fixtures of the whole suite: small synthetic cells, a tiny model, the command line in process."""

from __future__ import annotations

import os

# Before NumPy and torch are loaded: the matrices here are tiny, and more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.config import TrunkConfig
    from scdiva.models.scdiva import ScDiVa

N_CELLS, N_GENES = 120, 200
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def _cells() -> AnnData:
    from scdiva.datasets import synthetic_cells

    return synthetic_cells(N_CELLS, N_GENES, n_types=3, mean_depth=400.0, seed=1)


@pytest.fixture
def adata(_cells) -> AnnData:
    """120 synthetic cells with raw counts in X, 200 genes, three types, two batches; a fresh copy."""
    return _cells.copy()


@pytest.fixture
def h5ad(adata, tmp_path) -> Path:
    """The same cells as a file, alone in its folder."""
    folder = tmp_path / "input"
    folder.mkdir()
    adata.write_h5ad(folder / "cells.h5ad")
    return folder / "cells.h5ad"


def _trained(cells: AnnData, trunk: TrunkConfig, fields: Sequence[str], n_steps: int, lr: float) -> ScDiVa:
    """A native model of 8 dimensions: principal start, and a few steps so that no part of it is zero any more.

    Its vocabulary lacks ten genes of the synthetic cells and has twenty that they lack.
    """
    import torch

    from scdiva.config import NativeConfig, NativeObjectiveConfig
    from scdiva.data.conditions import ConditionLabels
    from scdiva.data.reader import open_counts
    from scdiva.data.statistics import GeneStatistics
    from scdiva.genes import GeneVocabulary
    from scdiva.models.scdiva import ScDiVa
    from scdiva.models.scdiva.init import init_network, simple_model
    from scdiva.models.scdiva.native import NativeNetwork
    from scdiva.models.scdiva.objectives import NativeObjective

    vocabulary = GeneVocabulary.default().subset(np.arange(10, N_GENES + 20))
    labels = ConditionLabels(tuple((field, tuple(cells.obs[field].cat.categories)) for field in fields))
    counts = open_counts(cells, vocabulary).with_conditions(labels, {}).read(np.arange(N_CELLS))
    statistics = GeneStatistics.from_cells(counts)
    simple = simple_model(statistics, N_CELLS * counts.is_measured[0], np.asarray(counts.counts.sum(axis=1)).ravel())
    config = NativeConfig(n_latent=8, n_embedding=8, n_hidden=16, trunk=trunk)
    network = NativeNetwork(vocabulary.n_genes, config, labels.sizes)
    init_network(network, statistics, simple, [counts], 8, seed=0)
    objective = NativeObjective(network, NativeObjectiveConfig(), config, statistics, simple)
    optimiser = torch.optim.Adam(objective.parameters(), lr=lr)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    for _ in range(n_steps):
        optimiser.zero_grad()
        minibatch = counts.take(rng.choice(N_CELLS, 40, replace=False))
        objective(objective.prepare(minibatch, rng), generator).loss.backward()
        optimiser.step()
    details = {
        "name": "tiny",
        "license": "cc0-1.0",
        "trained_heads": ["anchor", "profile_decoder", "identity", "value"],
        "training": {
            "n_cells": N_CELLS, "n_heldout": 0, "heldout": "none", "n_cells_seen": n_steps * 40,
            "n_steps": n_steps, "best_step": n_steps, "seed": 0,
            "sources": [
                {"name": "synthetic", "n_cells": N_CELLS, "n_genes": 190, "coverage": 0.95, "licence": "made up here"}
            ],
        },
        "metrics": {"heldout_profile_nll": 4.25, "heldout_profile_nll_floor": 4.5},
    }  # fmt: skip
    return ScDiVa(network, config, vocabulary, statistics, details=details, labels=labels)


@pytest.fixture(scope="session")
def tiny_model(_cells) -> ScDiVa:
    """A trained model without a trunk: anchor, profile decoder, and the simple model of identity and values."""
    from scdiva.config import TrunkConfig

    return _trained(_cells, TrunkConfig(), (), n_steps=20, lr=0.01)


@pytest.fixture(scope="session")
def tiny_trunk_model(_cells) -> ScDiVa:
    """A trained model with a trunk of two layers that reads 64 tokens, conditioned on the cell type."""
    from scdiva.config import TrunkConfig

    trunk = TrunkConfig(n_layers=2, width=16, n_heads=2, n_hidden=32, max_tokens=64)
    return _trained(_cells, trunk, ("cell_type",), n_steps=12, lr=0.03)


@pytest.fixture(scope="session")
def _bundle(tiny_model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.save_pretrained(path)
    return path


@pytest.fixture
def bundle(_bundle, tmp_path) -> Path:
    """The tiny model as a bundle of one's own."""
    import shutil

    return Path(shutil.copytree(_bundle, tmp_path / "models" / "tiny"))


@pytest.fixture(scope="session")
def bundled_model() -> ScDiVa:
    """The model that comes with the package; that it is missing would be a failure, not a reason to skip."""
    from scdiva.models.scdiva import ScDiVa

    return ScDiVa.from_pretrained("scdiva-blood-tiny", device="cpu")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real files beside the repository; skips where it is absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real data are not there")
    return folder


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(monkeypatch, capsys) -> Callable[..., Outcome]:
    """Run ``scdiva ARGUMENTS`` in this process, through the same function as the installed command."""
    from scdiva.cli import main

    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["scdiva", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def files_under(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder with its content, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}
