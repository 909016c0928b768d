"""Which arithmetic a device is good at."""

from __future__ import annotations

from typing import Literal

import torch


def uses_bf16(precision: Literal["auto", "bf16", "fp32"], device: str) -> bool:
    """Tell whether a precision means bf16 autocast on a device ("cpu" or "cuda").

    "auto" says yes where the hardware computes in bf16: NVIDIA from Ampere on, CPUs with AVX512-BF16 or AMX.
    Elsewhere bf16 is emulated and slower than fp32.
    """
    if precision != "auto":
        return precision == "bf16"
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch has no public question for this before torch.cpu.get_capabilities (2.13).
    return any(
        bool(getattr(torch.cpu, name, bool)()) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
