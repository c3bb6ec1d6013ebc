"""README and ledger of rows trained from scratch: numbers that flip flip the verdict, nothing is dropped."""

from __future__ import annotations

import re

import pytest

from stages.reporting.findings import Finding, condense
from stages.reporting.full_size import COMMANDS
from stages.reporting.ledger import ledger
from stages.reporting.markdown import LONG
from stages.reporting.study import study_tables
from stages.tracking.record import CellRecord, ScratchRecord

from . import factory, trained
from .conftest import REPOSITORY
from .test_readme import verdict

LEARNED = {"layer": "eugen", "order": 2, "projection": "orthogonal"}


def task_cell(task: str, method: str, share: float = 0.995, steps: int = 100, **change) -> CellRecord:
    """A cell of another task whose seeds keep about a share of the dense quality."""
    record = factory.cell("embedding", method, **change)
    seeds = [
        s.model_copy(update={"quality_transfer_only": share + 1e-5 * s.seed, "quality_finetuned": None})
        for s in record.seeds
    ]
    params = record.params | {"task": {"transfer": {"refine_steps": steps}}}
    return record.model_copy(update={"task": task, "seeds": seeds, "params": params})


def lines(text: str, claim: str) -> list[str]:
    """The lines of a claim in the table."""
    found = text.splitlines()
    start = next(i for i, line in enumerate(found) if line.startswith(f"| {claim}"))
    end = next(i for i, line in enumerate(found[start + 1 :], start + 1) if not line.startswith("|  |"))
    return found[start:end]


def scratch_pair(gap: float, other: dict, **change) -> list[ScratchRecord]:
    """Two EUGen rows; the second, with other parameters, is worse by `gap`."""
    return [
        trained.scratch_record("first", layer=LEARNED, loss=2.7, **change),
        trained.scratch_record("second", layer=other, loss=2.7 + gap, **change),
    ]


@pytest.mark.parametrize(("gap", "expected"), [(0.1, "reproduced"), (-0.1, "not reproduced")])
def test_trainable_and_order_claims_flip_with_the_numbers(gap: float, expected: str):
    pair = scratch_pair(gap, LEARNED | {"trainable": False})
    assert verdict(ledger([], pair), "Trainable G beats") == [expected]
    orders = [
        trained.scratch_record("three", layer=LEARNED | {"order": 3}, loss=2.7),
        trained.scratch_record("four", layer=LEARNED | {"order": 4}, loss=2.7 + gap),
    ]
    assert verdict(ledger([], orders), "k ≤ 3") == [expected]


def test_rows_that_differ_in_more_than_one_key_decide_nothing():
    both = scratch_pair(0.1, LEARNED | {"trainable": False, "norm_slot": False})
    text = ledger([], both)
    assert verdict(text, "Trainable G beats") == ["open"]
    assert verdict(text, "What does the norm slot") == ["open"]
    assert verdict(ledger([], scratch_pair(0.1, LEARNED | {"norm_slot": False})), "What does the norm") == [
        "measured"
    ]


def test_one_seed_and_provisional_records_decide_nothing():
    other = LEARNED | {"trainable": False}
    for change in ({"seeds": 1}, {"provisional": True}, {"environment": factory.environment(dirty=True)}):
        assert verdict(ledger([], scratch_pair(0.1, other, **change)), "Trainable G beats") == ["open"]


def test_language_has_its_numbers_and_is_not_comparable_at_our_size():
    found = lines(ledger([], trained.all_scratch()), "GPT-2 124M")
    rows = [line for line in found if "not comparable" in line]
    assert len(rows) == 4 == sum(layer["layer"] == "eugen" for layer in trained.ROWS.values())
    assert all("parameters −35.0 %" in line and re.search(r"training 1\.\d\d× \[", line) for line in rows)
    assert all("2.40 M parameters, GPT-2 has 124 M" in line for line in rows)
    assert all("better than dense" in line or "worse than dense" in line for line in rows)


def test_one_line_a_row_and_all_results_below():
    text = ledger([], trained.all_scratch(budgets=(0.15, 0.3)))
    found = lines(text, "Is a narrower MLP as good")
    assert len(found) == 4
    assert all("budget 0.3, trained from scratch (base)" in line for line in found)
    assert all("all 6 results below" in line for line in found)
    folded = text.split("<details><summary>Is a narrower MLP as good? (24 results)</summary>")[1]
    results = [line for line in folded.split("</details>")[0].splitlines() if "against narrow:" in line]
    assert len(results) == 24 and sum("(half)" in line for line in results) == 8


def test_a_line_of_several_results_takes_the_worst_verdict_and_counts_the_others():
    def finding(verdict, rank: int) -> Finding:
        return Finding("x", "where", verdict, "row", (rank,))

    (line,) = condense([finding("reproduced", 0), finding("not reproduced", 0), finding("open", 1)])
    assert line.verdict == "not reproduced" and line.ours == "x; x"
    assert "all 3 results below" in line.conditions and "1 open" in line.conditions
    alone = Finding("y", "where", "open")
    assert condense([alone, alone]) == [alone, alone]


@pytest.mark.parametrize(("share", "expected"), [(0.9995, "reproduced"), (0.99, "not reproduced")])
def test_distillation_flips_with_the_share_it_keeps(share: float, expected: str):
    claim = "Distillation with trainable G"
    text = ledger([task_cell("radiance", "eugen", share)])
    assert verdict(text, claim) == [expected, "open"]
    fixed = task_cell("radiance", "eugen", share, layer=LEARNED | {"trainable": False})
    assert verdict(ledger([fixed]), claim) == ["open", "open"]
    assert verdict(ledger([task_cell("embedding", "eugen", share)]), claim) == ["open", "open"]


@pytest.mark.parametrize(("error", "expected"), [(0.01, "reproduced"), (0.02, "not reproduced")])
def test_of_an_error_the_share_is_that_of_dense_over_ours(error: float, expected: str):
    record = task_cell("distance", "eugen", error, steps=0)
    seeds = [s.model_copy(update={"quality_dense": 0.00995}) for s in record.seeds]
    record = record.model_copy(update={"seeds": seeds, "higher_is_better": False})
    found = lines(ledger([record]), "Closed-form transfer")
    assert f"| {expected} |" in found[0] and "(dense over ours)" in found[0]


def test_three_dimensional_claims_have_speed_size_and_quality():
    text = ledger([task_cell("radiance", "eugen"), task_cell("distance", "eugen")])
    for claim in ("NeRF", "iSDF"):
        measured, full = lines(text, claim)
        assert (
            re.search(r"inference 1\.\d\d× \[.* at batch 32", measured) and "parameters −38.2 %" in measured
        )
        assert measured.endswith("| not comparable |") and "`make bench PROFILE=" in full
    rows = trained.all_scratch(task="distance")
    assert "training 1." in " ".join(lines(ledger([], rows), "iSDF"))


def test_open_claims_name_commands_of_profiles_that_exist():
    text = ledger([])
    for command in set(COMMANDS.values()):
        assert f"`{command}`" in text
        (profile,) = re.findall(r"PROFILE=(\w+)", command)
        assert (REPOSITORY / "params" / f"{profile}.yaml").is_file()


# README.


def test_the_readme_has_the_base_variant_best_first_and_folds_the_rest():
    text = study_tables(factory.all_cells(), trained.all_scratch(budgets=(0.15, 0.3)))
    part = text[text.index("**language, trained from scratch** (base)") :]
    shown, folded = part.split("<details>")[0], part.split("<details>")[1]
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| 3 \| 3 \| 0.002 \| ([\d.]+) ±", shown, re.MULTILINE)
    assert rows[0][:2] == ("dense", "1") and {budget for _, budget, _ in rows[1:]} == {"0.3"}
    means = [float(mean) for _, _, mean in rows[1:]]
    assert means == sorted(means) and len(means) == 7
    assert "Budgets 0.15" in folded and "| eugen | 0.15 |" in folded
    variants = dict(re.findall(r"<details><summary>Variant (\w+)</summary>(.*?)</details>", part, re.DOTALL))
    assert list(variants) == ["long", "half"]
    for lines in variants.values():
        listed = re.findall(r"^\| (\w+) \| ([\d.]+) \|", lines, re.MULTILINE)
        assert listed[0] == ("dense", "1") and len(set(listed)) == len(listed) == 1 + 2 * len(means)
    assert "Is the gain EUGen's" in part.replace("&#39;", "'")
    assert text.index("**embedding**") < text.index("**language, trained") < text.index("**vision**")


def test_provisional_trainings_never_enter_the_readme():
    assert "No result" in study_tables([], trained.all_scratch(provisional=True))
    assert "No result" in study_tables([], trained.all_scratch(seeds=1))
    dense = [trained.scratch_record("dense")]
    assert "No result" in study_tables([], dense)


def test_long_tables_are_folded_and_lose_no_row():
    many = [factory.cell("embedding", f"row{i:02}", layer={"layer": "prune"}) for i in range(LONG + 6)]
    text = study_tables(many)
    head, tail = text.split("<details><summary>6 more rows</summary>")
    assert [len(re.findall(r"^\| row", part, re.MULTILINE)) for part in (head, tail)] == [LONG, 6]
    assert "more rows" not in study_tables(many[: LONG + 1])


def test_hostile_rows_stay_inside_their_cell():
    record = trained.scratch_record("<b>a|b</b>\n| x", layer={"layer": "eugen"})
    for text in (study_tables([], [record]), ledger([], [record])):
        assert "<b>" not in text and "&lt;b&gt;a\\|b&lt;/b&gt; \\| x" in text
