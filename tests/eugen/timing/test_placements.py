"""Placements: what they average out, how often the interval holds, and how models move in memory."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from scipy import stats
from torch import nn

from eugen.timing import PairedLatency, PlacedLatency, compare_models, placed, placements
from eugen.timing.intervals import mean_interval, student_quantile
from eugen.timing.latency import sample
from eugen.timing.placements import move
from tests.eugen.blocks import generator

SURE = 1e-3
"""A sound interval fails one of these tests with this probability at most."""


class World:
    """A machine where a model's place in memory, drift, interruptions and its own caches change its time."""

    def __init__(self, fake, seed: int, *, place=0.03, noise=0.01, spikes=0.05, warm=0.0, drift=0.0) -> None:
        self.fake, self.generator = fake, generator(seed)
        self.place, self.noise, self.spikes, self.warm, self.drift = place, noise, spikes, warm, drift
        self.last, self.placed = None, []

    def draw(self) -> float:
        return float(torch.randn((), generator=self.generator, dtype=torch.float64))

    def model(self, name: str, ms: float):
        """A factory: each of its calls lies somewhere else, slower or faster for as long as it lies there."""

        def make():
            self.placed.append(name)
            here = ms * math.exp(self.place * self.draw())

            def run() -> None:
                exponent = self.noise * self.draw() + self.drift * math.sin(20 * self.fake.now)
                if self.spikes and torch.rand((), generator=self.generator) < self.spikes:
                    exponent += 1 + abs(self.draw())
                if self.last == name:
                    exponent -= self.warm
                self.last = name
                self.fake.now += 1e-3 * here * math.exp(exponent)
                self.fake.calls.append(name)

            return run

        return make


def repeated(fake, ratio: float, *, repetitions: int = 100, **world) -> list[PlacedLatency]:
    worlds = [World(fake, seed, **world) for seed in range(repetitions)]
    return [
        compare_models(w.model("base", 3 * ratio), w.model("other", 3), placements=8, pairs=8) for w in worlds
    ]


def covering(intervals: list[tuple[float, float, float]], truth: float) -> int:
    return sum(low <= truth <= high for _, low, high in intervals)


@pytest.mark.parametrize(
    "world",
    [
        {},
        {"place": 0.0},
        {"drift": 0.3},
        {"spikes": 0.2, "noise": 0.05},
        {"warm": 0.06},
        {"place": 0.1, "warm": 0.06, "spikes": 0.1, "drift": 0.3},
    ],
    ids=str,
)
def test_interval_covers_as_often_as_it_says(clock, world):
    found = [timed.speedup() for timed in repeated(clock, 1.0, **world)]
    assert covering(found, 1.0) >= stats.binom.ppf(SURE, len(found), 0.95)
    half = [timed.speedup(confidence=0.5) for timed in repeated(clock, 1.0, repetitions=60, **world)]
    assert covering(half, 1.0) <= stats.binom.ppf(1 - SURE, 60, 0.75), "the interval is needlessly wide"


def test_pairs_of_one_placement_cover_too_seldom(clock):
    """The same machine, the same number of pairs, but the models stay where they are."""
    found = []
    for seed in range(100):
        world = World(clock, seed)
        base, other = world.model("base", 3)(), world.model("other", 3)()
        timed = compare_models(lambda b=base: b, lambda o=other: o, placements=8, pairs=8)
        found.append(PairedLatency(timed.base_ms, timed.other_ms).speedup())
    assert covering(found, 1.0) < stats.binom.ppf(SURE, len(found), 0.95)


def test_two_repetitions_of_a_real_comparison_agree(clock):
    found = [timed.speedup() for timed in repeated(clock, 1.6)]
    assert covering(found, 1.6) >= stats.binom.ppf(SURE, len(found), 0.95)
    agree = sum(a[1] <= b[2] and b[1] <= a[2] for a, b in zip(found[::2], found[1::2], strict=True))
    assert agree >= stats.binom.ppf(SURE, 50, 0.95)
    assert any(not low <= 1.5 <= high for _, low, high in found), "the interval says nothing"


@pytest.mark.parametrize("pairs", [2, 6, 10])
def test_caches_cancel_exactly(clock, pairs):
    """Who follows its own run is faster: that is not the models' difference."""
    world = World(clock, 0, place=0, noise=0, spikes=0, warm=0.1)
    timed = compare_models(world.model("base", 5.1), world.model("other", 3), placements=3, pairs=pairs)
    assert timed.speedup() == pytest.approx((1.7, 1.7, 1.7))
    for placement in timed.placements:
        ratios = sorted(placement.log_ratios().exp().tolist())
        half = pairs // 2
        assert ratios == pytest.approx([1.7 * math.exp(-0.1)] * half + [1.7 * math.exp(0.1)] * half)


def test_beginning_is_no_advantage(clock, monkeypatch):
    """Whatever the reason, here the outer two runs of a quadruple take 10 % less."""

    def model(ms: float):
        def run() -> None:
            outer = len(clock.calls) % 4 in (0, 3)
            clock.now += 1e-3 * ms * (0.9 if outer else 1)
            clock.calls.append("run")

        return lambda: run

    def counted(*calls, **options) -> PairedLatency:
        clock.calls.clear()  # positions count from the first quadruple, not from the warm-up
        return sample(*calls, **options)

    monkeypatch.setattr(placements, "sample", counted)
    timed = compare_models(model(5.1), model(3), placements=4, pairs=6)
    middle, low, high = timed.speedup()
    assert middle == pytest.approx(1.7)
    assert low < 1.7 < high, "the positions scatter, and the interval tells"


def test_growing_slower_run_by_run_cancels():
    """Each run takes 1 % longer than the one before it, in the order base, other, other, base."""
    times = [1.01**i for i in range(24)]
    base = [2 * t for i, t in enumerate(times) if i % 4 in (0, 3)]
    other = [t for i, t in enumerate(times) if i % 4 in (1, 2)]
    assert PlacedLatency([PairedLatency(base, other)] * 3).speedup() == pytest.approx((2, 2, 2))


def test_median_is_of_quadruples_not_of_pairs():
    """Quadruples say 0.1, 0 and 0; the two heaps of pairs would meet at 0.05."""
    logs = [-0.1, 0.3, -0.3, 0.3, -0.2, 0.2]
    placement = PairedLatency([math.exp(value) for value in logs], [1.0] * 6)
    assert PlacedLatency([placement] * 3).speedup() == pytest.approx((1, 1, 1))


def test_each_placement_weighs_the_same_however_many_pairs_it_has():
    few, many = PairedLatency([2.0] * 2, [1.0] * 2), PairedLatency([8.0] * 20, [1.0] * 20)
    assert PlacedLatency([few, many, few]).speedup()[0] == pytest.approx((2 * 8 * 2) ** (1 / 3))
    spoiled = PairedLatency([2.0] * 8 + [900.0, 700.0], [1.0] * 10)
    assert PlacedLatency([few, spoiled, few]).speedup() == pytest.approx((2, 2, 2))
    assert PlacedLatency([few, many, few]).base_ms == few.base_ms + many.base_ms + few.base_ms
    assert PlacedLatency([few, many, few]).other_ms == [1.0] * 24
    assert PlacedLatency([few, many]).scatter() == pytest.approx(math.log(4) / math.sqrt(2))


def test_each_model_is_placed_first_and_begins_as_often(clock):
    world = World(clock, 0, place=0, noise=0, spikes=0)
    timed = compare_models(world.model("base", 1000), world.model("other", 1000), placements=8, pairs=4)
    assert (
        [len(p.base_ms) for p in timed.placements] == [len(p.other_ms) for p in timed.placements] == [4] * 8
    )
    assert all(sorted(world.placed[i : i + 2]) == ["base", "other"] for i in range(0, 16, 2))
    length, cases = len(clock.calls) // 8, []
    for index in range(8):
        first, second, *_ = clock.calls[: (index + 1) * length][-8:]
        expected = [first, *[first, second, second, first] * 2]
        assert clock.calls[: (index + 1) * length][-9:] == expected
        cases.append((world.placed[2 * index], first))
    assert {case: cases.count(case) for case in cases} == {
        (placed_first, begins): 2 for placed_first in ("base", "other") for begins in ("base", "other")
    }


def test_roles_are_drawn_anew(clock):
    orders = set()
    for _ in range(20):
        world = World(clock, 0, place=0, noise=0, spikes=0)
        compare_models(world.model("base", 1000), world.model("other", 1000), placements=8, pairs=2)
        orders.add(tuple(world.placed))
    assert len(orders) > 1


def test_time_ends_a_placement_after_whole_quadruples(clock):
    world = World(clock, 0, place=0, noise=0, spikes=0)
    models = world.model("base", 1000), world.model("other", 1000)

    def pairs(seconds: float) -> list[int]:
        timed = compare_models(*models, placements=3, pairs=20, max_seconds=seconds)
        return [len(p.base_ms) for p in timed.placements]

    assert pairs(0) == [2, 2, 2]
    assert pairs(3 * 9.5) == [6, 6, 6]
    assert pairs(math.inf) == [20, 20, 20]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"placements": 2}, "placements=2"), ({"pairs": 0}, "pairs=0"), ({"pairs": 7}, "pairs=7")],
)
def test_too_little_to_tell_runs_nothing(clock, options, message):
    with pytest.raises(ValueError, match=message):
        compare_models(lambda: clock.function("base", 1), lambda: clock.function("other", 1), **options)
    assert clock.calls == []


def test_student_as_in_scipy():
    for freedom in (1, 2, 3, 4, 7, 8, 9, 30, 101):
        for confidence in (0.1, 0.5, 0.95, 0.999):
            assert student_quantile(confidence, freedom) == pytest.approx(
                stats.t.ppf((1 + confidence) / 2, freedom), rel=1e-9
            )
    values = [0.3, -0.2, 0.7, 0.1]
    low, high = stats.t.interval(0.9, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert mean_interval(values, 0.9) == pytest.approx((sum(values) / 4, low, high))


@pytest.mark.parametrize(("confidence", "freedom"), [(0.0, 3), (1.0, 3), (0.9, 0)])
def test_no_quantile_without_confidence_or_freedom(confidence, freedom):
    with pytest.raises(ValueError, match=r"confidence=|freedom="):
        student_quantile(confidence, freedom)


class Shared(nn.Module):
    """A tied weight, a buffer that is a part of it, a transposed one, and bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.register_buffer("part", self.first.weight.detach()[2:4, 1:])
        self.register_buffer("turned", torch.randn(3, 5, generator=generator(1)).t())
        self.register_buffer("whole", torch.arange(4, dtype=torch.int8))


def test_moving_changes_addresses_and_nothing_else():
    model = Shared()
    parameters = dict(model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    old = {name: t.untyped_storage().data_ptr() for name, t in model.state_dict().items()}
    layout = {name: (t.stride(), t.storage_offset()) for name, t in model.state_dict().items()}
    move(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.untyped_storage().data_ptr() != old[name], name
        assert (tensor.stride(), tensor.storage_offset()) == layout[name]
    assert all(parameters[name] is p and p.requires_grad for name, p in model.named_parameters())
    assert model.second.weight is model.first.weight
    with torch.no_grad():
        model.first.weight.fill_(7)
    assert bool((model.part == 7).all())


def test_placed_runs_a_copy_or_the_model_itself():
    model, x, seen = nn.Linear(4, 4), torch.ones(2, 4), []

    def call(m: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        seen.append((m, inputs.data_ptr()))
        return m(inputs)

    address = model.weight.data_ptr()
    assert torch.equal(placed(model, x, call)()(), model(x))
    assert torch.equal(placed(model, x, call, in_place=True)()(), model(x))
    (copied, first), (same, second) = seen
    assert copied is not model and same is model
    assert x.data_ptr() not in (first, second)
    assert model.weight.data_ptr() != address
