"""Small perturbed cells with known effects, for tests of baselines and of judging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import scipy.sparse as sp

from scdiva.data.perturbations import Perturbation, PerturbedCells
from scdiva.genes import GeneVocabulary
from scdiva.types import CellCounts

N_GENES = 60


def vocabulary(n_genes: int = N_GENES) -> GeneVocabulary:
    return GeneVocabulary.default().subset(np.arange(n_genes))


def perturbed_cells(
    targets: Sequence[Sequence[int]] = ((0,), (1,), (2,), (3,), (0, 1)),
    *,
    contexts: Sequence[str] = ("",),
    n_cells: int = 40,
    n_genes: int = N_GENES,
    effects: Mapping[int, np.ndarray] | None = None,
    n_batches: int = 2,
    depth: float = 2000.0,
    seed: int = 0,
) -> PerturbedCells:
    """Poisson cells: each target gene g multiplies rates by exp(effect of g); contexts have rates of their own."""
    rng = np.random.default_rng(seed)
    genes = vocabulary(n_genes)
    base = rng.lognormal(0.0, 1.0, n_genes)
    single = effects or {g: rng.normal(0, 1, n_genes) * (rng.random(n_genes) < 0.3) for g in range(6)}
    perturbations = (
        Perturbation(()),
        *(Perturbation(tuple(sorted(genes.symbol[list(t)].astype(str)))) for t in targets),
    )
    counts, code, context_code, batch = [], [], [], []
    for c, _ in enumerate(contexts):
        own = base * np.exp(0.4 * np.random.default_rng([seed, c]).normal(size=n_genes))
        for p, _ in enumerate(perturbations):
            log_rate = np.log(own) + (sum(single[g] for g in targets[p - 1]) if p else 0)
            n = n_cells * 3 if p == 0 else n_cells
            rate = np.exp(log_rate)
            counts.append(rng.poisson(rate / own.sum() * depth, size=(n, n_genes)))
            code += [p] * n
            context_code += [c] * n
            batch += list(rng.integers(n_batches, size=n))
    matrix = sp.csr_matrix(np.concatenate(counts).astype(np.int32))
    n = matrix.shape[0]
    cells = CellCounts(
        matrix,
        np.asarray(matrix.sum(axis=1), dtype=np.float64).ravel(),
        np.arange(n),
        np.zeros(n, dtype=np.int32),
        np.ones((1, n_genes), dtype=bool),
    )
    return PerturbedCells(
        cells,
        perturbations,
        np.array(code, dtype=np.int64),
        tuple(contexts),
        np.array(context_code, dtype=np.int64),
        tuple(f"b{i}" for i in range(n_batches)),
        np.array(batch, dtype=np.int64),
    )
