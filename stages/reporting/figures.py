"""The report's figures: Vega-Lite specs that diff, and the SVG drawn from them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from stages.reporting import points
from stages.reporting.inputs import DENSE, Inputs
from stages.reporting.intervals import budgets
from stages.tracking.record import CellRecord

WIDTH = 360
AXIS = alt.Axis(tickCount=6)
INK = "#000"
"""Replaced by the page's text colour; everything else must be legible on light and on dark."""
GREY = "#808890"
COLOURS = ["#3b82c4", "#d9640f", "#1f9d6b", "#c2559b", "#8a6fd1", "#1a93a8", "#a3762b", "#d6453d", GREY]
SHAPES = ["circle", "square", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left"]


@dataclass(frozen=True)
class Figure:
    """One figure: its file name without suffix, what it shows in words, specification and drawing."""

    name: str
    task: str
    caption: str
    alt: str
    spec: str
    svg: str


def figures(inputs: Inputs) -> list[Figure]:
    """Per task: quality against speed-up and speed-up against its limit per batch, fit per block."""
    drawn = []
    for task in inputs.tasks:
        records = inputs.of_task(task)
        for device, dtype, batch in points.timings(records):
            drawn.append(_trade_off(inputs, task, (device, dtype, batch)))
        for device, dtype, batch in points.timings(records):
            drawn.append(_speed(inputs, task, (device, dtype, batch)))
        drawn += _fits(inputs, task)
    return drawn


def _trade_off(inputs: Inputs, task: str, timing: points.Timing) -> Figure:
    """Quality against measured whole-model speed-up; hollow: transfer alone, filled: fine-tuned."""
    records = inputs.of_task(task)
    rows = points.trade_off(records, timing)
    quality = f"{records[0].quality_name} ({_direction(records[0])})"
    x = alt.X(
        "speedup:Q",
        title="whole-model speed-up, measured (×)",
        scale=alt.Scale(zero=False, padding=12),
        axis=AXIS,
    )
    y = alt.Y("quality:Q", title=quality, scale=alt.Scale(zero=False, padding=12))
    colour, shape = _encodings(inputs)
    base = alt.Chart(pd.DataFrame(rows))
    whiskers = base.encode(color=colour)
    tuned = alt.datum.stage != "transfer"
    chart = alt.layer(
        base.mark_line(strokeWidth=1, opacity=0.45)
        .transform_filter(alt.datum.final)
        .encode(x, y, color=colour),
        whiskers.mark_rule(opacity=0.7).encode(x=alt.X("speedup_low:Q"), x2="speedup_high:Q", y=y),
        whiskers.mark_rule(opacity=0.7).encode(y=alt.Y("quality_low:Q"), y2="quality_high:Q", x=x),
        _marks(base, ~tuned, False).encode(x, y, color=colour, shape=shape),
        _marks(base, tuned, True).encode(x, y, color=colour, shape=shape),
        base.mark_text(fontSize=11, align="left", dx=7, dy=-7, color=INK)
        .transform_filter(alt.datum.label != "")
        .encode(x, y, text="label:N"),
    ).properties(width=WIDTH, height=300)
    caption = (
        f"Quality against measured speed-up, {_timing_text(timing)}. Hollow: after transfer alone; filled: "
        "after fine-tuning, and the dense network. Bars: 95 % intervals (bootstrap over timing pairs, "
        "Student t over seeds; none for one seed)."
    )
    if any(row["label"] for row in rows):
        caption += " A thin line joins a method's budgets, which are written beside it."
    return _figure(f"{task}-quality", task, _key(timing), caption, _describe(rows, records[0]), chart)


def _speed(inputs: Inputs, task: str, timing: points.Timing) -> Figure:
    """Measured speed-up with its interval beside the limit that MACs set, one line per method and budget."""
    rows = points.speeds(inputs.of_task(task), timing)
    y = alt.Y("row:N", sort=[row["row"] for row in rows], title=None)
    x = alt.X(
        "speedup:Q", title="whole-model speed-up (×)", scale=alt.Scale(zero=False, padding=12), axis=AXIS
    )
    colour, _ = _encodings(inputs, legend=False)
    base = alt.Chart(pd.DataFrame(rows))
    chart = alt.layer(
        base.mark_rule(color=GREY, strokeDash=[3, 3]).encode(x=alt.X("speedup:Q"), x2="limit:Q", y=y),
        base.mark_tick(color=INK, thickness=2, size=13).encode(x=alt.X("limit:Q"), y=y),
        base.mark_rule(strokeWidth=2).encode(
            x=alt.X("speedup_low:Q"), x2="speedup_high:Q", y=y, color=colour
        ),
        base.mark_point(filled=True, size=60, opacity=1).encode(x=x, y=y, color=colour),
    ).properties(width=WIDTH - 70, height=alt.Step(17))
    caption = (
        f"Measured speed-up (dot, 95 % interval) beside the limit if time followed MACs (upright tick), "
        f"{_timing_text(timing)}."
    )
    spoken = "; ".join(f"{row['row']} {row['speedup']:.2f}×, limit {row['limit']:.2f}×" for row in rows)
    return _figure(f"{task}-speed", task, _key(timing), caption, spoken, chart)


def _fits(inputs: Inputs, task: str) -> Iterator[Figure]:
    """Held-out R² of every replaced block, one figure per budget."""
    records = [record for record in inputs.of_task(task) if record.method != DENSE]
    for budget in sorted({budget for record in records for budget in budgets(record)}):
        rows = points.fits(records, budget)
        if not rows:
            continue
        colour, shape = _encodings(inputs, drawn=[row["method"] for row in rows])
        chart = (
            alt.Chart(pd.DataFrame(rows))
            .mark_line(point=alt.OverlayMarkDef(size=50), strokeWidth=1.5)
            .encode(
                alt.X("block:O", title="block, front to back", axis=alt.Axis(labelAngle=0)),
                alt.Y("r2:Q", title="held-out R² after transfer", scale=alt.Scale(zero=False)),
                color=colour,
                shape=shape,
            )
            .properties(width=WIDTH, height=220)
        )
        spoken = "; ".join(f"{row['method']} block {row['block']} {row['r2']:.3f}" for row in rows)
        caption = f"Fit of each replaced block at budget {budget:g}: held-out R², mean over seeds."
        yield _figure(f"{task}-fit", task, (f"budget{budget:g}",), caption, spoken, chart)


def _marks(base: alt.Chart, condition: Any, filled: bool) -> alt.Chart:
    return base.mark_point(filled=filled, size=75 if filled else 60, opacity=1).transform_filter(condition)


def _encodings(
    inputs: Inputs, drawn: list[str] | None = None, legend: bool = True
) -> tuple[alt.Color, alt.Shape]:
    """The same colour and shape for a method in every figure; dense is drawn in the text's colour."""
    others = [method for method in inputs.methods if method != DENSE]
    colours = [INK] + [COLOURS[i % len(COLOURS)] for i in range(len(others))]
    shapes = ["diamond"] + [SHAPES[i % len(SHAPES)] for i in range(len(others))]
    looks = [
        (m, c, s)
        for m, c, s in zip([DENSE, *others], colours, shapes, strict=True)
        if not drawn or m in drawn
    ]
    methods, colours, shapes = (list(column) for column in zip(*looks, strict=True))
    where = alt.Legend(orient="bottom", columns=3, symbolSize=70, symbolOpacity=1) if legend else None
    return (
        alt.Color("method:N", scale=alt.Scale(domain=methods, range=colours), legend=where, title=None),
        alt.Shape("method:N", scale=alt.Scale(domain=methods, range=shapes), legend=where, title=None),
    )


def _figure(
    stem: str, task: str, key: tuple[str, ...], caption: str, spoken: str, chart: alt.TopLevelMixin
) -> Figure:
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", "-".join([stem, *key]))
    chart = chart.configure(
        background="white",
        font="Arial, Liberation Sans, Helvetica, sans-serif",
        padding={"left": 16, "right": 8, "top": 8, "bottom": 5},
        aria=False,
        axis=alt.AxisConfig(
            labelFontSize=13,
            titleFontSize=13,
            titleFontWeight="normal",
            titlePadding=12,
            gridOpacity=0.35,
            gridColor=GREY,
        ),
        view=alt.ViewConfig(stroke=None),
        legend=alt.LegendConfig(labelFontSize=13, labelLimit=WIDTH // 3),
    )
    spec = chart.to_dict()
    return Figure(
        name, task, caption, spoken, json.dumps(spec, indent=1, sort_keys=True) + "\n", _draw(spec, name)
    )


def _draw(spec: dict[str, Any], name: str) -> str:
    """The SVG, with ids that stay unique when several stand in one page."""
    svg = vl_convert.vegalite_to_svg(spec)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", svg)


def _describe(rows: list[dict[str, Any]], record: CellRecord) -> str:
    """The figure in words, for those who cannot see it."""
    stages = {"transfer": "after transfer", "finetuned": "fine-tuned", "dense": "untouched"}
    said = [
        f"{row['method']} at budget {row['budget']:g} {stages[row['stage']]} {row['quality']:.3f} "
        f"at {row['speedup']:.2f}×"
        for row in rows
    ]
    return f"{record.quality_name} and speed-up: " + "; ".join(said)


def _key(timing: points.Timing) -> tuple[str, ...]:
    return timing[0], timing[1], f"batch{timing[2]}"


def _timing_text(timing: points.Timing) -> str:
    device, dtype, batch = timing
    return f"{device}, {dtype}, batch {batch}"


def _direction(record: CellRecord) -> str:
    return "higher is better" if record.higher_is_better else "lower is better"
