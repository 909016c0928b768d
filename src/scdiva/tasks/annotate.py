"""``annotate``: cell types from a labelled reference, with probabilities one can read, and "unknown" where it is.

Reference and query are compared over the genes that both measure: what a model says of a cell depends on the genes it
is given. Labels are mapped to the Cell Ontology where they can be, without guessing; a cell whose type cannot be
decided backs off to the most specific common ancestor that can.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.config import NativeConfig
from scdiva.data.conditions import is_missing, label_text
from scdiva.data.loader import ordered_blocks
from scdiva.data.ontology import CellOntology, back_off, match_labels
from scdiva.data.output import replacing
from scdiva.data.population import read_arrays
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import BundleError, ConfigError, GeneError, OutputError, SourceError
from scdiva.metrics.annotation import annotation_scores, expected_calibration_error
from scdiva.models.annotators import (
    FALSE_UNKNOWN_RATE,
    FEW_FOR_SELF_TRAINING,
    Annotator,
    Consensus,
    HeldOut,
    Probe,
    ReferenceIndex,
    classes_of,
)
from scdiva.models.annotators.consensus import of_member
from scdiva.models.base import Embedder
from scdiva.models.scdiva.finetuned import FineTuned
from scdiva.models.scdiva.integrated import IntegratedIndex
from scdiva.models.scdiva.model import ScDiVa
from scdiva.tasks.embed import embed_cells
from scdiva.tasks.fine_tuned import FINE_TUNING_METHODS, FineTuning, fit_fine_tuned
from scdiva.tasks.integrated import fit_integrated
from scdiva.types import CellCounts

if TYPE_CHECKING:
    import pandas as pd

    from scdiva.data.source import DataLike

Method = Literal["reference", "probe", "integrate", "consensus", "finetune", "lora"]
INTEGRATING_METHODS: tuple[Method, ...] = ("integrate", "consensus")
"""Methods that train an encoder on reference and query, and need both to be fitted."""
METHODS: tuple[Method, ...] = ("reference", "probe", *INTEGRATING_METHODS, *FINE_TUNING_METHODS)
CONFIDENCE = 0.5
"""Probability that a cell type, or a common ancestor of several, must reach to be a cell's term."""
MIN_SHARED_GENES = 100
_BLOCK = 1024
_FORMAT = 3
_UNLABELLED_CELLS = 10_000
_QUERY_STREAM = 5
"""Tag of the random stream that draws the cells of a query that an annotator adapts to."""
_NOT_SAVED = "not saved"
_LEARNERS = (Probe, IntegratedIndex, Consensus)
"""Annotators that adapt to a query."""
_FILES = frozenset({"annotator.json", "annotator.npz"})

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotation:
    """What :func:`annotate` found.

    Parameters
    ----------
    classes
        ``(n_classes,)`` labels of the reference.
    probability
        ``(n_cells, n_classes)`` float32, calibrated on the reference.
    novelty
        ``(n_cells,)`` float32: how unlike the reference (:class:`scdiva.models.annotators.Calls`).
    threshold
        Novelty above which a cell is unknown.
    class_ids
        Cell Ontology id of each class; "" where its label has none.
    record
        What was done, for ``.uns``.
    confidence_wanted
        Probability that a term must reach (:data:`CONFIDENCE`).
    """

    classes: tuple[str, ...]
    probability: NDArray[np.float32]
    novelty: NDArray[np.float32]
    threshold: float
    class_ids: tuple[str, ...]
    record: Mapping[str, Any]
    confidence_wanted: float = CONFIDENCE

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(-self.probability, axis=1, kind="stable")

    @property
    def label(self) -> NDArray[np.str_]:
        """Most probable label of each cell, also of unknown ones."""
        return np.asarray(self.classes, dtype=str)[self._order[:, 0]]

    @property
    def confidence(self) -> NDArray[np.float32]:
        """Its probability."""
        return self.probability.max(axis=1)

    @property
    def second_label(self) -> NDArray[np.str_]:
        """Second most probable label; "" where there is one class."""
        if len(self.classes) < 2:
            return np.full(self.probability.shape[0], "")
        return np.asarray(self.classes, dtype=str)[self._order[:, 1]]

    @property
    def is_unknown(self) -> NDArray[np.bool_]:
        """Whether a cell is less like the reference than known cells are."""
        return np.asarray(self.novelty > self.threshold)

    def to_obs(self, index: pd.Index | None = None) -> pd.DataFrame:
        """Return the columns that ``annotate`` writes to ``.obs``."""
        import pandas as pd

        terms = back_off(
            self.probability,
            list(self.class_ids),
            self.confidence_wanted,
            also_too_general=_covering(self.class_ids),
        )
        unknown = self.is_unknown
        return pd.DataFrame(
            {
                "scdiva_cell_type": pd.Categorical(self.label, categories=list(self.classes)),
                "scdiva_confidence": self.confidence,
                "scdiva_second_cell_type": pd.Categorical(self.second_label),
                "scdiva_novelty": self.novelty,
                "scdiva_unknown": unknown,
                "scdiva_ontology_id": pd.Categorical(np.where(unknown, "", terms.ids.astype(str))),
                "scdiva_ontology_label": pd.Categorical(np.where(unknown, "", terms.labels.astype(str))),
            },
            index=index,
        )


def _covering(class_ids: tuple[str, ...]) -> list[str]:
    """Return the common ancestor of all classes, if it is none of them: always certain, it says nothing."""
    known = sorted({found for found in class_ids if found})
    if len(known) < 2:
        return []
    ancestor = CellOntology.load().common_ancestor(known)
    return [ancestor] if ancestor and ancestor not in known else []


@dataclass(frozen=True)
class CellTyper:
    """An annotator that was fitted to a reference: what it takes to annotate further cells.

    Parameters
    ----------
    annotator
        How cells are called. One that was fine-tuned holds what was trained; :func:`annotate` gives it the model.
    classes
        Labels of the reference.
    class_ids
        Cell Ontology ids; "" where a label has none.
    is_shared
        ``(n_genes,)`` genes of the model's vocabulary that cells are compared over.
    reference
        What it was fitted to: name, cells, label key, model and its hash.
    """

    annotator: Annotator | FineTuned
    classes: tuple[str, ...]
    class_ids: tuple[str, ...]
    is_shared: NDArray[np.bool_]
    reference: Mapping[str, Any]

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write to a folder: ``annotator.json``, ``annotator.npz`` (no pickle).

        Raises
        ------
        OutputError
            As :func:`check_annotator_folder`.
        BundleError
            The model is not saved: nobody could tell later whether another one is the same.
        """
        path = Path(folder)
        if self.reference["model_hash"] == _NOT_SAVED:
            raise BundleError(
                f"the annotator was fitted with {self.reference['model']}, which is not saved",
                expected="a model from a bundle",
                fix="model.save_pretrained(...), load it with from_pretrained, and fit the annotator again",
            )
        check_annotator_folder(path, overwrite=overwrite)
        with replacing(path) as partial:
            partial.mkdir()
            arrays = {**self.annotator.arrays(), "is_shared": self.is_shared}
            np.savez_compressed(partial / "annotator.npz", **arrays)  # type: ignore[arg-type]
            digest = _digest((partial / "annotator.npz").read_bytes(), self.classes, self.class_ids)
            head = {
                "format": _FORMAT,
                "method": self.annotator.method,
                "classes": list(self.classes),
                "class_ids": list(self.class_ids),
                "reference": dict(self.reference),
                "arrays": sorted(arrays),
                "sha256": digest,
            }
            (partial / "annotator.json").write_text(json.dumps(head, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises
        ------
        BundleError
            It is no such folder, or damaged.
        """
        path = Path(folder)
        try:
            head = json.loads((path / "annotator.json").read_text(encoding="utf-8"))
            content = (path / "annotator.npz").read_bytes()
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{path} is no annotator: {error}", expected="a folder that scdiva annotate --save wrote", fix="name it"
            ) from error
        is_ours = isinstance(head, dict) and head.get("format") == _FORMAT and head.get("method") in METHODS
        wanted = {"classes", "class_ids", "reference", "arrays", "sha256"}
        if not is_ours or wanted - set(head) or _digest(content, head["classes"], head["class_ids"]) != head["sha256"]:
            raise BundleError(
                f"{path}: annotator.json and annotator.npz do not belong together, or are of another version",
                expected="the folder as it was written",
                fix="fit it again",
            )
        arrays = read_arrays(path / "annotator.npz", head["arrays"])
        annotator: Annotator | FineTuned
        if head["method"] == "reference":
            annotator = ReferenceIndex.from_arrays(arrays, len(head["classes"]))
        elif head["method"] in FINE_TUNING_METHODS:
            annotator = FineTuned.from_arrays(arrays, head["method"])
        elif head["method"] == "integrate":
            annotator = IntegratedIndex.from_arrays(arrays, len(head["classes"]))
        elif head["method"] == "consensus":
            n_classes = len(head["classes"])
            integrated = IntegratedIndex.from_arrays(of_member(arrays, "integrated"), n_classes)
            annotator = Consensus.from_arrays(arrays, n_classes, integrated)
        else:
            annotator = Probe.from_arrays(arrays)
        return cls(annotator, tuple(head["classes"]), tuple(head["class_ids"]), arrays["is_shared"], head["reference"])

    def extended(self, other: CellTyper, *, ontology: Mapping[str, str] | None = None) -> CellTyper:
        """Return the index of both references together (method "reference").

        Parameters
        ----------
        other
            An index of the same model over the same genes, with the same share of known cells that may be unknown.
        ontology
            Cell Ontology ids of labels, which go before those of both.

        Raises
        ------
        ConfigError
            They are no indices, or of other models or genes.
        """
        one, two = self.annotator, other.annotator
        if not isinstance(one, ReferenceIndex) or not isinstance(two, ReferenceIndex):
            raise ConfigError(
                f"methods {one.method} and {two.method}",
                expected="two indices (method 'reference')",
                fix="fit the others to all cells at once",
            )
        same_model = self.reference["model_hash"] == other.reference["model_hash"]
        if not same_model or not np.array_equal(self.is_shared, other.is_shared):
            raise ConfigError(
                "the indices are of other models, or over other genes",
                expected="one model, and genes=... the same",
                fix="fit both to the genes that all references measure",
            )
        rate = float(self.reference["false_unknown_rate"])
        if rate != float(other.reference["false_unknown_rate"]):
            raise ConfigError(
                f"false_unknown_rate {rate} and {other.reference['false_unknown_rate']}",
                expected="the same of both",
                fix=f"leave it at {rate}, or make one index of all cells at once",
            )
        classes = tuple(sorted({*self.classes, *other.classes}))
        code = [
            np.array([classes.index(name) for name in typer.classes], dtype=np.int32)[index.code]
            for typer, index in ((self, one), (other, two))
        ]
        # a label that one side could not place may have an id on the other; the first one's go first
        ids = dict.fromkeys(classes, "")
        for typer in (other, self):
            ids |= {name: found for name, found in zip(typer.classes, typer.class_ids, strict=True) if found}
        ids |= {name: found for name, found in (ontology or {}).items() if name in ids}
        codes = np.concatenate(code)
        merged = ReferenceIndex.fit(np.concatenate([one.z, two.z]), codes, len(classes), false_unknown_rate=rate)
        reference = {**self.reference, "name": f"{self.reference['name']} + {other.reference['name']}"}
        reference["n_cells"] = int(self.reference["n_cells"]) + int(other.reference["n_cells"])
        for key in ("label_key", "counts_in"):
            there = dict.fromkeys([str(self.reference[key]), str(other.reference[key])])
            reference[key] = " + ".join(there)
        reference["n_left_out"] = int(self.reference["n_left_out"]) + int(other.reference["n_left_out"])
        reference["classes"] = list(classes)
        reference["cells_per_class"] = np.bincount(codes, minlength=len(classes)).tolist()
        without = {*self.reference["labels_without_ontology_id"], *other.reference["labels_without_ontology_id"]}
        reference["labels_without_ontology_id"] = sorted(name for name in without if not ids[name])
        reference["held_out"] = _held_out_scores(merged, codes, classes)
        return CellTyper(merged, classes, tuple(ids[name] for name in classes), self.is_shared, reference)


def _digest(arrays: bytes, classes: Sequence[str], class_ids: Sequence[str]) -> str:
    """Fingerprint arrays and labels: other names, or in another order, would be other types."""
    digest = hashlib.sha256(arrays)
    digest.update(json.dumps([list(classes), list(class_ids)]).encode())
    return digest.hexdigest()


def check_annotator_folder(folder: str | Path, *, overwrite: bool) -> None:
    """Refuse a folder that an annotator cannot be saved to.

    Raises
    ------
    OutputError
        The folder exists (with ``overwrite``: and holds something else than an annotator), or its parent does not.
    """
    path = Path(folder)
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists", expected="a new folder", fix="name another one, or allow overwriting")
    others = sorted({entry.name for entry in path.iterdir()} - _FILES) if path.is_dir() else []
    if path.is_file() or others:
        raise OutputError(
            f"{path} is {f'a folder with {others[0]} in it' if others else 'a file'}, not an annotator",
            expected="a new folder, or one that holds an annotator and nothing else",
            fix="name another one",
        )
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", expected="a folder", fix="create it first")


def default_method(model: Embedder) -> Method:
    """Return the method that is taken where none is named and there is a query: "consensus", if the model is native.

    Whose cells a query is, nobody says beforehand. On average the consensus is ahead of the probe, within a laboratory
    and across, though not on every set (docs/results/annotation.md). Our decision.
    """
    return "consensus" if isinstance(model, ScDiVa) and isinstance(model.config, NativeConfig) else "probe"


def fit_cell_typer(
    reference: DataLike,
    model: Embedder,
    label_key: str,
    *,
    method: Method = "probe",
    query: DataLike | None = None,
    layer: str | None = None,
    query_layer: str | None = None,
    ontology: Mapping[str, str] | None = None,
    tissue: str | None = None,
    is_balanced: bool = False,
    false_unknown_rate: float = FALSE_UNKNOWN_RATE,
    fine_tuning: FineTuning | None = None,
    extend: CellTyper | None = None,
    seed: int = 0,
) -> CellTyper:
    """Fit an annotator to labelled cells.

    Parameters
    ----------
    reference
        Raw counts with labels in ``.obs[label_key]``; cells without a label are left out, and counted.
    model
        The model; it is not changed.
    label_key
        Column of ``.obs``.
    method
        "reference" (nearest neighbours, nothing is trained), "probe" (regressions on the frozen embedding), "integrate"
        (neighbours in an embedding that is integrated over reference and query, without labels), "consensus" (probe,
        neighbours and integrated neighbours, weighted by their agreement on the query), "finetune" (the last layers of
        the trunk and a head are trained) or "lora" (adapters on all layers, and a head).
    query
        Cells that will be annotated: the genes that they do not measure are not used, and components are fitted to them
        as well (all methods but "reference"). "integrate" and "consensus" need them. Labels, if they have any, are not
        looked at.
    layer
        Where the counts of the reference are; found if left out.
    query_layer
        The same of the query.
    ontology
        Cell Ontology ids of labels that are not found by name.
    tissue
        For names that mean something else in each tissue ("alpha"): blood, pancreas, brain, lung, heart.
    is_balanced
        Whether each class has the same weight (probe), or rare ones more of it (finetune and lora: a cell's weight
        falls with the square root of its class's size).
    false_unknown_rate
        Share of known cells that may be called unknown.
    fine_tuning
        Settings of the training (finetune and lora).
    extend
        An index (method "reference") that the reference is added to: the result holds both. It is compared over the
        index's genes, all of which the reference has to measure.
    seed
        Seed.

    Raises
    ------
    SourceError
        No labelled cells, or a single class.
    GeneError
        Reference and query share too few genes.
    KeyNotFoundError, ScaleError
        The data cannot be used.
    ConfigError
        An unknown method, settings that are not of the method, or no query where the method needs one.
    UnsupportedError
        A model to fine-tune that is not native or has no trunk (raised before anything is read), or one to integrate
        with that is not native.
    TrainingError, NonFiniteLossError
        See :func:`scdiva.training.fit`.
    """
    if method not in METHODS:
        raise ConfigError(f"method={method!r}", expected=f"one of {', '.join(METHODS)}", fix="name one")
    if not 0 < false_unknown_rate < 1:
        raise ConfigError(f"false_unknown_rate={false_unknown_rate}", expected="between 0 and 1", fix="leave it out")
    options = _fine_tuning(method, fine_tuning, model)
    _refuse_unusable(method, query, is_balanced=is_balanced)
    source = open_source(reference)
    reader = open_counts(source, model.vocabulary, layer=layer)
    rows, labels = _labelled(source.column(label_key), source.name, label_key)
    is_shared = reader.alignment.is_measured.copy()
    if extend is not None:
        _refuse_to_extend(extend, method, model, is_shared, source.name)
        is_shared, query = extend.is_shared, None  # the index says over which genes cells are compared
    unlabelled = None
    if query is not None:
        other = open_counts(open_source(query), model.vocabulary, layer=query_layer)
        is_shared &= other.alignment.is_measured
        _refuse_few_genes(is_shared, source.name, other.source.name)
        if method == "probe" or method in INTEGRATING_METHODS or (options is not None and options.with_components):
            some = np.sort(np.random.default_rng([seed, 3]).permutation(len(other))[:_UNLABELLED_CELLS])
            cells = other.read(some).with_genes(is_shared)
            unlabelled = (cells, embed_cells(model, cells))
    cells = reader.read(rows).with_genes(is_shared)
    is_empty = np.diff(cells.counts.indptr) == 0
    if is_empty.any():
        log.warning("%s: %d cells without a count in the genes that are compared are left out", source.name,
                    int(is_empty.sum()))  # fmt: skip
        rows, cells = rows[~is_empty], cells.take(np.flatnonzero(~is_empty))
        labels = [label for label, empty in zip(labels, is_empty, strict=True) if not empty]
        _refuse_one_class(labels, source.name, label_key)
    classes, code = classes_of(labels)
    annotator: Annotator | FineTuned
    training: dict[str, Any] = {}
    if options is not None:
        assert isinstance(model, ScDiVa)
        annotator, training = fit_fine_tuned(
            cells,
            code,
            classes,
            model,
            reader,
            method="lora" if method == "lora" else "finetune",
            options=options,
            is_balanced=is_balanced,
            false_unknown_rate=false_unknown_rate,
            seed=seed,
            unlabelled=unlabelled,
        )
    else:
        annotator = fit_annotator(
            method,
            cells,
            embed_cells(model, cells),
            code,
            len(classes),
            model,
            unlabelled=unlabelled,
            seed=seed,
            is_balanced=is_balanced,
            false_unknown_rate=false_unknown_rate,
            name=source.name,
        )
    matches = match_labels(list(classes), dict(ontology) if ontology else None, tissue=tissue)
    record = {
        "name": source.name,
        "label_key": label_key,
        "n_cells": int(rows.size),
        "n_left_out": int(source.n_cells - rows.size),
        "n_genes": int(is_shared.sum()),
        "counts_in": reader.found.description,
        "false_unknown_rate": false_unknown_rate,
        "seed": seed,
        # two lists, since a label may hold what no key of a file can ("T/NK")
        "classes": list(classes),
        "cells_per_class": np.bincount(code).tolist(),
        "model": str(model.provenance["model"]),
        "model_hash": str(model.provenance["model_hash"]),
        "vocabulary_fingerprint": model.vocabulary.fingerprint,
        "labels_without_ontology_id": list(matches.unmatched),
    }
    if training:
        record["training"] = training
    elif scores := _held_out_scores(annotator, code, classes):
        record["held_out"] = scores
    typer = CellTyper(annotator, classes, tuple(matches.id_of.get(name, "") for name in classes), is_shared, record)
    return typer if extend is None else extend.extended(typer, ontology=ontology)


@dataclass(frozen=True, slots=True)
class Fitted:
    """An annotator that others are built of, and the seconds that its fit took."""

    annotator: Any
    seconds: float


def fit_annotator(
    method: Method,
    cells: CellCounts,
    z: NDArray[np.float32],
    code: NDArray[np.integer],
    n_classes: int,
    model: Embedder,
    *,
    unlabelled: tuple[CellCounts, NDArray[np.float32]] | None,
    seed: int,
    is_balanced: bool = False,
    false_unknown_rate: float = FALSE_UNKNOWN_RATE,
    name: str = "the reference",
    fitted: MutableMapping[str, Fitted] | None = None,
) -> Annotator:
    """Fit an annotator to cells in memory, by a method that does not train the network.

    Parameters
    ----------
    method
        "reference", "probe", "integrate" or "consensus".
    cells, z
        The reference, over the genes that are to be compared, and its embedding.
    code, n_classes
        Classes, and their number.
    model
        The model that made ``z``.
    unlabelled
        Cells of the query, over the same genes, and their embedding.
    seed, is_balanced, false_unknown_rate
        As in :func:`fit_cell_typer`.
    name
        Of the reference, for messages.
    fitted
        Annotators that were fitted to these cells already, by method: they are used again, and new ones are added.

    Raises
    ------
    ConfigError
        A method that trains the network, or no query to integrate with.
    UnsupportedError, GeneError, TrainingError, NonFiniteLossError
        See :func:`scdiva.tasks.integrated.fit_integrated`.
    """
    done: MutableMapping[str, Fitted] = {} if fitted is None else fitted

    def fit(wanted: str) -> Annotator:
        if wanted == "reference":
            return ReferenceIndex.fit(z, code, n_classes, false_unknown_rate=false_unknown_rate)
        if wanted == "probe":
            return Probe.fit(
                cells,
                z,
                code,
                n_classes,
                seed=seed,
                is_balanced=is_balanced,
                false_unknown_rate=false_unknown_rate,
                unlabelled=unlabelled,
            )
        if wanted != "integrate":
            raise ConfigError(
                f"method {wanted!r} trains the network",
                expected="reference, probe, integrate or consensus",
                fix="use fit_cell_typer",
            )
        if unlabelled is None:
            raise ConfigError(
                "nothing to integrate the reference with", expected="unlabelled=...", fix="give cells of the query"
            )
        return fit_integrated(
            cells,
            unlabelled[0],
            code,
            n_classes,
            model,
            seed=seed,
            false_unknown_rate=false_unknown_rate,
            name=f"{name} and the query",
        )

    def part(wanted: str) -> Any:
        if wanted not in done:
            started = time.perf_counter()
            found = fit(wanted)
            done[wanted] = Fitted(found, time.perf_counter() - started)
        return done[wanted].annotator

    if method == "consensus":
        probe, index, integrated = (part(wanted) for wanted in ("probe", "reference", "integrate"))
        return Consensus.fit(probe, index, integrated, code, false_unknown_rate=false_unknown_rate)
    found: Annotator = part(method)
    return found


def _held_out_scores(
    annotator: Annotator | FineTuned, code: NDArray[np.integer], classes: tuple[str, ...]
) -> dict[str, float]:
    """Scores on cells of the reference whose labels had no part in what is said of them; empty where there are none.

    Settings and temperature were chosen by these very cells, which makes the scores a little too good.
    """
    held_out: HeldOut | None = getattr(annotator, "held_out", None)
    judged = np.zeros(0, dtype=bool) if held_out is None else np.isfinite(held_out.distance)
    if held_out is None or not judged.any():
        return {}
    log_probability = held_out.log_probability[judged]
    probability = annotator.calibration.calls(log_probability, held_out.distance[judged]).probability
    names, called = np.asarray(classes, dtype=str), probability.argmax(axis=1)
    scores = annotation_scores(names[code[judged]], names[called])
    error = expected_calibration_error(probability.max(axis=1), called == code[judged]).error
    return {
        "n_cells": int(judged.sum()),
        "accuracy": scores.accuracy,
        "macro_f1": scores.macro_f1,
        "calibration_error": error,
    }


def annotate(
    query: DataLike,
    model: Embedder,
    typer: CellTyper,
    *,
    layer: str | None = None,
    self_training: bool | Literal["auto"] = "auto",
    confidence: float = CONFIDENCE,
    on_block: Callable[[int], None] | None = None,
) -> Annotation:
    """Annotate cells.

    Parameters
    ----------
    query
        Raw counts.
    model
        The model that ``typer`` was fitted with.
    typer
        From :func:`fit_cell_typer`, or loaded.
    layer
        Where the counts are; found if left out.
    self_training
        What an annotator learns from the query, of up to 10,000 cells. "auto": a probe is aligned with them (they may
        be of another laboratory), a consensus weighs its members by their agreement on them, and where the reference
        has fewer than 20 cells per class (median), a probe or integrated neighbours go on to learn from their own
        calls. True: both. False: nothing, and the call of a cell does not depend on other cells, once the typer is
        fitted (which may have looked at the query, too).
    confidence
        Probability that an ontology term must reach.
    on_block
        Called with the number of cells done, for progress.

    Raises
    ------
    BundleError
        The model is another one than the typer was fitted with.
    ConfigError
        ``self_training=True`` with a method that cannot learn from a query.
    GeneError
        The query measures too few of the typer's genes.
    SourceError, ScaleError, KeyNotFoundError
        The data cannot be used.
    """
    if str(model.provenance["model_hash"]) != typer.reference["model_hash"]:
        raise BundleError(
            f"the annotator was fitted with {typer.reference['model']}, and this is another model, or other weights",
            expected=f"the model of hash {typer.reference['model_hash'][:12]}",
            fix="load that one, or fit the annotator again",
        )
    reader = open_counts(open_source(query), model.vocabulary, layer=layer)
    is_used = typer.is_shared & reader.alignment.is_measured
    _refuse_few_genes(is_used, str(typer.reference["name"]), reader.source.name)
    annotator = typer.annotator.on(model) if isinstance(typer.annotator, FineTuned) else typer.annotator
    is_self_trained, fitted = _is_self_trained(self_training, typer), annotator
    if isinstance(annotator, _LEARNERS) and (is_self_trained or self_training == "auto"):
        rng = np.random.default_rng([int(typer.reference.get("seed", 0)), _QUERY_STREAM])
        rows = np.sort(rng.permutation(len(reader))[:_UNLABELLED_CELLS])
        cells = reader.read(rows).with_genes(typer.is_shared)
        annotator = annotator.adapted(cells, embed_cells(model, cells), learns=is_self_trained)
    probability = np.empty((len(reader), len(typer.classes)), dtype=np.float32)
    novelty = np.empty(len(reader), dtype=np.float32)
    start = n_empty = 0
    for block in ordered_blocks(reader, _BLOCK):
        cells = block.with_genes(typer.is_shared)
        n_empty += int((np.diff(cells.counts.indptr) == 0).sum())
        calls = annotator.calls(cells, model.embed(cells))
        stop = start + cells.n_cells
        probability[start:stop], novelty[start:stop] = calls.probability, calls.novelty
        start = stop
        if on_block is not None:
            on_block(stop)
    n_missing = int(typer.is_shared.sum() - is_used.sum())
    if n_missing:
        log.warning(
            "%s does not measure %d of the %d genes that the annotator was fitted to; they count as unknown",
            reader.source.name, n_missing, int(typer.is_shared.sum()),
        )  # fmt: skip
    if n_empty:
        log.warning("%s: %d cells have no count in the genes that are compared; their types mean nothing",
                    reader.source.name, n_empty)  # fmt: skip
    record = {
        "method": annotator.method,
        "n_empty_cells": n_empty,
        "reference": dict(typer.reference),
        "n_genes_missing": n_missing,
        "self_training": is_self_trained,
        "confidence": confidence,
        "threshold": annotator.calibration.threshold,
        "counts_in": reader.found.description,
        **model.provenance,
    }
    if isinstance(annotator, Consensus):
        record |= _consensus_record(annotator)
    probes = [one.probe if isinstance(one, Consensus) else one for one in (annotator, fitted)]
    if isinstance(probes[0], Probe):
        record["regressions"] = list(probes[0].regressions)
        record["latent_size"] = probes[0].features.latent_size
        assert isinstance(probes[1], Probe)
        record["moved"] = not np.array_equal(probes[0].class_mean, probes[1].class_mean, equal_nan=True)
    return Annotation(
        typer.classes, probability, novelty, annotator.calibration.threshold, typer.class_ids, record, confidence
    )


def _fine_tuning(method: Method, given: FineTuning | None, model: Embedder) -> FineTuning | None:
    """Return the settings of a fine-tuning method, checked; None for the others."""
    if method in FINE_TUNING_METHODS:
        settings = given or FineTuning()
        settings.design("lora" if method == "lora" else "finetune", model)
        return settings
    if given is not None:
        raise ConfigError(
            f"fine_tuning with method {method!r}",
            expected=f"method {' or '.join(FINE_TUNING_METHODS)}",
            fix="leave it out, or name one of these",
        )
    return None


def _refuse_unusable(method: Method, query: DataLike | None, *, is_balanced: bool) -> None:
    if method in INTEGRATING_METHODS and query is None:
        raise ConfigError(
            f"method {method!r} without a query",
            expected="query=...: an encoder is trained on both sides",
            fix="give the cells that are to be annotated, or use 'probe'",
        )
    if is_balanced and method in ("integrate", "reference"):
        raise ConfigError(
            f"is_balanced with method {method!r}",
            expected="probe, consensus, finetune or lora: neighbours have no weights",
            fix="leave it out",
        )


def _refuse_to_extend(
    extend: CellTyper, method: Method, model: Embedder, is_measured: NDArray[np.bool_], name: str
) -> None:
    if method != "reference" or not isinstance(extend.annotator, ReferenceIndex):
        raise ConfigError(
            f"extend with method {method!r}, of an annotator of method {extend.annotator.method!r}",
            expected="method 'reference' of both: only an index can be extended",
            fix="fit the other methods to all cells at once",
        )
    if str(model.provenance["model_hash"]) != extend.reference["model_hash"]:
        raise BundleError(
            f"the index was made with {extend.reference['model']}, and this is another model, or other weights",
            expected=f"the model of hash {extend.reference['model_hash'][:12]}",
            fix="load that one",
        )
    n_missing = int((extend.is_shared & ~is_measured).sum())
    if n_missing:
        raise GeneError(
            f"{name} does not measure {n_missing} of the {int(extend.is_shared.sum())} genes of the index",
            expected="all of them: cells are compared over the same genes",
            fix="make one index of both references at once, over the genes that both measure",
        )


def _consensus_record(consensus: Consensus) -> dict[str, Any]:
    names = ["probe", "probe_self_trained", "reference", "integrate"]
    return {
        "members": names,
        "member_weights": consensus.weight.tolist(),
        "member_agreement": consensus.agreement.tolist(),
    }


def _is_self_trained(wanted: bool | Literal["auto"], typer: CellTyper) -> bool:
    if wanted not in (True, False, "auto"):
        raise ConfigError(f"self_training={wanted!r}", expected="True, False or 'auto'", fix="give one of them")
    if not isinstance(typer.annotator, _LEARNERS):
        if wanted is True:
            raise ConfigError(
                f"self_training with method {typer.annotator.method!r}",
                expected="a probe, integrated neighbours or a consensus: others do not learn from a query",
                fix="leave it out",
            )
        return False
    if wanted != "auto":
        return bool(wanted)
    return float(np.median(typer.reference["cells_per_class"])) < FEW_FOR_SELF_TRAINING


def _labelled(column: Any, name: str, key: str) -> tuple[NDArray[np.int64], list[str]]:
    labels = np.array([label_text(value) for value in column], dtype=str)
    kinds, inverse = np.unique(labels, return_inverse=True)
    rows = np.flatnonzero(~np.array([is_missing(kind) for kind in kinds])[inverse])
    _refuse_one_class(labels[rows].tolist(), name, key)
    if rows.size < labels.size:
        log.warning("%s: %d cells without a label in .obs[%r] are left out", name, labels.size - rows.size, key)
    return rows, labels[rows].tolist()


def _refuse_one_class(labels: Sequence[str], name: str, key: str) -> None:
    found = sorted(set(labels))
    if len(found) < 2:
        raise SourceError(
            f".obs[{key!r}] of {name} holds {len(found)} label{'s' if len(found) != 1 else ''}"
            + (f" ({found[0]})" if found else ""),
            expected="at least two cell types, of cells with counts",
            fix="name another column, or give another reference",
        )


def _refuse_few_genes(is_shared: NDArray[np.bool_], reference: str, query: str) -> None:
    if int(is_shared.sum()) < MIN_SHARED_GENES:
        raise GeneError(
            f"{reference} and {query} share {int(is_shared.sum())} genes that the model knows",
            expected=f"at least {MIN_SHARED_GENES}",
            fix="check gene names and species of both: scdiva check",
        )
