"""Interleaved latencies on a clock of our own, intervals of samples with a known ratio, counted memory."""

from __future__ import annotations

import math
import types

import pytest
import torch
from torch import nn

from eugen import timing
from eugen.timing import PairedLatency, compare, peak_bytes
from tests.eugen.blocks import generator


class Clock:
    """Stands still until told: seconds are those that the timed functions say they took."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def function(self, name: str, *seconds: float):
        """A function that takes these times in turn."""

        def run() -> None:
            assert not torch.is_grad_enabled()
            self.now += seconds[self.calls.count(name) % len(seconds)]
            self.calls.append(name)

        return run


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def test_runs_alternate_and_samples_stay_with_their_function(clock):
    found = compare(clock.function("base", 0.002, 0.004), clock.function("other", 0.001), pairs=12, warmup=2)
    assert clock.calls[:4] == ["base", "other"] * 2
    assert clock.calls[4:] == ["base", "other", "other", "base"] * 6
    assert found.base_ms == pytest.approx([2, 4] * 6)
    assert found.other_ms == pytest.approx([1] * 12)


def test_time_ends_it_early_but_not_below_ten_pairs(clock):
    functions = clock.function("base", 1.0), clock.function("other", 0.5)
    assert len(compare(*functions, pairs=100, max_seconds=1, warmup=0).base_ms) == 10
    assert len(compare(*functions, pairs=100, max_seconds=30, warmup=0).base_ms) == 21
    assert len(compare(*functions, pairs=15, warmup=0).other_ms) == 15


def test_too_few_pairs_run_nothing(clock):
    with pytest.raises(ValueError, match="pairs=9 must be at least 10"):
        compare(clock.function("base", 1.0), clock.function("other", 1.0), pairs=9)
    assert clock.calls == []


def samples(seed: int, pairs: int, ratio: float, shared: float, own: float) -> PairedLatency:
    """Latencies with noise that both runs of a pair share, and noise of their own."""
    noise = torch.randn(3, pairs, generator=generator(seed), dtype=torch.float64)
    common = shared * noise[0]
    base, other = (3 * (common + own * noise[i]).exp() for i in (1, 2))
    return PairedLatency((ratio * base).tolist(), other.tolist())


def test_exact_ratio_where_all_noise_is_shared():
    assert samples(0, 30, 1.7, shared=2.0, own=0.0).speedup() == pytest.approx((1.7, 1.7, 1.7))


def test_interval_covers_the_true_ratio():
    """With coverage of at least 90 %, fewer than 78 of 100 would come with probability below 1e-3."""
    found = [samples(seed, 60, 1.5, shared=1.0, own=0.2).speedup() for seed in range(100)]
    assert all(low <= middle <= high for middle, low, high in found)
    assert sum(low <= 1.5 <= high for _, low, high in found) >= 78
    assert any(not low <= 1.2 <= high for _, low, high in found), "the interval says nothing"


def test_less_confidence_narrower_interval_and_swapped_sides_invert():
    latency = samples(1, 61, 1.5, shared=1.0, own=0.2)
    middle, low, high = latency.speedup()
    _, near, far = latency.speedup(confidence=0.5)
    assert low < near <= middle <= far < high
    inverse = PairedLatency(latency.other_ms, latency.base_ms).speedup()
    assert inverse == pytest.approx((1 / middle, 1 / high, 1 / low), rel=1e-6)


WEIGHT_BYTES = (10 * 10 + 10) * 4


def test_peak_is_the_most_that_lives_at_one_time():
    model = nn.Linear(10, 10)

    def function() -> None:
        first = torch.zeros(1000)  # 4000 bytes
        second = first + 1  # 8000 at once
        del first
        third = second * 2  # 8000 again
        del second, third
        torch.zeros(1500)  # 6000

    assert peak_bytes(function, model) == WEIGHT_BYTES + 8000


def test_views_and_writes_in_place_cost_nothing():
    def function() -> None:
        x = torch.zeros(30, 40)  # 4800 bytes
        y = x.view(40, 30)
        del x
        y.add_(1).mul_(2)
        z = y.t()[3:]
        del y
        z.sum()  # 4 bytes more

    assert peak_bytes(function, nn.Linear(10, 10)) == WEIGHT_BYTES + 4800 + 4


def test_weights_count_once_and_activations_beside_them():
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(inplace=True))
    model.append(model[0])
    x = torch.zeros(7, 10)
    output = 7 * 10 * 4
    assert peak_bytes(lambda: model(x), model) == WEIGHT_BYTES + 2 * output


def test_repeated_calls_count_the_same():
    model = nn.Sequential(nn.Linear(10, 50), nn.GELU(), nn.Linear(50, 10))
    x = torch.zeros(7, 10)
    assert len({peak_bytes(lambda: model(x), model) for _ in range(3)}) == 1


def test_a_real_pair_has_positive_latencies():
    x = torch.zeros(8, 8)
    found = compare(lambda: x @ x, lambda: x + x, pairs=10)
    assert all(ms > 0 and math.isfinite(ms) for ms in (*found.base_ms, *found.other_ms))
