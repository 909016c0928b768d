"""The training masks estimate the exact any-order likelihood of a model so small that every order is written out."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.special import beta

from scdiva.diffusion import MaskKind, draw_masks, stratified_times
from scdiva.losses import inclusion_nll, inclusion_probabilities

N_GENES, CELL = 6, (0, 2, 3, 5)
"""Genes of the model, and those of the one cell."""
N = len(CELL)


class Denoiser:
    """Log-odds that depend on the visible genes; the conditionals of no joint distribution."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.own = torch.randn(N_GENES, generator=generator)
        self.of = torch.randn((N_GENES, N_GENES), generator=generator)

    def logits(self, is_visible_BG: torch.Tensor) -> torch.Tensor:
        return self.own + is_visible_BG.float() @ self.of

    def nll(self, visible: tuple[int, ...]) -> dict[int, float]:
        """-log p(g | visible) of each hidden gene of the cell: p of the losses, written with probabilities."""
        is_visible = torch.zeros((1, N_GENES), dtype=torch.bool)
        is_visible[0, list(visible)] = True
        m = N - len(visible)
        p = inclusion_probabilities(self.logits(is_visible), ~is_visible, torch.tensor([m]))[0] / m
        return {g: -float(p[g].log()) for g in CELL if g not in visible}


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser()


@pytest.fixture(scope="module")
def any_order_nll(denoiser) -> float:
    """Mean over all orders of the nats of a gene given those before it, summed over the cell."""
    orders = list(permutations(CELL))
    return sum(denoiser.nll(order[:k])[order[k]] for order in orders for k in range(N)) / len(orders)


def masks(m: int):
    """Every choice of m hidden genes, as what is visible."""
    return [tuple(g for g in CELL if g not in hidden) for hidden in combinations(CELL, m)]


def test_orders_matter(denoiser):
    # else any mixture of orders would pass
    each = {round(sum(denoiser.nll(order[:k])[order[k]] for k in range(N)), 4) for order in permutations(CELL)}
    assert len(each) > 20


def test_exact_counts_estimate_it(denoiser, any_order_nll):
    """m uniform on 1..n, the mean over hidden genes, times n."""
    per_m = [np.mean([np.mean(list(denoiser.nll(visible).values())) for visible in masks(m)]) for m in range(1, N + 1)]
    assert N * np.mean(per_m) == pytest.approx(any_order_nll, rel=1e-5)


def test_independent_coins_with_weight_one_over_t_estimate_it(denoiser, any_order_nll):
    """The integral over t of (1/t) t^m (1-t)^(n-m) is a beta function."""
    total = sum(
        beta(m, N - m + 1) * sum(denoiser.nll(visible).values()) for m in range(1, N + 1) for visible in masks(m)
    )
    assert total == pytest.approx(any_order_nll, rel=1e-5)


def batch_nll(denoiser: Denoiser, is_hidden: np.ndarray) -> np.ndarray:
    """Mean over hidden genes of each row, by the loss that training uses."""
    n_rows = is_hidden.shape[0]
    is_visible = torch.zeros((n_rows, N_GENES), dtype=torch.bool)
    is_visible[:, CELL] = torch.from_numpy(~is_hidden)
    row, place = np.nonzero(is_hidden)
    nll = inclusion_nll(
        denoiser.logits(is_visible), ~is_visible, torch.from_numpy(is_hidden.sum(axis=1)),
        torch.from_numpy(row), torch.from_numpy(np.array(CELL)[place]),
    )  # fmt: skip
    return nll.numpy()


def test_the_loss_on_a_mask_is_the_mean_of_the_conditionals(denoiser):
    for m in range(1, N + 1):
        for visible in masks(m):
            is_hidden = np.array([[g not in visible for g in CELL]])
            expected = np.mean(list(denoiser.nll(visible).values()))
            assert batch_nll(denoiser, is_hidden)[0] == pytest.approx(expected, rel=1e-5)


def test_the_masks_of_training_estimate_it_without_bias(denoiser, any_order_nll):
    rng, n_rows = np.random.default_rng(0), 8_000
    n_tokens = np.full(n_rows, N)
    for t in (rng.random(n_rows), stratified_times(n_rows, rng)):
        drawn = draw_masks(n_tokens, np.full(n_rows, MaskKind.JOINT), t, rng)
        estimate = N * batch_nll(denoiser, drawn.is_gene_masked_N.reshape(n_rows, N))
        error = estimate.std() / np.sqrt(n_rows)
        assert error < 0.03 * any_order_nll
        assert estimate.mean() == pytest.approx(any_order_nll, abs=4 * error)


def test_exact_counts_vary_less_than_coins(denoiser, any_order_nll):
    rng, n_rows = np.random.default_rng(1), 8_000
    t = stratified_times(n_rows, rng)
    counts = draw_masks(np.full(n_rows, N), np.full(n_rows, MaskKind.JOINT), t, rng)
    by_count = N * batch_nll(denoiser, counts.is_gene_masked_N.reshape(n_rows, N))
    coins = rng.random((n_rows, N)) < t[:, None]
    some = coins.any(axis=1)
    by_coin = np.zeros(n_rows)
    by_coin[some] = batch_nll(denoiser, coins[some]) * coins[some].sum(axis=1) / t[some]
    assert by_coin.mean() == pytest.approx(any_order_nll, abs=5 * by_coin.std() / np.sqrt(n_rows))
    assert by_count.std() < 0.5 * by_coin.std()
