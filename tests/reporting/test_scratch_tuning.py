"""Rows trained from scratch: who answers for EUGen, trials, ends of the grid, seconds, lost rows."""

from __future__ import annotations

import io
import re
from statistics import median

import pandas as pd
import pytest

from stages.report import build
from stages.reporting.claimed import CLAIMED
from stages.reporting.inputs import Inputs
from stages.reporting.ledger import ledger
from stages.reporting.outcomes import of_scratch
from stages.reporting.scratch import points, runs, tables, verdicts
from stages.reporting.scratch import table as csv
from stages.reporting.study import study_tables
from stages.reporting.summary import summary
from stages.reporting.table import to_csv
from stages.tracking.record import ScratchRecord

from . import trained
from .conftest import Run
from .test_scratch_ledger import lines

ORDER_2 = {"layer": "eugen", "order": 2}


def cells_of(records: list[ScratchRecord], row: str, variant: str = "base") -> dict[str, str]:
    """A row of the page's table by column."""
    table = tables.results(records)
    (found,) = [cells for cells in table.rows if cells[:2] == [variant, row]]
    return dict(zip(table.columns, found, strict=True))


def without_result(record: ScratchRecord, variant: str) -> ScratchRecord:
    """What the stage leaves where every rate of a variant diverged: the trials, none chosen, and no cost."""
    lost = {"validation": None, "quality": None, "diverged": True, "curve": [], "extra": {}, "chosen": False}
    own = [r for r in record.runs if r.variant != variant]
    trials = [
        r.model_copy(update=lost) for r in runs.trials(record, variant, runs.budgets(record, variant)[0])
    ]
    costs = [cost for cost in record.costs if cost.variant != variant]
    return record.model_copy(update={"runs": own + trials, "costs": costs})


# Who answers for EUGen.


def test_one_declared_row_answers_everywhere_however_good_the_others_are():
    better = trained.scratch_record("a_better", layer=ORDER_2, loss=2.0)
    worse = trained.scratch_record("z_worse", layer=ORDER_2 | {"order": 3}, loss=2.9)
    records = [better, *trained.duel(-0.05), worse]
    answer, others = verdicts.gated(records, "base", 0.3)
    assert f"budget 0.3: {CLAIMED}, the row declared for it (3 rates tried, narrow_gated 3): worse" in answer
    assert "a_better" not in answer and "a plain gated block does better" in answer
    assert "2 further EUGen rows (6 rates tried in all)" in others and "no part of that answer" in others
    assert "a_better: better than narrow_gated" in others and "z_worse: worse than narrow_gated" in others
    text = summary([], records)
    assert f"| {CLAIMED} 2.78" in text and "a_better" not in text and "it is worse on 1" in text
    claim = lines(ledger([], records), "Is the gain EUGen's")
    assert len(claim) == 2 and f"language, {CLAIMED}," in claim[0] and "a_better" not in claim[0]
    assert "declared to answer, 3 rates tried, narrow_gated 3" in claim[0]
    assert "a_better: −0.69" in claim[1] and "z_worse: +0.2" in claim[1]
    assert "ablations: 2 further EUGen rows with 6 rates tried, narrow_gated 3" in claim[1]


def test_without_the_declared_name_the_first_row_of_order_2_answers():
    first = trained.scratch_record("first", layer=ORDER_2, loss=2.8)
    third = trained.scratch_record("third", layer=ORDER_2 | {"order": 3}, loss=1.0)
    best = trained.scratch_record("best", layer={"layer": "eugen"}, loss=1.5)
    records = [*trained.duel(0.0)[:3], third, first, best]
    assert runs.claimed_row(records) is first
    assert ": first, the row declared for it" in verdicts.gated(records, "base", 0.3)[0]
    assert "| first 2.8" in summary([], records)
    (claimed,) = {o.name for o in of_scratch(records) if o.claimed}
    assert claimed == "first" and runs.claimed_row(trained.duel(0.0)[:3]) is None


def test_the_declared_row_does_not_give_way_where_it_diverges():
    other = trained.scratch_record("other", layer=ORDER_2, loss=2.0)
    *others, product = trained.duel(0.1)
    records = [*others, without_result(product, "base"), other]
    answer, _ = verdicts.gated(records, "base", 0.3)
    assert f"{CLAIMED}, the row declared for it" in answer and answer.endswith("diverged; undecided.")
    text = summary([], records)
    assert f"{CLAIMED} diverged" in text and "it is better on 0" in text
    assert "trials of the learning rate" not in text


# Trials and the ends of the grid.


def choosing(record: ScratchRecord, rate: float) -> ScratchRecord:
    """The record with its rates renamed so that the chosen one is `rate`."""
    swapped = {2e-3: rate, rate: 2e-3}
    rated = [(run, swapped.get(run.learning_rate, run.learning_rate)) for run in record.runs]
    return record.model_copy(
        update={"runs": [run.model_copy(update={"learning_rate": new}) for run, new in rated]}
    )


@pytest.mark.parametrize("rate", [1e-3, 4e-3])
def test_a_rate_at_an_end_of_the_grid_is_told_wherever_it_is_compared(rate: float):
    *others, product = trained.duel(0.1, variants=("base", "long"))
    long = [run for run in product.runs if run.variant == "long"]
    base = choosing(product.model_copy(update={"runs": [r for r in product.runs if r not in long]}), rate)
    records = [*others, base.model_copy(update={"runs": base.runs + long})]
    assert cells_of(records, CLAIMED)["learning rate"] == f"{rate:g}, end of the grid"
    assert cells_of(records, "narrow")["learning rate"] == "0.002"
    told, _ = verdicts.sentences(records)
    (said,) = [s for s in told if "is an end of those tried" in s]
    assert said.endswith(f": {CLAIMED} (base, budget 0.3: {rate:g}).")
    frame = csv.results(records)
    at_end = frame.loc[frame["rate_at_end"], ["row", "variant"]].to_numpy().tolist()
    assert at_end == [[CLAIMED, "base"]]
    assert f"| {CLAIMED} | 0.3 | 3 | 3 | {rate:g}, end of the grid |" in study_tables([], records)
    assert f"3 learning rates a row; chosen at an end of them: {CLAIMED}." in summary([], records)
    assert verdicts.ends([*others, product]) == [] and "an end of" not in summary([], [*others, product])


def test_an_edge_of_the_rates_that_hold_is_no_end_of_the_grid():
    record = trained.diverging(trained.scratch_record("narrow"), 4e-3)
    assert runs.rate_at_end(record, "base", 0.3) is False
    assert runs.rate_at_end(without_result(record, "base"), "base", 0.3) is None


def test_every_row_says_how_many_rates_it_was_tried_at():
    *others, product = trained.duel(0.1)
    kept = [run for run in product.runs if run.learning_rate != 1e-3]
    fewer = product.model_copy(update={"runs": kept})
    records = [*others, fewer]
    assert (
        cells_of(records, "narrow")["rates tried"] == "3" and cells_of(records, CLAIMED)["rates tried"] == "2"
    )
    text = summary([], records)
    assert f"3 learning rates (dense, narrow and narrow_gated) and 2 learning rates ({CLAIMED})" in text
    alone = [run for run in kept if run.chosen]
    single = [*others, product.model_copy(update={"runs": alone})]
    assert cells_of(single, CLAIMED)["learning rate"] == "0.002, no other tried"


# Seconds and rates of training.


def test_all_seconds_come_from_the_dense_step_and_the_paired_speed_up():
    records = trained.duel(0.1)
    busy = records[3].model_copy(
        update={"runs": [r.model_copy(update={"seconds": 9e9}) for r in records[3].runs]}
    )
    # The pairs of the slow row ran beside a heavy neighbour: both networks took thrice as long.
    slow = [
        cost.model_copy(update={k: [3 * ms for ms in getattr(cost, k)] for k in ("step_ms", "step_ms_dense")})
        for cost in busy.costs
    ]
    records[3] = busy.model_copy(update={"costs": slow})
    own = next(cost for cost in slow if cost.variant == "base")
    dense = median(ms for r in records for c in r.costs if c.variant == "base" for ms in c.step_ms_dense)
    frame = csv.results(records).set_index(["row", "variant"]).loc[(CLAIMED, "base")]
    assert frame["examples_per_second_dense"] == pytest.approx(24_000 / dense)
    assert frame["examples_per_second"] == pytest.approx(24_000 / dense * own.training_speedup)
    seconds = 400 * dense / 1000 / own.training_speedup
    assert frame["train_seconds"] == pytest.approx(seconds)
    shown = cells_of(records, CLAIMED)
    assert float(shown["examples/s"].replace(",", "")) == pytest.approx(
        frame["examples_per_second"], rel=0.01
    )
    outcome = next(o for o in of_scratch(records) if (o.name, o.variant) == (CLAIMED, "base"))
    assert float(outcome.effort.split(" s per")[0]) == pytest.approx(seconds, rel=0.01)
    curve = [point for point in points.curves(records, "base") if point["row"] == CLAIMED]
    assert curve[-1]["step"] == 400 and curve[-1]["seconds"] == pytest.approx(seconds)
    other = [r.model_copy(update={"task": "distance"}) for r in trained.duel(0.3)]
    assert csv.results(other + records)["train_seconds"].tolist()[
        -len(csv.results(records)) :
    ] == pytest.approx(csv.results(records)["train_seconds"].tolist())


# Baselines of the data.


def with_extra(records: list[ScratchRecord], **extra: float) -> list[ScratchRecord]:
    return [
        r.model_copy(update={"runs": [x.model_copy(update={"extra": x.extra | extra}) for x in r.runs]})
        for r in records
    ]


def test_baselines_are_constants_named_by_the_quality_and_the_others_columns():
    records = trained.duel(0.0)
    assert runs.constants(records) == trained.BASELINES
    (sentence,) = verdicts.baselines(records)
    assert "bigram_bits_per_byte 3.370 and unigram_bits_per_byte 4.410" in sentence
    columns = tables.results(records).columns
    assert "accuracy" in columns and "unigram_bits_per_byte" not in columns


@pytest.mark.parametrize("extra", [{"f_score": 0.0}, {"f_score": 1.0}, {"edge_bits_per_byte": 0.0}])
def test_what_all_networks_fail_or_pass_alike_is_no_baseline(extra: dict[str, float]):
    records = with_extra(trained.duel(0.0), **extra)
    assert runs.constants(records) == trained.BASELINES
    assert next(iter(extra)) in tables.results(records).columns


def test_a_baseline_takes_two_rows_two_seeds_and_every_run():
    records = trained.duel(0.0)
    assert runs.constants(records[:1]) == {}
    assert runs.constants(trained.duel(0.0, seeds=1)) == {}
    some = [*records[:3], with_extra(records[3:], unigram_bits_per_byte=4.0)[0]]
    assert runs.constants(some).keys() == {"bigram_bits_per_byte"}


# Every rate of a variant diverged.


def test_a_variant_without_a_result_is_said_and_breaks_nothing(run: Run):
    *others, product = trained.duel(0.1)
    for variant in ("base", "half"):
        records = [*others, without_result(product, variant)]
        inputs = Inputs(trained.scratch_params(), [], scratch=records)
        build(inputs, run.root / "reports")
        page = (run.root / "reports" / "report.html").read_text()
        assert f"Diverged, and without a quality: {CLAIMED} ({variant}, budget 0.3, rate 0.001" in page
        cells = cells_of(records, CLAIMED, variant)
        assert (cells["n"], cells["rates tried"], cells["bits_per_byte"]) == ("0", "3", "diverged")
        frame = pd.read_csv(io.StringIO(to_csv(csv.results(records)))).set_index(["row", "variant"])
        lost = frame.loc[(CLAIMED, variant)]
        assert (lost["seeds"], lost["diverged"]) == (0, 3) and lost[["learning_rate", "quality"]].isna().all()
        assert CLAIMED in ledger([], records)


def test_a_row_without_a_result_stands_last_in_the_study():
    *others, product = trained.duel(0.1)
    text = study_tables([], [*others, without_result(product, "base")])
    base = text.split("<details><summary>Variant")[0]
    rows = re.findall(r"^\| (\w+) \| (?:0.3|1) \|.*$", base, re.MULTILINE)
    assert rows[-1] == CLAIMED and f"| {CLAIMED} | 0.3 | 0 | 3 | – | diverged |" in text
    dirty = without_result(product, "base").model_copy(update={"provisional": True})
    assert CLAIMED not in study_tables([], [*others, dirty])


def test_a_task_whose_every_row_diverged_says_so():
    dense, *others = trained.duel(0.1, variants=("base",))
    text = study_tables([], [dense, *(without_result(record, "base") for record in others)])
    assert "**language** Diverged, and without a quality: narrow (base" in text
