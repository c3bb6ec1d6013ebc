"""`python -m stages.tracking.ui`: the project's MLflow server, and the link that compares the methods."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import psutil
import typer

from stages.tracking import access, location, outbox

START_SECONDS = 120.0
LOG = Path(".work/mlflow-server.log")


def is_free(host: str, port: int) -> bool:
    """True if a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def start_server(host: str, port: int, *, auth: bool = False) -> subprocess.Popen[bytes]:
    """Start the server on the project's database, in this process's group: who kills that leaves no server.

    With `auth` it asks for a name and a password (`access`). RuntimeError for an address that other
    machines reach without one.
    """
    access.check(host, auth=auth)
    LOG.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--workers",
        "1",
        "--host",
        host,
        "--port",
        str(port),
    ]
    command += ["--backend-store-uri", location.default_uri(), "--serve-artifacts"]
    command += ["--artifacts-destination", location.artifact_folder().as_uri()]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    environment = os.environ | quiet | {"DO_NOT_TRACK": "1"}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        environment.pop(name, None)
    if (names := access.allowed_hosts(host, port)) is not None:
        environment["MLFLOW_SERVER_ALLOWED_HOSTS"] = names
    if auth:
        command += ["--app-name", "basic-auth"]
        environment |= access.server_environment()
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"--- {datetime.now(UTC).isoformat(timespec='seconds')} start\n")
        log.flush()  # before what the server writes
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def stop_server(server: subprocess.Popen[bytes]) -> None:
    """End the server with its workers, by force if it takes longer than 10 s."""
    try:
        family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for member in family:
            with suppress(psutil.NoSuchProcess):
                end(member)
        _, family = psutil.wait_procs(family, 10)
    server.wait()


def is_healthy(host: str, port: int) -> bool:
    """True once the server answers."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def wait_until_healthy(server: subprocess.Popen[bytes], host: str, port: int) -> None:
    """Return once the server answers. RuntimeError with the end of its log if it does not."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        if is_healthy(host, port):
            return
        time.sleep(0.2)
    end = "\n".join(LOG.read_text(errors="replace").splitlines()[-15:])
    state = "ended" if server.poll() is not None else f"did not answer within {START_SECONDS:.0f} s"
    raise RuntimeError(f"the MLflow server {state}; its log, {LOG}, ends with\n{end}")


def prepare() -> int:
    """Create database and experiment if need be, deliver what waits in the outbox; returns how many."""
    database = location.database()
    made = location.comparison_link() is not None and (database is None or database.exists())
    if made and not outbox.waiting():
        return 0  # importing MLflow takes seconds
    from stages.tracking import mirror

    return mirror.flush_outbox(mirror.Mirror())


def serve(host: str, port: int, *, auth: bool) -> None:
    """Run the server until ctrl-C or SIGTERM."""
    base = f"http://{host}:{port}"
    server = start_server(host, port, auth=auth)
    try:
        wait_until_healthy(server, host, port)
        if auth:
            access.check_served(host, port)
        print(f"MLflow:           {base}\ncompare methods:  {location.comparison_link(base)}")
        for cell in sorted(Path("results/cells").glob("*-dense.json")):
            task = cell.stem.removesuffix("-dense")
            print(f"  {task}:  {location.comparison_link(base, task)}")
        if auth:
            name, file = access.credentials()[0], access.PASSWORD_FILE
            given = "MLFLOW_TRACKING_PASSWORD" if os.environ.get("MLFLOW_TRACKING_PASSWORD") else file
            print(f"it asks for a name and a password: {name}, and what {given} holds")
        print("ctrl-C stops the server", flush=True)
        if server.wait() != 0:
            raise RuntimeError(f"the MLflow server ended with status {server.returncode}; see {LOG}")
    except KeyboardInterrupt:
        print("\nstopping the server", flush=True)
    finally:
        stop_server(server)


def main(port: int = location.UI_PORT, host: str = location.UI_HOST, auth: bool = False) -> None:
    """Open the tracked runs: the project's own database, or the server MLFLOW_TRACKING_URI names.

    `--auth` asks whoever comes for a name and a password; without it the server stays on this machine.
    """
    for word in (signal.SIGINT, signal.SIGTERM):  # a background job of a script starts with SIGINT ignored
        signal.signal(word, signal.default_int_handler)
    uri = location.tracking_uri()
    try:
        access.check(host, auth=auth)
        if not location.is_server(uri) and not is_free(host, port):
            cure = "stop the other program or choose another port with --port"
            raise RuntimeError(f"port {port} of {host} is in use: {cure}")
        if waiting := prepare():
            print(f"{waiting} runs delivered from the outbox", flush=True)
        if location.is_server(uri):
            print(f"MLFLOW_TRACKING_URI is a server already: {location.comparison_link()}", flush=True)
        else:
            serve(host, port, auth=auth)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
