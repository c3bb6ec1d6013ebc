"""Failures as the report reads them."""

from __future__ import annotations

import json
from pathlib import Path

from flows import results
from stages.tracking.record import Failure


def test_a_recorded_failure_is_one_that_the_report_can_read(tmp_path: Path):
    results.record_failure(tmp_path, "transfer@vision-low_rank", "killed after 5 s")
    file = tmp_path / "results" / "failures" / "vision-low_rank.json"
    failure = Failure.model_validate_json(file.read_text())
    assert (failure.stage, failure.task, failure.method) == ("transfer", "vision", "low_rank")
    assert results.read_failure(tmp_path, "transfer@vision-low_rank") == "killed after 5 s"
    results.record_failure(tmp_path, "baseline@vision", "disk full")
    whole_task = Failure.model_validate_json((file.parent / "vision-all.json").read_text())
    assert whole_task.method is None


def test_the_stages_own_reason_is_kept(tmp_path: Path):
    results.record_failure(tmp_path, "transfer@vision-x", "ValueError: NaN")
    results.record_failure(tmp_path, "transfer@vision-x", "ended with 1")
    assert results.read_failure(tmp_path, "transfer@vision-x") == "ValueError: NaN"


def test_a_failure_of_another_stage_of_the_cell_stands(tmp_path: Path):
    results.record_failure(tmp_path, "finetune@vision-x", "diverged")
    assert not results.clear_failures(tmp_path, ["transfer@vision-x"])
    assert results.read_failure(tmp_path, "finetune@vision-x") == "diverged"
    assert results.clear_failures(tmp_path, ["finetune@vision-x"])
    assert not list((tmp_path / "results" / "failures").iterdir())


def test_a_broken_failure_file_counts_as_none(tmp_path: Path):
    file = results.failure_path(tmp_path, "transfer@vision-x")
    file.parent.mkdir(parents=True)
    file.write_text("{")
    assert results.read_failure(tmp_path, "transfer@vision-x") is None
    results.record_failure(tmp_path, "transfer@vision-x", "killed")
    assert json.loads(file.read_text())["error"] == "killed"


def test_rows_of_a_missing_table(tmp_path: Path):
    assert results.result_rows(tmp_path) == []


def test_what_is_trained_from_scratch_fails_beside_the_transfer_of_the_same_name(tmp_path):
    results.record_failure(tmp_path, "scratch@vision-eugen", "diverged")
    assert results.read_failure(tmp_path, "scratch@vision-eugen") == "diverged"
    assert results.read_failure(tmp_path, "transfer@vision-eugen") is None
    results.record_failure(tmp_path, "transfer@vision-eugen", "no memory")
    assert results.read_failure(tmp_path, "scratch@vision-eugen") == "diverged"
    assert not results.clear_failures(tmp_path, ["finetune@vision-eugen"])
    assert results.clear_failures(tmp_path, ["scratch@vision-eugen"])
    assert results.read_failure(tmp_path, "transfer@vision-eugen") == "no memory"
