"""Calibration: the numbers that belong to single genes, at their best for some cells.

A short fine-tuning run moves a weight by at most (learning rate x steps): far too little for a gene's offset or
dispersion to go from one assay to another. Given what the rest of the network says, each of these numbers has a
likelihood of its own in one or two dimensions, and Newton steps find its maximum in seconds (our decision).

Shape letters: B cells, G genes, X hidden values.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from scdiva.losses import inclusion_probabilities, ztnb_mean, ztnb_nll
from scdiva.models.scdiva.inputs import MaskedCells, Targets
from scdiva.models.scdiva.native import DenoiserOutput, NativeNetwork

_NEWTON_STEPS = 5
_VALUE_STEPS = 40
_VALUE_LR = 0.2
_TRIMMED = 0.01
_IMPOSSIBLE = 10.0
"""Nats above a gene's mean: a count that its distribution allows once in 20,000 values says nothing about it."""
_VALUES_PER_GENE = 256
"""Hidden counts of a gene that its offset and dispersion are fitted to; more determine two numbers no better."""
_PRIOR_PRECISION = 2.0
"""Weight of where a number was before, in hidden tokens: what few cells show moves little."""
_LOG_THETA = (-4.0, 7.0)


@torch.no_grad()
def calibrate(
    network: NativeNetwork,
    masked: Iterable[tuple[MaskedCells, Targets]],
    *,
    use_bf16: bool,
    label_field: int | None = None,
    n_labels: int = 0,
) -> None:
    """Set identity offsets, value offsets and dispersions of a network to their best for some masked cells.

    Parameters
    ----------
    network
        Changed in place.
    masked
        Cells with what is hidden; they are gone through once.
    use_bf16
        Compute the network's predictions in bfloat16.
    label_field
        Condition field whose labels get offsets of their own; None: none.
    n_labels
        Number of labels of that field.
    """
    if network.label_field is not None:
        raise ValueError("the network has label offsets already")
    logits, admissible, hidden, is_hidden, codes = [], [], [], [], []
    log_means, log_thetas, genes, counts, value_codes = [], [], [], [], []
    for cells, targets in masked:
        with torch.autocast(cells.depth_B.device.type, dtype=torch.bfloat16, enabled=use_bf16):
            output = network(cells)
            log_mean_X, log_theta_X, gene_X, count_X = _values(network, output, targets)
        is_scored_B = cells.n_hidden_B > 0
        code_B = torch.zeros_like(cells.n_hidden_B) if label_field is None else cells.condition_BC[:, label_field]
        codes.append(code_B[is_scored_B])
        value_codes.append(code_B[targets.values()[0]])
        answer_BG = torch.zeros_like(cells.is_admissible_BG)
        answer_BG[targets.cell_M, targets.gene_M] = True
        logits.append((output.gene_logit_BG.float() - network.identity_offset)[is_scored_B])
        admissible.append(cells.is_admissible_BG[is_scored_B])
        hidden.append(cells.n_hidden_B[is_scored_B])
        is_hidden.append(answer_BG[is_scored_B])
        log_means.append(log_mean_X - network.value_offset[gene_X])
        log_thetas.append(log_theta_X - network.log_theta[gene_X])
        genes.append(gene_X)
        counts.append(count_X)
    _calibrate_identity(network, logits, admissible, hidden, is_hidden)
    values = (torch.cat(log_means), torch.cat(log_thetas), torch.cat(genes), torch.cat(counts))
    _calibrate_values(network, *values)
    if label_field is not None:
        network.add_label_offsets(label_field, n_labels)
        _calibrate_label_identity(network, logits, admissible, hidden, is_hidden, codes)
        _calibrate_label_values(network, *values, torch.cat(value_codes))


def _values(
    network: NativeNetwork, output: DenoiserOutput, targets: Targets
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = visible = None
    if output.states is not None and network.trunk is not None:
        hidden = network.trunk.value_direction(output.states.query_BD)[targets.cell_M]
        visible = network.trunk.value_direction(output.states.token_ND[targets.token_V])
    log_mean_X = torch.cat(
        [
            network.log_mean(output, targets.cell_M, targets.gene_M, hidden),
            network.log_mean(output, targets.cell_V, targets.gene_V, visible),
        ]
    )
    log_theta_X = torch.cat(
        [network.log_dispersion(targets.gene_M, hidden), network.log_dispersion(targets.gene_V, visible)]
    )
    _, gene_X, count_X, _ = targets.values()
    return log_mean_X.float(), log_theta_X.float(), gene_X, count_X


def _calibrate_identity(
    network: NativeNetwork,
    logits: list[torch.Tensor],
    admissible: list[torch.Tensor],
    hidden: list[torch.Tensor],
    is_hidden: list[torch.Tensor],
) -> None:
    """Make each gene as often hidden, over these cells, as the network expects it to be."""
    before_G = network.identity_offset.clone()
    observed_G = torch.stack([answer.double().sum(dim=0) for answer in is_hidden]).sum(dim=0)
    for _ in range(_NEWTON_STEPS):
        expected_G, slope_G = torch.zeros_like(observed_G), torch.zeros_like(observed_G)
        for logit, allowed, n_hidden in zip(logits, admissible, hidden, strict=True):
            p = inclusion_probabilities(logit + network.identity_offset, allowed, n_hidden)
            expected_G += p.double().sum(dim=0)
            slope_G += (p * (1.0 - p)).double().sum(dim=0)
        off_G = network.identity_offset.double() - before_G.double()
        step_G = (observed_G - expected_G - _PRIOR_PRECISION * off_G) / (slope_G + _PRIOR_PRECISION)
        network.identity_offset.add_(step_G.clamp(-1.0, 1.0).float())


def _calibrate_values(
    network: NativeNetwork,
    log_mean_X: torch.Tensor,
    log_theta_X: torch.Tensor,
    gene_X: torch.Tensor,
    count_X: torch.Tensor,
) -> None:
    """Maximise the likelihood of the hidden counts in each gene's offset and dispersion."""
    everything = (log_mean_X, log_theta_X, gene_X, count_X)
    # cells came in random order: the first values of a gene are a random choice
    kept = (_rank_in_gene(gene_X, torch.arange(gene_X.numel())) < _VALUES_PER_GENE).nonzero().squeeze(1)
    log_mean_X, log_theta_X, gene_X, count_X = log_mean_X[kept], log_theta_X[kept], gene_X[kept], count_X[kept]
    start = torch.stack([network.value_offset, network.log_theta]).clone()
    # without each gene's highest counts first: one doublet or misread cell of 40 UMIs among hundreds with one or two
    # would decide the dispersion alone. Then with all that are not impossible under what was found.
    excess_X = count_X.float().log() - log_mean_X
    rank_X = _rank_in_gene(gene_X, -excess_X)
    n_G = torch.bincount(gene_X, minlength=start.shape[1])
    is_used_X = rank_X >= torch.ceil(_TRIMMED * n_G)[gene_X]
    values = start
    for n_steps in (_VALUE_STEPS, _VALUE_STEPS // 2, _VALUE_STEPS // 2):
        used = is_used_X.nonzero().squeeze(1)
        values = _fitted(
            start, values, log_mean_X[used], log_theta_X[used], gene_X[used], count_X[used], n_steps=n_steps
        )
        nll_X = ztnb_nll(count_X, log_mean_X + values[0, gene_X], log_theta_X + values[1, gene_X])
        usual_G = torch.zeros_like(values[0]).index_add_(0, gene_X[used], nll_X[used])
        usual_G /= torch.bincount(gene_X[used], minlength=usual_G.numel()).clamp_min(1)
        is_used_X = nll_X < usual_G[gene_X] + _IMPOSSIBLE
    # what was left out above leaves the mean a little low: one factor for all genes gives cells their UMIs back
    log_mean_X, log_theta_X, gene_X, count_X = everything
    expected_X = ztnb_mean(log_mean_X + values[0, gene_X], log_theta_X + values[1, gene_X])
    log_ratio = torch.log(count_X.sum() / expected_X.sum())
    network.value_offset.copy_(values[0] + log_ratio)
    network.log_theta.copy_(values[1])


def _fitted(
    prior: torch.Tensor,
    values: torch.Tensor,
    log_mean_X: torch.Tensor,
    log_theta_X: torch.Tensor,
    gene_X: torch.Tensor,
    count_X: torch.Tensor,
    *,
    n_steps: int,
) -> torch.Tensor:
    """Return each gene's offset and log inverse dispersion of largest posterior, ``(2, G)``."""
    n_G = torch.bincount(gene_X, minlength=prior.shape[1]).clamp_min(1)
    with torch.enable_grad():
        values = values.clone().requires_grad_()
        optimizer = torch.optim.Adam([values], lr=_VALUE_LR)
        for step in range(n_steps):
            for group in optimizer.param_groups:
                group["lr"] = _VALUE_LR * (1.0 - step / n_steps)
            nll = ztnb_nll(count_X, log_mean_X + values[0, gene_X], log_theta_X + values[1, gene_X]).double()
            # each gene's mean, so that rare and frequent genes move alike
            loss = (nll / n_G[gene_X]).sum() + (0.5 * _PRIOR_PRECISION * (values - prior).square() / n_G).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                values[1].clamp_(*_LOG_THETA)
    return values.detach()


def _rank_in_gene(gene_X: torch.Tensor, key_X: torch.Tensor) -> torch.Tensor:
    """Rank of each value among those of its gene, smallest key first."""
    by_key = torch.argsort(key_X, stable=True)
    order = by_key[torch.argsort(gene_X[by_key], stable=True)]
    sizes = torch.bincount(gene_X)
    rank = torch.empty_like(gene_X)
    rank[order] = torch.arange(gene_X.numel()) - (sizes.cumsum(0) - sizes)[gene_X[order]]
    return rank


_LABEL_PRECISION = 4.0
"""Weight of "no difference between labels", in hidden tokens."""
_LABEL_STEPS = 4


def _calibrate_label_identity(
    network: NativeNetwork,
    logits: list[torch.Tensor],
    admissible: list[torch.Tensor],
    hidden: list[torch.Tensor],
    is_hidden: list[torch.Tensor],
    codes: list[torch.Tensor],
) -> None:
    """Make each gene as often hidden, over the cells of each label, as the network expects it to be."""
    offset_CG = network.label_identity
    observed_CG = torch.zeros_like(offset_CG)
    for answer, code in zip(is_hidden, codes, strict=True):
        observed_CG.index_add_(0, code, answer.float())
    for _ in range(_LABEL_STEPS):
        expected_CG, slope_CG = torch.zeros_like(offset_CG), torch.zeros_like(offset_CG)
        for logit, allowed, n_hidden, code in zip(logits, admissible, hidden, codes, strict=True):
            p = inclusion_probabilities(logit + network.identity_offset + offset_CG[code], allowed, n_hidden)
            expected_CG.index_add_(0, code, p)
            slope_CG.index_add_(0, code, p * (1.0 - p))
        step_CG = (observed_CG - expected_CG - _LABEL_PRECISION * offset_CG) / (slope_CG + _LABEL_PRECISION)
        offset_CG += step_CG.clamp(-1.0, 1.0)
        offset_CG[0] = 0.0  # cells of unknown label


def _calibrate_label_values(
    network: NativeNetwork,
    log_mean_X: torch.Tensor,
    log_theta_X: torch.Tensor,
    gene_X: torch.Tensor,
    count_X: torch.Tensor,
    code_X: torch.Tensor,
) -> None:
    """Make the mean count of each gene, over the cells of each label, what the network expects it to be."""
    offset_CG = network.label_value
    log_mean_X, log_theta_X = log_mean_X + network.value_offset[gene_X], log_theta_X + network.log_theta[gene_X]
    nll_X = ztnb_nll(count_X, log_mean_X, log_theta_X)
    n_G = torch.bincount(gene_X, minlength=offset_CG.shape[1]).clamp_min(1)
    usual_G = torch.zeros_like(network.value_offset).index_add_(0, gene_X, nll_X) / n_G
    used = (nll_X < usual_G[gene_X] + _IMPOSSIBLE).nonzero().squeeze(1)
    log_mean_X, log_theta_X, gene_X = log_mean_X[used], log_theta_X[used], gene_X[used]
    count_X, code_X = count_X[used].float(), code_X[used]
    place_X = code_X * offset_CG.shape[1] + gene_X
    n_places = offset_CG.numel()
    mean_G = torch.zeros_like(usual_G).index_add_(0, gene_X, count_X) / n_G
    counted = torch.zeros(n_places).index_add_(0, place_X, count_X).view_as(offset_CG)
    pseudo_G = _LABEL_PRECISION * mean_G.clamp_min(1e-6)
    for _ in range(_LABEL_STEPS):
        expected_X = ztnb_mean(log_mean_X + offset_CG.view(-1)[place_X], log_theta_X)
        expected = torch.zeros(n_places).index_add_(0, place_X, expected_X).view_as(offset_CG)
        step_CG = torch.log((counted + pseudo_G) / (expected + pseudo_G))
        offset_CG += step_CG.clamp(-1.0, 1.0)
        offset_CG[0] = 0.0
