from __future__ import annotations

import pytest
import torch

from scdiva.training import peak
from scdiva.training.peak import measured_peak

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


class Clock:
    """Moves only while products are computed, at a chosen speed for each size."""

    def __init__(self, monkeypatch, flops_per_s) -> None:
        self.now, self.sizes = 100.0, []

        def mm(left, right, out):
            size = len(left)
            self.sizes.append(size)
            self.now += 2 * size**3 / flops_per_s(size)

        monkeypatch.setattr(peak.torch, "mm", mm)
        monkeypatch.setattr(peak.time, "perf_counter", lambda: self.now)


def test_the_best_speed_of_any_size_is_the_peak(monkeypatch):
    speeds = {256: 1e9, 512: 4e9, 1024: 3e9}
    clock = Clock(monkeypatch, speeds.__getitem__)
    assert measured_peak(CPU, torch.float32, seconds=20.0) == pytest.approx(4e9)
    assert set(clock.sizes) == {256, 512, 1024}


def test_time_and_memory_are_bounded(monkeypatch):
    clock = Clock(monkeypatch, lambda size: 1e9)
    measured_peak(CPU, torch.float32, seconds=2.0)
    assert clock.now - 100.0 < 2 * 2.0
    # On a device that is fast enough for anything the matrices stay small enough for its memory.
    monkeypatch.setattr(peak, "_LARGEST", 512)
    clock = Clock(monkeypatch, lambda size: 1e13)
    measured_peak(CPU, torch.float32, seconds=0.001)
    assert max(clock.sizes) == 512


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_no_less_than_a_product_reaches(dtype):
    before = torch.get_rng_state()
    found = measured_peak(CPU, dtype, seconds=0.2)
    assert torch.equal(torch.get_rng_state(), before)
    product = peak._Product(512, CPU, dtype)
    # Other work on the machine may have slowed the one or the other.
    assert found > 0.3 * max(product.flops / product.time() for _ in range(5))
