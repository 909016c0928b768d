"""What a model can do, as protocols: tasks ask for a capability, never for a class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

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


class HiddenSet(Protocol):
    """What is said of the hidden genes of some cells where hidden genes have no places."""

    @property
    def log_odds(self) -> NDArray[np.float32]:
        """Log-odds that each gene is among the hidden ones, up to a constant per cell, ``(n_cells, n_genes)``."""
        ...

    def expected_values(self, cell: NDArray[np.int64], gene: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the expected log1p(CP10K) of some genes of some cells, given that they are detected."""
        ...

    def value_nll(
        self, cell: NDArray[np.int64], gene: NDArray[np.int64], count: NDArray[np.int64]
    ) -> NDArray[np.float32] | None:
        """Return the negative log-likelihood of some counts in nats; None where there is no likelihood of counts."""
        ...


@dataclass(frozen=True, slots=True)
class HiddenPlaces:
    """What is said of the hidden genes of some cells where each has its place in the cell's sequence.

    M hidden genes of all cells together, in the order of the stored counts; the place of each is known to the model.

    Parameters
    ----------
    best
        ``(M,)`` int64: the most probable gene of each place, whatever stands elsewhere; -1 for a special token.
    distinct
        ``(M,)`` int64: the same without a gene that is visible, not measured or taken: places choose in the order of
        how probable their best gene is.
    distinct_value
        ``(M,)`` float32 expected log1p(CP10K) of these.
    value
        ``(M,)`` float32 expected log1p(CP10K) of the true gene of each place.
    identity_nll
        ``(M,)`` float32 nats of the true gene of each place.
    value_nll
        ``(M,)`` float32 nats of its count; None where there is no likelihood of counts.
    rank
        ``(M,)`` int64: how many genes are more probable in that place than the true one.
    likeliest
        ``(n_cells, 5)`` int64: the hidden genes most probable over all places of the cell together; -1 where there are
        not as many.
    saw_answer
        Whether anything that summarises the hidden tokens reached the model.
    """

    best: NDArray[np.int64]
    distinct: NDArray[np.int64]
    distinct_value: NDArray[np.float32]
    value: NDArray[np.float32]
    identity_nll: NDArray[np.float32]
    value_nll: NDArray[np.float32] | None
    rank: NDArray[np.int64]
    likeliest: NDArray[np.int64]
    saw_answer: bool


@runtime_checkable
class Reconstructor(Model, Protocol):
    """A model that says what is hidden in a cell."""

    @property
    def n_places(self) -> int | None:
        """Tokens of a cell that have a place, where the model reads sequences; None where it reads sets."""
        ...

    @property
    def token_order(self) -> str:
        """Order of a cell's tokens: a :class:`~scdiva.serialization.TokenOrder`."""
        ...

    def predict_hidden(self, cells: CellCounts, is_hidden: NDArray[np.bool_]) -> Mapping[str, HiddenSet | HiddenPlaces]:
        """Say what is hidden in some cells, by variant of the model (most have one, named "").

        Parameters
        ----------
        cells
            Raw counts in the order of the vocabulary; of a model with places at most ``n_places`` per cell.
        is_hidden
            ``(nnz,)`` which stored counts are hidden, gene and count together. Of these only totals are read: how many
            there are, and the cell's UMIs; of a model with places also where they stand.
        """
        ...


OwnCounts = Literal["used", "hidden"]
"""Whether a gene's own count is evidence for what is expected of it."""


@dataclass(frozen=True, slots=True)
class ImputedCounts:
    """What a model expects of some genes of some cells, were they measured once more at the same depth.

    Parameters
    ----------
    expected
        ``(n_cells, n_genes)`` float32 expected counts.
    scale
        ``(n_cells, n_genes)`` float32 CP10K of one molecule.
    resampled
        ``(n_samples, n_cells, n_genes)`` float32 expected counts from resampled cells.
    draws
        ``(n_samples, n_cells, n_genes)`` float32 counts drawn from the likelihood, one for each resampled cell.
    """

    expected: NDArray[np.float32]
    scale: NDArray[np.float32]
    resampled: NDArray[np.float32]
    draws: NDArray[np.float32]


@runtime_checkable
class Imputer(Model, Protocol):
    """A model that says how much of a gene to expect in a cell, whether the gene was measured or not."""

    def impute(
        self, cells: CellCounts, genes: NDArray[np.integer], *, own_counts: OwnCounts, n_samples: int, seed: int
    ) -> ImputedCounts:
        """Say what is expected of some genes; each cell's rows depend on that cell and the seed alone."""
        ...
