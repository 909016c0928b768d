"""What a model can do, as protocols: tasks ask for a capability, never for a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from scdiva.data.statistics import GeneStatistics
from scdiva.genes import GeneVocabulary
from scdiva.types import CellCounts


class Model(Protocol):
    """A trained model with the genes it knows."""

    @property
    def vocabulary(self) -> GeneVocabulary:
        """Genes, in the order that ``CellCounts`` must have."""
        ...

    @property
    def statistics(self) -> GeneStatistics:
        """Gene statistics of the training corpus."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What names this very model in a result: name, hash, vocabulary fingerprint, version."""
        ...


@runtime_checkable
class Embedder(Model, Protocol):
    """A model that embeds cells."""

    @property
    def n_latent(self) -> int:
        """Number of embedding dimensions Z."""
        ...

    def embed(self, cells: CellCounts) -> NDArray[np.float32]:
        """Embed cells, ``(n_cells, n_latent)``; deterministic, independent of the other cells."""
        ...


@runtime_checkable
class ProfileDecoder(Embedder, Protocol):
    """A model that turns an embedding into expected expression."""

    def expected_profile(self, z: NDArray[np.float32], genes: NDArray[np.integer]) -> NDArray[np.float32]:
        """Return the expected CP10K of some genes, ``(n_cells, len(genes))``."""
        ...
