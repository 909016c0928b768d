"""Models that can generate, from the small models of the suite: with sizes of cells and a prior over z."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scdiva.data.reader import open_counts
from scdiva.tasks.pretrain import population_of

if TYPE_CHECKING:
    from anndata import AnnData

    from scdiva.models.scdiva import ScDiVa


def generating(model: ScDiVa, cells: AnnData) -> ScDiVa:
    """The same model with the population of some cells."""
    from scdiva.models.scdiva import ScDiVa

    counts = open_counts(cells, model.vocabulary).with_conditions(model.labels, {})
    return ScDiVa(
        model.network, model.config, model.vocabulary, model.statistics, details=model.details, labels=model.labels,
        population=population_of(model, counts, np.arange(cells.n_obs), seed=0),
    )  # fmt: skip
