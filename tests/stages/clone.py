"""A clone of the checkout with the real DVC: its commands, what they leave, and how they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> None:
    """Poll for a state of the real system that nothing announces."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.005)


@dataclass
class Clone:
    """A clone, and the environment of its commands: no tracking unless a test asks for it."""

    folder: Path
    env: dict[str, str]

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """`python -m …` as the leader of a process group."""
        return subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=self.folder,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str, **env: str) -> str:
        """Output of `python -m …`, which must succeed."""
        process = self.start(*arguments, **env)
        try:
            output, _ = process.communicate()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0, output
        return output

    def kill(self, command: tuple[str, ...], reached: Callable[[], Any], what: str) -> None:
        """Start `python -m …`, kill -9 its whole group at a moment, and wait until nothing of it is left."""
        killed = self.start(*command)
        try:
            until(lambda: reached() or killed.poll() is not None, what)
        finally:
            os.killpg(killed.pid, signal.SIGKILL)
            killed.communicate()
        until(lambda: not self.inhabitants(), "end of the killed processes")

    def stale(self) -> dict[str, Any]:
        """What DVC would run, and why."""
        return json.loads(self.run("dvc", "status", "--json"))

    def params(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "params.yaml").read_text())

    def write_params(self, params: dict[str, Any]) -> None:
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def outputs(self) -> dict[str, bytes]:
        """Everything that the stages wrote."""
        folders = [self.folder / name for name in ("data", "artifacts", "results", "reports")]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}

    def inhabitants(self) -> list[int]:
        """Processes at work in the clone."""
        found = []
        for process in psutil.process_iter(["cwd", "status"]):
            if process.info["cwd"] == str(self.folder) and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        return found
