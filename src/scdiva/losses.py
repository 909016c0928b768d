"""Losses as pure functions of tensors.

Shape letters: B cells, N stored counts of all cells together, G genes.
"""

from __future__ import annotations

from typing import Any

import torch


class _MeasuredProfileNLL(torch.autograd.Function):
    """Multinomial NLL with sparse counts; the gradient is softmax minus shares, so one (B, G) buffer is enough."""

    @staticmethod
    def forward(
        ctx: Any,
        log_rate_BG: torch.Tensor,
        cell_N: torch.Tensor,
        gene_N: torch.Tensor,
        share_N: torch.Tensor,
        is_measured_BG: torch.Tensor,
    ) -> torch.Tensor:
        # float32 whatever the autocast: a sum over tens of thousands of genes is no work for bfloat16
        masked_BG = (
            log_rate_BG.float().masked_fill_(~is_measured_BG, float("-inf"))
            if (log_rate_BG.dtype != torch.float32)
            else log_rate_BG.masked_fill(~is_measured_BG, float("-inf"))
        )
        # a cell whose file measures no gene has no mass at all, and -inf minus -inf would be NaN
        log_total_B = torch.logsumexp(masked_BG, dim=1)
        log_total_B = log_total_B.masked_fill(log_total_B == float("-inf"), 0.0)
        score_N = share_N * (masked_BG[cell_N, gene_N] - log_total_B[cell_N])
        nll_B = torch.zeros_like(log_total_B).index_add_(0, cell_N, -score_N)
        has_counts_B = torch.zeros_like(log_total_B).index_add_(0, cell_N, share_N)
        # in place: the masked rates are not needed again
        softmax_BG = masked_BG.sub_(log_total_B[:, None]).exp_().mul_(has_counts_B[:, None])
        ctx.save_for_backward(softmax_BG, cell_N, gene_N, share_N)
        ctx.dtype = log_rate_BG.dtype
        return nll_B

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        softmax_BG, cell_N, gene_N, share_N = ctx.saved_tensors
        grad_B = grad_outputs[0]
        grad_BG = softmax_BG * grad_B[:, None]
        grad_BG[cell_N, gene_N] -= share_N * grad_B[cell_N]
        return grad_BG.to(ctx.dtype), None, None, None, None


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
