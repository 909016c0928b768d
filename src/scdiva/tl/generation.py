"""``tl.generate``: new cells."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from scdiva.data.output import check_output
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import ConfigError, UnsupportedError
from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
from scdiva.tasks.embed import BatchSize
from scdiva.tasks.generate import DEFAULT_LATENT, LatentName, Plan, plan_cells
from scdiva.tasks.generate import generate as _generate
from scdiva.tasks.generate import generate_file as _generate_file
from scdiva.tasks.latent_generation import (
    LatentPlan,
    generate_latent,
    generate_latent_file,
    plan_latent_cells,
    refuse_foreign_options,
)
from scdiva.tasks.scdiva_latent import DecoderName, prior_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData
    from numpy.typing import ArrayLike
    from pandas import DataFrame

    from scdiva.data.source import DataLike
    from scdiva.diffusion.samplers import Sampler
    from scdiva.models.scdiva.model import ScDiVa
    from scdiva.types import LatentPrior


def generate(
    model: ScDiVa | ScDiffusion,
    n_cells: int | None = None,
    *,
    condition: Mapping[str, str] | DataFrame | None = None,
    weight: float | Mapping[str, float] = 1.0,
    guidance: Mapping[str, float] | None = None,
    like: DataLike | None = None,
    latent: LatentName | LatentPrior | None = None,
    n_genes: ArrayLike | None = None,
    n_umis: ArrayLike | None = None,
    sampler: Sampler | LatentSampler | None = None,
    decoder: DecoderName | None = None,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    normalize: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> AnnData:
    """Generate cells.

    Parameters
    ----------
    model
        From ``sd.ScDiVa.from_pretrained``; for cell types of your own, fine-tune one first (``scdiva finetune FILE
        --objective conditional --condition cell_type --out DIR``). Or from ``sd.ScDiffusion.from_pretrained``; fit one
        with ``scdiva scdiffusion fit``. Such a model takes neither ``like``, ``latent`` nor ``n_genes``.
    n_cells
        Number of cells. Left out where ``condition`` has a row per cell, or for one variation of each cell of ``like``.
    condition
        What the cells are to be: a label for each wanted field (``{"cell_type": "B cell"}``), or a table with one row
        per cell. Fields that are left out are unknown to the network. ``model.labels`` lists fields and labels.
    weight
        Guidance weight of all wanted fields, or of each. 1 is plain conditioning; above 1 cells become more typical of
        their condition and less varied; 0 ignores it towards the end.
    guidance
        Scale of classifier guidance by field, of an ``ScDiffusion`` with a classifier for it.
    like
        Real raw counts, an AnnData or a path: cells are generated from the z, with the size and the genes of these
        (variations of a cell).
    latent
        Where z comes from otherwise: ``"prior"`` (the default), drawn from a Gaussian mixture of the condition's
        training cells; ``"visible"``, pooled from the genes that are visible so far; ``"null"``, a learned constant; or
        any object with ``sample(condition, sizes, rng)`` and ``view_share`` (``scdiva.types.LatentPrior``), such as an
        ``ScDiffusion`` that was fitted on the z of this model, whose conditions are matched by name.
    n_genes, n_umis
        Genes and UMIs of each cell, one number or one per cell. Left out, both are drawn jointly from those of training
        cells of the condition; given one, the other is drawn from cells near it. The UMIs are told to the network;
        nothing forces the counts to add up to them.
    sampler
        How the sets are drawn (``sd.Sampler``): strategy, steps, grid, Gibbs rounds. Or how z is drawn, of an
        ``ScDiffusion`` (``sd.LatentSampler``): DPM-Solver++, DDIM or DDPM, and steps.
    decoder
        Of an ``ScDiffusion`` on the z of a scDiVa model: ``"profile"`` (the default), counts around the expected
        profile of scDiVa's profile decoder, or ``"masked"``, scDiVa's masked diffusion given z.
    seed
        Equal seeds give equal cells on the same kind of machine.
    batch_size
        Cells between two calls of ``on_block``; no influence on the result.
    normalize
        Also fill ``.layers["log1p_cp10k"]``.
    on_block
        Called with the number of cells done, for progress.

    Returns
    -------
    AnnData
        ``X`` CSR int32 counts; ``.obs``: the wanted labels, ``scdiva_n_genes`` and ``scdiva_n_umis`` (what the network
        was told), ``scdiva_synthetic`` (True); ``.var``: the genes of the vocabulary; ``.uns["scdiva"]["generate"]``:
        model, hash, seed, settings, and notes on what no training cell had. Of an ``ScDiffusion`` there is no
        ``scdiva_n_genes``, and ``.obsm["X_scdiffusion"]`` holds z.

    Raises
    ------
    KeyNotFoundError
        A field or label that the model does not know; lists those it knows.
    ConfigError, BundleError, UnsupportedError, UntrainedHeadError
        See :func:`scdiva.tasks.generate.plan_cells`.
    """
    size = _generated_at_once(batch_size)
    if isinstance(model, ScDiffusion):
        refuse_foreign_options({"like": like, "latent": latent, "n_genes": n_genes})
        cells = generate_latent(
            model,
            plan_latent_cells(
                model,
                condition,
                n_cells,
                weight=weight,
                guidance=guidance,
                n_umis=n_umis,
                sampler=cast(LatentSampler | None, sampler),
                decoder=decoder,
                seed=seed,
            ),
            on_block=on_block,
        )
    else:
        plan = _plan(model, n_cells, condition, weight, guidance, like, latent, n_genes, n_umis, sampler, decoder, seed)
        cells = _generate(model, plan, batch_size=size, on_block=on_block)
    if normalize:
        cells.layers["log1p_cp10k"] = _log1p_cp10k(cells.X)
    return cells


def generate_file(
    path_out: str | Path,
    model: ScDiVa | ScDiffusion,
    n_cells: int | None = None,
    *,
    condition: Mapping[str, str] | DataFrame | None = None,
    weight: float | Mapping[str, float] = 1.0,
    guidance: Mapping[str, float] | None = None,
    like: DataLike | None = None,
    latent: LatentName | LatentPrior | None = None,
    n_genes: ArrayLike | None = None,
    n_umis: ArrayLike | None = None,
    sampler: Sampler | LatentSampler | None = None,
    decoder: DecoderName | None = None,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    overwrite: bool = False,
    on_block: Callable[[int], None] | None = None,
) -> Plan | LatentPlan:
    """Generate cells into a file in flat memory; the same call resumes where an interrupted one stopped.

    Everything as in :func:`generate`.

    Parameters
    ----------
    path_out
        ``.h5ad`` or ``.zarr``; appears whole or not at all. Finished blocks of 4,096 cells wait in a hidden folder
        beside it. (Cells of an ``ScDiffusion``, which are drawn in seconds, begin anew, and z is not written.)
    overwrite
        Replace an existing output.

    Returns
    -------
    Plan or LatentPlan
        What was drawn: conditions, sizes, notes.

    Raises
    ------
    OutputError
        The output exists, has another suffix, or its folder does not exist; raised before any work is done.
    """
    target = Path(path_out)
    check_output(target, overwrite=overwrite)
    size = _generated_at_once(batch_size)
    if isinstance(model, ScDiffusion):
        refuse_foreign_options({"like": like, "latent": latent, "n_genes": n_genes})
        latent_plan = plan_latent_cells(
            model,
            condition,
            n_cells,
            weight=weight,
            guidance=guidance,
            n_umis=n_umis,
            sampler=cast(LatentSampler | None, sampler),
            decoder=decoder,
            seed=seed,
        )
        generate_latent_file(model, latent_plan, target, overwrite=overwrite, on_block=on_block)
        return latent_plan
    plan = _plan(model, n_cells, condition, weight, guidance, like, latent, n_genes, n_umis, sampler, decoder, seed)
    _generate_file(model, plan, target, batch_size=size, overwrite=overwrite, on_block=on_block)
    return plan


_GENERATED = 256
"""Cells between two signs of progress."""


def _generated_at_once(batch_size: BatchSize) -> int:
    if batch_size != "auto" and batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}", expected="'auto' or a positive number", fix="leave it out")
    return _GENERATED if batch_size == "auto" else batch_size


def _plan(
    model: ScDiVa,
    n_cells: int | None,
    condition: Mapping[str, str] | DataFrame | None,
    weight: float | Mapping[str, float],
    guidance: Mapping[str, float] | None,
    like: DataLike | None,
    latent: LatentName | LatentPrior | None,
    n_genes: ArrayLike | None,
    n_umis: ArrayLike | None,
    sampler: Sampler | LatentSampler | None,
    decoder: DecoderName | None,
    seed: int,
) -> Plan:
    if decoder is not None:
        raise UnsupportedError(
            f"decoder={decoder!r} with {model.name}, of family scdiva",
            expected="a latent diffusion on the z of a scDiVa model (scdiva scdiffusion fit --codec)",
            fix="leave the decoder out",
        )
    if guidance:
        raise UnsupportedError(
            f"classifier guidance with {model.name}, of family scdiva",
            expected="a latent diffusion (scdiva scdiffusion fit)",
            fix="use guidance weights (weight=)",
        )
    if isinstance(sampler, LatentSampler):
        raise UnsupportedError(
            f"a sampler of z with {model.name}, of family scdiva", expected="sd.Sampler", fix="leave the sampler out"
        )
    cells = None
    if like is not None:
        reader = open_counts(open_source(like), model.vocabulary)
        cells = reader.read(np.arange(len(reader)))
    prior = prior_of(model, latent) if isinstance(latent, ScDiffusion) else None
    plan = plan_cells(
        model,
        condition,
        n_cells,
        weight=weight,
        latent=prior or (DEFAULT_LATENT if latent is None else latent),
        like=cells,
        n_genes=n_genes,
        n_umis=n_umis,
        sampler=sampler,
        seed=seed,
    )
    if prior is not None:
        prior.codes(plan.condition)  # what it does not know is refused before anything is drawn
    return plan


def _log1p_cp10k(counts: Any) -> Any:
    values = counts.astype(np.float32)
    total = np.asarray(values.sum(axis=1)).ravel()
    values.data = np.log1p(values.data * np.repeat(1e4 / np.maximum(total, 1.0), np.diff(values.indptr)))
    return values
