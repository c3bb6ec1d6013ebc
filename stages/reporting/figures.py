"""The report's figures: Vega-Lite specs that diff, and the SVG drawn from them."""

from __future__ import annotations

from collections.abc import Iterator

import altair as alt
import pandas as pd

from stages.reporting import budget_curves, front_figures, points, regression_trends
from stages.reporting.drawing import AXIS, COLOURS, GREY, INK, SHAPES, WIDTH, Figure, encodings, finish
from stages.reporting.inputs import DENSE, Inputs
from stages.reporting.intervals import budgets
from stages.reporting.scratch import figures as scratch
from stages.reporting.settings import settings_of
from stages.reporting.sweep import sweeps
from stages.tracking.record import CellRecord

_LOOSE = alt.Scale(zero=False, padding=12)


def figures(inputs: Inputs) -> list[Figure]:
    """Per task: quality against all costs and against budget, speed-up beside its limit, fit per block.

    Where quality is a mean over settings, each setting's sweep over the budgets stands in the place of
    the last: a block's fit is its setting's quality. Then what was trained from scratch, and after all
    tasks the regressions.
    """
    drawn = []
    for task in inputs.tasks:
        records = inputs.of_task(task)
        timings, settings = points.timings(records), settings_of(records)
        drawn += front_figures.figures(inputs, task)
        drawn += budget_curves.figures(inputs, task)
        drawn += sweeps(inputs, task, settings)
        drawn += [_speed(inputs, task, timing) for timing in timings]
        drawn += [_precisions(inputs, task, timing) for timing in timings if _compared(records)]
        if not settings:
            drawn += _fits(inputs, task)
        drawn += scratch.figures(inputs, task)
    return drawn + regression_trends.figures(inputs)


def _speed(inputs: Inputs, task: str, timing: points.Timing) -> Figure:
    """Measured speed-up with its interval beside the limit that MACs set, one line per method and budget."""
    rows, left_out = points.ends(points.speeds(inputs.of_task(task), timing))
    y = alt.Y("row:N", sort=[row["row"] for row in rows], title=None)
    x = alt.X("speedup:Q", title="whole-model speed-up (×)", scale=_LOOSE, axis=AXIS)
    colour, _ = encodings(inputs, legend=False)
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
        f"{_timing_text(timing)}." + (" Budgets between the ends are in the table." if left_out else "")
    )
    spoken = "; ".join(f"{row['row']} {row['speedup']:.2f}×, limit {row['limit']:.2f}×" for row in rows)
    return finish(f"{task}-speed", task, _key(timing), caption, spoken, chart)


def _compared(records: list[CellRecord]) -> bool:
    return any(len({x.dtype for x in record.latencies}) > 1 for record in records)


def _precisions(inputs: Inputs, task: str, timing: points.Timing) -> Figure:
    """What each row gains in each precision over the dense network in the same one."""
    rows = points.precisions(inputs.of_task(task), timing)
    names = list(dict.fromkeys(row["precision"] for row in rows))
    legend = alt.Legend(orient="bottom", symbolOpacity=1)
    colours = alt.Scale(domain=names, range=[INK, *COLOURS][: len(names)])
    shapes = alt.Scale(domain=names, range=SHAPES[: len(names)])
    colour = alt.Color("precision:N", scale=colours, legend=legend, title=None)
    shape = alt.Shape("precision:N", scale=shapes, legend=legend, title=None)
    x = alt.X("speedup:Q", title="whole-model speed-up (×)", scale=_LOOSE, axis=AXIS)
    y = alt.Y("row:N", sort=[row["row"] for row in rows], title=None)
    offset = alt.YOffset("precision:N", sort=names)
    base = alt.Chart(pd.DataFrame(rows)).encode(y=y, yOffset=offset, color=colour)
    chart = alt.layer(
        base.mark_rule(strokeWidth=2).encode(x=alt.X("speedup_low:Q"), x2="speedup_high:Q"),
        base.mark_point(filled=True, size=50, opacity=1).encode(x=x, shape=shape),
    ).properties(width=WIDTH - 70, height=alt.Step(12))
    caption = (
        f"Speed-up over the dense network in the same precision, with 95 % intervals, {timing[0]}, "
        f"batch {timing[2]}. Quality in each precision stands in the table of precisions."
    )
    spoken = "; ".join(f"{row['row']} {row['precision']} {row['speedup']:.2f}×" for row in rows)
    return finish(f"{task}-precision", task, (timing[0], f"batch{timing[2]}"), caption, spoken, chart)


def _fits(inputs: Inputs, task: str) -> Iterator[Figure]:
    """Held-out R² of every replaced block, one figure per budget."""
    records = [record for record in inputs.of_task(task) if record.method != DENSE]
    for budget in sorted({budget for record in records for budget in budgets(record)}):
        rows = points.fits(records, budget)
        if not rows:
            continue
        colour, shape = encodings(inputs, drawn=[row["method"] for row in rows])
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
        yield finish(f"{task}-fit", task, (f"budget{budget:g}",), caption, spoken, chart)


def _key(timing: points.Timing) -> tuple[str, ...]:
    return timing[0], timing[1], f"batch{timing[2]}"


def _timing_text(timing: points.Timing) -> str:
    device, dtype, batch = timing
    return f"{device}, {dtype}, batch {batch}"
