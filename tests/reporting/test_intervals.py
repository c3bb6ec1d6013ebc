"""Intervals and the paired test against scipy's own, and against simulation."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ttest_1samp, ttest_rel

from stages.reporting.intervals import compare, final_scores, mean_interval

from . import factory

_values = st.lists(st.integers(-1000, 1000), min_size=2, max_size=12).filter(lambda v: len(set(v)) > 1)


@given(_values)
def test_interval_is_scipys(values: list[int]):
    interval = mean_interval([float(v) for v in values])
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=2, max_size=10), st.booleans()
)
def test_verdict_is_the_paired_test(pairs: list[tuple[int, int]], higher_is_better: bool):
    first, second = zip(*pairs, strict=True)
    comparison = compare(dict(enumerate(first)), dict(enumerate(second)), higher_is_better)
    assert comparison is not None
    differences = {a - b for a, b in pairs}
    significant = len(differences) > 1 and ttest_rel(first, second).pvalue < 0.05
    positive = sum(first) > sum(second)
    expected = (
        ("better" if positive == higher_is_better else "worse") if significant else "no difference shown"
    )
    assert comparison.verdict == expected


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(0)
    draws = ([rng.gauss(5, 2) for _ in range(3)] for _ in range(4000))
    covered = sum(abs(i.mean - 5) <= (i.half or 0) for i in map(mean_interval, draws) if i) / 4000
    assert covered == pytest.approx(0.95, abs=3 * (0.95 * 0.05 / 4000) ** 0.5)


def test_one_seed_shows_nothing():
    comparison = compare({0: 0.9}, {0: 0.1}, True)
    assert comparison is not None
    assert (comparison.verdict, comparison.difference.half) == ("no difference shown", None)


def test_seeds_that_change_nothing_show_nothing():
    comparison = compare({0: 0.75, 1: 0.75, 2: 0.75}, {0: 0.5, 1: 0.5, 2: 0.5}, True)
    assert comparison is not None
    assert comparison.verdict == "no difference shown"


def test_only_common_seeds_are_compared():
    assert compare({0: 1.0}, {1: 1.0}, True) is None
    comparison = compare({0: 1.0, 1: 2.0, 9: 50.0}, {0: 0.9, 1: 1.7, 8: -50.0}, True)
    assert comparison is not None
    assert comparison.difference.n == 2
    assert comparison.difference.mean == pytest.approx(0.2)


def test_no_value_has_no_interval():
    assert mean_interval([]) is None


def test_final_quality_is_the_fine_tuned_seeds_alone():
    record = factory.cell("embedding", "prune")
    seeds = [s if s.seed == 0 else s.model_copy(update={"quality_finetuned": None}) for s in record.seeds]
    record = record.model_copy(update={"seeds": seeds})
    assert final_scores(record, 0.3) == {0: seeds[0].quality_finetuned}
