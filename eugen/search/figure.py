"""Budget per block as a picture: each block's share of its dense MACs, coloured by method."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

from eugen.plan import Plan

COLOURS = (
    *("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee"),
    *("#aa3377", "#997700", "#004488", "#bb5566", "#bbbbbb"),
)
"""Paul Tol's bright scheme and four of his others, which the colour-blind can tell apart."""
ROW, BAR, LEFT, WIDTH, RIGHT = 18, 13, 230, 420, 60
"""Pixels: height of a row and of its bar, the names' column, the length of 100 %, the column of values."""
LONGEST_NAME = 34


@dataclass(frozen=True)
class Share:
    """A bar: a block's method, and its MACs over the dense block's."""

    block: str
    method: str
    macs_ratio: float
    output_effect: float


def shares(plan: Plan) -> list[Share]:
    """The bars of a plan of `choose`, in the order of the blocks.

    Raises:
        ValueError: the plan has no figures of its blocks.
    """
    blocks = plan.figures.get("blocks")
    if not blocks:
        raise ValueError("the plan has no figures of its blocks: eugen.search.choose makes one that has")
    return [
        Share(name, each["candidate"], each["macs_ratio"], each["output_effect"])
        for name, each in blocks.items()
    ]


def plan_svg(plan: Plan) -> str:
    """The picture as SVG text, legible from one block to some fifty."""
    bars = shares(plan)
    methods = list(dict.fromkeys(each.method for each in bars))
    colours = {method: COLOURS[i % len(COLOURS)] for i, method in enumerate(methods)}
    top = 30 + ROW * len(methods)
    width, height = LEFT + WIDTH + RIGHT, top + ROW * len(bars) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="18" font-size="13">{escape(_title(plan))}</text>',
    ]
    for place, method in enumerate(methods):
        y = 30 + ROW * place
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{BAR}" height="{BAR}" fill="{colours[method]}"/>')
        parts.append(f'<text x="{LEFT + BAR + 6}" y="{y + 11}">{escape(method)}</text>')
    parts += _axis(top, ROW * len(bars))
    for place, bar in enumerate(bars):
        parts += _bar(bar, top + ROW * place, colours[bar.method])
    return "\n".join([*parts, "</svg>"]) + "\n"


def _title(plan: Plan) -> str:
    target = ", ".join(f"{name} {value:g}" for name, value in plan.figures.get("target", {}).items())
    return f"Share of each block's dense MACs{f' (target: {target})' if target else ''}"


def _axis(top: int, length: int) -> list[str]:
    lines = []
    for percent in (0, 25, 50, 75, 100):
        x = LEFT + WIDTH * percent / 100
        lines.append(f'<line x1="{x:g}" y1="{top}" x2="{x:g}" y2="{top + length}" stroke="#dddddd"/>')
        lines.append(f'<text x="{x:g}" y="{top + length + 16}" text-anchor="middle">{percent} %</text>')
    return lines


def _bar(bar: Share, y: int, colour: str) -> list[str]:
    name = bar.block if len(bar.block) <= LONGEST_NAME else "…" + bar.block[1 - LONGEST_NAME :]
    length = WIDTH * min(1.0, bar.macs_ratio)
    return [
        f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(name) or "(the model)"}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR}" fill="{colour}">'
        f"<title>{escape(bar.block)}: {escape(bar.method)}, {bar.macs_ratio:.1%} of the MACs, "
        f"output change {bar.output_effect:.2g}</title></rect>",
        f'<text x="{LEFT + length + 5:.1f}" y="{y + 11}">{bar.macs_ratio:.0%}</text>',
    ]
