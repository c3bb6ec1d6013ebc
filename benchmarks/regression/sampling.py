"""Interleaved times of two workers, over several places in memory, until the interval is narrow enough."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.regression.processes import Workers
from benchmarks.regression.verdict import CONFIDENCE, HALF_WIDTH, Ratio
from benchmarks.regression.worker import SAMPLE_MS
from eugen.timing import PairedLatency, PlacedLatency

PAIRS_PER_PLACE, LEAST_PLACES = 24, 8
ENOUGH_FOR_SPREAD = 3


@dataclass(frozen=True)
class Limits:
    """How long to measure a case.

    Attributes:
        pairs: at least so many before anything is judged.
        seconds: about when to give up, the first rerun not counted.
        inject: share by which the candidate's calls are lengthened.
        threads: of each worker.
    """

    pairs: int = 300
    seconds: float = 25.0
    inject: float = 0.0
    threads: int = 1

    @property
    def pairs_per_place(self) -> int:
        """An even number: as many pairs of either order; fewer pairs in all still see several places."""
        return max(2, min(PAIRS_PER_PLACE, self.pairs // LEAST_PLACES // 2 * 2))


@dataclass
class Samples:
    """Milliseconds of one call of the base and of another worker, place by place."""

    places: list[PairedLatency] = field(default_factory=list)

    @property
    def ratio(self) -> Ratio:
        """Other / base: geometric mean over places of the median, Student's interval over places.

        Pairs of one place share that place's luck, so an interval over pairs would be too narrow. What a
        whole process is off by it does not see; the rerun with fresh processes and the control are for that.
        """
        ratio, low, high = PlacedLatency([_swapped(place) for place in self.places]).speedup(CONFIDENCE)
        return Ratio(sum(len(place.base_ms) for place in self.places), ratio, low, high)

    def said(self, candidate_name: str = "candidate") -> dict[str, Any]:
        """As in the record, log ratios pair by pair, the places one after the other."""
        ratios = [value for place in self.places for value in _swapped(place).log_ratios().tolist()]
        times = {"base_ms": [ms for place in self.places for ms in place.base_ms]}
        times[f"{candidate_name}_ms"] = [ms for place in self.places for ms in place.other_ms]
        medians = {name: round(statistics.median(values), 6) for name, values in times.items()}
        return {**said(self.ratio), **medians, "log_ratios": [round(value, 6) for value in ratios]}


def said(ratio: Ratio) -> dict[str, Any]:
    """A ratio as in the record."""
    return {
        "pairs": ratio.pairs,
        "ratio": round(ratio.ratio, 6),
        "low": round(ratio.low, 6),
        "high": round(ratio.high, 6),
    }


def _swapped(place: PairedLatency) -> PairedLatency:
    """Its log ratios are those of other / base."""
    return PairedLatency(place.other_ms, place.base_ms)


def sample(workers: Workers, limits: Limits) -> tuple[Samples, Samples]:
    """Base and candidate, base and control, of the case that all three have prepared.

    Ends once there are enough pairs and the candidate's interval is narrow enough, or time is up.
    """
    main, control = Samples(), Samples()
    started = time.perf_counter()
    while True:
        place = len(main.places)
        calls = _place(workers, _cores(place, limits.threads))
        ours, theirs = _rounds(workers, limits, calls)
        main.places.append(ours)
        control.places.append(theirs)
        if len(main.places) < ENOUGH_FOR_SPREAD:
            continue
        found = main.ratio
        if found.pairs >= limits.pairs and found.half_width <= HALF_WIDTH:
            break
        if time.perf_counter() - started > limits.seconds:
            break
    return main, control


def _place(workers: Workers, cores: list[int]) -> int:
    """New places, in an order by chance, on the same cores; how many calls make a sample."""
    order = random.sample(workers.all(), 3)
    slowest = max(worker.ask("place", cores=cores)["ms"] for worker in order)
    return max(1, math.ceil(SAMPLE_MS / slowest))


def _cores(place: int, threads: int) -> list[int]:
    """The cores of a place: the same for all workers, or the busier core's would look slower; in turn."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return [cores[(place * threads + i) % len(cores)] for i in range(min(threads, len(cores)))]


def _rounds(workers: Workers, limits: Limits, calls: int) -> tuple[PairedLatency, PairedLatency]:
    """One place's samples: all three in an order by chance, then back, so that drift meets all alike.

    Each runs as often as the others and follows each as often: a base that also ran beside the control in
    pairs of its own would have the warmer caches, two per cent of an advantage.
    """
    times: dict[str, list[float]] = {worker.name: [] for worker in workers.all()}
    for _ in range(limits.pairs_per_place // 2):
        order = random.sample(workers.all(), 3)
        for worker in (*order, *reversed(order)):
            lengthen = limits.inject if worker is workers.candidate else 0.0
            times[worker.name].append(worker.ask("sample", calls=calls, lengthen=lengthen)["ms"])
    base, candidate, control = (times[worker.name] for worker in workers.all())
    return PairedLatency(base, candidate), PairedLatency(base, control)
