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
    log_means, log_depths, log_thetas, genes, counts, value_codes = [], [], [], [], [], []
    for cells, targets in masked:
        with torch.autocast(cells.depth_B.device.type, dtype=torch.bfloat16, enabled=use_bf16):
            output = network(cells)
            log_mean_X, log_theta_X, gene_X, count_X = _values(network, output, targets)
        is_scored_B = cells.n_hidden_B > 0
        code_B = torch.zeros_like(cells.n_hidden_B) if label_field is None else cells.condition_BC[:, label_field]
        codes.append(code_B[is_scored_B])
        value_codes.append(code_B[targets.values()[0]])
        log_depths.append(output.log_depth_B[targets.values()[0]])
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
        _calibrate_label_values(network, *values, torch.cat(log_depths), torch.cat(value_codes))


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
        [
            network.log_dispersion(output, targets.cell_M, targets.gene_M, hidden),
            network.log_dispersion(output, targets.cell_V, targets.gene_V, visible),
        ]
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
_SLOPE_PRECISION = 10.0
"""The same for slopes of counts, which few hidden tokens say little about."""
_LABEL_STEPS = 6
_CONFIDENCE = (0.5, 2.5)
_VALUES_PER_LABEL = 128
_UNUSUAL = 6.0
"""As :data:`_IMPOSSIBLE`, within labels: what decides a type's dispersion is what most of its cells do."""


def _calibrate_label_identity(
    network: NativeNetwork,
    logits: list[torch.Tensor],
    admissible: list[torch.Tensor],
    hidden: list[torch.Tensor],
    is_hidden: list[torch.Tensor],
    codes: list[torch.Tensor],
) -> None:
    """Make each gene as often hidden, over the cells of each label, as the network expects it to be.

    And what tells cells of one label apart as strong as is likeliest: one factor for each label. It mostly lies above
    1: training is short, and the network learns what tells labels apart before what tells their cells apart.
    """
    offset_CG, confidence_C = network.label_identity, network.label_confidence
    n_C = torch.bincount(torch.cat(codes), minlength=offset_CG.shape[0]).clamp_min(1)
    centre_CG, observed_CG = torch.zeros_like(offset_CG), torch.zeros_like(offset_CG)
    for logit, answer, code in zip(logits, is_hidden, codes, strict=True):
        centre_CG.index_add_(0, code, logit + network.identity_offset)
        observed_CG.index_add_(0, code, answer.float())
    centre_CG /= n_C[:, None]
    for _ in range(_LABEL_STEPS):
        expected_CG, slope_CG = torch.zeros_like(offset_CG), torch.zeros_like(offset_CG)
        score_C, information_C = torch.zeros_like(confidence_C), torch.full_like(confidence_C, _LABEL_PRECISION)
        for logit, allowed, n_hidden, answer, code in zip(logits, admissible, hidden, is_hidden, codes, strict=True):
            deviation = logit + network.identity_offset - centre_CG[code]
            total = centre_CG[code] + offset_CG[code] + confidence_C[code][:, None] * deviation
            p = inclusion_probabilities(total, allowed, n_hidden)
            weight = p * (1.0 - p)
            expected_CG.index_add_(0, code, p)
            slope_CG.index_add_(0, code, weight)
            # what all genes of a cell share changes nothing: the number of hidden genes is given
            level = (weight * deviation).sum(dim=1, keepdim=True) / weight.sum(dim=1, keepdim=True).clamp_min(1e-6)
            deviation = torch.where(allowed, deviation - level, 0.0)
            score_C.index_add_(0, code, ((answer.float() - p) * deviation).sum(dim=1))
            information_C.index_add_(0, code, (weight * deviation.square()).sum(dim=1))
        step_CG = (observed_CG - expected_CG - _LABEL_PRECISION * offset_CG) / (slope_CG + _LABEL_PRECISION)
        offset_CG += step_CG.clamp(-1.0, 1.0)
        confidence_C += ((score_C - _LABEL_PRECISION * (confidence_C - 1.0)) / information_C).clamp(-0.5, 0.5)
        confidence_C.clamp_(*_CONFIDENCE)
        offset_CG[0], confidence_C[0] = 0.0, 1.0  # cells of unknown label
    offset_CG += (1.0 - confidence_C)[:, None] * centre_CG


def _calibrate_label_values(
    network: NativeNetwork,
    log_mean_X: torch.Tensor,
    log_theta_X: torch.Tensor,
    gene_X: torch.Tensor,
    count_X: torch.Tensor,
    log_depth_X: torch.Tensor,
    code_X: torch.Tensor,
) -> None:
    """Maximise the likelihood of each label's hidden counts in offsets, slopes and dispersions of its own.

    What one label has much of and others have little of has a dispersion over all cells that is none of theirs, and
    what tells labels apart may say too much or too little of cells of one label: hence the slope.
    """
    before = torch.stack([network.value_offset, network.log_theta])
    log_share_X = log_mean_X + before[0, gene_X] - log_depth_X
    log_theta_X = log_theta_X + before[1, gene_X]
    nll_X = ztnb_nll(count_X, log_depth_X + log_share_X, log_theta_X)
    n_labels, n_genes = network.label_value.shape
    usual_G = torch.zeros(n_genes).index_add_(0, gene_X, nll_X)
    usual_G /= torch.bincount(gene_X, minlength=n_genes).clamp_min(1)
    place_X = code_X * n_genes + gene_X
    is_used_X = (nll_X < usual_G[gene_X] + _UNUSUAL) & (code_X > 0)
    is_used_X &= _rank_in_gene(place_X, torch.arange(place_X.numel())) < _VALUES_PER_LABEL
    used = is_used_X.nonzero().squeeze(1)
    place_X, log_share_X, count_X = place_X[used], log_share_X[used], count_X[used]
    log_theta_X, log_depth_X = log_theta_X[used], log_depth_X[used]
    n_P = torch.bincount(place_X, minlength=n_labels * n_genes).clamp_min(1)
    centre_P = torch.zeros(n_P.numel()).index_add_(0, place_X, log_share_X) / n_P
    deviation_X = log_share_X - centre_P[place_X]
    usual_X = log_depth_X + centre_P[place_X]
    gene_X, gene_P = gene_X[used], torch.arange(n_P.numel()) % n_genes
    n_G = torch.bincount(gene_X, minlength=n_genes).clamp_min(1)
    precision = torch.tensor([_LABEL_PRECISION, _LABEL_PRECISION, _SLOPE_PRECISION])[:, None]
    # offset, dispersion and slope of a gene in a label, and offset and dispersion of a gene in all labels
    in_label, in_all = torch.zeros(3, n_P.numel()), torch.zeros(2, n_genes)
    with torch.enable_grad():
        found = [in_label.requires_grad_(), in_all.requires_grad_()]
        optimizer = torch.optim.Adam(found, lr=_VALUE_LR)
        for step in range(_VALUE_STEPS):
            for group in optimizer.param_groups:
                group["lr"] = _VALUE_LR * (1.0 - step / _VALUE_STEPS)
            offset_X, dispersion_X, slope_X = in_label[:, place_X]
            log_mean_X = usual_X + offset_X + in_all[0, gene_X] + (1.0 + slope_X) * deviation_X
            log_theta_now_X = (log_theta_X + dispersion_X + in_all[1, gene_X]).clamp(*_LOG_THETA)
            nll_X = ztnb_nll(count_X, log_mean_X, log_theta_now_X).double()
            loss = (nll_X / n_P[place_X]).sum() + (0.5 * precision * in_label.square() / n_P).sum()
            loss = loss + (0.5 * _PRIOR_PRECISION * in_all.square() / n_G).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    offset_P, dispersion_P, slope_P = in_label.detach()
    offset_P, dispersion_P = torch.stack([offset_P, dispersion_P]) + in_all.detach()[:, gene_P]
    slope_P = slope_P.clamp(-1.0, 1.0)
    network.label_slope.copy_(slope_P.view(n_labels, n_genes))
    network.label_value.copy_((offset_P - slope_P * centre_P).view(n_labels, n_genes))
    network.label_dispersion.copy_(dispersion_P.view(n_labels, n_genes))
    for table_CG in (network.label_slope, network.label_value, network.label_dispersion):
        table_CG[0] = 0.0  # cells of unknown label
