"""The Prefect server and the MLflow server of a clone, started together and ended together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import psutil
from filelock import FileLock, Timeout

from flows.clone import write_whole
from flows.dvc.repair import Say
from flows.machine import child
from flows.machine.programs import stop
from flows.operate import access

START_S = 180.0
"""How long both servers may take to answer."""


class CannotServe(RuntimeError):
    """The servers cannot run. The message says why and what to do."""


def record_path(project: Path) -> Path:
    """Where the clone's running servers are written down, for `flows/__init__.py` to find."""
    return project / ".work" / "servers.json"


def serve(project: Path, host: str, port: int, mlflow_port: int, say: Say) -> None:
    """Run both servers until one ends or this process is told to; returns at once if they run already.

    Raises `OpenToTheNetwork` for an address other than loopback without a password, `CannotServe` for a port
    in use, a server that does not come up, and for servers of this clone that run at other addresses: two
    must not write one database.
    """
    secret = access.server_environment(host)
    prefect, mlflow = f"http://{host}:{port}", f"http://{host}:{mlflow_port}"
    (project / ".work").mkdir(exist_ok=True)
    try:
        lock = FileLock(project / ".work" / "servers.lock").acquire(timeout=0)
    except Timeout:
        if (there := _address_of_running(project)) != f"{prefect}/api":
            raise CannotServe(f"the servers of this clone run at {there}: stop them first") from None
        say(f"the servers of this clone are running: Prefect {prefect}, MLflow {mlflow}")
        return
    with lock:
        _serve(project, host, port, mlflow_port, secret, say)


def _serve(project: Path, host: str, port: int, mlflow_port: int, secret: dict[str, str], say: Say) -> None:
    prefect, mlflow = f"http://{host}:{port}", f"http://{host}:{mlflow_port}"
    for name, wanted in (("PORT", port), ("MLFLOW_PORT", mlflow_port)):
        if not _free(host, wanted):
            raise CannotServe(f"port {wanted} of {host} is in use: stop that program or set {name}")
    auth = bool(secret) or "MLFLOW_TRACKING_PASSWORD" in os.environ
    servers = [
        _start_prefect(project, host, port, secret),
        _start_mlflow(project, host, mlflow_port, auth=auth),
    ]
    try:
        _wait(servers, lambda: _answers(f"{prefect}/api/health") and _answers(f"{mlflow}/health"))
        entry = {"pid": os.getpid(), "created": psutil.Process().create_time(), "prefect": f"{prefect}/api"}
        write_whole(record_path(project), json.dumps(entry).encode())
        say(f"Prefect: {prefect}   workers elsewhere: PREFECT_API_URL={prefect}/api")
        say(f"MLflow:  {mlflow}   workers elsewhere: MLFLOW_TRACKING_URI={mlflow}")
        say("next: make deploy, and make worker POOL=cpu-pool; ctrl-C stops both servers")
        while all(server.poll() is None for server in servers):
            time.sleep(0.5)
        raise CannotServe(
            "a server ended by itself; see .work/prefect-server.log and .work/mlflow-server.out"
        )
    finally:
        record_path(project).unlink(missing_ok=True)
        for server in servers:
            stop(server)


def _start_prefect(project: Path, host: str, port: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    home = os.environ.get("PREFECT_HOME") or str(project / ".work" / "prefect")
    command = child.command("prefect", "server", "start", "--host", host, "--port", str(port))
    # The pages ask the server that they came from, under whatever name the browser knows it.
    pages = {"PREFECT_UI_API_URL": "/api", "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false"}
    return _start(project, command, env | {"PREFECT_HOME": home} | pages, "prefect-server.log")


def _start_mlflow(project: Path, host: str, port: int, *, auth: bool) -> subprocess.Popen[bytes]:
    options = ["--host", host, "--port", str(port), *(["--auth"] if auth else [])]
    return _start(project, child.command("stages.tracking.ui", *options), {}, "mlflow-server.out")


def _start(project: Path, command: list[str], env: dict[str, str], log: str) -> subprocess.Popen[bytes]:
    """A server that dies with this process, even if that is killed, and does not talk to another server."""
    others = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")
    inherited = {name: value for name, value in os.environ.items() if name not in others}
    with (project / ".work" / log).open("ab") as output:
        output.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} start\n".encode())
        output.flush()  # before what the server writes
        return subprocess.Popen(
            command,
            cwd=project,
            env=inherited | env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(servers: list[subprocess.Popen[bytes]], healthy: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not healthy():
        if any(server.poll() is not None for server in servers):
            raise CannotServe(
                "a server did not start; see .work/prefect-server.log and .work/mlflow-server.out"
            )
        if time.monotonic() > deadline:
            raise CannotServe(f"the servers did not answer within {START_S:.0f} s; see the logs in .work")
        time.sleep(0.3)


def _address_of_running(project: Path) -> str:
    """Where the Prefect server of this clone listens; one that is starting is waited for."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        with suppress(OSError, ValueError):
            return json.loads(record_path(project).read_text(encoding="utf-8"))["prefect"]
        time.sleep(0.3)
    raise CannotServe(f"another make server holds this clone and has not started within {START_S:.0f} s")


def _free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _answers(url: str) -> bool:
    """Whether a server is there; one that wants a password is."""
    try:
        with urlopen(url, timeout=5):
            return True
    except HTTPError as error:
        return error.code == 401
    except (URLError, OSError):
        return False
