"""Networks whose blocks matter unequally, and a clock that counts instead of measuring."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eugen import FFNLayer, find_ffns
from eugen.search.latency import Run
from tests.eugen.models import chain


class Parallel(nn.Module):
    """Σ scale_i · block_i(x): no block's input depends on another, and each block's weight is known."""

    def __init__(self, *blocks: nn.Module, scales: Sequence[float]) -> None:
        super().__init__()
        self.blocks, self.scales = nn.ModuleList(blocks), scales

    def forward(self, x: Tensor) -> Tensor:
        return sum((s * block(x) for s, block in zip(self.scales, self.blocks, strict=True)), torch.zeros(()))


class Pooled(nn.Module):
    """A block on every token, then one on each fourth."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = chain(12, 48), chain(12, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((x + self.first(x))[::4])


class Twice(nn.Module):
    """One block in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.block = chain(12, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(x))


def parallel(*scales: float, d: int = 12, h: int = 48) -> Parallel:
    """Equal blocks but for their weight in the sum."""
    return Parallel(*(chain(d, h) for _ in scales), scales=scales).eval()


class CountingClock:
    """Milliseconds from MACs: a layer alone takes its own; a model a fixed part and `share` of its layers'.

    `share` other than 1 is what the cost model of single layers cannot know.
    """

    def __init__(self, *, fixed: float = 4000.0, share: float = 1.0) -> None:
        self.fixed, self.share = fixed, share
        self.seen: list[list[Run]] = []

    def __call__(self, runs: Sequence[Run]) -> list[float]:
        self.seen.append(list(runs))
        return [self._milliseconds(run.module) for run in runs]

    def _milliseconds(self, module: nn.Module) -> float:
        if isinstance(module, FFNLayer):
            return float(module.macs_per_token)
        layers: list[FFNLayer] = [site.dense for site in find_ffns(module)]
        layers += [m for m in module.modules() if isinstance(m, FFNLayer) and not _inside(m, module)]
        return self.fixed + self.share * sum(layer.macs_per_token for layer in layers)


def _inside(layer: FFNLayer, model: nn.Module) -> bool:
    others = [m for m in model.modules() if isinstance(m, FFNLayer) and m is not layer]
    return any(layer in list(other.modules()) for other in others)
