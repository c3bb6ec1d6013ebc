"""Latency of two functions as a ratio of interleaved, paired runs.

Shared machines are noisy: two runs that follow each other at once share the noise, so their
ratio is what is reported, with a bootstrap interval.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BOOTSTRAP_DRAWS = 2000
LEAST_PAIRS = 10


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
        device: `cpu`, or a CUDA device that is synchronised around each run.

    Raises:
        ValueError: fewer than 10 pairs, from which no interval can be told.
    """
    if pairs < LEAST_PAIRS:
        raise ValueError(f"pairs={pairs} must be at least {LEAST_PAIRS} to say anything about the spread")
    base_ms, other_ms = [], []
    with torch.no_grad():
        for _ in range(warmup):
            base()
            other()
        start = time.perf_counter()
        for pair in range(pairs):
            if pair >= LEAST_PAIRS and time.perf_counter() - start > max_seconds:
                break
            if pair % 2 == 0:
                base_ms.append(_time_ms(base, device))
                other_ms.append(_time_ms(other, device))
            else:
                other_ms.append(_time_ms(other, device))
                base_ms.append(_time_ms(base, device))
    return PairedLatency(base_ms, other_ms)


def peak_bytes(function: Callable[[], Any], model: nn.Module, *, device: str = "cpu") -> int:
    """Peak memory of a call in bytes: the model's weights and the most that was alive beside them.

    On a CUDA device the allocator's own count; on the CPU, where the allocator keeps none, the
    tensors that torch's operators return are counted while they live.
    """
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _stored(model)}
    with torch.no_grad():
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            function()
            torch.cuda.synchronize(device)
            return sum(weights.values()) + torch.cuda.max_memory_allocated(device) - before
        with _LiveBytes(set(weights)) as live:
            function()
    return sum(weights.values()) + live.peak


def _stored(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators return, from their first tensor to their last."""

    def __init__(self, ignored: set[int]) -> None:
        super().__init__()
        self._ignored = ignored
        self._owners: dict[int, int] = {}
        self._alive = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor)
        self.peak = max(self.peak, self._alive)
        return result

    def _track(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        if pointer in self._ignored or size == 0:
            return
        if self._owners.get(pointer, 0) == 0:
            self._alive += size
        self._owners[pointer] = self._owners.get(pointer, 0) + 1
        weakref.finalize(tensor, self._release, pointer, size)

    def _release(self, pointer: int, size: int) -> None:
        self._owners[pointer] -= 1
        if self._owners[pointer] == 0:
            self._alive -= size


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
