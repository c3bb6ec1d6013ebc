"""The report of a task whose quality is an error, the mean over settings: figures, tables, ledger."""

from __future__ import annotations

import json
import re
from statistics import fmean

import pytest

from stages.reporting import points, tables, verdicts
from stages.reporting.ablations import order
from stages.reporting.drawing import COLOURS, DASHES, SHAPES
from stages.reporting.figures import figures
from stages.reporting.findings import condense
from stages.reporting.inputs import Inputs
from stages.reporting.intervals import Interval, mean_interval
from stages.reporting.kernels import quantisation, synthetic
from stages.reporting.outcomes import of_cells
from stages.reporting.page import render
from stages.reporting.settings import settings_of
from stages.reporting.study import study_tables
from stages.reporting.text import difference, number, quality
from stages.tracking.record import CellRecord, Omission

from . import factory
from .conftest import REPOSITORY

EUGEN = {"layer": "eugen", "order": 2}


def row(method: str, layer: dict, strength: float = 1.0, **change) -> CellRecord:
    return factory.kernel_cell(method, strength=strength, params={"method": layer}, **change)


def page(inputs: Inputs) -> str:
    return render(inputs, [], REPOSITORY / "reports" / "template.html")


def test_a_task_with_settings_has_a_sweep_for_each_in_place_of_the_fit():
    records = [factory.kernel_cell(method) for method in ("dense", "low_rank", "eugen")]
    drawn = figures(Inputs(factory.params(), records))
    shared = ["kernel-fronts-cpu-float32", "kernel-budgets"]
    sweeps = [f"kernel-sweep-{name}" for name in sorted(factory.SETTINGS)]
    assert [figure.name for figure in drawn] == [*shared, *sweeps, "kernel-speed-cpu-float32-batch128"]
    for figure in drawn[2:-1]:
        scales = re.findall(r'"type": "(log|linear)"', figure.spec)
        assert scales and set(scales) == {"log"}
        axes = [panel["layer"][0]["encoding"]["x"]["field"] for panel in json.loads(figure.spec)["vconcat"]]
        assert axes == ["features", "macs"]
        assert not re.search(r"NaN|Infinity", figure.svg)


def test_a_sweep_draws_means_bands_features_and_costs_of_rows_below_the_dense_cost():
    record = factory.kernel_cell("eugen")
    found = points.sweep([factory.kernel_cell("dense"), record], "relu.gaussian")
    assert [point["budget"] for point in found] == list(factory.SWEEP)
    for point in found:
        results = [result for result in record.seeds if result.budget == point["budget"]]
        own = mean_interval([result.extra_transfer_only["relative_mse.relu.gaussian"] for result in results])
        assert own is not None
        assert (point["quality"], point["quality_low"], point["quality_high"]) == (
            own.mean,
            own.low,
            own.high,
        )
        assert point["features"] == results[0].num_features[0]
        assert point["macs"] == pytest.approx(point["budget"])


def test_a_band_never_reaches_0_where_a_logarithm_would_end():
    results = factory.kernel_cell("eugen", budgets=(0.4,)).seeds[:2]
    name = "relative_mse.relu.gaussian"
    pairs = zip(results, (0.1, 0.9), strict=True)
    seeds = [result.model_copy(update={"extra_transfer_only": {name: value}}) for result, value in pairs]
    (point,) = points.sweep([factory.kernel_cell("eugen", budgets=(0.4,), seeds=seeds)], "relu.gaussian")
    assert point["quality_low"] == pytest.approx(0.05)


def test_every_row_of_a_long_list_looks_like_no_other():
    looks = {(i % len(COLOURS), i % len(SHAPES), i // len(COLOURS)) for i in range(30)}
    assert len({look[:2] for look in looks}) == 30
    assert len({(colour, turn % len(DASHES)) for colour, _, turn in looks}) == 30


def test_a_long_list_of_speeds_shows_the_ends_of_each_sweep():
    records = [factory.kernel_cell(f"row{i}") for i in range(12)]
    timing = points.timings(records)[0]
    kept, left_out = points.ends(points.speeds(records, timing))
    assert left_out and {point["budget"] for point in kept} == {0.05, 0.8} and len(kept) == 24
    few = points.speeds(records[:2], timing)
    assert points.ends(few) == (few, False)


def test_the_settings_table_ranks_by_the_least_error():
    records = [row("good", EUGEN, 3.0), row("bad", {"layer": "snnk"}, 0.5)]
    names = settings_of(records)
    assert names == sorted(factory.SETTINGS)
    table = tables.by_setting(records, names, 0.4)
    assert [line[0] for line in table.rows] == ["good", "bad"]
    assert len(table.columns) == 3 + len(names) == len(table.rows[0])
    own = [r.extra_transfer_only["relative_mse.gelu.gaussian"] for r in records[0].seeds if r.budget == 0.4]
    assert table.rows[0][3] == number(fmean(own))


def test_settings_are_in_their_own_table_alone():
    records = [factory.kernel_cell("eugen"), factory.kernel_cell("snnk")]
    assert not any("relu" in column for column in tables.quality(records).columns)
    captions = [table.caption for table in tables.of_task(records)]
    assert sum("each setting" in caption for caption in captions) == len(factory.SWEEP)
    assert not any("Held-out R²" in caption for caption in captions)


def test_a_long_table_is_folded_and_a_short_one_is_not():
    html = page(Inputs(factory.params(), [factory.kernel_cell(f"row{i}") for i in range(12)]))
    assert re.search(r"<details><summary>Whole-model latency[^<]*<span class=\"quiet\">\(60 rows\)", html)
    assert "<details><summary>Whole-model" not in page(Inputs(factory.params(), [factory.kernel_cell("row")]))


def test_the_headline_of_a_sweep_tells_its_ends():
    records = [factory.kernel_cell(m) for m in ("dense", "low_rank", "eugen")]
    said = " ".join(verdicts.headline(Inputs(factory.params(), records), "kernel"))
    assert "Budget 0.05, after" in said and "Budget 0.8, after" in said and "Budget 0.2, after" not in said
    assert "budgets 0.05 and 0.8; 0.1, 0.2 and 0.4 are in the tables" in said


def test_what_does_not_apply_stands_in_one_table_with_its_reasons():
    left_out = [Omission(budget=0.05, reason="too small: the least is 0.079")]
    records = [factory.kernel_cell("eugen", omitted=left_out)]
    inputs = Inputs(factory.params(), records, [], None, [factory.not_applicable("kernel", "linear")])
    html = page(inputs)
    section = html[html.index('<section id="omissions"') : html.index('<section id="conditions"')]
    cells = re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", section)
    assert cells[3:5] == ["kernel / linear", "all"] and "no output matrix" in cells[5]
    assert cells[6:] == ["kernel / eugen", "0.05", "too small: the least is 0.079"]
    assert "1 of 1 cells finished; 1 more" in html
    assert "omissions" not in page(Inputs(factory.params(), [factory.kernel_cell("eugen")]))


def test_the_claim_is_decided_by_the_mean_over_the_sweep():
    weak = [row("snnk", {"layer": "snnk"}, 0.5), row("low_rank", {"layer": "low_rank"}, 2.0)]
    above, below = synthetic([row("eugen", EUGEN), *weak])
    assert above.verdict == "reproduced" and "against snnk: better" in above.ours
    assert "of 30 settings × budgets 30 better, 0 worse" in above.ours and above.ours.startswith("−")
    assert below.verdict == "not reproduced" and "0 better, 30 worse" in below.ours
    assert "n=4" in below.conditions and "kernel, eugen, mean of budgets" in below.conditions
    (line,) = condense([above, below])
    assert line.verdict == "not reproduced" and line.ours == f"{above.ours}; {below.ours}"


def test_the_claim_compares_only_budgets_that_both_rows_have():
    short = row("snnk", {"layer": "snnk"}, 0.5, budgets=(0.4, 0.8))
    (finding,) = synthetic([row("eugen", EUGEN), short])
    assert "mean of budgets 0.4 and 0.8" in finding.conditions and "of 12 settings" in finding.ours
    apart = row("snnk", {"layer": "snnk"}, 0.5, budgets=(0.3,))
    assert [f.verdict for f in synthetic([row("eugen", EUGEN), apart])] == ["open"]


def test_the_claim_is_open_with_one_repeat_or_without_rivals():
    eugen, snnk = row("eugen", EUGEN), row("snnk", {"layer": "snnk"}, 0.5)
    single = [r.model_copy(update={"seeds": [s for s in r.seeds if s.seed == 0]}) for r in (eugen, snnk)]
    assert [finding.verdict for finding in synthetic(single)] == ["open"]
    assert [finding.verdict for finding in synthetic([eugen])] == ["open"]


@pytest.mark.parametrize(("strength", "verdict"), [(3.0, "not reproduced"), (0.5, "reproduced")])
def test_a_higher_order_refutes_that_three_is_enough_only_by_being_better(strength, verdict):
    three, four = row("three", EUGEN | {"order": 3}), row("four", EUGEN | {"order": 4}, strength)
    assert {finding.verdict for finding in order([*of_cells([three, four])])} == {verdict}
    assert [finding.verdict for finding in order([*of_cells([three, row("two", EUGEN)])])] == ["open"]


def test_quantisation_is_compared_in_quality_and_speed():
    int8 = row("int8", {"layer": "int8"}, 20.0, budgets=(1.0,))
    eugen = row("eugen", EUGEN)
    (finding,) = quantisation([eugen, int8])
    ours = next(x for x in eugen.latencies if x.budget == 0.8)
    assert finding.verdict == "measured" and "worse" in finding.ours
    assert f"speed-up {ours.speedup:.2f}× [" in finding.ours
    assert f"against {int8.latencies[0].speedup:.2f}× [" in finding.ours
    assert "eugen at budget 0.8 against int8 at 1" in finding.conditions


def test_the_readme_shows_the_largest_budget_of_a_long_sweep_and_the_dense_cost_rows_on_top():
    records = [factory.kernel_cell("dense"), row("eugen", EUGEN), row("snnk", {"layer": "snnk"}, 0.5)]
    records.append(row("int8", {"layer": "int8"}, 20.0, budgets=(1.0,)))
    shown, folded = study_tables(records).split("<summary>All budgets</summary>")
    assert re.findall(r"^\| (\w+) \| ([\d.]+) \|", shown, re.MULTILINE) == [
        ("dense", "1"),
        ("int8", "1"),
        ("eugen", "0.8"),
        ("snnk", "0.8"),
    ]
    assert "| method | 0.05 | 0.1 | 0.2 | 0.4 | 0.8 |" in folded
    assert re.findall(r"^\| (eugen|snnk|int8) \|", folded, re.MULTILINE) == ["eugen", "snnk"]


def test_the_budget_that_most_rows_have_leads_where_only_some_are_swept():
    """The controls have one budget, the finalists five: their largest must not push the controls out."""
    controls = [
        row("prune", {"layer": "prune"}, budgets=(0.2,)),
        row("narrow", {"layer": "narrow"}, budgets=(0.2,)),
    ]
    records = [factory.kernel_cell("dense"), row("eugen", EUGEN), *controls]
    shown, folded = study_tables(records).split("<summary>All budgets</summary>")
    assert set(re.findall(r"^\| (\w+) \| ([\d.]+) \|", shown, re.MULTILINE)) == {
        ("dense", "1"),
        *((name, "0.2") for name in ("eugen", "prune", "narrow")),
    }
    assert re.findall(r"^\| (eugen|prune|narrow) \|", folded, re.MULTILINE) == ["eugen"]
    said = " ".join(verdicts.headline(Inputs(factory.params(), records), "kernel"))
    assert "Sentences are for budgets 0.05, 0.2 and 0.8; 0.1 and 0.4 are in the tables." in said


def test_a_budget_with_a_single_seed_stays_out_of_the_table_of_all_budgets():
    whole, alone = row("snnk", {"layer": "snnk"}), row("eugen", EUGEN)
    kept = [seed for seed in alone.seeds if seed.budget != 0.1 or seed.seed == 0]
    folded = study_tables([whole, alone.model_copy(update={"seeds": kept})]).split("All budgets")[1]
    (line,) = re.findall(r"^\| eugen \|.*", folded, re.MULTILINE)
    assert [cell == "–" for cell in line.split(" | ")[1:]] == [False, True, False, False, False]


def test_small_errors_keep_their_digits():
    assert number(8.2e-14) == "8e-14"
    assert quality(Interval(0.000234, 0.0000123, 10)) == "0.000234 ± 0.000012"
    assert quality(Interval(0.0234, 0.00123, 10)) == "0.0234 ± 0.0012"
    assert difference(Interval(-0.0000234, 0.0000123, 10)) == "−0.0000234 [−0.0000357, −0.0000111]"
    assert difference(Interval(-0.0004, 0.0021, 10)) == "−0.0004 [−0.0025, +0.0017]"


def test_a_row_far_off_the_scale_is_named_and_not_drawn():
    """An estimate from weights alone is wrong by thousands: it would press all other lines into one."""
    near = row("far", EUGEN)
    seeds = [
        seed.model_copy(
            update={"extra_transfer_only": {k: 1e4 * v for k, v in seed.extra_transfer_only.items()}}
        )
        for seed in near.seeds
    ]
    far = near.model_copy(update={"seeds": seeds})
    records = [
        row("dense", {"layer": "dense"}),
        row("eugen", EUGEN),
        row("snnk", {"layer": "snnk"}, 0.5),
        far,
    ]
    for figure in figures(Inputs(factory.params(), records)):
        if "sweep" in figure.name:
            assert "Far off the scale, in the table: far." in figure.caption
            assert '"far"' not in figure.spec.split('"datasets"')[1]


def test_eugens_that_fare_alike_share_a_sentence():
    records = [row("prune", {"layer": "prune"}, 2.0), row("one", EUGEN), row("two", EUGEN)]
    said = verdicts.verdict(records, factory.SWEEP[0], "transfer")
    assert re.search(r"(one and two|two and one): worse than prune", said)
