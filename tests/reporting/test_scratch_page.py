"""The page of rows trained from scratch: figures, names, and what is provisional or has no meaning."""

from __future__ import annotations

import json
import re
from statistics import fmean
from xml.etree import ElementTree

import altair as alt
import pytest

from stages.report import build
from stages.reporting.drawing import COLOURS, looks
from stages.reporting.inputs import Inputs
from stages.reporting.page import render
from stages.reporting.scratch import figures, points
from stages.tracking.record import ScratchRecord

from . import factory, trained
from .conftest import REPOSITORY, Run

HOSTILE = "<script>alert('x')</script>&\"|"


def inputs_of(records: list[ScratchRecord]) -> Inputs:
    return Inputs(trained.scratch_params(), [], scratch=records)


def page(inputs: Inputs) -> str:
    return render(inputs, [], REPOSITORY / "reports" / "template.html")


def test_provisional_rows_are_counted_in_the_banner():
    html = page(inputs_of(trained.duel(0.0, seeds=1)))
    assert 'id="provisional"' in html and "12 of 12 rows are provisional" in html
    assert 'id="provisional"' not in page(inputs_of(trained.duel(0.0)))


def test_a_row_without_a_meaning_is_listed_with_its_reason():
    none = trained.scratch_record("prune", runs=[], costs=[], not_applicable="it prunes a trained block")
    unused = trained.scratch_record("fff", runs=[], costs=[])
    html = page(inputs_of([*trained.duel(0.0), none, unused]))
    assert "language / fff, from scratch" in html and "no variant of the task trained this row" in html
    assert "language / prune, from scratch" in html and "it prunes a trained block" in html
    assert "4 of 4 rows trained from scratch" in html


def test_figures_are_vega_lite_and_repeatable():
    inputs = inputs_of(trained.all_scratch())
    first, second = (list(figures.figures(inputs, "language")) for _ in range(2))
    assert [(f.name, f.spec) for f in first] == [(f.name, f.spec) for f in second]
    assert [f.name for f in first] == [
        *(f"language-scratch-curves-{name}" for name in ("base", "long", "half")),
        *(f"language-scratch-rates-{name}" for name in ("base", "long", "half")),
        "language-scratch-depth-half",
    ]
    for figure in first:
        alt.Chart.from_json(figure.spec)  # validates against the schema
        assert ElementTree.fromstring(figure.svg).tag.endswith("svg")
        assert not re.search(r"NaN|Infinity", figure.svg + figure.spec)
        assert figure.part == "scratch" and len(figure.alt) > 20
    axes = [panel["encoding"]["x"]["field"] for panel in json.loads(first[0].spec)["vconcat"]]
    assert axes == ["step", "flops", "seconds"]


def test_curves_are_means_over_seeds_with_flops_of_forward_and_backward():
    record = trained.scratch_record("narrow")
    found = [p for p in points.curves([record], "base") if p["step"] == 80]
    chosen = [r for r in record.runs if r.variant == "base" and r.chosen]
    at_80 = [next(point for point in run.curve if point.step == 80) for run in chosen]
    (point,) = found
    assert point["quality"] == pytest.approx(fmean(p.validation for p in at_80))
    cost = next(c for c in record.costs if (c.variant, c.budget) == ("base", point["budget"]))
    usual = sorted(cost.step_ms_dense)[len(cost.step_ms_dense) // 2]
    assert point["seconds"] == pytest.approx(80 * usual / 1000 / cost.training_speedup, rel=0.02)
    assert point["flops"] == 6 * record.costs[0].macs * 24 * 80


def test_the_depth_figure_joins_variants_of_one_training_alone():
    ((names, found),) = points.depths(trained.all_scratch())
    assert names == ["half", "base"]  # `long` trains for other steps
    assert {point["replaced"] for point in found} == {2, 4}
    assert points.depths(trained.all_scratch(variants=("base", "long"))) == []
    assert points.depths(trained.all_scratch(variants=("long", "half"))) == []  # depth and length differ


def test_no_two_rows_of_a_figure_look_alike_and_methods_keep_their_colours():
    methods, rows = list(factory.METHODS), list(trained.ROWS)
    known = looks(methods, rows).of
    assert len({colour for colour, _, _ in known.values()}) == len(rows)
    assert known["narrow"][0] == COLOURS[methods.index("narrow") - 1]
    many = looks([], [f"row{i}" for i in range(30)]).of
    assert len({(colour, tuple(dash)) for colour, _, dash in many.values()}) == len(many)


def test_hostile_names_are_escaped(run: Run):
    record = trained.scratch_record(HOSTILE, layer={"layer": "eugen"})
    runs_of = [r.model_copy(update={"extra": {HOSTILE: r.learning_rate}}) for r in record.runs]
    records = [trained.scratch_record("dense"), record.model_copy(update={"runs": runs_of})]
    failure = factory.failure("language", HOSTILE, stage="scratch").model_copy(update={"error": HOSTILE})
    inputs = Inputs(trained.scratch_params(), [], scratch=records, scratch_failures=[failure])
    build(inputs, run.root / "reports")
    html = (run.root / "reports" / "report.html").read_text()
    assert "&lt;script&gt;alert" in html and "Not trained: &lt;script" in html
    assert not re.search(r"<script", html, re.IGNORECASE)


def test_a_task_with_trainings_alone_has_its_section_and_its_failures():
    failures = [factory.failure("language", "snnk", stage="scratch")]
    inputs = Inputs(trained.scratch_params(), [], scratch=trained.duel(0.05), scratch_failures=failures)
    html = page(inputs)
    assert '<section id="task-1"' in html and "language / snnk" in html
    assert "4 of 5 rows trained from scratch" in html and "Not trained: snnk" in html
    assert "No cell finished" not in html
    assert "training_speedup" in html  # the glossary knows the columns of scratch.csv
