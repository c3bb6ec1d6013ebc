"""Several processes that train one network: what torchrun tells each of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

PATIENCE = timedelta(days=1)
"""The others wait while the first process evaluates and writes; torch's ten minutes can be too short."""


@dataclass(frozen=True)
class Place:
    """This process among those that train together; alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports and writes."""
        return self.rank == 0

    def share(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """This process's equal part of a batch.

        Raises:
            ValueError: the processes cannot share the batch equally; unequal parts would change the loss.
        """
        size = len(batch[0])
        if size % self.world:
            raise ValueError(f"batch_size={size} cannot be shared by {self.world} processes: use a multiple")
        part = size // self.world
        return tuple(tensor[self.rank * part : (self.rank + 1) * part] for tensor in batch)

    def replica(self, model: nn.Module) -> nn.Module:
        """The module whose gradients are averaged over the processes; the model itself if there is one."""
        return model if self.world == 1 else DistributedDataParallel(model)

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes."""
        if self.world > 1:
            value = value.clone()
            distributed.all_reduce(value)
            value /= self.world
        return value


def here() -> Place:
    """The place of this process, once it belongs to a `group`."""
    if not distributed.is_initialized():
        return Place()
    return Place(distributed.get_rank(), distributed.get_world_size())


def without_sync(replica: nn.Module, wanted: bool) -> AbstractContextManager[None]:
    """Gradients of all but the last micro-batch stay with their process."""
    return replica.no_sync() if wanted and isinstance(replica, DistributedDataParallel) else nullcontext()


@contextmanager
def group(device: str) -> Iterator[Place]:
    """Join the processes that torchrun started, each with its own GPU; alone without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Place()
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if device.startswith("cuda") else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield here()
        distributed.barrier()  # the first process may still write what the others' stage is said to have made
    finally:
        distributed.destroy_process_group()
