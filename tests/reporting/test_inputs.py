"""Reading a run: every cell has a record or a reason, and a bad file is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.reporting.inputs import (
    ReportError,
    read_committed,
    read_committed_scratch,
    read_params,
    read_run,
)
from stages.tracking.record import write_record

from . import factory
from .conftest import REPOSITORY, Run


def test_every_cell_of_the_parameters_is_accounted_for(run: Run):
    run.cells(factory.all_cells()[:-1])
    inputs = read_run(run.root)
    assert len(inputs.records) == 15
    (missing,) = inputs.failures
    assert (missing.task, missing.method) == ("vision", "eugen_teacher")
    assert "results/cells/vision-eugen_teacher.json does not exist" in missing.error


def test_records_come_in_the_order_of_the_parameters(run: Run):
    run.cells(factory.all_cells())
    assert read_run(run.root).methods == list(factory.METHODS)


def test_a_failed_cell_hides_the_record_of_an_earlier_run(run: Run):
    run.cells(factory.all_cells())
    run.fail(factory.failure("vision", "snnk"))
    inputs = read_run(run.root)
    assert ("vision", "snnk") not in {(record.task, record.method) for record in inputs.records}
    assert [(failure.task, failure.method) for failure in inputs.failures] == [("vision", "snnk")]


def test_a_failed_baseline_fails_every_cell_of_its_task_only(run: Run):
    run.cells(factory.all_cells())
    run.fail(factory.failure("vision", None, stage="baseline"))
    inputs = read_run(run.root)
    assert inputs.tasks == ["embedding"]
    assert {failure.method for failure in inputs.failures} == set(factory.METHODS)


def test_the_reports_own_failure_is_no_cell(run: Run):
    run.cells(factory.all_cells())
    run.fail(factory.failure("all", None, stage="report"))
    assert read_run(run.root).failures == []


def test_records_outside_the_parameters_are_left_out(run: Run):
    run.cells([*factory.all_cells(), factory.cell("vision", "retired")])
    assert "retired" not in read_run(run.root).methods


def test_a_record_of_another_profile_does_not_count(run: Run):
    run.cells(factory.all_cells(profile="smoke"))
    inputs = read_run(run.root)
    assert inputs.records == []
    assert "left over from profile smoke, this run is study" in inputs.failures[0].error


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("", "Invalid JSON"),
        ('{"task": "vision", ', "Invalid JSON"),
        ("{}", "task"),
        ("\x00\xff", "Invalid JSON"),
    ],
)
def test_a_corrupt_record_is_named_with_its_cure(run: Run, content: str, fault: str):
    run.cells(factory.all_cells())
    path = run.root / "results" / "cells" / "vision-prune.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ReportError, match=f"vision-prune.json: not a valid CellRecord .*{fault}.*delete it"):
        read_run(run.root)


def test_a_record_with_nan_is_refused(run: Run):
    run.cells(factory.all_cells())
    path = run.root / "results" / "cells" / "vision-prune.json"
    path.write_text(path.read_text().replace('"train_seconds_dense": 80.0', '"train_seconds_dense": NaN'))
    with pytest.raises(ReportError, match=r"vision-prune\.json.*train_seconds_dense"):
        read_run(run.root)


def test_a_record_under_the_wrong_name_is_refused(run: Run):
    run.cells(factory.all_cells())
    cells = run.root / "results" / "cells"
    (cells / "vision-prune.json").write_bytes((cells / "vision-narrow.json").read_bytes())
    with pytest.raises(ReportError, match=r"vision-prune\.json: holds the cell vision/narrow"):
        read_run(run.root)


def test_a_record_of_another_schema_is_refused(run: Run):
    run.cells([factory.cell("embedding", "dense", schema_version=99)])
    with pytest.raises(ReportError, match="schema version 99"):
        read_run(run.root)


def test_a_cell_that_does_not_apply_is_neither_finished_nor_failed(run: Run):
    run.cells(factory.all_cells()[:-1])
    write_record(
        run.root / "results/cells/vision-eugen_teacher.json",
        factory.not_applicable("vision", "eugen_teacher"),
    )
    inputs = read_run(run.root)
    assert len(inputs.records) == 15 and inputs.failures == []
    assert [(cell.task, cell.method) for cell in inputs.inapplicable] == [("vision", "eugen_teacher")]
    run.fail(factory.failure("vision", "eugen_teacher"))
    inputs = read_run(run.root)
    assert inputs.inapplicable == [] and len(inputs.failures) == 1


def test_a_cell_that_does_not_apply_must_say_why(run: Run):
    run.cells(factory.all_cells())
    path = run.root / "results/cells/vision-prune.json"
    path.write_text(
        json.dumps({**factory.not_applicable("vision", "prune").model_dump(), "not_applicable": ""})
    )
    with pytest.raises(ReportError, match=r"vision-prune\.json: not a valid NotApplicable .*not_applicable"):
        read_run(run.root)


def test_committed_cells_that_do_not_apply_are_passed_over(run: Run):
    run.commit([factory.cell("vision", "prune")])
    none = factory.not_applicable("vision", "linear")
    write_record(run.root / "reports/records/vision/linear.json", none)
    assert [record.method for record in read_committed(run.root)] == ["prune"]


def test_the_committed_records_of_earlier_code_are_still_read():
    records = REPOSITORY / "reports/records"
    files = [json.loads(path.read_text()) for path in records.glob("*/*.json")]
    applicable = [cell for cell in files if "not_applicable" not in cell]
    assert len(read_committed(REPOSITORY)) == len(applicable) > 0
    assert len(read_committed_scratch(REPOSITORY)) == len(list(records.glob("scratch/*/*.json"))) > 0


def test_a_corrupt_failure_is_named(run: Run):
    run.cells(factory.all_cells())
    run.fail(factory.failure("vision", "snnk"))
    (run.root / "results" / "failures" / "vision-snnk.json").write_text("[")
    with pytest.raises(ReportError, match=r"failures/vision-snnk\.json: not a valid Failure"):
        read_run(run.root)


def test_a_committed_record_must_match_its_place(run: Run):
    run.commit([factory.cell("vision", "prune")])
    folder = run.root / "reports" / "records" / "vision"
    (folder / "prune.json").rename(folder / "narrow.json")
    with pytest.raises(ReportError, match="holds the cell vision/prune, not vision/narrow"):
        read_committed(run.root)


@pytest.mark.parametrize("content", ["tasks: [", "- a", "tasks: {}\nmethods: 3\n"])
def test_bad_parameters_are_named(tmp_path: Path, content: str):
    path = tmp_path / "params.yaml"
    path.write_text(content)
    with pytest.raises(ReportError, match=r"params\.yaml"):
        read_params(path)


def test_missing_parameters_are_named(tmp_path: Path):
    with pytest.raises(ReportError, match=r"params\.yaml: cannot be read"):
        read_params(tmp_path / "params.yaml")
