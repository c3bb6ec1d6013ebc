"""Curves over the budget, and how far a figure's axes reach."""

from __future__ import annotations

import json

import pytest

from stages.reporting import budget_curves, scales
from stages.reporting.inputs import Inputs
from stages.reporting.intervals import mean_interval

from . import factory


@pytest.mark.parametrize("log", [False, True])
def test_wide_intervals_do_not_press_the_points_together(log: bool):
    rows = [
        {"quality": q, "quality_low": q / wide, "quality_high": q * wide}
        for q, wide in ((1.0, 1.1), (3.0, 500))
    ]
    low, high = scales.reach(rows, "quality", log)
    assert 0 < low < 1 and 3 < high < 5
    (flat,) = [{"quality": 2.0, "quality_low": 2.0, "quality_high": 2.0}]
    low, high = scales.reach([flat], "quality", log)
    assert low < 2 < high


def test_a_curve_has_the_means_and_intervals_of_its_stage():
    record = factory.tuned(factory.cell("vision", "prune"), (0.15, 0.3))
    rows = budget_curves.points([factory.cell("vision", "dense"), record], "finetuned")
    assert [(r["method"], r["budget"]) for r in rows] == [("prune", 0.15), ("prune", 0.3)]
    for point in rows:
        own = [s.quality_finetuned for s in record.seeds if s.budget == point["budget"]]
        interval = mean_interval([value for value in own if value is not None])
        assert interval is not None
        assert [point[k] for k in ("quality", "quality_low", "quality_high")] == pytest.approx(
            [interval.mean, interval.low, interval.high]
        )


@pytest.mark.usefixtures("no_svg")
@pytest.mark.parametrize(
    ("budgets", "panels"), [((0.15, 0.3), 2), ((0.3,), 1), ((), 1)], ids=["both", "one budget", "transfer"]
)
def test_a_stage_has_a_panel_where_a_method_has_two_budgets(budgets: tuple[float, ...], panels: int):
    records = [
        factory.cell("vision", "dense"),
        factory.tuned(factory.cell("vision", "prune"), budgets),
    ]
    (figure,) = budget_curves.figures(Inputs(factory.params(), records), "vision")
    found = json.loads(figure.spec)["hconcat"]
    assert [p["title"]["text"] for p in found] == ["after transfer alone", "after fine-tuning"][:panels]
    assert figure.wide == (panels == 2)


@pytest.mark.usefixtures("no_svg")
def test_one_budget_has_no_curve_and_no_word_of_it():
    records = [factory.cell("embedding", method) for method in ("dense", "prune", "eugen")]
    assert list(budget_curves.figures(Inputs(factory.params(), records), "embedding")) == []
    lone = factory.cell("vision", "eugen")  # beside curves, a row of one budget is a point
    lone = lone.model_copy(update={"seeds": [s for s in lone.seeds if s.budget == 0.3]})
    rows = budget_curves.points([factory.cell("vision", "prune"), lone], "transfer")
    assert [(r["method"], r["budget"]) for r in rows][-1] == ("eugen", 0.3) and len(rows) == 3


def test_rows_at_the_dense_cost_are_no_part_of_a_curve():
    prune = factory.cell("vision", "prune")
    seeds = [s.model_copy(update={"budget": 1.0}) for s in prune.seeds if s.budget == 0.3]
    int8 = prune.model_copy(update={"method": "int8", "seeds": seeds})
    rows = budget_curves.points([factory.cell("vision", "dense"), prune, int8], "transfer")
    assert {r["method"] for r in rows} == {"prune"}


def test_no_method_without_a_logarithm_is_on_a_logarithmic_scale():
    """A network without an error before it was fine-tuned has one afterwards."""
    values = {"dense": (0.0, 0.5), "prune": (0.4, 0.8), "exact": (1e-5, 2e-5), "once": (1e-5, 0.5)}
    rows = [{"method": method, "quality": value} for method, own in values.items() for value in own]
    assert sorted(scales.off_scale(rows)) == ["dense", "exact"]
