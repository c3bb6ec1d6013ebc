"""Latency of two functions as a ratio of interleaved, paired runs.

Shared machines are noisy: two runs that follow each other at once share the noise, so their
ratio is what is reported, with a bootstrap interval.
"""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True)
class PairedLatency:
    """Samples of both functions in milliseconds; sample i of both ran side by side."""

    base_ms: list[float]
    other_ms: list[float]

    def speedup(self, confidence: float = 0.95) -> tuple[float, float, float]:
        """Median of base / other over the pairs, and its bootstrap interval (low, high)."""
        base = torch.tensor(self.base_ms, dtype=torch.float64)
        other = torch.tensor(self.other_ms, dtype=torch.float64)
        ratios = (base / other).log()
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(len(ratios), (BOOTSTRAP_DRAWS, len(ratios)), generator=generator)
        medians = ratios[draws].quantile(0.5, dim=1)
        tail = (1 - confidence) / 2
        bounds = medians.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
        return math.exp(float(ratios.quantile(0.5))), math.exp(float(bounds[0])), math.exp(float(bounds[1]))


def compare(
    base: Callable[[], Any], other: Callable[[], Any], *, pairs: int, warmup: int = 3, device: str = "cpu"
) -> PairedLatency:
    """Time both functions in the order base, other, other, base, …, without gradients.

    Args:
        pairs: samples of each; at least 2.
        warmup: unmeasured runs of each.
        device: `cpu`, or a CUDA device that is synchronised around each run.
    """
    if pairs < 2:
        raise ValueError(f"pairs={pairs} must be at least 2 to say anything about the spread")
    base_ms, other_ms = [], []
    with torch.no_grad():
        for _ in range(warmup):
            base()
            other()
        for pair in range(pairs):
            if pair % 2 == 0:
                base_ms.append(_time_ms(base, device))
                other_ms.append(_time_ms(other, device))
            else:
                other_ms.append(_time_ms(other, device))
                base_ms.append(_time_ms(base, device))
    return PairedLatency(base_ms, other_ms)


def peak_bytes(function: Callable[[], Any], *, device: str = "cpu") -> int:
    """Peak memory while the function runs: allocated on a CUDA device; the process's peak on the CPU.

    On the CPU the system only keeps the process's maximum so far: call it in a process of its own.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    with torch.no_grad():
        function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _time_ms(function: Callable[[], Any], device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        torch.cuda.synchronize(device)
    else:
        start = time.perf_counter()
        function()
    return (time.perf_counter() - start) * 1e3
