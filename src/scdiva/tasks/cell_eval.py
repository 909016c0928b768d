"""Predictions in the format of cell-eval (Arc Institute), and its own evaluator on them (extra ``eval``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines.common import other_package, require
from scdiva.data.perturbation_effects import log_values
from scdiva.data.perturbations import PerturbedCells
from scdiva.errors import ConfigError, OutputError
from scdiva.tasks.evaluate_perturbation import Method, Split, fitted_predictor, predicted_change

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.genes import GeneVocabulary

PERTURBATION_COLUMN = "target_gene"
CONTROL_NAME = "non-targeting"
"""cell-eval's usual names (Virtual Cell Challenge 2025)."""
MAX_SCALE = 2.0
_FEWEST_PERTURBATIONS = 3
_OF_SEVERAL = ("pearson_edistance", "clustering_agreement")
"""Metrics over perturbations: not run where there are fewer than three."""


def shifted_cells(values: sp.csr_matrix, change: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return control cells whose mean is changed as predicted; no value is below 0 (our decision).

    Values of a gene are scaled, to 0 at the least and to twice at the most; what is missing from the mean of a raised
    gene is added to every cell alike.

    Parameters
    ----------
    values
        CSR ``(n_cells, n_genes)`` log1p(CP10K) of control cells.
    change
        ``(n_genes,)`` predicted change of the mean.
    """
    x = values.toarray().astype(np.float64)
    mean = x.mean(axis=0)
    wanted = np.maximum(mean + change, 0.0)
    scale = np.minimum(np.divide(wanted, mean, out=np.zeros_like(mean), where=mean > 0), MAX_SCALE)
    # rounding must not leave anything below 0
    return (x * scale + np.maximum(wanted - mean * scale, 0.0)).astype(np.float32)


def to_cell_eval(
    cells: PerturbedCells,
    predicted: Mapping[int, NDArray[np.floating]],
    *,
    context: int,
    reference: NDArray[np.integer],
    held_out: NDArray[np.integer],
    gene_names: Sequence[str],
) -> tuple[AnnData, AnnData]:
    """Return real and predicted cells of one context as cell-eval takes them.

    Log-normalised (log1p of CP10K); ``.obs["target_gene"]`` is the perturbation, "non-targeting" for control cells.
    Predicted cells are the control cells changed by :func:`shifted_cells`, so that their mean change is the predicted
    one. How they differ from each other is as among control cells: metrics that test them for differential expression
    find what a mean cannot know.

    Parameters
    ----------
    cells
        All cells.
    predicted
        Predicted change ``(n_genes,)`` by perturbation code.
    context
        Code of the context.
    reference
        Control cells of the context that the truth is measured against.
    held_out
        Rows of held-out cells; those of the predicted perturbations in the context are taken.
    gene_names
        ``(n_genes,)`` names of all genes; those that the cells measure are kept.

    Returns
    -------
    tuple
        Real and predicted AnnData, genes in the same order; control cells are the same real ones in both.
    """
    import anndata as ad
    import pandas as pd

    genes = np.flatnonzero(cells.is_measured)
    values = sp.csr_matrix(log_values(cells)[:, genes])
    control = values[reference]
    real, made, real_names, made_names = [control], [control], [CONTROL_NAME] * reference.size, []
    made_names += real_names
    for perturbation, change in predicted.items():
        name = cells.perturbations[perturbation].name
        rows = held_out[(cells.perturbation_code[held_out] == perturbation) & (cells.context_code[held_out] == context)]
        if rows.size == 0:
            raise ConfigError(f"no held-out cells of {name}", expected="at least one", fix="check the split")
        real.append(values[rows])
        made.append(sp.csr_matrix(shifted_cells(sp.csr_matrix(control), np.asarray(change)[genes])))
        real_names += [name] * rows.size
        made_names += [name] * reference.size
    names = np.asarray(gene_names)[genes].astype(str)
    var = pd.DataFrame(index=_unique(names))

    def as_adata(parts: list[Any], labels: list[str]) -> AnnData:
        obs = pd.DataFrame({PERTURBATION_COLUMN: labels}, index=[str(i) for i in range(len(labels))])
        return ad.AnnData(sp.csr_matrix(sp.vstack(parts), dtype=np.float32), obs=obs, var=var.copy())

    return as_adata(real, real_names), as_adata(made, made_names)


def _unique(names: NDArray[np.str_]) -> list[str]:
    seen: dict[str, int] = {}
    found = []
    for name in names.tolist():
        seen[name] = seen.get(name, -1) + 1
        found.append(name if seen[name] == 0 else f"{name}-{seen[name]}")
    return found


def run_cell_eval(real: AnnData, predicted: AnnData, folder: Path) -> dict[str, float]:
    """Run cell-eval's evaluator; its tables stay in the folder.

    Parameters
    ----------
    real, predicted
        What :func:`to_cell_eval` returns.
    folder
        A folder for ``results.csv``, ``agg_results.csv`` and tables of differential expression.

    Returns
    -------
    dict
        Mean over perturbations by metric; those that have no value for these cells are left out.

    Raises
    ------
    UnsupportedError
        cell-eval is not installed.
    """
    require("cell_eval", "cell_eval", "cell-eval")
    skipped = list(_OF_SEVERAL) if real.obs[PERTURBATION_COLUMN].nunique() < _FEWEST_PERTURBATIONS + 1 else []
    with redirect_stderr(StringIO()), other_package("cell_eval") as package:  # its progress bars
        evaluator = package.MetricsEvaluator(
            adata_pred=predicted.copy(),
            adata_real=real.copy(),
            control_pert=CONTROL_NAME,
            pert_col=PERTURBATION_COLUMN,
            num_threads=1,
            outdir=str(folder),
        )
        results, _ = evaluator.compute(profile="full", skip_metrics=skipped, break_on_error=False)
    found = {}
    for name in results.columns:
        if name == "perturbation":
            continue
        values = np.array([v for v in results[name].to_list() if v is not None], dtype=np.float64)
        values = values[np.isfinite(values)]
        if values.size:
            found[name] = float(values.mean())
    return found


def evaluate_with_cell_eval(
    cells: PerturbedCells,
    splits: Sequence[Split],
    methods: Sequence[str],
    folder: Path,
    *,
    vocabulary: GeneVocabulary,
    predictors: Mapping[str, Method] | None = None,
    corpus: NDArray[np.floating] | None = None,
) -> dict[str, dict[str, float]]:
    """Judge predictors by cell-eval: all perturbations of a context and seed together, as its ranks need.

    Parameters
    ----------
    cells, splits, vocabulary, predictors, corpus
        As for :func:`~scdiva.tasks.evaluate_perturbation.evaluate_perturbation`.
    methods
        Names of predictors and baselines.
    folder
        A new folder; one of each method, seed and context is made in it.

    Returns
    -------
    dict
        Means over contexts and seeds, by method and metric.
    """
    require("cell_eval", "cell_eval", "cell-eval")
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty", expected="a new folder", fix="remove it, or name another one")
    found: dict[str, dict[str, list[float]]] = {}
    for method in methods:
        by_place: dict[tuple[int, int], dict[int, NDArray[np.float64]]] = {}
        parts: dict[tuple[int, int], list[tuple[Split, int]]] = {}
        for split in splits:
            predictor = fitted_predictor(cells, split, method, predictors or {}, vocabulary, corpus)
            for perturbation, context in split.conditions:
                source = split.source[cells.context_code[split.source] == context]
                place = split.seed, context
                change = predicted_change(predictor, cells, perturbation, context, source)
                by_place.setdefault(place, {})[perturbation] = change
                parts.setdefault(place, []).append((split, perturbation))
        for (seed, context), predicted in by_place.items():
            first = parts[seed, context][0][0]
            held_out = np.unique(np.concatenate([_held_out(cells, s, p) for s, p in parts[seed, context]]))
            real, made = to_cell_eval(
                cells,
                predicted,
                context=context,
                reference=first.reference[cells.context_code[first.reference] == context],
                held_out=held_out,
                gene_names=vocabulary.symbol.tolist(),
            )
            place_name = f"{method}/seed-{seed}/context-{context}"
            for name, value in run_cell_eval(real, made, folder / place_name).items():
                found.setdefault(method, {}).setdefault(name, []).append(value)
    return {method: {name: float(np.mean(v)) for name, v in scores.items()} for method, scores in found.items()}


def _held_out(cells: PerturbedCells, split: Split, perturbation: int) -> NDArray[np.int64]:
    return np.setdiff1d(np.flatnonzero(cells.perturbation_code == perturbation), split.train)
