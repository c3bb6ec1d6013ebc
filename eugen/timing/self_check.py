"""Does the interval hold? A model against its own copy, many times: 1 must be inside as often as it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from eugen.timing.clock import Clock
from eugen.timing.placements import PlacedLatency, compare_models, placed

CHANCE = 0.05
"""Fewer repetitions cover 1 with at most this probability where the interval is as good as it says."""


@dataclass(frozen=True)
class Coverage:
    """How many of the repetitions covered 1, and those that one placement's pairs would have."""

    speedups: list[tuple[float, float, float]]
    unplaced: list[tuple[float, float, float]]
    confidence: float

    @property
    def covered(self) -> int:
        return sum(low <= 1 <= high for _, low, high in self.speedups)

    @property
    def covered_unplaced(self) -> int:
        """Of the intervals over the pairs of each repetition's first placement alone."""
        return sum(low <= 1 <= high for _, low, high in self.unplaced)

    @property
    def least(self) -> int:
        """Fewer than these would come by chance in at most one check of twenty."""
        return least_covered(len(self.speedups), self.confidence)

    @property
    def agreements(self) -> tuple[int, int]:
        """Pairs of successive repetitions whose intervals overlap, and all such pairs."""
        pairs = list(zip(self.speedups[::2], self.speedups[1::2], strict=False))
        return sum(a[1] <= b[2] and b[1] <= a[2] for a, b in pairs), len(pairs)


def self_check(
    model: nn.Module,
    example: Any,
    *,
    repetitions: int,
    placements: int,
    pairs: int,
    seconds: float,
    confidence: float,
    clock: Clock,
    progress: Callable[[str], None] = lambda line: None,
) -> Coverage:
    """Compare two copies of a model so many times, in new placements each time.

    Raises:
        ValueError: no repetition.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions={repetitions} must be at least 1")
    speedups, unplaced = [], []
    for index in range(repetitions):
        timed: PlacedLatency = compare_models(
            *(placed(model, example, lambda m, x: m(x)) for _ in range(2)),
            placements=placements,
            pairs=pairs,
            max_seconds=seconds,
            clock=clock,
        )
        speedups.append(timed.speedup(confidence))
        unplaced.append(timed.placements[0].speedup(confidence))
        middle, low, high = speedups[-1]
        inside = "covers 1" if low <= 1 <= high else "MISSES 1"
        progress(f"{index + 1}: {middle:.3f} [{low:.3f}, {high:.3f}] {inside}, scatter {timed.scatter():.3f}")
    return Coverage(speedups, unplaced, confidence)


def least_covered(repetitions: int, confidence: float) -> int:
    """The largest k with P(fewer than k of the repetitions cover) ≤ 0.05 at this confidence."""
    chance, k = 0.0, 0
    while k < repetitions:
        chance += math.comb(repetitions, k) * confidence**k * (1 - confidence) ** (repetitions - k)
        if chance > CHANCE:
            break
        k += 1
    return k
