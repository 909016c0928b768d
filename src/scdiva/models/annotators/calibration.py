"""What annotators say of cells, and what makes it mean something: calls, their calibration, the protocol.

Shape letters: N cells, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.types import CellCounts

FALSE_UNKNOWN_RATE = 0.05
"""Share of known cells that may be called unknown."""
TINY = 1e-6


@dataclass(frozen=True, slots=True)
class Calls:
    """What an annotator says of some cells.

    Parameters
    ----------
    probability
        ``(N, K)`` float32, rows sum to 1.
    novelty
        ``(N,)`` float32: how unlike the reference: the sum of two parts, log distance and log-odds against the best
        class, each in units of its spread over known cells; 0 is usual.
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
        parts = novelty_parts(softmax(log_probability / temperature), distance)
        centre = np.median(parts, axis=0)
        # not the median deviation: where most cells have all votes of their neighbours, that is 0
        spread = np.maximum(1.2533 * np.abs(parts - centre).mean(axis=0), 1e-3)
        novelty = ((parts - centre) / spread).sum(axis=1)
        return cls(temperature, centre, spread, float(np.quantile(novelty, 1.0 - false_unknown_rate)))

    @classmethod
    def fit_held_out(
        cls, held_out: HeldOut, code: NDArray[np.integer], *, false_unknown_rate: float = FALSE_UNKNOWN_RATE
    ) -> Self:
        """Calibrate on what was said of cells that could be held out; :meth:`none` where none could."""
        judged = np.isfinite(held_out.distance)
        if not judged.any():
            return cls.none()
        return cls.fit(
            held_out.log_probability[judged],
            held_out.distance[judged],
            code[judged],
            false_unknown_rate=false_unknown_rate,
        )

    @classmethod
    def none(cls) -> Self:
        """Return the calibration where no cell can be held out: nothing is changed, and nothing is unknown."""
        return cls(1.0, np.zeros(2), np.ones(2), float("inf"))

    def calls(self, log_probability: NDArray[np.floating], distance: NDArray[np.floating]) -> Calls:
        """Turn raw log-probabilities and distances into calls."""
        probability = softmax(log_probability / self.temperature)
        parts = (novelty_parts(probability, distance) - self.centre) / self.spread
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

    def adapted(self, cells: CellCounts, z: NDArray[np.float32], *, learns: bool) -> Annotator:
        """Return the annotator, adapted to the unlabelled cells that it will annotate; itself, if it cannot be.

        Parameters
        ----------
        cells, z
            Cells of the query, and their embedding.
        learns
            Whether it also goes on to learn from its own calls of them.
        """
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """What an annotator says of reference cells that had no part in it; for calibration, and not saved.

    Parameters
    ----------
    log_probability
        ``(N, K)`` before calibration; NaN for cells that could not be held out.
    distance
        ``(N,)`` from what the reference holds.
    """

    log_probability: NDArray[np.float64]
    distance: NDArray[np.float64]


def novelty_parts(probability: NDArray[np.floating], distance: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return log distance and log-odds against the best class, ``(N, 2)``."""
    best = np.clip(probability.max(axis=1).astype(np.float64), TINY, 1.0 - TINY)
    return np.stack([np.log(np.maximum(distance, TINY)), np.log1p(-best) - np.log(best)], axis=1)


def temperature_of(log_probability: NDArray[np.floating], code: NDArray[np.integer]) -> float:
    """Temperature of the smallest negative log-likelihood, between 1/4 and 4."""
    from scipy.optimize import minimize_scalar

    rows = np.arange(code.size)

    def loss(log_t: float) -> float:
        return float(-log_softmax(log_probability * np.exp(-log_t))[rows, code].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-np.log(4), np.log(4)), method="bounded").x))


def temperature_of_mean(log_probability: NDArray[np.floating], confidence: float) -> float:
    """Temperature at which the mean probability of the best class is a given one, between 1/4 and 16."""
    low, high = np.log(0.25), np.log(16.0)
    for _ in range(30):
        middle = (low + high) / 2
        is_too_sure = softmax(log_probability * np.exp(-middle)).max(axis=1).mean() > confidence
        low, high = (middle, high) if is_too_sure else (low, middle)
    return float(np.exp((low + high) / 2))


def log_softmax(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Normalise log-probabilities, ``(N, K)``."""
    shifted = np.asarray(x, dtype=np.float64) - x.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def softmax(x: NDArray[np.floating]) -> NDArray[np.float64]:
    """Turn log-probabilities into probabilities, ``(N, K)``."""
    return np.exp(log_softmax(x))
