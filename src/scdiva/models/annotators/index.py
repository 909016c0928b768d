"""Nearest neighbours in the embedding of a labelled reference: nothing is trained.

Shape letters: N cells, K classes, Z latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.models.annotators.calibration import FALSE_UNKNOWN_RATE, Calibration, Calls, HeldOut
from scdiva.types import CellCounts

N_NEIGHBORS, MIN_NEIGHBORS = 15, 3
"""Votes; fewer where classes have fewer cells (median), since further neighbours must be of another class."""
_MANY_CELLS = 50_000
"""More cells than that have an approximate index."""


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
    held_out
        What the others say of each cell; NaN for the only cell of a class; None if it was loaded.
    """

    z: NDArray[np.float32]
    code: NDArray[np.int32]
    n_classes: int
    calibration: Calibration
    held_out: HeldOut | None = field(default=None, repr=False)
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
        # the only cell of a class has nobody left to vote for it
        is_alone = np.bincount(code, minlength=n_classes)[code] == 1
        votes = np.where(is_alone[:, None], np.nan, index.votes(others))
        held_out = HeldOut(votes, np.where(is_alone, np.nan, distances.mean(axis=1)).astype(np.float64))
        fitted = Calibration.fit_held_out(held_out, code, false_unknown_rate=false_unknown_rate)
        return replace(index, calibration=fitted, held_out=held_out, _index=index._index)

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
        """Neighbours that vote; the nearest alone where classes have fewer than three cells: two would tie."""
        sizes = np.bincount(self.code, minlength=1)
        size = np.median(sizes[sizes > 0])
        return 1 if size < MIN_NEIGHBORS else int(min(size, N_NEIGHBORS))

    def votes(self, neighbour: NDArray[np.int64]) -> NDArray[np.float64]:
        """Log of the share of neighbours of each class, ``(N, K)``; half a vote is spread over all classes."""
        counts = np.zeros((neighbour.shape[0], self.n_classes))
        np.add.at(counts, (np.arange(neighbour.shape[0])[:, None], self.code[neighbour]), 1.0)
        counts += 0.5 / self.n_classes
        return np.log(counts / counts.sum(axis=1, keepdims=True))

    def said(self, z: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return log-probabilities before calibration, ``(N, K)``, and mean distances of the neighbours, ``(N,)``."""
        distance, neighbour = self.neighbours(np.asarray(z, dtype=np.float32), self.n_votes)
        return self.votes(neighbour), distance.mean(axis=1).astype(np.float64)

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells by their embedding; the counts are not looked at."""
        return self.calibration.calls(*self.said(z))

    def adapted(self, cells: CellCounts, z: NDArray[np.float32], *, learns: bool) -> Self:
        """Return the index itself: neighbours are what they are."""
        return self

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
