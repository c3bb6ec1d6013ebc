"""How long one call takes: on the CPU by the clock, on a GPU by its events."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DEFAULT_CACHE = 64 * 2**20
"""Bytes to flush where the machine does not tell the size of its last cache."""
CAPTURE_WARMUP = 3


class Clock:
    """Times single calls on one device; on a GPU between two of its events, with nothing else queued.

    Args:
        device: `cpu`, or a CUDA device.
        cold: write over more than the last cache before each call, so that weights come from memory.
        cuda_graph: let `prepare` capture calls, so that a replay without launches is timed.

    Raises:
        ValueError: graphs are asked for on a device that has none.
    """

    def __init__(self, device: str = "cpu", *, cold: bool = False, cuda_graph: bool = False) -> None:
        self.device, self.cuda_graph = device, cuda_graph
        self._on_gpu = device.startswith("cuda")
        if cuda_graph and not self._on_gpu:
            raise ValueError(f"cuda_graph needs a CUDA device, device={device!r} is none: leave it out")
        self._flushed: Tensor | None = None
        if cold:
            self._flushed = torch.zeros(2 * last_cache_bytes(device), dtype=torch.uint8, device=device)

    def prepare(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as it is timed: itself, or the replay of a graph captured from it."""
        return _captured(call, self.device) if self.cuda_graph else call

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Run once and say how long it took."""
        if self._flushed is not None:
            self._flushed.add_(1)
        if not self._on_gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            first.record()
            call()
            last.record()
            torch.cuda.synchronize()
        return first.elapsed_time(last)


def is_here(device: str) -> bool:
    """Whether this machine has the device: `cpu`, `cuda`, or `cuda:` and a number that torch sees."""
    name, _, index = device.partition(":")
    if device == "cpu" or name != "cuda" or not torch.cuda.is_available():
        return device == "cpu"
    return device == "cuda" or (index.isdecimal() and int(index) < torch.cuda.device_count())


def last_cache_bytes(device: str) -> int:
    """Size of the cache before memory: a GPU's L2, a CPU's last level."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) * {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 1))
    return max(sizes, default=DEFAULT_CACHE)


def _captured(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The replay of a CUDA graph. Libraries make their handles before, on the stream that captures.

    A graph holds addresses, not tensors: the call, which owns weights and inputs, lives as long as it does.
    """
    with torch.cuda.device(device), torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(CAPTURE_WARMUP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()

    def replay(_owner: Callable[[], Any] = call) -> None:
        graph.replay()

    return replay
