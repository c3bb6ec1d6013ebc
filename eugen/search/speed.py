"""The choice for a speed-up: what blocks take alone, corrected by each method everywhere, and by plans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf
from statistics import median
from typing import Any

from torch import nn

from eugen.layers.dense import DenseConfig
from eugen.search.calibration import Call
from eugen.search.choice import cheapest, choose_options
from eugen.search.latency import Latencies, Measure, Pace, measure_blocks, measure_plan
from eugen.search.propagation import rising
from eugen.search.sensitivity import Option
from eugen.search.target import Target, Unreachable
from eugen.sites import FFNSite

MIDDLE = 0.3
"""The size, a fraction of the block's MACs, at which a method is timed in the whole network."""
CORRECTIONS = 4
"""Times that the cost model is corrected by a measured plan and solved again."""
TOLERANCE = 0.01
"""A plan so much slower than asked for still counts: two timings of one model differ by half a per cent as a
rule, and a narrower limit would choose after the clock's errors. A faster one is corrected, too.
"""
FAR = 1.03
"""A plan so much faster than asked for is a bad one, where a slower one was too slow."""
REPEATS = 3
"""Timings of a plan that is as fast as asked by what it is made of: noise alone may be against it."""
LEAST_SIZES, NOISE = 4, 0.06
"""With so many sizes a method's times are compared with a line; so near to it they are taken to lie on it."""


@dataclass(frozen=True)
class Reached:
    """A plan that is fast enough when it is measured.

    Attributes:
        chosen: each block's option.
        predicted: its speed-up by the cost model; None without one.
        figures: `measured`, its speed-up and every plan tried; `latency_ms` of the dense model and blocks.
    """

    chosen: list[int]
    predicted: float | None
    figures: dict[str, Any]


@dataclass(frozen=True)
class _Tried:
    """A plan that was built and timed."""

    chosen: list[int]
    effect: float
    predicted: float
    measured: float
    factor: float
    taken: float
    """Milliseconds of its blocks by the cost model."""

    def described(self) -> str:
        return f"measured at {self.measured:.3f}x, expected change of the output {self.effect:.4f}"


def for_speedup(
    target: Target,
    model: nn.Module,
    sites: list[FFNSite],
    options: dict[str, list[Option]],
    example: Any,
    call: Call,
    measure: Measure,
    pace: Pace,
    progress: Callable[[str], None] | None,
) -> Reached:
    """The plan of least effect that is measured to be fast enough, beside the pace.

    Raises:
        Unreachable: even the fastest plan is slower when it is measured.
    """
    asked = target.value
    enough = (1 - TOLERANCE) * asked
    configs = {s.name: [_config(o) for o in options[s.name]] for s in sites}
    times = measure_blocks(model, sites, configs, example, call, measure)
    search = _Search(
        sites, options, times, lambda plan: measure_plan(model, plan, example, call, measure, pace)
    )
    search.times_in_the_network(asked, progress)
    tried = search.corrected(asked, progress)
    if not any(enough <= each.measured <= FAR * asked for each in tried):
        # A method's share is that of one size; where the network is far from a sum, it leads astray.
        search.costs = search.alone
        tried += search.corrected(asked, progress)
    tried += search.known(pace, progress)
    if all(each.measured < enough for each in tried):
        fastest = search.fastest()
        if all(each.chosen != fastest for each in tried):
            tried.append(search.try_plan(fastest, tried[-1].factor))
        if tried[-1].measured < enough:
            best = max(each.measured for each in tried)
            raise Unreachable(target, best, "measured; the rest of the model takes the remaining time")
    best = min((t for t in tried if t.measured >= enough), key=lambda t: (t.effect, -t.measured))
    return Reached(best.chosen, best.predicted, _figures(best, tried, search))


class _Search:
    """Plans for a speed-up, solved and timed."""

    def __init__(
        self,
        sites: list[FFNSite],
        options: dict[str, list[Option]],
        times: Latencies,
        measure: Callable[[dict], float],
    ) -> None:
        self.sites, self.options, self.times, self.measure = sites, options, times, measure
        self.costs = [_without_noise(options[site.name], times.options[site.name]) for site in sites]
        self.alone = [list(own) for own in self.costs]
        self.errors = [[o.output_effect for o in options[site.name]] for site in sites]
        self.shares: dict[str, float] = {}
        """Of what a method's blocks save alone, what the network saves with it everywhere."""

    def times_in_the_network(self, asked: float, progress: Callable[[str], None] | None) -> None:
        """Costs as the network has them: each method of the best plan stands everywhere once, and is timed.

        What a layer saves alone is not what it saves between others, by several per cent and unequally for
        methods of more or fewer products.
        """
        while True:
            plan = self.solve(self.times.allowed(asked)) or self.fastest()
            chosen = [self.options[site.name][i] for site, i in zip(self.sites, plan, strict=True)]
            new = {option.sized.candidate for option in chosen if _config(option)} - self.shares.keys()
            if not new:
                return
            for method in sorted(new):
                self.shares[method] = share = self._share_saved(method)
                if progress is not None:
                    progress(f"{method} everywhere saves {share:.3f} of what its blocks save alone")
                for site, own in zip(self.sites, self.costs, strict=True):
                    whole = self.times.blocks[site.name]
                    for i, option in enumerate(self.options[site.name]):
                        if option.sized.candidate == method:
                            own[i] = whole - share * (whole - own[i])

    def _share_saved(self, method: str) -> float:
        """Of what a method's blocks of about a middle size save alone, what the network saves; else 1."""
        plan, promised = {}, 0.0
        for site, costs in zip(self.sites, self.costs, strict=True):
            own = [i for i, o in enumerate(self.options[site.name]) if o.sized.candidate == method]
            if own:
                at = min(own, key=lambda i: abs(self.options[site.name][i].sized.budget - MIDDLE))
                plan[site.name] = self.options[site.name][at].sized.config
                promised += self.times.blocks[site.name] - costs[at]
        saved = self.times.model * (1 - 1 / self.measure(plan))
        return saved / promised if promised > 0 and saved > 0 else 1.0

    def known(self, pace: Pace, progress: Callable[[str], None] | None) -> list[_Tried]:
        """The pace itself, where its layers are options, and the same methods in sizes that fit the blocks.

        Nobody has to measure the pace's speed-up, and sizes moved between blocks of one method hardly change
        the time: both are within reach where other methods' times are lost in the clock's errors.
        """
        chosen = []
        for site in self.sites:
            configs = [option.sized.config for option in self.options[site.name]]
            if pace.configs.get(site.name) not in configs:
                return []
            chosen.append(configs.index(pace.configs[site.name]))
        tried, moved = [self.try_plan(chosen, 1.0)], self._moved(chosen)
        if moved != chosen:
            tried.append(self.try_plan(moved, 1.0, repeats=REPEATS))
        if progress is not None:
            for name, each in zip(("as given", "as given, sizes moved"), tried, strict=False):
                progress(f"{name}: {each.described()}")
        return tried

    def _moved(self, chosen: list[int]) -> list[int]:
        """Each block's method of a plan, in the sizes of least error that take no longer in sum."""
        costs = []
        for site, own, at in zip(self.sites, self.alone, chosen, strict=True):
            names = [option.sized.candidate for option in self.options[site.name]]
            costs.append([c if n == names[at] else inf for c, n in zip(own, names, strict=True)])
        limit = sum(own[at] for own, at in zip(costs, chosen, strict=True))
        return choose_options(costs, self.errors, limit) or chosen

    def corrected(self, asked: float, progress: Callable[[str], None] | None) -> list[_Tried]:
        """Plans, each solved for what those before it were measured to save, until one is close."""
        tried: list[_Tried] = []
        for _ in range(1 + CORRECTIONS):
            factor = tried[-1].factor if tried else 1.0
            plan = self._following(tried, asked, factor)
            if plan is None:
                break
            tried.append(self.try_plan(plan, factor))
            last = tried[-1]
            if progress is not None:
                progress(f"a plan for {last.predicted:.3f}x: {last.described()}")
            if abs(last.measured / asked - 1) <= TOLERANCE or last.factor <= 0:
                break
        return tried

    def _following(self, tried: list[_Tried], asked: float, factor: float) -> list[int] | None:
        """A plan that was not tried, between the nearest ones on both sides of the target; None without."""
        limits = [self.times.allowed(asked, factor)]
        fast = max((t for t in tried if t.measured >= asked), key=lambda t: t.taken, default=None)
        slow = min((t for t in tried if t.measured < asked), key=lambda t: t.taken, default=None)
        if fast is not None and slow is not None:
            place = (1 / asked - 1 / fast.measured) / (1 / slow.measured - 1 / fast.measured)
            limits = [fast.taken + share * (slow.taken - fast.taken) for share in (place, 0.5)]
        plans = (self.solve(limit) or self.fastest() for limit in limits)
        return next((plan for plan in plans if all(plan != each.chosen for each in tried)), None)

    def solve(self, limit: float) -> list[int] | None:
        """The best plan whose blocks take so many milliseconds at most by the cost model."""
        return choose_options(self.costs, self.errors, limit)

    def fastest(self) -> list[int]:
        return [cheapest(c, e) for c, e in zip(self.alone, self.errors, strict=True)]

    def try_plan(self, chosen: list[int], factor: float, repeats: int = 1) -> _Tried:
        """Time a plan, by the median, and what share of the saving that the blocks promise the model has."""
        own = [self.options[site.name][i] for site, i in zip(self.sites, chosen, strict=True)]
        configs = {s.name: o.sized.config for s, o in zip(self.sites, own, strict=True)}
        plan = {name: c for name, c in configs.items() if not isinstance(c, DenseConfig)}
        taken = sum(row[i] for row, i in zip(self.costs, chosen, strict=True))
        measured, promised = median(self.measure(plan) for _ in range(repeats)), self.times.saved(taken)
        saved = self.times.model * (1 - 1 / measured)
        return _Tried(
            chosen=chosen,
            effect=sum(o.output_effect for o in own),
            predicted=self.times.speedup(taken, factor),
            measured=measured,
            factor=saved / promised if promised > 0 else 0.0,
            taken=taken,
        )


def _without_noise(options: Sequence[Option], times: Sequence[float]) -> list[float]:
    """Times of a method's sizes on a straight line over their MACs, where they lie near it; they never fall.

    The line is the median of those through two sizes (Theil and Sen). A size that is really slower, by the
    tiles of a product, stands out of the noise and stays.
    """
    found = list(times)
    for name in {option.sized.candidate for option in options}:
        own = [i for i, option in enumerate(options) if option.sized.candidate == name]
        own.sort(key=lambda i: options[i].sized.macs)
        values = _near_line([float(options[i].sized.macs) for i in own], [times[i] for i in own])
        for i, value in zip(own, rising(values), strict=True):
            found[i] = value
    return found


def _near_line(macs: list[float], times: list[float]) -> list[float]:
    if len(macs) < LEAST_SIZES:
        return times
    points = list(zip(macs, times, strict=True))
    slope = median((b - a) / (y - x) for (x, a), (y, b) in combinations(points, 2) if y > x)
    start = median(time - slope * size for size, time in points)
    line = [start + slope * size for size in macs]
    return [on if abs(time - on) <= NOISE * on else time for time, on in zip(times, line, strict=True)]


def _config(option: Option) -> Any:
    """None for the block itself, which is timed as it is."""
    config = option.sized.config
    return None if isinstance(config, DenseConfig) else config


def _figures(best: _Tried, tried: list[_Tried], search: _Search) -> dict[str, Any]:
    times = search.times
    plans = [{"predicted": t.predicted, "measured": t.measured, "output_error": t.effect} for t in tried]
    return {
        "measured": {"speedup": best.measured, "tried": plans, "shares_saved": search.shares},
        "latency_ms": {"model": times.model, "blocks": dict(times.blocks)},
    }
