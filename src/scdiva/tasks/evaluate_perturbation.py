"""``evaluate perturbation``: predicted effects of perturbations against measured ones, with baselines and bounds.

A predictor is fitted to training cells and predicts, for each held-out condition, a change of mean expression from
control cells that it is given. The truth is the held-out condition's cells against control cells that no predictor
has seen. The ceiling is what half of the held-out cells says of the other half; the null is a baseline fitted to
shuffled perturbations.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.baselines import perturbation as baselines
from scdiva.baselines.perturbation import EffectPredictor
from scdiva.data.components import components_of, fit_components, variable_genes
from scdiva.data.perturbation_effects import ControlMeans, Effect, effects_of, log_values, mean_of, rank_sum_test
from scdiva.data.perturbation_sets import scored_conditions
from scdiva.data.perturbation_splits import PerturbationSplit, Scheme, split_perturbations
from scdiva.data.perturbations import PerturbedCells
from scdiva.errors import ConfigError, ScdivaError, UnsupportedError
from scdiva.metrics import perturbation as metrics
from scdiva.metrics.generation_distances import energy_distance
from scdiva.metrics.generation_space import NotMeasurableError, Score
from scdiva.tasks.evaluation_rows import append_row, content_hash, package_versions, read_rows, row_key
from scdiva.tasks.perturbation_report import CEILING, NULL, TITLES, PerturbationEvaluation, Row

if TYPE_CHECKING:
    from scdiva.genes import GeneVocabulary
    from scdiva.models.scdiva.model import ScDiVa
    from scdiva.types import CellCounts

KINDS: tuple[Scheme, ...] = get_args(Scheme)
MIN_CELLS = 10
"""Fewest perturbed and fewest held-out control cells of a condition that is judged (our decision)."""
N_HALVES = 5
"""Random halves that the ceiling of a condition is averaged over, for each seed."""
MAX_CELLS_OF_DISTANCE = 1000
_MAX_CELLS_OF_COMPONENTS = 5000
_FORMAT = 2
_CEILING_FORMAT = "2"
_STREAM = 31
_OF_NEW_PERTURBATIONS = ("nearest_perturbation", "ridge", "random_forest", "knn")
_CORPUS = ("ridge_corpus", "random_forest_corpus", "knn_corpus")
OUR_VERSION = 2
"""Counts changes of our predictors that make earlier rows differ."""
_SETS = ("ridge_sets", "random_forest_sets")
_FEATURES = (*_CORPUS, *_SETS)
BASELINES_OF: Mapping[Scheme, tuple[str, ...]] = {
    "unseen_context": ("no_change", "mean", "additive", "nearest_context", "ridge", "random_condition", "shuffled"),
    "unseen_single": ("no_change", "mean", *_OF_NEW_PERTURBATIONS, *_CORPUS, *_SETS, "random_condition", "shuffled"),
    "combination": (
        "no_change",
        "mean",
        "additive",
        *_OF_NEW_PERTURBATIONS,
        *_CORPUS,
        *_SETS,
        "random_condition",
        "shuffled",
    ),
    "seen": ("no_change", "mean", "additive", "random_condition", "shuffled"),
}
"""Baselines by kind of split: those that differ there."""


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """What is trained on and what is held out.

    Parameters
    ----------
    name
        For reports.
    kind
        What is new about the conditions that are held out.
    train
        Rows of training cells, perturbed and control.
    conditions
        (perturbation, context) codes that are held out: the truth is their cells outside ``train``.
    source
        Rows of control cells to predict from; may be among ``train``.
    reference
        Rows of control cells that the truth is measured against; in neither of the two others.
    seed
        What it was drawn with; predictors are seeded by it as well.
    groups
        Of each condition, how new it is ("seen 1 of 2"): each has a table of its own. Left out: the kind.
    """

    name: str
    kind: Scheme
    train: NDArray[np.integer]
    conditions: tuple[tuple[int, int], ...]
    source: NDArray[np.integer]
    reference: NDArray[np.integer]
    seed: int = 0
    groups: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, split: PerturbationSplit) -> Self:
        """Take a split of :func:`~scdiva.data.perturbation_splits.split_perturbations`."""
        return cls(
            name,
            split.scheme,
            split.train,
            split.conditions,
            split.control,
            split.heldout_control,
            int(split.manifest["seed"]),
            split.groups,
        )


def splits_of(
    cells: PerturbedCells,
    scheme: Scheme,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    n_folds: int | None = 5,
    min_cells: int = 20,
) -> list[Split]:
    """Split cells for each seed: every context, or every fold of perturbations, is held out once.

    Parameters
    ----------
    cells
        Cells.
    scheme
        What is new in the held-out conditions.
    seeds
        Each has other held-out control cells, folds and so on.
    n_folds
        Folds of "unseen_single"; None: one perturbation at a time. At most as many as there are perturbations.
    min_cells
        Conditions with fewer cells, or control cells, are not tested.

    Raises
    ------
    ConfigError, SourceError
        See :func:`~scdiva.data.perturbation_splits.split_perturbations`.
    """
    is_scored = scored_conditions(cells, min_cells)
    folds: list[int | str] = [0]
    if scheme == "unseen_context":
        folds = [cells.contexts[c] for c in np.flatnonzero(is_scored.any(axis=0))] or [0]
    elif scheme == "unseen_single":
        singles = [p for p in np.flatnonzero(is_scored.any(axis=1)) if len(cells.perturbations[p].targets) == 1]
        n = len({cells.perturbations[p].targets for p in singles})
        n_folds = n if n_folds is None else min(n_folds, n)
        folds = list(range(max(n_folds, 1)))
    found = []
    for seed in seeds:
        for fold in folds:
            split = split_perturbations(cells, scheme, seed=seed, fold=fold, n_folds=n_folds, min_cells=min_cells)
            name = {"unseen_context": f"without {fold}", "unseen_single": f"fold {fold}"}.get(scheme, scheme)
            found.append(Split.of(name, split))
    return found


@dataclass(frozen=True, slots=True)
class Method:
    """A predictor to judge.

    Parameters
    ----------
    make
        Returns a new predictor, not yet fitted, by seed; it is fitted anew for each split.
    title
        For tables.
    fingerprint
        Whatever the predictions depend on besides data, split and seed (a hash of weights, settings): rows that were
        measured with another one are not used again.
    """

    make: Callable[[int], EffectPredictor]
    title: str
    fingerprint: str = ""


def evaluate_perturbation(
    cells: PerturbedCells,
    splits: Sequence[Split],
    *,
    predictors: Mapping[str, Method] | None = None,
    methods: Sequence[str] | None = None,
    vocabulary: GeneVocabulary | None = None,
    corpus: NDArray[np.floating] | None = None,
    notes: Sequence[str] = (),
    rows_path: Path | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> PerturbationEvaluation:
    """Judge predictors on held-out conditions, beside baselines, a null and a ceiling.

    Parameters
    ----------
    cells
        All cells.
    splits
        Several, for example one for each held-out context and seed. Conditions that occur in several are averaged.
    predictors
        Our methods by name.
    methods
        Names of predictors and baselines to run; all that belong to the kind of the split where left out. "mean", the
        ceiling and the null are always run.
    vocabulary
        Genes of the cells, so that target genes are known: they are left out of DE genes.
    corpus
        ``(n_genes, n_dimensions)`` gene features of a pre-trained model, for the "_corpus" baselines.
    notes
        Further remarks for the report.
    rows_path
        ``rows.jsonl``: rows that are there already are used again, new ones are added.
    on_row
        Called after every row.

    Returns
    -------
    PerturbationEvaluation

    Raises
    ------
    ConfigError
        There is no split, a method is unknown, rows overlap, or no condition has enough cells.
    """
    predictors = predictors or {}
    if not splits:
        raise ConfigError("no splits", expected="at least one", fix="check what is to be held out")
    known = {row.key: row for row in map(Row.from_dict, read_rows(rows_path))}
    data = _Data(cells, vocabulary)
    rows: list[Row] = []
    left_out: dict[str, None] = {}
    for split in splits:
        chosen = _chosen(split.kind, predictors, methods, corpus is not None, vocabulary is not None)
        judged = _Judged(data, split)
        left_out |= dict.fromkeys(judged.left_out)
        for row in _rows_of(judged, chosen, predictors, vocabulary, corpus, known, rows_path):
            rows.append(row)
            if on_row is not None:
                on_row(row)
    if not rows:
        raise ConfigError(
            f"no held-out condition has {MIN_CELLS} perturbed and {MIN_CELLS} control cells",
            expected="at least one",
            fix="hold out others, or take more cells",
        )
    titles = {**TITLES, **{name: method.title for name, method in predictors.items()}}
    return PerturbationEvaluation(
        tuple(rows), titles, tuple(predictors), (*_standard_notes(data, left_out), *notes),
        package_versions(("numpy", "scipy", "scikit-learn", "scanpy")),
    )  # fmt: skip


def _standard_notes(data: _Data, left_out: Mapping[str, None]) -> list[str]:
    notes = [
        f"All genes that the data measures: {data.genes.size}. Values: mean log1p(CP10K) of cells.",
        "Columns are named as in scDiVa's table, whose definitions are not published: figures do not compare.",
        "The best baseline is the best after the fact, for each metric anew; null, random condition and ceiling aside.",
        "Intervals: bootstrap over held-out conditions (contexts or perturbations), averaged over seeds before. With "
        "few conditions they are too narrow; conditions of one data set share control cells.",
        f"Ceiling: one half of the held-out cells predicts the other, with the two halves of the control cells, mean "
        f"of {N_HALVES} random halves per seed. At full depth: 2 r / (1 + r), as cell-eval. Both halves are noisy, so "
        "that a smooth prediction can do better than the ceiling.",
        "E-distance: of cells, or where only a mean is predicted, of the control cells shifted by it.",
    ]
    if left_out:
        notes.append(f"Not judged, fewer than {MIN_CELLS} perturbed or control cells: {', '.join(left_out)}.")
    return notes


def _chosen(
    kind: Scheme,
    predictors: Mapping[str, Method],
    methods: Sequence[str] | None,
    has_corpus: bool,
    has_vocabulary: bool,
) -> tuple[str, ...]:
    if kind not in BASELINES_OF:
        raise ConfigError(f"no kind of split is called {kind!r}", expected=", ".join(KINDS), fix="correct the name")
    everything = (*predictors, *BASELINES_OF[kind])
    if methods is None:
        without = (() if has_corpus else _CORPUS) + (() if has_vocabulary else _SETS)
        return tuple(name for name in everything if name not in without)
    unknown = [name for name in methods if name not in (*predictors, *baselines.BASELINES)]
    if unknown:
        raise ConfigError(
            f"no method is called {unknown[0]!r}",
            expected=f"some of {', '.join((*predictors, *baselines.BASELINES))}",
            fix="correct the name",
        )
    wanted = {*methods, "mean", NULL}
    return tuple(name for name in (*predictors, *baselines.BASELINES) if name in wanted)


class _Data:
    """All cells, with what is computed once for every split."""

    def __init__(self, cells: PerturbedCells, vocabulary: GeneVocabulary | None) -> None:
        self.cells = cells
        self.genes = np.flatnonzero(cells.is_measured)
        self.full_values = log_values(cells)
        self.values = sp.csr_matrix(self.full_values[:, self.genes])
        self.position = np.full(cells.cells.n_genes, -1)
        self.position[self.genes] = np.arange(self.genes.size)
        self.vocabulary = vocabulary
        self.found: dict[tuple[int, int], NDArray[np.int64]] = {}
        self.moments: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64], int]] = {}

    @cached_property
    def digest(self) -> str:
        """Hash of everything that a row depends on, splits aside."""
        c = self.cells
        names = [f"{p.name} {p.kind}" for p in c.perturbations]
        columns = [
            np.array(words)[codes]
            for words, codes in (
                (names, c.perturbation_code), (c.contexts, c.context_code), (c.batches, c.batch_code),
            )
        ]  # fmt: skip
        return content_hash(c.cells, *columns, np.char.mod("%g", c.cells.library_size))

    def is_target(self, perturbation: int) -> NDArray[np.bool_]:
        """Tell which measured genes the perturbation acts on; a cytokine does not act on the gene of its name."""
        result = np.zeros(self.genes.size, dtype=bool)
        known = self.cells.perturbations[perturbation]
        if self.vocabulary is not None and known.targets and known.kind != "treatment":
            found = baselines.genes_of(self.vocabulary, known.targets)
            found = self.position[found[found >= 0]]
            result[found[found >= 0]] = True
        return result

    def sums(self, perturbation: int, context: int) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """Return sums, sums of squares and number of the cells of a condition."""
        key = (perturbation, context)
        if key not in self.moments:
            x = self.values[self.rows(perturbation, context)]
            total, square = (np.asarray(v.sum(axis=0), dtype=np.float64).ravel() for v in (x, x.multiply(x)))
            self.moments[key] = total, square, x.shape[0]
        return self.moments[key]

    def rows(self, perturbation: int, context: int) -> NDArray[np.int64]:
        """Return the cells of a condition."""
        key, c = (perturbation, context), self.cells
        if key not in self.found:
            self.found[key] = np.flatnonzero((c.perturbation_code == perturbation) & (c.context_code == context))
        return self.found[key]

    def t_of(self, perturbation: int, context: int, rows: NDArray[np.integer], control: NDArray[np.integer]) -> Any:
        """Return t of cells against all other perturbed cells of the context; against control cells if none."""
        here = [p for p in range(1, len(self.cells.perturbations)) if p != perturbation]
        parts = [self.sums(p, context) for p in here]
        parts = [part for part in parts if part[2]]
        if not parts:
            parts = [_sums(self.values[control])]
        other = tuple(sum(part[i] for part in parts) for i in range(3))
        own = _sums(self.values[rows])
        if own[2] < 2 or other[2] < 2:
            return None
        return metrics.welch_t(*_moments(*own), *_moments(*other))


def _sums(x: sp.csr_matrix) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    total, square = (np.asarray(v.sum(axis=0), dtype=np.float64).ravel() for v in (x, x.multiply(x)))
    return total, square, x.shape[0]


def _moments(total: Any, square: Any, n: Any) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    mean = total / n
    return mean, np.maximum(square / n - mean**2, 0.0) * n / (n - 1), n


class _Judged:
    """One split with the truth of its conditions."""

    def __init__(self, data: _Data, split: Split) -> None:
        self.data, self.split = data, split
        _check(data.cells, split)
        code = data.cells.context_code
        is_train = np.zeros(data.cells.n_cells, dtype=bool)
        is_train[split.train] = True
        self.conditions: list[tuple[int, int]] = []
        self.left_out: list[str] = []
        self.perturbed: dict[tuple[int, int], NDArray[np.int64]] = {}
        for perturbation, context in split.conditions:
            rows = data.rows(perturbation, context)
            rows = rows[~is_train[rows]]
            reference, source = (part[code[part] == context] for part in (split.reference, split.source))
            if min(rows.size, reference.size) >= MIN_CELLS and source.size:
                self.conditions.append((perturbation, context))
                self.perturbed[perturbation, context] = rows
            else:
                self.left_out.append(self.name(perturbation, context))
        self.truths: dict[tuple[int, int], metrics.ConditionTruth] = {}

    def name(self, perturbation: int, context: int) -> str:
        """Name a condition."""
        name, where = self.data.cells.perturbations[perturbation].name, self.data.cells.contexts[context]
        return f"{name} in {where}" if where else name

    def control(self, context: int, which: Literal["source", "reference"]) -> NDArray[np.integer]:
        """Return control cells of a context."""
        rows = getattr(self.split, which)
        return rows[self.data.cells.context_code[rows] == context]

    @cached_property
    def training_effects(self) -> tuple[Effect, ...]:
        """Effects among training cells."""
        train = self.split.train
        return effects_of(self.data.cells.take(train), sp.csr_matrix(self.data.full_values[train]))

    @cached_property
    def components(self) -> NDArray[np.float64]:
        """Gene features of the training cells, for several baselines."""
        return baselines.own_embedding(self.data.cells.take(self.split.train), seed=self.split.seed)

    def truth(self, perturbation: int, context: int) -> metrics.ConditionTruth:
        """Return the truth of a condition."""
        key = perturbation, context
        if key not in self.truths:
            self.truths[key] = self.measured(
                perturbation, context, self.perturbed[key], self.control(context, "reference")
            )
        return self.truths[key]

    def measured(
        self, perturbation: int, context: int, rows: NDArray[np.integer], reference: NDArray[np.integer]
    ) -> metrics.ConditionTruth:
        """Measure a condition by some of its cells and some control cells."""
        data, batch = self.data, self.data.cells.batch_code
        means = ControlMeans.of(data.values[reference], batch[reference])
        effect = Effect.of(data.cells, data.values, rows, means)
        others = []
        for other in range(1, len(data.cells.perturbations)):
            total, _, n = data.sums(other, context)
            if other != perturbation and n >= MIN_CELLS:
                others.append(total / n - means.matched(batch[data.rows(other, context)]))
        name = data.cells.contexts[context]
        training = [e for e in self.training_effects if e.context == name] or self.training_effects
        return metrics.ConditionTruth(
            change=effect.change,
            control_mean=effect.control_mean,
            z=rank_sum_test(data.values[rows], data.values[reference], batch[rows], batch[reference]),
            is_target=data.is_target(perturbation),
            training_change=np.mean([e.change[data.genes] for e in training], axis=0),
            t=data.t_of(perturbation, context, rows, reference),
            others=np.array(others).reshape(len(others), data.genes.size),
        )

    @cached_property
    def space(self) -> tuple[NDArray[np.int64], Any]:
        """Variable genes and components of training cells that no prediction starts from."""
        rows = np.setdiff1d(self.split.train, self.split.source)
        rng = np.random.default_rng([self.split.seed, _STREAM])
        rows = rows if rows.size <= _MAX_CELLS_OF_COMPONENTS else rng.choice(rows, _MAX_CELLS_OF_COMPONENTS, False)
        values = sp.csr_matrix(self.data.values[np.sort(rows)])
        genes = variable_genes(values)
        return genes, fit_components(sp.csr_matrix(values[:, genes]), seed=self.split.seed)

    def points(self, values: sp.csr_matrix, shift: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
        """Project cells, shifted by a change."""
        genes, pca = self.space
        if pca is None:
            raise NotMeasurableError("there are too few training cells for components")
        rng = np.random.default_rng([self.split.seed, _STREAM, 1])
        if values.shape[0] > MAX_CELLS_OF_DISTANCE:
            values = values[np.sort(rng.choice(values.shape[0], MAX_CELLS_OF_DISTANCE, replace=False))]
        x = components_of(pca, sp.csr_matrix(values[:, genes])).astype(np.float64)
        return x if shift is None else x + shift[genes] @ pca.components_.T

    def e_distance(
        self, rows: NDArray[np.integer], predicted: sp.csr_matrix, shift: NDArray[np.float64] | None
    ) -> Score:
        """Return the energy distance of true cells to predicted ones."""
        return Score.of(
            lambda: energy_distance(self.points(sp.csr_matrix(self.data.values[rows])), self.points(predicted, shift))
        )


def _check(cells: PerturbedCells, split: Split) -> None:
    for name, rows in (("source", split.source), ("reference", split.reference)):
        if not cells.is_control[rows].all():
            raise ConfigError(
                f"perturbed cells among the {name} of {split.name}", expected="control cells", fix="check the split"
            )
    seen = np.intersect1d(split.reference, np.union1d(split.train, split.source))
    if seen.size:
        raise ConfigError(
            f"{seen.size} control cells of {split.name} are both seen and held out",
            expected="a reference that no predictor sees",
            fix="check the split",
        )


def _rows_of(
    judged: _Judged,
    chosen: Sequence[str],
    predictors: Mapping[str, Method],
    vocabulary: GeneVocabulary | None,
    corpus: NDArray[np.floating] | None,
    known: Mapping[str, Row],
    rows_path: Path | None,
) -> Iterator[Row]:
    split, data = judged.split, judged.data
    base: list[Any] = [_FORMAT, data.digest, split.kind, split.seed]
    base += [np.sort(rows).tolist() for rows in (split.train, split.source, split.reference)]
    of_split = row_key(*base)
    for name in (*chosen, CEILING):
        fingerprint = predictors[name].fingerprint if name in predictors else ""
        if name == CEILING:
            fingerprint = _CEILING_FORMAT
        if name in _CORPUS and corpus is not None:
            fingerprint = hashlib.sha256(np.nan_to_num(corpus).round(5).tobytes()).hexdigest()
        predictor: EffectPredictor | None = None
        seconds = 0.0
        for perturbation, context in judged.conditions:
            key = row_key(of_split, name, fingerprint, judged.name(perturbation, context))
            row = known.get(key)
            if row is None:
                started = time.perf_counter()
                if name == CEILING:
                    scores = _ceiling(judged, perturbation, context)
                else:
                    if predictor is None:
                        own = judged.components if name in _OF_NEW_PERTURBATIONS else None
                        predictor = fitted_predictor(data.cells, split, name, predictors, vocabulary, corpus, own)
                        seconds = (time.perf_counter() - started) / len(judged.conditions)
                        started = time.perf_counter()
                    scores = _judge(judged, predictor, perturbation, context)
                row = _row(judged, name, key, perturbation, context, scores, time.perf_counter() - started + seconds)
                if rows_path is not None:
                    append_row(rows_path, row.to_dict())
            yield row


def _row(
    judged: _Judged, method: str, key: str, perturbation: int, context: int, scores: Mapping[str, Score], seconds: float
) -> Row:
    data, truth = judged.data, judged.truth(perturbation, context)
    split = judged.split
    group = split.groups[split.conditions.index((perturbation, context))] if split.groups else split.kind
    return Row(
        kind=group.replace("_", " "),
        split=judged.split.name,
        seed=judged.split.seed,
        perturbation=data.cells.perturbations[perturbation].name,
        context=data.cells.contexts[context],
        method=method,
        key=key,
        scores={name: score.value for name, score in scores.items()},
        reasons={name: score.reason for name, score in scores.items() if score.reason},
        n_perturbed=int(judged.perturbed[perturbation, context].size),
        n_control=int(judged.control(context, "reference").size),
        n_significant=int(truth.is_significant.sum()),
        seconds=round(seconds, 3),
    )


def fitted_predictor(
    cells: PerturbedCells,
    split: Split,
    name: str,
    predictors: Mapping[str, Method],
    vocabulary: GeneVocabulary | None,
    corpus: NDArray[np.floating] | None,
    components: NDArray[np.floating] | None = None,
) -> EffectPredictor:
    """Return a predictor or baseline, fitted to the training cells of a split. Parameters as for the evaluation.

    ``components`` are the training cells' own gene features, if they are there already.
    """
    train = cells.take(split.train)
    if name in predictors:
        return predictors[name].make(split.seed).fit(train)
    made = baselines.make(name, vocabulary=vocabulary, corpus=corpus, seed=split.seed, components=components)
    return made.fit(train)


def predicted_change(predictor: EffectPredictor, cells: PerturbedCells, perturbation: int, context: int,
                     source: NDArray[np.integer]) -> NDArray[np.float64]:  # fmt: skip
    """Return a predictor's change over all genes, checked.

    Parameters
    ----------
    predictor
        A fitted one.
    cells
        All cells; the predictor is given those of ``source`` only.
    perturbation, context
        Codes.
    source
        Rows of control cells of the context.

    Raises
    ------
    ScdivaError
        The prediction has another shape, or is not finite.
    """
    given = cells.take(source)
    change = np.asarray(predictor.predict(cells.perturbations[perturbation], cells.contexts[context], given))
    if change.shape != (cells.cells.n_genes,) or not np.isfinite(change).all():
        raise ScdivaError(
            f"{type(predictor).__name__} predicted values of shape {change.shape}, not all finite or not one per gene",
            expected=f"{cells.cells.n_genes} finite numbers",
            fix="correct its predict",
        )
    return change.astype(np.float64)


def _judge(judged: _Judged, predictor: EffectPredictor, perturbation: int, context: int) -> dict[str, Score]:
    data, cells = judged.data, judged.data.cells
    source = judged.control(context, "source")
    change = predicted_change(predictor, cells, perturbation, context, source)[data.genes]
    control = sp.csr_matrix(data.values[source])
    made: CellCounts | None = None
    if hasattr(predictor, "predict_cells"):
        made = predictor.predict_cells(cells.perturbations[perturbation], cells.contexts[context], cells.take(source))
    z = None
    predicted = control
    shift: NDArray[np.float64] | None = change
    if made is not None:
        one = np.zeros(made.n_cells, dtype=np.int64)
        as_cells = PerturbedCells(made, cells.perturbations, one, ("",), one, ("",), one)
        predicted, shift = sp.csr_matrix(log_values(as_cells)[:, data.genes]), None
        z = rank_sum_test(predicted, control)
    scores = metrics.effect_scores(judged.truth(perturbation, context), change, z)
    scores["e_distance"] = judged.e_distance(judged.perturbed[perturbation, context], predicted, shift)
    return scores


def _ceiling(judged: _Judged, perturbation: int, context: int) -> dict[str, Score]:
    """Let one half of the held-out cells predict the other, from the source control cells; mean over random halves."""
    data, rows = judged.data, judged.perturbed[perturbation, context]
    batch = data.cells.batch_code
    source, reference = judged.control(context, "source"), judged.control(context, "reference")
    means = ControlMeans.of(data.values[source], batch[source])
    rng = np.random.default_rng([judged.split.seed, _STREAM, 2, perturbation, context])
    found: list[dict[str, Score]] = []
    for _ in range(N_HALVES):
        shuffled = rng.permutation(rows)
        ours, theirs = shuffled[: rows.size // 2], shuffled[rows.size // 2 :]
        predicted = mean_of(data.values[ours]) - means.matched(batch[ours])
        scores = metrics.effect_scores(judged.measured(perturbation, context, theirs, reference), predicted)
        scores["e_distance"] = judged.e_distance(theirs, sp.csr_matrix(data.values[ours]), None)
        found.append(scores)
    result = {}
    # what the whole truth leaves open has no ceiling either, whatever one half happens to show
    whole = metrics.effect_scores(judged.truth(perturbation, context), judged.truth(perturbation, context).change)
    for name in found[0]:
        if name in whole and whole[name].reason:
            result[name] = whole[name]
            continue
        values = [scores[name].value for scores in found if np.isfinite(scores[name].value)]
        reasons = [scores[name].reason for scores in found if scores[name].reason]
        result[name] = Score(float(np.mean(values)), "") if values else Score(float("nan"), reasons[0])
    return result


def gene_features(model: Any, vocabulary: GeneVocabulary) -> NDArray[np.float64]:
    """Return a native model's gene embeddings in the order of another vocabulary, NaN for genes that it lacks.

    Parameters
    ----------
    model
        A native scDiVa model.
    vocabulary
        Genes of the cells.

    Raises
    ------
    UnsupportedError
        The model has none.
    """
    anchor = getattr(getattr(model, "module", None), "anchor", None)
    if anchor is None or not hasattr(anchor, "gene_embedding"):
        raise UnsupportedError(
            f"{type(model).__name__} has no gene embeddings", expected="a native scDiVa model", fix="use --no-corpus"
        )
    own = anchor.gene_embedding.detach().cpu().numpy().astype(np.float64)
    position = {name: i for i, name in enumerate(model.vocabulary.ensembl_id.tolist())}
    rows = np.array([position.get(name, -1) for name in vocabulary.ensembl_id.tolist()])
    result = np.full((rows.size, own.shape[1]), np.nan)
    result[rows >= 0] = own[rows[rows >= 0]]
    return result


def our_predictors(model: ScDiVa) -> dict[str, Method]:
    """Return our methods for :func:`evaluate_perturbation`: fine-tuned on each split anew.

    Parameters
    ----------
    model
        A native model with a trunk, whose vocabulary is that of the cells.
    """
    from scdiva.tasks.fit_perturbation import FineTunedPredictor, PerturbationTraining

    def method(title: str, options: PerturbationTraining) -> Method:
        fingerprint = row_key(OUR_VERSION, model.bundle_hash or model.weights_hash(), asdict(options))
        return Method(lambda seed: FineTunedPredictor(model, options, seed), title, fingerprint)

    return {
        "scdiva": method("scDiVa", PerturbationTraining()),
        "scdiva_simple": method("scDiVa, simple predictors only", PerturbationTraining(network=False)),
    }
