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
_LEGEND = alt.Legend(orient="bottom", columns=2, symbolSize=70, symbolOpacity=1, columnPadding=14)


@dataclass(frozen=True)
class Figure:
    """One figure: its file name without suffix, what it shows in words, specification and drawing."""

    name: str
    task: str
    caption: str
    alt: str
    spec: str
    svg: str
    part: str = "transfer"
    """The part of the task's section where it stands: `transfer` or `scratch`."""
    wide: bool = False
    """Panels side by side, over the whole width of the page."""


@dataclass(frozen=True)
class Looks:
    """Colour, shape and dash of every row, in the order of the legend."""

    of: dict[str, tuple[str, str, list[int]]]

    def encodings(
        self, drawn: list[str], stroke: float | None = None
    ) -> tuple[alt.Color, alt.Shape, alt.StrokeDash]:
        """The looks of the rows that a figure draws, with one legend; `stroke` is its lines' width."""
        names = [name for name in self.of if name in drawn]
        colours, shapes, dashes = (list(column) for column in zip(*(self.of[n] for n in names), strict=True))
        legend = _LEGEND.copy()
        if stroke is not None:
            legend.symbolStrokeWidth = stroke
        return (
            alt.Color("row:N", scale=alt.Scale(domain=names, range=colours), legend=legend, title=None),
            alt.Shape("row:N", scale=alt.Scale(domain=names, range=shapes), legend=legend, title=None),
            alt.StrokeDash("row:N", scale=alt.Scale(domain=names, range=dashes), legend=legend, title=None),
        )


def looks(methods: list[str], rows: list[str]) -> Looks:
    """Rows that share a method's name share its colour; the others take colours that no row has yet."""
    others = [method for method in methods if method != DENSE]
    taken: dict[str, int] = {}
    for row in dict.fromkeys(rows):
        if row in others and others.index(row) % len(COLOURS) not in taken.values():
            taken[row] = others.index(row) % len(COLOURS)
    free = [i for i in range(len(COLOURS)) if i not in taken.values()]
    for row in (row for row in dict.fromkeys(rows) if row not in taken and row != DENSE):
        taken[row] = free.pop(0) if free else len(taken)  # beyond the colours: other dashes
    known: dict[str, tuple[str, str, list[int]]] = {DENSE: (INK, "diamond", DASHES[0])}
    for row in (row for row in dict.fromkeys(rows) if row != DENSE):
        i = taken[row]
        known[row] = (
            COLOURS[i % len(COLOURS)],
            SHAPES[i % len(SHAPES)],
            DASHES[(i // len(COLOURS)) % len(DASHES)],
        )
    return Looks(known)


def encodings(
    inputs: Inputs, drawn: list[str] | None = None, legend: bool = True, columns: int = 2
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
    where = _LEGEND.copy() if legend else None
    if where is not None:
        where.columns, where.columnPadding = columns, 2 * _LEGEND.columnPadding if columns > 2 else 14
    return (
        alt.Color("method:N", scale=alt.Scale(domain=methods, range=colours), legend=where, title=None),
        alt.Shape("method:N", scale=alt.Scale(domain=methods, range=shapes), legend=where, title=None),
    )


def finish(
    stem: str,
    task: str,
    key: tuple[str, ...],
    caption: str,
    spoken: str,
    chart: alt.TopLevelMixin,
    part: str = "transfer",
    wide: bool = False,
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
            labelFlush=False,  # else the first and last labels run into their neighbours
        ),
        view=alt.ViewConfig(stroke=None),
        legend=alt.LegendConfig(labelFontSize=13, labelLimit=WIDTH // 2),
    )
    spec = chart.to_dict()
    return Figure(
        name,
        task,
        caption,
        spoken,
        json.dumps(spec, indent=1, sort_keys=True) + "\n",
        _draw(spec, name),
        part,
        wide,
    )


def _draw(spec: dict[str, Any], name: str) -> str:
    """The SVG, with ids that stay unique when several stand in one page, and equal when drawn again."""
    svg = vl_convert.vegalite_to_svg(spec)
    known: dict[str, int] = {}  # Vega numbers clip paths through the whole process
    return re.sub(
        r'(id="|url\(#|href="#)([^")]+)',
        lambda found: f"{found[1]}{name}-{known.setdefault(found[2], len(known))}",
        svg,
    )


def dashes(inputs: Inputs, drawn: list[str]) -> alt.StrokeDash:
    """A dash of its own for each round of the colours, so that lines of one colour differ."""
    others = [method for method in inputs.methods if method != DENSE]
    known = {method: DASHES[(i // len(COLOURS)) % len(DASHES)] for i, method in enumerate(others)}
    methods = [method for method in others if method in drawn]
    scale = alt.Scale(domain=methods, range=[known[method] for method in methods])
    return alt.StrokeDash("method:N", scale=scale, legend=None)
