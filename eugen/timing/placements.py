"""Latency of two models, whatever their places in memory.

A model and its copy differ by several per cent on a CPU, for as long as they stay where they are: their
weights fall on other pages and cache sets. Pairs within one placement cannot average that out, and an
interval over pairs is too narrow (Mytkowicz et al., Producing wrong data without doing anything obviously
wrong, ASPLOS 2009). So both models move several times, and the interval is over placements, the level at
which the measurements are independent (Kalibera and Jones, Rigorous benchmarking in reasonable time,
ISMM 2013).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from eugen.timing.clock import Clock
from eugen.timing.intervals import mean_interval
from eugen.timing.latency import PairedLatency, sample, warm_up

Factory = Callable[[], Callable[[], Any]]
"""Makes a call whose data lie in fresh memory."""

PLACEMENTS, LEAST_PLACEMENTS, LEAST_PAIRS = 12, 3, 2
SPACERS, LARGEST_SPACER, LARGEST_GPU_SPACER = 4, 2**18, 2**23
"""Before each model so many blocks of random size are taken, up to these bytes, and kept to the end. CUDA's
allocator has memory of its own for blocks up to 1 MB: only larger ones move a model's matrices.
"""


@dataclass(frozen=True)
class PlacedLatency:
    """Samples of both models, one `PairedLatency` for each placement."""

    placements: list[PairedLatency]

    @property
    def base_ms(self) -> list[float]:
        """All samples of the base in milliseconds, placement by placement."""
        return [ms for placement in self.placements for ms in placement.base_ms]

    @property
    def other_ms(self) -> list[float]:
        return [ms for placement in self.placements for ms in placement.other_ms]

    def speedup(self, confidence: float = 0.95) -> tuple[float, float, float]:
        """Geometric mean over placements of the median of base / other, and its interval (low, high).

        Medians keep what disturbs single runs out of each placement's value; Student's interval over these
        values holds both the placements' scatter and what is left of the runs'.
        """
        mean, low, high = (math.exp(value) for value in mean_interval(self._medians(), confidence))
        return mean, low, high

    def scatter(self) -> float:
        """Standard deviation of the placements' log ratios: 0.03 is about three per cent."""
        return statistics.stdev(self._medians())

    def _medians(self) -> list[float]:
        """Each placement's log ratio: the median over its quadruples.

        Over pairs it would be the median of two heaps: in every other pair it is the base that follows its
        own run, whose weights the caches still hold, and in the others it is the other.
        """
        ratios = [placement.log_ratios() for placement in self.placements]
        return [float(pairs.view(-1, 2).mean(1).quantile(0.5)) for pairs in ratios]


def compare_models(
    base: Factory,
    other: Factory,
    *,
    placements: int = PLACEMENTS,
    pairs: int = 20,
    max_seconds: float = math.inf,
    clock: Clock | None = None,
) -> PlacedLatency:
    """Time what two factories make, anew in each placement, in quadruples base, other, other, base.

    Which of them is placed first and which of them begins is drawn, each case as often as the others: a model
    beside its own copy has no side of its own. With four cases, a multiple of four placements is best.

    Args:
        base, other: `placed(model, example, call)`, or a function of your own.
        placements: how often both are made; at least 3.
        pairs: in each placement, an even number.
        max_seconds: for the pairs of all placements together; each keeps at least 2 pairs.
        clock: what times a call; the CPU's by default.

    Raises:
        ValueError: too few placements or pairs.
    """
    if placements < LEAST_PLACEMENTS:
        raise ValueError(f"placements={placements} must be at least {LEAST_PLACEMENTS} to tell their scatter")
    if pairs < LEAST_PAIRS or pairs % 2:
        raise ValueError(f"pairs={pairs} must be even and at least {LEAST_PAIRS}: as many of either order")
    clock, share, found = clock or Clock(), max_seconds / placements, []
    generator = torch.Generator()
    generator.seed()  # by chance: the same places in every comparison would be no sample of places
    spacers: list[Tensor] = []
    with torch.no_grad():
        for other_placed_first, other_begins in _roles(placements, generator):
            ours, theirs = _placed_calls(base, other, other_placed_first, clock, generator, spacers)
            warm_up(ours, theirs, clock=clock)
            found.append(_sampled(ours, theirs, other_begins, pairs, share, clock))
            del ours, theirs  # before the next copies are made
    return PlacedLatency(found)


def _roles(placements: int, generator: torch.Generator) -> list[tuple[bool, bool]]:
    """Whether the other is placed first, and whether it begins; drawn, as freed memory too comes in turns."""
    cases = [(False, False), (True, True), (False, True), (True, False)] * math.ceil(placements / 4)
    order = torch.randperm(placements, generator=generator).tolist()
    return [cases[index] for index in order]


def _placed_calls(
    base: Factory,
    other: Factory,
    swapped: bool,
    clock: Clock,
    generator: torch.Generator,
    spacers: list[Tensor],
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Both calls, base first, made in this order or swapped, each behind new blocks of random size."""
    first, second = fresh_calls((other, base) if swapped else (base, other), clock, generator, spacers)
    return (second, first) if swapped else (first, second)


def fresh_calls(
    factories: Iterable[Factory], clock: Clock, generator: torch.Generator, spacers: list[Tensor]
) -> list[Callable[[], Any]]:
    """What the factories make, in this order, each behind new blocks of random size.

    Args:
        spacers: holds the blocks; keep it until the last placement is timed.
    """
    made = []
    for factory in factories:
        spacers += [_spacer(clock.device, generator) for _ in range(SPACERS)]
        made.append(clock.prepare(factory()))
    return made


def _sampled(
    base: Callable[[], Any],
    other: Callable[[], Any],
    other_begins: bool,
    pairs: int,
    max_seconds: float,
    clock: Clock,
) -> PairedLatency:
    """Whole quadruples that begin with one of them; what runs before them is what runs before all others."""
    first, second = (other, base) if other_begins else (base, other)
    first()
    found = sample(
        first, second, pairs=pairs, least=LEAST_PAIRS, whole=2, max_seconds=max_seconds, clock=clock
    )
    return PairedLatency(found.other_ms, found.base_ms) if other_begins else found


def placed(
    model: nn.Module, example: Any, call: Callable[[nn.Module, Any], Any], *, in_place: bool = False
) -> Factory:
    """A factory for `compare_models`: `call(copy of the model, copy of the example)`.

    Args:
        in_place: the model itself, its weights moved to fresh memory; for compiled ones, whose copies
            would be compiled anew.
    """

    def make() -> Callable[[], Any]:
        own = tree_map_only(Tensor, torch.clone, example)
        if not in_place:
            copied = copy.deepcopy(model)
            return lambda: call(copied, own)
        move(model)
        return lambda: call(model, own)

    return make


@torch.no_grad()
def move(model: nn.Module) -> None:
    """Give every parameter and buffer fresh memory, in place; what shared memory shares it still."""
    stored = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    # All copies are made before any old memory is free: it could be handed out again at once.
    fresh = {t.untyped_storage().data_ptr(): t.untyped_storage().clone() for t in stored}
    for tensor in stored:
        storage = fresh[tensor.untyped_storage().data_ptr()]
        empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        tensor.data = empty.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _spacer(device: str, generator: torch.Generator) -> Tensor:
    largest = LARGEST_GPU_SPACER if device.startswith("cuda") else LARGEST_SPACER
    size = int(torch.randint(1, largest, (), generator=generator))
    return torch.empty(size, dtype=torch.uint8, device=device)
