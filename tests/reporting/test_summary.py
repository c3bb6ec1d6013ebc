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
    assert "eugen" in row[5] and "(n=3)" in row[7]
    without = [record for record in records if record.row != "narrow_gated"]
    assert summary([], without) == NOTHING
