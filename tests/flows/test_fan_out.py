"""Cells on workers: how they are grouped, and a run through a real server, worker and remote."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flows.fan_out.cells import WrongClone, check_commit
from flows.fan_out.coordinator import cell_graph
from tests.flows.toy import ROOT, Toy, ask, wait_for

UPSTREAM = {
    "prepare@a": frozenset[str](),
    "baseline@a": frozenset({"prepare@a"}),
    "transfer@a-x": frozenset({"baseline@a"}),
    "profile@a-x": frozenset({"transfer@a-x", "prepare@a"}),
    "transfer@a-y": frozenset({"baseline@a"}),
    "report": frozenset({"profile@a-x"}),
}


def test_stages_of_one_cell_travel_together_after_those_of_their_task():
    stages, needs = cell_graph(UPSTREAM, list(UPSTREAM))
    assert stages == {
        "cell@a": ["prepare@a", "baseline@a"],
        "cell@a-x": ["transfer@a-x", "profile@a-x"],
        "cell@a-y": ["transfer@a-y"],
    }
    assert needs == {"cell@a": set(), "cell@a-x": {"cell@a"}, "cell@a-y": {"cell@a"}}


def test_what_is_up_to_date_is_not_waited_for():
    stages, needs = cell_graph(UPSTREAM, ["profile@a-x", "report"])
    assert stages == {"cell@a-x": ["profile@a-x"]} and needs == {"cell@a-x": set()}


def test_a_clone_at_another_commit_is_refused_with_the_cure(tmp_path: Path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    here = subprocess.run(
        [*git, "rev-parse", "HEAD"], check=True, text=True, capture_output=True
    ).stdout.strip()
    check_commit(tmp_path, here)
    with pytest.raises(WrongClone, match=f"git -C {tmp_path} checkout {'0' * 10}"):
        check_commit(tmp_path, "0" * 40)
    (tmp_path / "eugen").mkdir()
    (tmp_path / "eugen" / "ffn.py").write_text("# debugged here\n")
    with pytest.raises(WrongClone, match=r"changes that no commit has.*stash -u\n\?\? eugen/"):
        check_commit(tmp_path, here)


def scheduled(server: dict[str, str]) -> bool:
    """Whether the server has made a run for a schedule."""
    return any(run["auto_scheduled"] for run in ask(server, "flow_runs/filter", {}))


@pytest.mark.slow
def test_a_fanned_out_run_gives_what_dvc_gives(
    fresh: Toy, finished: Toy, prefect_server: dict[str, str], tmp_path: Path
):
    """One worker with a clone of its own; the coordinator computes the report only.

    Both have trained a baseline, and measured different times: the coordinator's is the one that counts.
    """
    worker = Toy(tmp_path / "worker", fresh.env)
    subprocess.run(["cp", "-r", str(fresh.folder), str(worker.folder)], check=True)
    worker.behave(**{"baseline@vision": {"salt": "other times"}})
    for toy in (fresh, worker):
        assert toy.dvc("repro", "-q", "baseline@vision").returncode == 0
        assert toy.calls() == ["prepare@vision", "baseline@vision"]
    worker.behave(**{"transfer@vision-eugen": {"fail": "loss is NaN"}})
    env = fresh.env | prefect_server | {"EUGEN_DVC_REMOTE": str(tmp_path / "remote"), "PYTHONPATH": str(ROOT)}

    def operate(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flows.operate", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, start_new_session=True
        )

    said, _ = operate("deploy").communicate(timeout=120)
    assert "work pool cpu-pool made" in said and "deployed" in said
    wait_for(lambda: scheduled(prefect_server), "run of the nightly schedule")  # sqlalchemy 2.1 makes none
    serving = operate("worker", "--pool", "cpu-pool", "--project", str(worker.folder))
    try:
        lock = worker.folder / ".work" / "worker-cpu-pool.lock"
        wait_for(lambda: lock.exists() and lock.read_text(), "worker")
        again = operate("worker", "--pool", "cpu-pool", "--project", str(worker.folder))
        said, _ = again.communicate(timeout=60)
        assert f"a worker of this clone serves cpu-pool (process {serving.pid})" in said
        remote = {"EUGEN_DVC_REMOTE": env["EUGEN_DVC_REMOTE"]}
        code, output = fresh.bench("--pool", "cpu-pool", **prefect_server, **remote)
        assert code == 1 and "FAILED transfer@vision-eugen: " in output, output
        assert "skipped, because they need it: finetune@vision-eugen, profile@vision-eugen" in output
        assert fresh.calls() == ["report"], "the rest came from the worker"
        assert (
            json.loads((fresh.folder / "results/failures/vision-eugen.json").read_text())["stage"]
            == "transfer"
        )

        worker.behave()
        code, output = fresh.bench("--pool", "cpu-pool", **prefect_server, **remote)
        assert code == 0 and fresh.calls() == ["report"], output
        assert fresh.outputs() == finished.outputs()
    finally:
        os.killpg(serving.pid, signal.SIGKILL)
        serving.communicate()


def test_fan_out_says_what_it_lacks(fresh: Toy, finished: Toy):
    code, output = fresh.bench("--pool", "cpu-pool", "--engine", "dvc")
    assert code == 2 and "leave --engine out" in output
