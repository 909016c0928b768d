"""``ScDiffusion``: autoencoder, denoiser and classifiers with their genes, labels and sizes of cells; save and load."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import ValidationError
from torch import nn

from scdiva.config import ScDiffusionConfig
from scdiva.data.conditions import ConditionLabels
from scdiva.data.statistics import GeneStatistics
from scdiva.errors import BundleError, ConfigError, GeneError
from scdiva.genes import GeneVocabulary
from scdiva.models import bundle
from scdiva.models.base import PretrainedModel, details_of, load_codec
from scdiva.models.card import model_card
from scdiva.models.prior import Population
from scdiva.models.scdiffusion.autoencoder import Autoencoder, SparseCells
from scdiva.models.scdiffusion.classifiers import LatentClassifier
from scdiva.models.scdiffusion.codec import CodecHead
from scdiva.models.scdiffusion.denoiser import Denoiser
from scdiva.models.scdiffusion.published import (
    AnyAutoencoder,
    AnyClassifier,
    AnyDenoiser,
    PublishedAutoencoder,
    PublishedClassifier,
    PublishedDenoiser,
)
from scdiva.models.scdiffusion.sampling import Guide, LatentSampler, draw_latents
from scdiva.types import CellCounts, LatentCodec

FAMILY = "scdiffusion"

_BLOCK = 256
_MIN_STD = 0.05


class Networks(nn.Module):
    """All weights of a model: autoencoder, denoiser, one classifier per classified field, and the scale of depths.

    Around a codec of another family there is a :class:`CodecHead` in the place of the autoencoder.

    Parameters
    ----------
    n_genes
        Genes.
    config
        Sizes.
    labels
        Fields and labels.

    Attributes
    ----------
    log_depth_mean, log_depth_std
        Of log(1 + UMIs) of the training cells: what the denoiser is told of depth is standardised by them.
    """

    autoencoder: AnyAutoencoder
    denoiser: AnyDenoiser
    codec_head: CodecHead
    log_depth_mean: torch.Tensor
    log_depth_std: torch.Tensor

    def __init__(self, n_genes: int, config: ScDiffusionConfig, labels: ConditionLabels) -> None:
        super().__init__()
        self.n_genes = n_genes
        is_published = config.architecture == "published"
        # an autoencoder, or what fits a codec to the genes
        if config.codec == "scdiva":
            self.codec_head = CodecHead(n_genes, config.n_latent)
        elif is_published:
            self.autoencoder = PublishedAutoencoder(n_genes, config.n_latent, config.n_hidden)
        else:
            self.autoencoder = Autoencoder(n_genes, config.n_latent, config.n_hidden)
        if is_published:
            self.denoiser = PublishedDenoiser(config.n_latent, config.width)
        else:
            n_labels = [len(labels.labels(field)) for field in config.fields]
            self.denoiser = Denoiser(config.n_latent, config.width, config.n_blocks, n_labels)
        classifier = PublishedClassifier if is_published else LatentClassifier
        self.classifiers = nn.ModuleList(
            classifier(config.n_latent, config.classifier_width, len(labels.labels(field)))
            for field in config.classified
        )
        self.register_buffer("log_depth_mean", torch.zeros(()))
        self.register_buffer("log_depth_std", torch.ones(()))

    def set_depths(self, depth: NDArray[np.integer]) -> None:
        """Store mean and standard deviation of log(1 + UMIs) of training cells."""
        log_depth = np.log1p(depth.astype(np.float64))
        self.log_depth_mean.fill_(float(log_depth.mean()))
        self.log_depth_std.fill_(max(float(log_depth.std()), _MIN_STD))

    def told_depth(self, depth: ArrayLike) -> NDArray[np.float32]:
        """Return what the denoiser is told of depths, ``(n,)`` float32."""
        log_depth = np.log1p(np.asarray(depth, dtype=np.float64))
        return ((log_depth - float(self.log_depth_mean)) / float(self.log_depth_std)).astype(np.float32)


def build_networks(n_genes: int, config: ScDiffusionConfig, labels: ConditionLabels, *, seed: int = 0) -> Networks:
    """Build the networks at their start; equal seeds give equal weights, and the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Networks(n_genes, config, labels)


class ScDiffusion(PretrainedModel):
    """A latent diffusion of cells: from conditions to z to counts, and from counts to z.

    Get one with :meth:`from_pretrained`, or fit one with ``scdiva scdiffusion fit``. It is a
    :class:`~scdiva.types.LatentCodec` and a :class:`~scdiva.types.LatentPrior`.

    Parameters
    ----------
    networks
        The weights.
    config
        Their sizes.
    vocabulary, statistics
        Genes, and their statistics in the training cells.
    labels
        Condition fields and labels, those of classifiers that were added later at the end.
    population
        Sizes of the training cells.
    codec
        Whose z is drawn, over the same genes; None: the autoencoder in ``networks``.
    details
        What goes into ``config.json`` beside the sizes.
    bundle_hash
        sha256 of the bundle it was loaded from; empty for a model that was never saved.
    """

    family = FAMILY

    def __init__(
        self,
        networks: Networks,
        config: ScDiffusionConfig,
        vocabulary: GeneVocabulary,
        statistics: GeneStatistics,
        *,
        labels: ConditionLabels,
        population: Population,
        codec: LatentCodec | None = None,
        details: Mapping[str, Any] | None = None,
        bundle_hash: str = "",
    ) -> None:
        n_genes = networks.n_genes
        if vocabulary.n_genes != n_genes or statistics.n_genes != n_genes:
            raise GeneError(
                f"networks of {n_genes} genes, {vocabulary.n_genes} vocabulary genes, {statistics.n_genes} statistics",
                expected="the same genes in all three",
                fix="build them from one vocabulary",
            )
        if (codec is None) != (config.codec == "autoencoder") or (codec and codec.n_latent != config.n_latent):
            raise ConfigError(
                f"codec {config.codec!r} of {config.n_latent} dimensions, and "
                + ("none given" if codec is None else f"one of {codec.n_latent} dimensions given"),
                expected="the codec that the configuration names",
                fix="give the model whose z the diffusion was trained on",
            )
        self.networks = networks.eval()
        self.codec = codec
        self.config = config
        self.vocabulary = vocabulary
        self.statistics = statistics
        self.labels = labels
        self.population = population
        self.details = dict(details or {})
        self.bundle_hash = bundle_hash

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, *, device: str = "auto") -> Self:
        """Load a model.

        Parameters
        ----------
        name_or_path
            A bundle folder, or a Hugging Face Hub id ``"owner/name"``.
        device
            "auto" (a GPU if there is one), "cpu" or "cuda".

        Raises
        ------
        BundleError
            There is no such model, it is of another family, or a file is missing, changed or does not fit.
        """
        content = cls.read_bundle(name_or_path)
        path = content.path
        try:
            config = ScDiffusionConfig.model_validate(
                {
                    key: tuple(value) if isinstance(value, list) else value
                    for key, value in content.config["model"].items()
                }
            )
        except (ValidationError, AttributeError) as error:
            raise BundleError(
                f"{path}: config.json describes no latent diffusion ({str(error).splitlines()[0]})",
                expected="the sizes that this version knows",
                fix="use the scdiva version that wrote it",
            ) from error
        labels = ConditionLabels.from_dict({key: list(names) for key, names in content.labels.items()})
        absent = [field for field in (*config.fields, *config.classified) if field not in labels.fields]
        if absent or content.population is None:
            raise BundleError(
                f"{path} lacks {'the labels of ' + absent[0] if absent else bundle.POPULATION}",
                expected="labels of every field, and sizes of training cells",
                fix="fetch the bundle again",
            )
        networks = build_networks(content.vocabulary.n_genes, config, labels)
        bundle.load_strictly(networks, bundle.read_weights(path), path)
        codec = None
        if config.codec != "autoencoder":
            codec_bundle = bundle.read_codec(path)
            if codec_bundle.vocabulary != content.vocabulary or codec_bundle.config["family"] != config.codec:
                raise BundleError(
                    f"{codec_bundle.path} is of family {codec_bundle.config['family']!r} and "
                    f"{codec_bundle.vocabulary.n_genes:,} genes",
                    expected=f"family {config.codec!r}, and the {content.vocabulary.n_genes:,} genes of the diffusion",
                    fix="fetch the bundle again",
                )
            codec = load_codec(config.codec, codec_bundle.path, device="cpu")
            if codec.n_latent != config.n_latent:
                raise BundleError(
                    f"{codec_bundle.path} has z of {codec.n_latent} dimensions",
                    expected=str(config.n_latent),
                    fix="fetch the bundle again",
                )
        model = cls(
            networks,
            config,
            content.vocabulary,
            content.statistics,
            labels=labels,
            population=content.population,
            codec=codec,
            details=details_of(content),
            bundle_hash=content.hash,
        )
        return model.to(device)

    def save_pretrained(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the model as a bundle, whole or not at all.

        Parameters
        ----------
        path
            The new folder.
        overwrite
            Replace an existing bundle.

        Raises
        ------
        OutputError
            The folder exists.
        """
        config = {"family": FAMILY, "model": self.config.model_dump(mode="json"), **self.details}
        config |= {"n_parameters": self.n_parameters}
        field = self.labels.fields[0] if self.labels.fields else None
        wanted = f', condition={{"{field}": "{self.labels.labels(field)[0]}"}}' if field else ""
        bundle.write_bundle(
            Path(path),
            config=config,
            weights={name: tensor.detach().cpu() for name, tensor in self.networks.state_dict().items()},
            vocabulary=self.vocabulary,
            statistics=self.statistics,
            labels=self.labels.to_dict(),
            population=self.population,
            codec=None if self.codec is None else self.codec.save_pretrained,
            card=model_card(
                {**config, "conditions": self.labels.to_dict()},
                self.vocabulary,
                self.n_parameters,
                self.n_latent,
                use=(
                    "import scdiva as sd",
                    'model = sd.ScDiffusion.from_pretrained("PATH")',
                    f"cells = sd.tl.generate(model, 500{wanted})  # a new AnnData of integer counts",
                ),
            ),
            overwrite=overwrite,
        )

    def to(self, device: str) -> Self:
        """Move the weights, also those of the codec; ``"auto"`` takes a GPU if there is one."""
        super().to(device)
        if self.codec is not None:
            self.codec.to(str(self.device))
        return self

    @property
    def module(self) -> Networks:
        """The weights, without those of the codec."""
        return self.networks

    @property
    def n_latent(self) -> int:
        """Z, dimensions of z."""
        return self.config.n_latent

    @property
    def view_share(self) -> float:
        """Share of a cell's molecules that its z stands for: all, or what the codec says."""
        return 1.0 if self.codec is None else self.codec.view_share

    def weights_hash(self) -> str:
        """Fingerprint the weights, saved or not; the codec's too."""
        own = super().weights_hash()
        if self.codec is None:
            return own
        return hashlib.sha256(f"{own} {self.codec.weights_hash()}".encode()).hexdigest()

    @torch.inference_mode()
    def encode(self, cells: CellCounts) -> NDArray[np.float32]:
        """Return z of cells, ``(n_cells, Z)`` float32, without randomness, each cell by itself.

        It is standardised; that of the published networks is on the unit sphere instead.

        Parameters
        ----------
        cells
            Raw counts in the order of :attr:`vocabulary`. A codec's z of whole cells is less noisy than the z that is
            drawn, of a share of their molecules (:attr:`view_share`).
        """
        if self.codec is not None:
            return self.networks.codec_head.standardised(self.codec.encode(cells))
        parts = [
            self.networks.autoencoder.encode(SparseCells.pack(cells.take(rows)).to(self.device)).cpu().numpy()
            for rows in _blocks(cells.n_cells)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.n_latent), dtype=np.float32)

    def decode(self, z: NDArray[np.float32], depth: ArrayLike, rng: np.random.Generator) -> sp.csr_matrix:
        """Draw counts given z, from a negative binomial of every gene.

        The published decoder states continuous log1p(CP10K) and no distribution of counts: with the published networks
        each gene's count is a Poisson draw at its share of the CP10K stated (our decision).

        Parameters
        ----------
        z
            ``(n, Z)`` as of :meth:`encode`.
        depth
            Expected UMIs of each cell over the model's genes, one number or ``(n,)``.
        rng
            Source of randomness.

        Returns
        -------
        scipy.sparse.csr_matrix
            ``(n, n_genes)`` int32.
        """
        genes = self.networks.autoencoder if self.codec is None else self.networks.codec_head
        theta = None
        if isinstance(genes, Autoencoder | CodecHead):
            theta = np.exp(genes.log_theta_G.detach().cpu().numpy().astype(np.float64))
        wanted = np.broadcast_to(np.asarray(depth, dtype=np.float64), (z.shape[0],))
        parts = [sp.csr_matrix(np.zeros((0, self.vocabulary.n_genes), dtype=np.int32))]
        for rows in _blocks(z.shape[0]):
            rate = self.expected_share(z[rows]).astype(np.float64) * wanted[rows, None]
            if theta is not None:
                # a Poisson count whose rate is a gamma variable is a negative binomial
                rate = rng.standard_gamma(np.broadcast_to(theta, rate.shape)) * (rate / theta)
            parts.append(sp.csr_matrix(rng.poisson(rate).astype(np.int32)))
        return sp.csr_matrix(sp.vstack(parts, format="csr"))

    @torch.inference_mode()
    def expected_share(self, z: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the expected share of each gene among a cell's UMIs, ``(n, n_genes)`` float32; rows sum to 1.

        With the published networks these are the continuous values of the decoder, without the draw of counts (for
        log1p(CP10K): ``np.log1p(1e4 * share)``).

        Parameters
        ----------
        z
            ``(n, Z)`` as of :meth:`encode`.
        """
        if self.codec is not None:
            head = self.networks.codec_head
            return head.adjusted(self.codec.expected_share(head.codec_latent(z)))
        latent = torch.from_numpy(np.ascontiguousarray(z, dtype=np.float32)).to(self.device)
        return np.asarray(self.networks.autoencoder.share(latent).cpu())

    @property
    def default_sampler(self) -> LatentSampler:
        """How z is drawn if nothing is said: DPM-Solver++; DDPM with all steps where betas are linear, as published."""
        return LatentSampler("ddpm" if self.config.schedule == "linear" else "dpm")

    def sample(
        self, condition: NDArray[np.integer], sizes: NDArray[np.integer], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Draw z with the default sampler and no extra guidance: what :class:`~scdiva.types.LatentPrior` asks for.

        It is the z of :meth:`encode`, or, around a codec, the codec's own.

        Parameters
        ----------
        condition
            ``(n, n_fields)`` codes of :attr:`labels`; 0 is any.
        sizes
            ``(n, 2)`` UMIs and genes; genes are not used.
        rng
            Source of randomness.
        """
        generator = torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))
        z = self.sample_latents(condition, sizes[:, 0], generator)
        return z if self.codec is None else self.networks.codec_head.codec_latent(z)

    # gradients of classifiers need ordinary tensors, also where the caller is in inference mode
    @torch.inference_mode(False)
    def sample_latents(
        self,
        condition: NDArray[np.integer],
        depth: ArrayLike,
        generator: torch.Generator,
        *,
        sampler: LatentSampler | None = None,
        weight: Mapping[str, float] | None = None,
        guidance: Mapping[str, float] | None = None,
        pull: Mapping[str, NDArray[np.floating]] | None = None,
        start: NDArray[np.float32] | None = None,
        start_time: float = 1.0,
        end: NDArray[np.float32] | None = None,
        position: float = 0.0,
    ) -> NDArray[np.float32]:
        """Draw z of cells of given conditions.

        Parameters
        ----------
        condition
            ``(n, n_fields)`` codes of :attr:`labels`; 0 is any.
        depth
            UMIs of each cell, one number or ``(n,)``: z of shallow cells is noisier, and the denoiser is told.
        generator
            Source of randomness, of the CPU.
        sampler
            How; :attr:`default_sampler` if left out.
        weight
            Classifier-free guidance weight of fields of the denoiser; 1 is plain conditioning.
        guidance
            Scale of classifier guidance towards the wanted label, by field. A field that only a classifier knows gets
            ``config.guidance`` (1; 2 as published) if it is left out, other fields 0.
        pull
            Weights of all labels of a field, ``(n, n_labels)`` or ``(n_labels,)``, in the place of ``guidance``: two
            labels with weights interpolate between them.
        start
            ``(n, Z)`` z of real cells to start from; None: noise.
        start_time
            How far these are noised, in (0, 1]; the loop starts there.
        end, position
            ``(n, Z)`` z of other real cells, noised by the same noise: the loop starts at the spherical interpolation
            of both at a position from 0 (``start``) to 1. See :func:`~scdiva.models.scdiffusion.sampling.slerp`.

        Returns
        -------
        numpy.ndarray
            ``(n, Z)`` float32.

        Raises
        ------
        ConfigError
            Impossible numbers, a weight for a field the denoiser does not take, or guidance without a classifier.
        """
        sampler = sampler or self.default_sampler
        sampler.check(self.config.n_times)
        if not 0 < start_time <= 1:
            raise ConfigError(f"start_time={start_time}", expected="above 0, at most 1", fix="0.8 is usual")
        n = condition.shape[0]
        column = {field: i for i, field in enumerate(self.labels.fields)}
        told = [column[field] for field in self.config.fields]
        scale = self.guidance_scales(guidance or {}, pull or ())
        guides = []
        for field, classifier in zip(self.config.classified, self.networks.classifiers, strict=True):
            assert isinstance(classifier, AnyClassifier)
            weights = np.zeros((n, len(self.labels.labels(field))), dtype=np.float32)
            if pull and field in pull:
                weights[:] = pull[field]
            elif scale.get(field):
                wanted = np.flatnonzero(condition[:, column[field]] > 0)
                weights[wanted, condition[wanted, column[field]] - 1] = scale[field]
            if weights.any():
                guides.append(Guide(classifier, torch.from_numpy(weights).to(self.device), self.config.guided_times))
        depths = self.networks.told_depth(np.broadcast_to(np.asarray(depth, dtype=np.float64), (n,)))
        z = draw_latents(
            self.networks.denoiser,
            torch.from_numpy(depths).to(self.device),
            torch.from_numpy(np.ascontiguousarray(condition[:, told], dtype=np.int64)).to(self.device),
            n_latent=self.n_latent,
            n_times=self.config.n_times,
            generator=generator,
            sampler=sampler,
            schedule=self.config.schedule,
            prediction=self.config.prediction,
            weight_F=self._weights(weight or {}),
            guides=guides,
            start_BZ=None if start is None else torch.from_numpy(np.asarray(start, dtype=np.float32)).to(self.device),
            start=start_time,
            end_BZ=None if end is None else torch.from_numpy(np.asarray(end, dtype=np.float32)).to(self.device),
            position=position,
        )
        return z.cpu().numpy()

    def check_guidance(self, weight: Mapping[str, float], guidance: Mapping[str, float]) -> None:
        """Refuse weights and scales that :meth:`sample_latents` would refuse.

        Raises
        ------
        ConfigError
            A weight for a field the denoiser does not take, guidance without a classifier, or impossible numbers.
        """
        self._weights(weight)
        self.guidance_scales(guidance)

    def _weights(self, weight: Mapping[str, float]) -> list[float]:
        for field, value in weight.items():
            if field not in self.config.fields:
                raise ConfigError(
                    f"a guidance weight for {field}, which the denoiser was not trained with",
                    expected=f"one of {', '.join(self.config.fields) or 'no field'}",
                    fix="use guidance by a classifier for that field",
                )
            if not np.isfinite(value) or value < 0:
                raise ConfigError(f"guidance weight {value} of {field}", expected="0 or more", fix="1 is plain")
        return [float(weight.get(field, 1.0)) for field in self.config.fields]

    def guidance_scales(self, guidance: Mapping[str, float], pull: Collection[str] = ()) -> dict[str, float]:
        """Return the scale of classifier guidance of each field: what was asked for, and what is implied.

        A field that only a classifier knows gets ``config.guidance`` if nothing is asked for.

        Parameters
        ----------
        guidance
            Scale by field.
        pull
            Fields whose classifier is told otherwise what to pull towards; they get no scale.

        Raises
        ------
        ConfigError
            A field without a classifier, or an impossible scale.
        """
        for field in (*guidance, *pull):
            if field not in self.config.classified:
                raise ConfigError(
                    f"classifier guidance by {field!r}, which has no classifier in this model",
                    expected=f"one of {', '.join(self.config.classified) or 'no field'}",
                    fix="use a guidance weight, or fit the model with a classifier for that field",
                )
        for field, value in guidance.items():
            if not np.isfinite(value) or value < 0:
                raise ConfigError(f"classifier guidance {value} of {field}", expected="0 or more", fix="1 is plain")
        only_classified = {
            field: self.config.guidance for field in self.config.classified if field not in self.config.fields
        }
        scale = {**only_classified, **{field: float(value) for field, value in guidance.items()}}
        return {field: value for field, value in scale.items() if field not in pull}


def _blocks(n: int) -> Sequence[NDArray[np.int64]]:
    return [np.arange(first, min(first + _BLOCK, n)) for first in range(0, n, _BLOCK)]
