from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from scdiva.nn import Packing, Transformer, init_transformer
from scdiva.nn.transformer import _grouped_attention, packed_attention, rotary_tables, rotate

LENGTHS = (5, 1, 9, 4, 4, 17, 2)
N_HEADS, HEAD = 2, 8
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def queries_keys_values() -> list[torch.Tensor]:
    return [random(sum(LENGTHS), N_HEADS, HEAD, seed=i).requires_grad_() for i in range(3)]


def sequence_by_sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths) -> torch.Tensor:
    """PyTorch's own attention, (1, H, L, K) at a time."""
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts]
    )


# one group, and several with a last one that is not full
@pytest.mark.parametrize("group", [16, 3])
@pytest.mark.parametrize("function", [packed_attention, _grouped_attention])
def test_packed_attention_equals_attention_per_sequence(function, group, monkeypatch):
    monkeypatch.setattr("scdiva.nn.transformer._GROUP", group)
    inputs = queries_keys_values()
    weight = random(sum(LENGTHS), N_HEADS, HEAD, seed=9)
    found = function(*inputs, Packing(LENGTHS), 0.0)
    gradients = torch.autograd.grad((found * weight).sum(), inputs)
    expected = sequence_by_sequence(*inputs, LENGTHS)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("function", [packed_attention, _grouped_attention])
def test_a_sequence_does_not_depend_on_the_others(function):
    q, k, v = (x.detach() for x in queries_keys_values())
    before = function(q, k, v, Packing(LENGTHS), 0.0)
    changed = [x.clone() for x in (q, k, v)]
    third = slice(6, 15)
    for x in changed:
        x[:6] = 7.0
        x[15:] = -7.0
    after = function(*changed, Packing(LENGTHS), 0.0)
    torch.testing.assert_close(after[third], before[third], rtol=0, atol=0)
    assert not torch.allclose(after[15:], before[15:])


@pytest.mark.parametrize("function", [packed_attention, _grouped_attention])
def test_dropout_drops_and_keeps_the_mean(function):
    torch.manual_seed(0)
    n = 3000
    q, k = torch.zeros(2, 2, 1, 2)
    v = torch.ones(2, 1, 2)
    packing = Packing((2,) * n)
    found = function(q.repeat(n, 1, 1), k.repeat(n, 1, 1), v.repeat(n, 1, 1), packing, 0.5)[..., 0]
    assert set(found.unique().tolist()) == {0.0, 1.0, 2.0}  # none, one or both of two weights of 1/2, doubled
    assert float(found.mean()) == pytest.approx(1.0, abs=0.05)


def test_where_sequences_start():
    packing = Packing(LENGTHS)
    assert packing.starts == [0, 5, 6, 15, 19, 23, 40]
    assert packing.n_tokens == 42
    assert Packing((3,)).starts == [0]


class TestRotary:
    def test_equals_turning_pairs_of_dimensions(self):
        x, position = random(6, N_HEADS, HEAD), torch.tensor([0, 1, 5, 2, 0, 1000])
        found = rotate(x, *rotary_tables(position, HEAD)).numpy()
        half = HEAD // 2
        for t, h, i in np.ndindex(6, N_HEADS, half):
            angle = float(position[t]) * 10_000 ** (-i / half)
            pair = complex(float(x[t, h, i]), float(x[t, h, i + half])) * np.exp(1j * angle)
            assert found[t, h, i] == pytest.approx(pair.real, abs=1e-4)
            assert found[t, h, i + half] == pytest.approx(pair.imag, abs=1e-4)

    def test_products_depend_on_distances_only(self):
        q, k = random(1, 1, HEAD, seed=1), random(1, 1, HEAD, seed=2)

        def product(i: int, j: int) -> float:
            at = [rotary_tables(torch.tensor([p]), HEAD) for p in (i, j)]
            return float((rotate(q, *at[0]) * rotate(k, *at[1])).sum())

        assert product(3, 10) == pytest.approx(product(103, 110), abs=1e-4)
        assert product(3, 10) != pytest.approx(product(3, 11), abs=1e-3)

    def test_keeps_the_type(self):
        assert rotate(random(2, 1, HEAD).bfloat16(), *rotary_tables(torch.arange(2), HEAD)).dtype == torch.bfloat16


@pytest.fixture
def transformer() -> Transformer:
    transformer = Transformer(2, N_HEADS * HEAD, N_HEADS, 24)
    init_transformer(transformer, torch.Generator().manual_seed(0), std=0.3)
    return transformer


def reference(transformer: Transformer, x: torch.Tensor, position: torch.Tensor | None) -> torch.Tensor:
    """One sequence, written out: pre-norm blocks of attention and SwiGLU, and a final norm."""

    def norm(x, module):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * module.weight

    for layer in transformer.layers:
        q, k, v = (
            part.view(len(x), N_HEADS, HEAD).transpose(0, 1)
            for part in (norm(x, layer.norm1) @ layer.attention.qkv.weight.T).chunk(3, dim=-1)
        )
        if position is not None:
            tables = rotary_tables(position, HEAD)
            q, k = (rotate(part.transpose(0, 1), *tables).transpose(0, 1) for part in (q, k))
        weight = torch.softmax(q @ k.transpose(1, 2) / HEAD**0.5, dim=-1)
        x = x + (weight @ v).transpose(0, 1).reshape(len(x), -1) @ layer.attention.out.weight.T
        gate, up = (norm(x, layer.norm2) @ layer.mlp.gate_up.weight.T).chunk(2, dim=-1)
        x = x + (gate * torch.sigmoid(gate) * up) @ layer.mlp.down.weight.T
    return norm(x, transformer.norm)


@pytest.mark.parametrize("has_positions", [False, True])
def test_the_transformer_equals_its_definition(has_positions, transformer):
    x = random(sum(LENGTHS), N_HEADS * HEAD)
    position = torch.cat([torch.arange(n) for n in LENGTHS]) if has_positions else None
    with torch.no_grad():
        found = transformer(x, Packing(LENGTHS), position)
        for start, n in zip(Packing(LENGTHS).starts, LENGTHS, strict=True):
            rows = slice(start, start + n)
            expected = reference(transformer, x[rows], None if position is None else position[rows])
            torch.testing.assert_close(found[rows], expected, **CLOSE)


def test_without_positions_a_sequence_is_a_set(transformer):
    x, order = random(9, N_HEADS * HEAD), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(transformer(x[order], Packing((9,))), transformer(x, Packing((9,)))[order], **CLOSE)
        positions = torch.arange(9)
        ordered = transformer(x, Packing((9,)), positions)
        assert not torch.allclose(transformer(x[order], Packing((9,)), positions), ordered[order], atol=1e-3)


def test_flops_are_those_that_pytorch_counts(transformer):
    x = random(sum(LENGTHS), N_HEADS * HEAD)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        transformer(x, Packing(LENGTHS))
    assert transformer.flops(Packing(LENGTHS)) == counter.get_total_flops()


def test_the_start_is_drawn_from_the_generator_alone():
    def start(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 1)
        transformer = Transformer(2, 16, 2, 24)
        init_transformer(transformer, torch.Generator().manual_seed(seed))
        return transformer.state_dict()

    one, again, other = start(0), start(0), start(1)
    for name, tensor in one.items():
        assert torch.equal(tensor, again[name]), name
        assert "norm" in name or not torch.equal(tensor, other[name]), name


def test_writes_to_the_stream_start_smaller_in_deeper_networks():
    transformer = Transformer(8, 64, 2, 64)
    init_transformer(transformer, torch.Generator().manual_seed(0), std=0.02)
    layer = transformer.layers[3]
    assert float(layer.attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    for linear in (layer.attention.out, layer.mlp.down):
        assert float(linear.weight.detach().std()) == pytest.approx(0.02 / 4, rel=0.05)


def test_dropout_is_for_training_only():
    transformer = Transformer(1, 16, 2, 24, dropout=0.5)
    x = random(7, 16)
    torch.manual_seed(0)
    with torch.no_grad():
        assert not torch.equal(transformer(x, Packing((7,))), transformer(x, Packing((7,))))
        transformer.eval()
        assert torch.equal(transformer(x, Packing((7,))), transformer(x, Packing((7,))))


def test_heads_must_divide_the_width_into_pairs():
    with pytest.raises(ValueError, match="multiple of twice"):
        Transformer(1, 18, 6, 8)
