"""Reference twins: what the library computes, said once more in plain NumPy float64, cell by cell and slowly."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch

from scdiva.types import CellCounts

PAD, FIRST_GENE_ROW = 0, 2


def cell_counts(dense: np.ndarray, library_size: np.ndarray | None = None, measured: np.ndarray | None = None):
    """Wrap a dense count matrix."""
    dense = np.asarray(dense)
    n_cells, n_genes = dense.shape
    return CellCounts(
        counts=sp.csr_matrix(dense.astype(np.int32)),
        library_size=(dense.sum(axis=1) if library_size is None else np.asarray(library_size)).astype(np.float64),
        cell_index=np.arange(n_cells),
        source_of_cell=np.zeros(n_cells, dtype=np.int32),
        is_measured=np.ones((1, n_genes), dtype=bool) if measured is None else np.asarray(measured)[None],
    )


def cp10k(dense: np.ndarray, library_size: np.ndarray | None = None) -> np.ndarray:
    """1e4 * count / library size; zero for an empty cell."""
    dense = np.asarray(dense, dtype=np.float64)
    total = dense.sum(axis=1) if library_size is None else np.asarray(library_size, dtype=np.float64)
    return np.array([row * 1e4 / n if n > 0 else row * 0.0 for row, n in zip(dense, total, strict=True)])


def normalised_entropy(dense: np.ndarray, library_size: np.ndarray | None = None) -> np.ndarray:
    """H_g / ln N from the definition: p(c|g) = x_cg / S_g, H_g = - sum_c p ln p; 1 for genes never seen."""
    x = cp10k(dense, library_size)
    n_cells = int((np.asarray(dense).sum(axis=1) > 0).sum())
    result = np.ones(x.shape[1])
    for gene in range(x.shape[1]):
        total = x[:, gene].sum()
        if total > 0 and n_cells > 1:
            p = x[:, gene][x[:, gene] > 0] / total
            result[gene] = -(p * np.log(p)).sum() / np.log(n_cells)
    return result


def tokens_of_cell(
    counts: np.ndarray, library_size: float, entropy: np.ndarray, max_tokens: int, order: str
) -> list[tuple[int, float, int]]:
    """(vocabulary row, log1p CP10K, count) of the tokens that one cell keeps, best first.

    Scores are rounded to float32 as the library stores values in it; a tie then keeps the order of the genes.
    """
    scored = []
    for gene, count in enumerate(counts):
        if count == 0:
            continue
        value = np.float32(np.log1p(1e4 * count / library_size))
        weight = np.float32(1.0 / (entropy[gene] + 0.05)) if order == "entropy" else np.float32(1.0)
        scored.append((-float(value * weight), gene, float(value), int(count)))
    return [(gene + FIRST_GENE_ROW, value, count) for _, gene, value, count in sorted(scored)[:max_tokens]]


def profile_nll(log_rate: torch.Tensor, counts: torch.Tensor, is_measured: torch.Tensor) -> torch.Tensor:
    """Multinomial NLL per UMI, dense float64, (B,); 0 for a cell without counts."""
    log_share = torch.log_softmax(log_rate.double().masked_fill(~is_measured, float("-inf")), dim=1)
    term = torch.where(counts > 0, counts * log_share, torch.zeros_like(log_share))
    return -term.sum(dim=1) / counts.sum(dim=1).clamp_min(1)


def normalised_rows(dense: np.ndarray, library_size: np.ndarray | None = None) -> np.ndarray:
    """L2-normalised log1p(CP10K); an empty cell stays zero."""
    values = np.log1p(cp10k(dense, library_size))
    norm = np.linalg.norm(values, axis=1, keepdims=True)
    return np.divide(values, norm, out=np.zeros_like(values), where=norm > 0)
