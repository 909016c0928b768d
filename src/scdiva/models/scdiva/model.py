"""``ScDiVa``: the network with its vocabulary, statistics and provenance; save and load."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from scdiva.config import AnchorConfig
from scdiva.data.statistics import CP10K, GeneStatistics
from scdiva.errors import BundleError, ConfigError, GeneError
from scdiva.genes import GeneVocabulary
from scdiva.models import bundle
from scdiva.models.card import model_card
from scdiva.models.scdiva.network import AnchorNetwork
from scdiva.models.scdiva.objectives import PackedCells
from scdiva.types import CellCounts

FAMILY = "scdiva"

# keys of config.json that are written anew by each save
_OWN_KEYS = frozenset({"format", "family", "model", "n_parameters", "vocabulary_fingerprint"})


class ScDiVa:
    """A scDiVa model: from counts to embeddings and expected profiles.

    Get one with :meth:`from_pretrained`, or train one with ``scdiva pretrain``.

    Parameters
    ----------
    network
        The weights.
    config
        Their sizes.
    vocabulary, statistics
        Genes, and their statistics in the training corpus.
    details
        What goes into the bundle's ``config.json`` beside the sizes: ``name``, ``training``, ``metrics``,
        ``trained_heads``, ``license``.
    labels
        Condition and class names.
    bundle_hash
        sha256 of the bundle it was loaded from; empty for a model that was never saved.
    """

    def __init__(
        self,
        network: AnchorNetwork,
        config: AnchorConfig,
        vocabulary: GeneVocabulary,
        statistics: GeneStatistics,
        *,
        details: Mapping[str, Any] | None = None,
        labels: Mapping[str, list[str]] | None = None,
        bundle_hash: str = "",
    ) -> None:
        n_genes = network.gene_embedding.shape[0]
        if vocabulary.n_genes != n_genes or statistics.n_genes != n_genes:
            raise GeneError(
                f"{n_genes} gene embeddings, {vocabulary.n_genes} vocabulary genes, {statistics.n_genes} statistics",
                expected="the same genes in all three",
                fix="build them from one vocabulary",
            )
        self.network = network.eval()
        self.config = config
        self.vocabulary = vocabulary
        self.statistics = statistics
        self.details = dict(details or {})
        self.labels = dict(labels or {})
        self.bundle_hash = bundle_hash

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str = "auto") -> Self:
        """Load a model.

        Parameters
        ----------
        name_or_path
            A bundled name (``"scdiva-blood-tiny"``), a bundle folder, or a Hugging Face Hub id ``"owner/name"``.
        device
            "auto" (a GPU if there is one), "cpu" or "cuda".

        Raises
        ------
        BundleError
            There is no such model, or a file is missing, changed or does not fit; nothing is filled in.
        """
        path = bundle.find_bundle(name_or_path)
        content = bundle.read_bundle(path)
        if content.config.get("family") != FAMILY:
            raise BundleError(
                f"{path} holds a model of family {content.config.get('family')!r}",
                expected=repr(FAMILY),
                fix="load it with the class of its family",
            )
        try:
            config = AnchorConfig.model_validate(content.config["model"])
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise BundleError(
                f"{path}: model.{'.'.join(map(str, first['loc']))} in its config.json: {first['msg']}",
                expected="the settings of this scdiva version",
                fix="use the scdiva version that wrote it, or a newer one",
            ) from error
        network = AnchorNetwork(content.vocabulary.n_genes, config)
        bundle.load_strictly(network, bundle.read_weights(path), path)
        details = {key: content.config[key] for key in content.config if key not in _OWN_KEYS}
        model = cls(
            network,
            config,
            content.vocabulary,
            content.statistics,
            details=details,
            labels=content.labels,
            bundle_hash=content.hash,
        )
        return model.to(device)

    def save_pretrained(self, path: str | Path, *, dtype: str = "float32", overwrite: bool = False) -> None:
        """Write the model as a bundle, whole or not at all.

        Parameters
        ----------
        path
            The new folder.
        dtype
            "float32", or "bfloat16" for half the size (7 bits of precision in the weights).
        overwrite
            Replace an existing bundle.

        Raises
        ------
        OutputError
            The folder exists.
        """
        target = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
        weights = {name: tensor.detach().cpu().to(target) for name, tensor in self.network.state_dict().items()}
        config = {"family": FAMILY, "model": self.config.model_dump(mode="json"), **self.details}
        config |= {"n_parameters": self.n_parameters}
        bundle.write_bundle(
            Path(path),
            config=config,
            weights=weights,
            vocabulary=self.vocabulary,
            statistics=self.statistics,
            labels=self.labels,
            card=model_card(config, self.vocabulary, self.n_parameters),
            overwrite=overwrite,
        )

    def to(self, device: str) -> Self:
        """Move the weights; ``"auto"`` takes a GPU if there is one."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.network.to(device)
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
            f"ScDiVa({self.name}: {self.n_parameters:,} parameters, {self.vocabulary.n_genes:,} genes, "
            f"n_latent={self.n_latent}, hash {self.bundle_hash[:12] or 'not saved'})"
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.gene_embedding.device

    @property
    def name(self) -> str:
        """The model's name, or "unnamed"."""
        return str(self.details.get("name") or "unnamed")

    @property
    def n_latent(self) -> int:
        """Number of embedding dimensions Z."""
        return self.network.n_latent

    @property
    def n_parameters(self) -> int:
        """Number of weights."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def provenance(self) -> dict[str, Any]:
        """What names this very model in a result."""
        return {
            "model": self.name,
            "model_hash": self.bundle_hash or "not saved",
            "vocabulary_fingerprint": self.vocabulary.fingerprint,
            "scdiva_version": version("scdiva"),
        }

    @torch.inference_mode()
    def embed(self, cells: CellCounts) -> NDArray[np.float32]:
        """Embed cells.

        Parameters
        ----------
        cells
            Raw counts in the order of :attr:`vocabulary`.

        Returns
        -------
        numpy.ndarray
            ``(n_cells, n_latent)`` float32. Each cell's row depends on that cell alone. A cell without a count in any
            gene of the vocabulary gets the model's point of no information (the same for all such cells).
        """
        packed = PackedCells.pack(cells).to(self.device)
        pooled = self.network.pool(packed.gene_N, packed.value_N, packed.offset_B)
        return np.asarray(self.network.encode(pooled).float().cpu())

    @torch.inference_mode()
    def expected_profile(self, z: NDArray[np.float32], genes: NDArray[np.integer]) -> NDArray[np.float32]:
        """Decode embeddings to the expected expression of some genes.

        Parameters
        ----------
        z
            ``(n_cells, n_latent)`` embeddings.
        genes
            Gene indices.

        Returns
        -------
        numpy.ndarray
            ``(n_cells, len(genes))`` float32 expected CP10K: the share of the cell's molecules times 10,000, over all
            genes of the vocabulary.
        """
        log_rate = self.network.log_rates(torch.from_numpy(np.asarray(z, dtype=np.float32)).to(self.device)).float()
        log_share = log_rate[:, torch.from_numpy(np.asarray(genes, dtype=np.int64))] - torch.logsumexp(
            log_rate, dim=1, keepdim=True
        )
        return np.asarray((CP10K * log_share.exp()).cpu())
