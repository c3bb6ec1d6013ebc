"""Latency of two functions as a ratio of interleaved, paired runs.

Shared machines are noisy: two runs that follow each other at once share the noise, so their
ratio is what is reported, with a bootstrap interval.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from eugen.timing.clock import Clock

BOOTSTRAP_DRAWS = 2000
LEAST_PAIRS = 10
STEADY, LEAST_WARM_UP, MOST_WARM_UP = 0.98, 0.05, 5.0
"""Warm-up ends with a round that takes no less than 0.98 of the best before it; seconds, least and most."""


@dataclass(frozen=True)
class PairedLatency:
    """Samples of both functions in milliseconds; sample i of both ran side by side."""

    base_ms: list[float]
    other_ms: list[float]

    def log_ratios(self) -> torch.Tensor:
        """Logarithms of base / other, `[pairs]`, float64."""
        base = torch.tensor(self.base_ms, dtype=torch.float64)
        return (base / torch.tensor(self.other_ms, dtype=torch.float64)).log()

    def speedup(self, confidence: float = 0.95) -> tuple[float, float, float]:
        """Median of base / other over the pairs, and its bootstrap interval (low, high).

        It is of these two functions as they lie in memory; `compare_models` speaks of the models.
        """
        ratios = self.log_ratios()
        generator = torch.Generator().manual_seed(0)
        draws = torch.randint(len(ratios), (BOOTSTRAP_DRAWS, len(ratios)), generator=generator)
        medians = ratios[draws].quantile(0.5, dim=1)
        tail = (1 - confidence) / 2
        bounds = medians.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
        return math.exp(float(ratios.quantile(0.5))), math.exp(float(bounds[0])), math.exp(float(bounds[1]))


def compare(
    base: Callable[[], Any],
    other: Callable[[], Any],
    *,
    pairs: int,
    max_seconds: float = math.inf,
    warmup: int = 3,
    device: str = "cpu",
) -> PairedLatency:
    """Time both functions in the order base, other, other, base, …, without gradients.

    Args:
        pairs: samples of each; at least 10.
        max_seconds: end earlier after this time, but never below 10 pairs.
        warmup: unmeasured runs of each.
        device: `cpu`, or a CUDA device, timed between two of its events.

    Raises:
        ValueError: fewer than 10 pairs, from which no interval can be told.
    """
    if pairs < LEAST_PAIRS:
        raise ValueError(f"pairs={pairs} must be at least {LEAST_PAIRS} to say anything about the spread")
    with torch.no_grad():
        for _ in range(warmup):
            base()
            other()
        return sample(
            base, other, pairs=pairs, least=LEAST_PAIRS, max_seconds=max_seconds, clock=Clock(device)
        )


def sample(
    base: Callable[[], Any],
    other: Callable[[], Any],
    *,
    pairs: int,
    least: int,
    max_seconds: float,
    clock: Clock,
    whole: int = 1,
) -> PairedLatency:
    """Pairs in the order base, other, other, base, …; fewer where time is up, but never below `least`.

    Args:
        whole: end on a multiple of so many pairs; 2 keeps as many of either order.
    """
    base_ms, other_ms = [], []
    start = time.perf_counter()
    for pair in range(pairs):
        if pair >= least and pair % whole == 0 and time.perf_counter() - start > max_seconds:
            break
        if pair % 2 == 0:
            base_ms.append(clock.milliseconds(base))
            other_ms.append(clock.milliseconds(other))
        else:
            other_ms.append(clock.milliseconds(other))
            base_ms.append(clock.milliseconds(base))
    return PairedLatency(base_ms, other_ms)


def warm_up(*calls: Callable[[], Any], clock: Clock) -> None:
    """Run the calls in turn until a round is no longer faster than those before it."""
    best, start = math.inf, time.perf_counter()
    while True:
        took = sum(clock.milliseconds(call) for call in calls)
        seconds = time.perf_counter() - start
        steady = took >= STEADY * best
        if (steady and seconds >= LEAST_WARM_UP) or seconds >= MOST_WARM_UP:
            return
        best = min(best, took)
