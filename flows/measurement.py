"""The regression measurement as a bound child process: its lines, its record, and what a missing one means."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from flows import child
from flows.clone import WrongParameters
from flows.dvc_runner import environment
from flows.repair import Say

MODULE = "benchmarks.regression"
RECORDS = Path("results/regressions")
CODES = {"pass": 0, "fail": 1, "inconclusive": 3, "void": 4}
"""Exit code by verdict, of the measurement and of the flow; 2 is wrong usage."""
WRONG_USAGE, ALIAS_NOT_SET = 2, 3
TIMEOUT_S = 4 * 3600.0
"""A measurement that takes longer is killed: it would hold the clone for ever."""
GRACE_S = 5.0
"""How long a measurement may take to remove its worktrees when it is stopped."""


def measure(
    project: Path, arguments: list[str], say: Say, run_id: str, *, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """Run the measurement in `project` and return its record, with its file's name under `file`.

    One that ends without a record gives a verdict `void` with the reason: nothing can be said about the code.
    Raises `WrongParameters` with the program's message for wrong usage.
    """
    before = set(_records(project))
    code, last = run(project, MODULE, arguments, say, run_id, timeout_s=timeout_s)
    if code == WRONG_USAGE:
        raise WrongParameters(last or f"{MODULE} refused {' '.join(arguments)}")
    new = sorted(set(_records(project)) - before)
    if not new:
        ended = f"was killed after {timeout_s:g} s" if code is None else f"ended with code {code}"
        return _void(f"the measurement {ended} and left no record" + (f": {last}" if last else ""))
    try:
        record = json.loads(new[-1].read_text(encoding="utf-8"))
        known = CODES[record["verdict"]]
    except (ValueError, KeyError, TypeError) as error:
        return _void(f"{new[-1].relative_to(project)} is no record ({type(error).__name__}: {error})")
    if known != code:
        return _void(
            f"the record says {record['verdict']}, but the measurement ended with code {code}: {last}"
        )
    return record | {"file": new[-1].relative_to(project).as_posix()}


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


def stop(process: subprocess.Popen[str]) -> None:
    """End the measurement, which tidies up if it still can, then its whole group."""
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


def _records(project: Path) -> list[Path]:
    return list((project / RECORDS).glob("*.json"))


def _void(reason: str) -> dict[str, Any]:
    return {"verdict": "void", "reason": reason, "cases": [], "file": None}
