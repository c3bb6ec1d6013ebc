"""Programs of a clone as bound children: followed line by line, stopped with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from flows.dvc.repair import Say
from flows.machine import child

GRACE_S = 5.0
"""How long a program may take to tidy up when it is stopped."""


def environment(run_id: str) -> dict[str, str]:
    """This interpreter as `python` of dvc.yaml, and a shell whose start-up files cannot change that."""
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    return os.environ | {
        "PATH": folders,
        "SHELL": "/bin/sh",
        "PYTHONUNBUFFERED": "1",
        "EUGEN_PIPELINE_RUN": run_id,
    }


def run(
    project: Path,
    module: str,
    arguments: list[str],
    say: Say,
    run_id: str,
    *,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> tuple[int | None, str]:
    """Run `python -m module arguments…`; its exit code, None if the time was over, and its last line.

    `env` is added to its environment.
    """
    last, over = "", threading.Event()
    with _started(project, module, arguments, environment(run_id) | dict(env or {})) as process:
        timer = threading.Timer(timeout_s, lambda: (over.set(), stop(process)))
        timer.daemon = True
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip():
                    last = line.rstrip()
                    say(last)
        finally:
            timer.cancel()
        code = process.wait()
    return (None if over.is_set() else code), last.strip()


def answer(project: Path, module: str, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a short program of the project."""
    done = subprocess.run(
        child.command(module, *arguments),
        cwd=project,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        start_new_session=True,
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def stop(process: subprocess.Popen[Any]) -> None:
    """End a bound child, which tidies up if it still can, then its whole group."""
    with suppress(psutil.NoSuchProcess):
        for program in psutil.Process(process.pid).children():
            program.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def _started(
    project: Path, module: str, arguments: list[str], env: dict[str, str]
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        child.command(module, *arguments),
        cwd=project,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        stop(process)
