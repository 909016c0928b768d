"""What a native model expects of chosen genes: profile decoder, the cell's own count, and how sure both are.

The expected count of gene g in a cell is depth times the gene's share in the profile decoder. Its *own* count, where
the file has one, either corrects that (``own_counts="used"``), or neither it nor the total that it is part of reaches
the network (``"hidden"``).

*Used*: z pools the whole cell, and the gene's rate has a gamma prior around the decoder's expectation mu with inverse
dispersion theta, so that after x molecules the expectation is mu (theta + x) / (theta + mu), as in SAVER (Huang et al.
2018). It moves towards x where many molecules were expected or the gene is dispersed, and hardly for a rare gene.

*Hidden*: genes fall into ten folds by their Ensembl id, and the whole fold of a gene is hidden when the gene is asked
for, so that the answer does not depend on what else is asked for. A z that misses a tenth of the cell would lack their
part in the pooled sum; the decoder's expectation of the hidden values, from a first pass without them, takes its place.

The trunk is not asked: on held-out molecules of cells that no model had seen, identity and value heads were no better
than the profile decoder (docs/imputation.md). (All our decisions.)

Shape letters: B cells, G genes, N genes that are measured or asked for, H hidden genes, E gene embedding, S sources.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import replace

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from scdiva.data.statistics import CP10K, GeneStatistics
from scdiva.errors import UntrainedHeadError
from scdiva.genes import GeneVocabulary
from scdiva.models.base import ImputedCounts, OwnCounts
from scdiva.models.scdiva.inputs import PackedCells
from scdiva.models.scdiva.native import NativeNetwork
from scdiva.serialization import log1p_cp10k
from scdiva.types import CellCounts

PRIOR_STRENGTH = 3.0
"""Factor on the bundle's inverse dispersions. Those are of counts around what the corpus or the trunk expects; around z
they spread less. Held-out deviance is flat from 2 to 5 on the four sets that were looked at (docs/imputation.md)."""

N_FOLDS = 10
"""A tenth of the genes is hidden at a time."""

_STREAM = 0x1A9
_HEADS = ("anchor", "profile_decoder")


def require_profile_decoder(trained_heads: tuple[str, ...], name: str) -> None:
    """Raise UntrainedHeadError unless anchor and profile decoder are trained."""
    missing = [head for head in _HEADS if head not in trained_heads]
    if missing:
        raise UntrainedHeadError(
            f"{' and '.join(missing)} of {name} {'were' if len(missing) > 1 else 'was'} never trained",
            expected=f"trained heads {' and '.join(_HEADS)} (scdiva inspect)",
            fix="use a model such as scdiva-blood-tiny, or train this one with objective.profile_weight > 0",
        )


def fold_of_genes(vocabulary: GeneVocabulary) -> NDArray[np.int64]:
    """Return the fold of each gene, ``(n_genes,)`` in 0 ... 9; by its id alone, in whatever vocabulary it is."""
    return np.array([zlib.crc32(str(name).encode()) % N_FOLDS for name in vocabulary.ensembl_id], dtype=np.int64)


def impute_native(
    network: NativeNetwork,
    statistics: GeneStatistics,
    vocabulary: GeneVocabulary,
    cells: CellCounts,
    genes: NDArray[np.integer],
    *,
    own_counts: OwnCounts,
    n_samples: int,
    seed: int,
) -> ImputedCounts:
    """Say what a native network expects of some genes of some cells.

    Parameters
    ----------
    network
        Anchor, profile decoder and dispersions of it are used.
    statistics
        Of its corpus: which share of a cell's molecules the genes that are hidden are expected to have.
    vocabulary
        Its genes.
    cells
        Raw counts in that order.
    genes
        ``(K,)`` gene indices, measured by the file or not.
    own_counts
        "used" or "hidden".
    n_samples, seed
        Half-samples of each cell. Their randomness comes from the seed and the cell's own counts, so that neither the
        other cells nor the order of genes in a file have a say.

    Returns
    -------
    ImputedCounts
    """
    chosen = np.asarray(genes, dtype=np.int64)
    fold = fold_of_genes(vocabulary)
    hidden = {int(k): fold == k for k in np.unique(fold[chosen])} if own_counts == "hidden" else {-1: None}
    columns = {k: np.flatnonzero(fold[chosen] == k) if k >= 0 else np.arange(chosen.size) for k in hidden}

    shape = (cells.n_cells, chosen.size)
    depth, scale = np.empty(shape), np.empty(shape)
    for k, is_hidden in hidden.items():
        visible = _visible(cells, is_hidden, statistics)
        depth[:, columns[k]] = np.maximum(_depth(visible), 1.0)[:, None]
        scale[:, columns[k]] = (CP10K / np.maximum(visible.library_size, 1.0))[:, None]

    def expected(view: CellCounts) -> NDArray[np.float64]:
        """Return expected counts at the depth of the cells themselves, from another view of them."""
        found = np.empty(shape)
        for k, is_hidden in hidden.items():
            visible = _visible(view, is_hidden, statistics)
            log_share = _log_share(network, visible, is_hidden, chosen[columns[k]])
            found[:, columns[k]] = np.exp(log_share.double().cpu().numpy())
        return depth * found

    theta = PRIOR_STRENGTH * network.log_theta[torch.from_numpy(chosen).to(network.log_theta.device)].exp()
    shape_K = theta.double().cpu().numpy()
    own = np.zeros(shape)
    is_used = np.zeros(shape, dtype=bool)
    if own_counts == "used":
        own = cells.counts[:, chosen].toarray().astype(np.float64)
        is_used = cells.is_measured[cells.source_of_cell][:, chosen]

    def corrected(mean: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(is_used, mean * (shape_K + own) / (shape_K + mean), mean)

    prior = expected(cells)
    resampled = np.empty((n_samples, *shape), dtype=np.float32)
    draws = np.empty((n_samples, *shape), dtype=np.float32)
    if n_samples:
        rngs = [_rng_of_cell(cells, row, seed) for row in range(cells.n_cells)]
        log_views = np.stack([np.log(expected(view)) for view in _half_samples(cells, rngs, n_samples)])
        # half a cell is nearer to the corpus's mean than the whole: the spread of the views counts, not where they lie
        views = prior * np.exp(log_views - log_views.mean(axis=0))
        for sample, mean in enumerate(views):
            resampled[sample] = corrected(mean)
        for row, rng in enumerate(rngs):
            shape_of = shape_K + own[row]
            rate = rng.gamma(shape_of, size=(n_samples, chosen.size)) * resampled[:, row] / shape_of
            draws[:, row] = rng.poisson(rate)
    return ImputedCounts(corrected(prior).astype(np.float32), scale.astype(np.float32), resampled, draws)


def _visible(cells: CellCounts, is_hidden_G: NDArray[np.bool_] | None, statistics: GeneStatistics) -> CellCounts:
    """Take hidden genes' counts out of cells, and out of their library sizes.

    The library is brought back to its size by the share of molecules that the corpus has in the hidden genes: a total
    that contained a hidden count would tell of it.
    """
    if is_hidden_G is None:
        return cells
    counts = cells.counts
    is_kept = ~is_hidden_G[counts.indices]
    visible = sp.csr_matrix(
        (np.where(is_kept, counts.data, 0), counts.indices.copy(), counts.indptr.copy()), shape=counts.shape
    )
    visible.eliminate_zeros()
    n_hidden = _depth(cells) - np.asarray(visible.sum(axis=1), dtype=np.float64).ravel()
    # a gene that the corpus never saw has a mean of 0; a file may measure no others
    mean = statistics.mean + 1e-12
    share = (cells.is_measured & ~is_hidden_G) @ mean / np.maximum(cells.is_measured @ mean, 1e-300)
    library = (cells.library_size - n_hidden) / np.maximum(share, 1e-6)[cells.source_of_cell]
    return replace(cells, counts=visible, library_size=library)


def _depth(cells: CellCounts) -> NDArray[np.float64]:
    return np.asarray(cells.counts.sum(axis=1), dtype=np.float64).ravel()


def _log_share(
    network: NativeNetwork, visible: CellCounts, is_hidden_G: NDArray[np.bool_] | None, genes: NDArray[np.int64]
) -> torch.Tensor:
    """Log of the molecules of each gene for one molecule of the visible measured genes, ``(B, K)``."""
    anchor = network.anchor
    device = anchor.log_profile.device
    packed = PackedCells.pack(visible).to(device)
    pooled_BE = network.pooled(packed)
    measured_S = visible.is_measured if is_hidden_G is None else visible.is_measured & ~is_hidden_G
    # genes that no file measures and nobody asks for have no part in this
    needed = np.union1d(np.flatnonzero(visible.is_measured.any(axis=0)), genes)
    embedding_NE, log_profile_N = (
        tensor[torch.from_numpy(needed).to(device)] for tensor in (anchor.gene_embedding, anchor.log_profile)
    )
    is_seen_BN = torch.from_numpy(measured_S[:, needed][visible.source_of_cell]).to(device)

    def log_rates(pooled_BE: torch.Tensor) -> torch.Tensor:
        direction_BE = anchor.direction(anchor.encode(pooled_BE))
        log_rate_BN = (F.linear(direction_BE, embedding_NE) + log_profile_N).float()
        total_B = torch.where(is_seen_BN, log_rate_BN, float("-inf")).logsumexp(dim=1)
        # a file may measure nothing but hidden genes
        return log_rate_BN - torch.where(is_seen_BN.any(dim=1), total_B, 0.0)[:, None]

    log_rate_BN = log_rates(pooled_BE)
    if is_hidden_G is not None:
        hidden_H = np.flatnonzero(is_hidden_G[needed] & visible.is_measured[:, needed].any(axis=0))
        at_H = torch.from_numpy(hidden_H).to(device)
        is_hidden_BH = torch.from_numpy(visible.is_measured[:, needed[hidden_H]][visible.source_of_cell]).to(device)
        depth_B, library_B = (
            torch.from_numpy(np.maximum(a, 1.0)).float().to(device) for a in (_depth(visible), visible.library_size)
        )
        mean_BH = log_rate_BN[:, at_H].exp() * depth_B[:, None]
        p_BH = -torch.expm1(-mean_BH)
        value_BH = torch.log1p(CP10K / library_B[:, None] * mean_BH / p_BH.clamp_min(1e-12))
        p_BH = p_BH * is_hidden_BH
        square_B = torch.from_numpy(_square_norm(visible)).float().to(device)
        sum_BE = pooled_BE * square_B.sqrt()[:, None]
        sum_BE = sum_BE + anchor.pool_scale * ((p_BH * value_BH) @ embedding_NE[at_H].float())
        norm_B = (square_B + (p_BH * value_BH.square()).sum(dim=1)).sqrt().clamp_min(1e-12)
        # an empty cell stays at the model's point of no information
        is_empty_B = torch.from_numpy(np.diff(visible.counts.indptr) == 0).to(device)
        log_rate_BN = log_rates(torch.where(is_empty_B[:, None], pooled_BE, sum_BE / norm_B[:, None]))
    return log_rate_BN[:, torch.from_numpy(np.searchsorted(needed, genes)).to(device)]


def _square_norm(cells: CellCounts) -> NDArray[np.float64]:
    """Sum of squared log1p(CP10K) of each cell."""
    row = np.repeat(np.arange(cells.n_cells), np.diff(cells.counts.indptr))
    square = np.square(log1p_cp10k(cells), dtype=np.float64)
    return np.bincount(row, weights=square, minlength=cells.n_cells).astype(np.float64)


def _rng_of_cell(cells: CellCounts, row: int, seed: int) -> np.random.Generator:
    """Return the cell's own source of randomness: from the seed and its counts, not from where it stands."""
    counts = cells.counts
    part = slice(counts.indptr[row], counts.indptr[row + 1])
    digest = hashlib.blake2b(counts.indices[part].astype(np.int64).tobytes(), digest_size=16)
    digest.update(counts.data[part].astype(np.int64).tobytes())
    return np.random.default_rng([seed, _STREAM, *np.frombuffer(digest.digest(), dtype=np.uint32).tolist()])


def _half_samples(cells: CellCounts, rngs: list[np.random.Generator], n_samples: int) -> list[CellCounts]:
    """Draw half-samples of cells: each molecule is kept with probability 1/2, those outside the vocabulary too.

    Half the molecules lie as far from the whole cell's expectation as the whole cell does from that of endless
    sequencing: their variance needs no factor (McCarthy 1969 for half-samples in general), and cells of half the depth
    are what the anchor was trained on (a bootstrap's doubled molecules are not).
    """
    counts = cells.counts
    n_outside = np.maximum(np.rint(cells.library_size - _depth(cells)), 0).astype(np.int64)
    data = np.empty((n_samples, counts.nnz), dtype=counts.data.dtype)
    outside = np.empty((n_samples, cells.n_cells))
    for row, rng in enumerate(rngs):
        part = slice(counts.indptr[row], counts.indptr[row + 1])
        data[:, part] = rng.binomial(counts.data[part], 0.5, size=(n_samples, part.stop - part.start))
        outside[:, row] = rng.binomial(n_outside[row], 0.5, size=n_samples)
    views = []
    for sample in range(n_samples):
        half = sp.csr_matrix((data[sample], counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)
        half.eliminate_zeros()
        library = np.asarray(half.sum(axis=1), dtype=np.float64).ravel() + outside[sample]
        views.append(replace(cells, counts=half, library_size=library))
    return views
