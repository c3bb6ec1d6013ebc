"""Small real stages, run as processes in folders of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Stage = Callable[..., "subprocess.Popen[str]"]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a stage: the clone on the path, nothing of the tests' own tracking."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "EUGEN_"))}
    return keep | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | extra


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Stage]:
    """Start Python source as a process of `tmp_path`; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(source: str, folder: Path = tmp_path, group: bool = False, **extra: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-c", source],
            cwd=folder,
            env=environment(**extra),
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=group,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Standard output and error of a process that must succeed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out, err


def until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Poll for a state of the real system that nothing announces."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)
