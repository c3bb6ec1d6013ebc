"""The rules of the regression verdict on times that are drawn, and the validation that counts verdicts."""

from __future__ import annotations

import json
import math
import random

import pytest

from benchmarks.regression import record, validate, verdict
from benchmarks.regression.sampling import Limits, Samples, said
from benchmarks.regression.verdict import Finding, Ratio, judge_latency, judge_run
from eugen.timing import PairedLatency
from stages.tracking.environment import environment

EVEN = Ratio(300, 1.0, 0.99, 1.01)


def samples(change: float, *, places: int = 13, scatter: float = 0.01, noise: float = 0.05, seed: int = 0):
    """Times whose true ratio is `change`; each place is off by its own luck, each pair by its own."""
    draw = random.Random(seed)
    found = Samples()
    for _ in range(places):
        luck = draw.gauss(0, scatter)
        base = [math.exp(draw.gauss(0, 0.3)) for _ in range(24)]
        other = [ms * change * math.exp(luck + draw.gauss(0, noise)) for ms in base]
        found.places.append(PairedLatency(base, other))
    return found


@pytest.mark.parametrize(
    ("change", "options", "again", "control", "expected", "words"),
    [
        (1.0, {}, None, 1.0, "pass", ""),
        (0.9, {}, None, 1.0, "pass", "faster by"),
        (1.10, {}, None, 1.0, "fail", "slower by"),
        (1.10, {}, 1.10, 1.0, "fail", "with fresh processes"),
        (1.10, {}, 1.0, 1.0, "inconclusive", "but with fresh processes"),
        (1.04, {"scatter": 0.005}, None, 1.0, "pass", "less than what fails"),
        (1.10, {"scatter": 0.15}, None, 1.0, "inconclusive", "when time was up"),
        (1.0, {"scatter": 0.1}, None, 1.0, "inconclusive", "when time was up"),
        (1.0, {"places": 12}, None, 1.0, "inconclusive", "288 of 300 pairs"),
        (1.5, {"places": 12}, None, 1.0, "inconclusive", "288 of 300 pairs"),
        (1.5, {"scatter": 0.1}, None, 1.0, "fail", "slower by"),
        (1.0, {}, None, 1.10, "void", "control"),
        (1.0, {}, None, 0.90, "void", "control"),
        (1.10, {}, None, 1.10, "void", "control"),
        (1.0, {}, None, 1.03, "pass", ""),
    ],
)
def test_a_latency_is_judged_by_interval_point_and_control(change, options, again, control, expected, words):
    rerun = None if again is None else samples(again, seed=1).ratio
    found = judge_latency(
        samples(change, **options).ratio, samples(control, seed=2).ratio, least_pairs=300, again=rerun
    )
    assert found.verdict == expected
    assert words in found.reason


@pytest.mark.parametrize(
    ("ratio", "low", "slower"),
    [(1.05, 1.03, True), (1.049, 1.03, False), (1.08, 1.02, False), (1.08, 1.021, True)],
)
def test_slower_takes_both_a_low_end_above_two_and_a_point_of_five_per_cent(ratio, low, slower):
    found = Ratio(300, ratio, low, ratio**2 / low)
    assert found.slower is slower
    mirrored = Ratio(300, 1 / ratio, low / ratio**2, 1 / low)
    assert found.alarms is mirrored.alarms is slower
    assert not mirrored.slower


def test_the_interval_holds_over_places():
    """99 % of intervals cover the true ratio; those over pairs, as if all were independent, would not."""
    covers = [samples(1.03, scatter=0.02, noise=0.02, seed=seed).ratio for seed in range(100)]
    assert sum(r.low <= 1.03 <= r.high for r in covers) >= 96  # binomial: fewer once in 300 tries
    half = sum(r.half_width for r in covers) / len(covers)
    # Student's quantile for 13 places, 3.05, times the scatter of their mean.
    assert half == pytest.approx(3.05 * math.hypot(0.02, 1.25 * 0.02 / 24**0.5) / 13**0.5, rel=0.1)


def test_the_record_speaks_of_candidate_over_base():
    told = samples(2.0, noise=0.0, scatter=0.0).said()
    assert told["ratio"] == pytest.approx(2) and told["pairs"] == len(told["log_ratios"]) == 13 * 24
    assert set(told["log_ratios"]) == {round(math.log(2), 6)}
    assert told["candidate_ms"] == pytest.approx(2 * told["base_ms"], rel=1e-4)


@pytest.mark.parametrize(("pairs", "per_place"), [(300, 24), (1000, 24), (100, 12), (6, 2), (50, 6)])
def test_few_pairs_still_see_several_places(pairs, per_place):
    assert Limits(pairs=pairs).pairs_per_place == per_place


@pytest.mark.parametrize(
    ("candidate", "expected", "words"),
    [(10, "pass", ""), (11, "fail", "more macs: 10 → 11 (+10 %)"), (9, "pass", "fewer macs: 10 → 9 (-10 %)")],
)
def test_counts_are_compared_exactly(candidate, expected, words):
    assert verdict.judge_exact({"macs": [10, candidate], "bytes": [4, 4]}) == Finding(expected, words)


@pytest.mark.parametrize(
    ("better", "differences", "expected"),
    [
        ("lower", [0.0] * 6, "pass"),
        ("lower", [0.02, 0.021, 0.019, 0.02, 0.022, 0.018], "fail"),
        ("higher", [0.02, 0.021, 0.019, 0.02, 0.022, 0.018], "pass"),
        ("higher", [-0.02, -0.021, -0.019, -0.02, -0.022, -0.018], "fail"),
        ("lower", [0.005, 0.0051, 0.0049, 0.005, 0.005, 0.005], "pass"),  # certain, but half a per cent
        ("lower", [0.2, -0.1, 0.05, -0.05, 0.1, -0.08], "pass"),  # two per cent, but by chance
    ],
)
def test_quality_is_paired_over_seeds(better, differences, expected):
    base = [0.3, 0.5, 0.4, 0.6, 0.2, 0.4]  # seeds differ by more than any change: only pairs can tell
    mean = sum(base) / len(base)
    candidate = [b + mean * d for b, d in zip(base, differences, strict=True)]
    difference, low, high = verdict.relative_differences(base, candidate)
    assert difference == pytest.approx(sum(differences) / len(differences), abs=1e-12)
    assert low <= difference <= high
    quality = {"name": "q", "better": better, "difference": difference, "low": low, "high": high}
    assert verdict.judge_quality(quality).verdict == expected


def case(name: str, said: str = "pass", *, noise_free: str = "pass", latency: bool = True) -> dict:
    measured = said_of(EVEN) if latency else None
    counted = {"exact": None, "quality": None, "noise_free": noise_free}
    return {
        "name": name,
        "verdict": said,
        "reason": "why",
        "latency": measured,
        "control": measured,
        **counted,
    }


def said_of(ratio: Ratio) -> dict:
    return {**said(ratio), "base_ms": 1.0, "candidate_ms": 1.0, "confirmed": None}


@pytest.mark.parametrize(
    ("cases", "expected", "words"),
    [
        ([case("a"), case("b")], "pass", "2 cases no worse"),
        ([case("a"), case("b", latency=False)], "pass", "1 new"),
        ([case("a", latency=False)], "inconclusive", "nothing was compared"),
        ([case("a"), case("b", "inconclusive")], "inconclusive", "b"),
        ([case("a", "fail"), case("b", "inconclusive")], "fail", "a"),
        ([case("a", "fail"), case("b", "void")], "void", "b"),
        ([case("a", "fail", noise_free="fail"), case("b", "void")], "fail", "counted or computed: a"),
    ],
)
def test_a_void_control_spoils_times_but_not_counts(cases, expected, words):
    found = judge_run(cases)
    assert found.verdict == expected and words in found.reason


def test_what_is_counted_fails_whatever_the_latency_says():
    grown, void = Finding("fail", "more bytes"), Finding("void", "control")
    assert verdict.judge_case(grown, Finding("pass", ""), void) == grown
    slow = verdict.judge_case(grown, Finding("pass", ""), Finding("fail", "slower"))
    assert slow == Finding("fail", "more bytes; slower")
    fine = verdict.judge_case(
        Finding("pass", "fewer macs"), Finding("pass", ""), Finding("pass", "no slower")
    )
    assert fine == Finding("pass", "no slower; fewer macs")


def test_the_fingerprint_is_that_of_the_suites_records():
    found, theirs = record.host(), environment()
    assert found["fingerprint"] == theirs.fingerprint
    assert (found["cores"], found["memory_gb"]) == (theirs.cores, theirs.memory_gb)


@pytest.fixture
def validation(tmp_path, monkeypatch):
    """`validate.main` in a toy clone, with verdicts that are given instead of measured."""
    from tests.benchmarks.test_regression import new_clone

    new_clone(tmp_path, {"file": "1"})
    monkeypatch.setattr(validate, "ROOT", tmp_path)
    monkeypatch.setattr(validate, "environment", lambda: environment_of("c"))
    asked = []

    def run(given: list[str | BaseException], *arguments: str) -> int:
        verdicts = iter(given)

        def compare(trees, names, limits, say):
            assert trees.base == trees.candidate
            asked.append(limits.inject)
            found = next(verdicts)
            if isinstance(found, BaseException):
                raise found
            return [case(name, found) for name in names]

        monkeypatch.setattr(validate, "compare", compare)
        return validate.main(["--runs", "2", "--out", str(tmp_path / "out.json"), *arguments])

    return run, asked, tmp_path / "out.json"


def environment_of(commit: str) -> dict:
    return {
        "commit": commit,
        "dirty": False,
        "processor": "p",
        "cores": 2,
        "load": 0,
        "versions": {"torch": "2"},
    }


def test_a_stopped_validation_goes_on(validation):
    run, asked, out = validation
    assert run(["pass", "fail", KeyboardInterrupt()]) == 130
    assert not out.exists()
    assert run(["void", "fail"]) == 0
    assert asked == [0.0, 0.1, 0.0, 0.0, 0.1]
    found = json.loads(out.read_text())["verdict"]
    assert (found["found"], found["false_alarms"], found["met"]) == (2, 0, True)
    assert found["counts"]["equal"] == {"pass": 1, "fail": 0, "inconclusive": 0, "void": 1}
    assert "| equal" in out.with_suffix(".md").read_text()


def test_other_settings_begin_anew(validation):
    run, asked, _ = validation
    assert run(["pass", KeyboardInterrupt()]) == 130
    assert run(["pass", "fail", "pass", "fail"], "--inject", "0.2") == 0
    assert asked[2:] == [0.0, 0.2, 0.0, 0.2]


@pytest.mark.parametrize(("equal", "slowed", "met"), [(1, 15, True), (2, 16, False), (0, 14, False)])
def test_fifteen_found_and_one_alarm_of_sixteen_are_good_enough(equal, slowed, met):
    results = [{"kind": "equal", "verdict": "fail" if i < equal else "pass"} for i in range(16)]
    results += [{"kind": "slowed", "verdict": "fail" if i < slowed else "inconclusive"} for i in range(16)]
    assert validate.judge(results)["met"] is met
