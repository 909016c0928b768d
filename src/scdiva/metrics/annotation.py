"""How well predicted cell types agree with true ones: scores, calibration, open sets, intervals over cells.

docs/metrics.md has every definition. Intervals resample counts of (true type, predicted type), not cells: within a type
cells with the same prediction are exchangeable, so that drawing their numbers is the same bootstrap, and fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scdiva.errors import ConfigError, SourceError
from scdiva.metrics.generation_space import NotMeasurableError, Score

N_BINS = 15
"""Bins of the calibration error (Guo et al. 2017)."""
N_DRAWS = 1000
SMALLEST_PROBABILITY = 1e-12
"""Probabilities below count as this one in the likelihood: one certain error costs 27.6 nats, not infinity."""
_MAX_ENTRIES = 4_000_000  # per block of bootstrap draws; 32 MB of positions


@dataclass(frozen=True, slots=True)
class ClassScores:
    """One type.

    Parameters
    ----------
    label
        The type.
    precision
        Share of cells called so that are so; 0 where none is called so.
    recall
        Share of its cells that are called so.
    f1
        Harmonic mean of both.
    support
        Number of its cells.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int


@dataclass(frozen=True, slots=True)
class Confusion:
    """Numbers of cells by true and predicted type.

    Parameters
    ----------
    truth
        ``(n_true,)`` types present in the truth, sorted: the rows.
    predicted
        ``(n_predicted,)`` the same types in the same order, then those that were only predicted, sorted: the columns.
    counts
        ``(n_true, n_predicted)`` int64.
    """

    truth: NDArray[np.str_]
    predicted: NDArray[np.str_]
    counts: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AnnotationScores:
    """Agreement of predicted with true types.

    Parameters
    ----------
    n_cells
        Number of cells.
    n_outside
        Cells called something that no cell truly is, "unknown" included. They count as wrong; the words that they are
        called by are not among the types that the means are over.
    accuracy
        Share of cells called right.
    balanced_accuracy, macro_f1
        Mean recall, mean F1 over the types present in the truth.
    classes
        The types one by one, sorted.
    confusion
        Numbers of cells.
    calibration_error, negative_log_likelihood
        Of the probabilities, if any were given; see :func:`expected_calibration_error` and
        :func:`negative_log_likelihood`. They judge the most probable type, which need not be the prediction (a
        prediction may abstain). The likelihood is over cells whose type is among the classes.
    n_unknown_truth
        Cells whose true type is not among the classes of the probabilities (0 without probabilities): the most probable
        type is wrong for them, and the likelihood leaves them out.
    """

    n_cells: int
    n_outside: int
    accuracy: float
    balanced_accuracy: float
    macro_f1: float
    classes: tuple[ClassScores, ...]
    confusion: Confusion
    calibration_error: Score
    negative_log_likelihood: Score
    n_unknown_truth: int


def annotation_scores(
    truth: ArrayLike,
    predicted: ArrayLike,
    probabilities: ArrayLike | None = None,
    classes: ArrayLike | None = None,
) -> AnnotationScores:
    """Score predicted types.

    Parameters
    ----------
    truth, predicted
        ``(n_cells,)`` types.
    probabilities
        ``(n_cells, n_classes)``; rows sum to 1.
    classes
        ``(n_classes,)`` the types that columns of ``probabilities`` stand for.

    Raises
    ------
    SourceError
        No cells, missing labels, or lengths that differ.
    ConfigError
        Probabilities without classes, of another shape, or that are none.
    """
    confusion = confusion_of(truth, predicted)
    counts = confusion.counts
    n_types, n_cells = len(counts), int(counts.sum())
    support, n_called = counts.sum(axis=1), counts.sum(axis=0)[:n_types]
    n_right = np.diagonal(counts)
    recall, f1 = n_right / support, 2 * n_right / (support + n_called)
    precision = np.divide(n_right, n_called, out=np.zeros(n_types), where=n_called > 0)
    columns = confusion.truth, precision, recall, f1, support
    without = Score(float("nan"), "no probabilities were given")
    error, likelihood, n_unknown = without, without, 0
    if probabilities is not None:
        if classes is None:
            raise ConfigError(
                "probabilities without classes", expected="the type of each column", fix="give classes=..."
            )
        true = _labels(truth, "truth")
        p, names = _probabilities(probabilities, classes, true.size)
        is_right = names[p.argmax(axis=1)] == true
        is_known = np.isin(true, names)
        n_unknown = int((~is_known).sum())
        error = Score(expected_calibration_error(p.max(axis=1), is_right).error)
        likelihood = (
            Score(negative_log_likelihood(true[is_known], p[is_known], names))
            if is_known.any()
            else Score(float("nan"), "no true type is among the classes")
        )
    return AnnotationScores(
        n_cells=n_cells,
        n_outside=int(counts[:, n_types:].sum()),
        accuracy=float(n_right.sum() / n_cells),
        balanced_accuracy=float(recall.mean()),
        macro_f1=float(f1.mean()),
        classes=tuple(
            ClassScores(str(name), float(p_), float(r), float(f), int(n))
            for name, p_, r, f, n in zip(*columns, strict=True)
        ),
        confusion=confusion,
        calibration_error=error,
        negative_log_likelihood=likelihood,
        n_unknown_truth=n_unknown,
    )


def confusion_of(truth: ArrayLike, predicted: ArrayLike) -> Confusion:
    """Count cells by true and predicted type.

    Parameters
    ----------
    truth, predicted
        ``(n_cells,)`` types.

    Raises
    ------
    SourceError
        No cells, missing labels, or lengths that differ.
    """
    true, called = _pair(truth, predicted)
    rows, row = np.unique(true, return_inverse=True)
    columns = np.concatenate([rows, np.setdiff1d(called, rows)])
    column = _position(called, columns)
    counts = np.bincount(row * columns.size + column, minlength=rows.size * columns.size)
    return Confusion(rows, columns, counts.reshape(rows.size, columns.size))


def merge_labels(labels: ArrayLike, mapping: Mapping[str, str]) -> NDArray[np.str_]:
    """Give several types one name, for a score at a coarser level: truth and prediction with the same mapping.

    Parameters
    ----------
    labels
        ``(n_cells,)`` types.
    mapping
        New name by old; types that it does not name stay as they are. It is applied once: a new name that is itself an
        old one is not mapped further.

    Returns
    -------
    numpy.ndarray
        ``(n_cells,)``.
    """
    names, inverse = np.unique(_labels(labels, "labels"), return_inverse=True)
    return np.array([mapping.get(str(name), str(name)) for name in names])[inverse]


@dataclass(frozen=True, slots=True)
class Reliability:
    """How often a classifier is right, by how sure it is.

    Parameters
    ----------
    error
        Expected calibration error: mean over cells of the gap between confidence and accuracy of the cell's bin.
    edges
        ``(n_bins + 1,)`` bins are (low, high], the first with its lower edge.
    n_cells
        ``(n_bins,)`` cells in each bin.
    confidence, accuracy
        ``(n_bins,)`` means; NaN in empty bins, which add nothing to the error.
    """

    error: float
    edges: NDArray[np.float64]
    n_cells: NDArray[np.int64]
    confidence: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def expected_calibration_error(confidence: ArrayLike, is_correct: ArrayLike, n_bins: int = N_BINS) -> Reliability:
    """Compare confidence with accuracy in bins of equal width (Guo et al. 2017); 0 is calibrated.

    Parameters
    ----------
    confidence
        ``(n_cells,)`` probability of what was predicted, 0 to 1.
    is_correct
        ``(n_cells,)`` whether it was right.
    n_bins
        Number of bins.

    Raises
    ------
    ConfigError
        Confidence outside of 0 to 1, no cells, or lengths that differ.
    """
    sure, right = np.asarray(confidence, dtype=np.float64), np.asarray(is_correct, dtype=bool)
    if sure.ndim != 1 or sure.shape != right.shape or sure.size == 0 or n_bins < 1:
        raise ConfigError(
            f"confidence of shape {sure.shape}, is_correct of shape {right.shape}, {n_bins} bins",
            expected="one number and one truth value per cell, at least one cell and one bin",
            fix="give both for the same cells",
        )
    if not ((sure >= 0) & (sure <= 1 + 1e-6)).all():
        raise ConfigError(
            f"confidence from {sure.min():.4g} to {sure.max():.4g}", expected="0 to 1", fix="give probabilities"
        )
    edges = np.linspace(0, 1, n_bins + 1)
    bin_of = np.clip(np.searchsorted(edges, sure, side="left") - 1, 0, n_bins - 1)
    n = np.bincount(bin_of, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        mean_sure = np.bincount(bin_of, weights=sure, minlength=n_bins) / n
        mean_right = np.bincount(bin_of, weights=right, minlength=n_bins) / n
    gap = np.where(n > 0, np.abs(mean_sure - mean_right), 0.0)
    return Reliability(float((n * gap).sum() / n.sum()), edges, n, mean_sure, mean_right)


def negative_log_likelihood(truth: ArrayLike, probabilities: ArrayLike, classes: ArrayLike) -> float:
    """Return the mean of -log(probability of the true type), nats per cell; 0 is perfect, log(n_classes) a guess.

    Parameters
    ----------
    truth
        ``(n_cells,)`` types.
    probabilities
        ``(n_cells, n_classes)``; those below 1e-12 count as 1e-12.
    classes
        ``(n_classes,)`` the types of the columns.

    Raises
    ------
    SourceError
        A true type is not among the classes: no probability was given to it.
    ConfigError
        Probabilities of another shape, or that are none.
    """
    true = _labels(truth, "truth")
    p, names = _probabilities(probabilities, classes, true.size)
    if (unknown := np.setdiff1d(true, names)).size:
        raise SourceError(
            f"true types without a probability: {', '.join(unknown[:5])}",
            expected="every true type among the classes",
            fix="leave the cells of these types out",
        )
    of_truth = p[np.arange(true.size), _position(true, names)]
    return float(-np.log(np.maximum(of_truth, SMALLEST_PROBABILITY)).mean())


def open_set_auroc(score_known: ArrayLike, score_unknown: ArrayLike) -> float:
    """Probability that a cell of a known type is given a higher score than one of an unseen type; 0.5 is chance.

    Parameters
    ----------
    score_known, score_unknown
        ``(n_known,)`` and ``(n_unknown,)``: the higher, the surer that the type is a known one (a confidence, or minus
        a distance). Ties count half.

    Raises
    ------
    NotMeasurableError
        No cells on one side.
    """
    from scipy.stats import rankdata

    known, unknown = (np.asarray(a, dtype=np.float64).ravel() for a in (score_known, score_unknown))
    if known.size == 0 or unknown.size == 0:
        raise NotMeasurableError(f"needs known and unknown cells, found {known.size} and {unknown.size}")
    if np.isnan(known).any() or np.isnan(unknown).any():
        raise NotMeasurableError("some scores are NaN")
    ranks = rankdata(np.concatenate([known, unknown]))[: known.size]
    return float((ranks.sum() - known.size * (known.size + 1) / 2) / (known.size * unknown.size))


@dataclass(frozen=True, slots=True)
class Interval:
    """A number with a percentile bootstrap interval over cells.

    Parameters
    ----------
    value
        On all cells.
    low, high
        Ends of the interval.
    level
        Its coverage.
    """

    value: float
    low: float
    high: float
    level: float

    @property
    def is_zero_inside(self) -> bool:
        """Whether 0 lies in the interval: of a difference, whether the two cannot be told apart."""
        return self.low <= 0 <= self.high


def bootstrap_interval(
    values: ArrayLike | Callable[[NDArray[np.int64]], float],
    *,
    rng: np.random.Generator,
    n_cells: int | None = None,
    strata: ArrayLike | None = None,
    n_draws: int = N_DRAWS,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap over cells of a mean, or of any function of cells.

    The only uncertainty is that of the cells drawn: not of training, nor of donors. Scores that are functions of
    (true type, predicted type) are faster with :func:`annotation_intervals`.

    Parameters
    ----------
    values
        ``(n_cells,)`` a number per cell, whose mean is asked for; or a function of rows (positions, with repetition).
    rng
        Source of randomness.
    n_cells
        Number of cells; needed with a function.
    strata
        ``(n_cells,)`` groups whose sizes stay as they are (types, for means over types).
    n_draws, level
        Bootstrap draws, and coverage.

    Raises
    ------
    ConfigError
        A function without ``n_cells``, no cells, or strata of another length.
    """
    is_function = callable(values)
    array = np.empty(0) if is_function else np.asarray(values, dtype=np.float64)
    n = n_cells if is_function else array.size
    if not n or (not is_function and n_cells not in (None, n)):
        raise ConfigError(
            f"{'a function' if is_function else f'{array.size} values'} and n_cells={n_cells}",
            expected="at least one cell; with a function the number of cells",
            fix="give n_cells=...",
        )
    _check_draws(n_draws, level)
    groups = [np.arange(n)] if strata is None else _groups(_labels(strata, "strata"), n)
    draws = np.empty(n_draws)
    block = max(1, _MAX_ENTRIES // n)
    for start in range(0, n_draws, block):
        size = min(block, n_draws - start)
        rows = np.concatenate([group[rng.integers(group.size, size=(size, group.size))] for group in groups], axis=1)
        if callable(values):
            draws[start : start + size] = [values(row) for row in rows]
        else:
            draws[start : start + size] = array[rows].mean(axis=1)
    value = float(values(np.arange(n))) if callable(values) else float(array.mean())
    return _interval(value, draws, level)


@dataclass(frozen=True, slots=True)
class AnnotationIntervals:
    """Scores, or differences of scores, with intervals over cells.

    Parameters
    ----------
    accuracy, balanced_accuracy, macro_f1
        As in :class:`AnnotationScores`.
    """

    accuracy: Interval
    balanced_accuracy: Interval
    macro_f1: Interval


def annotation_intervals(
    truth: ArrayLike, predicted: ArrayLike, *, rng: np.random.Generator, n_draws: int = N_DRAWS, level: float = 0.95
) -> AnnotationIntervals:
    """Percentile bootstrap over cells, each type with as many cells as it has.

    Without that, draws lose rare types, and macro-F1 is a mean over other types each time. A type of few cells has a
    wide interval of its own, which is part of that of the mean.

    Parameters
    ----------
    truth, predicted
        ``(n_cells,)`` types.
    rng
        Source of randomness.
    n_draws, level
        Bootstrap draws, and coverage.
    """
    _check_draws(n_draws, level)
    true, called = _pair(truth, predicted)
    drawn = _resample(true, (called,), rng, n_draws)[0]
    value = _resample(true, (called,), None, 1)[0]
    return AnnotationIntervals(
        *(_interval(float(v[0]), d, level) for v, d in zip(_summary(value), _summary(drawn), strict=True))
    )


def paired_bootstrap(
    truth: ArrayLike,
    ours: ArrayLike,
    other: ArrayLike,
    *,
    rng: np.random.Generator,
    n_draws: int = N_DRAWS,
    level: float = 0.95,
) -> AnnotationIntervals:
    """Difference of two methods' scores, ours minus other, on the same cells; resampled as one.

    Parameters
    ----------
    truth, ours, other
        ``(n_cells,)`` true types, and those that the two methods predict.
    rng
        Source of randomness.
    n_draws, level
        Bootstrap draws, and coverage; cells of each type stay as many as they are.
    """
    _check_draws(n_draws, level)
    true, first = _pair(truth, ours)
    _, second = _pair(truth, other)
    drawn = _resample(true, (first, second), rng, n_draws)
    value = _resample(true, (first, second), None, 1)
    differences = [
        (float(a[0] - b[0]), c - d)
        for a, b, c, d in zip(*map(_summary, (value[0], value[1], drawn[0], drawn[1])), strict=True)
    ]
    return AnnotationIntervals(*(_interval(v, d, level) for v, d in differences))


@dataclass(frozen=True, slots=True)
class _Tally:
    """What accuracies and F1 are made of: ``support (K,)``, ``n_right (D, K)``, ``n_called (D, K)`` of D draws."""

    support: NDArray[np.int64]
    n_right: NDArray[np.int64]
    n_called: NDArray[np.int64]


def _resample(
    true: NDArray[np.str_], called: tuple[NDArray[np.str_], ...], rng: np.random.Generator | None, n_draws: int
) -> tuple[_Tally, ...]:
    """Draw within each type how many cells have each combination of predictions; the numbers themselves without rng."""
    types, kind = np.unique(true, return_inverse=True)
    # position of the predicted type among the true ones; one place more for all others, which are only ever wrong
    codes = np.stack([_position(c, types, missing=types.size) for c in called], axis=1)
    support = np.bincount(kind)
    tallies = tuple(
        _Tally(support, np.zeros((n_draws, types.size), np.int64), np.zeros((n_draws, types.size + 1), np.int64))
        for _ in called
    )
    for k in range(types.size):
        combinations, n = np.unique(codes[kind == k], axis=0, return_counts=True)
        drawn = n[None, :] if rng is None else rng.multinomial(support[k], n / support[k], size=n_draws)
        for tally, column in zip(tallies, combinations.T, strict=True):
            tally.n_right[:, k] = drawn[:, column == k].sum(axis=1)
            for code in np.unique(column):
                tally.n_called[:, code] += drawn[:, column == code].sum(axis=1)
    return tallies


def _summary(tally: _Tally) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return accuracy, balanced accuracy and macro-F1 of each draw, ``(D,)``."""
    n_called = tally.n_called[:, :-1]
    f1 = 2 * tally.n_right / (tally.support + n_called)
    accuracy = tally.n_right.sum(axis=1) / tally.support.sum()
    return accuracy, (tally.n_right / tally.support).mean(axis=1), f1.mean(axis=1)


def _interval(value: float, draws: NDArray[np.float64], level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level)


def _check_draws(n_draws: int, level: float) -> None:
    if n_draws < 1 or not 0 < level < 1:
        raise ConfigError(
            f"n_draws={n_draws}, level={level}",
            expected="at least one draw, a level between 0 and 1",
            fix="change them",
        )


def _groups(strata: NDArray[np.str_], n_cells: int) -> list[NDArray[np.int64]]:
    if strata.size != n_cells:
        raise ConfigError(
            f"{strata.size} strata for {n_cells} cells", expected="one per cell", fix="give those of the same cells"
        )
    _, group = np.unique(strata, return_inverse=True)
    return np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1])


def _labels(labels: ArrayLike, name: str) -> NDArray[np.str_]:
    """Return labels as strings; refuse missing ones, which would be a type called "nan"."""
    import pandas as pd

    # before NumPy makes strings of a mixture
    n_missing = int(pd.isna(np.asarray(labels, dtype=object)).sum())
    array = np.asarray(labels)
    if array.ndim != 1 or n_missing:
        raise SourceError(
            f"{name} of shape {array.shape}, {n_missing} missing",
            expected="one label per cell",
            fix="leave cells without a label out",
        )
    return array.astype(str)


def _pair(truth: ArrayLike, predicted: ArrayLike) -> tuple[NDArray[np.str_], NDArray[np.str_]]:
    true, called = _labels(truth, "truth"), _labels(predicted, "predicted")
    if true.size != called.size or true.size == 0:
        raise SourceError(
            f"{true.size} true and {called.size} predicted types",
            expected="one of each for every cell, at least one cell",
            fix="give both for the same cells",
        )
    return true, called


def _probabilities(
    probabilities: ArrayLike, classes: ArrayLike, n_cells: int
) -> tuple[NDArray[np.float64], NDArray[np.str_]]:
    p, names = np.asarray(probabilities, dtype=np.float64), _labels(classes, "classes")
    if p.shape != (n_cells, names.size) or np.unique(names).size != names.size:
        raise ConfigError(
            f"probabilities of shape {p.shape} for {n_cells} cells and {names.size} classes",
            expected="one row per cell, one column per class, no class twice",
            fix="give the classes in the order of the columns",
        )
    # float16 and float32 probabilities sum to 1 only roughly
    if not (p >= 0).all() or not np.allclose(p.sum(axis=1), 1, atol=1e-2):
        raise ConfigError(
            "rows that do not sum to 1, or negative entries",
            expected="probabilities",
            fix="apply a softmax to logits",
        )
    return p, names


def _position(labels: NDArray[np.str_], among: NDArray[np.str_], *, missing: int = -1) -> NDArray[np.int64]:
    """Return where each label is in ``among`` (in any order), or ``missing``."""
    names, inverse = np.unique(labels, return_inverse=True)
    place = {str(name): i for i, name in enumerate(among)}
    return np.array([place.get(str(name), missing) for name in names], dtype=np.int64)[inverse]
