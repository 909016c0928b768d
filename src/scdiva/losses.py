"""Losses as pure functions of tensors.

Shape letters: B cells, N stored counts of all cells together, G genes.
"""

from __future__ import annotations

from typing import Any

import torch

# rows that are worked on together: their float32 copies stay in the processor's cache (16 x 30,000 genes are 2 MB)
_ROWS = 16


class _MeasuredProfileNLL(torch.autograd.Function):
    """Multinomial NLL of sparse counts; the gradient, softmax minus shares, is all that is kept of the (B, G) rates."""

    @staticmethod
    def forward(
        ctx: Any,
        log_rate_BG: torch.Tensor,
        cell_N: torch.Tensor,
        gene_N: torch.Tensor,
        share_N: torch.Tensor,
        is_measured_BG: torch.Tensor,
    ) -> torch.Tensor:
        n_cells = log_rate_BG.shape[0]
        gradient_BG = torch.empty_like(log_rate_BG, memory_format=torch.contiguous_format)
        log_total_B = torch.empty(n_cells, dtype=torch.float32, device=log_rate_BG.device)
        total_share_B = torch.zeros_like(log_total_B).index_add_(0, cell_N, share_N)
        n_rows = _ROWS if log_rate_BG.device.type == "cpu" else max(n_cells, 1)
        for first in range(0, n_cells, n_rows):
            rows = slice(first, first + n_rows)
            # float32 whatever the autocast: a sum over tens of thousands of genes is no work for bfloat16
            part = log_rate_BG[rows].to(torch.float32, copy=True).masked_fill_(~is_measured_BG[rows], float("-inf"))
            # a file that measures no gene at all has no largest rate and no probabilities: its cells are empty
            largest = part.amax(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).min)
            total = part.sub_(largest).exp_().sum(dim=1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny)
            log_total_B[rows] = (largest + total.log()).squeeze(1)
            gradient_BG[rows] = part.mul_(total_share_B[rows, None] / total)
        rate_N = log_rate_BG[cell_N, gene_N].float()
        gradient_BG.index_put_((cell_N, gene_N), gradient_BG[cell_N, gene_N] - share_N.to(gradient_BG.dtype))
        ctx.save_for_backward(gradient_BG)
        return torch.zeros_like(log_total_B).index_add_(0, cell_N, share_N * (log_total_B[cell_N] - rate_N))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_BG,) = ctx.saved_tensors
        return gradient_BG * grad_outputs[0][:, None].to(gradient_BG.dtype), None, None, None, None


def profile_nll(
    log_rate_BG: torch.Tensor,
    cell_N: torch.Tensor,
    gene_N: torch.Tensor,
    count_N: torch.Tensor,
    is_measured_BG: torch.Tensor,
) -> torch.Tensor:
    """Multinomial negative log-likelihood of count profiles, in nats per UMI, ``(B,)`` float32.

    The softmax runs over the genes that a cell's file measures: a gene without a column is unknown, not zero. The
    multinomial coefficient, which no parameter changes, is left out.

    Parameters
    ----------
    log_rate_BG
        Unnormalised log-rates.
    cell_N, gene_N
        int64 row and column of every stored count, each pair once.
    count_N
        Counts, all in measured genes. A cell without counts has loss 0.
    is_measured_BG
        Genes that the cell's file measures.
    """
    n_umis_B = torch.zeros(log_rate_BG.shape[0], device=log_rate_BG.device).index_add_(0, cell_N, count_N.float())
    share_N = count_N.float() / n_umis_B[cell_N]
    return _MeasuredProfileNLL.apply(log_rate_BG, cell_N, gene_N, share_N, is_measured_BG)
