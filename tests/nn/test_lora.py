"""Low-rank adapters: nothing at the start, all of them trained, nothing else touched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scdiva.nn import Packing, Transformer, init_transformer
from scdiva.nn.lora import LoRALinear, add_lora

NAMES = ("qkv", "out", "gate_up", "down")
PACKING = Packing((5, 1, 7))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def transformer() -> Transformer:
    built = Transformer(n_layers=2, width=16, n_heads=2, n_hidden=24)
    init_transformer(built, generator(1), std=0.2)
    return built.requires_grad_(False)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randn(PACKING.n_tokens, 16, generator=generator(2))


def test_an_adapter_is_what_its_formula_says():
    base = nn.Linear(6, 4)
    adapter = LoRALinear(base, 3, alpha=12.0, generator=generator())
    with torch.no_grad():
        adapter.up.normal_(generator=generator(1))
    x = torch.randn(5, 6, generator=generator(2))
    weight = base.weight + 12.0 / 3 * adapter.up @ adapter.down
    torch.testing.assert_close(adapter(x), x @ weight.T + base.bias, rtol=1e-5, atol=1e-5)
    assert LoRALinear(nn.Linear(6, 4), 3).scale == 1.0


def test_at_the_start_the_output_is_the_same_bit_for_bit(tokens):
    model = transformer()
    before = model(tokens, PACKING)
    add_lora(model, NAMES, 3, alpha=16.0, generator=generator())
    assert torch.equal(model(tokens, PACKING), before)


def test_every_linear_layer_of_these_names_is_adapted_and_nothing_else_is_trained():
    model = transformer()
    adapters = add_lora(model, NAMES, 3)
    expected = {f"layers.{i}.{part}" for i in range(2) for part in (
        "attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")}  # fmt: skip
    assert set(adapters) == expected
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{part}" for name in expected for part in ("down", "up")}
    assert all(model.get_submodule(name) is adapter for name, adapter in adapters.items())


def test_every_adapter_tensor_moves_within_two_steps(tokens):
    # B starts at 0: in the first step only B has a gradient, in the second A has one too. Without weight decay, which
    # would move A whatever its gradient.
    model = transformer()
    add_lora(model, NAMES, 3, generator=generator())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    weight = torch.randn(tokens.shape, generator=generator(3))
    moved = []
    for _ in range(2):
        optimiser.zero_grad()
        (model(tokens, PACKING) * weight).sum().backward()
        optimiser.step()
        now = dict(model.named_parameters())
        moved.append({name for name, before in start.items() if not torch.equal(now[name], before)})
    assert moved[0] == {name for name in start if name.endswith(".up")}
    assert moved[1] == set(start)
    assert all(torch.equal(now[name], before) for name, before in frozen.items())


def test_the_generator_decides():
    one, two, other = (add_lora(transformer(), NAMES, 2, generator=generator(seed)) for seed in (0, 0, 1))
    for name in one:
        assert torch.equal(one[name].down, two[name].down)
        assert not torch.equal(one[name].down, other[name].down)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(nn.Linear(6, 4), 5)
    with pytest.raises(ValueError, match="rank"):
        LoRALinear(nn.Linear(6, 4), 0)
    with pytest.raises(ValueError, match="nonsense"):
        add_lora(transformer(), ("qkv", "nonsense"), 2)
