"""What a device can do: the yardstick for the throughput of training."""

from __future__ import annotations

import time

import torch

_SMALLEST, _LARGEST = 256, 8192
_PRODUCTS_PER_TIMING = 4


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Measure the floating-point operations per second of square matrix products.

    The best of many timings: at first of small matrices, then of larger ones as long as a larger product fits into the
    time, at last of the largest again and again. Measured rather than looked up (our decision): data sheets know
    neither the threads that a process was given nor what else runs on the machine. No global random state is touched.

    Parameters
    ----------
    device
        Where to measure; on a CPU with the threads that this process uses.
    dtype
        Type of the factors, for example ``torch.bfloat16``.
    seconds
        Time to spend; the first product of each size, which warms up, may add to it.

    Returns
    -------
    float
        FLOP/s; a product of two N x N matrices counts 2 N^3.
    """
    deadline = time.perf_counter() + seconds
    size, best = _SMALLEST, 0.0
    while True:
        product = _Product(size, device, dtype)
        took = product.time()
        best = max(best, product.flops / took)
        if size == _LARGEST or time.perf_counter() + 2 * 8 * took > deadline:
            break
        size *= 2
    while time.perf_counter() < deadline:
        best = max(best, product.flops / product.time())
    return best


class _Product:
    """A square matrix product, warmed up."""

    def __init__(self, size: int, device: torch.device, dtype: torch.dtype) -> None:
        # Neither constant nor zero: the power that a GPU draws, and so its clock, depends on the numbers.
        generator = torch.Generator(device).manual_seed(size)
        self._factor = torch.randn(size, size, generator=generator, device=device).to(dtype)
        self._result = torch.empty_like(self._factor)
        self.flops = _PRODUCTS_PER_TIMING * 2 * size**3
        self.time()

    def time(self) -> float:
        """Return the seconds of some products in a row."""
        self._wait()
        began = time.perf_counter()
        for _ in range(_PRODUCTS_PER_TIMING):
            torch.mm(self._factor, self._factor, out=self._result)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._factor.is_cuda:
            torch.cuda.synchronize(self._factor.device)
