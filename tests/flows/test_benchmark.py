"""The command as a person types it, against a real Prefect server and with plain DVC."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.flows.toy import STAGES, Toy, gone, newest, wait_for

STAGE = "transfer@vision-eugen"


def test_the_flow_gives_what_dvc_gives_and_a_second_run_runs_nothing(
    fresh: Toy, finished: Toy, prefect_server: dict[str, str]
):
    code, output = fresh.bench("--jobs", "2", **prefect_server)
    assert code == 0, output
    assert fresh.outputs() == finished.outputs()
    calls = fresh.calls()
    assert len(calls) == STAGES and calls[-1] == "report"
    assert f"{STAGE}  seed 1/1 of {STAGE}" in output
    assert "Traceback" not in output and "lock file" not in output, "neither Prefect's talk nor DVC's"
    assert "report.html" in output and f"{STAGES} done" in output
    assert newest(prefect_server, "flow_runs")["state_name"] == "Completed"
    results = {"key": {"any_": ["benchmark-results"]}}
    assert "vision" in newest(prefect_server, "artifacts", artifacts=results)["data"]

    code, output = fresh.bench(**prefect_server)
    assert code == 0 and fresh.calls() == [] and f"{STAGES} up to date, 0 to do" in output


@pytest.mark.parametrize("engine", ["prefect", "dvc"])
def test_a_failing_cell_leaves_its_siblings_and_the_report(
    finished: Toy, prefect_server: dict[str, str], engine: str
):
    with (finished.folder / "stages" / "transfer.py").open("a") as source:
        source.write("# changed\n")
    finished.behave(**{STAGE: {"fail": "loss is NaN"}})
    code, output = finished.bench("--engine", engine, **prefect_server)
    assert code == 1, output
    assert f"FAILED {STAGE}" in output
    assert "skipped, because they need it: finetune@vision-eugen, profile@vision-eugen" in output
    calls = finished.calls()
    assert calls.count(STAGE) == (2 if engine == "prefect" else 1), "Prefect tries it once more"
    assert calls[-1] == "report" and "profile@vision-dense" in calls
    failure = json.loads((finished.folder / "results" / "failures" / "vision-eugen.json").read_text())
    assert failure["stage"] == "transfer"
    if engine == "dvc":
        return
    assert failure["error"] == "ValueError: loss is NaN"
    assert newest(prefect_server, "flow_runs")["state_name"] == "Failed"

    finished.behave()
    code, output = finished.bench("--engine", "dvc", **prefect_server)
    assert code == 0 and not list((finished.folder / "results" / "failures").iterdir())
    assert set(finished.calls()) == {STAGE, "finetune@vision-eugen", "profile@vision-eugen", "report"}


def test_wrong_parameters_stop_before_any_work(fresh: Toy):
    (fresh.folder / "stages" / "__init__.py").touch()
    (fresh.folder / "stages" / "validate.py").write_text("raise SystemExit(2)")
    (fresh.folder / "stages" / "__init__.py").touch()
    code, output = fresh.bench()
    assert code == 2 and fresh.calls() == [], output


@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_every_stage_and_starts_none(
    finished: Toy, prefect_server: dict[str, str], with_signal: signal.Signals
):
    with (finished.folder / "stages" / "transfer.py").open("a") as source:
        source.write("# changed\n")
    finished.behave(**{STAGE: {"hang": True}})
    process = finished.start("--jobs", "2", **prefect_server)
    pids = finished.hanging()
    process.send_signal(with_signal)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert all(gone(pid) for pid in pids)
    assert "report" not in finished.calls() and "stopped" in output and "Traceback" not in output


def test_a_run_killed_in_mid_stage_is_finished_by_the_next_with_equal_results(
    fresh: Toy, finished: Toy, prefect_server: dict[str, str]
):
    fresh.behave(**{STAGE: {"hang": True}})
    process = fresh.start("--jobs", "1", **prefect_server)
    pids = fresh.hanging()
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for(lambda: all(gone(pid) for pid in pids), "end of the killed stage and its child", 10)
    (fresh.folder / ".dvc" / "tmp" / "rwlock").write_text('{"write": {"')
    before = fresh.calls()
    fresh.behave()
    code, output = fresh.bench("--engine", "dvc", **prefect_server)
    assert code == 0 and "table of locks" in output, output
    assert fresh.outputs() == finished.outputs()
    assert not set(fresh.calls()) & (set(before) - {STAGE}), "what was finished is not run again"


@pytest.mark.slow
def test_without_a_server_the_clone_starts_its_own_for_the_run(finished: Toy, tmp_path: Path):
    with (finished.folder / "stages" / "profile.py").open("a") as source:
        source.write("# changed\n")
    code, output = finished.bench(PREFECT_HOME=str(tmp_path / "home"))
    assert code == 0 and "Traceback" not in output, output
    assert (tmp_path / "home" / "prefect.db").exists()
    assert sorted(finished.calls()) == ["profile@vision-dense", "profile@vision-eugen", "report"]
