"""What all figures share: colours and shapes of the methods, fonts, and the way from a chart to an SVG."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import altair as alt
import vl_convert

from stages.reporting.inputs import DENSE, Inputs

WIDTH = 360
AXIS = alt.Axis(tickCount=6)
INK = "#000"
"""Replaced by the page's text colour; everything else must be legible on light and on dark."""
GREY = "#808890"
COLOURS = ["#3b82c4", "#d9640f", "#1f9d6b", "#c2559b", "#8a6fd1", "#1a93a8", "#a3762b", "#d6453d", GREY]
SHAPES = ["circle", "square", "triangle-up", "cross", "triangle-down", "triangle-right", "triangle-left"]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]
"""One for each round of the colours."""


@dataclass(frozen=True)
class Figure:
    """One figure: its file name without suffix, what it shows in words, specification and drawing."""

    name: str
    task: str
    caption: str
    alt: str
    spec: str
    svg: str


def encodings(
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
    where = (
        alt.Legend(orient="bottom", columns=3, symbolSize=70, symbolOpacity=1, columnPadding=14)
        if legend
        else None
    )
    return (
        alt.Color("method:N", scale=alt.Scale(domain=methods, range=colours), legend=where, title=None),
        alt.Shape("method:N", scale=alt.Scale(domain=methods, range=shapes), legend=where, title=None),
    )


def finish(
    stem: str, task: str, key: tuple[str, ...], caption: str, spoken: str, chart: alt.TopLevelMixin
) -> Figure:
    """A chart in the house's fonts, as specification and SVG, named by what it shows."""
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


def dashes(inputs: Inputs, drawn: list[str]) -> alt.StrokeDash:
    """A dash of its own for each round of the colours, so that lines of one colour differ."""
    others = [method for method in inputs.methods if method != DENSE]
    known = {method: DASHES[(i // len(COLOURS)) % len(DASHES)] for i, method in enumerate(others)}
    methods = [method for method in others if method in drawn]
    scale = alt.Scale(domain=methods, range=[known[method] for method in methods])
    return alt.StrokeDash("method:N", scale=scale, legend=None)
