"""Peak memory of one call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Memory:
    """Peaks of one call in bytes; None where the device or the system does not tell.

    Attributes:
        allocated: the model's weights and the most that was alive beside them (`peak_bytes`).
        reserved: what CUDA's allocator held from the device, for all that is on it.
        rss: the resident set of the whole process, other models in it included.
    """

    allocated: int | None
    reserved: int | None
    rss: int | None


def peak_memory(
    function: Callable[[], Any], model: nn.Module, *, device: str = "cpu", counted: bool = True
) -> Memory:
    """Peaks of a call; the resident set is taken in a run of its own, without anything that counts.

    Args:
        counted: whether `peak_bytes` can count this call; it sees nothing of code compiled for the CPU.
    """
    allocated, reserved = peak_bytes(function, model, device=device) if counted else None, None
    resettable = _reset_rss_peak()
    with torch.no_grad():
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            function()
            torch.cuda.synchronize(device)
            reserved = torch.cuda.max_memory_reserved(device)
        else:
            function()
    return Memory(allocated, reserved, _rss_peak() if resettable else None)


def _reset_rss_peak() -> bool:
    """Set the kernel's peak of this process back to what it holds now (Linux: proc(5), clear_refs)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _rss_peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


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
