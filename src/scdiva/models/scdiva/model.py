"""``ScDiVa``: a network with its vocabulary, statistics, condition labels and provenance; save and load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from scdiva.config import ModelConfig, NativeConfig, OfficialConfig
from scdiva.data.conditions import ConditionLabels
from scdiva.data.statistics import CP10K, GeneStatistics
from scdiva.diffusion.samplers import Sampler, SetState, sample_sets
from scdiva.errors import BundleError, ConfigError, GeneError, UnsupportedError
from scdiva.genes import GeneVocabulary
from scdiva.models import bundle
from scdiva.models.base import (
    HiddenPlaces,
    HiddenSet,
    ImputedCounts,
    OwnCounts,
    PretrainedModel,
    details_of,
)
from scdiva.models.card import model_card
from scdiva.models.prior import Population
from scdiva.models.scdiva.dense import DenseNetwork
from scdiva.models.scdiva.generation import Wish, denoiser
from scdiva.models.scdiva.imputation import impute_native, require_profile_decoder
from scdiva.models.scdiva.inputs import MaskedCells, PackedCells
from scdiva.models.scdiva.native import LABEL_OFFSETS, PER_GENE, NativeNetwork
from scdiva.models.scdiva.objectives import tokeniser_of
from scdiva.models.scdiva.official import OfficialNetwork
from scdiva.models.scdiva.reconstruction import (
    predict_hidden_native,
    predict_hidden_official,
    require_native_heads,
)
from scdiva.nn.precision import uses_bf16
from scdiva.types import CellCounts

FAMILY = "scdiva"

Network = NativeNetwork | OfficialNetwork | DenseNetwork


def build_network(n_genes: int, config: ModelConfig, labels: ConditionLabels | None = None) -> Network:
    """Build the network of a configuration, at its start.

    Parameters
    ----------
    n_genes
        Genes of the (sub-)vocabulary.
    config
        Native or official.
    labels
        Condition labels; native models only.

    Raises
    ------
    ConfigError
        Conditions for a network that takes none.
    """
    labels = labels or ConditionLabels.none()
    if labels.n_fields and not (isinstance(config, NativeConfig) and config.trunk.n_layers):
        raise ConfigError(
            f"condition fields {', '.join(labels.fields)} for a model that takes none",
            expected="a native model with a trunk (model.trunk.n_layers > 0)",
            fix="add layers, or empty data.conditions",
        )
    # PyTorch's layers draw their first weights from the global generator, which is the caller's
    with torch.random.fork_rng(devices=[]):
        if isinstance(config, NativeConfig):
            network = NativeNetwork(n_genes, config, labels.sizes)
            if config.trunk.label_offsets:
                field = config.trunk.label_offsets
                network.add_label_offsets(labels.fields.index(field), len(labels.labels(field)))
            return network
        if isinstance(config, OfficialConfig):
            return OfficialNetwork(n_genes, config)
        return DenseNetwork(n_genes, config)


_STATE_BLOCK = 256


class ScDiVa(PretrainedModel):
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
        Condition fields and their labels.
    population
        Sizes of the training cells and a prior over z, for generation.
    bundle_hash
        sha256 of the bundle it was loaded from; empty for a model that was never saved.
    """

    family = FAMILY

    def __init__(
        self,
        network: Network,
        config: ModelConfig,
        vocabulary: GeneVocabulary,
        statistics: GeneStatistics,
        *,
        details: Mapping[str, Any] | None = None,
        labels: ConditionLabels | None = None,
        population: Population | None = None,
        bundle_hash: str = "",
    ) -> None:
        n_genes = network.n_genes
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
        self.labels = labels or ConditionLabels.none()
        self.population = population
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
        content = cls.read_bundle(name_or_path)
        path = content.path
        config = _config_of(content.config["model"], path)
        labels = ConditionLabels.from_dict({key: list(names) for key, names in content.labels.items()})
        network = build_network(content.vocabulary.n_genes, config, labels)
        bundle.load_strictly(network, bundle.read_weights(path), path)
        if not isinstance(network, NativeNetwork):
            network.mark_trained(content.config.get("trained_heads", ()))
        population = content.population
        if population is not None and population.prior.n_latent != network.n_latent:
            raise BundleError(
                f"{path}: the prior over z has {population.prior.n_latent} dimensions",
                expected=f"{network.n_latent}, those of z",
                fix="fetch the bundle again",
            )
        model = cls(
            network,
            config,
            content.vocabulary,
            content.statistics,
            details=details_of(content),
            labels=labels,
            population=population,
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
            "float32", or "bfloat16" for half the size (7 bits of precision in the matrices; vectors stay float32).
        overwrite
            Replace an existing bundle.

        Raises
        ------
        OutputError
            The folder exists.
        """
        types = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if dtype not in types:
            raise ConfigError(f"dtype {dtype!r}", expected=" or ".join(types), fix="name one of these")
        target = types[dtype]
        # vectors stay exact: they are small, and log-rates of -12 do not bear seven bits
        weights = {
            name: tensor.detach().cpu().to(target if tensor.ndim > 1 else torch.float32)
            for name, tensor in self.network.state_dict().items()
        }
        config = {"family": FAMILY, "model": self.config.model_dump(mode="json"), **self.details}
        config |= {"n_parameters": self.n_parameters}
        bundle.write_bundle(
            Path(path),
            config=config,
            weights=weights,
            vocabulary=self.vocabulary,
            statistics=self.statistics,
            labels=self.labels.to_dict(),
            population=self.population,
            card=model_card(
                {**config, "conditions": self.labels.to_dict()}, self.vocabulary, self.n_parameters, self.n_latent
            ),
            overwrite=overwrite,
        )

    def restricted(self, is_kept: NDArray[np.bool_]) -> ScDiVa:
        """Return the model over some of its genes only: a smaller model that no longer knows the others.

        Parameters
        ----------
        is_kept
            ``(n_genes,)`` genes to keep.

        Raises
        ------
        UnsupportedError
            The model is not native.
        """
        self.native("restriction to some genes")
        smaller = build_network(int(is_kept.sum()), self.config, self.labels)
        kept = torch.from_numpy(np.flatnonzero(is_kept))
        weights = {
            name: tensor[kept] if name in PER_GENE else tensor[:, kept] if name in LABEL_OFFSETS else tensor
            for name, tensor in self.network.state_dict().items()
        }
        smaller.load_state_dict(weights, strict=True)
        # neither its figures nor its hash are those of the whole model
        details = {key: value for key, value in self.details.items() if key != "metrics"}
        return ScDiVa(
            smaller,
            self.config,
            self.vocabulary.subset(is_kept),
            self.statistics.take(np.flatnonzero(is_kept)),
            details=details,
            labels=self.labels,
            population=None if self.population is None else self.population.take_genes(is_kept),
        ).to(str(self.device))

    @property
    def module(self) -> Network:
        """The weights."""
        return self.network

    @property
    def n_latent(self) -> int:
        """Number of dimensions of what :meth:`embed` returns: Z, or more where it is the state."""
        if self._embeds_state:
            assert isinstance(self.config, NativeConfig)
            return self.network.n_latent + self.config.trunk.width
        return self.network.n_latent

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
            ``(n_cells, n_latent)`` float32: z, or, of a model whose configuration says so (``embeds = "state"``), the
            state of :meth:`cell_state` with no condition told. Each cell's row depends on that cell alone. A cell
            without a count in any gene of the vocabulary gets the model's point of no information (the same for all
            such cells).
        """
        if not self._embeds_state:
            return self.latent(cells)
        # labels of the cells must not be in an embedding
        untold = replace(cells, condition=np.zeros((cells.n_cells, 0), dtype=np.int32))
        # tokens take more memory than what z pools
        blocks = (np.arange(i, min(i + _STATE_BLOCK, cells.n_cells)) for i in range(0, cells.n_cells, _STATE_BLOCK))
        states = [self.cell_state(untold.take(rows)) for rows in blocks]
        return np.concatenate(states) if states else np.empty((0, self.n_latent), dtype=np.float32)

    @torch.inference_mode()
    def latent(self, cells: CellCounts) -> NDArray[np.float32]:
        """Return z of cells, ``(n_cells, Z)`` float32: the embedding of most models (:meth:`embed`).

        Parameters
        ----------
        cells
            Raw counts in the order of :attr:`vocabulary`.
        """
        if isinstance(self.network, NativeNetwork):
            packed = PackedCells.pack(cells).to(self.device)
            z = self.network.anchor.encode(self.network.pooled(packed))
        else:
            z = self.network.embed(cells, self.statistics)
        return np.asarray(z.float().cpu())

    @torch.inference_mode()
    def cell_state(self, cells: CellCounts) -> NDArray[np.float32]:
        """Return what supervised heads read: LayerNorm([z; h_LAT]) of the unmasked cell.

        Parameters
        ----------
        cells
            Raw counts in the order of :attr:`vocabulary`.

        Returns
        -------
        numpy.ndarray
            ``(n_cells, n_latent + width)`` float32; ``(n_cells, n_latent)`` for a model without a trunk.

        Raises
        ------
        UnsupportedError
            The model is not native.
        """
        return np.asarray(self.native("cell states").cell_state(self.unmasked(cells)).float().cpu())

    def unmasked(self, cells: CellCounts) -> MaskedCells:
        """Return cells as a native network reads them when nothing is hidden, on the model's device."""
        assert isinstance(self.config, NativeConfig)
        if cells.condition.shape[1] == 0:  # read without labels: all are unknown
            cells = replace(cells, condition=np.zeros((cells.n_cells, self.labels.n_fields), dtype=np.int32))
        tokeniser = tokeniser_of(self.config, self.statistics)
        # the generator is used by the random order of the ordering ablation only
        return tokeniser.unmasked(cells, np.random.default_rng(0)).to(self.device)

    def native(self, task: str) -> NativeNetwork:
        """Return the network if it is native.

        Raises
        ------
        UnsupportedError
            It is not; names the model and the task.
        """
        if not isinstance(self.network, NativeNetwork):
            raise self._unsupported(task)
        return self.network

    @property
    def _embeds_state(self) -> bool:
        return isinstance(self.config, NativeConfig) and self.config.embeds == "state"

    def check_embeds_z(self, task: str) -> None:
        """Refuse what starts at an embedding where the embedding is not z.

        Raises
        ------
        UnsupportedError
            The model embeds states; names the model and the task.
        """
        if self._embeds_state:
            raise UnsupportedError(
                f"{self.name} embeds cells as states, LayerNorm([z; h_LAT]), which {task} cannot start from",
                expected="a model that embeds z (scdiva inspect: model, embeds)",
                fix="use the model that it was integrated from",
            )

    def _unsupported(self, task: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.name} is a model of architecture {self.config.architecture!r}, which does not do {task}",
            expected="a native model",
            fix="use a native model such as scdiva-blood-tiny",
        )

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

        Raises
        ------
        UnsupportedError
            The model is not native, or embeds states.
        UntrainedHeadError
            Its profile decoder was never trained.
        """
        self.check_embeds_z("profile decoding")
        anchor = self.native("profile decoding").anchor
        require_profile_decoder(tuple(self.details.get("trained_heads", ())), self.name)
        log_rate = anchor.log_rates(torch.from_numpy(np.asarray(z, dtype=np.float32)).to(self.device)).float()
        log_share = log_rate[:, torch.from_numpy(np.asarray(genes, dtype=np.int64))] - torch.logsumexp(
            log_rate, dim=1, keepdim=True
        )
        return np.asarray((CP10K * log_share.exp()).cpu())

    @property
    def n_places(self) -> int | None:
        """Tokens of a cell that have a place, if the model reads sequences; None if it reads sets."""
        if isinstance(self.config, NativeConfig):
            trunk = self.config.trunk
            return trunk.max_tokens if tokeniser_of(self.config, self.statistics).has_positions else None
        return self.config.max_tokens if isinstance(self.config, OfficialConfig) else None

    @property
    def token_order(self) -> str:
        """Order of a cell's tokens: "entropy", "expression" or "random"."""
        if isinstance(self.config, NativeConfig):
            return self.config.trunk.order
        return self.config.order if isinstance(self.config, OfficialConfig) else "entropy"

    def predict_hidden(self, cells: CellCounts, is_hidden: NDArray[np.bool_]) -> dict[str, HiddenSet | HiddenPlaces]:
        """Say which genes are hidden in some cells, and how much of each there is.

        Parameters
        ----------
        cells
            Raw counts in the order of :attr:`vocabulary`; at most :attr:`n_places` per cell where that is a number.
        is_hidden
            ``(nnz,)`` which stored counts are hidden, gene and count together.

        Returns
        -------
        dict
            By variant. A native model has one, "", in which nothing that summarises the hidden tokens reaches the
            network but totals. A published one has two: as published ("LAT reads the answer": its latent token pools
            the clean cell), and with a latent token of visible tokens only ("LAT reads visible tokens").

        Raises
        ------
        UntrainedHeadError
            The heads of genes and values are not both trained.
        UnsupportedError
            The model has no tokens (the dense model of the first published version).
        """
        if isinstance(self.network, NativeNetwork):
            assert isinstance(self.config, NativeConfig)
            require_native_heads(tuple(self.details.get("trained_heads", ())), self.name)
            said = predict_hidden_native(
                self.network,
                tokeniser_of(self.config, self.statistics),
                cells,
                is_hidden,
                has_likelihood=self.config.trunk.value_likelihood == "ztnb",
            )
            return {"": said}
        if isinstance(self.network, OfficialNetwork):
            return {
                "LAT reads the answer": predict_hidden_official(
                    self.network, self.statistics, cells, is_hidden, lat="clean"
                ),
                "LAT reads visible tokens": predict_hidden_official(
                    self.network, self.statistics, cells, is_hidden, lat="visible"
                ),
            }
        raise self._unsupported("reconstruction")

    def check_generates(self) -> NativeNetwork:
        """Return the network if cells can be drawn from it.

        Raises
        ------
        UnsupportedError
            The model is not native, reads sequences, has no count likelihood, or embeds states.
        UntrainedHeadError
            The heads of genes and values are not both trained.
        """
        network = self.native("generation")
        self.check_embeds_z("generation")
        assert isinstance(self.config, NativeConfig)
        require_native_heads(tuple(self.details.get("trained_heads", ())), self.name)
        trunk = self.config.trunk
        if trunk.value_likelihood != "ztnb" or (trunk.n_layers and trunk.layout != "set"):
            raise UnsupportedError(
                f"{self.name} has layout {trunk.layout!r} and value likelihood {trunk.value_likelihood!r}",
                expected="layout 'set' and value_likelihood 'ztnb': counts are drawn, and places are not",
                fix="use a model such as scdiva-blood-tiny",
            )
        return network

    @torch.inference_mode()
    def draw(self, wish: Wish, n_genes: NDArray[np.int64], sampler: Sampler, *, seed: int) -> sp.csr_matrix:
        """Draw cells by masked diffusion.

        Parameters
        ----------
        wish
            What the network is told.
        n_genes
            ``(n_cells,)`` genes of each cell.
        sampler
            How the sets are drawn.
        seed
            Seed of the draws: equal calls give equal cells. Cells that are drawn together share a random stream.

        Returns
        -------
        scipy.sparse.csr_matrix
            ``(n_cells, n_genes)`` int32 counts; row i has exactly ``n_genes[i]`` genes.

        Raises
        ------
        UnsupportedError, UntrainedHeadError
            See :meth:`check_generates`.
        """
        network = self.check_generates()
        assert isinstance(self.config, NativeConfig)
        predict = denoiser(network, tokeniser_of(self.config, self.statistics), wish)
        start = SetState.empty(torch.from_numpy(n_genes).to(self.device), self.vocabulary.n_genes)
        generator = torch.Generator(self.device).manual_seed(seed)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=uses_bf16("auto", self.device.type)):
            state = sample_sets(predict, start, sampler, generator)
        return sp.csr_matrix(state.count_BG.cpu().numpy())

    @torch.inference_mode()
    def impute(
        self,
        cells: CellCounts,
        genes: NDArray[np.integer],
        *,
        own_counts: OwnCounts = "used",
        n_samples: int = 0,
        seed: int = 0,
    ) -> ImputedCounts:
        """Say how much of some genes to expect in some cells.

        Parameters
        ----------
        cells
            Raw counts in the order of :attr:`vocabulary`.
        genes
            Gene indices; genes that the cells' file does not measure are welcome.
        own_counts
            "used": a gene's own count corrects what the rest of the cell says. "hidden": it is not looked at.
        n_samples
            Resampled cells, from which spread and draws come; 0: neither.
        seed
            Of the samples. Each cell's row depends on that cell and the seed alone.

        Returns
        -------
        ImputedCounts
            Counts at the depth of each cell. A cell without UMIs counts as one of a single UMI.

        Raises
        ------
        UnsupportedError
            The model is not native.
        UntrainedHeadError
            Its anchor or its profile decoder was never trained.
        """
        network = self.native("imputation")
        require_profile_decoder(tuple(self.details.get("trained_heads", ())), self.name)
        return impute_native(
            network,
            self.statistics,
            self.vocabulary,
            cells,
            genes,
            own_counts=own_counts,
            n_samples=n_samples,
            seed=seed,
        )


def _config_of(values: Mapping[str, Any], path: Path) -> ModelConfig:
    architecture = values.get("architecture", "native")
    known = {get_args(kind.model_fields["architecture"].annotation)[0]: kind for kind in get_args(ModelConfig)}
    if architecture not in known:
        raise BundleError(
            f"{path} holds a model of architecture {architecture!r}",
            expected=f"one of {', '.join(known)}",
            fix="use the scdiva version that wrote it, or a newer one",
        )
    try:
        return known[architecture].model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BundleError(
            f"{path}: model.{'.'.join(map(str, first['loc']))} in its config.json: {first['msg']}",
            expected="the settings of this scdiva version",
            fix="use the scdiva version that wrote it, or a newer one",
        ) from error
