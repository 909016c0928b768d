"""Losses as pure functions of tensors.

Shape letters: B cells, N stored counts of all cells together, M hidden genes of all cells together, G genes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.checkpoint

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


_NEWTON_STEPS = 30
_LARGEST_SHIFT = 40.0


def inclusion_shift(logit_BG: torch.Tensor, is_admissible_BG: torch.Tensor, n_hidden_B: torch.Tensor) -> torch.Tensor:
    """Solve sum over admissible genes of sigmoid(logit + c) = m for c, ``(B,)`` float32.

    Newton's method on c, kept inside a bracket that every step narrows. For a cell that hides nothing, or every
    admissible gene, no c is exact: it gets one at which every p is as good as 0, or as good as 1.

    Parameters
    ----------
    logit_BG
        float32 log-odds.
    is_admissible_BG
        Genes that may be hidden.
    n_hidden_B
        m, number of hidden genes.
    """
    limit = torch.finfo(torch.float32).max / 4  # a file that measures no gene at all has no admissible one
    smallest_B = logit_BG.masked_fill(~is_admissible_BG, float("inf")).amin(dim=1).clamp(-limit, limit)
    logit_BG = logit_BG.masked_fill(~is_admissible_BG, float("-inf"))
    m_B = n_hidden_B.float()
    # for rare genes sigmoid is exp: the first guess is exact then, and too small otherwise
    largest_B = logit_BG.amax(dim=1).clamp(-limit, limit)
    log_sum_B = largest_B + (logit_BG - largest_B[:, None]).exp().sum(dim=1).clamp_min(1e-30).log()
    # at the ends every p is as good as 0, or as good as 1
    lower_B, upper_B = -_LARGEST_SHIFT - largest_B, _LARGEST_SHIFT - torch.minimum(smallest_B, largest_B)
    shift_B = (m_B.clamp_min(1e-6).log() - log_sum_B).clamp(lower_B, upper_B)
    for _ in range(_NEWTON_STEPS):
        p_BG = torch.sigmoid(logit_BG + shift_B[:, None])
        total_B = p_BG.sum(dim=1)
        error_B = total_B - m_B
        slope_B = (total_B - p_BG.square_().sum(dim=1)).clamp_min(1e-12)
        # c to 1e-5; where all p are near 0 or 1 and the sum hardly moves with c, as near as float32 sums come
        if bool((error_B.abs() <= torch.maximum(1e-5 * slope_B, 1e-6 * m_B.clamp_min(1.0))).all()):
            break
        lower_B = torch.where(error_B < 0, shift_B, lower_B)
        upper_B = torch.where(error_B > 0, shift_B, upper_B)
        # for the log of the sum, which for rare genes is a straight line in c
        proposal_B = shift_B - (total_B / m_B).log() * total_B / slope_B
        is_inside_B = (proposal_B > lower_B) & (proposal_B < upper_B)
        shift_B = torch.where(is_inside_B, proposal_B, 0.5 * (lower_B + upper_B))
    return shift_B


def inclusion_probabilities(
    logit_BG: torch.Tensor, is_admissible_BG: torch.Tensor, n_hidden_B: torch.Tensor
) -> torch.Tensor:
    """Probability that each gene is among the m hidden ones, ``(B, G)`` float32; rows sum to m.

    ``p / m`` is the predictive distribution of one hidden gene (design: odds in its place are wrong for m > 1). Genes
    that are not admissible have probability 0.
    """
    logit_BG = logit_BG.float()
    shift_B = inclusion_shift(logit_BG, is_admissible_BG, n_hidden_B)
    return torch.sigmoid(logit_BG + shift_B[:, None]).masked_fill(~is_admissible_BG, 0.0)


class _InclusionNLL(torch.autograd.Function):
    """Mean over hidden genes of -log(p_g / m); the gradient with respect to the logits is all that is kept.

    With w_g = p_g (1 - p_g), dc/dlogit_j = -w_j / sum(w): the shift c depends on every logit through its constraint.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logit_BG: torch.Tensor,
        is_admissible_BG: torch.Tensor,
        n_hidden_B: torch.Tensor,
        cell_M: torch.Tensor,
        gene_M: torch.Tensor,
    ) -> torch.Tensor:
        n_cells = logit_BG.shape[0]
        gradient_BG = torch.empty_like(logit_BG, memory_format=torch.contiguous_format)
        shift_B = torch.zeros(n_cells, dtype=torch.float32, device=logit_BG.device)
        m_B = n_hidden_B.float().clamp_min(1.0)
        weight_M = 1.0 / m_B[cell_M]
        miss_B = torch.zeros_like(shift_B)  # mean over hidden genes of 1 - p
        n_rows = _ROWS if logit_BG.device.type == "cpu" else max(n_cells, 1)
        for first in range(0, n_cells, n_rows):
            rows = slice(first, first + n_rows)
            part = logit_BG[rows].float()
            shift_B[rows] = inclusion_shift(part, is_admissible_BG[rows], n_hidden_B[rows])
            p = torch.sigmoid(part + shift_B[rows, None]).masked_fill_(~is_admissible_BG[rows], 0.0)
            w = p.mul_(1.0 - p)
            gradient_BG[rows] = w.div_(w.sum(dim=1, keepdim=True).clamp_min(1e-12))
        logit_M = logit_BG[cell_M, gene_M].float() + shift_B[cell_M]
        miss_M = torch.sigmoid(-logit_M) * weight_M
        miss_B.index_add_(0, cell_M, miss_M)
        gradient_BG.mul_(miss_B[:, None].to(gradient_BG.dtype))
        gradient_BG.index_put_((cell_M, gene_M), gradient_BG[cell_M, gene_M] - miss_M.to(gradient_BG.dtype))
        ctx.save_for_backward(gradient_BG)
        nll_M = (torch.nn.functional.softplus(-logit_M) + m_B[cell_M].log()) * weight_M
        return torch.zeros_like(shift_B).index_add_(0, cell_M, nll_M)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_BG,) = ctx.saved_tensors
        return gradient_BG * grad_outputs[0][:, None].to(gradient_BG.dtype), None, None, None, None


def inclusion_nll(
    logit_BG: torch.Tensor,
    is_admissible_BG: torch.Tensor,
    n_hidden_B: torch.Tensor,
    cell_M: torch.Tensor,
    gene_M: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of the hidden genes of each cell, nats per hidden gene, ``(B,)`` float32; 0 where none is hidden.

    The mean over hidden genes of -log p(g | visible), with p(g | visible) = sigmoid(logit_g + c) / m over admissible
    genes and c such that the probabilities sum to m (our decision).

    Parameters
    ----------
    logit_BG
        Log-odds of each gene.
    is_admissible_BG
        Genes that may be hidden: measured and not visible. All hidden genes are among them.
    n_hidden_B
        int64 m, number of hidden genes.
    cell_M, gene_M
        int64 row and column of every hidden gene, each pair once.
    """
    return _InclusionNLL.apply(logit_BG, is_admissible_BG, n_hidden_B, cell_M, gene_M)


_SLOTS = 1024


def slot_nll(
    logit_BG: torch.Tensor,
    is_admissible_BG: torch.Tensor,
    n_hidden_B: torch.Tensor,
    direction_ME: torch.Tensor | None,
    gene_embedding_GE: torch.Tensor,
    cell_M: torch.Tensor,
    gene_M: torch.Tensor,
) -> torch.Tensor:
    """Cross-entropy of hidden genes that have a place of their own (sequence layout), nats, ``(M,)`` float32.

    log p = log_softmax over admissible genes of log(sigmoid(logit + c)) + direction . E_g: without a direction this is
    :func:`inclusion_nll` gene by gene. The logits of a slot are a row of all genes; they are made in chunks, and made
    again in the backward pass. The gradient takes c as a constant: it is zero where that of :func:`inclusion_nll` is.

    Parameters
    ----------
    logit_BG, is_admissible_BG, n_hidden_B, cell_M, gene_M
        As for :func:`inclusion_nll`, of a choice of the hidden genes.
    direction_ME
        What each place adds, in gene-embedding space; None: nothing.
    gene_embedding_GE
        Gene embeddings.
    """
    shift_B = inclusion_shift(logit_BG.detach().float(), is_admissible_BG, n_hidden_B)
    base_BG = torch.nn.functional.logsigmoid(logit_BG.float() + shift_B[:, None])
    base_BG = base_BG.masked_fill(~is_admissible_BG, float("-inf"))
    parts = []
    for first in range(0, cell_M.numel(), _SLOTS):
        rows = slice(first, first + _SLOTS)
        direction = None if direction_ME is None else direction_ME[rows]
        arguments = (base_BG, direction, gene_embedding_GE, cell_M[rows], gene_M[rows])
        parts.append(torch.utils.checkpoint.checkpoint(_slot_chunk, *arguments, use_reentrant=False))
    return torch.cat(parts) if parts else shift_B.new_zeros(0)


def _slot_chunk(
    base_BG: torch.Tensor,
    direction_RE: torch.Tensor | None,
    gene_embedding_GE: torch.Tensor,
    cell_R: torch.Tensor,
    gene_R: torch.Tensor,
) -> torch.Tensor:
    logit_RG = base_BG[cell_R]
    if direction_RE is not None:
        logit_RG = logit_RG + torch.nn.functional.linear(direction_RE, gene_embedding_GE)
    return torch.nn.functional.cross_entropy(logit_RG, gene_R, reduction="none")


def ztnb_nll(count: torch.Tensor, log_mu: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of counts >= 1 under a zero-truncated negative binomial, nats, float32.

    Parameters
    ----------
    count
        Counts, at least 1.
    log_mu
        Log-mean of the negative binomial *before* truncation.
    log_theta
        Log of its inverse dispersion: the variance is mu + mu^2 / theta.
    """
    # float64: of a gene of little dispersion (large theta) float32 would leave nothing of the differences below
    count, log_mu, log_theta = count.double(), log_mu.double(), log_theta.double()
    theta, softplus = log_theta.exp(), torch.nn.functional.softplus
    log_ways = torch.lgamma(count + theta) - torch.lgamma(theta) - torch.lgamma(count + 1.0)
    log_zero = -theta * softplus(log_mu - log_theta)
    log_pmf = log_ways + log_zero - count * softplus(log_theta - log_mu)
    return (_log_nonzero(log_mu, log_theta) - log_pmf).float()


def ztnb_mean(log_mu: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
    """Return the mean of a zero-truncated negative binomial, float32; arguments as for :func:`ztnb_nll`."""
    log_mu, log_theta = log_mu.double(), log_theta.double()
    return (log_mu - _log_nonzero(log_mu, log_theta)).exp().float()


_EXACT_COUNTS = 16


def ztnb_expected_log1p(log_mu: torch.Tensor, log_theta: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the expected log1p(scale * x) of a zero-truncated negative binomial x, float32.

    Counts up to 16 are summed exactly; the rest counts as a log-normal of its mean and variance. (The log of the mean,
    in its place, is far too high for dispersed genes, most of whose counts are 1.)

    Parameters
    ----------
    log_mu, log_theta
        As for :func:`ztnb_nll`.
    scale
        Positive factor, 1e4 / depth for log1p(CP10K).
    """
    log_mu, log_theta = log_mu.float(), log_theta.float()
    softplus = torch.nn.functional.softplus
    theta, log_ratio = log_theta.exp(), -softplus(log_theta - log_mu)
    log_nonzero = _log_nonzero(log_mu, log_theta)
    mean = (log_mu - log_nonzero).exp()
    mean_square = mean * (1.0 + log_mu.exp() + (log_mu - log_theta).exp())
    # P(1) = theta (theta / (theta + mu))^theta (mu / (theta + mu)), then P(x + 1) = P(x) (x + theta) / (x + 1) ratio;
    # in logs, because the gradient of a product of tiny and large factors overflows
    log_pmf = log_theta - theta * softplus(log_mu - log_theta) + log_ratio - log_nonzero
    total, mass, first, second = (torch.zeros_like(mean) for _ in range(4))
    for x in range(1, _EXACT_COUNTS + 1):
        pmf = log_pmf.exp()
        total = total + pmf * torch.log1p(scale * x)
        mass, first, second = mass + pmf, first + x * pmf, second + x * x * pmf
        log_pmf = log_pmf + torch.log((x + theta) / (x + 1)) + log_ratio
    tail = (1.0 - mass).clamp_min(0.0)
    tail_mean = ((mean - first) / tail.clamp_min(1e-6)).clamp_min(_EXACT_COUNTS + 1.0)
    tail_variance = ((mean_square - second) / tail.clamp_min(1e-6) - tail_mean.square()).clamp_min(0.0)
    spread = (scale / (1.0 + scale * tail_mean)).square() * tail_variance
    return total + tail * (torch.log1p(scale * tail_mean) - 0.5 * torch.log1p(spread))


def _log_nonzero(log_mu: torch.Tensor, log_theta: torch.Tensor) -> torch.Tensor:
    """log(1 - NB(0)), exact for tiny means too: -log NB(0) = theta * softplus(log_mu - log_theta) is never rounded."""
    minus_log_zero = log_theta.exp() * torch.nn.functional.softplus(log_mu - log_theta)
    return torch.log(-torch.expm1(-minus_log_zero.clamp_min(1e-30)))
