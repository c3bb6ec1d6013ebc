"""Fronts against time, MACs and parameters: the right rows at the right costs, and what is missing."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import pytest

from stages.reporting import budget_curves, front_figures, fronts, points
from stages.reporting.inputs import Inputs
from stages.reporting.intervals import mean_interval
from stages.tracking.record import CellRecord

from . import factory

undrawn = pytest.mark.usefixtures("no_svg")
TIMINGS = [("cpu", "float32", 1), ("cpu", "float32", 32)]


def of(task: str, *methods: str, **change: Any) -> list[CellRecord]:
    return [factory.cell(task, method, **change) for method in methods]


def inputs(records: list[CellRecord]) -> Inputs:
    return Inputs(factory.params(), records)


def drawn(records: list[CellRecord]):
    (figure,) = front_figures.figures(inputs(records), records[0].task)
    return figure


def axis(records: list[CellRecord], name: str) -> fronts.Axis:
    return next(axis for axis in fronts.axes(records, TIMINGS) if axis.name == name)


def row(cost: float, quality: float) -> fronts.Row:
    return {"cost": cost, "quality": quality}


@pytest.mark.parametrize("higher", [True, False])
def test_the_front_is_what_no_other_row_beats(higher: bool):
    """Against the definition, over all orders of the rows."""
    sign = 1 if higher else -1
    rows = [row(0.3, 5), row(0.5, 7), row(0.5, 6), row(0.7, 6.5), row(0.9, 9), row(1.0, 8), row(1.1, 9)]
    rows = [r | {"quality": sign * r["quality"]} for r in rows]
    for order in itertools.islice(itertools.permutations(rows), 0, None, 97):
        found = fronts.front(list(order), higher)
        assert [(r["cost"], sign * r["quality"]) for r in found] == [(0.3, 5), (0.5, 7), (0.9, 9)]


def test_costs_that_differ_by_rounding_are_one_cost():
    rows = [row(0.297, 0.8), row(0.299, 0.9), row(0.2, 0.7)]
    assert fronts.front(rows, True) == [rows[2], rows[1]]
    assert fronts.front([row(0.297, 0.8), row(0.297 + 2 * fronts.NEAR, 0.9)], True) != [rows[1]]


@undrawn
def test_time_is_the_inverse_of_the_speed_up_in_the_same_precision_at_the_same_batch():
    record = factory.cell("embedding", "prune")
    in_int8 = [
        x.model_copy(update={"dtype": "int8", "speedup": 9.0, "speedup_high": 9.5}) for x in record.latencies
    ]
    record = record.model_copy(update={"latencies": [*record.latencies, *in_int8]})
    records = [factory.cell("embedding", "dense"), record]
    for _, dtype, batch in TIMINGS:
        (own,) = [x for x in record.latencies if (x.dtype, x.batch) == (dtype, batch)]
        found = fronts.rows(records, axis(records, f"time at batch {batch}"))
        costs = {(r["cost"], r["cost_low"], r["cost_high"]) for r in found if r["method"] == "prune"}
        assert costs == {(1 / own.speedup, 1 / own.speedup_high, 1 / own.speedup_low)}
    assert points.timings(records) == TIMINGS
    assert len(drawn(records).spec.split('"int8"')) == 1


def test_costs_are_those_of_the_record_and_dense_stands_at_1():
    dense = factory.cell("embedding", "dense")  # its control is not exactly 1
    dense = dense.model_copy(
        update={"latencies": [x.model_copy(update={"speedup": 1.04}) for x in dense.latencies]}
    )
    records = [dense, factory.cell("embedding", "prune")]
    (cost,) = records[1].costs
    for name, ratio in (
        ("MACs", cost.ffn_macs / cost.ffn_macs_dense),
        ("parameters", cost.params / cost.params_dense),
    ):
        found = fronts.rows(records, axis(records, name))
        assert {r["cost"] for r in found if r["method"] == "prune"} == {ratio}
    for known in fronts.axes(records, TIMINGS):
        assert {r["cost"] for r in fronts.rows(records, known) if r["method"] == "dense"} == {1.0}


def test_quality_has_its_interval_and_each_stage_competes_with_its_like():
    records = [factory.cell("vision", "dense"), factory.tuned(factory.cell("vision", "prune"), (0.3,))]
    found = fronts.rows(records, axis(records, "MACs"))
    prune = {(r["budget"], r["stage"]): r for r in found if r["method"] == "prune"}
    assert set(prune) == {(0.15, "transfer"), (0.3, "transfer"), (0.3, "finetuned")}
    values = [s.quality_finetuned for s in records[1].seeds if s.quality_finetuned is not None]
    interval = mean_interval(values)
    own = prune[0.3, "finetuned"]
    assert interval is not None
    assert (own["quality_low"], own["quality_high"]) == pytest.approx((interval.low, interval.high))
    last = fronts.of_stage(found, "final")
    assert [(r["budget"], r["stage"]) for r in last if r["method"] == "prune"] == [
        (0.15, "transfer"),
        (0.3, "finetuned"),
    ]
    alone = fronts.of_stage(found, "transfer")
    assert all(r["stage"] != "finetuned" for r in alone) and any(r["method"] == "dense" for r in alone)


def test_panels_share_the_rows_the_looks_and_the_scale_of_quality():
    records = of("embedding", *reversed(factory.METHODS))
    figure = drawn(records)
    assert figure.name == "embedding-fronts-cpu-float32" and figure.wide
    assert ElementTree.fromstring(figure.svg).tag.endswith("svg")
    (line,) = json.loads(figure.spec)["vconcat"]
    titles, domains, colours = [], [], []
    for panel in line["hconcat"]:
        dots = panel["layer"][-1]["encoding"]
        titles.append(dots["x"]["title"])
        domains.append(dots["y"]["scale"]["domain"])
        colours.append((dots["color"]["scale"], dots["shape"]["scale"]))
    assert titles == [
        f"{cost} / dense" for cost in ("time, batch 1", "time, batch 32", "block MACs", "parameters")
    ]
    low, high = domains[0]
    every = fronts.rows(records, axis(records, "MACs"))
    assert low <= min(r["quality"] for r in every) and high >= max(r["quality"] for r in every)
    assert all(domain == domains[0] for domain in domains) and all(look == colours[0] for look in colours)
    assert "cpu in float32" in figure.caption and "provisional" not in figure.caption.lower()


@undrawn
@pytest.mark.parametrize(
    ("higher", "best"), [(True, "prune 0.3, dense"), (False, "eugen 0.3")], ids=["higher", "lower"]
)
def test_the_caption_names_the_front(higher: bool, best: str):
    """Both rows cost the same MACs; the dense network has the largest quality of all."""
    change = {"higher_is_better": higher}
    records = [record.model_copy(update=change) for record in of("embedding", "dense", "prune", "eugen")]
    assert re.search(rf"On the front of [^:]*MACs and parameters: {best}\.", drawn(records).caption)


@undrawn
def test_a_row_without_a_time_stands_beside_the_other_costs():
    records = [*of("embedding", "dense", "prune"), *of("embedding", "eugen", latencies=[])]
    figure = drawn(records)
    assert "Not recorded of eugen: time at batch 1 and time at batch 32." in figure.caption
    assert {"eugen"} == {r["method"] for r in fronts.rows(records, axis(records, "MACs"))} - {
        "dense",
        "prune",
    }
    assert "eugen" not in {r["method"] for r in fronts.rows(records, axis(records, "time at batch 1"))}


@undrawn
def test_without_any_time_two_panels_remain_and_without_any_cost_none():
    untimed = of("embedding", "dense", "prune", latencies=[])
    figure = drawn(untimed)
    assert figure.name == "embedding-fronts" and "Time:" not in figure.caption
    bare = of("embedding", "dense", "prune", latencies=[], costs=[])
    for records in (bare, of("embedding", "dense"), []):
        assert list(front_figures.figures(inputs(records), "embedding")) == []
    empty = [*of("embedding", "dense"), factory.cell("embedding", "prune", seeds=[], costs=[], latencies=[])]
    assert list(front_figures.figures(inputs(empty), "embedding")) == []


@undrawn
def test_rows_in_a_precision_of_their_own_have_no_time():
    layer = {"layer": "ffsplit", "of": {"layer": "int8", "of": {"layer": "dense"}}}
    records = [*of("embedding", "dense", "prune"), factory.cell("embedding", "quick", layer=layer)]
    timed = fronts.rows(records, axis(records, "time at batch 1"))
    assert {r["method"] for r in timed} == {"dense", "prune"}
    said = drawn(records).caption
    assert "Without a time, for they compute in another precision: quick." in said
    assert "Not recorded" not in said


@undrawn
@pytest.mark.parametrize(
    ("marked", "said"),
    [(["prune"], "Provisional: prune 0.15 and 0.3."), (["dense", "prune"], "All rows are provisional.")],
)
def test_provisional_rows_are_named(marked: list[str], said: str):
    records = [factory.cell("vision", m, provisional=m in marked) for m in ("dense", "prune")]
    assert drawn(records).caption.endswith(said)
    (curve,) = budget_curves.figures(inputs(records), "vision")
    assert curve.caption.endswith(said)


@undrawn
def test_times_of_different_machines_are_said_not_to_compare():
    other = factory.environment(fingerprint="zzz")
    records = [*of("embedding", "dense", "prune"), factory.cell("embedding", "eugen", environment=other)]
    assert "Timed on 2 kinds of machine" in drawn(records).caption
    assert "kinds of machine" not in drawn(records[:2]).caption


@undrawn
def test_dense_is_drawn_without_a_dense_cell():
    figure = drawn(of("embedding", "prune"))
    assert "dense 1 at time at batch 1 1, time at batch 32 1, MACs 1, parameters 1" in figure.alt


def errors(method: str, scale: Callable[[float], float]) -> CellRecord:
    """Lower is better."""
    record = factory.cell("vision", method)
    seeds = [
        s.model_copy(
            update={"quality_transfer_only": scale(s.budget) * (1 + 0.05 * s.seed), "quality_finetuned": None}
        )
        for s in record.seeds
    ]
    return record.model_copy(update={"seeds": seeds, "higher_is_better": False})


@pytest.mark.parametrize("figures", [front_figures.figures, budget_curves.figures])
def test_errors_far_apart_get_a_logarithmic_axis_without_what_lies_far_off(figures: Callable):
    records = [
        errors("dense", lambda _: 0.0),
        errors("prune", lambda budget: 0.001 / budget**3),
        errors("eugen", lambda budget: 0.002 / budget**3),
        errors("wrong", lambda _: 1e4),
    ]
    (figure,) = figures(inputs(records), "vision")
    assert "Far off the scale, in the table: wrong and dense." in figure.caption
    assert '"log"' in figure.spec and not re.search(r"NaN|Infinity", figure.svg + figure.spec)
    assert '"wrong"' not in figure.spec.split('"datasets"')[1]
    close = [errors("dense", lambda _: 0.5), errors("prune", lambda budget: 1 / budget)]
    (figure,) = figures(inputs(close), "vision")
    assert '"log"' not in figure.spec and "lower is better" in figure.spec
