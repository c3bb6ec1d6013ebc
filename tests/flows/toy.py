"""A project of the shape of ours whose stages take no time, and the commands to run it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
PARAMS: dict[str, Any] = {
    "profile": "toy",
    "run": {"threads": 1},
    "tasks": {
        "vision": {verb: {"size": 1} for verb in ("data", "baseline", "transfer", "finetune", "profile")},
    },
    "methods": {"dense": {"layer": "dense"}, "eugen": {"layer": "eugen"}},
    "scratch": {"rows": {}, "tasks": {}},
}
PASSWORD = "operator:planted-prefect-password"
STAGES = 9  # prepare, baseline, three verbs of two methods, report


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
    """Poll until `condition` holds; fail with `what` otherwise."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} within {seconds:g} s"
        time.sleep(0.05)
    return found


@dataclass
class Toy:
    """A project folder, with the environment in which its commands run."""

    folder: Path
    env: dict[str, str]

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "flows.benchmark", "--project", str(self.folder), *arguments]
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.env | env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def bench(self, *arguments: str, **env: str) -> tuple[int, str]:
        """Exit code and output of the command."""
        process = self.start(*arguments, **env)
        try:
            output, _ = process.communicate(timeout=240)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output

    def dvc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, cwd=self.folder, env=self.env, text=True, capture_output=True)

    def behave(self, **stages: Any) -> None:
        (self.folder / "behaviour.json").write_text(json.dumps(stages))

    def calls(self) -> list[str]:
        """The stages that were started, in order; reading forgets them."""
        log = self.folder / "calls.log"
        found = [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    def hanging(self, seconds: float = 90.0) -> list[int]:
        """Process ids of a hanging stage and its child, once both are there."""
        mark = self.folder / "hanging"
        pids = wait_for(lambda: mark.exists() and mark.read_text().split(), "hanging stage", seconds)
        mark.unlink()
        return [int(pid) for pid in pids]

    def outputs(self) -> dict[str, bytes]:
        """Everything that the stages wrote."""
        folders = [self.folder / name for name in ("data", "artifacts", "results", "reports")]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in files}


@contextmanager
def serve(log: Path, env: dict[str, str]) -> Iterator[dict[str, str]]:
    """The variables that lead to a Prefect server of our own, which asks for a password."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui"]
    server = start(
        [sys.executable, "-m", *command], log, env | {"PREFECT_SERVER_API_AUTH_STRING": PASSWORD}, ROOT
    )
    url = f"http://127.0.0.1:{port}/api"

    def healthy() -> bool:
        assert server.poll() is None, log.read_text()
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_for(healthy, "Prefect server")
        yield {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": PASSWORD}
    finally:
        end(server)


def start(command: list[str], log: Path, env: dict[str, str], folder: Path) -> subprocess.Popen[bytes]:
    """A process in a session of its own, which writes to `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            command, cwd=folder, env=env, stdout=output, stderr=output, start_new_session=True
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill what `start` started, with its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ask(server: dict[str, str], path: str, query: Any) -> Any:
    """What a Prefect server answers to somebody with its password."""
    name, _, password = server["PREFECT_API_AUTH_STRING"].partition(":")
    url = f"{server['PREFECT_API_URL']}/{path}"
    answer = httpx.post(url, json=query, auth=(name, password)).raise_for_status()
    return answer.json() if answer.content else None


def newest(server: dict[str, str], kind: str, **query: Any) -> dict[str, Any]:
    """The newest of the server's `flow_runs` that has started, or of its `artifacts`; empty if there is none.

    What a schedule has laid out for later has not started.
    """
    started = {"sort": "EXPECTED_START_TIME_DESC", "flow_runs": {"start_time": {"is_null_": False}}}
    order = started if kind == "flow_runs" else {"sort": "CREATED_DESC"}
    found = ask(server, f"{kind}/filter", order | {"limit": 1} | query)
    return found[0] if found else {}


def gone(pid: int) -> bool:
    """Whether a process has ended (one that only waits to be reaped has)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def place_program(folder: Path, name: str, source: str) -> None:
    """A program of the project, as `stages/verb.py`, that `python -m` finds before ours."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for package in path.relative_to(folder).parents[:-1]:
        (folder / package / "__init__.py").touch()
    path.write_text(source)


def build(folder: Path) -> None:
    """Our dvc.yaml with a stub in place of each verb, and a file in place of each source."""
    text = re.sub(r"python -m stages\.", "python stub.py ", (ROOT / "dvc.yaml").read_text())
    (folder / "dvc.yaml").write_text(text)
    (folder / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    shutil.copy(Path(__file__).with_name("stub.py"), folder)
    stages = yaml.safe_load(text)["stages"].values()
    made = {name.split("/")[0] for stage in stages for name in stage["outs"] if "$" in name}
    for name in (name for stage in stages for name in stage["deps"]):
        path = folder / name.replace("${item.task}", "vision")
        if name.split("/")[0] in made:
            continue
        if path.suffix:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"# {name}\n")
        else:
            path.mkdir(parents=True, exist_ok=True)
            (path / "source.py").write_text("# source\n")
