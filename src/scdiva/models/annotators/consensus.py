"""Several annotators together, each as much as the others agree with it on the cells that are annotated.

Another laboratory's cells mislead each way of annotating in its own manner: z is noise where the model does not know
the tissue, components are of what this reference shows, and what a shift of laboratories does to both depends on the
query. None of it shows on the reference. That one of them goes astray on a query does show: the others contradict it.

Shape letters: N cells, K classes, M members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from scdiva.models.annotators.calibration import FALSE_UNKNOWN_RATE, Calibration, Calls, HeldOut, log_softmax
from scdiva.models.annotators.index import ReferenceIndex
from scdiva.models.annotators.probe import Probe
from scdiva.types import CellCounts

_POWER = 4
"""A member weighs as the share of calls that the others share, to this power."""
_LEAST_PROBABILITY = 1e-4
"""What a member may hold against a class at most: no member has a veto."""


class Member(Protocol):
    """An annotator that a consensus can be made of, besides the probe and the index: neighbours in another space."""

    @property
    def calibration(self) -> Calibration:
        """Temperature and threshold."""
        ...

    @property
    def held_out(self) -> HeldOut | None:
        """What it says of reference cells that had no part in it."""
        ...

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells."""
        ...

    def adapted(self, cells: CellCounts, z: NDArray[np.float32], *, learns: bool) -> Self:
        """Return the member, adapted to the cells that it will annotate."""
        ...

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Consensus:
    """A probe, neighbours in z, and neighbours in an integrated embedding, weighted by their agreement on the query.

    Parameters
    ----------
    probe, index, integrated
        The members. A second probe joins them when they are adapted to a query: the same, trained further on its own
        calls.
    calibration
        Of all together, on cells of the reference; distances are the probe's.
    self_trained
        The second probe; None before :meth:`adapted`, where the first one counts twice.
    weight
        ``(4,)`` of probe, second probe, index, integrated; their sum is 1.
    agreement
        ``(4,)`` share of the query's calls on which each agrees with another one (mean over the three others); empty
        before :meth:`adapted`.
    held_out
        What all together, with equal weights, say of reference cells that had no part in it; None if it was loaded.
    """

    probe: Probe
    index: ReferenceIndex
    integrated: Member
    calibration: Calibration
    self_trained: Probe | None = None
    weight: NDArray[np.float64] = field(default_factory=lambda: np.full(4, 0.25))
    agreement: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    held_out: HeldOut | None = field(default=None, repr=False)
    method: str = "consensus"

    @classmethod
    def fit(
        cls,
        probe: Probe,
        index: ReferenceIndex,
        integrated: Member,
        code: NDArray[np.integer],
        *,
        false_unknown_rate: float = FALSE_UNKNOWN_RATE,
    ) -> Self:
        """Put fitted members together and calibrate them, with equal weights, on what each held out.

        Parameters
        ----------
        probe, index, integrated
            Members that were fitted, not loaded: what they held out is not saved.
        code
            ``(N,)`` classes of the reference's cells.
        false_unknown_rate
            As in :meth:`Calibration.fit`.
        """
        together = cls(probe, index, integrated, Calibration.none())
        if probe.held_out is None:
            return together
        parts = []
        for member in (probe, probe, index, integrated):
            assert member.held_out is not None  # of the index: every cell is left out in turn
            parts.append(log_softmax(member.held_out.log_probability / member.calibration.temperature))
        held_out = HeldOut(together._weighed(parts), probe.held_out.distance)
        calibration = Calibration.fit_held_out(held_out, code, false_unknown_rate=false_unknown_rate)
        return replace(together, calibration=calibration, held_out=held_out)

    def _weighed(self, parts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        floor = np.log(_LEAST_PROBABILITY)
        terms = [w * np.maximum(part, floor) for w, part in zip(self.weight, parts, strict=True)]
        return log_softmax(np.sum(terms, axis=0))

    def _said(self, cells: CellCounts, z: NDArray[np.float32]) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
        """Log-probabilities of each member, calibrated, and distances from the probe's classes."""
        x = self.probe.features.of(cells, z)
        parts = []
        distance = np.empty(0)
        for member in (self.probe, self.self_trained or self.probe):
            log_probability, distance = member.said(x)
            parts.append(log_softmax(log_probability / member.calibration.temperature))
        for calls in (self.index.calls(cells, z), self.integrated.calls(cells, z)):
            parts.append(np.log(np.maximum(calls.probability.astype(np.float64), 1e-12)))
        return parts, distance

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells."""
        parts, distance = self._said(cells, z)
        return self.calibration.calls(self._weighed(parts), distance)

    def adapted(self, cells: CellCounts, z: NDArray[np.float32], *, learns: bool) -> Self:
        """Return the consensus with members adapted to the query, and weights by their agreement on it.

        Each member weighs as its mean agreement with the three others, to the fourth power. What all of them get wrong
        in the same way stays wrong. Our decision; docs/experiments.md.

        Parameters
        ----------
        cells, z
            Unlabelled cells of the query, and their embedding.
        learns
            Whether neighbours in the integrated embedding learn on from their own calls, too; a second probe that does
            is always among the members.
        """
        probe, self_trained = self.probe.both(cells, z)
        found = replace(
            self,
            probe=probe,
            self_trained=self_trained,
            integrated=self.integrated.adapted(cells, z, learns=learns),
        )
        code = np.stack([part.argmax(axis=1) for part in found._said(cells, z)[0]])
        agreement = ((code[:, None, :] == code[None, :, :]).mean(axis=2).sum(axis=1) - 1.0) / (len(code) - 1)
        weight = np.maximum(agreement, 1e-3) ** _POWER
        return replace(found, weight=weight / weight.sum(), agreement=agreement)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved: the members, but not what :meth:`adapted` made of a query (weights, second probe)."""
        members = {
            "probe": self.probe.arrays(), "index": self.index.arrays(), "integrated": self.integrated.arrays(),
        }  # fmt: skip
        arrays = {f"{name}:{key}": value for name, found in members.items() for key, value in found.items()}
        return {**arrays, **self.calibration.arrays()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], n_classes: int, integrated: Member) -> Self:
        """Read what :meth:`arrays` returned, but for the integrated member (:func:`of_member`)."""
        return cls(
            Probe.from_arrays(of_member(arrays, "probe")),
            ReferenceIndex.from_arrays(of_member(arrays, "index"), n_classes),
            integrated,
            Calibration.from_arrays(arrays),
        )


def of_member(arrays: Mapping[str, NDArray[Any]], name: str) -> dict[str, NDArray[Any]]:
    """Return the arrays of one member of a consensus: "probe", "index" or "integrated"."""
    return {key.removeprefix(f"{name}:"): value for key, value in arrays.items() if key.startswith(f"{name}:")}
