"""What a native trunk makes of each gene, averaged over the cells that express it.

Shape letters: N gene tokens, G genes, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from scdiva.models.scdiva.attention import read_cells, set_trunk
from scdiva.models.scdiva.model import ScDiVa
from scdiva.types import CellCounts


@torch.inference_mode()
def mean_gene_states(
    model: ScDiVa,
    cells: CellCounts,
    genes: NDArray[np.int64],
    *,
    max_tokens: int | None = None,
    on_cells: Callable[[int], None] | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Average the final states of gene tokens of whole cells.

    Parameters
    ----------
    model
        A native model with a trunk.
    cells
        Raw counts in the order of its vocabulary; conditions are not told.
    genes
        ``(G,)`` distinct gene indices.
    max_tokens
        Genes that the trunk reads of each cell, the best-ranked; None: all.
    on_cells
        Called with the number of cells done, for progress.

    Returns
    -------
    mean_GD, n_cells_G
        ``(G, width)`` float64 means over the cells in which the gene was read (NaN where there is none), and how many.

    Raises
    ------
    UnsupportedError
        The model has no trunk that reads sets.
    """
    network, trunk = set_trunk(model, "contextual gene embeddings")
    row_of_gene = np.full(cells.n_genes, -1, dtype=np.int64)
    row_of_gene[genes] = np.arange(genes.size)
    total_GD = np.zeros((genes.size, trunk.transformer.width))
    n_cells_G = np.zeros(genes.size, dtype=np.int64)
    done = 0
    for block, masked in read_cells(model, cells, np.zeros(0, dtype=np.int64), max_tokens):
        states = trunk(masked, network.latent(masked), network.anchor.gene_embedding, network.mean_log_depth)
        row_N = row_of_gene[masked.gene_N.cpu().numpy()]
        is_wanted_N = row_N >= 0
        np.add.at(total_GD, row_N[is_wanted_N], states.token_ND.double().cpu().numpy()[is_wanted_N])
        n_cells_G += np.bincount(row_N[is_wanted_N], minlength=genes.size)
        done += block.n_cells
        if on_cells is not None:
            on_cells(done)
    return total_GD / np.where(n_cells_G > 0, n_cells_G, np.nan)[:, None], n_cells_G
