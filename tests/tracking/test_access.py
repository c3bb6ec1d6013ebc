"""A real MLflow server that asks for a password: refused without, a run with it, printed nowhere."""

from __future__ import annotations

import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from stages.tracking import access, ui
from tests.tracking.conftest import Stage, environment, finish

STAGE = """
from stages.tracking import stage_run
with stage_run("profile", task="vision", method="dense", params={"seeds": [0]}) as run:
    run.metrics({"quality": 0.9})
"""


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_a_server_that_others_reach_without_a_password_is_refused(host: str, tmp_path: Path):
    with pytest.raises(RuntimeError, match="--auth"):
        ui.start_server(host, 5000)
    assert not (tmp_path / ".work/mlflow-server.log").exists(), "it must not even have been started"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_this_machine_alone_needs_none(host: str):
    access.check(host, auth=False)


def test_the_password_is_made_once_and_only_its_owner_may_read_it(monkeypatch: pytest.MonkeyPatch):
    name, password = access.credentials()
    assert name == "admin" and len(password) >= 24
    assert stat.S_IMODE(access.PASSWORD_FILE.stat().st_mode) == 0o600
    assert access.credentials() == (name, password)
    access.PASSWORD_FILE.chmod(0o640)
    with pytest.raises(RuntimeError, match="chmod 600"):
        access.credentials()
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "one of my own")
    assert access.credentials()[1] == "one of my own"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "short")
    with pytest.raises(RuntimeError, match="12 characters") as refused:
        access.credentials()
    assert "short" not in str(refused.value)


@pytest.mark.slow
def test_without_the_password_nothing_with_it_a_run(tmp_path: Path, start: Stage):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    command = [sys.executable, "-m", "stages.tracking.ui", "--port", str(port), "--auth"]
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, cwd=home, env=environment(), stdout=pipe, stderr=pipe, text=True)
    said = ""
    try:
        assert server.stdout is not None and server.stderr is not None
        while "ctrl-C" not in said:
            line = server.stdout.readline()
            assert line, server.stderr.read()
            said += line
        password = (home / access.PASSWORD_FILE).read_text().strip()
        for path in (
            "/",
            "/api/2.0/mlflow/experiments/search?max_results=1",
            "/ajax-api/2.0/mlflow/users/current",
        ):
            assert httpx.get(url + path).status_code == 401, path
            assert httpx.get(url + path, auth=("admin", "password1234")).status_code == 401, path

        _, err = finish(start(STAGE, work, MLFLOW_TRACKING_URI=url))
        assert err.count("tracking:") == 1 and "kept in .work/outbox" in err, err
        known = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password}
        _, err = finish(start(STAGE, work, MLFLOW_TRACKING_URI=url, **known))
        assert err == "" and not list((work / ".work/outbox").iterdir())
        found = httpx.post(
            f"{url}/api/2.0/mlflow/runs/search", json={"experiment_ids": ["1"]}, auth=("admin", password)
        )
        statuses = [run["info"]["status"] for run in found.json()["runs"]]
        assert statuses == ["FINISHED", "FINISHED"], "the refused run was uploaded with the second"

        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        assert len(family) > 1 and not any(password in " ".join(one.cmdline()) for one in family)
        assert password not in said
        assert password not in (home / ".work/mlflow-server.log").read_text()
    finally:
        server.terminate()
        server.communicate()
