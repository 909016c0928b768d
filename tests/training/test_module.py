from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from toy import MemoryCells, ToyObjective

from scdiva.config import OptimConfig
from scdiva.data.loader import Minibatch
from scdiva.training.module import TrainingModule, averaged, learning_rate_factor, parameter_groups


def test_average_follows_its_formula():
    model = nn.Linear(2, 1)
    decay, value = 0.5, torch.cat([p.detach().flatten().double() for p in model.parameters()])
    ema = averaged(model, decay)
    for n in range(12):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
        ema.update_parameters(model)
        d = min(decay, (1 + n) / (10 + n))
        value = d * value + (1 - d) * torch.cat([p.detach().flatten().double() for p in model.parameters()])
        got = torch.cat([p.detach().flatten().double() for p in ema.parameters()])
        torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-6)


def test_average_copies_buffers_and_needs_no_gradient():
    model = nn.BatchNorm1d(3)
    ema = averaged(model, 0.999)
    model(torch.randn(8, 3))
    ema.update_parameters(model)
    assert torch.equal(ema.module.running_mean, model.running_mean)
    assert ema.module.num_batches_tracked == 1
    assert not any(parameter.requires_grad for parameter in ema.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_no_decay_on_biases_norms_and_embeddings():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(5, 4)
            self.gene_embedding = nn.Parameter(torch.zeros(6, 4))
            self.norm, self.wide_norm, self.rms = nn.LayerNorm(4), nn.LayerNorm((2, 2)), nn.RMSNorm(4)
            self.linear = nn.Linear(4, 4)
            self.tied = nn.Linear(4, 5, bias=False)
            self.tied.weight = self.tokens.weight
            self.scale = nn.Parameter(torch.zeros(()))
            self.frozen = nn.Linear(4, 4).requires_grad_(False)

    model = Model()
    decayed, free = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert free["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(model.linear.weight)]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in decayed["params"] + free["params"]} == {id(p) for p in trainable}
    assert len(decayed["params"]) + len(free["params"]) == len(trainable)


def test_learning_rate():
    config = OptimConfig(warmup_steps=4, final_lr_ratio=0.1)
    factors = [learning_rate_factor(step, config=config, max_steps=24) for step in range(30)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[14] == pytest.approx(0.55)
    assert factors[24:] == pytest.approx([0.1] * 6)
    assert np.all(np.diff(factors[4:25]) < 0)
    constant = OptimConfig(warmup_steps=0, schedule="constant")
    assert {learning_rate_factor(step, config=constant, max_steps=9) for step in range(20)} == {1.0}
    line = OptimConfig(warmup_steps=2, schedule="linear", final_lr_ratio=0.0)
    assert [learning_rate_factor(step, config=line, max_steps=6) for step in range(8)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    )
    # A warm-up as long as the run must not divide by zero.
    assert learning_rate_factor(24, config=OptimConfig(warmup_steps=24), max_steps=24) == 1.0


def test_gradients_are_clipped_and_their_norm_is_kept():
    module = TrainingModule(ToyObjective(), OptimConfig(clip_norm=0.5), max_steps=10, seed=0)
    for parameter in module.objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    n = sum(parameter.numel() for parameter in module.objective.parameters())
    module.configure_gradient_clipping(None)
    assert float(module.grad_norm) == pytest.approx(n**0.5)
    clipped = torch.cat([parameter.grad.flatten() for parameter in module.objective.parameters()])
    assert float(clipped.norm()) == pytest.approx(0.5, rel=1e-4)


def test_randomness_belongs_to_the_step():
    module = TrainingModule(ToyObjective(), OptimConfig(), max_steps=10, seed=0)
    module.train()
    inputs = module.objective.prepare(MemoryCells().read(np.arange(16)), np.random.default_rng(0))
    batches = [Minibatch(inputs, np.arange(16), number) for number in (3, 4)]
    first, other = (float(module.training_step(batch, 0).detach()) for batch in batches)
    torch.randn(7)
    assert float(module.training_step(batches[0], 99).detach()) == first != other
    evaluated = float(module.validation_step(batches[0]).loss)
    assert evaluated == float(module.validation_step(batches[0]).loss) != first
    assert module.objective.training
