"""Simple generators: what made-up cells are judged against, and a null control.

All have one shape: counts of training cells, their types, and how many cells of each type are wanted; back come counts
and types, grouped by type in the order of ``wanted``. Each is deterministic given its seed.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from scdiva.errors import ConfigError, UnsupportedError

N_COMPONENTS = 50
EPOCHS_SCVI = 150
PATIENCE_SCVI = 15
MIN_CELLS_PER_GENE_SCVI = 3
_BLOCK = 256

Drawn = tuple[sp.csr_matrix, NDArray[np.str_]]


def multinomial_per_type(
    counts: sp.csr_matrix, labels: NDArray[np.str_], wanted: Mapping[str, int], seed: int
) -> Drawn:
    """Draw each cell's molecules from its type's mean profile; library sizes are those of random training cells.

    Parameters
    ----------
    counts
        CSR ``(n_cells, n_genes)`` raw counts of training cells.
    labels
        ``(n_cells,)`` their types.
    wanted
        Number of cells of each type; every type occurs among ``labels``.
    seed
        Seed of the draws.

    Returns
    -------
    counts, labels
        CSR int32 ``(sum of wanted, n_genes)``, and ``(sum of wanted,)`` types.

    Raises
    ------
    ConfigError
        A wanted type is not among the training cells, or the number wanted is negative.
    """

    def draw(train: sp.csr_matrix, n: int, rng: np.random.Generator) -> sp.csr_matrix:
        total = np.asarray(train.sum(axis=0), dtype=np.float64).ravel()
        genes = np.flatnonzero(total)
        if genes.size == 0:
            return _no_counts(n, train.shape[1])
        sizes = _library_sizes(train, n, rng)
        share = total[genes] / total.sum()
        return _in_blocks(n, genes, train.shape[1], lambda a, b: rng.multinomial(sizes[a:b], share))

    return _per_type(counts, labels, wanted, seed, draw)


def negative_binomial_per_type(
    counts: sp.csr_matrix, labels: NDArray[np.str_], wanted: Mapping[str, int], seed: int
) -> Drawn:
    """Draw each gene on its own from a negative binomial fitted to its type by moments.

    Mean of gene g in a cell of library size s: s times the gene's share of the type's molecules. Dispersion by the
    method of moments over the type's cells, given their library sizes; Poisson where the counts vary no more than
    that. Library sizes are those of random training cells. Parameters as in :func:`multinomial_per_type`.
    """

    def draw(train: sp.csr_matrix, n: int, rng: np.random.Generator) -> sp.csr_matrix:
        genes, share, dispersion = _moments(train)
        sizes = _library_sizes(train, n, rng)
        is_spread = dispersion > 0
        shape = 1.0 / dispersion[is_spread]

        def block(first: int, last: int) -> NDArray[np.int64]:
            rate = sizes[first:last, None] * share
            rate[:, is_spread] *= rng.gamma(shape, 1.0 / shape, size=(last - first, shape.size))
            return rng.poisson(rate)

        return _in_blocks(n, genes, train.shape[1], block)

    return _per_type(counts, labels, wanted, seed, draw)


def _moments(train: sp.csr_matrix) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return detected genes, their share of the molecules, and dispersion 1/θ (0: no more than Poisson)."""
    total = np.asarray(train.sum(axis=0), dtype=np.float64).ravel()
    genes = np.flatnonzero(total)
    size = np.asarray(train.sum(axis=1), dtype=np.float64).ravel()
    share = total[genes] / max(total.sum(), 1.0)
    x = sp.csr_matrix(train[:, genes], dtype=np.float64)
    # sum over cells of (x - s p)^2 - s p, without a dense matrix
    square = np.asarray(x.multiply(x).sum(axis=0)).ravel()
    cross = np.asarray(x.T @ size).ravel()
    squared_mean = share**2 * (size**2).sum()
    excess = square - 2 * share * cross + squared_mean - share * size.sum()
    return genes, share, np.maximum(excess / squared_mean, 0.0)


def pca_gaussian_per_type(
    counts: sp.csr_matrix, labels: NDArray[np.str_], wanted: Mapping[str, int], seed: int
) -> Drawn:
    """Draw from a Gaussian per type in the principal components of log1p(CP10K), and go back to genes.

    50 components of all types together; the covariance of a type is shrunk (Ledoit and Wolf 2004); values below 0 are
    clipped. It knows no counts: the result is **CP10K, float32, continuous**, not rounded (our decision: rounding
    would need a library size that the method does not have, and would flatter it where zeros are concerned). Metrics of
    counts have no value for it. Parameters as in :func:`multinomial_per_type`.
    """
    from sklearn.covariance import LedoitWolf
    from sklearn.decomposition import PCA

    total = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
    values = sp.csr_matrix(sp.diags_array(1e4 / total) @ counts)
    values.data = np.log1p(values.data)
    size = min(N_COMPONENTS, min(values.shape) - 1)
    pca = PCA(size, svd_solver="arpack", random_state=seed).fit(values)
    offset = pca.mean_ @ pca.components_.T

    def draw(train: sp.csr_matrix, n: int, rng: np.random.Generator) -> sp.csr_matrix:
        z = train @ pca.components_.T - offset
        drawn = np.broadcast_to(z.mean(axis=0), (n, size))
        if len(z) > 1:
            spread = np.linalg.cholesky(LedoitWolf().fit(z).covariance_ + 1e-9 * np.eye(size))
            drawn = drawn + rng.normal(size=(n, size)) @ spread.T

        def block(first: int, last: int) -> NDArray[np.float32]:
            return np.expm1(np.maximum(drawn[first:last] @ pca.components_ + pca.mean_, 0.0)).astype(np.float32)

        return _in_blocks(n, np.arange(train.shape[1]), train.shape[1], block)

    return _per_type(values, labels, wanted, seed, draw)


def independent_genes_per_type(
    counts: sp.csr_matrix, labels: NDArray[np.str_], wanted: Mapping[str, int], seed: int
) -> Drawn:
    """Permute each gene's counts over the training cells of a type.

    Every gene keeps its distribution within the type exactly, and loses what ties it to other genes: depth, programmes,
    subtypes. It makes no new counts, only new combinations, and is a strong baseline: all that is wrong with it is what
    a generator exists for. Where more cells are wanted than there are, further permutations follow. Parameters as in
    :func:`multinomial_per_type`.
    """
    return _per_type(counts, labels, wanted, seed, _permuted)


def shuffled(counts: sp.csr_matrix, labels: NDArray[np.str_], wanted: Mapping[str, int], seed: int) -> Drawn:
    """Permute each gene's counts over *all* training cells, whatever their type: the null control.

    The genes' distributions over the whole set are exact, and cells of a type are nothing of the kind. Parameters as
    in :func:`multinomial_per_type`.
    """
    _refuse_unknown(labels, wanted)
    drawn = _permuted(counts, sum(wanted.values()), np.random.default_rng(seed))
    return _tidy(drawn), _labels(wanted)


def _permuted(train: sp.csr_matrix, n: int, rng: np.random.Generator) -> sp.csr_matrix:
    n_cells = train.shape[0]
    by_gene = train.tocsc()
    rounds = [_no_counts(0, train.shape[1])]
    for _ in range(-(-n // n_cells)):
        rows = np.empty(by_gene.nnz, dtype=np.int64)
        for a, b in zip(by_gene.indptr[:-1], by_gene.indptr[1:], strict=True):
            if b > a:
                rows[a:b] = rng.choice(n_cells, b - a, replace=False)
        rounds.append(sp.csc_matrix((by_gene.data, rows, by_gene.indptr), shape=train.shape).tocsr())
    return sp.csr_matrix(sp.vstack(rounds, format="csr")[:n])


def scvi_posterior(
    counts: sp.csr_matrix,
    labels: NDArray[np.str_],
    wanted: Mapping[str, int],
    seed: int,
    *,
    max_epochs: int = EPOCHS_SCVI,
) -> Drawn:
    """Posterior predictive of scVI: counts drawn anew for random training cells of each type (extra ``eval``).

    scVI is trained on the training cells without their labels, on all genes in at least three of them (others are 0),
    negative binomial, otherwise scvi-tools' defaults, but at most 150 epochs, or until the ELBO of the 10 % of cells
    that scvi-tools holds out has not improved for 15. It starts from a real cell each time, which the other methods do
    not. Parameters as in :func:`multinomial_per_type`.

    Raises
    ------
    UnsupportedError
        scvi-tools is not installed.
    """
    require_scvi()
    import anndata as ad
    import scvi
    import torch

    _refuse_unknown(labels, wanted)
    is_used = np.bincount(counts.indices, minlength=counts.shape[1]) >= MIN_CELLS_PER_GENE_SCVI
    chosen = ad.AnnData(sp.csr_matrix(counts[:, is_used], dtype=np.float32))
    level = logging.getLogger("lightning.pytorch").level
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # weights that decay towards 0 become denormal numbers, with which a CPU is many times slower
    torch.set_flush_denormal(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scvi.settings.seed = seed
            scvi.model.SCVI.setup_anndata(chosen)
            model = scvi.model.SCVI(chosen, gene_likelihood="nb")
            model.train(
                max_epochs=max_epochs,
                early_stopping=True,
                early_stopping_patience=PATIENCE_SCVI,
                accelerator="cpu",
                enable_progress_bar=False,
                logger=False,
                enable_checkpointing=False,
            )
            rng = np.random.default_rng(seed)
            start = np.concatenate([rng.choice(np.flatnonzero(labels == label), n) for label, n in wanted.items()])
            drawn = model.posterior_predictive_sample(chosen[start].copy(), n_samples=1)
    finally:
        torch.set_flush_denormal(False)
        logging.getLogger("lightning.pytorch").setLevel(level)
    values = drawn.to_scipy_sparse() if hasattr(drawn, "to_scipy_sparse") else sp.csr_matrix(drawn)
    found = sp.coo_matrix(values)
    column = np.flatnonzero(is_used)[found.col]
    result = sp.csr_matrix((found.data.astype(np.int32), (found.row, column)), shape=(start.size, counts.shape[1]))
    return _tidy(result), _labels(wanted)


def require_scvi() -> None:
    """Refuse to go on without scvi-tools.

    Raises
    ------
    UnsupportedError
        It is not installed.
    """
    if find_spec("scvi") is None:
        raise UnsupportedError(
            "the generator 'scvi' needs scvi-tools, which is not installed",
            expected="the extra 'eval'",
            fix="pip install 'scdiva[eval]', or leave 'scvi' out of the methods",
        )


Draw = Callable[[sp.csr_matrix, int, np.random.Generator], sp.csr_matrix]


def _per_type(
    counts: sp.csr_matrix, labels: NDArray[np.str_], wanted: Mapping[str, int], seed: int, draw: Draw
) -> Drawn:
    """Draw type after type; each has a generator of its own, so that its cells do not depend on the other types."""
    _refuse_unknown(labels, wanted)
    parts = []
    for label, n in wanted.items():
        rng = np.random.default_rng([seed, *label.encode()])
        parts.append(draw(sp.csr_matrix(counts[labels == label]), n, rng))
    stacked = sp.vstack(parts, format="csr") if parts else _no_counts(0, counts.shape[1])
    return _tidy(stacked), _labels(wanted)


def _refuse_unknown(labels: NDArray[np.str_], wanted: Mapping[str, int]) -> None:
    absent = sorted(set(wanted) - set(labels))
    if absent or min(wanted.values(), default=0) < 0:
        raise ConfigError(
            f"wanted: {', '.join(absent) or 'a negative number of cells'}",
            expected=f"numbers of cells of {', '.join(sorted(set(labels)))}",
            fix="ask for types that are among the training cells",
        )


def _labels(wanted: Mapping[str, int]) -> NDArray[np.str_]:
    return np.repeat(np.array(list(wanted), dtype=str), list(wanted.values()))


def _library_sizes(train: sp.csr_matrix, n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rng.choice(np.asarray(train.sum(axis=1), dtype=np.int64).ravel(), n)


def _in_blocks(
    n: int, genes: NDArray[np.int64], n_genes: int, block: Callable[[int, int], NDArray[Any]]
) -> sp.csr_matrix:
    """Draw dense blocks of cells over some genes and keep them sparse over all genes."""
    parts = []
    for first in range(0, n, _BLOCK):
        dense = sp.csr_matrix(block(first, min(first + _BLOCK, n)))
        parts.append(sp.csr_matrix((dense.data, genes[dense.indices], dense.indptr), shape=(dense.shape[0], n_genes)))
    return sp.csr_matrix(sp.vstack(parts)) if parts else _no_counts(0, n_genes)


def _no_counts(n_cells: int, n_genes: int) -> sp.csr_matrix:
    return sp.csr_matrix(np.zeros((n_cells, n_genes), dtype=np.int32))


def _tidy(counts: sp.csr_matrix) -> sp.csr_matrix:
    if np.issubdtype(counts.dtype, np.integer):
        counts = counts.astype(np.int32)
    counts.eliminate_zeros()
    counts.sort_indices()
    return counts
