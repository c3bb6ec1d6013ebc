"""Milliseconds in place of MACs: what each option of each block takes on this machine, and what a plan gains.

All calls are timed in turn in one process, so that what disturbs one round disturbs all of it. The latency of
the whole model is the dense one less the sum of what the blocks save, times a factor that measured plans
correct.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eugen.capture import evaluating
from eugen.config import LayerConfig
from eugen.search.calibration import Call, as_dense_ran
from eugen.sites import FFNSite
from eugen.surgery import replace

if TYPE_CHECKING:
    from eugen.timing.clock import Clock

PLACEMENTS, ROUNDS, LEAST_ROUNDS, SECONDS = 8, 24, 2, 15.0
"""Places in memory; in each every call is timed so often, fewer times after its share of the seconds, but not
fewer than the least. A model and its copy differ by several per cent (`eugen.timing.placements`).
"""


@dataclass(frozen=True)
class Run:
    """A call to be timed: a module on an input."""

    module: nn.Module
    call: Call
    batch: Any

    def __call__(self) -> Any:
        return self.call(self.module, self.batch)


Measure = Callable[[Sequence[Run]], list[float]]
"""Milliseconds of each call, all measured side by side."""


def interleaved(runs: Sequence[Run]) -> list[float]:
    """The geometric mean over placements of each call's median there, without gradients.

    Rounds of all calls, every other one backwards; the order in memory is drawn.
    """
    from eugen.timing.clock import Clock
    from eugen.timing.latency import warm_up
    from eugen.timing.placements import fresh_calls, placed

    clock, generator = Clock(_device(runs[0].module)), torch.Generator()
    generator.seed()  # by chance: the same places in every comparison would be no sample of places
    factories = [placed(run.module, run.batch, run.call) for run in runs]
    spacers: list[Tensor] = []
    medians = []
    with torch.no_grad():
        for _ in range(PLACEMENTS):
            order = torch.randperm(len(runs), generator=generator).tolist()
            made = fresh_calls((factories[i] for i in order), clock, generator, spacers)
            calls = [made[order.index(i)] for i in range(len(runs))]
            del made
            warm_up(*calls, clock=clock)
            medians.append([statistics.median(own) for own in _rounds(calls, clock)])
            del calls  # before the next copies are made
    return [statistics.geometric_mean(own) for own in zip(*medians, strict=True)]


def _rounds(calls: list[Callable[[], Any]], clock: Clock) -> list[list[float]]:
    """Milliseconds of each call in one placement."""
    samples: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for turn in range(ROUNDS):
        if turn >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS / PLACEMENTS:
            break
        for place in range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls))):
            samples[place].append(clock.milliseconds(calls[place]))
    return samples


@dataclass(frozen=True)
class Latencies:
    """Milliseconds of the dense model, of each block by its name, and of each block's options."""

    model: float
    blocks: Mapping[str, float]
    options: Mapping[str, Sequence[float]]

    def allowed(self, speedup: float, factor: float = 1.0) -> float:
        """What all blocks together may take for this speed-up, if `factor` of what they save is saved."""
        saving = self.model * (1 - 1 / speedup) / factor
        return sum(self.blocks.values()) - saving

    def saved(self, taken: float) -> float:
        """What blocks that take so long together save."""
        return sum(self.blocks.values()) - taken

    def speedup(self, taken: float, factor: float = 1.0) -> float:
        """Of the whole model with blocks that take so long together; infinite where all of it were saved."""
        left = self.model - factor * self.saved(taken)
        return self.model / left if left > 0 else float("inf")


def measure_blocks(
    model: nn.Module,
    sites: list[FFNSite],
    configs: Mapping[str, Sequence[LayerConfig | None]],
    example: Any,
    call: Call,
    measure: Measure,
) -> Latencies:
    """Time the dense model, every block and every option on inputs of the real shape.

    Blocks of equal shape on equal inputs are timed once. Layers are untrained: weights do not change the time
    of a product, though they do where a layer chooses its way by them.

    Args:
        configs: each block's options; None is the block itself.
        example: the model's input.
    """
    inputs = block_inputs(model, sites, example, call)
    runs: dict[Any, Run] = {(): Run(model, call, example)}
    keys: dict[str, list[Any]] = {}
    for site in sites:
        x = inputs[site.name]
        shape = _shape(site, x)
        keys[site.name] = [(shape, config) for config in (None, *configs[site.name])]
        for key in keys[site.name]:
            if key not in runs:
                runs[key] = Run(_layer(site, key[1]), _applied, x)
    with evaluating(model):
        took = dict(zip(runs, measure(list(runs.values())), strict=True))
    return Latencies(
        model=took[()],
        blocks={name: took[own[0]] for name, own in keys.items()},
        options={name: [took[key] for key in own[1:]] for name, own in keys.items()},
    )


@dataclass(frozen=True)
class Pace:
    """A plan whose speed-up over the dense model is known, or set: others are timed beside it."""

    configs: Mapping[str, LayerConfig]
    speedup: float = 1.0


DENSE = Pace({})


def measure_plan(
    model: nn.Module,
    configs: Mapping[str, LayerConfig],
    example: Any,
    call: Call,
    measure: Measure,
    pace: Pace = DENSE,
) -> float:
    """The speed-up of the model with untrained layers of this plan, timed beside the pace."""
    if configs == pace.configs:
        return pace.speedup
    known, new = (replace(model, each).model if each else model for each in (pace.configs, configs))
    with evaluating(known), evaluating(new):
        before, after = measure([Run(known, call, example), Run(new, call, example)])
    return pace.speedup * before / after


@torch.no_grad()
def block_inputs(model: nn.Module, sites: list[FFNSite], example: Any, call: Call) -> dict[str, Tensor]:
    """The input of each block as it comes, not flattened.

    Raises:
        ValueError: a block did not run.
    """
    found: dict[str, Tensor] = {}

    def watch(site: FFNSite) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[site.name] = args[0].detach().clone()

        return model.get_submodule(site.name).register_forward_pre_hook(hook)

    with as_dense_ran(model):
        handles = [watch(site) for site in sites]
        try:
            call(model, example)
        finally:
            for handle in handles:
                handle.remove()
    missing = [site.name for site in sites if site.name not in found]
    if missing:
        raise ValueError(f"block {missing[0]} did not run when the model was called with example=")
    return found


def _applied(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def _layer(site: FFNSite, config: LayerConfig | None) -> nn.Module:
    if config is None:
        return copy.deepcopy(site.dense).eval()
    return config.build(site.dense, generator=torch.Generator().manual_seed(0)).eval()


def _shape(site: FFNSite, x: Tensor) -> tuple[Any, ...]:
    """Equal for blocks that take equally long."""
    dense = site.dense
    linears = [
        None if m is None else (*m.weight.shape, m.bias is None) for m in (dense.up, dense.gate, dense.down)
    ]
    return tuple(x.shape), x.dtype, str(x.device), repr(dense.act), *linears


def _device(model: nn.Module) -> str:
    return str(next(iter((*model.parameters(), *model.buffers()))).device)
