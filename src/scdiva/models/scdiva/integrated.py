"""Neighbours in an embedding from which the difference between a reference and a query has been taken.

The encoder was trained without labels (:mod:`scdiva.models.scdiva.integration`) and reads no batch: further cells of
the query's laboratory, or of others, are mapped without being trained on.

Shape letters: N cells, K classes, Z latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from scdiva.config import NativeConfig
from scdiva.models.annotators.calibration import FALSE_UNKNOWN_RATE, Calibration, Calls, HeldOut
from scdiva.models.annotators.features import Regression
from scdiva.models.annotators.index import ReferenceIndex
from scdiva.models.annotators.probe import trained_on_calls
from scdiva.models.scdiva.inputs import PackedCells
from scdiva.models.scdiva.model import build_network
from scdiva.models.scdiva.native import NativeNetwork
from scdiva.types import CellCounts

_WEIGHT = "weight:"
_BLOCK = 2048


@dataclass(frozen=True, slots=True, eq=False)
class IntegratedIndex:
    """Nearest neighbours in an integrated embedding.

    Parameters
    ----------
    network
        The integrated encoder; no trunk. It is small, and stays on the CPU.
    sizes
        Its configuration.
    is_read
        ``(G,)`` genes of the vocabulary that it reads.
    index
        The reference in its embedding.
    regression
        What votes instead of neighbours once it has learned from its own calls (:meth:`adapted`).
    spread
        ``(Z,)`` standard deviations of the query that the regression's features are divided by.
    calibration
        From leaving out one cell of the reference at a time.
    """

    network: NativeNetwork
    sizes: NativeConfig
    is_read: NDArray[np.bool_]
    index: ReferenceIndex
    calibration: Calibration
    regression: Regression | None = None
    spread: NDArray[np.float32] = field(default_factory=lambda: np.ones(1, dtype=np.float32))
    method: str = "integrate"

    @classmethod
    def fit(
        cls,
        network: NativeNetwork,
        sizes: NativeConfig,
        is_read: NDArray[np.bool_],
        z: NDArray[np.float32],
        code: NDArray[np.integer],
        n_classes: int,
        *,
        false_unknown_rate: float = FALSE_UNKNOWN_RATE,
    ) -> Self:
        """Index a reference in an integrated embedding.

        Parameters
        ----------
        network, sizes, is_read
            The encoder.
        z
            ``(N, Z)`` the reference in its embedding.
        code, n_classes, false_unknown_rate
            As in :meth:`ReferenceIndex.fit`.
        """
        index = ReferenceIndex.fit(z, code, n_classes, false_unknown_rate=false_unknown_rate)
        return cls(network.cpu().eval(), sizes, is_read, index, index.calibration)

    @property
    def held_out(self) -> HeldOut | None:
        """What the others say of each cell of the reference."""
        return self.index.held_out

    @torch.inference_mode()
    def embed(self, cells: CellCounts) -> NDArray[np.float32]:
        """Embed cells, ``(N, Z)``; those without a count in these genes at the point of no information."""
        read = CellCounts(
            counts=sp.csr_matrix(cells.counts[:, np.flatnonzero(self.is_read)]),
            library_size=cells.library_size,
            cell_index=cells.cell_index,
            source_of_cell=cells.source_of_cell,
            is_measured=cells.is_measured[:, self.is_read],
        )
        found = [
            self.network.anchor.encode(self.network.pooled(PackedCells.pack(read.take(rows)))).float().numpy()
            for rows in np.array_split(np.arange(read.n_cells), max(1, -(-read.n_cells // _BLOCK)))
        ]
        return np.concatenate(found)

    def calls(self, cells: CellCounts, z: NDArray[np.float32]) -> Calls:
        """Annotate cells; z of the model as it comes is not looked at."""
        own = self.embed(cells)
        log_probability, distance = self.index.said(own)
        if self.regression is not None:
            log_probability = self.regression.log_probability(own / self.spread)
        return self.calibration.calls(log_probability, distance)

    def adapted(self, cells: CellCounts, z: NDArray[np.float32], *, learns: bool) -> Self:
        """Return itself; with ``learns`` a regression that has learned from its own calls votes instead of neighbours.

        A reference of a handful of cells has a handful of neighbours, and the query has thousands. Our decision;
        docs/experiments.md.
        """
        if not learns:
            return self
        own = self.embed(cells)
        spread = np.maximum(own.std(axis=0), 1e-6)
        calls = self.calibration.calls(*self.index.said(own))
        log_probability = np.log(np.maximum(calls.probability.astype(np.float64), 1e-12))
        regression, temperature = trained_on_calls(
            self.index.z / spread, self.index.code, own / spread, log_probability, self.index.n_classes
        )
        calibration = replace(self.calibration, temperature=temperature)
        return replace(self, regression=regression, spread=spread, calibration=calibration)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what is saved: encoder and index, as they were before any query."""
        weights = {_WEIGHT + name: tensor.numpy() for name, tensor in self.network.state_dict().items()}
        return {
            **weights,
            "sizes": np.array(self.sizes.model_dump_json()),
            "is_read": self.is_read,
            **self.index.arrays(),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], n_classes: int) -> Self:
        """Read what :meth:`arrays` returned."""
        sizes = NativeConfig.model_validate_json(str(arrays["sizes"]))
        network = build_network(int(arrays["is_read"].sum()), sizes)
        assert isinstance(network, NativeNetwork)
        weights = {
            name.removeprefix(_WEIGHT): torch.from_numpy(value)
            for name, value in arrays.items()
            if name.startswith(_WEIGHT)
        }
        network.load_state_dict(weights, strict=True)
        index = ReferenceIndex.from_arrays(arrays, n_classes)
        return cls(network.eval(), sizes, arrays["is_read"], index, index.calibration)
