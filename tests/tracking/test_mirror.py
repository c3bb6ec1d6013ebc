"""Runs in MLflow's own database: content, concurrency, kills, locks."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from stages.tracking import delivery, mirror, outbox, process
from tests.tracking.conftest import Stage, environment, finish, until

pytestmark = pytest.mark.slow

STAGE = """
import sys
from pathlib import Path
from stages.tracking import stage_run
Path("weights.bin").write_text("w")
params = {"transfer": {"seeds": [0, 1], "budgets": [0.3]}, "long": "x" * 9000}
params |= {f"p{number}": number for number in range(120)}
with stage_run("transfer", task="vision", method=METHOD, params=params) as run:
    run.metrics({"quality": 0.9, "speed-up/b1": 1.5}, step=2)
    run.curve("loss", [(step, 1 / (step + 1)) for step in range(2500)])
    run.artifact("weights.bin", folder="weights")
    run.dataset("mnist_5k", sha256="ab" * 32, rows=5000)
    run.tag("note", "n")
    run.progress("inside")
    BODY
"""


def stage(method: str, body: str = "pass") -> str:
    return STAGE.replace("METHOD", repr(method)).replace("BODY", body)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a database: creating one takes seconds."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mirror.Mirror()
    return folder


@pytest.fixture
def project(store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(store)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return store


def runs(folder: Path, method: str, experiment: str = "eugen") -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(
        client.search_runs([found.experiment_id], f"tags.method = '{method}'", order_by=["start_time"])
    )


def journal(method: str, **start: object) -> outbox.Journal:
    """A journal of a stage that is over; its owner is this process."""
    tags = {"method": method, "cell": method, "checkout": "here"}
    made = outbox.Journal.create(
        f"transfer-vision-{method}",
        {"name": "n", "params": {}, "tags": tags, "time": outbox.now_ms()} | start,
    )
    line = '{"kind": "metrics", "rows": [["quality", 0.5, 1700000000000, 0]]}'
    outbox.append_lines(made.folder / "events.jsonl", [line])
    return made


@pytest.fixture(scope="module")
def rerun(store: Path) -> str:
    """A stage whose process group is killed after it spoke, then the same again; what that one said."""
    command = [sys.executable, "-c", stage("eugen", "input()")]
    pipe, extra = subprocess.PIPE, environment(EUGEN_PIPELINE_RUN="night-7")
    with subprocess.Popen(command, cwd=store, env=extra, stdin=pipe, start_new_session=True) as killed:
        until(lambda: len(runs(store, "eugen")) == 1, "the run to be opened")
        assert runs(store, "eugen")[0].info.status == "RUNNING"
        os.killpg(killed.pid, signal.SIGKILL)
    command[-1] = stage("eugen")
    again = subprocess.run(command, cwd=store, env=extra, capture_output=True, text=True, check=True)
    return again.stdout + again.stderr


def test_a_stage_becomes_one_complete_run(project: Path, rerun: str) -> None:
    run = runs(project, "eugen")[-1]
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    assert rerun == "inside\n"
    assert (run.info.status, run.info.run_name) == ("FINISHED", "eugen vision transfer")
    tags = run.data.tags
    assert (tags["stage"], tags["task"], tags["seed"], tags["note"]) == ("transfer", "vision", "[0, 1]", "n")
    assert tags["pipeline_run"] == "night-7" and len(tags["cell"]) == 16 and len(tags["params_hash"]) == 16
    assert run.data.params["transfer.budgets"] == "[0.3]" and run.data.params["p119"] == "119"
    assert len(run.data.params["long"]) == 6000 and run.data.params["long"].endswith("…")
    assert run.data.metrics["quality"] == 0.9 and run.data.metrics["speed-up/b1"] == 1.5
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(step, 1 / (step + 1)) for step in range(2500)]
    (used,) = run.inputs.dataset_inputs
    assert used.dataset.name == "mnist_5k" and "ab" * 32 in used.dataset.profile
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"weights", "params.json"}
    assert [f.path for f in client.list_artifacts(run.info.run_id, "weights")] == ["weights/weights.bin"]
    assert run.data.metrics["system/cpu_utilization_percentage"] >= 0
    assert run.data.metrics["system/stage_memory_megabytes"] > 1


def test_a_killed_stage_is_a_killed_run_once_it_runs_again(project: Path, rerun: str) -> None:
    first, second = runs(project, "eugen")
    assert (first.info.status, second.info.status) == ("KILLED", "FINISHED")
    assert first.data.metrics["quality"] == 0.9, "what was said before the kill is kept"
    assert not list(outbox.OUTBOX.iterdir()) and not list(process.LOCKS.glob("upload-*"))


def test_one_recorder_serves_all_stages(project: Path, start: Stage, tmp_path: Path) -> None:
    shared = start("from stages.tracking import recorder; recorder.main([])", project)
    until(delivery.shared_recorder_serves, "the shared recorder")
    no_own = "assert not list(Path('.work').rglob('recorder.log'))"
    assert finish(start(stage("shared", no_own), project))[1] == ""
    failing = start(stage("failing", "raise ValueError('no convergence')"), project)
    _, err = failing.communicate(timeout=120)
    assert failing.returncode == 1 and "no convergence" in err and "tracking:" not in err
    killed, late = (start(stage(method, "input()"), project) for method in ("killed", "late"))
    until(lambda: len(runs(project, "killed")) == len(runs(project, "late")) == 1, "the runs to be opened")
    killed.kill()
    killed.communicate()
    until(lambda: runs(project, "killed")[0].info.status == "KILLED", "the kill to be noticed")
    finish(shared)
    _, err = late.communicate("\n", timeout=120)  # its recorder is gone: it helps itself
    assert (late.returncode, err) == (0, "")
    states = {"shared": "FINISHED", "failing": "FAILED", "killed": "KILLED", "late": "FINISHED"}
    for method, status in states.items():
        (run,) = runs(project, method)
        assert run.info.status == status and run.data.metrics["system/stage_memory_megabytes"] > 1
    (run,) = runs(project, "failing")
    assert run.data.tags["error"] == "ValueError: no convergence"
    folder = Path(MlflowClient().download_artifacts(run.info.run_id, "failure", str(tmp_path)))
    assert "Traceback" in (folder / "vision-failing.json").read_text()
    assert not list(outbox.OUTBOX.iterdir()) and not delivery.SHARED.exists()
    assert not list(process.LOCKS.glob("upload-*"))


def test_a_killed_run_whose_journal_is_gone_is_killed_too(project: Path) -> None:
    mine = mirror.Mirror()
    first, other = journal("linear"), journal("snnk")
    mine.open(first), mine.open(other)
    first.remove()
    mine.open(journal("linear"))
    assert [run.info.status for run in runs(project, "linear")] == ["KILLED", "RUNNING"]
    assert [run.info.status for run in runs(project, "snnk")] == ["RUNNING"], "another cell's is not touched"
    for left in outbox.OUTBOX.iterdir():
        shutil.rmtree(left)


def test_sending_a_journal_twice_doubles_nothing(project: Path, tmp_path: Path) -> None:
    mine, once = mirror.Mirror(), journal("low_rank", params={"a": "1"})
    once.write_end("FINISHED")
    shutil.copytree(once.folder, tmp_path / "again")
    mine.deliver(once)
    shutil.copytree(tmp_path / "again", once.folder)  # as if the power failed before the folder was removed
    assert mirror.flush_outbox(mine) == 1
    (run,) = runs(project, "low_rank")
    assert len(mine.client.get_metric_history(run.info.run_id, "quality")) == 1
    assert run.info.status == "FINISHED" and not list(outbox.OUTBOX.iterdir())


def test_one_bad_journal_stops_no_other(project: Path) -> None:
    bad, good = journal("bad"), journal("good")
    outbox.append_lines(bad.folder / "events.jsonl", ["no json"])
    for each in (bad, good):
        each.write_end("FINISHED")
    assert mirror.flush_outbox(mirror.Mirror()) == 1
    assert [path.name for path in outbox.OUTBOX.iterdir()] == [bad.name]
    assert runs(project, "good")[0].info.status == "FINISHED"
    bad.remove()


def test_a_locked_database_is_said_and_made_up_for(project: Path, start: Stage) -> None:
    connection = sqlite3.connect(project / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    try:
        uri = f"sqlite:///{project}/mlflow.db?timeout=1"
        _, err = finish(start(stage("dense"), project, MLFLOW_TRACKING_URI=uri))
    finally:
        connection.close()
    assert err.count("tracking:") == 1 and "database is locked" in err
    assert "work goes on" in err and ".work/outbox" in err
    (project / "weights.bin").unlink()
    assert mirror.flush_outbox(mirror.Mirror()) == 1
    (run,) = runs(project, "dense")
    assert run.info.status == "FINISHED" and run.data.metrics["quality"] == 0.9
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    assert [f.path for f in client.list_artifacts(run.info.run_id, "weights")] == ["weights/weights.bin"]


CUT_SHORT = """
import os, signal, threading, time
from pathlib import Path
from stages.tracking import mirror
def kill():
    while not any(path.stat().st_size for path in Path().glob("mlflow.db*")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=kill).start()
mirror.Mirror()
"""


def test_a_kill_while_the_database_is_made_leaves_no_half(
    tmp_path: Path, start: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = start(CUT_SHORT)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "mlflow.db").exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    mirror.Mirror().deliver(journal("after"))
    assert [run.info.status for run in runs(tmp_path, "after")] == ["KILLED"]


def test_stages_that_meet_on_a_fresh_database_share_one_experiment(tmp_path: Path, start: Stage) -> None:
    started = [start(stage(method)) for method in ("one", "two")]
    for each in started:
        assert finish(each)[1] == ""
    for method in ("one", "two"):
        assert [run.info.status for run in runs(tmp_path, method)] == ["FINISHED"]
        assert runs(tmp_path, method, "Default") == []
