"""``generate`` by a latent diffusion: conditions to sizes, to z, to counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike, NDArray

from scdiva.data.output import check_output
from scdiva.data.population import DrawnSizes
from scdiva.errors import ConfigError, UnsupportedError
from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
from scdiva.tasks.generate import annotate_cells, check_sizes, condition_codes_of, deep_enough, unmet, write_parts
from scdiva.tasks.scdiva_latent import DecoderName, check_decoder, draw_masked, notes_on_masked

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

GROUP = 256
"""Cells that are drawn together, with one random stream."""
_SIZES, _LATENT, _COUNTS = 1, 2, 3  # tags of the random streams


@dataclass(frozen=True, slots=True)
class LatentPlan:
    """What is to be generated; equal plans give equal cells.

    Parameters
    ----------
    condition
        ``(n, n_fields)`` int32 codes; 0 is unknown.
    weight
        Classifier-free guidance weight of each wanted field of the denoiser.
    guidance
        Scale of classifier guidance of each wanted field that has some.
    sizes
        UMIs of each cell.
    sampler
        How z is drawn.
    seed
        Seed of everything.
    notes
        What the user should know: combinations that no training cell had, for example.
    decoder
        What turns z into counts; an autoencoder of its own counts as "profile".
    """

    condition: NDArray[np.int32]
    weight: Mapping[str, float]
    guidance: Mapping[str, float]
    sizes: DrawnSizes
    sampler: LatentSampler
    seed: int
    notes: tuple[str, ...]
    decoder: DecoderName = "profile"

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.condition.shape[0])


def plan_latent_cells(
    model: ScDiffusion,
    condition: Mapping[str, Any] | pd.DataFrame | None,
    n_cells: int | None,
    *,
    weight: float | Mapping[str, float] = 1.0,
    guidance: Mapping[str, float] | None = None,
    n_umis: ArrayLike | None = None,
    sampler: LatentSampler | None = None,
    decoder: DecoderName | None = None,
    seed: int = 0,
) -> LatentPlan:
    """Check a wish and settle everything but the draws themselves.

    Parameters
    ----------
    model
        The model.
    condition
        Label of each wanted field, for all cells; or one row per cell.
    n_cells
        Number of cells; left out where ``condition`` has rows.
    weight
        Classifier-free guidance weight of all wanted fields, or of each; 1 is plain conditioning.
    guidance
        Scale of classifier guidance by field.
    n_umis
        UMIs of the cells, one number or one per cell; else drawn from those of training cells.
    sampler
        How z is drawn; the model's usual sampler if left out.
    decoder
        Of a diffusion on the z of a scDiVa model: its profile decoder (the default) or its masked diffusion.
    seed
        Seed.

    Raises
    ------
    UnsupportedError, UntrainedHeadError
        A decoder that the model does not have.
    ConfigError
        Impossible numbers, a weight or scale for a field without a condition, or guidance without a classifier.
    KeyNotFoundError
        A field or label that the model does not know; lists those it knows.
    """
    codes, n = condition_codes_of(model.labels, condition, n_cells, 0)
    if n < 1:
        raise ConfigError(f"n_cells={n}", expected="at least 1", fix="say how many cells are wanted")
    if seed < 0:
        raise ConfigError(f"seed={seed}", expected="0 or more", fix="name another seed")
    sampler = checked_sampler(model, sampler)
    check_sizes("n_umis", n_umis, n)
    wanted = [field for i, field in enumerate(model.labels.fields) if codes[:, i].any()]
    if isinstance(weight, Mapping):
        weights = dict(weight)
    elif weight == 1.0:
        weights = {}
    else:
        weights = {field: float(weight) for field in wanted if field in model.config.fields}
        if not wanted:
            raise ConfigError(
                f"weight={weight} without a condition",
                expected="a weight of wanted fields",
                fix="add a condition, or leave the weight out",
            )
        if not weights:
            raise ConfigError(
                f"weight={weight} of {', '.join(wanted)}, which the denoiser was not trained with",
                expected="fields of the denoiser",
                fix="use guidance by a classifier for these fields",
            )
    if guidance is not None and not isinstance(guidance, Mapping):
        raise ConfigError(
            f"guidance={guidance!r}", expected="a scale by field", fix='for example guidance={"cell_type": 1}'
        )
    scales = dict(guidance or {})
    for field in (*weights, *scales):
        model.labels.labels(field)
        if field not in wanted:
            raise ConfigError(
                f"guidance for {field}, which has no condition",
                expected="guidance for wanted fields",
                fix=f"add a condition for {field}, or leave its weight out",
            )
    sizes = model.population.sizes.draw(codes, np.random.default_rng([seed, _SIZES]), depth=n_umis)
    notes = unmet(model.labels, model.population, codes)
    chosen = check_decoder(model, decoder)
    if chosen == "masked":
        sizes = deep_enough(sizes)
        notes += notes_on_masked(model, codes)
    plan = LatentPlan(codes, weights, scales, sizes, sampler, seed, tuple(notes), chosen)
    # impossible weights are refused before anything is drawn
    model.check_guidance(weights, scales)
    return plan


def checked_sampler(model: ScDiffusion, sampler: LatentSampler | None) -> LatentSampler:
    """Return a sampler that the model can be drawn with; its usual one if none is given.

    Raises
    ------
    ConfigError
        It is no sampler of z, or its numbers are impossible.
    """
    sampler = model.default_sampler if sampler is None else sampler
    if not isinstance(sampler, LatentSampler):
        raise ConfigError(
            f"a sampler of type {type(sampler).__name__}", expected="sd.LatentSampler", fix="leave the sampler out"
        )
    sampler.check(model.config.n_times)
    return sampler


def draw_latent_cells(model: ScDiffusion, plan: LatentPlan, group: int) -> tuple[sp.csr_matrix, NDArray[np.float32]]:
    """Draw one group of :data:`GROUP` cells: counts, CSR int32, and z."""
    rows = slice(group * GROUP, min((group + 1) * GROUP, plan.n_cells))
    state = np.random.SeedSequence([plan.seed, _LATENT, group]).generate_state(1, np.uint64)[0]
    depth = plan.sizes.depth[rows]
    z = model.sample_latents(
        plan.condition[rows],
        depth,
        torch.Generator().manual_seed(int(state >> np.uint64(1))),
        sampler=plan.sampler,
        weight=plan.weight,
        guidance=plan.guidance,
    )
    if plan.decoder == "masked":
        state = np.random.SeedSequence([plan.seed, _COUNTS, group]).generate_state(1, np.uint64)[0]
        return draw_masked(model, plan, rows, z, int(state >> np.uint64(1))), z
    return model.decode(z, depth, np.random.default_rng([plan.seed, _COUNTS, group])), z


def generate_latent(model: ScDiffusion, plan: LatentPlan, *, on_block: Callable[[int], None] | None = None) -> AnnData:
    """Draw all cells of a plan into memory, with their z in ``.obsm["X_scdiffusion"]``.

    Parameters
    ----------
    model, plan
        What to draw.
    on_block
        Called with the number of cells done.
    """
    import anndata as ad

    parts, latents = [], []
    for group in range(-(-plan.n_cells // GROUP)):
        counts, z = draw_latent_cells(model, plan, group)
        parts.append(counts)
        latents.append(z)
        if on_block is not None:
            on_block(min((group + 1) * GROUP, plan.n_cells))
    obs, var = annotate_cells(
        model.labels, model.vocabulary, plan.condition, plan.sizes, model.population.sizes.is_measured
    )
    if plan.decoder != "masked":
        del obs["scdiva_n_genes"]  # told of UMIs only
    return ad.AnnData(
        X=sp.vstack(parts, format="csr"),
        obs=obs,
        var=var,
        obsm={"X_scdiffusion": np.concatenate(latents)},
        uns={"scdiva": {"generate": latent_record(model, plan)}},
    )


def generate_latent_file(
    model: ScDiffusion,
    plan: LatentPlan,
    path: Path,
    *,
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> None:
    """Draw all cells of a plan into a file, in flat memory; it appears whole or not at all, without z.

    Parameters
    ----------
    model, plan
        What to draw.
    path
        ``.h5ad`` or ``.zarr``.
    overwrite
        Replace an existing output.
    on_block
        Called with the number of cells done.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist; raised before any work is done.
    """
    check_output(path, overwrite=overwrite)
    obs, var = annotate_cells(
        model.labels, model.vocabulary, plan.condition, plan.sizes, model.population.sizes.is_measured
    )
    if plan.decoder != "masked":
        del obs["scdiva_n_genes"]

    def parts() -> Iterator[sp.csr_matrix]:
        for group in range(-(-plan.n_cells // GROUP)):
            yield draw_latent_cells(model, plan, group)[0]
            if on_block is not None:
                on_block(min((group + 1) * GROUP, plan.n_cells))

    write_parts(path, parts(), obs, var, {"scdiva": {"generate": latent_record(model, plan)}})


def latent_record(model: ScDiffusion, plan: LatentPlan) -> dict[str, Any]:
    """Return what was asked of what, for ``.uns``.

    Fields and their numbers are two lists and no mapping: a "/" in a key would be a group in the file. Guidance by
    classifiers is what is applied, that which was not asked for (of fields that only a classifier knows) included.
    """
    wanted = [field for i, field in enumerate(model.labels.fields) if plan.condition[:, i].any()]
    scales = {field: scale for field, scale in model.guidance_scales(plan.guidance).items() if field in wanted}
    sampler = {**dataclasses.asdict(plan.sampler), "n_steps": plan.sampler.steps(model.config.n_times)}
    return {
        **model.provenance,
        "seed": plan.seed,
        "n_cells": plan.n_cells,
        "sampler": sampler,
        "latent": "latent diffusion",
        "decoder": "autoencoder" if model.codec is None else plan.decoder,
        "guidance_weights": {"field": list(plan.weight), "weight": [float(value) for value in plan.weight.values()]},
        "classifier_guidance": {"field": list(scales), "scale": list(scales.values())},
        "notes": list(plan.notes),
    }


def refuse_foreign_options(options: Mapping[str, Any]) -> None:
    """Refuse what only the masked diffusion does.

    Parameters
    ----------
    options
        Name to value; None where it was left out.

    Raises
    ------
    UnsupportedError
        Names those that were given.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise UnsupportedError(
            f"{', '.join(given)} with a model of family scdiffusion",
            expected="conditions, weights, guidance, n_umis, a latent sampler and a seed",
            fix=f"leave {', '.join(given)} out, or name a scDiVa model",
        )
