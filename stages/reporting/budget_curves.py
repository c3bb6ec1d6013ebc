"""Figures of quality against budget, one line per method: where a method was measured at several budgets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import altair as alt
import pandas as pd

from stages.reporting import fronts, text, verdicts
from stages.reporting.drawing import GREY, INK, WIDTH, Figure, dashes, encodings, finish
from stages.reporting.inputs import DENSE, Inputs
from stages.reporting.intervals import STAGE_NAMES, STAGES, Stage, budgets, mean_interval, scores
from stages.reporting.scales import Row, above_zero, off_scale, quality_axis, reach, spread_out
from stages.tracking.record import CellRecord

HEIGHT = 290


@dataclass(frozen=True)
class _Curves:
    """One panel: the rows of a stage, and the dense network's quality, None where it is off the scale."""

    stage: Stage
    rows: list[Row]
    dense: float | None


def figures(inputs: Inputs, task: str) -> Iterator[Figure]:
    """One figure, a panel after transfer alone and one after fine-tuning; none without a curve."""
    records = inputs.of_task(task)
    found = [
        _Curves(stage, rows, _dense(records, stage)) for stage in STAGES if (rows := points(records, stage))
    ]
    if found:
        yield _figure(inputs, task, found)


def points(records: list[CellRecord], stage: Stage) -> list[Row]:
    """Quality with its interval, a row per method and budget below 1; none if no method has two budgets."""
    rows = []
    for record in (record for record in records if record.method != DENSE):
        for budget in (budget for budget in budgets(record) if budget < 1):
            interval = mean_interval(list(scores(record, budget, stage).values()))
            if interval:
                ends = {"quality_low": interval.low, "quality_high": interval.high}
                known = {"method": record.method, "budget": budget, "quality": interval.mean}
                rows.append(known | ends | {"family": verdicts.is_eugen(record)})
    swept = len({(row["method"], row["budget"]) for row in rows}) > len({row["method"] for row in rows})
    return rows if swept else []


def _dense(records: list[CellRecord], stage: Stage) -> float:
    """The dense network's mean quality at this stage; untouched where it was not fine-tuned."""
    own = [record for record in records if record.method == DENSE]
    found = [value for record in own for b in budgets(record) for value in scores(record, b, stage).values()]
    return fmean(found or [result.quality_dense for record in records for result in record.seeds])


def _figure(inputs: Inputs, task: str, panels: list[_Curves]) -> Figure:
    records = inputs.of_task(task)
    higher = records[0].higher_is_better
    log = spread_out([row for panel in panels for row in panel.rows], higher)
    shown, gone = _on_scale(panels) if log else (panels, [])
    drawn = list(dict.fromkeys(row["method"] for panel in shown for row in panel.rows))
    every = [row for panel in shown for row in panel.rows]
    every += [_level(panel.dense) for panel in shown if panel.dense is not None]
    domain, wide = reach(every, "quality", log), len(shown) > 1
    name = records[0].quality_name.replace("_", " ")
    title = f"{name} ({'higher' if higher else 'lower'} is better)"
    colour, shape = encodings(inputs, drawn=drawn, columns=5 if wide else 2)
    looks = colour, shape, dashes(inputs, drawn)
    charts = [
        _panel(panel, quality_axis(domain, log, None if i else title), looks, f"{STAGE_NAMES[panel.stage]}")
        for i, panel in enumerate(shown)
    ]
    caption = (
        f"Quality against budget, the share of a dense block's MACs that a row may cost, "
        f"{text.listing([STAGE_NAMES[panel.stage] for panel in shown])}. Bars: 95 % Student-t intervals over "
        "seeds (none for one seed). EUGens have thick lines."
    )
    caption += " Dashed: the dense network." if any(panel.dense is not None for panel in shown) else ""
    caption += f" Far off the scale, in the table: {text.listing(gone)}." if gone else ""
    caption = " ".join([caption, *fronts.provisional(records)])
    chart = alt.hconcat(*charts, spacing=24)
    return finish(
        f"{task}-budgets", task, (), caption, f"{name} by budget: {_spoken(panels)}", chart, wide=wide
    )


def _level(quality: float) -> Row:
    return {"method": DENSE, "quality": quality, "quality_low": quality, "quality_high": quality}


def _on_scale(panels: list[_Curves]) -> tuple[list[_Curves], list[str]]:
    """The panels on a logarithmic axis, without what lies far off it, and the names of that."""
    levels = [_level(panel.dense) for panel in panels if panel.dense is not None]
    gone = off_scale([row for panel in panels for row in panel.rows] + levels)
    kept = []
    for panel in panels:
        rows = [above_zero(row) for row in panel.rows if row["method"] not in gone]
        kept.append(_Curves(panel.stage, rows, None if DENSE in gone else panel.dense))
    return [panel for panel in kept if panel.rows], gone


def _panel(
    panel: _Curves, y: alt.Y, looks: tuple[alt.Color, alt.Shape, alt.StrokeDash], title: str
) -> alt.LayerChart | alt.FacetChart:
    """A line per method with its points and bars; the EUGens' lines are the thick ones."""
    colour, shape, dash = looks
    swept = sorted({row["budget"] for row in panel.rows})
    x = alt.X(
        "budget:Q",
        title="budget",
        scale=alt.Scale(nice=False, zero=False, padding=14),
        # A precision of its own: "~g" alone takes that of evenly spread ticks, and writes 0.15 as 0.1.
        axis=alt.Axis(values=swept, format=".4~g", labelOverlap=True, labelSeparation=8),
    )
    base = alt.Chart(pd.DataFrame(panel.rows)).encode(x, y, color=colour)
    lines, own = base.encode(strokeDash=dash), alt.datum.family
    layers = [
        lines.mark_line(strokeWidth=1.1, clip=True).transform_filter(~own),
        lines.mark_line(strokeWidth=2.6, clip=True).transform_filter(own),
        base.mark_rule(opacity=0.55, clip=True).encode(y=alt.Y("quality_low:Q"), y2="quality_high:Q"),
        base.mark_point(filled=True, size=50, opacity=1).encode(shape=shape),
    ]
    if panel.dense is not None:
        level = alt.Chart(pd.DataFrame([_level(panel.dense)])).encode(y=y)
        label = level.mark_text(align="left", dx=4, dy=-6, fontSize=11, color=INK)
        layers.append(level.mark_rule(strokeDash=[5, 4], color=GREY))
        layers.append(label.encode(x=alt.value(0), text=alt.value(DENSE)))
    heading = alt.TitleParams(title, fontSize=13, fontWeight="normal", anchor="start", color=INK)
    return alt.layer(*layers).properties(width=WIDTH, height=HEIGHT, title=heading)


def _spoken(panels: list[_Curves]) -> str:
    """Every point in words, for those who cannot see the figure."""
    return "; ".join(
        f"{row['method']} {row['quality']:.4g} at {row['budget']:g} {STAGE_NAMES[panel.stage]}"
        for panel in panels
        for row in panel.rows
    )
