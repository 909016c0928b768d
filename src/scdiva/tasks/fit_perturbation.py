"""Fine-tune a model to predict what perturbations do.

First the simple predictors: effects are measured, and the predictors' weights are fitted to training conditions that
are left out. Then the network learns what these left-out predictions miss; some conditions are held out of that, which
choose the step and say how much of the correction is borne out. Where there are too few conditions to learn from, the
simple predictors stand alone, and the record says so.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from scdiva.config import LoopConfig
from scdiva.data.perturbation_effects import ControlMeans, conditions_of
from scdiva.data.perturbations import Perturbation, PerturbedCells
from scdiva.errors import ConfigError, SourceError
from scdiva.models.scdiva.model import ScDiVa
from scdiva.models.scdiva.perturbation_base import (
    N_COMPONENTS,
    BasePredictor,
    ContextState,
    MeasuredEffect,
    Question,
    Vector,
    fit_weights,
)
from scdiva.models.scdiva.perturbation_model import (
    ExpectedError,
    PerturbationModel,
    StateReader,
    on_panel,
    target_features,
)
from scdiva.models.scdiva.perturbation_network import (
    PerturbationNetwork,
    PerturbationObjective,
    blocks_of,
    gene_weights,
)
from scdiva.models.scdiva.perturbation_tokens import PerturbationCoder, gene_of_symbol

if TYPE_CHECKING:
    from scdiva.types import CellCounts

log = logging.getLogger(__name__)

BUNDLE = "bundle"
"""Folder of the model within the folder of a run."""
QUESTIONS: tuple[Question, ...] = ("context", "single", "combination")
GATE_LEVEL = 0.95
"""How sure it must be that a network's corrections hold on conditions that were held out."""
_N_DRAWS = 1000
_FLOOR = {"single": "mean", "combination": "additive"}
MIN_CONDITIONS = 12
"""Fewest left-out conditions that a network is trained on."""
_ERROR_QUANTILES = (0.5, 0.9, 0.98)
_NOISE_SHARE = 0.2
_N_FOLDS = 5
_MIN_PERTURBED = 2
_MAX_COMPONENT_CELLS = 20_000
N_LOADINGS = 50
"""Components of the training cells that genes have loadings in."""
_CONTROLS_PER_CONDITION = 32
# tags of the random streams that this file draws from a seed
_COMPONENT_STREAM, _HELDOUT_STREAM, _ITEM_STREAM, _LOADING_STREAM, _GATE_STREAM = range(160, 165)


@dataclass(frozen=True, slots=True)
class PerturbationTraining:
    """How a model is fine-tuned.

    Parameters
    ----------
    network
        Train the network on top of the simple predictors.
    n_trained_layers
        Last layers of the trunk that are trained; half of them if left out (the paper trains all).
    max_targets
        Places for targets of one perturbation; the largest combination of the data, at least 2, if left out.
    n_networks
        Networks, each with a seed of its own; their spread is a part of the uncertainty.
    max_steps, batch_size, lr
        Of the loop. The paper: 40 epochs, 128, 1e-4.
    patience
        Validations without a gain after which training stops.
    heldout_fraction
        Share of the left-out conditions that choose the step and the gate.
    """

    network: bool = True
    n_trained_layers: int | None = None
    max_targets: int | None = None
    n_networks: int = 1
    max_steps: int = 200
    batch_size: int = 32
    lr: float = 2e-4
    patience: int = 4
    heldout_fraction: float = 0.25


@dataclass(frozen=True, slots=True, eq=False)
class _Item:
    """A training condition that was left out: what the simple predictors said, and what was measured.

    ``floor`` is what is judged against: the mean over other contexts or targets, or the sum of the parts.
    """

    effect: MeasuredEffect
    base: Vector
    floor: Vector
    question: Question


@dataclass(frozen=True, slots=True, eq=False)
class _ControlItems:
    """Control cells with conditions, as a collection: item i is a cell for a condition."""

    cells: CellCounts
    row: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.row.size)

    def read(self, indices: NDArray[np.integer]) -> CellCounts:
        from dataclasses import replace

        items = np.asarray(indices, dtype=np.int64)
        return replace(self.cells.take(self.row[items]), cell_index=items)

    def describe(self, indices: Sequence[int]) -> str:
        return ", ".join(f"control cell {self.row[i]}" for i in indices)


# a caller's inference mode would take the gradients away
@torch.inference_mode(False)
def fit_perturbation(
    data: PerturbedCells,
    model: ScDiVa,
    *,
    options: PerturbationTraining | None = None,
    out_dir: str | Path | None = None,
    name: str = "",
    details: dict[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PerturbationModel:
    """Fine-tune a model on perturbed cells.

    Parameters
    ----------
    data
        Perturbed and control cells, in the order of the model's vocabulary.
    model
        A native model with a trunk; it is not changed.
    options
        How.
    out_dir
        Folder of the run; the same call resumes. A temporary one if left out.
    name, details
        What the new model is called, and what else its bundle is to say.
    seed
        Seed.
    progress
        Show progress of the loop.

    Returns
    -------
    PerturbationModel
        Not yet saved.

    Raises
    ------
    SourceError
        No condition has perturbed cells and control cells of its context, or no gene is measured.
    UnsupportedError
        The model is not native, or has no trunk.
    ConfigError
        Impossible options.
    """
    options = options or PerturbationTraining()
    began = time.monotonic()
    _check(options)
    reader, states, values = _read_states(data, model, seed)
    spread = np.zeros(reader.panel.size)
    control = np.flatnonzero(data.is_control)
    spread[:] = _variance(values[control])
    effects = measured_effects(data, values, states, spread)
    if not effects:
        raise SourceError(
            "no perturbation has cells in a context that also has control cells",
            expected="perturbed and control cells of the same context (and batch)",
            fix="check --control and --context-key",
        )
    features = target_features(model)
    loadings = _loadings(values, seed)
    predictor = BasePredictor(effects, states, features, on_panel(features, reader.panel), spread, loadings)
    predictor.fit_axes()
    items = _left_out(predictor)
    coder = _coder(data, model, options)
    expected = _expected_error(items)
    networks: list[PerturbationNetwork] = []
    gates: list[float] = []
    record: dict[str, Any] = {}
    # a name that is no gene has a vector of its own, learned from its effects; never seen, nothing is known of it
    usable = [
        item for item in items if item.question != "single" or item.effect.perturbation.targets[0] not in coder.names
    ]
    parts = [_held_out(usable, options.heldout_fraction, seed + i) for i in range(options.n_networks)]
    is_split = all(trained.any() and held.any() for trained, held in parts)
    if options.network and len(usable) >= MIN_CONDITIONS and is_split:
        folder = nullcontext(out_dir) if out_dir else tempfile.TemporaryDirectory(prefix="scdiva-")
        with folder as out:
            for i in range(options.n_networks):
                network, gate, told = _train(
                    data, model, coder, predictor, reader, usable, *parts[i], options,
                    Path(out) / f"network-{i}", seed + i, progress,
                )  # fmt: skip
                networks.append(network)
                gates.append(gate)
                record[f"network_{i}"] = told
        if not any(gates):
            record["network"] = "trained, and held-out conditions bore out none of its corrections: not used"
    elif options.network and len(usable) < MIN_CONDITIONS:
        record["network"] = f"not trained: {len(usable)} left-out conditions, {MIN_CONDITIONS} are needed"
    elif options.network:
        record["network"] = "not trained: no left-out conditions would remain to learn from beside those to judge by"
    record |= {
        "n_cells": data.n_cells,
        "n_control": int(control.size),
        "n_conditions": len(effects),
        "n_genes": int(reader.panel.size),
        "left_out": {question: sum(item.question == question for item in items) for question in QUESTIONS},
        "gate": gates,
        "minutes": (time.monotonic() - began) / 60,
        "seed": seed,
    }
    n_layers = _n_trained_layers(model, options)
    return PerturbationModel(
        model,
        predictor,
        reader,
        coder,
        networks,
        gates,
        expected,
        details={
            "name": name or f"{model.name}-perturbation",
            "license": model.details.get("license", ""),
            "trained_heads": ["perturbation"],
            "n_trained_layers": n_layers,
            "fine_tuning": record,
            "metrics": _metrics(items),
            **(details or {}),
        },
    )


def _check(options: PerturbationTraining) -> None:
    counts = {name: getattr(options, name) for name in ("n_networks", "max_steps", "batch_size", "patience")}
    if options.max_targets is not None:
        counts["max_targets"] = options.max_targets
    if wrong := [f"{name} = {n}" for name, n in counts.items() if n < 1]:
        raise ConfigError(", ".join(wrong), expected="at least 1 of each", fix="leave them out")
    if not options.lr > 0:
        raise ConfigError(f"lr = {options.lr}", expected="a positive learning rate", fix="leave it out")
    if not 0 < options.heldout_fraction < 1:
        raise ConfigError(
            f"heldout_fraction {options.heldout_fraction}", expected="above 0 and below 1", fix="0.25 is usual"
        )


def _read_states(
    data: PerturbedCells, model: ScDiVa, seed: int
) -> tuple[StateReader, dict[str, ContextState], sp.csr_matrix]:
    """Fit components to control cells, and summarise those of each context."""
    from sklearn.decomposition import PCA

    panel = np.flatnonzero(data.is_measured)
    control = np.flatnonzero(data.is_control)
    if not panel.size or not control.size:
        raise SourceError(
            f"{panel.size} measured genes, {control.size} control cells", expected="some of each", fix="check the file"
        )
    plain = StateReader(panel, np.zeros(panel.size), np.zeros((0, panel.size)))
    values = plain.values(data.cells)
    some = control
    if some.size > _MAX_COMPONENT_CELLS:
        rng = np.random.default_rng([seed, _COMPONENT_STREAM])
        some = np.sort(rng.choice(control, _MAX_COMPONENT_CELLS, replace=False))
    n_components = min(N_COMPONENTS, panel.size - 1, some.size - 1)
    centre, axes = np.zeros(panel.size), np.zeros((0, panel.size))
    if n_components > 0:
        found = PCA(n_components, svd_solver="arpack", random_state=0).fit(values[some].astype(np.float64))
        centre, axes = np.asarray(found.mean_).ravel(), np.asarray(found.components_)
    reader = StateReader(panel, centre, axes)
    z = np.concatenate([model.latent(data.cells.take(control[rows])) for rows in blocks_of(control.size, 512)])
    states = {}
    for code, context in enumerate(data.contexts):
        here = np.flatnonzero(data.context_code[control] == code)
        if here.size:
            states[context] = reader.state(values[control[here]], z[here])
    return reader, states, values


def _variance(values: sp.csr_matrix) -> Vector:
    mean = np.asarray(values.mean(axis=0, dtype=np.float64)).ravel()
    square = np.asarray(values.multiply(values).mean(axis=0, dtype=np.float64)).ravel()
    return np.asarray(np.maximum(square - mean**2, 0.0))


def _loadings(values: sp.csr_matrix, seed: int) -> NDArray[np.float64]:
    """Return loadings of genes in components of the training cells, ``(P, F)``; zeros for genes without counts."""
    from sklearn.decomposition import PCA

    rows = np.arange(values.shape[0])
    if rows.size > _MAX_COMPONENT_CELLS:
        rng = np.random.default_rng([seed, _LOADING_STREAM])
        rows = np.sort(rng.choice(rows, _MAX_COMPONENT_CELLS, replace=False))
    some = values[rows].astype(np.float64)
    detected = np.flatnonzero(some.getnnz(axis=0))
    size = min(N_LOADINGS, rows.size - 1, detected.size - 1)
    result = np.zeros((values.shape[1], max(size, 1)))
    if size >= 1:
        found = PCA(size, svd_solver="arpack", random_state=0).fit(some[:, detected])
        result[detected] = found.components_.T * np.sqrt(found.explained_variance_)
    return _as_saved(result)


def measured_effects(
    data: PerturbedCells, values: sp.csr_matrix, states: dict[str, ContextState], spread: Vector
) -> tuple[MeasuredEffect, ...]:
    """Measure the change of every condition, matched by batch, with its sampling variance.

    Variances are drawn towards those of all control cells, since a few cells have none in most genes.
    """
    found = []
    controls: dict[int, ControlMeans] = {}
    for context, perturbation in conditions_of(data):
        here = data.context_code == context
        rows = np.flatnonzero(here & (data.perturbation_code == perturbation))
        control = np.flatnonzero(here & data.is_control)
        if rows.size < _MIN_PERTURBED or not control.size:
            continue
        if context not in controls:
            controls[context] = ControlMeans.of(values[control], data.batch_code[control])
        mean = np.asarray(values[rows].mean(axis=0, dtype=np.float64)).ravel()
        state = states[data.contexts[context]]
        noise = (_variance(values[rows]) + _NOISE_SHARE * spread) / rows.size
        noise = noise + (state.variance + _NOISE_SHARE * spread) / control.size
        change = mean - controls[context].matched(data.batch_code[rows])
        found.append(
            MeasuredEffect(
                data.perturbations[perturbation],
                data.contexts[context],
                _as_saved(change),
                _as_saved(noise),
                int(rows.size),
            )
        )
    return tuple(found)


def _as_saved(values: Vector) -> Vector:
    """Round to what a bundle holds: trees tell numbers apart that differ by next to nothing."""
    return values.astype(np.float32).astype(np.float64)


def _left_out(predictor: BasePredictor) -> list[_Item]:
    """Leave training conditions out in every way of asking that they allow, and fit the weights on the way.

    What is said of a condition is weighed by weights that were fitted without it, and without what is left out together
    with it, in at most five folds.
    """
    found = []
    for question in QUESTIONS:
        problems = predictor.left_out(question)
        if not problems:
            continue
        predictor.fit_weights(question, problems)
        unit = [effect.context if question == "context" else effect.perturbation.name for _, _, effect in problems]
        number = {name: i for i, name in enumerate(sorted(set(unit)))}
        n_folds = min(_N_FOLDS, len(number))
        fold = [number[name] % n_folds for name in unit]
        names = predictor.weights[question].names
        weights = [
            fit_weights([(said, change) for f, (said, change, _) in zip(fold, problems, strict=True) if f != k], names)
            for k in range(n_folds)
        ]
        for k, (said, _, effect) in zip(fold, problems, strict=True):
            others = [
                e.change
                for e in predictor.effects
                if e.perturbation == effect.perturbation and e.context != effect.context
            ]
            floor = np.mean(others, axis=0) if question == "context" else said[_FLOOR[question]]
            found.append(_Item(effect, weights[k].combine(said), floor, question))
    return found


def _expected_error(items: Sequence[_Item]) -> ExpectedError:
    if not items:
        return ExpectedError(np.zeros(0), {})
    limits = np.quantile(np.abs(np.concatenate([item.base for item in items])), _ERROR_QUANTILES)
    rms = {}
    for question in {item.question for item in items}:
        own = [item for item in items if item.question == question]
        said = np.concatenate([item.base for item in own])
        missed = np.concatenate([item.effect.change for item in own]) - said
        bins = np.searchsorted(limits, np.abs(said))
        overall = float(np.sqrt((missed**2).mean()))
        rms[str(question)] = np.array(
            [np.sqrt((missed[bins == b] ** 2).mean()) if (bins == b).any() else overall for b in range(limits.size + 1)]
        )
    return ExpectedError(limits, rms)


def _metrics(items: Sequence[_Item]) -> dict[str, float]:
    """Return how well training conditions are predicted when they are left out, for the model card."""
    found = {}
    for question in QUESTIONS:
        own = [item for item in items if item.question == question]
        if own:
            for suffix, of in (("", lambda item: item.base), ("_floor", lambda item: item.floor)):
                found[f"left_out_{question}_pearson_delta{suffix}"] = float(
                    np.mean([_correlation(of(item), item.effect.change) for item in own])
                )
    return found


def _correlation(x: Vector, y: Vector) -> float:
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else 0.0


def _coder(data: PerturbedCells, model: ScDiVa, options: PerturbationTraining) -> PerturbationCoder:
    genes = gene_of_symbol(model.vocabulary)
    names = {t for p in data.perturbations for t in p.targets if p.kind == "treatment" or t not in genes}
    largest = max((len(p.targets) for p in data.perturbations), default=1)
    places = max(2, largest) if options.max_targets is None else options.max_targets
    if places < largest:
        raise ConfigError(
            f"max_targets = {places}, and a perturbation of {largest} targets", expected=f"at least {largest}",
            fix="leave it out",
        )  # fmt: skip
    return PerturbationCoder(model.vocabulary, tuple(sorted(names)), places)


def _n_trained_layers(model: ScDiVa, options: PerturbationTraining) -> int:
    trunk = model.native("perturbation prediction").trunk
    n = 0 if trunk is None else len(trunk.transformer.layers)
    wanted = (n + 1) // 2 if options.n_trained_layers is None else options.n_trained_layers
    if not 0 <= wanted <= n:
        raise ConfigError(f"{wanted} layers to train", expected=f"0 to {n}, what the trunk has", fix="give fewer")
    return wanted


def _train(
    data: PerturbedCells,
    model: ScDiVa,
    coder: PerturbationCoder,
    predictor: BasePredictor,
    reader: StateReader,
    items: Sequence[_Item],
    is_trained: NDArray[np.bool_],
    is_held: NDArray[np.bool_],
    options: PerturbationTraining,
    out: Path,
    seed: int,
    progress: bool,
) -> tuple[PerturbationNetwork, float, dict[str, Any]]:
    """Train one network on what the left-out predictions miss; returns it, its gate and a record."""
    from scdiva.training import fit

    network = PerturbationNetwork(
        model,
        coder,
        reader.panel,
        predictor.axes,
        n_trained_layers=_n_trained_layers(model, options),
        seed=seed,
    )
    states = predictor.states
    condition, row = _paired(data, items, np.random.default_rng([seed, _ITEM_STREAM]))
    target = np.stack([item.effect.change for item in items]).astype(np.float32)
    objective = PerturbationObjective(
        network,
        coder.codes([item.effect.perturbation for item in items]),
        condition,
        np.stack([states[item.effect.context].mean for item in items]).astype(np.float32),
        np.stack([item.base for item in items]).astype(np.float32),
        target,
        np.stack(_weights(items)).astype(np.float32),
        np.stack(
            [
                predictor.described(
                    item.effect.perturbation,
                    item.effect.context,
                    states[item.effect.context],
                    item.base,
                    item.question,
                )
                for item in items
            ]
        ).astype(np.float32),
    )
    collection = _ControlItems(data.cells, row)
    train, heldout = (np.flatnonzero(part[condition]) for part in (is_trained, is_held))
    batch_size = min(options.batch_size, train.size)
    config = LoopConfig.model_validate(
        {
            "seed": seed,
            "optim": {"lr": options.lr, "warmup_steps": min(20, options.max_steps // 5), "ema_decay": 0.98},
            "training": {
                "max_steps": options.max_steps,
                "batch_size": batch_size,
                "validate_every": max(1, min(10, options.max_steps)),
                "n_validation_cells": 512,
                "patience": options.patience,
                "checkpoint_every": max(1, min(40, options.max_steps)),
                "keep_checkpoints": 1,
                "device": model.device.type,
            },
        }
    )
    fitted = fit(
        objective,
        collection,
        train_indices=train,
        heldout_indices=heldout,
        config=config,
        out_dir=out,
        monitor="wmse",
        identity={
            "cells_and_items": _fingerprint(data, row, target),
            "model_to_start_from": model.weights_hash(),
            "network": f"{_n_trained_layers(model, options)} trained layers, {coder.n_places} places",
        },
        progress=progress,
    )
    network.to(model.device).eval()
    gate, explained = _gate(network, objective, collection, items, is_held, condition)
    record = {
        "n_conditions": int(is_trained.sum()),
        "n_heldout_conditions": int(is_held.sum()),
        "n_steps": fitted.last_step,
        "best_step": fitted.best_step,
        "stopped_because": fitted.stopped_because,
        "cells_per_s": fitted.cells_per_s,
        "gate": gate,
        "share_of_missed_explained": explained,
    }
    return network, gate, record


def _held_out(items: Sequence[_Item], fraction: float, seed: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Choose the items that a network learns from, and those that choose its step and gate.

    What is left out together is held out together. An item whose answer is that of a held-out one, because its
    condition was left out in two ways, is in neither part.
    """
    unit = [
        ("context", item.effect.context) if item.question == "context" else ("what", item.effect.perturbation.name)
        for item in items
    ]
    units = sorted(set(unit))
    n_held = min(max(1, round(fraction * len(units))), len(units) - 1)
    rng = np.random.default_rng([seed, _HELDOUT_STREAM])
    held = {units[i] for i in rng.permutation(len(units))[: max(n_held, 0)]}
    is_held = np.array([u in held for u in unit], dtype=bool)
    answers = {id(item.effect) for item, h in zip(items, is_held, strict=True) if h}
    return np.array([id(item.effect) not in answers for item in items], dtype=bool), is_held


def _paired(
    data: PerturbedCells, items: Sequence[_Item], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pair each condition with control cells of its context, from the batches of its perturbed cells.

    Returns
    -------
    condition, row
        Of each pair: position in ``items``, row of the control cell.
    """
    code_of = {context: code for code, context in enumerate(data.contexts)}
    position = {perturbation: code for code, perturbation in enumerate(data.perturbations)}
    conditions, rows = [], []
    for i, item in enumerate(items):
        here = data.context_code == code_of[item.effect.context]
        perturbed = here & (data.perturbation_code == position[item.effect.perturbation])
        control = np.flatnonzero(here & data.is_control)
        matched = control[np.isin(data.batch_code[control], data.batch_code[perturbed])]
        control = matched if matched.size else control
        drawn = rng.choice(control, _CONTROLS_PER_CONDITION, replace=control.size < _CONTROLS_PER_CONDITION)
        conditions.append(np.full(drawn.size, i))
        rows.append(drawn)
    return np.concatenate(conditions), np.concatenate(rows)


def _weights(items: Sequence[_Item]) -> list[Vector]:
    """Weights of genes in the loss, from a test against all other perturbations of the context (or against control)."""
    found = []
    for item in items:
        effect = item.effect
        others = {
            other.effect.perturbation: other.effect.change
            for other in items
            if other.effect.context == effect.context and other.effect.perturbation != effect.perturbation
        }
        reference = np.mean(list(others.values()), axis=0) if len(others) >= 3 else 0.0
        found.append(gene_weights((effect.change - reference) / np.sqrt(effect.noise + 1e-6)))
    return found


@torch.inference_mode()
def _gate(
    network: PerturbationNetwork,
    objective: PerturbationObjective,
    collection: _ControlItems,
    items: Sequence[_Item],
    is_held: NDArray[np.bool_],
    condition: NDArray[np.int64],
) -> tuple[float, float]:
    """Return how much of the corrections held-out conditions bear out: the best factor in [0, 1], and what it explains.

    By the weighted squared error that the network was trained for, of the means over control cells. The same conditions
    have chosen the step, and few may be carried by one: where drawing them with repetition does not leave the error
    smaller in :data:`GATE_LEVEL` of the draws, the factor is 0.
    """
    found = []
    for i in np.flatnonzero(is_held).tolist():
        cells = collection.read(np.flatnonzero(condition == i))
        inputs = objective.prepare(cells, np.random.default_rng(0)).to(next(network.parameters()).device)
        added = network(inputs).double().mean(dim=0).cpu().numpy()
        left = items[i].effect.change - items[i].base
        weight = objective.weight[i] / objective.weight[i].sum()
        found.append([weight @ (added * left), weight @ added**2, weight @ left**2])
    cross, square, missed = np.array(found, dtype=np.float64).T
    gate = float(np.clip(cross.sum() / square.sum(), 0.0, 1.0)) if square.sum() > 0 else 0.0
    gained = 2 * gate * cross - gate**2 * square
    drawn = np.random.default_rng(_GATE_STREAM).choice(gained, (_N_DRAWS, gained.size)).mean(axis=1)
    if float(np.quantile(drawn, 1 - GATE_LEVEL)) <= 0:
        return 0.0, 0.0
    return gate, float(gained.sum() / max(float(missed.sum()), 1e-12))


def _fingerprint(data: PerturbedCells, row: NDArray[np.int64], target: NDArray[np.float32]) -> str:
    digest = hashlib.sha256()
    digest.update(repr(data.perturbations).encode())
    counts = data.cells.counts
    for array in (counts.indptr, counts.indices, counts.data, data.perturbation_code, data.context_code, row, target):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(eq=False)
class FineTunedPredictor:
    """A model as evaluations want it: fine-tuned on training cells, then asked (an ``EffectPredictor``).

    Parameters
    ----------
    model
        The native model to fine-tune.
    options
        How.
    seed
        Seed.
    """

    model: ScDiVa
    options: PerturbationTraining = field(default_factory=PerturbationTraining)
    seed: int = 0
    fitted: PerturbationModel | None = None

    def fit(self, train: PerturbedCells) -> Self:
        """Fine-tune on training cells."""
        self.fitted = fit_perturbation(train, self.model, options=self.options, seed=self.seed, progress=False)
        return self

    def predict(self, perturbation: Perturbation, context: str, control: PerturbedCells) -> NDArray[np.float64]:
        """Return the predicted mean change, ``(n_genes,)``; 0 for genes that are not measured."""
        if self.fitted is None:
            raise ConfigError("the predictor was not fitted", expected="fit(train) first", fix="call it")
        found = self.fitted.predict(perturbation, control.cells, context)
        return np.nan_to_num(found.change.astype(np.float64))
