"""Figures of tasks with settings: quality against the number of features and against MACs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import altair as alt
import pandas as pd

from stages.reporting import points, text, verdicts
from stages.reporting.drawing import WIDTH, Figure, dashes, encodings, finish
from stages.reporting.inputs import Inputs
from stages.reporting.scales import log_scale, on_scale, ticks
from stages.reporting.settings import in_words

AXES = {"features": "number of features", "macs": "MACs over those of the dense layer"}


def sweeps(inputs: Inputs, task: str, settings: list[str]) -> Iterator[Figure]:
    """One figure per setting, its two panels above each other: legible on a phone as on a desk."""
    for setting in settings:
        rows = points.sweep(inputs.of_task(task), setting)
        if rows:
            yield _sweep(inputs, task, setting, rows)


def _sweep(inputs: Inputs, task: str, setting: str, rows: list[dict[str, Any]]) -> Figure:
    """A line with its band per method, on logarithmic axes; the EUGens' lines are the thick ones."""
    records = inputs.of_task(task)
    name = records[0].quality_name
    family = {record.method for record in records if verdicts.is_eugen(record)}
    rows, beyond = on_scale([row | {"family": row["method"] in family} for row in rows])
    panels = [_panel(inputs, rows, axis, name) for axis in AXES]
    caption = (
        f"{in_words(setting)}: {name.replace('_', ' ')} after transfer alone, by number of features and by "
        "MACs; logarithmic axes. Bands: 95 % Student-t intervals over repeats. EUGens have thick lines. "
        "Features are the columns of the last linear map, or a rank or neurons where there is none. Rows at "
        "the dense layer's MACs are in the table."
    )
    if beyond:
        caption += f" Far off the scale, in the table: {text.listing(beyond)}."
    spoken = "; ".join(
        f"{row['method']} {row['quality']:.3f} with {row['features']:.0f} features (budget {row['budget']:g})"
        for row in rows
    )
    chart = alt.vconcat(*panels, spacing=18)
    return finish(f"{task}-sweep", task, (setting,), caption, f"{name}, {in_words(setting)}: {spoken}", chart)


def _panel(
    inputs: Inputs, rows: list[dict[str, Any]], axis: str, quality: str
) -> alt.LayerChart | alt.FacetChart:
    drawn = list(dict.fromkeys(row["method"] for row in rows))
    colour, shape = encodings(inputs, drawn=drawn)
    dash = dashes(inputs, drawn)
    x = alt.X(f"{axis}:Q", title=AXES[axis], scale=log_scale(padding=6), axis=ticks([r[axis] for r in rows]))
    ends = [row[end] for row in rows for end in ("quality_low", "quality_high")]
    y = alt.Y("quality:Q", title=quality.replace("_", " "), scale=log_scale(), axis=ticks(ends))
    base = alt.Chart(pd.DataFrame(rows))
    lines = base.encode(x, y, color=colour, strokeDash=dash)
    own = alt.datum.family
    return alt.layer(
        base.mark_area(opacity=0.18).encode(
            x, alt.Y("quality_low:Q"), alt.Y2("quality_high:Q"), color=colour
        ),
        lines.mark_line(strokeWidth=1.1).transform_filter(~own),
        lines.mark_line(strokeWidth=2.6).transform_filter(own),
        base.mark_point(filled=True, size=34, opacity=1).encode(x, y, color=colour, shape=shape),
    ).properties(width=WIDTH, height=230)
