"""Logistic regressions on a frozen model, aligned with the cells that they are to annotate.

How large z stands beside the data's own components, the penalty, and whether regressions on other features decide as
well, are chosen by cross-validation on the reference (our decision; docs/experiments.md).

Shape letters: N cells, K classes, F features, Z latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.models.annotators.calibration import (
    FALSE_UNKNOWN_RATE,
    TINY,
    Calibration,
    Calls,
    HeldOut,
    log_softmax,
    softmax,
    temperature_of,
    temperature_of_mean,
)
from scdiva.models.annotators.features import (
    Features,
    Regression,
    class_distance,
    class_means,
    class_shape,
    joint_features,
    some_of_each,
)
from scdiva.types import CellCounts

N_FOLDS = 5

CANDIDATES: tuple[tuple[str, ...], ...] = (("joint",), ("joint", "genes"), ("model", "own", "genes"))
"""Sets of regressions among which cross-validation chooses; several of them give the geometric mean."""
LATENT_SIZES = (0.0, 1.5, 3.0)
PENALTIES = (0.1, 0.03, 0.3, 1.0)
"""Inverse penalties (scikit-learn's C) of the joint regression; the size of z is chosen with the first one."""
FEW_CELLS = 10
"""Median cells per class below which "joint" is the only candidate."""
FEW_FOR_SELF_TRAINING = 20
_C = {"model": 0.1, "own": 0.1, "genes": 0.3}
_CHOICE_CELLS = 2_000
"""More cells than that have no part in the choice of size and penalty."""
_CHOICE_TOLERANCE = 1e-3
"""Regressions that only choose size and penalty: a tenth of the precision, in half the time."""
_KEPT_PER_CLASS = 200
_SURE = 0.7
_ALIGNMENT_ROUNDS = 5
_MOSTLY = 0.5
"""Share of unknown cells above which a set is not aligned."""
_SELF_TRAINING_ROUNDS = 3
_SELF_TRAINING_SHARE = 0.7
_SELF_TRAINING_C = 0.1
"""Fixed: a penalty that suits a handful of cells does not suit thousands of calls."""


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """Logistic regressions on a frozen model.

    Parameters
    ----------
    features
        What they read.
    regressions
        By name of their features.
    class_mean
        ``(K, F)`` means of the joint features; NaN for classes without a cell.
    class_logit
        ``(K, K)`` of each regression: mean log-odds (unnormalised) of the cells of each class, without the intercept;
        NaN for classes without a cell.
    whitening
        ``(F, F)``: distances from class means are Mahalanobis distances with the pooled covariance within classes.
    calibration
        From cross-validation.
    kept, kept_code
        Joint features of up to 200 cells of each class, for :meth:`aligned` and :meth:`self_trained`.
    penalty
        C of the joint regression.
    loss
        Cross-validated nats per cell of each candidate.
    held_out
        What folds say of cells that they do not hold; None if it was loaded, or no cell could be held out.
    """

    features: Features
    regressions: Mapping[str, Regression]
    class_mean: NDArray[np.float32]
    class_logit: Mapping[str, NDArray[np.float64]]
    whitening: NDArray[np.float32]
    calibration: Calibration
    kept: NDArray[np.float32]
    kept_code: NDArray[np.integer]
    penalty: float = 1.0
    loss: Mapping[str, float] = field(default_factory=dict)
    held_out: HeldOut | None = field(default=None, repr=False)
    method: str = "probe"

    @classmethod
    def fit(
        cls,
        cells: CellCounts,
        z: NDArray[np.float32],
        code: NDArray[np.integer],
        n_classes: int,
        *,
        seed: int,
        is_balanced: bool = False,
        false_unknown_rate: float = FALSE_UNKNOWN_RATE,
        unlabelled: tuple[CellCounts, NDArray[np.float32]] | None = None,
    ) -> Self:
        """Fit to a labelled reference.

        Parameters
        ----------
        cells, z
            The reference and its embedding.
        code
            ``(N,)`` classes.
        n_classes
            K.
        seed
            Seed of components and folds.
        is_balanced
            Whether each class has the same weight, however many cells it has.
        false_unknown_rate
            As in :meth:`Calibration.fit`.
        unlabelled
            Further cells and their embedding, which help to choose variable genes and components: five labelled cells
            of each type tell nothing of either.
        """
        code = np.asarray(code, dtype=np.int32)
        features = Features.fit((cells, z), *([] if unlabelled is None else [unlabelled]), seed=seed)
        x = features.of(cells, z)
        sizes = np.bincount(code, minlength=n_classes)
        weight = (code.size / (sizes > 0).sum() / np.maximum(sizes, 1))[code] if is_balanced else None
        fold = _folds(code, np.random.default_rng([seed, 1]))
        rows = np.sort(np.random.default_rng([seed, 4]).permutation(code.size)[:_CHOICE_CELLS])
        size, penalty = _chosen_size(
            x["model"][rows],
            x["own"][rows],
            code[rows],
            n_classes,
            fold[rows],
            None if weight is None else weight[rows],
        )
        features = replace(features, latent_size=size)
        x["joint"] = joint_features(x["model"], x["own"], size)
        c = {**_C, "joint": penalty}
        has_choice = float(np.median(sizes[sizes > 0])) >= FEW_CELLS
        candidates = CANDIDATES if has_choice else CANDIDATES[:1]
        names = tuple(dict.fromkeys(name for candidate in candidates for name in candidate))
        is_judged = fold >= 0
        out = {name: _held_out(x[name], code, n_classes, fold, weight, c[name]) for name in names}
        loss: dict[str, float] = {}
        best = candidates[0]
        for candidate in candidates if is_judged.any() else ():
            loss["+".join(candidate)] = _nll(
                np.mean([out[name][is_judged] for name in candidate], axis=0), code[is_judged]
            )
            best = candidate if loss["+".join(candidate)] <= min(loss.values()) else best
        calibration, held_out = Calibration.none(), None
        if is_judged.any():
            distance = np.full(code.size, np.nan)
            for train, test in _parts(fold):
                shape = class_shape(x["joint"][train], code[train], n_classes)
                distance[test] = class_distance(x["joint"][test], *shape)
            together = np.full((code.size, n_classes), np.nan)
            together[is_judged] = log_softmax(np.mean([out[name][is_judged] for name in best], axis=0))
            held_out = HeldOut(together, distance)
            calibration = Calibration.fit_held_out(held_out, code, false_unknown_rate=false_unknown_rate)
        regressions = {name: Regression.fit(x[name], code, n_classes, weight, c[name]) for name in best}
        class_logit = {
            name: class_means(np.asarray(x[name] @ fitted.coef), code, n_classes)
            for name, fitted in regressions.items()
        }
        mean, whitening = class_shape(x["joint"], code, n_classes)
        if "genes" not in best:  # nothing reads them: no file with a missing gene has to be filled in
            none = np.empty(0, dtype=np.int64)
            features = replace(features, detected=none, detected_mean=none.astype(np.float32))
        kept = some_of_each(code, _KEPT_PER_CLASS, np.random.default_rng([seed, 2]))
        return cls(
            features,
            regressions,
            mean,
            class_logit,
            whitening,
            calibration,
            x["joint"][kept],
            code[kept],
            penalty,
            loss,
            held_out,
        )

    @property
    def n_classes(self) -> int:
        """K."""
        return int(self.class_mean.shape[0])

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells."""
        return self._calls(self.features.of(cells, z))

    def said(self, x: Mapping[str, Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return log-probabilities before calibration, ``(N, K)``, and distances from the nearest class, ``(N,)``.

        Parameters
        ----------
        x
            What :meth:`Features.of` made of the cells.
        """
        return self._log_probability(x), class_distance(x["joint"], self.class_mean, self.whitening)

    def adapted(self, cells: CellCounts, z: NDArray[np.float32], *, learns: bool) -> Self:
        """Return the probe, aligned with other cells; with ``learns`` also trained further on its own calls."""
        return self.self_trained(cells, z) if learns else self.aligned(cells, z)

    def _calls(self, x: Mapping[str, Any]) -> Calls:
        return self.calibration.calls(*self.said(x))

    def _log_probability(self, x: Mapping[str, Any]) -> NDArray[np.float64]:
        return log_softmax(
            np.mean([fitted.log_probability(x[name]) for name, fitted in self.regressions.items()], axis=0)
        )

    def aligned(self, cells: CellCounts, z: NDArray[np.float32]) -> Self:
        """Return the probe, moved to where other cells are: those of another laboratory are shifted.

        The shift is the mean over classes of the difference between the class means of the cells that the probe is
        sure of and those of the reference; not the difference of overall means, which composition would decide. Classes
        count by the harmonic mean of their cells on both sides (at most 200 of the reference). It is shrunk by how much
        classes disagree on it (positive-part James-Stein, whitened within classes), which leaves cells of the
        reference's own laboratory as they are. To a linear regression a shift is a change of its intercepts: nothing
        else is changed, but for the class means that novelty is measured from. Five rounds of calls and shifts. Where
        more than half of the cells are unknown even so, they are not the reference's types elsewhere, and the probe
        stays what it was; also where fewer than two classes are found. Our decision; docs/experiments.md.

        Parameters
        ----------
        cells, z
            Unlabelled cells of the set that will be annotated, and their embedding.
        """
        return self._aligned(self.features.of(cells, z))

    def _aligned(self, x: Mapping[str, Any]) -> Self:
        k = self.n_classes
        logit = {name: np.asarray(x[name] @ fitted.coef) for name, fitted in self.regressions.items()}
        n = np.bincount(self.kept_code, minlength=k)
        probe = self
        for _ in range(_ALIGNMENT_ROUNDS):
            probability = softmax(probe._log_probability(x) / self.calibration.temperature)
            sure, code = probability.max(axis=1) > _SURE, probability.argmax(axis=1)
            m = np.bincount(code[sure], minlength=k)
            is_in_both = (n > 0) & (m > 0)
            if is_in_both.sum() < 2:
                return self
            # the classes of the query are further ones, with means of their own
            both = np.concatenate([self.kept, x["joint"][sure]])
            mean, whitening = class_shape(both, np.concatenate([self.kept_code, k + code[sure]]), 2 * k)
            harmonic = 1.0 / (1.0 / n[is_in_both] + 1.0 / m[is_in_both])
            share = harmonic / harmonic.sum()
            shifts = (mean[k:] - mean[:k])[is_in_both]
            shift = share @ shifts
            kept_part = _kept_part(shifts @ whitening, share)
            if kept_part == 0:
                return self
            moved = {}
            for name, fitted in self.regressions.items():
                there = class_means(logit[name][sure], code[sure], k)
                offset = kept_part * (share @ (there - self.class_logit[name])[is_in_both])
                moved[name] = replace(fitted, intercept=(fitted.intercept - offset).astype(np.float32))
            class_mean = (self.class_mean + kept_part * shift).astype(np.float32)
            probe = replace(self, regressions=moved, class_mean=class_mean)
        novelty = probe._calls(x).novelty
        return self if (novelty > self.calibration.threshold).mean() > _MOSTLY else probe

    def self_trained(self, cells: CellCounts, z: NDArray[np.float32]) -> Self:
        """Return the probe, aligned (if it can be), and trained further on its own calls of unlabelled cells.

        Three rounds, each on the most probable 70 % of the cells of each predicted class, so that no class is lost
        for being less sure than others; a cell counts as much as its probability. For references of few cells (our
        decision; docs/experiments.md). A probe that learns from its own calls grows surer of them and not as much
        better: its temperature is set anew, so that its mean confidence on these cells stays what it was.

        Parameters
        ----------
        cells, z
            As for :meth:`aligned`.
        """
        x = self.features.of(cells, z)
        return self._self_trained(x, self._aligned(x))

    def _self_trained(self, x: Mapping[str, Any], aligned: Self) -> Self:
        fitted, temperature = trained_on_calls(
            self.kept,
            self.kept_code,
            x["joint"],
            aligned._log_probability(x) / self.calibration.temperature,
            self.n_classes,
        )
        return replace(
            aligned,
            regressions={"joint": fitted},
            class_logit={"joint": class_means(self.kept @ fitted.coef, self.kept_code, self.n_classes)},
            calibration=replace(self.calibration, temperature=temperature),
        )

    def both(self, cells: CellCounts, z: NDArray[np.float32]) -> tuple[Self, Self]:
        """Return :meth:`aligned` and :meth:`self_trained`."""
        x = self.features.of(cells, z)
        aligned = self._aligned(x)
        return aligned, self._self_trained(x, aligned)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        regressions = {
            f"{part}_{name}": getattr(fitted, part)
            for name, fitted in self.regressions.items()
            for part in ("coef", "intercept")
        }
        regressions |= {f"class_logit_{name}": value for name, value in self.class_logit.items()}
        own = {
            "class_mean": self.class_mean,
            "whitening": self.whitening,
            "kept": self.kept,
            "penalty": np.array(self.penalty),
        }
        loss = {"loss_names": np.array(list(self.loss), dtype=str), "loss": np.array(list(self.loss.values()))}
        return {
            **self.features.arrays(), **regressions, **own, **loss, "kept_code": self.kept_code,
            **self.calibration.arrays(),
        }  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Read what :meth:`arrays` returned."""
        names = [name.removeprefix("coef_") for name in arrays if name.startswith("coef_")]
        regressions = {name: Regression(arrays[f"coef_{name}"], arrays[f"intercept_{name}"]) for name in names}
        return cls(
            Features.from_arrays(arrays),
            regressions,
            arrays["class_mean"],
            {name: arrays[f"class_logit_{name}"] for name in names},
            arrays["whitening"],
            Calibration.from_arrays(arrays),
            arrays["kept"],
            arrays["kept_code"],
            float(arrays["penalty"]),
            dict(zip(arrays["loss_names"].tolist(), arrays["loss"].tolist(), strict=True)),
        )


def _parts(fold: NDArray[np.integer]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return positions of training and of held-out cells of each fold that has any."""
    return [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in range(N_FOLDS) if (fold == i).any()]


def _held_out(
    x: Any,
    code: NDArray[np.integer],
    n_classes: int,
    fold: NDArray[np.integer],
    weight: NDArray[np.floating] | None,
    c: float,
    *,
    tolerance: float = 1e-4,
) -> NDArray[np.float64]:
    """Log-probabilities of cells that had no part in them, ``(N, K)``; NaN for cells of no fold."""
    out = np.full((code.size, n_classes), np.nan)
    for train, test in _parts(fold):
        weights = None if weight is None else weight[train]
        fitted = Regression.fit(x[train], code[train], n_classes, weights, c, tolerance=tolerance)
        out[test] = fitted.log_probability(x[test])
    return out


def _nll(log_probability: NDArray[np.floating], code: NDArray[np.integer]) -> float:
    """Nats per cell at the best temperature."""
    normal = log_softmax(log_probability)
    sharp = log_softmax(normal / temperature_of(normal, code))
    return float(-sharp[np.arange(code.size), code].mean())


def _chosen_size(
    model: NDArray[np.float32],
    own: NDArray[np.float32],
    code: NDArray[np.integer],
    n_classes: int,
    fold: NDArray[np.integer],
    weight: NDArray[np.floating] | None,
) -> tuple[float, float]:
    """Return the size of z and then the penalty that make held-out cells most probable.

    Also with five cells of each class: whether z, components or both tell these types apart shows in a handful of
    cells. Where no cell can be held out, the largest of both.
    """
    # of a part of the reference: a cell whose class is in no other fold of it would be judged by a class never seen
    table = np.zeros((n_classes, N_FOLDS), dtype=np.int64)
    np.add.at(table, (code[fold >= 0], fold[fold >= 0]), 1)
    judged = (fold >= 0) & ((table > 0).sum(axis=1) > 1)[code]
    if not judged.any():
        return LATENT_SIZES[-1], PENALTIES[-1]

    def loss(size: float, c: float) -> float:
        x = joint_features(model, own, size)
        found = _held_out(x, code, n_classes, fold, weight, c, tolerance=_CHOICE_TOLERANCE)
        return _nll(found[judged], code[judged])

    sizes = {size: loss(size, PENALTIES[0]) for size in LATENT_SIZES}
    size = min(sizes, key=lambda value: sizes[value])
    penalties = {PENALTIES[0]: sizes[size], **{c: loss(size, c) for c in PENALTIES[1:]}}
    return size, min(penalties, key=lambda value: penalties[value])


def _kept_part(shifts: NDArray[np.floating], share: NDArray[np.floating]) -> float:
    """How much of the classes' mean shift is common to them, between 0 and 1.

    Parameters
    ----------
    shifts
        ``(C, F)`` shifts of classes, whitened.
    share
        ``(C,)`` weights; their sum is 1.
    """
    mean = share @ shifts
    # the variance of the weighted mean, from the spread of the classes around it
    chance = (share**2 * ((shifts - mean) ** 2).sum(axis=1)).sum() / max(1.0 - float((share**2).sum()), TINY)
    return float(max(0.0, 1.0 - chance / max(float((mean**2).sum()), TINY)))


def trained_on_calls(
    kept: NDArray[np.float32],
    kept_code: NDArray[np.integer],
    x: NDArray[np.float32],
    log_probability: NDArray[np.float64],
    n_classes: int,
) -> tuple[Regression, float]:
    """Train a regression on labelled cells and on calls of unlabelled ones: three rounds, the best 70 % of each class.

    Parameters
    ----------
    kept, kept_code
        ``(M, F)`` features of labelled cells, and their classes.
    x
        ``(N, F)`` features of unlabelled cells.
    log_probability
        ``(N, K)`` calls of these, calibrated.
    n_classes
        K.

    Returns
    -------
    Regression, float
        And the temperature at which its mean confidence on these cells is that of ``log_probability``.
    """
    confidence = float(softmax(log_probability).max(axis=1).mean())
    for _ in range(_SELF_TRAINING_ROUNDS):
        probability = softmax(log_probability)
        best, code = probability.max(axis=1), probability.argmax(axis=1)
        used = _best_of_each(best, code, _SELF_TRAINING_SHARE)
        fitted = Regression.fit(
            np.concatenate([kept, x[used]]),
            np.concatenate([kept_code, code[used]]),
            n_classes,
            np.concatenate([np.ones(kept_code.size), best[used]]),
            _SELF_TRAINING_C,
        )
        log_probability = fitted.log_probability(x)
        temperature = temperature_of_mean(log_probability, confidence)
        log_probability = log_probability / temperature
    return fitted, temperature


def _best_of_each(probability: NDArray[np.floating], code: NDArray[np.integer], share: float) -> NDArray[np.bool_]:
    """Mark the most probable share of the cells of each class, at least one."""
    is_best = np.zeros(code.size, dtype=bool)
    for c in np.unique(code):
        rows = np.flatnonzero(code == c)
        is_best[rows[np.argsort(-probability[rows], kind="stable")[: max(1, int(share * rows.size))]]] = True
    return is_best


def _folds(code: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.int64]:
    """Deal the cells of each class over folds; the only cell of a class is never held out (-1)."""
    fold = np.full(code.size, -1, dtype=np.int64)
    for c in np.unique(code):
        rows = rng.permutation(np.flatnonzero(code == c))
        if rows.size > 1:
            fold[rows] = (np.arange(rows.size) + rng.integers(N_FOLDS)) % N_FOLDS
    return fold
