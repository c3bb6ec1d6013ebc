"""The rules: what fails, what passes, and what nobody can tell. Plain numbers in, words out.

A latency fails where its 99 % interval lies above 2 % slower and the point at 5 % or more, twice: a rerun
with fresh processes confirms it. It passes only with enough pairs and a half-width of 2 % at most; else it
is inconclusive. A control that fails the same rule, in either direction, voids the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eugen.timing.intervals import mean_interval

PASS, FAIL, INCONCLUSIVE, VOID = "pass", "fail", "inconclusive", "void"
EXIT_CODES = {PASS: 0, FAIL: 1, INCONCLUSIVE: 3, VOID: 4}
CONFIDENCE = 0.99
SLOWER_LOW, SLOWER_POINT = 1.02, 1.05
HALF_WIDTH = 0.02
WORSE = 0.01
"""Relative loss of quality that fails, where its interval excludes 0."""
NEW = "new: nothing to compare"


@dataclass(frozen=True)
class Finding:
    """A verdict and one sentence why."""

    verdict: str
    reason: str

    def said(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True)
class Ratio:
    """Other / base of times, above 1 slower, with its interval from so many pairs."""

    pairs: int
    ratio: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Of the interval, relative to its middle: 0.02 is two per cent to either side."""
        return math.sqrt(self.high / self.low) - 1

    @property
    def slower(self) -> bool:
        """By more than chance and by more than is let pass."""
        return self.low > SLOWER_LOW and self.ratio >= SLOWER_POINT

    @property
    def alarms(self) -> bool:
        """Of a control: a process beside its like is slower or faster by the same rule."""
        return self.slower or (1 / self.high > SLOWER_LOW and 1 / self.ratio >= SLOWER_POINT)

    def __str__(self) -> str:
        return f"{self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"


def judge_exact(exact: dict[str, list[int]]) -> Finding:
    """Counts `[base, candidate]` by name: any increase fails, a decrease is said."""
    grown = [_change(name, *both) for name, both in exact.items() if both[1] > both[0]]
    fewer = [_change(name, *both) for name, both in exact.items() if both[1] < both[0]]
    if grown:
        return Finding(FAIL, f"more {', '.join(grown)}")
    return Finding(PASS, f"fewer {', '.join(fewer)}" if fewer else "")


def _change(name: str, base: int, candidate: int) -> str:
    share = f" ({100 * (candidate / base - 1):+.2g} %)" if base else ""
    return f"{name}: {base} → {candidate}{share}"


def relative_differences(base: Sequence[float], candidate: Sequence[float]) -> tuple[float, float, float]:
    """Mean of candidate − base over seeds, relative to the base's mean, and its 99 % interval."""
    differences = [theirs - ours for ours, theirs in zip(base, candidate, strict=True)]
    scale = abs(math.fsum(base)) / len(base)
    mean, low, high = mean_interval(differences, CONFIDENCE)
    if scale == 0:  # nothing to be relative to: as it is
        scale = 1.0
    return mean / scale, low / scale, high / scale


def judge_quality(quality: dict[str, Any] | None) -> Finding:
    """The record's `quality`: worse by more than 1 %, by more than chance, fails. None: not compared."""
    if quality is None:
        return Finding(PASS, "")
    sign = 1 if quality["better"] == "lower" else -1
    worse = sign * quality["difference"]
    certain = quality["low"] > 0 if sign > 0 else quality["high"] < 0
    words = f"{quality['name']} {100 * quality['difference']:+.2g} %"
    if worse > WORSE and certain:
        return Finding(FAIL, f"worse: {words} [{100 * quality['low']:+.2g}, {100 * quality['high']:+.2g}]")
    return Finding(PASS, "" if abs(quality["difference"]) < 1e-4 else words)


def judge_latency(found: Ratio, control: Ratio, *, least_pairs: int, again: Ratio | None = None) -> Finding:
    """One measurement, or one that failed and its rerun `again` with fresh processes.

    A rerun that does not fail contradicts the first: then nothing is known, and nothing passes.
    """
    if control.alarms:
        return Finding(VOID, f"control: the base beside itself is {control}")
    if found.pairs < least_pairs:
        return Finding(INCONCLUSIVE, f"{found.pairs} of {least_pairs} pairs when time was up")
    if found.slower and again is not None and not again.slower:
        return Finding(INCONCLUSIVE, f"slower, {found}, but with fresh processes {again}")
    if found.slower:
        confirmed = f", with fresh processes {again}" if again is not None else ""
        return Finding(FAIL, f"slower by {100 * (found.ratio - 1):.1f} %: {found}{confirmed}")
    if found.half_width > HALF_WIDTH:
        width = 100 * found.half_width
        return Finding(INCONCLUSIVE, f"±{width:.1f} % when time was up, ±{100 * HALF_WIDTH:g} % is needed")
    return Finding(PASS, _said_of_pass(found))


def _said_of_pass(found: Ratio) -> str:
    change = f"{100 * abs(found.ratio - 1):.1f} %"
    if found.low > 1:
        return f"slower by {change}, less than what fails"
    return f"faster by {change}" if found.high < 1 else "no slower"


def judge_case(exact: Finding, quality: Finding, latency: Finding) -> Finding:
    """What was counted and computed holds whatever the machine did; then the latency speaks."""
    failed = [found.reason for found in (exact, quality) if found.verdict == FAIL]
    if failed:
        reasons = [*failed, latency.reason] if latency.verdict == FAIL else failed
        return Finding(FAIL, "; ".join(reasons))
    return Finding(latency.verdict, "; ".join(r for r in (latency.reason, exact.reason, quality.reason) if r))


def judge_run(cases: Sequence[dict[str, Any]]) -> Finding:
    """Of the record's cases, each with `noise_free`, what exact and quality metrics say alone.

    A failure that no noise can feign stands even in a void run; one of latency does not.
    """
    certain = [case["name"] for case in cases if case["noise_free"] == FAIL]
    by_verdict = {
        verdict: [case["name"] for case in cases if case["verdict"] == verdict] for verdict in EXIT_CODES
    }
    if certain:
        return Finding(FAIL, f"failed in what is counted or computed: {', '.join(certain)}")
    for verdict, words in (
        (VOID, "the machine treated equal processes differently, nothing here counts"),
        (FAIL, "slower, confirmed with fresh processes"),
        (INCONCLUSIVE, "too noisy to tell"),
    ):
        if by_verdict[verdict]:
            return Finding(verdict, f"{words}: {', '.join(by_verdict[verdict])}")
    compared = [case["name"] for case in cases if case["latency"] is not None]
    if not compared:
        return Finding(INCONCLUSIVE, "the base has none of these cases: nothing was compared")
    new = len(cases) - len(compared)
    return Finding(PASS, f"{len(compared)} cases no worse" + (f", {new} new" if new else ""))
