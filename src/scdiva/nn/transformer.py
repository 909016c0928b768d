"""A bidirectional transformer over packed sequences: sequences of any length, one after the other, without padding.

Linear layers and norms run over all tokens of all sequences at once; attention runs within each sequence. Padding a
minibatch to its longest sequence would, with masks of all sizes, about double the work.

Shape letters: T tokens of all sequences together, D width, H heads, K width of a head, F width of the feed-forward
layer, S sequences, L longest sequence of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

ROPE_THETA = 10_000.0
"""Base of the rotary frequencies (Su et al., arXiv:2104.09864; the published configuration)."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where each sequence is among the packed tokens.

    Parameters
    ----------
    lengths
        Tokens of each sequence, in order; none is zero.
    """

    lengths: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens T of all sequences together."""
        return sum(self.lengths)

    @property
    def starts(self) -> list[int]:
        """First token of each sequence."""
        return [0, *accumulate(self.lengths)][:-1]

    def attention_flops(self, width: int) -> int:
        """Floating-point operations of the two matrix products of one forward attention layer."""
        return sum(4 * length * length * width for length in self.lengths)


def packed_attention(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, packing: Packing, dropout: float = 0.0
) -> torch.Tensor:
    """Attend within each sequence; ``(T, H, K)``.

    On a CPU sequence after sequence, which needs neither padding nor masks. On a GPU, where a call costs more than its
    padding, groups of sequences of similar length are padded to the longest of the group.
    """
    if q_THK.device.type != "cpu":
        return _grouped_attention(q_THK, k_THK, v_THK, packing, dropout)
    q_THK = q_THK * q_THK.shape[-1] ** -0.5
    sequences = zip(*(x.split(packing.lengths) for x in (q_THK, k_THK, v_THK)), strict=True)
    return torch.cat([_plain_attention(q, k, v, dropout) for q, k, v in sequences])


def _plain_attention(q_LHK: torch.Tensor, k_LHK: torch.Tensor, v_LHK: torch.Tensor, dropout: float) -> torch.Tensor:
    """Attention by its definition: here two to three times as fast as SDPA, whose backward pass is slow on CPUs."""
    weight_HLL = torch.softmax(q_LHK.transpose(0, 1) @ k_LHK.permute(1, 2, 0), dim=-1)
    if dropout:
        weight_HLL = F.dropout(weight_HLL, dropout)
    return (weight_HLL @ v_LHK.transpose(0, 1)).transpose(0, 1)


_GROUP = 16


def _grouped_attention(
    q_THK: torch.Tensor, k_THK: torch.Tensor, v_THK: torch.Tensor, packing: Packing, dropout: float
) -> torch.Tensor:
    starts, lengths, device = packing.starts, packing.lengths, q_THK.device
    result = torch.zeros_like(q_THK)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for first in range(0, len(order), _GROUP):
        group = order[first : first + _GROUP]
        start_S = torch.tensor([starts[i] for i in group], device=device)
        length_S = torch.tensor([lengths[i] for i in group], device=device)
        longest = max(lengths[i] for i in group)
        step_L = torch.arange(longest, device=device)
        is_token_SL = step_L < length_S[:, None]
        # padding reads the last token of its sequence; nothing attends to it and its own result is dropped
        index_SL = start_S[:, None] + torch.minimum(step_L, length_S[:, None] - 1)
        q, k, v = (x[index_SL].transpose(1, 2) for x in (q_THK, k_THK, v_THK))
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=is_token_SL[:, None, None, :], dropout_p=dropout
        ).transpose(1, 2)
        result = result.index_put((index_SL[is_token_SL],), attended[is_token_SL])
    return result


def rotary_tables(position_T: torch.Tensor, head_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the rotary position embedding, each ``(T, 1, head_width)`` float32 (rotate-half form)."""
    exponent = torch.arange(0, head_width, 2, device=position_T.device, dtype=torch.float32) / head_width
    angle = position_T.float()[:, None] * (ROPE_THETA**-exponent)
    angle = torch.cat([angle, angle], dim=-1)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x_THK: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys by their positions; result in the type of ``x_THK``."""
    first, second = x_THK.chunk(2, dim=-1)
    return (x_THK * cos + torch.cat([-second, first], dim=-1) * sin).to(x_THK.dtype)


class Attention(nn.Module):
    """Multi-head self-attention without biases.

    Parameters
    ----------
    width, n_heads
        D and H.
    dropout
        On the attention weights and on the result, in training.
    """

    def __init__(self, width: int, n_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x_TD: torch.Tensor, packing: Packing, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Attend; ``(T, D)``."""
        n_tokens, width = x_TD.shape
        q, k, v = self.qkv(x_TD).view(n_tokens, 3, self.n_heads, width // self.n_heads).unbind(1)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        dropout = self.dropout if self.training else 0.0
        attended = self.out(packed_attention(q, k, v, packing, dropout).reshape(n_tokens, width))
        return F.dropout(attended, dropout) if dropout else attended


class SwiGLU(nn.Module):
    """Gated feed-forward layer without biases (Shazeer, arXiv:2002.05202).

    Parameters
    ----------
    width, n_hidden
        D and F.
    dropout
        On the result, in training.
    """

    def __init__(self, width: int, n_hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.gate_up = nn.Linear(width, 2 * n_hidden, bias=False)
        self.down = nn.Linear(n_hidden, width, bias=False)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Map ``(T, D)`` to ``(T, D)``."""
        gate, up = self.gate_up(x_TD).chunk(2, dim=-1)
        x_TD = self.down(F.silu(gate) * up)
        return F.dropout(x_TD, self.dropout) if self.dropout and self.training else x_TD


class Block(nn.Module):
    """Pre-norm attention and feed-forward layer, each added to the stream."""

    def __init__(self, width: int, n_heads: int, n_hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, n_heads, dropout)
        self.norm2 = nn.RMSNorm(width, eps=1e-5)
        self.mlp = SwiGLU(width, n_hidden, dropout)

    def forward(
        self, x_TD: torch.Tensor, packing: Packing, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Map ``(T, D)`` to ``(T, D)``."""
        x_TD = x_TD + self.attention(self.norm1(x_TD), packing, rotary)
        return x_TD + self.mlp(self.norm2(x_TD))

    def first(
        self, x_TD: torch.Tensor, packing: Packing, rotary: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """Map ``(T, D)`` to ``(T, D)`` as :meth:`forward` does, for the first token of each sequence; others stay.

        For the last layer of a transformer of which nothing but the first token is read: three quarters of its work,
        forward and backward, would be for nothing.
        """
        attention = self.attention
        n_tokens, width = x_TD.shape
        qkv = attention.qkv(self.norm1(x_TD)).view(n_tokens, 3, attention.n_heads, width // attention.n_heads)
        q_THK, k_THK, v_THK = qkv.unbind(1)
        if rotary is not None:
            q_THK, k_THK = rotate(q_THK, *rotary), rotate(k_THK, *rotary)
        first_S = torch.tensor(packing.starts, device=x_TD.device)
        dropout = attention.dropout if self.training else 0.0
        attended = [
            F.scaled_dot_product_attention(q_HK[:, None], k.transpose(0, 1), v.transpose(0, 1), dropout_p=dropout)
            for q_HK, k, v in zip(
                q_THK[first_S], k_THK.split(packing.lengths), v_THK.split(packing.lengths), strict=True
            )
        ]
        written_SD = attention.out(torch.stack(attended).reshape(first_S.numel(), width))
        x_SD = x_TD[first_S] + (F.dropout(written_SD, dropout) if dropout else written_SD)
        x_SD = x_SD + self.mlp(self.norm2(x_SD))
        return x_TD.index_copy(0, first_S, x_SD.to(x_TD.dtype))


class Transformer(nn.Module):
    """Blocks and a final norm.

    Parameters
    ----------
    n_layers, width, n_heads, n_hidden
        Sizes; the width is a multiple of twice the number of heads.
    dropout
        In training.
    """

    def __init__(self, n_layers: int, width: int, n_heads: int, n_hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % (2 * n_heads):
            raise ValueError(f"width ({width}) must be a multiple of twice the number of heads ({n_heads})")
        self.width, self.n_heads, self.n_hidden = width, n_heads, n_hidden
        self.layers = nn.ModuleList(Block(width, n_heads, n_hidden, dropout) for _ in range(n_layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)

    def forward(
        self,
        x_TD: torch.Tensor,
        packing: Packing,
        position_T: torch.Tensor | None = None,
        *,
        is_first_read: bool = False,
    ) -> torch.Tensor:
        """Transform packed tokens.

        Parameters
        ----------
        x_TD
            Token embeddings.
        packing
            The sequences.
        position_T
            Positions for RoPE; None: the tokens are a set.
        is_first_read
            The first token of every sequence is all that is read: the last layer leaves the others out.

        Returns
        -------
        torch.Tensor
            ``(T, D)``.
        """
        rotary = None if position_T is None else rotary_tables(position_T, self.width // self.n_heads)
        *before, last = self.layers
        for layer in before:
            x_TD = layer(x_TD, packing, rotary)
        x_TD = cast(Block, last).first(x_TD, packing, rotary) if is_first_read else last(x_TD, packing, rotary)
        return self.norm(x_TD)

    def flops(self, packing: Packing) -> int:
        """Floating-point operations of the matrix products of one forward pass."""
        per_token = 2 * self.width * (4 * self.width + 3 * self.n_hidden)
        return len(self.layers) * (packing.n_tokens * per_token + packing.attention_flops(self.width))


@torch.no_grad()
def init_transformer(transformer: Transformer, generator: torch.Generator, std: float = 0.02) -> None:
    """Start a transformer: normal weights, those that write to the stream smaller by sqrt(2 * layers), norms at one.

    The scheme of GPT-2 (Radford et al. 2019); drawn from ``generator`` alone.
    """
    n_writes = max(1, 2 * len(transformer.layers))
    for layer in transformer.layers:
        assert isinstance(layer, Block)
        for linear in (layer.attention.qkv, layer.mlp.gate_up):
            nn.init.normal_(linear.weight, std=std, generator=generator)
        for linear in (layer.attention.out, layer.mlp.down):
            nn.init.normal_(linear.weight, std=std / n_writes**0.5, generator=generator)
