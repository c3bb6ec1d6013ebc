"""How far an axis reaches, and which methods lie so far off that they would press the others together."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

import altair as alt

CLOSE = 0.25
"""How far a panel reaches beyond its points for their intervals, as a share of the points' own reach."""
SPREAD = 10
"""Errors that differ by a greater ratio are drawn on a logarithmic axis."""
FAR = 10
"""A method whose least error is so many times the median of all would squeeze the others into one line."""
EXACT = 1e-3
"""So would one whose errors are all below this share of the median: it is as good as exact."""
Row = dict[str, Any]


def reach(rows: list[Row], key: str, log: bool = False) -> tuple[float, float]:
    """The range that a panel shows: all points, and of their intervals as much as leaves the points apart.

    Args:
        rows: points with `key`, `key_low` and `key_high`; none of them 0 or below if `log`.
        log: whether distances are ratios.
    """
    to, back = (math.log, math.exp) if log else (float, float)
    low, high = (to(end(row[key] for row in rows)) for end in (min, max))
    if low == high:
        return back(low - 0.05), back(high + 0.05)
    room = CLOSE * (high - low)
    least, most = to(min(row[f"{key}_low"] for row in rows)), to(max(row[f"{key}_high"] for row in rows))
    return back(max(low - room, least)), back(min(high + room, most))


def spread_out(rows: list[Row], higher_is_better: bool) -> bool:
    """Whether a figure of errors needs a logarithmic axis."""
    values = [row["quality"] for row in rows]
    return not higher_is_better and min(values) > 0 and max(values) / min(values) > SPREAD


def on_scale(rows: list[Row]) -> tuple[list[Row], list[str]]:
    """The rows without those methods that lie beyond the others by far at every budget, and their names."""
    limit = FAR * median(row["quality"] for row in rows)
    best: dict[str, float] = {}
    for row in rows:
        best[row["method"]] = min(row["quality"], best.get(row["method"], math.inf))
    beyond = [method for method, least in best.items() if least > limit]
    return [row for row in rows if row["method"] not in beyond], beyond


def off_scale(rows: list[Row]) -> list[str]:
    """Methods far off the others' logarithmic scale on either side, or without a logarithm."""
    kept, beyond = on_scale(rows)
    limit = EXACT * median(row["quality"] for row in kept)
    found: dict[str, list[float]] = {}
    for row in kept:
        found.setdefault(row["method"], []).append(row["quality"])
    return [*beyond, *(method for method, own in found.items() if max(own) < limit or min(own) <= 0)]


def above_zero(row: Row) -> Row:
    """The row with a bar that ends above 0, where a logarithm has no value."""
    return row | {"quality_low": max(row["quality_low"], row["quality"] / 10)}


def log_scale(**more: Any) -> alt.Scale:
    """A logarithmic scale that ends where the values end."""
    return alt.Scale(type="log", nice=False, zero=False, **more)


def ticks(values: list[float]) -> alt.Axis:
    """Ticks at 1, 2 and 5 of each decade in reach: an automatic choice leaves short ranges bare."""
    marks = [digit * 10.0**power for power in range(-9, 7) for digit in (1, 2, 5)]
    low, high = min(values), max(values)
    inside = [mark for mark in marks if low <= mark <= high]
    return alt.Axis(values=inside, format="~g") if len(inside) > 1 else alt.Axis(tickCount=4, format="~g")


def quality_axis(domain: tuple[float, float], log: bool, title: str | None) -> alt.Y:
    """The axis that panels beside each other share: its numbers stand at the one with a title."""
    axis = ticks(list(domain)) if log else alt.Axis(tickCount=6)
    axis.labels = axis.ticks = title is not None
    more = {"domain": domain, "padding": 10}
    scale = log_scale(**more) if log else alt.Scale(nice=False, zero=False, **more)
    return alt.Y("quality:Q", title=title, scale=scale, axis=axis)
