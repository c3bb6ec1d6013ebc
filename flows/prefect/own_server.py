"""A Prefect server of the clone's own, for as long as a run lasts.

Prefect would start one itself, but that one outlives a flow that is killed, hears the ctrl-C of its
terminal, picks a port that another may take first, and is stopped only after the clone was let go: the
next run's server then meets the old one on the same database. This one dies with the flow, has a session
of its own, inherits a port that is already bound, and is gone before the next run may begin.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ANSWER_S = 30.0
"""How long a server that should be running may take to answer."""
STOP_S = 10.0
"""How long the server may take to write what it holds before it is killed."""


@contextmanager
def own_server() -> Iterator[None]:
    """Have PREFECT_API_URL name a server: the user's, else one that ends with this block.

    Prefect must not have been imported before. Raises `RuntimeError` if the server does not come up, or if
    the user's does not answer.
    """
    if (theirs := os.environ.get("PREFECT_API_URL")) is not None:
        _check(theirs)
        yield
        return
    server, address = _start()
    os.environ["PREFECT_API_URL"] = f"{address}/api"
    try:
        _await(server, f"{address}/api/health")
        try:
            yield
        finally:
            _send_what_waits()
    finally:
        del os.environ["PREFECT_API_URL"]
        _stop(server)


def _check(url: str) -> None:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=ANSWER_S):
            return
    except urllib.error.HTTPError:
        return  # it is there, and says what it thinks to those who bring a password
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"the Prefect server of PREFECT_API_URL ({url}) does not answer ({error}): start it "
            "(make server), or unset the variable"
        ) from None


def _start() -> tuple[subprocess.Popen[bytes], str]:
    """The server's process and address; it serves a port that is bound before it starts."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.fileno()
        server = subprocess.Popen(
            [sys.executable, "-m", "flows.prefect.server_child", str(os.getpid()), str(number)],
            cwd=Path(__file__).parents[2],  # from inside flows, its rooms would hide packages
            pass_fds=[number],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        return server, f"http://127.0.0.1:{listening.getsockname()[1]}"


def _await(server: subprocess.Popen[bytes], health: str) -> None:
    """Wait until the server answers; a request made while it starts waits in the port's queue."""
    limit_s = float(os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"])
    deadline = time.monotonic() + limit_s
    reason = "no answer"
    while (left_s := deadline - time.monotonic()) > 0 and server.poll() is None:
        try:
            with urllib.request.urlopen(health, timeout=left_s):
                return
        except OSError as error:
            reason = str(error)
            time.sleep(0.1)
    ended = f"it ended with code {server.poll()}" if server.poll() is not None else f"{limit_s:g} s, {reason}"
    raise RuntimeError(
        f"the clone's own Prefect server did not start ({ended}). Its database is in "
        f"{os.environ.get('PREFECT_HOME')}: delete that folder if it is broken, or run with --engine dvc"
    )


def _send_what_waits() -> None:
    """Prefect sends logs and states of tasks in the background; after this the server has all of them."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    EventsWorker.drain_all(timeout=STOP_S)
    APILogWorker.drain_all(timeout=STOP_S)


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
