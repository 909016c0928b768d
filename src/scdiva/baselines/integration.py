"""Simple embeddings across batches: what integration is judged against, and a null control.

All have one shape: raw counts, the batch of every cell, labels (read by scANVI alone) and a seed; back comes an
embedding. Each is deterministic given its seed, on one machine. Genes are the 2,000 that are variable in most batches
(scanpy's flavour "seurat" with ``batch_key``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray

from scdiva.baselines.common import other_package, require
from scdiva.data.components import N_COMPONENTS, components_of, fit_components, log_cp10k, variable_genes
from scdiva.data.conditions import is_missing
from scdiva.errors import ConfigError

EPOCHS_SCVI = 200
PATIENCE_SCVI = 15
CELLS_PER_LABEL_SCANVI = 100
_UNLABELLED = "Unknown"

Embedding = NDArray[np.float32]
Integration = Callable[..., Embedding]


def pca(counts: sp.csr_matrix, batches: ArrayLike, labels: ArrayLike | None = None, *, seed: int) -> Embedding:
    """50 principal components of log1p(CP10K): no integration at all, the floor.

    Parameters
    ----------
    counts
        CSR ``(n_cells, n_genes)`` raw counts.
    batches
        ``(n_cells,)`` batch of every cell, taken as text.
    labels
        ``(n_cells,)`` types, or None. Not read.
    seed
        Seed of the PCA solver.

    Returns
    -------
    numpy.ndarray
        ``(n_cells, 50)`` float32; fewer columns for fewer cells or genes.

    Raises
    ------
    ConfigError
        There are fewer than two batches, or another number of batches or labels than of cells.
    """
    batch, _ = _checked(counts, batches, labels)
    values = log_cp10k(counts)
    values = values[:, variable_genes(values, batches=batch)]
    return components_of(fit_components(values, seed=seed), values)


def harmony(counts: sp.csr_matrix, batches: ArrayLike, labels: ArrayLike | None = None, *, seed: int) -> Embedding:
    """Harmony (harmonypy, its defaults) on the components of :func:`pca` (extra ``eval``).

    Parameters as in :func:`pca`; labels are not read.

    Raises
    ------
    ConfigError
        As for :func:`pca`.
    UnsupportedError
        harmonypy is not installed.
    """
    require("harmonypy", "harmony", "harmonypy")
    import pandas as pd

    batch, _ = _checked(counts, batches, labels)
    points = pca(counts, batch, seed=seed)
    meta = pd.DataFrame({"batch": batch})
    with other_package("harmonypy") as package:
        found = package.run_harmony(points.astype(np.float64), meta, "batch", random_state=seed, verbose=False)
    corrected = np.asarray(found.Z_corr, dtype=np.float32)
    # harmonypy below 1.0 has cells in columns
    return np.ascontiguousarray(corrected if corrected.shape == points.shape else corrected.T)


def scvi(
    counts: sp.csr_matrix,
    batches: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    seed: int,
    max_epochs: int = EPOCHS_SCVI,
) -> Embedding:
    """Latent of scVI with the batch as its covariate (extra ``eval``).

    scvi-tools' defaults (10 dimensions, zero-inflated negative binomial), but at most 200 epochs, or until the ELBO of
    the 10 % of cells that scvi-tools holds out has not improved for 15. Parameters as in :func:`pca`; labels are not
    read, and ``max_epochs`` is the longest training.

    Raises
    ------
    ConfigError
        As for :func:`pca`.
    UnsupportedError
        scvi-tools is not installed.
    """
    require("scvi", "scvi", "scvi-tools")
    batch, _ = _checked(counts, batches, labels)
    with _training(seed) as package:
        model = _trained_scvi(package, _variable_counts(counts, batch), max_epochs)
        return np.asarray(model.get_latent_representation(), dtype=np.float32)


def scanvi(
    counts: sp.csr_matrix,
    batches: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    seed: int,
    max_epochs: int = EPOCHS_SCVI,
) -> Embedding:
    """Latent of scANVI, which starts from :func:`scvi` and sees the labels (extra ``eval``).

    scvi-tools' own number of epochs (at most 10 after scVI) with 100 cells per label in each of them, as in its
    tutorial. Cells without a label ("unassigned", "unknown", empty) are its unlabelled ones. It is shown the labels
    that it is scored by: compare supervised methods with it, not others. Parameters as in :func:`scvi`.

    Raises
    ------
    ConfigError
        As for :func:`pca`; or no cell has a label.
    UnsupportedError
        scvi-tools is not installed.
    """
    require("scvi", "scanvi", "scvi-tools")
    batch, label = _checked(counts, batches, labels)
    if label is None or (label == _UNLABELLED).all():
        raise ConfigError(
            "scANVI without labels",
            expected="the type of at least some cells",
            fix="name the column of labels, or leave 'scanvi' out of the methods",
        )
    with _training(seed) as package:
        cells = _variable_counts(counts, batch)
        cells.obs["label"] = label
        first = _trained_scvi(package, cells, max_epochs)
        model = package.model.SCANVI.from_scvi_model(first, unlabeled_category=_UNLABELLED, labels_key="label")
        model.train(n_samples_per_label=CELLS_PER_LABEL_SCANVI, **_TRAINER)
        return np.asarray(model.get_latent_representation(), dtype=np.float32)


def random(counts: sp.csr_matrix, batches: ArrayLike, labels: ArrayLike | None = None, *, seed: int) -> Embedding:
    """Gaussian noise, ``(n_cells, 50)``: the null control. Perfectly mixed, and nothing is left of the cells.

    Parameters as in :func:`pca`; only the number of cells is read.
    """
    _checked(counts, batches, labels)
    return np.random.default_rng(seed).normal(size=(counts.shape[0], N_COMPONENTS)).astype(np.float32)


BASELINES: Mapping[str, Integration] = {
    "pca": pca,
    "harmony": harmony,
    "scvi": scvi,
    "scanvi": scanvi,
    "random": random,
}
"""Every baseline of integration by name; ``pca`` is the floor, ``random`` the null control."""

TITLES: Mapping[str, str] = {
    "pca": "PCA-50, no integration",
    "harmony": "Harmony on the PCA",
    "scvi": "scVI",
    "scanvi": "scANVI (sees the labels)",
    "random": "Gaussian noise (null)",
}
"""What they are called in tables."""

NEEDS_LABELS: frozenset[str] = frozenset({"scanvi"})
"""Those that are shown the labels."""

_TRAINER: Mapping[str, Any] = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "logger": False,
    "enable_checkpointing": False,
}


def _checked(
    counts: sp.csr_matrix, batches: ArrayLike, labels: ArrayLike | None
) -> tuple[NDArray[np.str_], NDArray[np.str_] | None]:
    """Return batches and labels as text, missing labels as :data:`_UNLABELLED`."""
    batch = np.asarray(batches).astype(str).ravel()
    n_cells = counts.shape[0]
    if batch.size != n_cells:
        raise ConfigError(
            f"{n_cells} cells and {batch.size} batches", expected="the batch of every cell", fix="check the column"
        )
    names = np.unique(batch)
    if names.size < 2:
        raise ConfigError(
            f"one batch ({', '.join(map(str, names))})" if names.size else "no batches",
            expected="at least two batches",
            fix="name the column of .obs that tells batches, donors or technologies apart",
        )
    if labels is None:
        return batch, None
    label = np.asarray(labels).astype(str).ravel()
    if label.size != n_cells:
        raise ConfigError(
            f"{n_cells} cells and {label.size} labels", expected="the label of every cell", fix="check the column"
        )
    kinds, code = np.unique(label, return_inverse=True)
    return batch, np.array([_UNLABELLED if is_missing(kind) else kind for kind in kinds], dtype=str)[code]


def _variable_counts(counts: sp.csr_matrix, batch: NDArray[np.str_]) -> Any:
    """Return an AnnData of the variable genes' counts, with batches."""
    import anndata as ad

    genes = variable_genes(log_cp10k(counts), batches=batch)
    cells = ad.AnnData(sp.csr_matrix(counts[:, genes], dtype=np.float32))
    cells.obs["batch"] = batch
    return cells


def _trained_scvi(package: Any, cells: Any, max_epochs: int) -> Any:
    package.model.SCVI.setup_anndata(cells, batch_key="batch")
    model = package.model.SCVI(cells)
    model.train(max_epochs=max_epochs, early_stopping=True, early_stopping_patience=PATIENCE_SCVI, **_TRAINER)
    return model


@contextmanager
def _training(seed: int) -> Iterator[Any]:
    """Yield scvi-tools, seeded and quiet, with denormal numbers flushed to 0."""
    import torch

    with other_package("scvi") as package:
        # weights that decay towards 0 become denormal numbers, with which a CPU is many times slower
        torch.set_flush_denormal(True)
        try:
            package.settings.seed = seed
            yield package
        finally:
            torch.set_flush_denormal(False)
