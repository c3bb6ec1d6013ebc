"""A real MLflow server: down, then up; and the command that starts one."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.tracking.conftest import Stage, environment, finish

pytestmark = pytest.mark.slow

STAGE = """
from pathlib import Path
from stages.tracking import stage_run
Path("weights.bin").write_text("METHOD")
with stage_run("profile", task="vision", method="METHOD", params={"seeds": [0]}) as run:
    run.metrics({"quality": 0.9})
    run.artifact("weights.bin")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ui(folder: Path, port: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "stages.tracking.ui", "--port", str(port)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment(), stdout=pipe, stderr=pipe, text=True)


def test_records_reach_a_server_that_was_down(tmp_path: Path, start: Stage) -> None:
    port, home, work = free_port(), tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    uri = f"http://127.0.0.1:{port}"
    _, err = finish(start(STAGE.replace("METHOD", "dense"), work, MLFLOW_TRACKING_URI=uri))
    assert err.count("tracking:") == 1 and f"server {uri} unreachable" in err and "refused" in err
    assert len(list((work / ".work/outbox").iterdir())) == 1

    server = ui(home, port)
    try:
        assert server.stdout is not None and server.stderr is not None
        assert server.stdout.readline().split()[-1] == uri
        link = server.stdout.readline()
        assert f"{uri}/#/experiments/" in link and "searchFilter=tags.stage%20%3D%20%27profile%27" in link
        assert "ctrl-C" in server.stdout.readline()
        _, err = finish(start(STAGE.replace("METHOD", "eugen"), work, MLFLOW_TRACKING_URI=uri))
        assert err == "" and not list((work / ".work/outbox").iterdir())
        check_runs(uri, tmp_path)
        log = (home / ".work" / "mlflow-server.log").read_text()
        assert log.count('"PUT /api/2.0/mlflow-artifacts/') == 2, "from another machine no other way works"
        second = ui(home, port)
        _, err = second.communicate(timeout=60)
        assert second.returncode == 1 and f"port {port} of 127.0.0.1 is in use" in err and "--port" in err
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=60)
        assert server.returncode == 0, err
    finally:
        server.terminate()
        server.communicate()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "the server outlived its starter"


def check_runs(uri: str, folder: Path) -> None:
    """Both runs are there once, whole, with their own artifact."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("eugen")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], "tags.stage = 'profile'")
    assert sorted(run.info.run_name for run in found) == ["dense vision profile", "eugen vision profile"]
    for run in found:
        assert run.info.status == "FINISHED" and run.data.metrics["quality"] == 0.9
        assert len(client.get_metric_history(run.info.run_id, "quality")) == 1
        target = folder / run.info.run_id
        target.mkdir()
        file = client.download_artifacts(run.info.run_id, "weights.bin", str(target))
        assert Path(file).read_text() == run.data.tags["method"]
