from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from scdiva.models.scdiva.integration import (
    alignment_loss,
    contrastive_loss,
    reversal_factor,
    reverse_gradient,
    supcon_loss,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


class TestContrast:
    def test_by_hand(self):
        one, other, batch = unit(4, 3), unit(4, 3, seed=1), torch.tensor([0, 0, 1, 1])
        expected = []
        for i in range(4):
            same = [j for j in range(4) if batch[j] == batch[i]]
            logits = torch.tensor([float(one[i] @ other[j]) / 0.5 for j in same])
            expected.append(float(torch.logsumexp(logits, 0) - logits[same.index(i)]))
        assert float(contrastive_loss(one, other, batch, 0.5)) == pytest.approx(np.mean(expected), abs=1e-6)

    def test_telling_batches_apart_gains_nothing(self):
        # two batches at opposite ends, nothing else: every partner is as good as any other of its batch
        batch = torch.tensor([0, 1] * 8)
        z = F.normalize(torch.stack([2.0 * batch - 1, torch.zeros(16)], dim=1), dim=1)
        assert float(contrastive_loss(z, z, batch, 0.1)) == pytest.approx(np.log(8), abs=1e-5)
        apart = unit(16, 8)
        assert float(contrastive_loss(apart, apart, batch, 0.1)) < np.log(8) / 2


class TestSupCon:
    def test_by_hand(self):
        z, label = unit(5, 3), torch.tensor([0, 0, 1, 1, -1])
        losses = []
        for i in range(4):
            others = [j for j in range(5) if j != i]
            logits = torch.stack([z[i] @ z[j] / 0.2 for j in others])
            log_p = dict(zip(others, torch.log_softmax(logits, 0).tolist(), strict=True))
            losses.append(-np.mean([log_p[j] for j in others if label[j] == label[i]]))
        assert float(supcon_loss(z, label, 0.2)) == pytest.approx(np.mean(losses), abs=1e-5)

    def test_types_of_one_cell_are_not_anchors_and_none_is_no_loss(self):
        z = unit(3, 3)
        assert float(supcon_loss(z, torch.tensor([0, 1, 2]), 0.2)) == 0.0
        assert float(supcon_loss(z, torch.tensor([-1, -1, -1]), 0.2)) == 0.0


class TestAlignment:
    def aligned(self, shift: float, *, n: int = 400, chance_share: float = 1.0, seed: int = 0) -> float:
        generator = torch.Generator().manual_seed(seed)
        kind, batch = torch.arange(n) % 2, torch.arange(n) // 2 % 2
        x = 6.0 * F.one_hot(kind, 4) + 0.5 * torch.randn(n, 4, generator=generator)
        x[:, 2] += shift * batch
        return float(alignment_loss(F.normalize(x, dim=1), batch, 2, 2, generator, chance_share=chance_share))

    def test_grows_with_the_distance_of_batches(self):
        found = [self.aligned(shift) for shift in (0.0, 1.0, 2.0)]
        assert found[0] == pytest.approx(0.0, abs=0.02)
        assert found[0] < found[1] < found[2]

    def test_what_chance_explains_is_not_counted(self):
        few = [
            np.mean([self.aligned(0.0, n=24, chance_share=share, seed=seed) for seed in range(20)])
            for share in (0.0, 1.0)
        ]
        assert few[0] > 0.02
        assert abs(few[1]) < few[0] / 2

    def test_a_type_that_one_batch_lacks_costs_nothing(self):
        generator = torch.Generator().manual_seed(0)
        kind = torch.arange(300) % 3
        batch = torch.where(kind == 2, 0, torch.arange(300) // 3 % 2)
        x = F.normalize(6.0 * F.one_hot(kind, 4) + 0.2 * torch.randn(300, 4, generator=generator), dim=1)
        # three centres from random cells may fall into two types: the best of a few draws
        found = [
            float(alignment_loss(x, batch, 2, 3, torch.Generator().manual_seed(i), chance_share=1.0)) for i in range(8)
        ]
        assert min(map(abs, found)) < 0.05

    def test_has_a_gradient(self):
        x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
        batch = torch.arange(60) % 3
        loss = alignment_loss(F.normalize(x, dim=1), batch, 3, 5, torch.Generator().manual_seed(1), chance_share=0.5)
        loss.backward()
        assert torch.isfinite(x.grad).all()
        assert x.grad.abs().sum() > 0


def test_the_gradient_is_turned_around():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = reverse_gradient(x, 0.5)
    torch.testing.assert_close(y, x)
    (3 * y).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([-1.5, -1.5]))
    assert reversal_factor(0.0) == 0.0
    assert reversal_factor(1.0) == pytest.approx(1.0, abs=1e-4)
