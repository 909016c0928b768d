"""``tl.interpolate``: cells on the way from one label to another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scdiva.data.conditions import column_text
from scdiva.data.reader import open_counts
from scdiva.data.source import open_source
from scdiva.errors import KeyNotFoundError, UnsupportedError
from scdiva.models.scdiffusion import LatentSampler, ScDiffusion
from scdiva.tasks.latent_generation import interpolate_latent

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.data.source import DataLike


def interpolate(
    model: ScDiffusion,
    data: DataLike | None = None,
    *,
    source: str,
    target: str,
    field: str | None = None,
    steps: int = 11,
    n_cells: int = 100,
    start_time: float = 0.8,
    strength: float = 2.0,
    sampler: LatentSampler | None = None,
    seed: int = 0,
) -> AnnData:
    """Generate cells on the way from one label to another by gradient interpolation.

    Parameters
    ----------
    model
        With a classifier of the field.
    data
        Raw counts with a column ``field``: the path starts from its cells of the source, noised. None: from noise.
    source, target
        Labels at the two ends.
    field
        Condition field of both; the first with a classifier if left out.
    steps
        Positions on the path, both ends included.
    n_cells
        Cells at each position.
    start_time
        How far real cells are noised, in (0, 1]: the more, the freer the path.
    strength
        Scale of the guidance, shared by the two labels.
    sampler
        How z is drawn.
    seed
        Equal seeds give equal cells.

    Returns
    -------
    AnnData
        See :func:`scdiva.tasks.latent_generation.interpolate_latent`.

    Raises
    ------
    KeyNotFoundError
        No such field, label, column, or no cell of the source.
    ConfigError, UnsupportedError, SourceError, ScaleError, GeneError
        Impossible numbers, a model without a classifier, or data that cannot be used.
    """
    if not isinstance(model, ScDiffusion) or not model.config.classified:
        raise UnsupportedError(
            "interpolation without a classifier of z",
            expected="a model of scdiva scdiffusion fit with classifiers",
            fix="fit one, or add a classifier (scdiva scdiffusion add-condition)",
        )
    named = field or model.config.classified[0]
    cells = None
    if data is not None:
        opened = open_source(data)
        model.labels.encode({named: source})  # names the label and those there are, before the data are looked at
        rows = np.flatnonzero(column_text(opened.column(named)) == source)
        if not rows.size:
            raise KeyNotFoundError(
                f"{opened.name} has no cell whose {named} is {source!r}",
                expected="cells of the source to start from",
                fix="name another source, or leave the data out to start from noise",
            )
        cells = open_counts(opened, model.vocabulary).read(rows[:n_cells] if n_cells > 0 else rows[:1])
    return interpolate_latent(
        model,
        named,
        source,
        target,
        cells=cells,
        n_cells=n_cells,
        steps=steps,
        start_time=start_time,
        strength=strength,
        sampler=sampler,
        seed=seed,
    )
