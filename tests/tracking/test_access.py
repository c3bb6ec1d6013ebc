"""A real MLflow server that asks for a password: refused without, a run with it, printed nowhere."""

from __future__ import annotations

import http.client
import socket
import stat
import subprocess
import sys
from datetime import UTC, datetime
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


@pytest.mark.parametrize("given", [None, "", "server:5000, proxy.example.org"])
@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "0.0.0.0", "203.0.113.5", "example.org", "::"])
@pytest.mark.parametrize("port", [5000, 80])
def test_a_server_knows_its_own_address(
    monkeypatch: pytest.MonkeyPatch, given: str | None, host: str, port: int
):
    """By MLflow's own check of a request's host, as Python's client writes it for `check_served`, too."""
    from mlflow.server import security_utils

    monkeypatch.delenv("MLFLOW_SERVER_ALLOWED_HOSTS", raising=False)
    if given is not None:
        monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", given)
    if (names := access.allowed_hosts(host, port)) is not None:
        monkeypatch.setenv("MLFLOW_SERVER_ALLOWED_HOSTS", names)
    known = security_utils.get_allowed_hosts_from_env() or security_utils.get_default_allowed_hosts()
    for name in (host, "localhost", "127.0.0.1"):
        assert security_utils.is_allowed_host_header(known, sent(name, port)), known
    for name in ("192.168.1.2:5000", "localhost:1234") if not given else ("server:5000", "proxy.example.org"):
        assert security_utils.is_allowed_host_header(known, name), f"{name}, as without us"
    assert not security_utils.is_allowed_host_header(known, "attacker.example.org:5000")


def sent(host: str, port: int) -> str:
    """The header Host of a request."""
    connection = http.client.HTTPConnection(host, port)
    connection.sock, other = socket.socketpair()
    with connection.sock, other:
        connection.request("GET", "/")
        lines = other.recv(4096).decode().split("\r\n")
    return next(line.removeprefix("Host: ") for line in lines if line.startswith("Host: "))


def test_a_second_start_keeps_the_first_one_s_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = tmp_path / "server"
    program.write_text("#!/bin/sh\necho it says $3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    for _ in range(2):
        assert ui.start_server("127.0.0.1", 5000).wait() == 0
    lines = ui.LOG.read_text().splitlines()
    assert lines[1::2] == ["it says server"] * 2
    begun = [datetime.fromisoformat(line.removeprefix("--- ").removesuffix(" start")) for line in lines[::2]]
    assert all(abs((datetime.now(UTC) - time).total_seconds()) < 60 for time in begun) and len(begun) == 2


@pytest.mark.slow
def test_behind_other_names_on_all_addresses_it_starts_and_asks_for_the_password(tmp_path: Path):
    """As in compose.yaml."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "stages.tracking.ui", "--host", "0.0.0.0", "--port", str(port), "--auth"]
    given = environment(
        MLFLOW_SERVER_ALLOWED_HOSTS="server:5000", MLFLOW_TRACKING_PASSWORD="one of my own, long"
    )
    pipe = subprocess.PIPE
    server = subprocess.Popen(command, cwd=tmp_path, env=given, stdout=pipe, stderr=pipe, text=True)
    try:
        assert server.stdout is not None and server.stderr is not None
        while "ctrl-C" not in (line := server.stdout.readline()):
            assert line, server.stderr.read()

        def status(host: str, *password: str) -> int:
            url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search?max_results=1"
            asked = ("admin", *password) if password else None
            return httpx.get(url, headers={"Host": host}, auth=asked).status_code

        names = ["server:5000", f"0.0.0.0:{port}", f"127.0.0.1:{port}", f"localhost:{port}"]
        assert {status(name) for name in names} == {401}
        assert {status(name, "one of my own, long") for name in names} == {200}
        assert status("attacker.example.org:5000", "one of my own, long") == 403
    finally:
        server.terminate()
        server.communicate()


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
