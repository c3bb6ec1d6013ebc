"""One stage at a time with the real DVC: outcomes, time limits, stopping, repairs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flows.dvc.runner import DvcRunner, StageFailed, Stopped
from tests.flows.toy import STAGES, Toy, gone

STAGE = "transfer@vision-eugen"


def runner_of(toy: Toy) -> tuple[DvcRunner, list[str]]:
    said: list[str] = []
    return DvcRunner(toy.folder, "test-run", said.append), said


def touch(toy: Toy, path: str) -> None:
    with (toy.folder / path).open("a") as file:
        file.write(f"# {time.time_ns()}\n")


def test_graph_and_staleness_come_from_dvc(finished: Toy):
    runner, said = runner_of(finished)
    survey = runner.look()
    assert len(survey.upstream) == STAGES and not survey.stale and not said
    assert survey.upstream[STAGE] == {"prepare@vision", "baseline@vision"}
    assert {"profile@vision-dense", "profile@vision-eugen"} <= survey.upstream["report"]


def test_one_new_method_line_makes_only_its_cells_stale(finished: Toy):
    params = finished.folder / "params.yaml"
    params.write_text(params.read_text().replace("methods:\n", "methods:\n  narrow:\n    layer: narrow\n"))
    survey = runner_of(finished)[0].look()
    assert survey.stale == {f"{verb}@vision-narrow" for verb in ("transfer", "finetune", "profile")}
    assert len(survey.upstream) == STAGES + 3


def test_a_new_record_of_a_regression_makes_the_report_stale_and_nothing_else(finished: Toy):
    record = finished.folder / "results" / "regressions" / "20260102T030405-2222222.json"
    record.parent.mkdir()
    record.write_text("{}")
    assert runner_of(finished)[0].look().stale == {"report"}


def test_outcomes_and_progress(finished: Toy):
    runner, _ = runner_of(finished)
    assert runner.run_stage(STAGE, timeout_s=60, say=print) == "unchanged"
    (finished.folder / "artifacts/transfer/vision/eugen/content").unlink()
    assert runner.run_stage(STAGE, timeout_s=60, say=print) == "restored"
    touch(finished, "stages/transfer.py")
    lines: list[str] = []
    assert runner.run_stage(STAGE, timeout_s=60, say=lines.append) == "run"
    assert lines == [f"seed 1/1 of {STAGE}"], "nothing of DVC's own talk"
    assert finished.calls() == [STAGE]


def test_a_failed_stage_gives_its_reason_and_whether_to_try_again(finished: Toy):
    runner, _ = runner_of(finished)
    touch(finished, "stages/transfer.py")
    finished.behave(**{STAGE: {"fail": "loss is NaN"}})
    with pytest.raises(StageFailed, match="loss is NaN") as failed:
        runner.run_stage(STAGE, timeout_s=60, say=print)
    assert failed.value.worth_a_retry
    finished.behave(**{STAGE: {"fail": "unknown method", "code": 2}})
    with pytest.raises(StageFailed) as failed:
        runner.run_stage(STAGE, timeout_s=60, say=print)
    assert not failed.value.worth_a_retry


def test_the_time_limit_kills_the_stage_and_its_children_and_leaves_dvc_usable(finished: Toy):
    runner, said = runner_of(finished)
    touch(finished, "stages/transfer.py")
    finished.behave(**{STAGE: {"hang": True}})
    with pytest.raises(StageFailed, match="killed after 5 s, its time limit") as failed:
        runner.run_stage(STAGE, timeout_s=5, say=print)
    assert not failed.value.worth_a_retry
    assert all(gone(pid) for pid in finished.hanging())
    finished.behave()
    assert runner.run_stage(STAGE, timeout_s=60, say=print) == "run" and not said


def test_stop_kills_what_runs_and_lets_nothing_start(finished: Toy):
    runner, _ = runner_of(finished)
    touch(finished, "stages/transfer.py")
    finished.behave(**{STAGE: {"hang": True}})
    raised: list[type] = []

    def work() -> None:
        try:
            runner.run_stage(STAGE, timeout_s=600, say=print)
        except Stopped as stopped:
            raised.append(type(stopped))

    thread = threading.Thread(target=work)
    thread.start()
    pids = finished.hanging()
    runner.stop()
    assert all(gone(pid) for pid in pids)
    thread.join(10)
    assert raised == [Stopped]
    with pytest.raises(Stopped):
        runner.run_stage("report", timeout_s=60, say=print)


@pytest.mark.parametrize("content", ["", "<<<<<<< HEAD\na: 1\n"])
def test_a_broken_dvc_lock_is_put_aside_and_restored_without_running(finished: Toy, content: str):
    runner, said = runner_of(finished)
    (finished.folder / "dvc.lock").write_text(content)
    survey = runner.look()
    assert "dvc.lock was unreadable" in said[0]
    assert (finished.folder / ".work" / "dvc.lock.broken").read_text() == content
    assert len(survey.stale) == STAGES
    if not content:
        for stage in ("prepare@vision", "baseline@vision", STAGE):
            assert runner.run_stage(stage, timeout_s=60, say=print) == "restored"
        assert finished.calls() == []


@pytest.mark.parametrize("content", ["", '{"write": {"a', "[]", '{"write": {"a": {}}}'])
def test_a_broken_table_of_locks_is_deleted(finished: Toy, content: str):
    table = finished.folder / ".dvc" / "tmp" / "rwlock"
    table.write_text(content)
    runner, said = runner_of(finished)
    assert not runner.look().stale
    assert "table of locks" in said[0] and isinstance(json.loads(table.read_text()), dict)


def test_locks_of_a_process_id_that_is_something_else_now_are_deleted(finished: Toy):
    table = finished.folder / ".dvc" / "tmp" / "rwlock"
    held = {
        "write": {str(finished.folder / "data/vision"): {"pid": os.getpid(), "cmd": "dvc repro"}},
        "read": {},
    }
    table.write_text(json.dumps(held))
    runner, said = runner_of(finished)
    runner.look()
    assert f"[{os.getpid()}]" in said[0]


def test_a_dvc_command_of_the_users_own_is_named_and_waited_for(finished: Toy):
    touch(finished, "stages/transfer.py")
    finished.behave(**{STAGE: {"hang": True}})
    command = [sys.executable, "-m", "dvc", "repro", "-s", STAGE]
    theirs = subprocess.Popen(command, cwd=finished.folder, env=finished.env, stdout=subprocess.DEVNULL)
    pids = finished.hanging()
    told = threading.Event()
    runner = DvcRunner(finished.folder, "test-run", lambda line: (said.append(line), told.set()))
    said: list[str] = []
    looking = threading.Thread(target=runner.look)
    looking.start()
    assert told.wait(10) and looking.is_alive()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    theirs.wait(20)
    looking.join(30)
    assert said == [f"another DVC command (process {theirs.pid}) works in this clone: waiting until it ends"]
    assert STAGE in runner.survey.stale
