"""``tl.interpolate``: cells on the way from one label to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scdiva.tasks.interpolate import InterpolationMethod
from scdiva.tasks.interpolate import interpolate as _interpolate

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.source import DataLike
    from scdiva.models.scdiffusion import LatentSampler, ScDiffusion


def interpolate(
    model: ScDiffusion,
    adata: DataLike,
    *,
    source: str,
    target: str,
    steps: int = 11,
    method: InterpolationMethod = "gradient",
    field: str | None = None,
    n_cells: int = 100,
    start_time: float | None = None,
    strength: float | None = None,
    weights: Sequence[tuple[float, float]] | None = None,
    from_noise: bool = False,
    sampler: LatentSampler | None = None,
    layer: str | None = None,
    seed: int = 0,
) -> AnnData:
    """Make cells on the way from one label to another.

    Parameters
    ----------
    model
        A latent diffusion; "gradient" needs its classifier of the field.
    adata
        Raw counts of real cells of both labels, with a column ``field``. Every path starts from a cell of the source.
    source, target
        Labels at the two ends.
    steps
        Positions on the path, both ends included.
    method
        "gradient": a classifier pulls noised source cells towards both labels. "slerp": spherical interpolation of a
        noised source and a noised target cell. "linear": mixed molecules of a source and a target cell, the baseline.
    field
        Column of both labels; if left out the model's field that has them.
    n_cells
        Paths: cells at each position.
    start_time
        How far real cells are noised, in (0, 1]; None: for "gradient" 0.9, or 0.6 with a linear schedule
        (published networks); 0.5 for "slerp".
    strength
        gradient: sum of the weights of the two labels; None: 4.
    weights
        gradient: weights of source and target at each position; None: they fall and rise linearly.
    from_noise
        gradient: start from noise; of the source cells only the UMIs are used.
    sampler
        How z is drawn; None: the model's usual sampler.
    layer
        Where the counts are; found if left out.
    seed
        Equal seeds give equal cells.

    Returns
    -------
    AnnData
        A new one; ``.obs`` holds ``scdiva_position``, ``scdiva_path`` and ``scdiva_method``. See
        :func:`scdiva.tasks.interpolate.interpolate`.

    Raises
    ------
    KeyNotFoundError
        No such field, label, column, or no cell of an end.
    ConfigError, UnsupportedError, SourceError, ScaleError, GeneError
        Impossible numbers, options of another method, a model without a classifier, or data that cannot be used.
    """
    return _interpolate(
        model,
        adata,
        source=source,
        target=target,
        steps=steps,
        method=method,
        field=field,
        n_cells=n_cells,
        start_time=start_time,
        strength=strength,
        weights=weights,
        from_noise=from_noise,
        sampler=sampler,
        layer=layer,
        seed=seed,
    )
