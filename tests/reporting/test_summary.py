"""The README's table: the best EUGen and the best rival, and what the comparisons come to."""

from __future__ import annotations

from stages.reporting.summary import NOTHING, summary
from stages.tracking.record import CellRecord

from . import factory, trained


def with_quality(record: CellRecord, values: dict[int, float]) -> CellRecord:
    """The record with these qualities by seed at budget 0.3, not fine-tuned."""
    first = next(result for result in record.seeds if result.budget in (0.3, 1.0))
    changed = {"quality_finetuned": None, "quality_dense": 1.0}
    seeds = [
        first.model_copy(update={"seed": seed, "quality_transfer_only": value, **changed})
        for seed, value in values.items()
    ]
    return record.model_copy(update={"seeds": seeds})


def line(text: str, task: str) -> list[str]:
    (found,) = [row for row in text.splitlines() if row.startswith(f"| {task}:")]
    return [cell.strip() for cell in found.strip("|").split("|")]


EUGEN = {0: 0.90, 1: 0.91, 2: 0.92}
LOW = {0: 0.70, 1: 0.71, 2: 0.72}


def cells(prune: dict[int, float]) -> list[CellRecord]:
    values = {"dense": EUGEN, "eugen": EUGEN, "eugen_teacher": LOW, "prune": prune, "narrow": LOW}
    return [with_quality(factory.cell("embedding", name), found) for name, found in values.items()]


def test_the_best_of_either_side_stand_beside_each_other():
    row = line(summary(cells({0: 0.80, 1: 0.811, 2: 0.819}), []), "embedding")
    assert row[3].startswith("eugen 0.9100") and row[4].startswith("prune 0.8100")
    assert row[5].startswith("+0.1000") and row[5].endswith("better (n=3)")


def validated(record: CellRecord, value: float, field: str = "validation_transfer_only") -> CellRecord:
    """The record with this quality on the validation part."""
    seeds = [result.model_copy(update={field: value}) for result in record.seeds]
    return record.model_copy(update={"seeds": seeds})


def test_rows_are_picked_on_the_validation_part_where_all_have_it():
    records = cells({0: 0.80, 1: 0.811, 2: 0.819})
    assert "picked by their mean here (no validation figure in these records)" in summary(records, [])
    liked = {"dense": 1.0, "eugen": 0.6, "eugen_teacher": 0.7, "prune": 0.5, "narrow": 0.8}
    known = [validated(record, liked[record.method]) for record in records]
    text = summary(known, [])
    row = line(text, "embedding")
    assert row[3].startswith("eugen_teacher") and row[4].startswith("narrow")
    assert "picked on the validation part." in text and "by their mean" not in text
    lower = [record.model_copy(update={"higher_is_better": False}) for record in known]
    row = line(summary(lower, []), "embedding")
    assert row[3].startswith("eugen 0.9") and row[4].startswith("prune")
    text = summary([*known[:-1], records[-1]], [])
    assert line(text, "embedding")[3].startswith("eugen 0.9") and "no validation figure" in text


def test_fine_tuned_rows_are_picked_by_the_validation_of_fine_tuning():
    records = cells({0: 0.80, 1: 0.811, 2: 0.819})
    tuned = []
    for record in records:
        seeds = [r.model_copy(update={"quality_finetuned": r.quality_transfer_only}) for r in record.seeds]
        own = record.model_copy(update={"seeds": seeds})
        tuned.append(validated(own, 0.9 if record.method == "eugen_teacher" else 0.1))
    assert "no validation figure" in summary(tuned, [])
    after = [validated(r, 0.9 if r.method == "eugen" else 0.1, "validation_finetuned") for r in tuned]
    text = summary(after, [])
    assert "picked on the validation part" in text and line(text, "embedding")[3].startswith("eugen 0.9")


def test_tasks_that_differ_in_how_rows_were_picked_are_named():
    records = cells({0: 0.80, 1: 0.811, 2: 0.819})
    other = [validated(record.model_copy(update={"task": "vision"}), 0.5) for record in records]
    text = summary([*records, *other], [])
    assert "vision: picked on the validation part; embedding: picked by their mean here" in text


def test_the_count_follows_the_verdicts():
    worse = {seed: value + 0.02 + 0.001 * seed for seed, value in EUGEN.items()}
    noisy = {0: 0.95, 1: 0.91, 2: 0.87}
    counts = {
        "better": "it is better on 1, it is worse on 0 and no difference is shown on 0",
        "worse": "it is better on 0, it is worse on 1 and no difference is shown on 0",
        "neither": "it is better on 0, it is worse on 0 and no difference is shown on 1",
    }
    rivals = {"better": {0: 0.80, 1: 0.811, 2: 0.819}, "worse": worse, "neither": noisy}
    for name, prune in rivals.items():
        assert counts[name] in summary(cells(prune), []), name


def test_single_seeds_and_tasks_without_an_eugen_or_rival_are_no_line():
    alone = [with_quality(factory.cell("embedding", name), {0: 0.9}) for name in ("eugen", "prune")]
    assert summary(alone, []) == NOTHING
    assert summary([factory.cell("embedding", "prune"), factory.cell("embedding", "narrow")], []) == NOTHING
    assert summary([], trained.all_scratch(provisional=True)) == NOTHING


def test_from_scratch_the_control_is_the_gated_block():
    records = trained.all_scratch()
    text = summary([], records)
    row = line(text, records[0].task)
    assert row[5].startswith("eugen_product 2.7") and "(n=3)" in row[7]
    assert "| narrow_gated | EUGen |" in text
    without = [record for record in records if record.row != "narrow_gated"]
    assert summary([], without) == NOTHING
