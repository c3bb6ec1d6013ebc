"""Interleaved latencies on a clock of our own, and intervals of samples with a known ratio."""

from __future__ import annotations

import math

import pytest
import torch

from eugen.timing import PairedLatency, compare
from tests.eugen.blocks import generator


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


def test_a_real_pair_has_positive_latencies():
    x = torch.zeros(8, 8)
    found = compare(lambda: x @ x, lambda: x + x, pairs=10)
    assert all(ms > 0 and math.isfinite(ms) for ms in (*found.base_ms, *found.other_ms))
