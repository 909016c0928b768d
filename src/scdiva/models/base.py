"""What a model can do, as protocols: tasks ask for a capability, never for a class. And what all families share."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from scdiva.data.statistics import GeneStatistics
from scdiva.errors import BundleError, ConfigError
from scdiva.genes import GeneVocabulary
from scdiva.models import bundle
from scdiva.types import CellCounts, LatentCodec

if TYPE_CHECKING:
    import torch

_CLASSES = {
    "scdiva": "scdiva.models.scdiva:ScDiVa",
    "scdiva-perturbation": "scdiva.models.scdiva.perturbation_model:PerturbationModel",
    "scdiffusion": "scdiva.models.scdiffusion:ScDiffusion",
}
"""Class of each family; families do not import each other, so they are looked up here when they are needed."""
_CODECS = {"scdiva": "scdiva.models.scdiva.codec:ScDiVaCodec"}
"""What turns cells into z and z into profiles, of the families that can."""
_OWN_KEYS = frozenset({"format", "family", "model", "n_parameters", "vocabulary_fingerprint"})
"""Keys of config.json that each save writes anew."""


class PretrainedModel(ABC):
    """What models of all families do in the same way: name, size, device, provenance, and reading a bundle.

    Attributes
    ----------
    vocabulary
        Genes.
    details
        What goes into the bundle's ``config.json`` beside the sizes.
    bundle_hash
        sha256 of the bundle it was loaded from; empty for a model that was never saved.
    """

    family: ClassVar[str]
    vocabulary: GeneVocabulary
    details: dict[str, Any]
    bundle_hash: str

    @property
    @abstractmethod
    def module(self) -> torch.nn.Module:
        """The weights."""

    @property
    @abstractmethod
    def n_latent(self) -> int:
        """Dimensions of the embedding."""

    @classmethod
    def read_bundle(cls, name_or_path: str | Path) -> bundle.BundleContent:
        """Find and verify a bundle of this family; the weights are read afterwards.

        Raises
        ------
        BundleError
            There is no such bundle, it is damaged, or it is of another family.
        """
        content = bundle.read_bundle(bundle.find_bundle(name_or_path))
        if content.config.get("family") != cls.family:
            raise BundleError(
                f"{content.path} holds a model of family {content.config.get('family')!r}",
                expected=repr(cls.family),
                fix="load it with the class of its family (sd.load_model); models of family 'scdiva-perturbation' are "
                "made by scdiva finetune --objective perturbation, for scdiva perturb",
            )
        return content

    def to(self, device: str) -> Self:
        """Move the weights; ``"auto"`` takes a GPU if there is one."""
        # deferred: protocols alone need no torch
        import torch

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.module.to(device)
        except (RuntimeError, AssertionError) as error:  # PyTorch says "not compiled with CUDA" by an assertion
            raise ConfigError(
                f"device {device!r} cannot be used here ({str(error).splitlines()[0][:120]})",
                expected="auto, cpu, or cuda where there is a GPU",
                fix="use device='cpu'",
            ) from error
        return self

    def __repr__(self) -> str:
        """Name the model and its size."""
        return (
            f"{type(self).__name__}({self.name}: {self.n_parameters:,} parameters, {self.vocabulary.n_genes:,} genes, "
            f"n_latent={self.n_latent}, hash {self.bundle_hash[:12] or 'not saved'})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.module.parameters()).device

    @property
    def name(self) -> str:
        """The model's name, or "unnamed"."""
        return str(self.details.get("name") or "unnamed")

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def provenance(self) -> dict[str, Any]:
        """What names this very model in a result."""
        return {
            "model": self.name,
            "model_hash": self.bundle_hash or "not saved",
            "vocabulary_fingerprint": self.vocabulary.fingerprint,
            "scdiva_version": version("scdiva"),
        }

    def weights_hash(self) -> str:
        """Fingerprint the weights, saved or not."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()


def details_of(content: bundle.BundleContent) -> dict[str, Any]:
    """Return what a bundle's ``config.json`` holds beside the sizes."""
    return {key: value for key, value in content.config.items() if key not in _OWN_KEYS}


def load_model(name_or_path: str | Path, *, device: str = "auto") -> Any:
    """Load a model of whatever family it is.

    Raises
    ------
    BundleError
        There is no such model, or it is damaged.
    """
    path = bundle.find_bundle(name_or_path)
    # a bundle that says nothing of a family is refused by the first class, which says what is wrong with it
    return _looked_up(_CLASSES.get(bundle.family_of(path), _CLASSES["scdiva"])).from_pretrained(path, device=device)


def load_codec(family: str, path: Path, *, device: str = "auto") -> LatentCodec:
    """Load the codec that lies within a bundle.

    Raises
    ------
    BundleError
        The family has no codec, or the bundle is damaged.
    """
    if family not in _CODECS:
        raise BundleError(
            f"{path} is of family {family!r}",
            expected=f"a codec of {' or '.join(_CODECS)}",
            fix="use the scdiva version that wrote it, or a newer one",
        )
    codec: LatentCodec = _looked_up(_CODECS[family]).from_pretrained(path, device=device)
    return codec


def _looked_up(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


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
