"""Figures of rows trained from scratch: training curves, learning rates, number of replaced blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

import altair as alt
import pandas as pd

from stages.reporting import text
from stages.reporting.drawing import GREY, INK, WIDTH, Figure, Looks, finish, looks
from stages.reporting.inputs import DENSE, Inputs
from stages.reporting.scratch import points, runs
from stages.tracking.record import ScratchRecord

PART = "scratch"
UNITS = ((1e18, "exaFLOP"), (1e15, "petaFLOP"), (1e12, "teraFLOP"), (1e9, "gigaFLOP"), (1e6, "megaFLOP"))


def figures(inputs: Inputs, task: str) -> Iterator[Figure]:
    """The curves of every variant, its sweep of learning rates; then depth, where it varies."""
    records = inputs.scratch_of(task)
    known = looks(inputs.methods, [record.row for record in inputs.scratch if record.runs])
    for variant in runs.variants(records):
        yield from _curves(records, variant, known)
    for variant in runs.variants(records):
        yield from _rates(records, variant, known)
    for names, rows in points.depths(records):
        yield _depth(records, names, rows, known)


def _curves(records: Sequence[ScratchRecord], variant: str, known: Looks) -> Iterator[Figure]:
    """Quality against steps, FLOPs and seconds, above each other: legible on a phone as on a desk."""
    rows = points.curves(records, variant)
    if not rows:
        return
    scale, unit = next((u for u in UNITS if max(r["flops"] for r in rows) >= u[0]), (1.0, "FLOP"))
    rows = [row | {"flops": row["flops"] / scale} for row in rows]
    titles = {"step": "optimiser steps", "flops": f"training {unit}s", "seconds": "training seconds"}
    caption = (
        f"{variant}: quality on the validation part along the training ({_direction(records[0])}), mean over "
        f"seeds at the chosen rate, {_budgets(rows)}. By steps, by training FLOPs (6 × MACs × examples seen) "
        "and by seconds: steps at the row's training speed-up, measured side by side with the dense network, "
        "over that network's median step. The start of the curves is cut off."
    )
    ends = {row["row"]: row for row in rows}.values()
    spoken = "; ".join(
        f"{end['row']} ends at {end['quality']:.4g} after {end['step']} steps, "
        f"{end['flops']:.3g} {unit}s and {end['seconds']:.3g} s"
        for end in ends
    )
    task, name = records[0].task, _name(records[0])
    chart = alt.vconcat(*(_curve(rows, axis, titles[axis], name, known) for axis in titles), spacing=14)
    yield finish(f"{task}-scratch-curves", task, (variant,), caption, f"{variant}: {spoken}", chart, PART)


def _curve(rows: list[points.Point], axis: str, title: str, name: str, known: Looks) -> alt.Chart:
    """One panel, cut to the range after the first steps."""
    colour, _, dash = known.encodings(list(dict.fromkeys(row["row"] for row in rows)), stroke=3)
    scale = alt.Scale(domain=points.settled(rows), zero=False, nice=False)
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(clip=True, strokeWidth=1.8)
        .encode(
            alt.X(f"{axis}:Q", title=title, axis=alt.Axis(tickCount=5)),
            alt.Y("quality:Q", title=name, scale=scale, axis=alt.Axis(tickCount=5)),
            color=colour,
            strokeDash=dash,
        )
        .properties(width=WIDTH, height=190)
    )


def _rates(records: Sequence[ScratchRecord], variant: str, known: Looks) -> Iterator[Figure]:
    """Quality of the first seed against the learning rate; nothing where one rate was tried."""
    rows, lost = points.rates(records, variant)
    if len({row["rate"] for row in rows}) < 2:
        return
    rates = sorted({row["rate"] for row in rows})
    x = alt.X(
        "rate:Q",
        title="learning rate",
        scale=alt.Scale(type="log", nice=False, padding=12),
        axis=alt.Axis(values=rates, format="~g", labelOverlap=True),
    )
    y = alt.Y("quality:Q", title=_title(records[0]), scale=alt.Scale(zero=False, padding=12))
    colour, shape, dash = known.encodings(list(dict.fromkeys(row["row"] for row in rows)))
    base = alt.Chart(pd.DataFrame(rows))
    chosen = alt.datum.chosen
    chart = alt.layer(
        base.mark_line(strokeWidth=1.3).encode(x, y, color=colour, strokeDash=dash),
        base.mark_point(filled=False, size=55, opacity=1)
        .transform_filter(~chosen)
        .encode(x, y, color=colour, shape=shape),
        base.mark_point(filled=True, size=75, opacity=1)
        .transform_filter(chosen)
        .encode(x, y, color=colour, shape=shape),
    ).properties(width=WIDTH, height=260)
    caption = (
        f"{variant}: quality on the validation part against the learning rate, first seed, "
        f"{_budgets(rows)}. Filled: the rate chosen."
    )
    if lost:
        caption += f" Diverged: {text.listing(lost)}."
    spoken = "; ".join(f"{row['row']} {row['quality']:.4g} at {row['rate']:g}" for row in rows)
    task = records[0].task
    name = f"{task}-scratch-rates"
    yield finish(name, task, (variant,), caption, f"{variant}, by learning rate: {spoken}", chart, PART)


def _depth(
    records: Sequence[ScratchRecord], names: list[str], rows: list[points.Point], known: Looks
) -> Figure:
    """Quality against the number of replaced blocks beside the dense network's."""
    colour, shape, dash = known.encodings(list(dict.fromkeys(row["row"] for row in rows)))
    counts = sorted({row["replaced"] for row in rows})
    x = alt.X(
        "replaced:Q",
        title="blocks replaced",
        axis=alt.Axis(values=counts, format="d"),
        scale=alt.Scale(zero=False, nice=False, padding=14),
    )
    y = alt.Y("quality:Q", title=_title(records[0], "test"), scale=alt.Scale(zero=False, padding=12))
    base = alt.Chart(pd.DataFrame(rows))
    layers = [
        base.mark_rule(opacity=0.6).encode(
            alt.X("replaced:Q"), alt.Y("quality_low:Q"), alt.Y2("quality_high:Q"), color=colour
        ),
        base.mark_line(strokeWidth=1.5).encode(x, y, color=colour, strokeDash=dash),
        base.mark_point(filled=True, size=70, opacity=1).encode(x, y, color=colour, shape=shape),
    ]
    dense = _dense(records, names)
    if dense is not None:
        line = alt.Chart(pd.DataFrame([{"dense": dense}]))
        layers.append(line.mark_rule(strokeDash=[5, 4], color=GREY).encode(y=alt.Y("dense:Q")))
        label = line.mark_text(align="left", dx=4, dy=-6, fontSize=11, color=INK)
        layers.append(label.encode(y=alt.Y("dense:Q"), x=alt.value(0), text=alt.value(DENSE)))
    caption = (
        f"Quality against the number of replaced blocks ({text.listing(names)}), {_budgets(rows)}; bars: "
        "95 % Student-t intervals over seeds. Dashed: the dense network."
    )
    spoken = "; ".join(f"{row['row']} {row['quality']:.4g} with {row['replaced']} blocks" for row in rows)
    task = records[0].task
    chart = alt.layer(*layers).properties(width=WIDTH, height=260)
    return finish(f"{task}-scratch-depth", task, (names[0],), caption, f"by depth: {spoken}", chart, PART)


def _dense(records: Sequence[ScratchRecord], names: list[str]) -> float | None:
    dense = next((record for record in records if record.row == DENSE), None)
    for name in names if dense else []:
        for record, budget in points.shown(records, name):
            found = runs.dense_scores(records, record, name, budget)
            if found:
                return fmean(found.values())
    return None


def _budgets(rows: Sequence[points.Point]) -> str:
    """The budget of the rows drawn; dense has 1."""
    found = sorted({row["budget"] for row in rows if row["row"] != DENSE})
    return f"budget {text.listing([f'{budget:g}' for budget in found])}" if found else "dense alone"


def _title(record: ScratchRecord, part: str = "validation") -> str:
    return f"{_name(record)}, {part} ({_direction(record)})"


def _name(record: ScratchRecord) -> str:
    return record.quality_name.replace("_", " ")


def _direction(record: ScratchRecord) -> str:
    return "higher is better" if record.higher_is_better else "lower is better"
