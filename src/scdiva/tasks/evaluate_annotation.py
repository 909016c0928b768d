"""``evaluate annotation``: our annotators beside simple classifiers and a null, on the same splits, in one run.

Four kinds of split: within a set (a share of each type is held out), with a few labelled cells of each type, across two
sets with labels in common, and one group (donor) left out. All methods see the genes that both sides measure and the
model knows; labels of held-out cells are seen by none. What may look at unlabelled held-out cells says so
(:data:`TRANSDUCTIVE`). One type at a time may be left out of training, too: :mod:`scdiva.tasks.open_set`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines import annotation as baselines
from scdiva.errors import ConfigError, ScdivaError
from scdiva.metrics import annotation as metrics
from scdiva.models.annotators import FEW_FOR_SELF_TRAINING, Calls
from scdiva.models.base import Embedder
from scdiva.tasks import open_set
from scdiva.tasks.annotate import CellTyper, Fitted, annotate, fit_annotator, fit_cell_typer
from scdiva.tasks.annotation_report import (
    CHOSEN,
    FINE_TUNED,
    METHODS,
    NULL,
    OURS,
    SIMPLICITY,
    TABLE,
    TITLES,
    TRANSDUCTIVE,
    AnnotationReport,
    Run,
)
from scdiva.tasks.annotation_splits import (
    LabelledCounts,
    Task,
    across,
    filters_by_source,
    fixed,
    leave_one_group_out,
    validation_folds,
    within,
)
from scdiva.tasks.embed import embed_cells
from scdiva.tasks.evaluation_rows import append_row, package_versions, read_rows, row_key
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "METHODS",
    "AnnotationReport",
    "LabelledCounts",
    "Run",
    "Task",
    "across",
    "check_controls",
    "evaluate_annotation",
    "filters_by_source",
    "fixed",
    "leave_one_group_out",
    "within",
]

N_OPEN_SET_SEEDS = 3
VALIDATION_FOLDS = 4
"""Cells of one fold of as many are validated on: 25 %."""
FEW_FOR_VALIDATION = 20
"""Median cells per type below which each of three folds is validated on: one has too few cells to choose by."""
_FEW_FOLDS = 3
_PARTS = {"probe_self_trained": ("probe",), "consensus": ("probe", "reference", "integrate")}
"""What methods are built of."""
_FORMAT = 1

log = logging.getLogger(__name__)


def evaluate_annotation(
    tasks: Sequence[Callable[[int], Task]],
    model: Embedder,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    open_set_tasks: Sequence[Callable[[int], Task]] = (),
    merge: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    rows_path: Path | None = None,
    on_row: Callable[[Run | open_set.OpenSetRun], None] | None = None,
) -> AnnotationReport:
    """Run methods on tasks.

    Parameters
    ----------
    tasks
        Each makes the split of a seed: ``partial(within, cells)``, ``partial(across, one, other)``,
        ``partial(leave_one_group_out, cells, cells.group, name)``.
    model
        The frozen model.
    methods
        Of :data:`METHODS`. If left out, all that are installed and do not train the network ("lora" and "finetune"
        take minutes, and are run only when they are named).
    seeds
        Seeds of splits and methods.
    open_set_tasks
        Tasks of which one type at a time is left out of training, with the first three seeds. Of our methods those
        among ``methods`` that have a novelty.
    merge
        Coarser label by label: every score is also given with both truth and prediction mapped.
    notes
        Further notes for the report.
    rows_path
        JSONL file that takes each run as it finishes; runs that are there already are not run again.
    on_row
        Called with each run.

    Raises
    ------
    ConfigError
        An unknown method, no seed, or no label that is to be merged.
    UnsupportedError
        A method that was asked for needs a package that is not installed.
    ScdivaError
        The null control is not below our methods, or not at 0.5 on open sets: something is wrong, and the rows are
        kept.
    """
    chosen = _checked_methods(methods)
    if not seeds:
        raise ConfigError("no seeds", expected="at least one", fix="leave them out")
    if merge is not None:
        _refuse_unknown_labels(merge, [make(seeds[0]) for make in tasks])
    rows = [row for row in read_rows(rows_path) if row.get("table", TABLE) == TABLE]
    known = {run.key: run for run in map(Run.from_dict, rows)}
    runs: list[Run] = []
    found_notes: dict[str, None] = {}
    for make in tasks:
        for seed in seeds:
            task = make(seed)
            found_notes |= dict.fromkeys(task.notes)
            for run in _runs_of(task, model, chosen, seed, known, rows_path):
                runs.append(run)
                if on_row is not None:
                    on_row(run)
    opened = open_set.OpenSetReport()
    if open_set_tasks:
        opened = open_set.run_open_set(
            open_set_tasks,
            model,
            methods=[name for name in open_set.METHODS if name not in open_set.OURS or name in chosen],
            seeds=seeds[:N_OPEN_SET_SEEDS],
            rows_path=rows_path,
            on_row=on_row,
        )
    report = AnnotationReport(
        tuple(runs), (*_standard_notes(chosen, bool(open_set_tasks)), *notes, *found_notes), opened, merge
    )
    check_controls(report)
    return report


def check_controls(report: AnnotationReport) -> None:
    """Refuse a report in which labels at random do as well as true ones.

    Raises
    ------
    ScdivaError
        On some task the null's accuracy is not below the best baseline's.
    """
    for task in report.tasks:
        null, best = report.values(task, NULL, "accuracy"), report.best_baseline(task, "accuracy")
        if not null or best is None:
            continue
        found = float(np.mean(report.values(task, best, "accuracy")))
        if float(np.mean(null)) >= found:
            raise ScdivaError(
                f"the controls are out of order on {task}: accuracy {np.mean(null):.3f} with shuffled labels, "
                f"{found:.3f} of {best}",
                expected="shuffled labels to do worse",
                fix="the set is too small, or its labels say nothing; the rows that were measured are kept",
            )


def _standard_notes(methods: Sequence[str], has_open_set: bool) -> list[str]:
    seen = [TITLES[name] for name in methods if name in TRANSDUCTIVE]
    tested = sum(name in baselines.BASELINES and name != NULL for name in methods)
    notes = [
        "All methods: the genes that both sides measure and the model knows.",
        f"The best baseline is the best of {tested} after the fact, by mean macro-F1 on held-out cells.",
        "The logistic regressions' C was chosen on one split each of pbmc3k and zheng_sorted7_3500.",
        "Intervals are over cells, for these training cells and labels; spread over seeds is in report.json.",
    ]
    if seen:
        notes.insert(1, f"Fitted to held-out cells as well, without their labels: {', '.join(seen)}.")
    if CHOSEN in methods:
        notes.append(
            "Chosen on validation: by macro-F1 on a quarter of the training cells (all of them, in three folds, where "
            f"types have fewer than {FEW_FOR_VALIDATION} cells), ties to the simpler method; labels of held-out cells "
            "are not looked at. It cannot see what another set or donor changes, and does not choose methods that are "
            "for that (integrated neighbours, consensus)."
        )
    if has_open_set:
        seen = [open_set.TITLES[name] for name in open_set.TRANSDUCTIVE]
        notes.append(
            "Open set: thresholds are what 5 % of training cells exceed, each judged without itself. Fitted to "
            f"held-out cells as well: {', '.join(seen)}. Intervals: types drawn, then seeds within types; with few "
            "types they are too narrow."
        )
    return notes


def _refuse_unknown_labels(merge: Mapping[str, str], tasks: Sequence[Task]) -> None:
    there = sorted(
        {str(label) for task in tasks for part in (task.train, task.test) for label in np.unique(part.label)}
    )
    if not set(merge) & set(there):
        raise ConfigError(
            f"none of the labels to merge occurs: {', '.join(sorted(merge)[:5]) or 'none are named'}",
            expected=f"some of {', '.join(there[:20])}",
            fix="correct the file of merged labels",
        )


def _checked_methods(methods: Sequence[str] | None) -> tuple[str, ...]:
    if methods is None:
        everything = tuple(name for name in METHODS if name not in FINE_TUNED)
        try:
            baselines.require_celltypist()
        except ScdivaError:
            log.warning("CellTypist is not installed, and left out: pip install 'scdiva[eval]'")
            return tuple(name for name in everything if name != "celltypist")
        return everything
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise ConfigError(
            f"no method is called {unknown[0]!r}" if unknown else "no methods",
            expected=f"some of {', '.join(METHODS)}",
            fix="correct the name",
        )
    if CHOSEN in methods and len(set(methods) & set(SIMPLICITY)) < 2:
        raise ConfigError(
            f"{CHOSEN!r} with fewer than two methods to choose from",
            expected=f"two of {', '.join(SIMPLICITY)}",
            fix="name them as well",
        )
    if "celltypist" in methods:
        baselines.require_celltypist()
    return tuple(name for name in METHODS if name in methods)


@dataclass(frozen=True, slots=True)
class _Embedded:
    """z of training and held-out cells, and the seconds that it took."""

    train: NDArray[np.float32]
    test: NDArray[np.float32]
    seconds: float

    @classmethod
    def of(cls, model: Embedder, task: Task) -> Self:
        started = time.perf_counter()
        train, test = (embed_cells(model, part.cells) for part in (task.train, task.test))
        return cls(train, test, time.perf_counter() - started)


def _runs_of(
    task: Task,
    model: Embedder,
    methods: Sequence[str],
    seed: int,
    known: Mapping[str, Run],
    rows_path: Path | None,
) -> Iterable[Run]:
    """Run methods on one split, or take what is known; "chosen" comes after those that it chooses from."""
    content, model_hash = task.digest(), str(model.provenance["model_hash"])
    embedded: list[_Embedded] = []
    fitted: dict[str, Fitted] = {}
    done: dict[str, Run] = {}
    candidates = tuple(name for name in SIMPLICITY if name in methods)
    for method in methods:
        asked: list[Any] = [_FORMAT, content, method, seed, model_hash]
        if method in (*OURS, CHOSEN):
            asked.append(open_set.OUR_VERSION)
        if method == CHOSEN:
            asked.append(candidates)
        key = row_key(*asked)
        run = known.get(key)
        if run is None:
            if method not in baselines.BASELINES and not embedded:
                embedded.append(_Embedded.of(model, task))
            if method == CHOSEN:
                run = _chosen_run({name: done[name] for name in candidates}, task, model, embedded[0], seed, key)
            else:
                run = _run(task, method, seed, key, model, embedded, fitted)
            if rows_path is not None:
                append_row(rows_path, run.to_dict())
        # rows of an older version do not say which kind of split they are of
        run = replace(run, kind=task.kind)
        done[method] = run
        yield run


def _run(
    task: Task,
    method: str,
    seed: int,
    key: str,
    model: Embedder,
    embedded: Sequence[_Embedded],
    fitted: MutableMapping[str, Fitted],
) -> Run:
    started = time.perf_counter()
    spent = 0.0
    if method in baselines.BASELINES:
        genes = np.flatnonzero(task.train.cells.is_measured.all(axis=0))
        counts = [sp.csr_matrix(part.cells.counts[:, genes]) for part in (task.train, task.test)]
        found = baselines.BASELINES[method](counts[0], task.train.label, counts[1], seed=seed)
        classes, probability = found.classes, found.probabilities
    else:
        z = embedded[0]
        # what others have fitted already counts as if it had been fitted for this one
        known = sum(fitted[part].seconds for part in _PARTS.get(method, (method,)) if part in fitted)
        annotator = _fit(method, task.train, z.train, (task.test.cells, z.test), model, seed, fitted)
        classes = np.unique(task.train.label)
        probability = annotator.calls(task.test.cells, z.test).probability.astype(np.float64)
        spent = z.seconds + known
    seconds = time.perf_counter() - started + spent
    predicted = np.asarray(classes)[probability.argmax(axis=1)]
    scored = metrics.annotation_scores(task.test.label, predicted, probability, classes)
    labels = tuple(sorted({*task.train.label.tolist(), *task.test.label.tolist()}))
    scores = {
        "accuracy": scored.accuracy,
        "balanced_accuracy": scored.balanced_accuracy,
        "macro_f1": scored.macro_f1,
        "calibration_error": scored.calibration_error.value,
        "nll": scored.negative_log_likelihood.value,
    }
    codes = [np.searchsorted(labels, values) for values in (task.test.label, predicted)]
    # as they are written, so that a report from rows is the same
    confidence, seconds = np.round(probability.max(axis=1), 4), round(seconds, 3)
    return Run(
        task.name, method, seed, key, labels, codes[0], codes[1], confidence, scores, seconds, task.kind,
        versions=package_versions((*open_set.PACKAGES, *(["celltypist"] if method == "celltypist" else []))),
    )  # fmt: skip


class _Annotator(Protocol):
    """What calls cells that are given with their embedding."""

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells; classes are the sorted labels of the training cells."""
        ...


def _fit(
    method: str,
    train: LabelledCounts,
    z: NDArray[np.float32],
    unlabelled: tuple[CellCounts, NDArray[np.float32]],
    model: Embedder,
    seed: int,
    fitted: MutableMapping[str, Fitted] | None = None,
) -> _Annotator:
    """Fit one of our methods to labelled cells; ``unlabelled`` are the cells that will be annotated.

    ``fitted`` holds annotators of the same split by method: they are used again, and new ones are added.
    """
    if method in FINE_TUNED:
        return _fine_tuned(method, train, unlabelled[0], model, seed)
    classes, code = np.unique(train.label, return_inverse=True)
    # as annotate does: everything that can be is adapted to the cells to annotate; only where it is asked for by name,
    # or where types have few cells, does it go on to learn from its own calls
    name: Any = "probe" if method == "probe_self_trained" else method
    annotator = fit_annotator(
        name,
        train.cells,
        z,
        code,
        classes.size,
        model,
        unlabelled=unlabelled,
        seed=seed,
        fitted=fitted,
        name=train.name,
    )
    has_few = float(np.median(np.bincount(code))) < FEW_FOR_SELF_TRAINING
    learns = method == "probe_self_trained" or (method != "probe" and has_few)
    return annotator.adapted(*unlabelled, learns=learns)


def _chosen_run(runs: Mapping[str, Run], task: Task, model: Embedder, z: _Embedded, seed: int, key: str) -> Run:
    """Return the run of the method that is best on validation cells, which are training cells.

    Candidates see the unlabelled validation cells as they see the held-out ones in the end. Ties go to the simpler
    method, the first one.
    """
    started = time.perf_counter()
    label = task.train.label
    n_median = float(np.median(np.unique(label, return_counts=True)[1]))
    has_few = n_median < FEW_FOR_VALIDATION
    n_folds = _FEW_FOLDS if has_few else VALIDATION_FOLDS
    fold = validation_folds(label, np.random.default_rng([seed, 15]), n_folds=n_folds)
    judged = fold >= 0 if has_few else fold == 0
    validation = {}
    fitted: dict[int, dict[str, Fitted]] = {i: {} for i in range(n_folds)}
    for method in runs:
        predicted = np.full(label.size, "", dtype=label.dtype)
        for i in range(n_folds) if has_few else (0,):
            rows, own = np.flatnonzero(fold == i), np.flatnonzero(fold != i)
            if not rows.size:
                continue
            part = task.train.take(own)
            # these are the cells that are annotated here: a probe aligned with others would be judged unfairly
            validated = (task.train.cells.take(rows), z.train[rows])
            annotator = _fit(method, part, z.train[own], validated, model, seed, fitted[i])
            probability = annotator.calls(*validated).probability
            predicted[rows] = np.unique(part.label)[probability.argmax(axis=1)]
        validation[method] = (
            metrics.annotation_scores(label[judged], predicted[judged]).macro_f1 if judged.any() else 0.0
        )
    picked = max(validation, key=lambda name: validation[name])  # the first of equals
    seconds = round(time.perf_counter() - started + runs[picked].seconds, 3)
    return replace(runs[picked], method=CHOSEN, key=key, seconds=seconds, picked=picked, validation=validation)


# ---- fine-tuning: the one place to change, if fine-tuned annotators get another way in than fit_cell_typer ----


def _fine_tuned(method: str, train: LabelledCounts, test: CellCounts, model: Embedder, seed: int) -> _Annotator:
    """Fine-tune a model on labelled cells with ``fit_cell_typer(..., method=method)``, as a user would.

    Parameters
    ----------
    method
        One of :data:`FINE_TUNED`.
    train
        Labelled cells.
    test
        The cells that will be annotated: their labels are not known here.
    model
        The model to start from.
    seed
        Seed.

    Raises
    ------
    ConfigError
        ``fit_cell_typer`` knows no such method.
    """
    as_method: Any = method

    @dataclass(frozen=True, slots=True)
    class FineTuned:
        typer: CellTyper

        def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
            found = annotate(_as_adata(cells, model), model, self.typer, self_training=False)
            return Calls(found.probability, found.novelty)

    reference = _as_adata(train.cells, model)
    reference.obs["label"] = train.label
    query = _as_adata(test, model)
    return FineTuned(fit_cell_typer(reference, model, "label", method=as_method, query=query, seed=seed))


def _as_adata(cells: CellCounts, model: Embedder) -> AnnData:
    """Return cells as they would be in a file: counts of the genes that all of them measure."""
    import anndata as ad
    import pandas as pd

    genes = np.flatnonzero(cells.is_measured.all(axis=0))
    obs = pd.DataFrame(index=[str(i) for i in range(cells.n_cells)])
    var = pd.DataFrame(index=model.vocabulary.ensembl_id[genes])
    return ad.AnnData(sp.csr_matrix(cells.counts[:, genes]), obs=obs, var=var)
