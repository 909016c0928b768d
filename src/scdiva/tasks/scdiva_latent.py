"""Latent diffusion on the z of a native scDiVa model: what is fitted, what it draws, how scDiVa decodes it.

The two families do not know each other; this is where they meet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.data.conditions import ConditionLabels
from scdiva.data.population import DrawnSizes
from scdiva.data.reader import CountsReader, open_counts
from scdiva.data.source import open_source
from scdiva.data.thinning import thin_counts
from scdiva.diffusion.samplers import Sampler
from scdiva.errors import ConfigError, KeyNotFoundError, UnsupportedError
from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
from scdiva.models.scdiffusion.autoencoder import SparseCells
from scdiva.models.scdiffusion.codec import CodecHead
from scdiva.models.scdiva import ScDiVa
from scdiva.models.scdiva.codec import ScDiVaCodec
from scdiva.tasks.generate import Plan, draw_cells, fine_tuned, named_as
from scdiva.types import CellCounts, LatentCodec

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.source import DataLike
    from scdiva.tasks.latent_generation import LatentPlan

DecoderName = Literal["profile", "masked"]
"""What turns a drawn z into counts: scDiVa's profile decoder with a negative binomial, or its masked diffusion."""

_MAX_VIEWS, _MAX_ROWS = 8, 200_000
"""Views of each cell, and of all cells together (but at least two of each): z of another part of a cell's molecules."""
_BLOCK = 512
_GENE_CELLS = 2048
"""Cells that the numbers of single genes are fitted to."""
# tags of the random streams that this file draws from a seed
_VIEW_STREAM, _GENE_STREAM = 163, 164

log = logging.getLogger(__name__)


def open_codec(codec: ScDiVa | str | Path) -> ScDiVaCodec:
    """Return a native model as a codec.

    Raises
    ------
    BundleError
        There is no such model.
    UnsupportedError, UntrainedHeadError
        It has no z of its own, or no trained profile decoder.
    """
    return ScDiVaCodec(codec if isinstance(codec, ScDiVa) else ScDiVa.from_pretrained(codec, device="cpu"))


def open_with_codec(data: DataLike, codec: ScDiVaCodec, layer: str | None) -> tuple[CountsReader, ScDiVaCodec]:
    """Open counts over the genes that both the data and the codec know, and restrict a copy of the codec to them.

    Raises
    ------
    SourceError, ScaleError, GeneError
        The data cannot be used.
    """
    source = open_source(data)
    reader = open_counts(source, codec.model.vocabulary, layer=layer)
    is_measured = reader.alignment.is_measured
    log.info(
        "%s: %s of the %s genes of %s are measured; %.2f %% of the UMIs are in genes that it does not know, and are "
        "left out",
        source.name,
        f"{int(is_measured.sum()):,}",
        f"{is_measured.size:,}",
        codec.model.name,
        100 * (1 - reader.sampled_coverage),
    )
    smaller = ScDiVaCodec(codec.model.restricted(is_measured))
    # how much of the file the model covers was looked at above
    return open_counts(source, smaller.model.vocabulary, layer=layer, min_coverage=0.0), smaller


def view_latents(codec: LatentCodec, cells: CellCounts, seed: int) -> NDArray[np.float32]:
    """Encode several views of each cell, ``(n_views * n_cells, Z)`` float32, all cells of the first view first.

    A view is a random part of a cell's molecules, of the share that the codec's z stands for. Several of them show
    the denoiser how much of z is noise, where one would be learned by heart.

    Parameters
    ----------
    codec
        The codec.
    cells
        Whole cells over its genes.
    seed
        Seed of the views.
    """
    rng = np.random.default_rng([seed, _VIEW_STREAM])
    share = codec.view_share
    n_views = 1 if share >= 1 else int(np.clip(_MAX_ROWS // max(cells.n_cells, 1), 2, _MAX_VIEWS))
    return np.concatenate(
        [
            codec.encode(block if share >= 1 else thin_counts(block, share, rng))
            for _ in range(n_views)
            for block in _blocks(cells)
        ]
    )


def fit_codec_head(head: CodecHead, codec: LatentCodec, cells: CellCounts, z: NDArray[np.float32], seed: int) -> None:
    """Fit scale of z, slopes, offsets and dispersions to training cells.

    Counts of whole cells are scored given z of a view: that is how a drawn z is decoded.

    Parameters
    ----------
    head
        Changed.
    codec
        The codec.
    cells
        The training cells.
    z
        The codec's z of the views of these cells.
    seed
        Seed of the choice of cells and their views.
    """
    head.standardise_by(z)
    rng = np.random.default_rng([seed, _GENE_STREAM])
    chosen = cells.take(np.sort(rng.permutation(cells.n_cells)[:_GENE_CELLS]))
    head.fit_genes(
        (codec.expected_share(codec.encode(thin_counts(block, codec.view_share, rng))), SparseCells.pack(block))
        for block in _blocks(chosen)
    )


def _blocks(cells: CellCounts) -> Iterator[CellCounts]:
    for first in range(0, cells.n_cells, _BLOCK):
        yield cells.take(np.arange(first, min(first + _BLOCK, cells.n_cells)))


def codes_by_name(
    codes: NDArray[np.integer], labels: ConditionLabels, target: ConditionLabels
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Translate condition codes from one model's fields and labels to another's.

    Parameters
    ----------
    codes
        ``(n, n_fields)`` codes of ``labels``; 0 is unknown.
    labels, target
        Fields and labels of the two.

    Returns
    -------
    codes
        ``(n, target.n_fields)`` int32; 0 where the target has no such field or label.
    untold
        What of the wanted has no counterpart: ``"field"``, or ``"field=label"``.
    """
    found = np.zeros((codes.shape[0], target.n_fields), dtype=np.int32)
    untold: list[str] = []
    for i, field in enumerate(labels.fields):
        used = np.unique(codes[codes[:, i] > 0, i])
        if field not in target.fields:
            untold += [field] if used.size else []
            continue
        table = np.concatenate([[0], target.codes(field, np.array(labels.labels(field), dtype=object))])
        found[:, target.fields.index(field)] = table[codes[:, i]]
        untold += [f"{field}={labels.labels(field)[code - 1]}" for code in used if table[code] == 0]
    return found, tuple(untold)


def check_decoder(model: ScDiffusion, decoder: DecoderName | None) -> DecoderName:
    """Return the decoder that is meant.

    Raises
    ------
    UnsupportedError
        The model decodes with an autoencoder of its own, or its scDiVa model cannot generate by masked diffusion.
    UntrainedHeadError
        The heads that masked diffusion needs were never trained.
    ConfigError
        There is no such decoder.
    """
    if decoder is None:
        return "profile"
    if decoder not in ("profile", "masked"):
        raise ConfigError(f"decoder={decoder!r}", expected="profile or masked", fix="leave it out for profile")
    if model.codec is None:
        raise UnsupportedError(
            f"decoder={decoder!r} with {model.name}, which decodes z with its own autoencoder",
            expected="a latent diffusion on the z of a scDiVa model (scdiva scdiffusion fit --codec)",
            fix="leave the decoder out",
        )
    if decoder == "masked":
        _scdiva_of(model).check_generates()
    return decoder


def notes_on_masked(model: ScDiffusion, codes: NDArray[np.int32]) -> list[str]:
    """Say which of the wanted labels the masked diffusion is not told, because scDiVa does not know them."""
    untold = codes_by_name(codes, model.labels, _scdiva_of(model).labels)[1]
    if not untold:
        return []
    return [f"{', '.join(untold)}: not known to the scDiVa model that decodes; z alone follows it"]


def draw_masked(model: ScDiffusion, plan: LatentPlan, rows: slice, z: NDArray[np.float32], seed: int) -> sp.csr_matrix:
    """Decode z by the masked diffusion of the scDiVa model: the path of :func:`scdiva.tasks.generate.draw_cells`.

    Parameters
    ----------
    model, plan
        What is drawn.
    rows
        Which cells of the plan.
    z
        Their z, standardised.
    seed
        Seed of the draws.
    """
    scdiva = _scdiva_of(model)
    sizes = DrawnSizes(*(getattr(plan.sizes, field.name)[rows] for field in fields(DrawnSizes)))
    told = Plan(
        condition=codes_by_name(plan.condition[rows], model.labels, scdiva.labels)[0],
        weight=np.ones(scdiva.labels.n_fields),
        sizes=sizes,
        is_measured=model.population.sizes.is_measured,
        sampler=Sampler(),
        latent="latent diffusion",
        prior=None,
        z=model.networks.codec_head.codec_latent(z),
        z_depth=(model.view_share * sizes.depth).astype(np.float32),
        seed=seed,
        notes=(),
    )
    return draw_cells(scdiva, told, 0, told.n_cells)


def _scdiva_of(model: ScDiffusion) -> ScDiVa:
    assert isinstance(model.codec, ScDiVaCodec)
    return model.codec.model


@dataclass(frozen=True, slots=True)
class DiffusionPrior:
    """A latent diffusion as the prior over z of a scDiVa model whose conditions are in another order.

    Parameters
    ----------
    diffusion
        On the z of that model.
    labels
        Fields and labels of the model.
    """

    diffusion: ScDiffusion
    labels: ConditionLabels

    @property
    def name(self) -> str:
        """For the record of what was generated."""
        return f"{self.diffusion.name} ({self.diffusion.bundle_hash[:12] or 'not saved'})"

    @property
    def view_share(self) -> float:
        """Share of a cell's molecules that its z stands for."""
        return self.diffusion.view_share

    def sample(
        self, condition: NDArray[np.integer], sizes: NDArray[np.integer], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Draw z of the scDiVa model; ``condition`` holds the model's codes.

        Raises
        ------
        KeyNotFoundError
            A field or label that the diffusion does not know.
        """
        return self.diffusion.sample(self.codes(condition), sizes, rng)

    def codes(self, condition: NDArray[np.integer]) -> NDArray[np.int32]:
        """Return the diffusion's codes of what is wanted by the model's; refuses what it does not know."""
        codes, untold = codes_by_name(condition, self.labels, self.diffusion.labels)
        if untold:
            known = "; ".join(f"{f}: {', '.join(names)}" for f, names in self.diffusion.labels.to_dict().items())
            raise KeyNotFoundError(
                f"{self.diffusion.name} draws no z for {', '.join(untold)}",
                expected=known or "no condition",
                fix="leave the condition out, or fit the diffusion with it",
            )
        return codes


def prior_of(model: ScDiVa, diffusion: ScDiffusion) -> DiffusionPrior:
    """Return a latent diffusion as the prior over z of a model.

    Raises
    ------
    UnsupportedError
        The diffusion is not on the z of this very model.
    """
    own = model.weights_hash()
    fitted_on = dict(diffusion.details.get("codec", {}))
    if diffusion.codec is None or own not in (fitted_on.get("weights_hash"), diffusion.codec.weights_hash()):
        whose = "its own autoencoder" if diffusion.codec is None else str(fitted_on.get("model", "another model"))
        raise UnsupportedError(
            f"{diffusion.name} draws z of {whose}, not of {model.name} as it is here",
            expected="a latent diffusion that was fitted on the z of the model",
            fix="fit one: scdiva scdiffusion fit FILE --codec MODEL --out DIR",
        )
    return DiffusionPrior(diffusion, model.labels)


def scdiffusion_scdiva_generator(
    base: ScDiVa,
    labels_key: str,
    *,
    decoder: DecoderName = "profile",
    sampler: LatentSampler | None = None,
    settings: Sequence[str] = (),
    n_training_steps: int = 0,
    folder: Path | None = None,
) -> Callable[[AnnData, Mapping[str, int], int], AnnData]:
    """Return what evaluations call: fine-tune scDiVa on training cells, fit a diffusion on its z, generate.

    Parameters
    ----------
    base, labels_key, n_training_steps
        As for :func:`scdiva.tasks.generate.scdiva_generator`, which fine-tunes in the same way.
    decoder
        What turns z into counts.
    sampler
        How z is drawn.
    settings
        As for :func:`scdiva.tasks.scdiffusion.fit_scdiffusion`.
    folder
        Where the models go: those of ``scdiva_generator`` are taken up, and both decoders share one diffusion. None:
        they are not kept.
    """

    def fit_and_generate(train: AnnData, wanted: Mapping[str, int], seed: int) -> AnnData:
        # deferred: these two modules import this one
        import pandas as pd

        from scdiva.tasks.latent_generation import generate_latent, plan_latent_cells
        from scdiva.tasks.scdiffusion import fit_scdiffusion

        codec = fine_tuned(base, labels_key, train, seed, n_training_steps=n_training_steps, folder=folder)
        model = fit_scdiffusion(
            train,
            [labels_key],
            None if folder is None else folder / f"scdiffusion-scdiva-seed-{seed}",
            codec=codec,
            settings=settings,
            with_classifiers=False,
            min_cells=1,
            seed=seed,
            device="cpu",
            progress=False,
        ).model
        table = pd.DataFrame({labels_key: [label for label, n in wanted.items() for _ in range(n)]})
        plan = plan_latent_cells(model, table, None, sampler=sampler, decoder=decoder, seed=seed)
        return named_as(generate_latent(model, plan), train, model.vocabulary)

    return fit_and_generate


def scdiffusion_scdiva_masked_generator(
    base: ScDiVa, labels_key: str, *, folder: Path | None = None
) -> Callable[[AnnData, Mapping[str, int], int], AnnData]:
    """Return :func:`scdiffusion_scdiva_generator` with the masked diffusion as the decoder."""
    return scdiffusion_scdiva_generator(base, labels_key, decoder="masked", folder=folder)
