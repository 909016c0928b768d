"""``perturb``: what a perturbation does to control cells, as mean changes and as single cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scdiva.data.conditions import column_text, is_missing
from scdiva.data.perturbation_sets import PERTURBATION_LAYOUTS, load_perturbed
from scdiva.data.perturbations import Kind, Perturbation, parse_perturbation
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, SourceError
from scdiva.models.scdiva.perturbation_model import PerturbationModel, PredictedChange
from scdiva.models.scdiva.perturbation_tokens import gene_of_symbol
from scdiva.tasks.fit_perturbation import BUNDLE, PerturbationTraining, fit_perturbation
from scdiva.tasks.fit_perturbed_cells import fit_cells

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.perturbation_sets import LoadedPerturbations
    from scdiva.data.source import DataLike
    from scdiva.models.scdiva.model import ScDiVa
    from scdiva.types import CellCounts

UNLIKE = "unlike the training cells"
"""Name of a context of cells that are not said to be of the model's only one, and do not look like it."""
MIN_LIKENESS = 0.9
"""Smallest correlation of mean log1p(CP10K) with the training context's control cells that counts as like it."""
N_TOP = 20
"""Genes that are named of each prediction."""


@dataclass(frozen=True, slots=True, eq=False)
class ControlCells:
    """Control cells that predictions start from.

    Parameters
    ----------
    cells
        Raw counts in the order of the model's vocabulary.
    context
        ``(n_cells,)`` name of each cell's context.
    names
        ``(n_cells,)`` names of the cells.
    n_dropped
        Cells left out: perturbed ones, and such without a context or a UMI.
    source
        Where they come from.
    """

    cells: CellCounts
    context: NDArray[np.str_]
    names: NDArray[np.str_]
    n_dropped: int
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Perturbed:
    """Predicted effects.

    Parameters
    ----------
    adata
        One row per perturbation and context, one column per gene that is predicted; see :func:`perturb`.
    predictions
        The same by (perturbation, context), over the whole vocabulary.
    """

    adata: AnnData
    predictions: dict[tuple[str, str], PredictedChange]


def finetune_perturbation(
    data: DataLike,
    model: ScDiVa,
    out_dir: str | Path,
    *,
    perturbation_key: str | None = None,
    control: Sequence[str] | str | None = None,
    layout: str | None = None,
    context_key: str | None = None,
    batch_key: str | None = None,
    kind: Kind = "knockout",
    dose_key: str | None = None,
    library_size_key: str | None = None,
    layer: str | None = None,
    exclude: Sequence[str] = (),
    drop_missing: bool = False,
    ignore_confounded_batch: bool = False,
    min_coverage: float = 0.5,
    options: PerturbationTraining | None = None,
    cells: bool = True,
    name: str = "",
    seed: int = 0,
    progress: bool = True,
) -> tuple[PerturbationModel, LoadedPerturbations]:
    """Fine-tune a model on the perturbed cells of a file, and save it; the same call again resumes.

    Parameters
    ----------
    data
        Raw counts of perturbed and control cells.
    model
        A native model with a trunk; it is not changed.
    out_dir
        Folder of the run; the model goes to ``bundle`` in it.
    perturbation_key, control, layout, context_key, batch_key, kind, dose_key, library_size_key, layer, exclude, \
    drop_missing, ignore_confounded_batch
        See :func:`scdiva.data.perturbation_sets.load_perturbed`.
    min_coverage
        Smallest share of UMIs that the model's genes must cover.
    options
        How it is trained.
    cells
        Also fine-tune the masked diffusion, for single cells; it takes some minutes.
    name
        Name of the new model.
    seed
        Seed.
    progress
        Show progress.

    Returns
    -------
    model, loaded
        The fine-tuned model, saved; and what was read.

    Raises
    ------
    OutputError
        The bundle exists.
    SourceError, KeyNotFoundError, ScaleError, GeneError, ConfigError, UnsupportedError
        The data or the model cannot be used.
    """
    from dataclasses import asdict

    from scdiva.errors import OutputError

    out = Path(out_dir)
    if (out / BUNDLE).exists():
        raise OutputError(f"{out / BUNDLE} exists", expected="a new folder", fix="name another one with --out")
    loaded = load_perturbed(
        data,
        model.vocabulary,
        perturbation_key=perturbation_key,
        control=[control] if isinstance(control, str) else control,
        layout=layout,
        context_key=context_key,
        batch_key=batch_key,
        kind=kind,
        dose_key=dose_key,
        library_size_key=library_size_key,
        layer=layer,
        exclude=exclude,
        drop_missing=drop_missing,
        ignore_confounded_batch=ignore_confounded_batch,
        min_coverage=min_coverage,
    )
    genes = gene_of_symbol(model.vocabulary)
    targets = {target for p in loaded.data.perturbations for target in p.targets}
    if kind != "treatment" and not targets & genes.keys():
        raise ConfigError(
            f"none of {len(targets)} perturbed things is a gene of the model: {', '.join(sorted(targets)[:5])}",
            expected=f"genes that had a {kind}",
            fix="use kind 'treatment' for drugs and cytokines (--kind treatment), or correct the gene names",
        )
    options = options or PerturbationTraining()
    if cells:  # before there is anything to wait for
        model.check_generates()
    source = open_source(data)
    names = PERTURBATION_LAYOUTS[layout].control if control is None and layout is not None else control or ()
    fitted = fit_perturbation(
        loaded.data,
        model,
        options=options,
        out_dir=out,
        name=name,
        details={
            "description": (
                f"Fine-tuned from {model.name} to predict effects of perturbations, on {source.name}: "
                f"{loaded.data.n_cells:,} cells. Predictions are means of cells, not of a cell; unseen perturbations "
                "and contexts are extrapolated. How well that went for training conditions that were left out is "
                "below; a mean or additive baseline can be as good (docs/results/perturbation.md)."
            ),
            "base_model": {"name": model.name, "hash": model.bundle_hash},
            "kind": kind,
            "perturbation_key": dict(loaded.report.keys)["perturbation"],
            "control": [names] if isinstance(names, str) else list(names),
            "library_size_key": library_size_key,
            "options": asdict(options),
        },
        seed=seed,
        progress=progress,
    )
    if cells:
        fitted.drawer = fit_cells(loaded.data, model, fitted.coder, out / "cells", seed=seed, progress=progress)
        fitted.details["trained_heads"] = ["perturbation", "perturbed cells"]
    fitted.save_pretrained(out / BUNDLE)
    return PerturbationModel.from_pretrained(out / BUNDLE, device=str(model.device)), loaded


def control_cells(
    data: DataLike,
    model: PerturbationModel,
    *,
    context_key: str | None = None,
    perturbation_key: str | None = None,
    control: Sequence[str] | str | None = None,
    library_size_key: str | None = None,
    layer: str | None = None,
    min_coverage: float = 0.5,
) -> ControlCells:
    """Read the control cells of a file or AnnData.

    Parameters
    ----------
    data
        Raw counts. All cells are control cells, unless ``perturbation_key`` says which are.
    model
        Whose genes.
    context_key
        Column of ``.obs`` with the context of every cell. It may be left out for a model of one context: the cells are
        that context then if they look like it, else a new one (:data:`UNLIKE`).
    perturbation_key, control
        Column of ``.obs`` and the name or names of control in it, those of training if left out: other cells are left
        out.
    library_size_key
        Column of ``.obs`` with each cell's UMIs over all genes, for gene panels; that of training if left out.
    layer
        Where the counts are; found if left out.
    min_coverage
        Smallest share of UMIs that the model's genes must cover.

    Raises
    ------
    SourceError
        There is no control cell; the column that training knew perturbations from says that some are none, and
        ``perturbation_key`` is left out; or most genes of the model's panel are not measured.
    ConfigError
        ``control`` without ``perturbation_key``; no ``context_key`` for a model of several contexts; or no library
        sizes where training had them.
    KeyNotFoundError, ScaleError, GeneError
        The data cannot be used.
    """
    if control is not None and perturbation_key is None:
        raise ConfigError(
            f"control = {control!r}, and no column that has it",
            expected="perturbation_key, the column of .obs that tells control cells from others",
            fix="name it, or leave control out: all cells are control cells then",
        )
    source = open_source(data)
    is_kept = np.ones(source.n_cells, dtype=bool)
    usual, column = list(model.details.get("control") or ["control"]), model.details.get("perturbation_key")
    if perturbation_key is None and column is not None and column in source.obs.columns:
        n_others = int((~np.isin(column_text(source.column(column)), usual)).sum())
        if n_others:
            raise SourceError(
                f"{n_others:,} cells of {source.name} are no control cells by .obs[{column!r}]",
                expected=f"control cells ({' or '.join(usual)}), which predictions start from",
                fix=f"name the column (perturbation_key={column!r}), and control if it has another name here",
            )
    if perturbation_key is not None:
        wanted = [control] if isinstance(control, str) else list(control or usual)
        label = column_text(source.column(perturbation_key))
        is_kept &= np.isin(label, wanted)
        if not is_kept.any():
            found = ", ".join(pd.Series(label).value_counts().index[:5])
            raise SourceError(
                f"no cell of {source.name} has {' or '.join(wanted)} in .obs[{perturbation_key!r}]",
                expected=f"its control cells; the most frequent labels are {found}",
                fix="name them with control",
            )
    if context_key is None and len(model.contexts) > 1:
        raise ConfigError(
            f"{source.name} without context_key, for a model of {len(model.contexts)} contexts: "
            + ", ".join(model.contexts[:10]),
            expected="the column of .obs that says which context every cell is of; a new one may be named",
            fix="give context_key (--context-key)",
        )
    sizes = model.details.get("library_size_key")
    if library_size_key is None and sizes is not None:
        if sizes not in source.obs.columns:
            raise ConfigError(
                f"{source.name} has no .obs[{sizes!r}], which training took library sizes from",
                expected="each cell's UMIs over all genes: those of the panel alone would be another scale",
                fix="name the column that has them (library_size_key, --library-size-key)",
            )
        library_size_key = sizes
    context = np.full(source.n_cells, model.contexts[0], dtype=object)
    if context_key is not None:
        context = column_text(source.column(context_key)).astype(object)
        is_kept &= np.array([not is_missing(text) for text in context.tolist()], dtype=bool)
    rows = np.flatnonzero(is_kept)
    if not rows.size:
        raise SourceError(f"{source.name} has no control cell", expected="at least one", fix="check the file")
    reader = open_counts(
        source, model.vocabulary, layer=layer, library_size_key=library_size_key, min_coverage=min_coverage
    )
    cells = reader.read(rows)
    if (cells.library_size == 0).any():  # nothing was measured in them; as in training, they are left out
        is_read = cells.library_size > 0
        cells, rows = cells.take(np.flatnonzero(is_read)), rows[is_read]
    if not rows.size:
        raise SourceError(f"no control cell of {source.name} has a UMI", expected="at least one", fix="check the file")
    is_measured = np.asarray(cells.is_measured.all(axis=0))
    lacking = int((~is_measured[model.reader.panel]).sum())
    if lacking > 0.5 * model.reader.panel.size:
        raise SourceError(
            f"{source.name} lacks {lacking:,} of the {model.reader.panel.size:,} genes that the model predicts",
            expected="at least half of them",
            fix="predict from control cells of the training data, or fine-tune on genes that both measure",
        )
    if context_key is None and _likeness(cells, is_measured, model) < MIN_LIKENESS:
        context[:] = UNLIKE
    return ControlCells(
        cells,
        context[rows].astype(str),
        np.asarray(source.obs.index, dtype=np.str_)[rows],
        int(source.n_cells - rows.size),
        source.name,
    )


def _likeness(cells: CellCounts, is_measured: NDArray[np.bool_], model: PerturbationModel) -> float:
    """Return the correlation over genes of mean log1p(CP10K) with the control cells of the model's only context."""
    is_there = is_measured[model.reader.panel]
    mean = np.asarray(model.reader.values(cells).mean(axis=0)).ravel()[is_there]
    other = model.predictor.states[model.contexts[0]].mean[is_there]
    if mean.std() == 0 or other.std() == 0:
        return 1.0
    return float(np.corrcoef(mean, other)[0, 1])


def wanted_perturbations(model: PerturbationModel, texts: str | Sequence[str], kind: Kind | None) -> list[Perturbation]:
    """Read what is asked for: ``"STAT1"``, ``"A+B"``, ``"drug@2.5"``; what is asked for twice is there once.

    Parameters
    ----------
    model
        What was seen in training says what a name means.
    texts
        Names; a single text is one.
    kind
        What is done; that of training if left out.

    Raises
    ------
    ConfigError
        The kind is left out, and training had several.
    UnsupportedError
        Something cannot be answered; says why.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    kinds = sorted({p.kind for p in model.perturbations})
    if kind is None and len(kinds) > 1:
        raise ConfigError(
            f"training had {' and '.join(kinds)}", expected="which of these is asked for", fix="give kind"
        )
    if not texts:
        raise ConfigError("no perturbation", expected="at least one", fix="for example STAT1, or A+B")
    known = {target: target for p in model.perturbations for target in p.targets}
    found = []
    for text in texts:
        perturbation = parse_perturbation(
            text, control=("control",), kind=kind or kinds[0], vocabulary=model.vocabulary, names=known
        )
        model.check_answers(perturbation)
        found.append(perturbation)
    return list(dict.fromkeys(found))


def perturb(
    control: ControlCells, model: PerturbationModel, perturbations: Sequence[Perturbation], *, n_top: int = N_TOP
) -> Perturbed:
    """Predict the mean changes that perturbations make, in each context of the control cells.

    Parameters
    ----------
    control
        Cells to predict from.
    model
        A fine-tuned model.
    perturbations
        What is done.
    n_top
        Most changed genes that are named in ``.obs["top_genes"]``; targets are left out.

    Returns
    -------
    Perturbed
        ``adata``: a row per perturbation and context; ``X`` the change of log1p(CP10K); layers ``control_mean``,
        ``predicted_mean`` (at least 0; both NaN for genes that the control cells were not measured in),
        ``simple_predictors`` (the change without the network), ``expected_error``, ``spread_over_cells``,
        ``spread_over_seeds``; ``.obs``: perturbation, context, question (what had to be extrapolated),
        n_control_cells, top_genes.
    """
    import anndata as ad

    rows, names, predictions = [], [], {}
    panel = model.reader.panel
    layers: dict[str, list[NDArray[np.float32]]] = {}
    changes = []
    symbols = model.vocabulary.symbol[panel]
    for perturbation in perturbations:
        for context in np.unique(control.context).tolist():
            own = np.flatnonzero(control.context == context)
            found = model.predict(perturbation, control.cells.take(own), context)
            predictions[perturbation.name, context] = found
            change = found.change[panel]
            is_other = ~np.isin(symbols, perturbation.targets)
            order = np.argsort(-np.abs(np.where(is_other, change, 0.0)), kind="stable")[:n_top]
            rows.append(
                {
                    "perturbation": perturbation.name,
                    "context": context,
                    "question": found.question,
                    "n_control_cells": own.size,
                    "top_genes": ", ".join(f"{symbols[i]} {change[i]:+.2f}" for i in order),
                }
            )
            names.append(f"{perturbation.name} | {context}" if context else perturbation.name)
            changes.append(change)
            for layer, values in {
                "control_mean": found.control_mean,
                "predicted_mean": np.maximum(found.control_mean + found.change, 0.0),
                "simple_predictors": found.base,
                "expected_error": found.error,
                "spread_over_cells": found.spread_cells,
                "spread_over_seeds": found.spread_seeds,
            }.items():
                layers.setdefault(layer, []).append(values[panel])
    var = pd.DataFrame({"symbol": symbols}, index=pd.Index(model.vocabulary.ensembl_id[panel], name="ensembl_id"))
    obs = pd.DataFrame(rows, index=names).astype(dict.fromkeys(("perturbation", "context", "question"), "category"))
    adata = ad.AnnData(np.stack(changes), obs=obs, var=var)
    for layer, parts in layers.items():
        adata.layers[layer] = np.stack(parts)
    adata.uns["scdiva"] = {"perturb": record_of(model, control)}
    return Perturbed(adata, predictions)


def draw_cells(
    control: ControlCells,
    model: PerturbationModel,
    perturbations: Sequence[Perturbation],
    n_cells: int,
    *,
    seed: int = 0,
) -> AnnData:
    """Draw single perturbed cells, of each perturbation in each context of the control cells.

    Parameters
    ----------
    control
        Cells to start from.
    model
        A model that was fine-tuned with single cells.
    perturbations
        What is done.
    n_cells
        Cells of each perturbation and context.
    seed
        Equal calls give equal cells.

    Returns
    -------
    AnnData
        ``X`` integer counts of the genes that the model predicts; ``.obs``: perturbation, context, control_cell (where
        each started).

    Raises
    ------
    UnsupportedError
        The model draws no cells.
    """
    import anndata as ad
    import scipy.sparse as sp

    panel = model.reader.panel
    name_of = dict(zip(control.cells.cell_index.tolist(), control.names.tolist(), strict=True))
    counts, rows = [], []
    for perturbation in perturbations:
        for context in np.unique(control.context).tolist():
            own = np.flatnonzero(control.context == context)
            drawn = model.draw(perturbation, control.cells.take(own), context, n_cells=n_cells, seed=seed)
            counts.append(sp.csr_matrix(drawn.counts[:, panel]))
            rows += [
                {"perturbation": perturbation.name, "context": context, "control_cell": name_of[i]}
                for i in drawn.cell_index.tolist()
            ]
    var = pd.DataFrame(
        {"symbol": model.vocabulary.symbol[panel]},
        index=pd.Index(model.vocabulary.ensembl_id[panel], name="ensembl_id"),
    )
    obs = pd.DataFrame(rows, index=[f"cell_{i}" for i in range(len(rows))])
    adata = ad.AnnData(sp.csr_matrix(sp.vstack(counts, format="csr")), obs=obs, var=var)
    adata.uns["scdiva"] = {"perturb": {**record_of(model, control), "unit": "counts", "seed": seed}}
    return adata


def record_of(model: PerturbationModel, control: ControlCells) -> dict[str, Any]:
    """Return what names a prediction: the model, the control cells, and how well it did on what was left out."""
    return {
        **model.provenance,
        "control_cells": control.source,
        "n_control_cells": int(control.cells.n_cells),
        "n_left_out_cells": control.n_dropped,
        "n_genes_not_measured": int((~np.asarray(control.cells.is_measured.all(axis=0))[model.reader.panel]).sum()),
        "unit": "change of mean log1p(CP10K)",
        **{key: float(value) for key, value in model.details.get("metrics", {}).items()},
    }
