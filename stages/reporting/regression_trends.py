"""Figures of the regressions: per machine, every comparison over time and the times themselves.

A stored time is a trend only: another day the same machine gives other ones. What judges is the paired ratio.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import altair as alt
import pandas as pd

from stages.reporting.drawing import COLOURS, GREY, INK, WIDTH, Figure, finish
from stages.reporting.inputs import Inputs
from stages.reporting.regressions import machine, moment, newest_by_host, real
from stages.tracking.regression_record import Regression

PART = "regressions"
SHOWN = 90
"""Newest comparisons of a machine that are drawn: three months of nights."""


def figures(inputs: Inputs) -> list[Figure]:
    """For every machine: ratio to the base, and from the second run on milliseconds, by case over time."""
    drawn = []
    for newest in newest_by_host(inputs.regressions):
        of_host = [r for r in real(inputs.regressions) if r.host.fingerprint == newest.host.fingerprint]
        points = list(_points(of_host[:SHOWN]))
        if points:
            drawn.append(_ratios(newest, points))
        if len({point["time"] for point in points}) > 1:  # one time is no trend
            drawn.append(_times(newest, points))
    return drawn


def _points(records: list[Regression]) -> Iterator[dict[str, Any]]:
    for record in records:
        for case in record.cases:
            if case.latency is not None and case.verdict != "void":
                yield {
                    "time": record.time.isoformat(),
                    "moment": moment(record),
                    "case": case.name,
                    "passed": case.verdict == "pass",
                    "verdict": case.verdict,
                    "ratio": case.latency.ratio,
                    "low": case.latency.low,
                    "high": case.latency.high,
                    "candidate_ms": case.latency.candidate_ms,
                }


def _ratios(record: Regression, points: list[dict[str, Any]]) -> Figure:
    """Each comparison with its interval; the line at 1 is the base of that run."""
    ratio = alt.Y("ratio:Q", title=None, scale=alt.Scale(zero=False, padding=8), axis=alt.Axis(tickCount=4))
    base = alt.Chart().encode(_over_time(points))
    one = alt.Chart().mark_rule(color=GREY, strokeDash=[4, 3]).encode(y=alt.datum(1.0))
    whiskers = base.mark_rule(color=COLOURS[0], opacity=0.7).encode(alt.Y("low:Q"), y2="high:Q")
    caption = (
        f"Time of the candidate over that of the base on {machine(record)}, each with its 99 % interval; "
        "above 1 it was slower. Filled: passed; hollow: failed or inconclusive. Drills and void cases are "
        "left out."
    )
    spoken = "; ".join(
        f"{p['case']} {p['moment']} {p['ratio']:.3f} [{p['low']:.3f}, {p['high']:.3f}] {p['verdict']}"
        for p in points
    )
    chart = _by_case([one, whiskers, *_marks(base, ratio)], points)
    return finish("regressions", "", ("ratio", record.host.fingerprint), caption, spoken, chart, PART)


def _times(record: Regression, points: list[dict[str, Any]]) -> Figure:
    """Median time of the candidate."""
    axis = alt.Axis(tickCount=4)
    times = alt.Y("candidate_ms:Q", title=None, scale=alt.Scale(zero=False, padding=8), axis=axis)
    base = alt.Chart().encode(_over_time(points))
    line = base.mark_line(color=COLOURS[0], strokeWidth=1.2, opacity=0.6).encode(times)
    caption = (
        f"Milliseconds of the candidates on {machine(record)}, medians: a trend only, for the machine itself "
        "drifts. What judges is the ratio of one run."
    )
    spoken = "; ".join(f"{p['case']} {p['moment']} {p['candidate_ms']:.4g} ms" for p in points)
    chart = _by_case([line, *_marks(base, times)], points)
    return finish("regressions", "", ("times", record.host.fingerprint), caption, spoken, chart, PART)


def _by_case(layers: list[alt.Chart], points: list[dict[str, Any]]) -> alt.FacetChart:
    """One panel a case, in the record's order: every case has times, and noise, of its own size."""
    cases = list(dict.fromkeys(point["case"] for point in points))
    header = alt.Header(title=None, labelOrient="top", labelAnchor="start", labelFontSize=13, labelColor=INK)
    return (
        alt.layer(*layers, data=pd.DataFrame(points))
        .properties(width=WIDTH, height=90)
        .facet(row=alt.Row("case:N", sort=cases, header=header), spacing=14)
        .resolve_scale(y="independent")
    )


def _marks(base: alt.Chart, y: alt.Y) -> list[alt.Chart]:
    return [
        base.mark_point(filled=filled, size=60, opacity=1, color=COLOURS[0])
        .transform_filter(alt.datum.passed == filled)
        .encode(y)
        for filled in (True, False)
    ]


def _over_time(points: list[dict[str, Any]]) -> alt.X:
    """The days; one moment alone is shown in the middle of two days, or its axis would repeat one label."""
    moments = [datetime.fromisoformat(point["time"]) for point in points]
    low, high, day = min(moments), max(moments), timedelta(days=1)
    if high - low < day:
        low, high = low - day / 2, high + day / 2
    scale = alt.Scale(type="utc", domain=[low.isoformat(), high.isoformat()], padding=12)
    axis = alt.Axis(format="%d %b", tickCount={"interval": "day", "step": max(1, (high - low).days // 5)})
    return alt.X("time:T", title="day, UTC", scale=scale, axis=axis)
