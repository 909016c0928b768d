"""Fit a fine-tuned annotator: a head and part of the network are trained on labelled cells.

Some cells of each type are held out. They choose the step that is kept, by macro-F1, and they calibrate: probabilities
that training has seen to would be too sure of themselves.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.config import LoopConfig
from scdiva.errors import ConfigError, UnsupportedError
from scdiva.metrics.annotation import annotation_scores, expected_calibration_error
from scdiva.models.annotators import Calibration, Features, Regression, class_shape, some_of_each, temperature_of
from scdiva.models.base import Embedder
from scdiva.models.scdiva.classifier import (
    MONITOR,
    CellClassifier,
    ClassifierObjective,
    Design,
    class_weights,
    native_trunk,
)
from scdiva.models.scdiva.finetuned import Components, FineTuned
from scdiva.models.scdiva.model import ScDiVa
from scdiva.nn.precision import uses_bf16
from scdiva.tasks.embed import embed_cells

if TYPE_CHECKING:
    from torch import nn

    from scdiva.data.reader import CountsReader
    from scdiva.training import FitResult
    from scdiva.types import CellCounts

FineTuningMethod = Literal["finetune", "lora"]
FINE_TUNING_METHODS: tuple[FineTuningMethod, ...] = ("finetune", "lora")
TRUNK_LR: dict[FineTuningMethod, float] = {"finetune": 1e-4, "lora": 1e-3}
"""Highest learning rates of what is trained of the trunk."""
RANK = 8
"""Rank of adapters, where none is named."""
_START_C = 0.3
"""Inverse L2 penalty of the regression that the head starts at; states are of order one."""
_SHAPE_CELLS = 200
"""Cells of each class that class means and whitening come from."""
_MAX_STEPS_BETWEEN_VALIDATIONS, _MIN_STEPS_BETWEEN_VALIDATIONS = 250, 5
# tags of the random streams that this file draws from a seed
_SPLIT_STREAM, _SHAPE_STREAM = 96, 97

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FineTuning:
    """How a network is fine-tuned for annotation.

    Parameters
    ----------
    n_trained_layers
        Last layers of the trunk that "finetune" trains; a third of them, at least one, if left out (the paper's 4 of
        12). 0: the head alone.
    rank
        Rank of the adapters of "lora"; 8 if left out.
    epochs
        Passes over the training cells; fewer where the held-out cells stop gaining.
    max_tokens
        Best-ranked tokens of a cell that the trunk reads (fewer, where the model reads fewer). Half of them cost half
        the time; z is pooled from all genes, however many the trunk reads.
    batch_size
        Cells per step; fewer for references of few cells.
    patience
        Validations without a gain after which training stops; one validation is made per epoch.
    validation_fraction
        Share of each type's cells that chooses the step and calibrates. The only cell of a type is trained on.
    lr
        Highest learning rate of the head. It starts at a regression, and higher rates spoil that.
    trunk_lr
        The same of trained layers or adapters; 1e-4 for layers and 1e-3 for adapters if left out.
    with_components
        Let a regression on z and on components of the data's own variable genes decide together with the network, where
        the held-out cells are more probable so; False: the network alone, which is the paper's protocol.
    out_dir
        Folder of the run (log, curve, checkpoints), which the same call resumes; a temporary one if left out.
    """

    n_trained_layers: int | None = None
    rank: int | None = None
    epochs: int = 8
    max_tokens: int = 128
    batch_size: int = 64
    patience: int = 3
    validation_fraction: float = 0.15
    lr: float = 1e-4
    trunk_lr: float | None = None
    with_components: bool = True
    out_dir: str | Path | None = None

    def design(self, method: FineTuningMethod, model: Embedder) -> Design:
        """Return what a method trains of a model.

        Raises
        ------
        ConfigError
            A setting is impossible, or is one of the other method.
        UnsupportedError
            The model is not native, or has no trunk.
        """
        for name in ("epochs", "batch_size", "patience", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}", expected="at least 1", fix="leave it out")
        if not 0 < self.validation_fraction < 1:
            raise ConfigError(
                f"validation_fraction={self.validation_fraction}", expected="between 0 and 1", fix="leave it out"
            )
        for name in ("lr", "trunk_lr"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}", expected="above 0", fix="leave it out")
        other, theirs = ("n_trained_layers", "finetune") if method == "lora" else ("rank", "lora")
        if getattr(self, other) is not None:
            raise ConfigError(
                f"{other}={getattr(self, other)} with method {method!r}",
                expected=f"{other} with method {theirs!r} only",
                fix="leave it out, or name the other method",
            )
        if not isinstance(model, ScDiVa):
            raise UnsupportedError(
                f"a {type(model).__name__} is no model that can be fine-tuned",
                expected="a native scDiVa model",
                fix="use a model such as scdiva-blood-tiny, or the methods 'probe' and 'reference'",
            )
        n_layers = len(native_trunk(model, "fine-tuned annotation")[1].transformer.layers)
        if method == "lora":
            rank = RANK if self.rank is None else self.rank
            if rank < 1:
                raise ConfigError(f"rank={rank}", expected="at least 1", fix="8 is usual")
            return Design(0, rank, self.max_tokens)
        n_trained = max(1, n_layers // 3) if self.n_trained_layers is None else self.n_trained_layers
        return Design(n_trained, 0, self.max_tokens)


@dataclass(frozen=True, slots=True)
class _LabelledCells:
    """The labelled cells as a collection; positions in it are ``cell_index``."""

    cells: CellCounts
    reader: CountsReader
    row: NDArray[np.int64]

    def __len__(self) -> int:
        return self.cells.n_cells

    def read(self, indices: NDArray[np.integer]) -> CellCounts:
        return self.cells.take(np.asarray(indices))

    def describe(self, indices: Sequence[int]) -> str:
        return self.reader.describe([int(self.row[i]) for i in indices])


# a caller's inference mode would take the gradients away
@torch.inference_mode(False)
def fit_fine_tuned(
    cells: CellCounts,
    code: NDArray[np.integer],
    classes: Sequence[str],
    model: ScDiVa,
    reader: CountsReader,
    *,
    method: FineTuningMethod,
    options: FineTuning,
    is_balanced: bool,
    false_unknown_rate: float,
    seed: int,
    unlabelled: tuple[CellCounts, NDArray[np.float32]] | None = None,
) -> tuple[FineTuned, dict[str, Any]]:
    """Fine-tune a model on labelled cells.

    Parameters
    ----------
    cells
        Labelled cells over the genes that are to be used.
    code, classes
        ``(n_cells,)`` class of each, and their names; each class has a cell.
    model
        The model to start from; it is not changed.
    reader
        Where the cells come from, for messages.
    method, options
        What is trained, and how.
    is_balanced
        Whether cells of rare classes weigh more (:func:`scdiva.models.scdiva.classifier.class_weights`).
    false_unknown_rate
        As in :meth:`scdiva.models.annotators.Calibration.fit`.
    seed
        Seed of everything random.
    unlabelled
        Further cells and their embedding, which help to choose variable genes and components.

    Returns
    -------
    FineTuned, dict
        The annotator, and the record of its training.

    Raises
    ------
    ConfigError, UnsupportedError
        See :meth:`FineTuning.design`.
    TrainingError, NonFiniteLossError, OutputError
        See :func:`scdiva.training.fit`.
    """
    # deferred: Lightning takes a second that annotation by an annotator from disk need not wait for
    from scdiva.training import fit

    began = time.monotonic()
    names = np.asarray(classes, dtype=str)
    design = options.design(method, model)
    collection = _LabelledCells(replace(cells, cell_index=np.arange(cells.n_cells)), reader, cells.cell_index)
    train, validation = stratified_split(
        code, options.validation_fraction, np.random.default_rng([seed, _SPLIT_STREAM])
    )
    weight = class_weights(code[train], len(classes), is_balanced=is_balanced)
    classifier = CellClassifier(model, len(classes), design, seed=seed).eval()
    _start_head(classifier, collection.read(train), code[train], weight)
    trunk_lr = TRUNK_LR[method] if options.trunk_lr is None else options.trunk_lr
    objective = ClassifierObjective(classifier, code, weight, trunk_ratio=trunk_lr / options.lr)
    config = loop_config(options, train.size, validation.size, seed=seed, device=model.device.type)
    folder = nullcontext(options.out_dir) if options.out_dir else tempfile.TemporaryDirectory(prefix="scdiva-")
    with folder as out:
        fitted = fit(
            objective,
            collection,
            train_indices=train,
            heldout_indices=validation,
            config=config,
            out_dir=str(out),
            monitor=MONITOR,
            identity={
                "cells_labels_and_start": _content_hash(collection, code, objective),
                # what is trained of the weights, and how fast, is not in the configuration of the loop
                "trained": f"{method}, {design}, {trunk_lr:g}",
            },
        )
    annotator = FineTuned(
        method,
        design,
        classifier.trained(),
        *_shape(classifier.to(model.device), collection, code, train, len(classes), seed),
        Calibration.none(),
    )
    z = embed_cells(model, collection.cells)
    held = collection.read(validation)
    # in the way that cells are annotated, in float32: choice and calibration are of what users get
    log_probability, distance = annotator.on(model).said(held, z[validation])
    if options.with_components:
        features = Features.fit((collection.cells, z), *([] if unlabelled is None else [unlabelled]), seed=seed)
        components = Components.fit(
            features, collection.read(train), z[train], code[train], len(classes), weight[code[train]]
        )
        together = components.with_network(log_probability, held, z[validation])
        if not validation.size or _nll(together, code[validation]) < _nll(log_probability, code[validation]):
            annotator, log_probability = replace(annotator, components=components), together
    record = _record(annotator, classifier, options, fitted, train.size, validation.size)
    if validation.size:
        calibration = Calibration.fit(
            log_probability, distance, code[validation], false_unknown_rate=false_unknown_rate
        )
        annotator = replace(annotator, calibration=calibration)
        probability = calibration.calls(log_probability, distance).probability
        called = probability.argmax(axis=1)
        scores = annotation_scores(names[code[validation]], names[called])
        reliability = expected_calibration_error(probability.max(axis=1), called == code[validation])
        record |= {
            "validation_accuracy": scores.accuracy,
            "validation_macro_f1": scores.macro_f1,
            "validation_calibration_error": reliability.error,
        }
    record |= {"minutes": (time.monotonic() - began) / 60, **_peak_memory()}
    return annotator, record


def _nll(log_probability: NDArray[np.float64], code: NDArray[np.integer]) -> float:
    """Nats per cell at the best temperature."""
    sharp = log_probability / temperature_of(log_probability, code)
    return float((np.logaddexp.reduce(sharp, axis=1) - sharp[np.arange(code.size), code]).mean())


def stratified_split(
    code: NDArray[np.integer], fraction: float, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Hold out a share of each class: at least one cell, and never the last one.

    The only cell of a class is trained on and judged by nobody.

    Returns
    -------
    train, heldout
        Sorted positions.
    """
    is_heldout = np.zeros(code.size, dtype=bool)
    for c in np.unique(code):
        rows = rng.permutation(np.flatnonzero(code == c))
        is_heldout[rows[: min(max(1, round(fraction * rows.size)), rows.size - 1)]] = True
    return np.flatnonzero(~is_heldout), np.flatnonzero(is_heldout)


def loop_config(options: FineTuning, n_train: int, n_heldout: int, *, seed: int, device: str) -> LoopConfig:
    """Return the settings of the training loop."""
    batch_size = min(options.batch_size, max(8, n_train // 8), n_train)
    steps_per_epoch = max(1, n_train // batch_size)
    max_steps = options.epochs * steps_per_epoch
    validate_every = min(
        max(steps_per_epoch, _MIN_STEPS_BETWEEN_VALIDATIONS), _MAX_STEPS_BETWEEN_VALIDATIONS, max_steps
    )
    return LoopConfig.model_validate(
        {
            "seed": seed,
            "optim": {"lr": options.lr, "warmup_steps": min(50, max_steps // 10), "ema_decay": 0.98},
            "training": {
                "max_steps": max_steps,
                "batch_size": batch_size,
                "validate_every": validate_every,
                # without cells to judge by the last weights are kept
                "patience": options.patience if n_heldout else 0,
                "checkpoint_every": validate_every,
                "keep_checkpoints": 1,
                "device": device,
            },
        }
    )


def _start_head(
    classifier: CellClassifier, cells: CellCounts, code: NDArray[np.integer], class_weight: NDArray[np.float64]
) -> None:
    """Start the head at a regression on the states of the frozen network."""
    state, _ = classifier.said(cells, use_bf16=uses_bf16("auto", next(classifier.parameters()).device.type))
    centre = state.mean(axis=0)
    n_classes = classifier.head.linear.out_features
    found = Regression.fit(state - centre, code, n_classes, class_weight[code], _START_C)
    classifier.head.start(found.coef, found.intercept - centre @ found.coef)


def _shape(
    classifier: CellClassifier,
    collection: _LabelledCells,
    code: NDArray[np.integer],
    train: NDArray[np.int64],
    n_classes: int,
    seed: int,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Class means and whitening, from the states of some training cells of each class."""
    some = train[some_of_each(code[train], _SHAPE_CELLS, np.random.default_rng([seed, _SHAPE_STREAM]))]
    state, _ = classifier.said(collection.read(some))
    return class_shape(state, code[some], n_classes)


def _record(
    annotator: FineTuned,
    classifier: CellClassifier,
    options: FineTuning,
    fitted: FitResult,
    n_train: int,
    n_heldout: int,
) -> dict[str, Any]:
    design = annotator.design
    assert classifier.network.trunk is not None
    return {
        "n_train": int(n_train),
        "n_validation": int(n_heldout),
        "n_layers": len(classifier.network.trunk.transformer.layers),
        "n_trained_layers": design.n_layers,
        "rank": design.rank,
        "max_tokens": classifier.tokeniser.max_tokens,
        "n_trained_weights": sum(int(value.size) for value in annotator.weights.values()),
        "with_components": annotator.components is not None,
        "epochs": options.epochs,
        "n_steps": fitted.last_step,
        "best_step": fitted.best_step,
        "stopped_because": fitted.stopped_because,
        "cells_per_s": fitted.cells_per_s,
    }


def _content_hash(collection: _LabelledCells, code: NDArray[np.integer], objective: nn.Module) -> str:
    """Fingerprint what a run is of: counts, classes, and all weights at the start."""
    counts = collection.cells.counts
    digest = hashlib.sha256()
    for array in (counts.indptr, counts.indices, counts.data, code):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, tensor in sorted(objective.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _peak_memory() -> dict[str, float]:
    """Largest resident memory of this process so far, where the system tells."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_memory_mb": peak / (2**20 if sys.platform == "darwin" else 2**10)}
