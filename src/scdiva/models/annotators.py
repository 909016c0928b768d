"""Annotators: from cells to probabilities of cell types, and to how unlike the reference a cell is.

Two kinds are here, both on top of a frozen model:

- :class:`ReferenceIndex`: nothing is trained; the neighbours of a cell in the embedding of a labelled reference vote;
- :class:`Probe`: a logistic regression on z beside components of the reference's own variable genes: z carries what
  other cells have taught, components what only this reference shows. How large z stands beside them, the penalty, and
  whether regressions on other features decide as well, are chosen by cross-validation on the reference (our decision;
  docs/experiments.md). A probe can be aligned with the cells it is to annotate, which may be of another laboratory.

A third kind, whose network is trained as well, is in ``models/scdiva/finetuned.py``. All are calibrated on reference
cells that did not vote for themselves: a temperature for probabilities, and a threshold of novelty that a stated share
of known cells exceeds.

Shape letters: N cells, K classes, F features, Z latent.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts

N_NEIGHBORS, MIN_NEIGHBORS = 15, 3
"""Votes; fewer where classes have fewer cells (median), since further neighbours must be of another class."""
N_COMPONENTS = 50
N_VARIABLE_GENES = 2000
N_FOLDS = 5
FALSE_UNKNOWN_RATE = 0.05
"""Share of known cells that may be called unknown."""
_LATENT_SIZE = 3.0
"""Size of z beside components, whose first ones have standard deviations of about 5, where nothing chooses it."""
_MIN_CELLS_PER_GENE = 3
_MANY_CELLS = 50_000
"""More cells than that have an approximate index."""
_TINY = 1e-6
_FIT_CELLS = 20_000


@dataclass(frozen=True, slots=True)
class Calls:
    """What an annotator says of some cells.

    Parameters
    ----------
    probability
        ``(N, K)`` float32, rows sum to 1.
    novelty
        ``(N,)`` float32: how unlike the reference; 0 is usual for a known cell, one unit about a standard deviation
        of known cells.
    """

    probability: NDArray[np.float32]
    novelty: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Temperature of the probabilities and scale of the novelty, from cells that did not vote for themselves.

    Parameters
    ----------
    temperature
        Divides log-probabilities (Guo et al. 2017).
    centre, spread
        ``(2,)`` median and 1.25 mean absolute deviations (a standard deviation, where it is normal) of the two parts of
        novelty: log distance, and log-odds against the best class.
    threshold
        Novelty above which a cell is unknown.
    """

    temperature: float
    centre: NDArray[np.float64]
    spread: NDArray[np.float64]
    threshold: float

    @classmethod
    def fit(
        cls,
        log_probability: NDArray[np.floating],
        distance: NDArray[np.floating],
        code: NDArray[np.integer],
        *,
        false_unknown_rate: float = FALSE_UNKNOWN_RATE,
    ) -> Self:
        """Calibrate on known cells.

        Parameters
        ----------
        log_probability
            ``(N, K)`` of cells that had no part in them.
        distance
            ``(N,)`` positive distances from what the reference holds.
        code
            ``(N,)`` true classes.
        false_unknown_rate
            Share of these cells whose novelty exceeds the threshold.
        """
        temperature = temperature_of(log_probability, code)
        parts = _novelty_parts(_softmax(log_probability / temperature), distance)
        centre = np.median(parts, axis=0)
        # not the median deviation: where most cells have all votes of their neighbours, that is 0
        spread = np.maximum(1.2533 * np.abs(parts - centre).mean(axis=0), 1e-3)
        novelty = ((parts - centre) / spread).sum(axis=1)
        return cls(temperature, centre, spread, float(np.quantile(novelty, 1.0 - false_unknown_rate)))

    @classmethod
    def none(cls) -> Self:
        """Return the calibration where no cell can be held out: nothing is changed, and nothing is unknown."""
        return cls(1.0, np.zeros(2), np.ones(2), float("inf"))

    def calls(self, log_probability: NDArray[np.floating], distance: NDArray[np.floating]) -> Calls:
        """Turn raw log-probabilities and distances into calls."""
        probability = _softmax(log_probability / self.temperature)
        parts = (_novelty_parts(probability, distance) - self.centre) / self.spread
        return Calls(probability.astype(np.float32), parts.sum(axis=1).astype(np.float32))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        numbers = np.array([self.temperature, self.threshold])
        return {"calibration": np.concatenate([numbers, self.centre, self.spread])}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Read what :meth:`arrays` returned."""
        numbers = arrays["calibration"]
        return cls(float(numbers[0]), numbers[2:4], numbers[4:6], float(numbers[1]))


class Annotator(Protocol):
    """What :func:`scdiva.tasks.annotate.annotate` needs."""

    @property
    def method(self) -> str:
        """Name of the method."""
        ...

    @property
    def calibration(self) -> Calibration:
        """Temperature and threshold."""
        ...

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells, given with their embedding."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceIndex:
    """Nearest neighbours in the embedding of a labelled reference.

    Parameters
    ----------
    z
        ``(N, Z)`` float32 embedding of the reference.
    code
        ``(N,)`` int32 class of each cell.
    n_classes
        K.
    calibration
        From leaving out one cell at a time.
    """

    z: NDArray[np.float32]
    code: NDArray[np.int32]
    n_classes: int
    calibration: Calibration
    method: str = "reference"
    _index: list[Any] = field(default_factory=list, repr=False)

    @classmethod
    def fit(
        cls,
        z: NDArray[np.float32],
        code: NDArray[np.integer],
        n_classes: int,
        *,
        false_unknown_rate: float = FALSE_UNKNOWN_RATE,
    ) -> Self:
        """Index a reference.

        Parameters
        ----------
        z
            ``(N, Z)`` embedding.
        code
            ``(N,)`` classes from 0 to ``n_classes - 1``.
        n_classes
            K.
        false_unknown_rate
            As in :meth:`Calibration.fit`.
        """
        z = np.asarray(z, dtype=np.float32)
        index = cls(z, code.astype(np.int32), n_classes, Calibration.none())
        distance, neighbour = index.neighbours(z, index.n_votes + 1)
        # a cell is its own nearest neighbour, unless others are at the same place
        is_self = neighbour == np.arange(z.shape[0])[:, None]
        is_self[~is_self.any(axis=1), -1] = True
        shape = (z.shape[0], neighbour.shape[1] - 1)
        others, distances = neighbour[~is_self].reshape(shape), distance[~is_self].reshape(shape)
        fitted = Calibration.fit(
            index.votes(others), distances.mean(axis=1), code, false_unknown_rate=false_unknown_rate
        )
        return replace(index, calibration=fitted, _index=index._index)

    def neighbours(self, z: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return distances and positions of the k nearest reference cells (fewer where there are fewer)."""
        k = min(k, self.z.shape[0])
        if not self._index:
            self._index.append(_built_index(self.z))
        index = self._index[0]
        if hasattr(index, "kneighbors"):
            distance, neighbour = index.kneighbors(z, n_neighbors=k)
        else:
            neighbour, distance = index.query(z, k=k)
        return distance.astype(np.float32), neighbour.astype(np.int64)

    @property
    def n_votes(self) -> int:
        """Neighbours that vote."""
        sizes = np.bincount(self.code, minlength=1)
        return int(np.clip(np.median(sizes[sizes > 0]), MIN_NEIGHBORS, N_NEIGHBORS))

    def votes(self, neighbour: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log of the share of neighbours of each class, ``(N, K)``; half a vote is spread over all classes."""
        counts = np.zeros((neighbour.shape[0], self.n_classes))
        np.add.at(counts, (np.arange(neighbour.shape[0])[:, None], self.code[neighbour]), 1.0)
        counts += 0.5 / self.n_classes
        return np.log(counts / counts.sum(axis=1, keepdims=True))

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells by their embedding; the counts are not looked at."""
        distance, neighbour = self.neighbours(np.asarray(z, dtype=np.float32), self.n_votes)
        return self.calibration.calls(self.votes(neighbour), distance.mean(axis=1))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        return {"z": self.z, "code": self.code, **self.calibration.arrays()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], n_classes: int) -> Self:
        """Read what :meth:`arrays` returned."""
        return cls(arrays["z"], arrays["code"], n_classes, Calibration.from_arrays(arrays))


def _built_index(z: NDArray[np.float32]) -> Any:
    # deferred: both take a second or more to load
    if z.shape[0] <= _MANY_CELLS:
        from sklearn.neighbors import NearestNeighbors

        return NearestNeighbors().fit(z)
    from pynndescent import NNDescent

    index = NNDescent(z, n_neighbors=2 * N_NEIGHBORS, random_state=0)
    index.prepare()
    return index


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What the regressions of a probe read.

    Parameters
    ----------
    centre, scale
        ``(Z,)`` mean of z over the reference, and one number: its overall standard deviation.
    gene
        ``(P,)`` variable genes of the reference, as vocabulary indices.
    gene_mean, loading
        ``(P,)`` mean of log1p(CP10K) and ``(P, C)`` components.
    detected
        ``(D,)`` genes that the regression on all genes reads.
    detected_mean
        ``(D,)`` their mean: what a gene that a file does not measure is taken to be.
    latent_size
        Standard deviation of z in the joint features; with 0 they are the components alone.
    """

    centre: NDArray[np.float32]
    scale: float
    gene: NDArray[np.int64]
    gene_mean: NDArray[np.float32]
    loading: NDArray[np.float32]
    detected: NDArray[np.int64]
    detected_mean: NDArray[np.float32]
    latent_size: float = _LATENT_SIZE

    @classmethod
    def fit(cls, *groups: tuple[CellCounts, NDArray[np.float32]], seed: int) -> Self:
        """Choose variable genes and fit components on cells and their embeddings; labels are not looked at."""
        from sklearn.decomposition import PCA

        values = sp.csr_matrix(sp.vstack([_values(cells) for cells, _ in groups]))
        z = np.concatenate([z for _, z in groups])
        rng = np.random.default_rng(seed)
        rows = np.sort(rng.permutation(values.shape[0])[:_FIT_CELLS])
        gene = _variable_genes(values[rows])
        dense = values[rows][:, gene].toarray()
        n_components = max(1, min(N_COMPONENTS, *(size - 1 for size in dense.shape)))
        pca = PCA(n_components, random_state=seed).fit(dense)
        n_detected = np.bincount(values.indices, minlength=values.shape[1])
        detected = np.flatnonzero(n_detected >= min(_MIN_CELLS_PER_GENE, values.shape[0]))
        mean = np.asarray(values.mean(axis=0)).ravel().astype(np.float32)
        return cls(
            z.mean(axis=0).astype(np.float32),
            max(float(z.std()), _TINY),
            gene,
            pca.mean_.astype(np.float32),
            pca.components_.T.astype(np.float32),
            detected,
            mean[detected],
        )

    def of(self, cells: CellCounts, z: NDArray[np.float32]) -> dict[str, Any]:
        """Return the features of each regression: ``(N, F)`` by name; CSR for "genes"."""
        values = _values(cells)
        own = ((_filled(values, cells, self.gene, self.gene_mean) - self.gene_mean) @ self.loading).astype(np.float32)
        genes = values[:, self.detected]
        if not cells.is_measured[:, self.detected].all():
            genes = sp.csr_matrix(_filled(values, cells, self.detected, self.detected_mean))
        model = (_LATENT_SIZE * (z - self.centre) / self.scale).astype(np.float32)
        return {"model": model, "own": own, "joint": joint_features(model, own, self.latent_size), "genes": genes}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        names = ("centre", "gene", "gene_mean", "loading", "detected", "detected_mean")
        numbers = {f"features_{name}": np.array(getattr(self, name)) for name in ("scale", "latent_size")}
        return {**{f"features_{name}": getattr(self, name) for name in names}, **numbers}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Read what :meth:`arrays` returned."""
        values: dict[str, Any] = {
            name.removeprefix("features_"): array for name, array in arrays.items() if name.startswith("features_")
        }
        values |= {name: float(values[name]) for name in ("scale", "latent_size") if name in values}
        return cls(**values)


@dataclass(frozen=True, slots=True, eq=False)
class Regression:
    """A multinomial logistic regression: log-odds are ``x @ coef + intercept``."""

    coef: NDArray[np.float32]
    intercept: NDArray[np.float32]

    @classmethod
    def fit(
        cls, x: Any, code: NDArray[np.integer], n_classes: int, weight: NDArray[np.floating] | None, c: float
    ) -> Self:
        """Fit on cells of some of the classes; the others are never called."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        present = np.unique(code)
        coef = np.zeros((x.shape[1], n_classes), dtype=np.float32)
        intercept = np.full(n_classes, -30.0, dtype=np.float32)
        if present.size == 1:
            intercept[present] = 0.0
            return cls(coef, intercept)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the last digits of a convex optimum do not matter
            found = LogisticRegression(C=c, max_iter=300).fit(x, code, sample_weight=weight)
        own = found.coef_.T if present.size > 2 else np.concatenate([-found.coef_, found.coef_]).T / 2
        bias = found.intercept_ if present.size > 2 else np.array([-found.intercept_[0], found.intercept_[0]]) / 2
        coef[:, present], intercept[present] = own, bias
        return cls(coef, intercept)

    def log_probability(self, x: Any) -> NDArray[np.float64]:
        """Return normalised log-probabilities, ``(N, K)``."""
        logit = np.asarray(x @ self.coef, dtype=np.float64) + self.intercept
        return _log_softmax(logit)


CANDIDATES: tuple[tuple[str, ...], ...] = (("joint",), ("joint", "genes"), ("model", "own", "genes"))
"""Sets of regressions among which cross-validation chooses; several of them give the geometric mean."""
LATENT_SIZES = (0.0, 1.5, 3.0)
PENALTIES = (0.03, 0.1, 0.3, 1.0)
"""Inverse penalties (scikit-learn's C) of the joint regression."""
FEW_CELLS = 10
"""Median cells per class below which "joint" is the only candidate."""
FEW_FOR_SELF_TRAINING = 20
_C = {"model": 0.1, "own": 0.1, "genes": 0.3}
_CHOICE_CELLS = 2_000
"""More cells than that have no part in the choice of size and penalty."""
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
        calibration = Calibration.none()
        if is_judged.any():
            distance = np.empty(code.size)
            for train, test in _parts(fold):
                shape = class_shape(x["joint"][train], code[train], n_classes)
                distance[test] = class_distance(x["joint"][test], *shape)
            together = _log_softmax(np.mean([out[name][is_judged] for name in best], axis=0))
            calibration = Calibration.fit(
                together, distance[is_judged], code[is_judged], false_unknown_rate=false_unknown_rate
            )
        regressions = {name: Regression.fit(x[name], code, n_classes, weight, c[name]) for name in best}
        class_logit = {
            name: _class_means(np.asarray(x[name] @ fitted.coef), code, n_classes)
            for name, fitted in regressions.items()
        }
        mean, whitening = class_shape(x["joint"], code, n_classes)
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
        )

    @property
    def n_classes(self) -> int:
        """K."""
        return int(self.class_mean.shape[0])

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells."""
        return self._calls(self.features.of(cells, z))

    def _calls(self, x: Mapping[str, Any]) -> Calls:
        distance = class_distance(x["joint"], self.class_mean, self.whitening)
        return self.calibration.calls(self._log_probability(x), distance)

    def _log_probability(self, x: Mapping[str, Any]) -> NDArray[np.float64]:
        return _log_softmax(
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
            probability = _softmax(probe._log_probability(x) / self.calibration.temperature)
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
                there = _class_means(logit[name][sure], code[sure], k)
                offset = kept_part * (share @ (there - self.class_logit[name])[is_in_both])
                moved[name] = replace(fitted, intercept=(fitted.intercept - offset).astype(np.float32))
            class_mean = (self.class_mean + kept_part * shift).astype(np.float32)
            probe = replace(self, regressions=moved, class_mean=class_mean)
        novelty = probe._calls(x).novelty
        return self if (novelty > self.calibration.threshold).mean() > _MOSTLY else probe

    def self_trained(self, cells: CellCounts, z: NDArray[np.float32]) -> Self:
        """Return the probe, aligned, and trained further on its own calls of unlabelled cells.

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
        probe = self._aligned(x)
        log_probability = probe._log_probability(x) / self.calibration.temperature
        confidence = float(_softmax(log_probability).max(axis=1).mean())
        for _ in range(_SELF_TRAINING_ROUNDS):
            probability = _softmax(log_probability)
            best, code = probability.max(axis=1), probability.argmax(axis=1)
            used = _best_of_each(best, code, _SELF_TRAINING_SHARE)
            fitted = Regression.fit(
                np.concatenate([self.kept, x["joint"][used]]),
                np.concatenate([self.kept_code, code[used]]),
                self.n_classes,
                np.concatenate([np.ones(self.kept_code.size), best[used]]),
                _SELF_TRAINING_C,
            )
            log_probability = fitted.log_probability(x["joint"])
            temperature = _temperature_of_mean(log_probability, confidence)
            log_probability = log_probability / temperature
        return replace(
            probe,
            regressions={"joint": fitted},
            class_logit={"joint": _class_means(self.kept @ fitted.coef, self.kept_code, self.n_classes)},
            calibration=replace(self.calibration, temperature=temperature),
        )

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
) -> NDArray[np.float64]:
    """Log-probabilities of cells that had no part in them, ``(N, K)``; NaN for cells of no fold."""
    out = np.full((code.size, n_classes), np.nan)
    for train, test in _parts(fold):
        fitted = Regression.fit(x[train], code[train], n_classes, None if weight is None else weight[train], c)
        out[test] = fitted.log_probability(x[test])
    return out


def _nll(log_probability: NDArray[np.floating], code: NDArray[np.integer]) -> float:
    """Nats per cell at the best temperature."""
    normal = _log_softmax(log_probability)
    sharp = _log_softmax(normal / temperature_of(normal, code))
    return float(-sharp[np.arange(code.size), code].mean())


def joint_features(model: NDArray[np.float32], own: NDArray[np.float32], size: float) -> NDArray[np.float32]:
    """Return z, of a size, beside the components: ``(N, Z + C)``; the components alone with size 0."""
    if size == 0:
        return own
    return np.concatenate([np.float32(size / _LATENT_SIZE) * model, own], axis=1)


def _chosen_size(
    model: NDArray[np.float32],
    own: NDArray[np.float32],
    code: NDArray[np.integer],
    n_classes: int,
    fold: NDArray[np.integer],
    weight: NDArray[np.floating] | None,
) -> tuple[float, float]:
    """Return the size of z and the penalty that make held-out cells most probable.

    Also with five cells of each class: whether z, components or both tell these types apart shows in a handful of
    cells. Where no cell can be held out, the largest of both.
    """
    judged = fold >= 0
    found, best = (LATENT_SIZES[-1], PENALTIES[-1]), np.inf
    for size in LATENT_SIZES if judged.any() else ():
        x = joint_features(model, own, size)
        for c in PENALTIES:
            loss = _nll(_held_out(x, code, n_classes, fold, weight, c)[judged], code[judged])
            if loss < best:
                found, best = (size, c), loss
    return found


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
    chance = (share**2 * ((shifts - mean) ** 2).sum(axis=1)).sum() / max(1.0 - float((share**2).sum()), _TINY)
    return float(max(0.0, 1.0 - chance / max(float((mean**2).sum()), _TINY)))


def _class_means(x: NDArray[np.floating], code: NDArray[np.integer], n_classes: int) -> NDArray[np.float64]:
    """Means of the classes, ``(K, F)``; NaN for classes without a cell."""
    sizes = np.bincount(code, minlength=n_classes)
    total = np.zeros((n_classes, x.shape[1]))
    np.add.at(total, code, x)
    return total / np.where(sizes > 0, sizes, np.nan)[:, None]


def _best_of_each(probability: NDArray[np.floating], code: NDArray[np.integer], share: float) -> NDArray[np.bool_]:
    """Mark the most probable share of the cells of each class, at least one."""
    is_best = np.zeros(code.size, dtype=bool)
    for c in np.unique(code):
        rows = np.flatnonzero(code == c)
        is_best[rows[np.argsort(-probability[rows], kind="stable")[: max(1, int(share * rows.size))]]] = True
    return is_best


def _values(cells: CellCounts) -> sp.csr_matrix:
    return sp.csr_matrix((log1p_cp10k(cells), cells.counts.indices, cells.counts.indptr), shape=cells.counts.shape)


def _variable_genes(values: sp.csr_matrix) -> NDArray[np.int64]:
    import anndata as ad
    import scanpy as sc

    detected = np.flatnonzero(np.bincount(values.indices, minlength=values.shape[1]) > 0)
    if detected.size <= N_VARIABLE_GENES or values.shape[0] < 3:
        return detected
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = ad.AnnData(values[:, detected].copy())
        sc.pp.highly_variable_genes(table, n_top_genes=N_VARIABLE_GENES, flavor="seurat")
    return detected[table.var["highly_variable"].to_numpy()]


def _filled(
    values: sp.csr_matrix, cells: CellCounts, gene: NDArray[np.int64], mean: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return some genes' values, dense; a gene that a cell's file does not measure is unknown, not zero."""
    dense: NDArray[np.float32] = values[:, gene].toarray()
    is_measured = cells.is_measured[:, gene]
    if not is_measured.all():
        dense = np.where(is_measured[cells.source_of_cell], dense, mean)
    return dense


def class_shape(
    x: NDArray[np.float32], code: NDArray[np.integer], n_classes: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Means of the classes, and what whitens deviations from them (covariance shrunk by a tenth).

    Parameters
    ----------
    x
        ``(N, F)`` features.
    code
        ``(N,)`` classes.
    n_classes
        K.

    Returns
    -------
    mean
        ``(K, F)``; NaN for classes without a cell.
    whitening
        ``(F, F)``: distances of whitened features are Mahalanobis distances with the pooled covariance within classes.
    """
    mean = _class_means(x, code, n_classes)
    sizes = np.bincount(code, minlength=n_classes)
    deviation = x - mean[code]
    covariance = deviation.T @ deviation / max(code.size - (sizes > 0).sum(), 1)
    level = max(float(np.trace(covariance)) / x.shape[1], _TINY)
    precision_root = np.linalg.inv(np.linalg.cholesky(covariance + 0.1 * level * np.eye(x.shape[1]))).T
    return mean.astype(np.float32), precision_root.astype(np.float32)


def class_distance(
    x: NDArray[np.float32], mean: NDArray[np.float32], whitening: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Distance from the nearest class mean, whitened: arguments as :func:`class_shape` takes and returns them."""
    white, centre = x @ whitening, mean[np.isfinite(mean).all(axis=1)] @ whitening
    squared = (white**2).sum(axis=1)[:, None] - 2.0 * white @ centre.T + (centre**2).sum(axis=1)
    return np.sqrt(np.maximum(squared.min(axis=1), 0.0)).astype(np.float64)


def _folds(code: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.int64]:
    """Deal the cells of each class over folds; the only cell of a class is never held out (-1)."""
    fold = np.full(code.size, -1, dtype=np.int64)
    for c in np.unique(code):
        rows = rng.permutation(np.flatnonzero(code == c))
        if rows.size > 1:
            fold[rows] = (np.arange(rows.size) + rng.integers(N_FOLDS)) % N_FOLDS
    return fold


def some_of_each(code: NDArray[np.integer], n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw at most ``n`` cells of each class; sorted positions."""
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(code == c))[:n] for c in np.unique(code)]))


def _novelty_parts(probability: NDArray[np.floating], distance: NDArray[np.floating]) -> NDArray[np.float64]:
    best = np.clip(probability.max(axis=1).astype(np.float64), _TINY, 1.0 - _TINY)
    return np.stack([np.log(np.maximum(distance, _TINY)), np.log1p(-best) - np.log(best)], axis=1)


def temperature_of(log_probability: NDArray[np.floating], code: NDArray[np.integer]) -> float:
    """Temperature of the smallest negative log-likelihood, between 1/4 and 4."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(code.size)

    def loss(log_t: float) -> float:
        return float(-_log_softmax(log_probability * np.exp(-log_t))[rows, code].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(4), np.log(4)), method="bounded").x))


def _temperature_of_mean(log_probability: NDArray[np.floating], confidence: float) -> float:
    """Temperature at which the mean probability of the best class is a given one, between 1/4 and 16."""
    low, high = np.log(0.25), np.log(16.0)
    for _ in range(30):
        middle = (low + high) / 2
        is_too_sure = _softmax(log_probability * np.exp(-middle)).max(axis=1).mean() > confidence
        low, high = (middle, high) if is_too_sure else (low, middle)
    return float(np.exp((low + high) / 2))


def _log_softmax(x: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = np.asarray(x, dtype=np.float64) - x.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _softmax(x: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.exp(_log_softmax(x))


def classes_of(labels: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Return the distinct labels, sorted, and the code of each."""
    names, code = np.unique(np.asarray(labels, dtype=str), return_inverse=True)
    return tuple(names.tolist()), code.astype(np.int32)
