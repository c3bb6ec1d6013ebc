"""The least time that a call can take on this device, from rates measured on the spot.

A roofline of two sides (Williams et al., Communications of the ACM 52(4), 2009): all products at the rate of
a large product in their dtype, and all weights, inputs and outputs once at the rate of a large copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from eugen.cost import CallCost
from eugen.timing.clock import Clock, last_cache_bytes
from eugen.timing.latency import warm_up

TRIES = 7
CPU_SIZE, GPU_SIZE = 1024, 8192
"""Of the square product: large enough for its full rate."""
LEAST_COPY, MOST_COPY, GPU_COPY = 2**26, 2**29, 2**30
"""Bytes of the copied buffer: four times the last cache between the first two. On a GPU so many that the
launch, which its events enclose, is one or two hundredths of the copy.
"""


@dataclass(frozen=True)
class Limit:
    """Least milliseconds of a call; `binds` says whether products ("MACs") or "bytes" set it."""

    ms: float
    binds: str


@dataclass(frozen=True)
class Rates:
    """What a device reaches: bytes copied (read and written) and MACs, by dtype, a second."""

    bytes_per_s: float
    macs_per_s: dict[str, float]

    def limit(self, cost: CallCost) -> Limit:
        """The larger of both sides; a dtype whose rate is unknown is refused by a KeyError."""
        by_macs = sum(count / self.macs_per_s[dtype] for dtype, count in cost.macs.items())
        by_bytes = (cost.weight_bytes + cost.io_bytes) / self.bytes_per_s
        return Limit(1e3 * max(by_macs, by_bytes), "bytes" if by_bytes > by_macs else "MACs")

    def knowing(self, dtypes: Iterable[str], device: str) -> Rates:
        """These rates, with those of further dtypes measured."""
        missing = {name: gemm_rate(device, name) for name in dtypes if name not in self.macs_per_s}
        return Rates(self.bytes_per_s, self.macs_per_s | missing)


def measure_rates(device: str, dtype: str) -> Rates:
    """Both sides on this device, the best of several tries each."""
    return Rates(copy_rate(device), {dtype: gemm_rate(device, dtype)})


def copy_rate(device: str) -> float:
    """Bytes a second, read and written, of the best copy of a buffer beyond the last cache."""
    gpu = device.startswith("cuda")
    size = GPU_COPY if gpu else min(MOST_COPY, max(LEAST_COPY, 4 * last_cache_bytes(device)))
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def gemm_rate(device: str, dtype: str) -> float:
    """MACs a second of the best large square product; of int8, with sums in int32.

    Of random numbers, as models have: on constants a GPU draws less power and keeps a higher clock.
    """
    size = GPU_SIZE if device.startswith("cuda") else CPU_SIZE
    kind = getattr(torch, dtype)
    left, right = (_random(size, kind, device, seed) for seed in range(2))
    product = torch._int_mm if kind is torch.int8 else torch.mm
    return size**3 / _best_seconds(lambda: product(left, right.T), device)


def _random(size: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    if dtype is torch.int8:
        return torch.randint(-128, 128, (size, size), dtype=dtype, device=device, generator=generator)
    return torch.randn(size, size, device=device, generator=generator).to(dtype)


def _best_seconds(call: Callable[[], object], device: str) -> float:
    clock, best = Clock(device), math.inf
    with torch.no_grad():
        warm_up(call, clock=clock)
        for _ in range(TRIES):
            best = min(best, clock.milliseconds(call))
    return best / 1e3
