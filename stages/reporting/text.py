"""Numbers as text: one way each, for the page, the README and the ledger."""

from __future__ import annotations

from math import floor, isnan, log10

from stages.reporting.intervals import Comparison, Interval

NONE = "–"
TINY = 1e-6
"""Below it numbers are written with an exponent: they are rounding, or as good as 0."""


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits, without exponent down to a millionth; a dash for none."""
    if value is None or isnan(value):
        return NONE
    if value == 0:
        return "0"
    if abs(value) < TINY:
        return f"{value:.0e}"
    decimals = max(0, digits - 1 - floor(log10(abs(value))))
    return f"{value:,.{min(decimals, 8)}f}"


def quality(interval: Interval | None) -> str:
    """Mean ± half-width, or the mean alone where there is no interval."""
    if interval is None:
        return NONE
    if 0 < abs(interval.mean) < TINY:
        return number(interval.mean)
    decimals = _decimals(interval.mean)
    mean = f"{interval.mean:.{decimals}f}"
    return mean if interval.half is None else f"{mean} ± {interval.half:.{decimals}f}"


def difference(interval: Interval) -> str:
    """Signed mean with the interval's ends in brackets."""
    ends = interval.mean, interval.low, interval.high
    decimals = _decimals(max(map(abs, ends)))  # one number of digits, set by what is largest
    mean, low, high = (signed(value, decimals) for value in ends)
    return mean if interval.half is None else f"{mean} [{low}, {high}]"


def signed(value: float, decimals: int) -> str:
    """A number with its sign, the minus as long as the plus."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def verdict(comparison: Comparison | None) -> str:
    """`better`, `worse` or `no difference shown`, with the number of seeds behind it."""
    if comparison is None:
        return "no common seed"
    return f"{comparison.verdict} (n={comparison.difference.n})"


def ratio(value: float | None) -> str:
    """A cost ratio as a percentage."""
    return NONE if value is None else f"{100 * value:.1f} %"


def speedup(value: float, low: float, high: float) -> str:
    """Times faster, with its interval."""
    return f"{value:.2f}× [{low:.2f}, {high:.2f}]"


def listing(items: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + f" and {items[-1]}" if items else NONE


def plural(count: int, noun: str) -> str:
    """`1 row`, `2 rows`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _decimals(value: float) -> int:
    """Four decimals for rates and cosines, two for decibels and the like; more for small errors."""
    if abs(value) >= 10:
        return 2
    return 4 if abs(value) >= 0.001 or value == 0 else min(8, 2 - floor(log10(abs(value))))
