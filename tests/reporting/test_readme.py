"""README table and ledger follow from the committed records, and drift is found."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stages.reporting.inputs import ReportError
from stages.reporting.ledger import ENTRIES, ledger
from stages.reporting.readme import BEGIN, END, drift, generate
from stages.reporting.study import study_tables
from stages.reporting.summary import summary
from stages.tracking.record import CellRecord
from stages.tracking.whole_file import write_text

from . import factory
from .conftest import Run

OPENING, CLOSING = BEGIN.format("table"), END.format("table")
README = f"# Title\n\nBefore.\n\n{OPENING}\nold\n{CLOSING}\n\nAfter.\n"


def write(run: Run) -> None:
    """What `--readme` does."""
    for path, text in generate(run.root).items():
        write_text(path, text)


def shift(record: CellRecord, by: float) -> CellRecord:
    """The record with another quality."""
    seeds = [
        s.model_copy(
            update={"quality_transfer_only": s.quality_transfer_only + by, "quality_finetuned": None}
        )
        for s in record.seeds
    ]
    return record.model_copy(update={"seeds": seeds})


def verdict(text: str, claim: str) -> list[str]:
    """Verdicts of a claim's rows in the ledger."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {claim}"))
    rows = [lines[start]]
    for line in lines[start + 1 :]:
        if not line.startswith("|  |"):
            break
        rows.append(line)
    return [row.rstrip(" |").rsplit("| ", 1)[1] for row in rows]


def test_table_goes_between_the_markers_and_nowhere_else(run: Run):
    readme = run.root / "README.md"
    readme.write_text(README)
    run.commit(factory.all_cells())
    write(run)
    text = readme.read_text()
    assert text.startswith(f"# Title\n\nBefore.\n\n{OPENING}\n**Taken over from a trained network**")
    assert text.endswith(f"{CLOSING}\n\nAfter.\n")
    assert "old" not in text.split()
    write(run)
    assert readme.read_text() == text


def test_drift_is_found_in_every_file(run: Run):
    readme, claims = run.root / "README.md", run.root / "reports" / "ledger.md"
    readme.write_text(README)
    run.commit(factory.all_cells())
    assert "ledger.md" in drift(run.root)
    write(run)
    assert drift(run.root) == ""
    study = run.root / "reports" / "study.md"
    study.write_text(study.read_text().replace("| prune | 0.3 | 3 | 0.9", "| prune | 0.3 | 3 | 1.9"))
    assert "+| prune | 0.3 | 3 | 0.9" in drift(run.root)
    write(run)
    readme.write_text(readme.read_text().replace("prune 0.9", "prune 1.9"))
    assert "README.md (from the records)" in drift(run.root)
    write(run)
    claims.write_text(claims.read_text().replace("not reproduced", "reproduced"))
    assert "ledger.md (from the records)" in drift(run.root)


def test_text_outside_the_markers_is_free(run: Run):
    readme = run.root / "README.md"
    readme.write_text(README)
    write(run)
    readme.write_text(readme.read_text().replace("Before.", "Something else."))
    assert drift(run.root) == ""


@pytest.mark.parametrize("text", ["# Title\n", f"{OPENING}\n", f"{CLOSING}\n{OPENING}\n"])
def test_missing_markers_are_named(run: Run, text: str):
    (run.root / "README.md").write_text(text)
    with pytest.raises(ReportError, match=r"README\.md: lacks the line <!-- table:(begin|end) -->"):
        generate(run.root)


def test_the_page_on_transfer_has_tables_of_its_own(run: Run):
    page = run.root / "docs" / "transfer.md"
    (run.root / "README.md").write_text(README)
    run.commit(factory.all_cells())
    write(run)
    text = page.read_text()
    lines = text.partition(BEGIN.format("embedding"))[2].partition(END.format("embedding"))[0].splitlines()
    assert lines[1].startswith("| row | ") and lines[1].endswith(" | MACs | parameters | faster |")
    rows = [line.split(" | ")[0].removeprefix("| ") for line in lines[3:]]
    assert set(rows) == set(factory.METHODS) - {"dense"}
    swept = text.partition(BEGIN.format("budgets"))[2].partition(END.format("budgets"))[0]
    assert "| method | 0.15 | 0.3 |" in swept and "`vision`" in swept
    assert "`embedding`" not in swept  # has one budget
    page.write_text(text.replace("| standard | prune | ", "| standard | prune | 1"))
    assert "transfer.md (from the records)" in drift(run.root)
    (run.root / "reports/benchmarks/transfer-levels.json").write_text("{}")
    with pytest.raises(ReportError, match="benchmarks.transfer_levels. writes it"):
        generate(run.root)


def test_missing_readme_is_named(tmp_path: Path):
    with pytest.raises(ReportError, match=r"README\.md: missing"):
        generate(tmp_path)


def test_provisional_rows_never_enter():
    good = factory.cell("embedding", "prune")
    dirty = factory.cell("embedding", "narrow", environment=factory.environment(dirty=True))
    table = study_tables([good, dirty])
    assert "| prune |" in table
    assert "| narrow |" not in table
    alone = factory.cell("embedding", "eugen", provisional=True)
    assert "No result" in study_tables([alone])
    assert "embedding, eugen" not in ledger([alone])


def test_no_records_are_said_plainly():
    assert study_tables([]) == study_tables([factory.cell("embedding", "dense")])
    assert "No result of the `study` profile is committed yet" in study_tables([])


def test_rows_are_ordered_by_quality_below_dense():
    methods = re.findall(r"^\| (\w+) \| (?:1|0\.3) \|", study_tables(factory.all_cells()), re.MULTILINE)
    assert methods[:3] == ["dense", "prune", "eugen_teacher"]


def test_hostile_names_stay_inside_their_cell():
    hostile = "<b>a|b</b>\n| x"
    record = factory.cell("embedding", hostile, layer={"layer": "eugen"})
    for text in (study_tables([record]), ledger([record])):
        assert "<b>" not in text
        assert "&lt;b&gt;a\\|b&lt;/b&gt; \\| x" in text


def test_a_choice_of_layers_is_neither_an_eugen_nor_its_rival():
    experts = factory.cell("embedding", "experts", layer={"layer": "eugen_experts"})
    chosen = factory.cell("embedding", "auto", layer={"layer": "auto", "target": "macs"})
    line = re.compile(r"^\| embedding: .*", re.MULTILINE)
    assert not line.findall(summary([experts, chosen], []))
    (found,) = line.findall(summary([experts, chosen, factory.cell("embedding", "prune")], []))
    assert "experts" in found and "prune" in found and "auto" not in found


def test_ledger_holds_every_entry_and_opens_without_records():
    text = ledger([])
    assert all(entry.text in text for entry in ENTRIES)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][2:]
    assert len([row for row in rows if row.endswith("| open |")]) >= len(ENTRIES) - 1


@pytest.mark.parametrize(("by", "said"), [(0.3, "better"), (-0.3, "worse")])
def test_our_own_rows_stand_beside_the_best_of_the_others(by: float, said: str):
    experts = factory.cell("embedding", "experts", layer={"layer": "eugen_experts"})
    chosen = factory.cell("embedding", "auto", layer={"layer": "auto", "target": "macs"})
    others = [factory.cell("embedding", name) for name in ("prune", "narrow", "eugen")]
    text = ledger([shift(experts, by), shift(chosen, by), *others])
    lines = text.partition("## Questions of our own")[2].splitlines()
    rows = [line for line in lines if line.startswith(("| Do conditional", "| Is a choice"))]
    assert len(rows) == 2
    assert all(f"against prune: {said}; " in row and row.endswith("| measured |") for row in rows)
    assert "experts" in rows[0] and "auto" in rows[1]


def test_ledger_verdicts_follow_the_records():
    low = factory.cell("vision", "low_rank_aware")
    better, worse = (shift(factory.cell("vision", "eugen"), by) for by in (0.3, -0.3))
    assert set(verdict(ledger([better, low]), "Well above low-rank")) == {"reproduced"}
    assert set(verdict(ledger([worse, low]), "Well above low-rank")) == {"not reproduced"}


def test_ledger_retention_needs_the_whole_interval():
    keeps = factory.cell("embedding", "eugen")
    seeds = [
        s.model_copy(update={"quality_transfer_only": 0.995 + 0.0001 * s.seed, "quality_finetuned": None})
        for s in keeps.seeds
    ]
    wide = [s.model_copy(update={"quality_transfer_only": 0.97 + 0.02 * s.seed}) for s in seeds]
    claim = "Closed-form transfer"
    full_size = "open"  # the last line, whatever we found
    assert verdict(ledger([keeps.model_copy(update={"seeds": seeds})]), claim) == ["reproduced", full_size]
    assert verdict(ledger([keeps.model_copy(update={"seeds": wide})]), claim) == ["open", full_size]
    assert verdict(ledger([keeps]), claim) == ["not reproduced", full_size]


def test_ablation_needs_rows_that_differ_in_one_key_alone():
    trained = {"layer": "eugen", "order": 2, "projection": "orthogonal"}
    fixed = trained | {"trainable": False}
    first = factory.cell("vision", "eugen_fixed", layer=fixed)
    second = shift(factory.cell("vision", "eugen", layer=trained), 0.1)
    other = factory.cell("vision", "eugen", layer=trained | {"order": 3})
    assert set(verdict(ledger([first, second]), "Trainable G beats")) == {"reproduced"}
    assert verdict(ledger([first, other]), "Trainable G beats") == ["open"]
