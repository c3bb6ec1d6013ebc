"""Several processes that fit together: each reads its own part of the tokens, and sums are added.

Whatever is summed, averaged or gathered over a stream asks this file, so that layers need not know of it.
Outside `using` a process is alone and all of this costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, distributed, nn


@runtime_checkable
class Group(Protocol):
    """Processes that fit together. All of them make the same calls in the same order.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sum of each tensor over the processes, the same bits in all of them."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, in the order of their ranks; their lengths may differ."""
        ...


class TorchGroup:
    """A process group of torch.distributed; with NCCL tensors pass through this process's GPU."""

    def __init__(self, group: distributed.ProcessGroup | None = None) -> None:
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        self._group, self._gpu = group, distributed.get_backend(group) == "nccl"

    def _carried(self, tensor: Tensor) -> Tensor:
        device = torch.device("cuda", torch.cuda.current_device()) if self._gpu else "cpu"
        return tensor.detach().to(device, copy=True).contiguous()

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        found = []
        for tensor in tensors:
            carried = self._carried(tensor)
            distributed.all_reduce(carried, group=self._group)
            found.append(carried.to(tensor.device))
        return found

    def gather(self, tensor: Tensor) -> list[Tensor]:
        carried = self._carried(tensor)
        carried = carried.view(torch.uint8) if tensor.dtype == torch.bool else carried
        lengths = [carried.new_zeros(1, dtype=torch.int64) for _ in range(self.size)]
        distributed.all_gather(
            lengths, carried.new_full((1,), len(tensor), dtype=torch.int64), group=self._group
        )
        counts = [int(length) for length in lengths]
        padded = carried.new_zeros(max(counts), *tensor.shape[1:])
        padded[: len(tensor)] = carried
        found = [torch.empty_like(padded) for _ in range(self.size)]
        distributed.all_gather(found, padded, group=self._group)
        return [
            rows[:count].view(tensor.dtype).to(tensor.device)
            for rows, count in zip(found, counts, strict=True)
        ]


_CURRENT: ContextVar[Group | None] = ContextVar("eugen_group", default=None)


def resolve(group: Group | distributed.ProcessGroup | Literal["world"] | None) -> Group | None:
    """The processes that `replace(group=…)` means; None for this one alone.

    Raises:
        ValueError: "world" without torch.distributed, or what is no group.
    """
    if group is None:
        return None
    ready = distributed.is_available() and distributed.is_initialized()
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f"group={group!r} must be 'world', a process group or an eugen.parallel.Group")
        if not ready:
            raise ValueError(
                "group='world' needs torch.distributed: call torch.distributed.init_process_group first"
            )
        return TorchGroup()
    if distributed.is_available() and isinstance(group, distributed.ProcessGroup):
        return TorchGroup(group)
    if not isinstance(group, Group):
        raise ValueError(f"group={group!r} must be 'world', a process group or an eugen.parallel.Group")
    return group


@contextmanager
def using(group: Group | None) -> Iterator[None]:
    """Sums inside the `with` block are those of all processes of the group."""
    before = _CURRENT.set(group)
    try:
        yield
    finally:
        _CURRENT.reset(before)


def total(*tensors: Tensor) -> list[Tensor]:
    """Each tensor's sum over the processes."""
    group = _CURRENT.get()
    return list(tensors) if group is None else group.sum(list(tensors))


def total_of(*numbers: float) -> list[float]:
    """Each number's sum over the processes."""
    if _CURRENT.get() is None:
        return list(numbers)
    return total(torch.tensor(numbers, dtype=torch.float64))[0].tolist()


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes, those of the first one first."""
    group = _CURRENT.get()
    return rows if group is None else torch.cat(group.gather(rows))


def place(count: int) -> tuple[int, int]:
    """How many rows the processes before this one have, and how many all have together."""
    group = _CURRENT.get()
    if group is None:
        return 0, count
    counts = [int(found) for found in group.gather(torch.tensor([count]))]
    return sum(counts[: group.rank]), sum(counts)


def from_first(*tensors: Tensor) -> list[Tensor]:
    """The first process's tensors, bit for bit; shapes and dtypes are the same in all."""
    group = _CURRENT.get()
    if group is None:
        return list(tensors)
    found = []
    for tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        (raw,) = group.sum([raw if group.rank == 0 else torch.zeros_like(raw)])
        found.append(raw.view(tensor.dtype).reshape(tensor.shape))
    return found


@torch.no_grad()
def make_equal(module: nn.Module) -> None:
    """Give a module the first process's parameters and buffers: other hardware may round otherwise."""
    if _CURRENT.get() is None:
        return
    own = [*module.parameters(), *module.buffers()]
    for tensor, first in zip(own, from_first(*own), strict=True):
        tensor.copy_(first)


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add each process's gradients, in place; every process has the loss of its own tokens."""
    if _CURRENT.get() is None:
        return
    trained = [p for p in parameters if p.requires_grad]
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    for parameter, gradient in zip(trained, total(*own), strict=True):
        parameter.grad = gradient


def draw_alike(generator: torch.Generator) -> None:
    """From here on all processes draw the same, however much each of them drew before."""
    (state,) = from_first(generator.get_state())
    generator.set_state(state)


@contextmanager
def failing_together(group: Group | None, what: str) -> Iterator[None]:
    """An error inside the `with` block, which holds no sum, ends all processes and not only its own.

    Raises:
        RuntimeError: another process failed.
    """
    try:
        yield
    except Exception:
        if group is not None:
            group.sum([torch.ones(1)])
        raise
    if group is not None and group.sum([torch.zeros(1)])[0] > 0:
        raise RuntimeError(f"another process failed while it read {what}: see its own message")


def require_equal(group: Group | None, what: str, value: str) -> None:
    """Raise ValueError in all processes unless they agree on a text."""
    if group is None:
        return
    texts = group.gather(torch.tensor(list(value.encode()), dtype=torch.uint8))
    said = [bytes(text.tolist()).decode() for text in texts]
    for rank, other in enumerate(said):
        if other != said[0]:
            raise ValueError(
                f"{what} differ between the processes: give all the same; process 0 has {said[0]}, "
                f"process {rank} {other}"
            )
