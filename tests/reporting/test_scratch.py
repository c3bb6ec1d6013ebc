"""Rows trained from scratch: what is read, what is said of it, tables and the CSV."""

from __future__ import annotations

import io
import re
from statistics import fmean

import pandas as pd
import pytest

from stages.report import build
from stages.reporting import tables
from stages.reporting.drawing import looks
from stages.reporting.inputs import Inputs, ReportError, read_committed_scratch, read_run, scratch_rows
from stages.reporting.scratch import figures, runs, verdicts
from stages.reporting.scratch import table as scratch_table
from stages.reporting.scratch import tables as scratch_tables
from stages.reporting.table import to_csv
from stages.tracking.record import ScratchRecord

from . import factory, trained
from .conftest import Run


def inputs_of(records: list[ScratchRecord]) -> Inputs:
    return Inputs(trained.scratch_params(), [], scratch=records)


def base(records: list[ScratchRecord], budget: float = 0.3) -> str:
    said = [verdicts.verdict(records, "base", budget), *verdicts.gated(records, "base", budget)]
    return " ".join(said)


# Reading.


def test_every_row_of_the_parameters_has_a_record_or_a_reason(run: Run):
    run.params(trained.scratch_params())
    run.scratch(trained.all_scratch()[:-1])
    inputs = read_run(run.root)
    assert [record.row for record in inputs.scratch] == list(trained.ROWS)[:-1]
    (missing,) = inputs.scratch_failures
    assert (missing.stage, missing.task, missing.method) == ("scratch", "language", "eugen_shared")
    assert "results/scratch/language-eugen_shared.json does not exist" in missing.error


def test_a_failed_training_is_not_the_failure_of_the_cell_of_the_same_name(run: Run):
    run.params(trained.scratch_params("vision"))
    run.cells(factory.all_cells())
    run.scratch(trained.all_scratch(task="vision"))
    run.fail(factory.failure("vision", "narrow", stage="scratch"))
    inputs = read_run(run.root)
    assert inputs.failures == [] and ("vision", "narrow") in {(r.task, r.method) for r in inputs.records}
    assert [failure.method for failure in inputs.scratch_failures] == ["narrow"]
    assert "narrow" not in {record.row for record in inputs.scratch}
    run.fail(factory.failure("vision", "eugen", stage="transfer"))
    inputs = read_run(run.root)
    assert [failure.method for failure in inputs.failures] == ["eugen"]
    assert [failure.method for failure in inputs.scratch_failures] == ["narrow"]


@pytest.mark.parametrize(("stage", "lost"), [("prepare", True), ("baseline", False)])
def test_of_the_earlier_stages_a_training_needs_the_data_alone(run: Run, stage: str, lost: bool):
    run.params(trained.scratch_params("vision"))
    run.scratch(trained.all_scratch(task="vision"))
    run.fail(factory.failure("vision", None, stage=stage))
    assert len(read_run(run.root).scratch_failures) == lost * len(trained.ROWS)


@pytest.mark.parametrize("section", [None, {}, {"rows": {}, "tasks": {}}, {"rows": None, "tasks": None}])
def test_without_the_section_nothing_is_expected_and_nothing_is_shown(run: Run, section: dict | None):
    params = factory.params() if section is None else factory.params() | {"scratch": section}
    assert scratch_rows(params) == []
    run.params(params)
    run.cells(factory.all_cells())
    inputs = read_run(run.root)
    build(inputs, run.root / "reports")
    html = (run.root / "reports" / "report.html").read_text()
    assert "from scratch" not in html and inputs.scratch_failures == []
    assert (run.root / "reports" / "scratch.csv").read_text().strip() == ",".join(scratch_table.COLUMNS)


def test_a_record_of_another_profile_or_place_is_refused(run: Run):
    run.params(trained.scratch_params())
    run.scratch(trained.all_scratch(profile="smoke"))
    assert "left over from profile smoke" in read_run(run.root).scratch_failures[0].error
    folder = run.root / "results" / "scratch"
    (folder / "language-narrow.json").write_bytes((folder / "language-dense.json").read_bytes())
    with pytest.raises(ReportError, match="holds the row language/dense, not language/narrow"):
        read_run(run.root)
    (folder / "language-narrow.json").write_text("{}")
    with pytest.raises(ReportError, match=r"language-narrow\.json: not a valid ScratchRecord"):
        read_run(run.root)


def test_committed_records_are_read_and_rows_without_a_meaning_are_not(run: Run):
    none = trained.scratch_record("prune", runs=[], costs=[], not_applicable="it prunes a trained block")
    run.commit_scratch([*trained.all_scratch(), none])
    run.commit(factory.all_cells())
    assert {record.row for record in read_committed_scratch(run.root)} == set(trained.ROWS)


# Sentences.


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (0.05, "better than narrow_gated by 0.0[45]"),
        (-0.05, "worse than narrow_gated by 0.0[45].*a plain gated block does better"),
        (0.0, "no difference shown from narrow_gated.*better than narrow by .*nothing of that is shown"),
    ],
)
def test_whose_the_gain_is_follows_the_paired_test(gap: float, said: str):
    (sentence,) = verdicts.gated(trained.duel(gap), "base", 0.3)
    assert sentence.startswith(verdicts.QUESTION)
    assert re.search(said, sentence)


def test_one_seed_is_never_better():
    said = base(trained.duel(0.3, seeds=1))
    assert "better than" not in said and "worse than" not in said
    assert "no difference shown" in said and "undecided" in said
    table = scratch_tables.results(trained.duel(0.3, seeds=1))
    assert all("better" not in cell and "±" not in cell for row in table.rows for cell in row)


def test_the_comparison_is_paired_over_seeds_at_the_chosen_rate():
    records = trained.duel(0.05)
    dense, product = records[0], records[3]
    found = runs.against_dense(records, product, "base", 0.3)
    own = {r.seed: r.quality for r in product.runs if r.variant == "base" and r.learning_rate == 2e-3}
    other = {r.seed: r.quality for r in dense.runs if r.variant == "base" and r.learning_rate == 2e-3}
    assert found is not None
    assert found.difference.mean == pytest.approx(fmean(own[s] - other[s] for s in (0, 1, 2)))
    assert found.verdict == "better"
    assert "better than dense by" in base(records)


def test_higher_is_better_turns_the_verdict():
    said = base([record.model_copy(update={"higher_is_better": True}) for record in trained.duel(0.05)])
    assert re.search(r"best mean \S+ ± \S+ \(n=3\) by narrow;", said)
    assert "eugen_product: worse than dense, narrow and narrow_gated (n=3)" in said


def test_a_diverged_run_is_named_and_counts_for_nothing():
    records = trained.duel(0.05)
    records[3] = trained.diverging(records[3], 4e-3)
    told, _ = verdicts.sentences(records)
    assert any(
        "Diverged" in said and "eugen_product (base, budget 0.3, rate 0.004, seed 0" in said for said in told
    )
    assert "better than dense" in base(records)
    row = next(row for row in scratch_tables.sweep(records).rows if row[1] == "eugen_product")
    assert row[-1] == "diverged" and row[-2].endswith("(chosen)")
    (figure, *_) = figures._rates(records, "base", looks([], list(trained.ROWS)))
    assert "Diverged: eugen_product at 0.004." in figure.caption


def test_a_row_that_diverges_at_the_chosen_rate_has_no_result():
    records = trained.duel(0.05)
    records[3] = trained.diverging(records[3], 2e-3)
    assert runs.scores(records[3], "base", 0.3) == {}
    assert "eugen_product" not in verdicts.verdict(records, "base", 0.3)
    row = next(row for row in scratch_tables.results(records).rows if row[1] == "eugen_product")
    assert row[3] == "0" and row[6] == "diverged"
    frame = scratch_table.results(records).set_index(["row", "variant"])
    assert frame.loc[("eugen_product", "base"), "diverged"] == 3
    assert list(figures.figures(inputs_of(records), "language"))


def test_the_top_of_the_page_has_the_base_variant_at_the_budget_nearest_to_30_percent():
    said = verdicts.headline(trained.duel(0.05, budgets=(0.15, 0.3, 0.5)))
    assert said[0].startswith("Trained from scratch. base, budget 0.3: best mean") and len(said) == 2
    told, more = verdicts.sentences(trained.duel(0.05, budgets=(0.15, 0.3, 0.5)))
    assert [s[:16] for s in told if s.startswith("base, budget")] == [
        "base, budget 0.5",
        "base, budget 0.3",
        "base, budget 0.1",
    ]
    assert all(any(name in said for said in more) for name in ("long", "half"))


# Tables and CSV.


def test_csv_has_one_row_a_key_with_the_numbers_of_the_records():
    records = trained.all_scratch(budgets=(0.15, 0.3))
    frame = scratch_table.results(records)
    assert list(frame.columns) == list(scratch_table.COLUMNS)
    assert not frame.duplicated(["task", "row", "variant", "budget"]).any()
    assert len(frame) == 3 * (1 + 7 * 2)
    back = pd.read_csv(io.StringIO(to_csv(frame)))
    pd.testing.assert_frame_equal(back, frame, check_dtype=False, rtol=1e-8)
    record = records[5]
    line = frame.set_index(["row", "variant", "budget"]).loc[("eugen_product", "long", 0.15)]
    chosen = [r for r in record.runs if (r.variant, r.budget) == ("long", 0.15) and r.chosen]
    cost = next(c for c in record.costs if (c.variant, c.budget) == ("long", 0.15))
    assert line["quality"] == pytest.approx(fmean(r.quality for r in chosen if r.quality is not None))
    assert (line["seeds"], line["learning_rate"], line["rates_tried"]) == (3, 2e-3, 3)
    assert line["difference"] == pytest.approx(line["quality"] - line["quality_dense"])
    speedup = line["examples_per_second"] / line["examples_per_second_dense"]
    assert speedup == pytest.approx(cost.training_speedup)
    dense = frame[frame["row"] == "dense"]
    assert dense["verdict"].isna().all() and dense["difference"].isna().all()


def test_a_variant_without_its_own_dense_row_borrows_one_of_the_same_training():
    records = trained.duel(0.05)
    records[0] = trained.scratch_record("dense", loss=2.8, variants=("base", "long"))
    assert runs.dense_scores(records, records[3], "half", 0.3) == runs.scores(records[0], "base", 1.0)
    records[0] = trained.scratch_record("dense", loss=2.8, variants=("long",))
    assert runs.dense_scores(records, records[3], "half", 0.3) == {}
    assert "not compared with dense" in base(records)


def test_examples_per_second_stand_beside_every_latency():
    record = factory.cell("embedding", "prune")
    table = tables.latency([record])
    line = dict(zip(table.columns, table.rows[1], strict=True))
    latency = record.latencies[1]
    assert line["batch"] == "32" == str(latency.batch)
    for column, samples in (("dense, ", latency.dense_ms), ("method, ", latency.method_ms)):
        middle = fmean(sorted(samples)[9:11])
        assert float(line[f"{column}examples/s"].replace(",", "")) == pytest.approx(32_000 / middle, rel=0.01)
