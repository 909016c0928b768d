"""Fit neighbours in an embedding that is integrated over a reference and a query, for annotation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scdiva.config import NativeConfig
from scdiva.errors import UnsupportedError
from scdiva.models.annotators import FALSE_UNKNOWN_RATE
from scdiva.models.base import Embedder
from scdiva.models.scdiva.integrated import IntegratedIndex
from scdiva.models.scdiva.model import ScDiVa
from scdiva.models.scdiva.native import NativeNetwork
from scdiva.tasks.integrate import integrate_cells, loop_config
from scdiva.types import CellCounts, joined

STEPS = 300
"""Of the training; half of what an integration for its own sake takes (docs/experiments.md)."""


def fit_integrated(
    reference: CellCounts,
    query: CellCounts,
    code: NDArray[np.integer],
    n_classes: int,
    model: Embedder,
    *,
    seed: int,
    false_unknown_rate: float = FALSE_UNKNOWN_RATE,
    name: str = "reference and query",
) -> IntegratedIndex:
    """Integrate a reference and a query as two batches, without labels, and index the reference.

    With the labels of one side an integration would pull the query to the types that it looks like before the
    difference between the two is gone (our decision; docs/experiments.md).

    Parameters
    ----------
    reference, query
        Cells in the order of the model's vocabulary, over the genes that both measure.
    code, n_classes
        Classes of the reference's cells, and their number.
    model
        A native model: its gene embeddings are used; it is not changed.
    seed
        Seed of everything random.
    false_unknown_rate
        As in :meth:`scdiva.models.annotators.Calibration.fit`.
    name
        Of the data, for messages.

    Raises
    ------
    UnsupportedError
        The model is not native.
    GeneError, TrainingError, NonFiniteLossError
        See :func:`scdiva.tasks.integrate.integrate_cells`.
    """
    if not isinstance(model, ScDiVa):
        raise UnsupportedError(
            f"a {type(model).__name__} has no gene embeddings to integrate with",
            expected="a native scDiVa model",
            fix="use a model such as scdiva-blood-tiny, or the methods 'probe' and 'reference'",
        )
    cells = joined(reference, query)
    batch = np.repeat(["reference", "query"], [reference.n_cells, query.n_cells])
    loop = loop_config(cells.n_cells, seed=seed, device=model.device.type)
    loop = loop.model_copy(update={"training": loop.training.model_copy(update={"max_steps": STEPS})})
    # two files, each of which says what it measures; of a handful of cells one expects genes that are not there
    found = integrate_cells(cells, batch, model, loop=loop, seed=seed, name=name, warns_of_absent_genes=False)
    network, sizes = found.model.network, found.model.config
    assert isinstance(network, NativeNetwork)
    assert isinstance(sizes, NativeConfig)
    return IntegratedIndex.fit(
        network,
        sizes,
        np.asarray(cells.is_measured.all(axis=0)),
        found.z[: reference.n_cells],
        code,
        n_classes,
        false_unknown_rate=false_unknown_rate,
    )
