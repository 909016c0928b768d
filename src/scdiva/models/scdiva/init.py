"""What the network starts at: the principal components and the mean profile of the corpus."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd

from scdiva.data.conditions import ConditionLabels
from scdiva.data.statistics import CP10K, GeneStatistics
from scdiva.errors import ConfigError
from scdiva.models.scdiva.native import LABEL_STATE, NativeNetwork, SimpleModel
from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts

if TYPE_CHECKING:
    from scdiva.models.scdiva.model import ScDiVa

MAX_CELLS = 50_000
"""Cells that the decomposition looks at; more change the leading components little and cost memory."""


def normalised_matrix(cells: CellCounts) -> sp.csr_matrix:
    """Return the L2-normalised log1p(CP10K) matrix, CSR ``(n_cells, n_genes)`` float32; empty cells stay zero."""
    counts = cells.counts
    value = log1p_cp10k(cells)
    n_stored = np.diff(counts.indptr)
    norm = np.sqrt(
        np.bincount(
            np.repeat(np.arange(n_stored.size), n_stored), weights=value.astype(float) ** 2, minlength=n_stored.size
        )
    )
    scale = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm > 0)
    return sp.csr_matrix(
        (value * np.repeat(scale, n_stored).astype(np.float32), counts.indices, counts.indptr), shape=counts.shape
    )


def corpus_components(blocks: Iterable[CellCounts], n_components: int, seed: int) -> tuple[NDArray[np.float32], float]:
    """Decompose the corpus.

    Parameters
    ----------
    blocks
        Training cells (held-out cells must not be among them).
    n_components
        K, number of singular vectors; fewer are returned if the data have no more.
    seed
        Seed of the randomised algorithm (Halko et al. 2011, as in scikit-learn).

    Returns
    -------
    components_GK
        ``(n_genes, K)`` float32 gene loadings, scaled so that their root mean square is ``1 / sqrt(K)``; the sign of
        each component is fixed.
    pool_scale
        Factor that brings the pooled scores of these cells to K units of total variance.
    """
    matrix = sp.vstack([normalised_matrix(block) for block in blocks], format="csr")
    n_components = min(n_components, min(matrix.shape) - 1)
    _, _, v_KG = randomized_svd(matrix, n_components, random_state=seed, flip_sign=True)
    components = v_KG.T / (np.sqrt(np.mean(v_KG**2)) * np.sqrt(n_components))
    scores = matrix @ components
    pool_scale = np.sqrt(n_components / scores.var(axis=0).sum())
    return components.astype(np.float32), float(pool_scale)


_N_DEPTHS = 16


def simple_model(
    statistics: GeneStatistics,
    n_measured_G: NDArray[np.integer],
    depths: NDArray[np.floating],
    mean_value_G: NDArray[np.floating] | None = None,
) -> SimpleModel:
    """Return what the corpus's statistics say of each gene without looking at a cell.

    Parameters
    ----------
    statistics
        Of the training cells.
    n_measured_G
        ``(n_genes,)`` number of training cells whose file measures the gene: a gene that a file lacks is unknown
        there, not absent.
    depths
        UMIs of each training cell in genes of the vocabulary. Sixteen quantiles stand for them: with the mean depth,
        a few deeply read cells would set the dispersion of all genes.
    mean_value_G
        ``(n_genes,)`` mean log1p(CP10K) of each gene over the cells in which it is detected. None: log1p of the mean,
        a little more, which makes the floor of the error a little easier to beat.
    """
    n_measured = np.maximum(n_measured_G, 1).astype(float)
    # half a cell more on either side keeps log-odds finite
    detection = (statistics.n_detected + 0.5) / (n_measured + 1.0)
    # a gene's mean over the cells that could show it, with the pseudo-count of half a molecule in all of them together
    mean_depth = statistics.sum_counts.sum() / max(statistics.n_cells, 1)
    rate = (statistics.sum_cp10k + CP10K * 0.5 / max(mean_depth, 1.0)) / n_measured / CP10K
    profile = rate / rate.sum()
    quantiles = np.quantile(depths, (np.arange(_N_DEPTHS) + 0.5) / _N_DEPTHS)
    is_seen = statistics.n_detected > 0
    if mean_value_G is None:
        mean_value_G = np.log1p(statistics.sum_cp10k / np.maximum(statistics.n_detected, 1))
    mean_value = np.where(is_seen, mean_value_G, mean_value_G[is_seen].mean() if is_seen.any() else 0.0)
    return SimpleModel(
        log_profile_G=torch.from_numpy(np.log(profile)).float(),
        detection_logit_G=torch.from_numpy(np.log(detection) - np.log1p(-detection)).float(),
        log_theta_G=torch.from_numpy(_log_theta(rate, quantiles, detection)).float(),
        mean_log_depth=float(np.log1p(depths).mean()),
        mean_value_G=torch.from_numpy(mean_value).float(),
    )


_LOG_THETA = (-3.0, 4.0)


def _log_theta(
    rate: NDArray[np.float64], depths: NDArray[np.float64], detection: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Solve mean over depths of 1 - NB(0; depth * rate, theta) = detection by bisection; the ends where none fits."""
    lower, upper = (np.full(rate.size, end) for end in _LOG_THETA)
    for _ in range(24):
        middle = 0.5 * (lower + upper)
        theta = np.exp(middle)
        # detection grows with theta: less dispersion spreads the same molecules over more cells
        expected = np.mean([-np.expm1(-theta * np.log1p(depth * rate / theta)) for depth in depths], axis=0)
        too_low = expected < detection
        lower, upper = np.where(too_low, middle, lower), np.where(too_low, upper, middle)
    return 0.5 * (lower + upper)


def init_network(
    network: NativeNetwork,
    statistics: GeneStatistics,
    simple: SimpleModel,
    blocks: Iterable[CellCounts] | None,
    n_components: int,
    seed: int,
) -> None:
    """Set everything in a network that starts at the corpus.

    ``blocks`` are the cells whose principal components the gene embeddings start at; None: at noise.
    """
    network.init_simple_model(simple)
    if blocks is None:
        with torch.no_grad():
            network.anchor.log_profile.copy_(simple.log_profile_G)
        return
    components, pool_scale = corpus_components(blocks, n_components, seed)
    network.anchor.init_from_corpus(torch.from_numpy(components), simple.log_profile_G, pool_scale)


@torch.no_grad()
def grow(network: torch.nn.Module, base: ScDiVa, labels: ConditionLabels) -> None:
    """Start a network at the weights of a model; it may have more labels, condition fields or a trunk in addition.

    Whatever the model has goes in; what only the new network has stays at its own start. A trunk and more labels change
    no prediction at first; one more field gives a trained trunk one more token to read, which does a little.

    Parameters
    ----------
    network
        Over the same genes.
    base
        The model.
    labels
        Condition labels of the network: those of the model, with more at the end of each field.

    Raises
    ------
    ConfigError
        The model has a weight that does not fit into the network; names the first.
    """
    own = network.state_dict()
    label_embeddings = {f"trunk.labels.{i}.weight" for i in range(labels.n_fields)}
    for name, tensor in base.network.state_dict().items():
        target = own.get(name)
        if name in LABEL_STATE and target is None:  # a calibration of its own gives the new network its offsets
            continue
        if target is not None and target.shape == tensor.shape:
            target.copy_(tensor)
        elif target is not None and name in label_embeddings and target.shape[1:] == tensor.shape[1:]:
            target[: tensor.shape[0]] = tensor
            target[tensor.shape[0] :] = tensor[0]  # a new label starts as an unknown one
        else:
            raise ConfigError(
                f"{base.name} has {name} of shape {tuple(tensor.shape)}, the network of this run "
                f"{'none' if target is None else tuple(target.shape)}",
                expected="a [model] section with the sizes of the model to start from; a trunk may be added",
                fix="copy its [model] section (scdiva inspect), or train from the corpus",
            )
