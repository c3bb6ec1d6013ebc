"""Figures of quality against time, MACs and parameters, side by side, each with its Pareto fronts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import altair as alt
import pandas as pd

from stages.reporting import fronts, points, text
from stages.reporting.drawing import INK, Figure, encodings, finish
from stages.reporting.fronts import Axis, Row
from stages.reporting.inputs import DENSE, Inputs
from stages.reporting.scales import above_zero, off_scale, quality_axis, reach, spread_out
from stages.tracking.record import CellRecord

PAGE = 920
"""Width of a line of panels in pixels, without the axis of the first: it fills the page."""
GAP = 20
HEIGHT = 270
CROWD = 40
"""Points of a panel beyond which they are drawn smaller."""
Panels = list[tuple[Axis, list[Row]]]


@dataclass(frozen=True)
class _Look:
    """What the panels of one figure share."""

    colour: alt.Color
    shape: alt.Shape
    quality: str
    domain: tuple[float, float]
    log: bool
    higher_is_better: bool
    tuned: bool
    """Whether a row was fine-tuned; then those that were not are hollow."""
    across: int
    """Panels beside each other."""


def figures(inputs: Inputs, task: str) -> Iterator[Figure]:
    """One figure per device and precision: a task's rows beside all that they cost; none without a rival."""
    records = inputs.of_task(task)
    together = [list(found) for _, found in groupby(points.timings(records), key=lambda timing: timing[:2])]
    for timings in together or [[]]:
        panels = [(axis, fronts.rows(records, axis)) for axis in fronts.axes(records, timings)]
        if panels:
            yield _figure(inputs, task, panels, timings)


def _figure(inputs: Inputs, task: str, panels: Panels, timings: Sequence[points.Timing]) -> Figure:
    records = inputs.of_task(task)
    higher = records[0].higher_is_better
    log = spread_out([row for _, rows in panels for row in rows if row["method"] != DENSE], higher)
    gone = off_scale([row for _, rows in panels for row in rows]) if log else []
    shown = _without(panels, gone, log)
    every = [row for _, rows in shown for row in rows]
    colour, shape = encodings(inputs, drawn=[row["method"] for row in every], columns=5)
    name = records[0].quality_name.replace("_", " ")
    title = f"{name} ({'higher' if higher else 'lower'} is better)"
    across = 4 if len(shown) == 4 else 3
    look = _Look(colour, shape, title, reach(every, "quality", log), log, higher, _tuned(panels), across)
    drawn = [_panel(look, *panel, first=i % across == 0) for i, panel in enumerate(shown)]
    lines = [alt.hconcat(*drawn[i : i + across], spacing=GAP) for i in range(0, len(drawn), across)]
    caption = " ".join([*_shown(panels, timings, higher), *_missing(records, panels, gone)])
    spoken = f"{name} and costs over dense: " + "; ".join(_spoken(panels))
    key = timings[0][:2] if timings else ()
    return finish(f"{task}-fronts", task, key, caption, spoken, alt.vconcat(*lines, spacing=GAP), wide=True)


def _without(panels: Panels, gone: list[str], log: bool) -> Panels:
    """The panels as they are drawn; one that keeps nothing goes."""
    kept = [(axis, [row for row in rows if row["method"] not in gone]) for axis, rows in panels]
    return [(axis, [above_zero(row) if log else row for row in rows]) for axis, rows in kept if rows]


def _tuned(panels: Panels) -> bool:
    return any(row["stage"] == "finetuned" for _, rows in panels for row in rows)


def _panel(look: _Look, axis: Axis, rows: list[Row], *, first: bool) -> alt.LayerChart | alt.FacetChart:
    """Points with their intervals, a method's budgets joined, and the fronts as stairs."""
    x = alt.X(
        "cost:Q",
        title=f"{axis.title} / dense",
        scale=alt.Scale(domain=reach(rows, "cost"), nice=False, zero=False, padding=10),
        axis=alt.Axis(tickCount=5, format="~g"),
    )
    y = quality_axis(look.domain, look.log, look.quality if first else None)
    base = alt.Chart(pd.DataFrame(rows)).encode(x, y, color=look.colour)
    size = 60 if len(rows) <= CROWD else 32
    hollow = (alt.datum.stage == "transfer") & look.tuned
    bars = base.mark_rule(opacity=0.55, clip=True)
    joined = base.mark_line(strokeWidth=1, opacity=0.35, clip=True).encode(order="budget:Q")
    dots = base.encode(shape=look.shape)
    layers = [
        joined.transform_filter(alt.datum.final),
        *_stairs(look, rows, x, y),
        bars.encode(x=alt.X("cost_low:Q"), x2="cost_high:Q"),
        bars.encode(y=alt.Y("quality_low:Q"), y2="quality_high:Q"),
        dots.mark_point(filled=False, size=size * 0.8, opacity=1).transform_filter(hollow),
        dots.mark_point(filled=True, size=size, opacity=1).transform_filter(~hollow),
    ]
    width = (PAGE - GAP * (look.across - 1)) // look.across
    return alt.layer(*layers).properties(width=width, height=HEIGHT)


def _stairs(look: _Look, rows: list[Row], x: alt.X, y: alt.Y) -> Iterator[alt.Chart]:
    """The front of each stage: at a cost, the best quality that no more than it buys."""
    stages: list[fronts.Stage] = ["transfer", "final"] if look.tuned else ["final"]
    for stage in stages:
        found = fronts.front(fronts.of_stage(rows, stage), look.higher_is_better)
        dash = [1, 0] if stage == "final" else [4, 4]
        line = alt.Chart(pd.DataFrame(found)).mark_line(
            interpolate="step-after", color=INK, strokeWidth=1.3, strokeDash=dash, opacity=0.75, clip=True
        )
        if found:
            yield line.encode(x, y)


def _shown(panels: Panels, timings: Sequence[points.Timing], higher_is_better: bool) -> Iterator[str]:
    """What the panels show, under which conditions, and which rows are on the fronts."""
    names = [axis.name for axis, _ in panels]
    yield f"Quality against {text.listing(names)}, over the dense network's."
    if any(axis.timed for axis, _ in panels):
        device, dtype, _ = timings[0]
        yield (
            f"Time: a forward pass of the whole model on {device} in {dtype}, each row beside the dense "
            "network in the same precision at the same batch."
        )
    yield "MACs: of the replaced blocks; parameters: of the whole model."
    tuned = _tuned(panels)
    if tuned:
        yield "Hollow: after transfer alone; filled: after fine-tuning, and the dense network."
    else:
        yield "All rows are after transfer alone."
    yield "Bars: 95 % intervals, of the timings and over seeds (none for one seed)."
    yield "Stairs: the Pareto front of the means" + (", dashed after transfer alone." if tuned else ".")
    fronted: dict[str, list[str]] = {}
    for axis, rows in panels:
        best = fronts.front(fronts.of_stage(rows, "final"), higher_is_better)
        fronted.setdefault(fronts.named([(row["method"], row["budget"]) for row in best]), []).append(
            axis.name
        )
    for best, axes in fronted.items():
        yield f"On the front of {text.listing(axes)}: {best}."


def _missing(records: list[CellRecord], panels: Panels, gone: list[str]) -> Iterator[str]:
    """What the panels do not show, and what of it may not be quoted."""
    if gone:
        yield f"Far off the scale, in the table: {text.listing(gone)}."
    other = fronts.own_precision(records)
    if other and any(axis.timed for axis, _ in panels):
        yield f"Without a time, for they compute in another precision: {text.listing(other)}."
    lacking: dict[str, list[str]] = {}
    for axis, rows in panels:
        known = {row["method"] for row in rows} | set(other if axis.timed else [])
        missed = [record.method for record in records if record.method not in known]
        if missed:
            lacking.setdefault(text.listing(missed), []).append(axis.name)
    for methods, axes in lacking.items():
        yield f"Not recorded of {methods}: {text.listing(axes)}."
    machines = {record.environment.fingerprint for record in records if record.latencies}
    if len(machines) > 1:
        yield f"Timed on {len(machines)} kinds of machine: times of different ones do not compare."
    yield from fronts.provisional(records)


def _spoken(panels: Panels) -> Iterator[str]:
    """Every row's last stage with all its costs, for those who cannot see the figure."""
    last = {
        (row["method"], row["budget"]): row["quality"] for _, rows in panels for row in rows if row["final"]
    }
    for (method, budget), quality in last.items():
        costs = [
            f"{axis.name} {row['cost']:.3g}"
            for axis, rows in panels
            for row in rows
            if row["final"] and (row["method"], row["budget"]) == (method, budget)
        ]
        yield f"{fronts.named([(method, budget)])} {quality:.4g} at {', '.join(costs)}"
