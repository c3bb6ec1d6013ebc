"""The picture of a plan."""

from __future__ import annotations

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from eugen import Plan, PruneConfig
from eugen.search import plan_svg, shares

SVG = "{http://www.w3.org/2000/svg}"


def plan(count: int) -> Plan:
    methods = ["prune", "dense", "prune + linear", "a <method> & more"]
    blocks = {
        f"encoder.layer.{i}.a_rather_long_name_of_a_module.<mlp>": {
            "candidate": methods[i % 4],
            "macs_ratio": (i + 1) / count,
            "output_effect": 0.01 * i,
        }
        for i in range(count)
    }
    return Plan({"x": PruneConfig(budget=0.3)}, {"target": {"macs": 0.3}, "blocks": blocks})


@pytest.mark.parametrize("count", [1, 6, 48])
def test_one_legible_bar_for_each_block(count):
    root = ElementTree.fromstring(plan_svg(plan(count)))
    bars = [rect for rect in root.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    widths = [float(bar.get("width", "")) for bar in bars]
    assert widths == pytest.approx([widths[-1] * (i + 1) / count for i in range(count)], abs=0.1)
    places = [float(bar.get("y", "")) for bar in bars]
    assert all(below - above >= 13 for above, below in pairwise(places))
    assert float(root.get("height", "")) > places[-1] + 13
    assert float(root.get("width", "")) > max(float(bar.get("x", "")) for bar in bars) + max(widths)
    assert len({bar.get("fill") for bar in bars}) == min(4, count)
    names = [text.text for text in root.iter(f"{SVG}text") if (text.text or "").endswith("<mlp>")]
    assert len(names) == count and max(map(len, names)) <= 34


def test_the_data_behind_it():
    bars = shares(plan(6))
    assert [bar.macs_ratio for bar in bars] == pytest.approx([(i + 1) / 6 for i in range(6)])
    assert bars[1].method == "dense"


def test_a_plan_without_figures():
    with pytest.raises(ValueError, match="no figures of its blocks"):
        shares(Plan({"x": PruneConfig(budget=0.3)}))
