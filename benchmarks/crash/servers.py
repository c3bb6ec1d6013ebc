"""Real servers beside the trials that need them: Prefect with a worker and a deployment, and MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.crash.scratch import Running, environment, start, until

POOL = "crash"


def free_port() -> int:
    """A port of this machine that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Servers:
    """The servers of one trial, in the folder `home` outside the clone; all end with `stop`."""

    def __init__(self, home: Path, clone: Path) -> None:
        home.mkdir(parents=True)
        self.home, self.clone = home, clone
        self.processes: dict[str, psutil.Process] = {}
        self.variables: dict[str, str] = {}

    def start_mlflow(self, port: int | None = None) -> None:
        """Start MLflow's server; the same port again after it was killed."""
        port = port or free_port()
        self.variables["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
        database = f"sqlite:///{self.home / 'mlflow.db'}"
        artifacts = ["--artifacts-destination", str(self.home / "artifacts")]
        place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        command = ["mlflow", "server", "--backend-store-uri", database, *artifacts, *place]
        self._start("mlflow", command, f"{self.variables['MLFLOW_TRACKING_URI']}/health")

    def restart_mlflow(self) -> None:
        """Bring back a killed MLflow server where it was."""
        self.start_mlflow(int(self.variables["MLFLOW_TRACKING_URI"].rpartition(":")[2]))

    def start_prefect(self) -> None:
        """Start a Prefect server, a process pool, and the deployment of the clone's benchmark."""
        port = free_port()
        self.variables["PREFECT_HOME"] = str(self.home / "prefect")
        self.variables["PREFECT_API_URL"] = f"http://127.0.0.1:{port}/api"
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
        self._start("prefect", command, f"{self.variables['PREFECT_API_URL']}/health")
        entry = {
            "name": "crash",
            "entrypoint": "flows/prefect/engine.py:benchmark",
            "work_pool": {"name": POOL},
        }
        file = self.home / "prefect.yaml"
        file.write_text(json.dumps({"name": "crash", "deployments": [entry]}))
        self._prefect("work-pool", "create", POOL, "--type", "process")
        self._prefect("deploy", "--prefect-file", str(file), "--all")

    def start_worker(self) -> Running:
        """Start a worker of the pool and send it a run, whose lines become the worker's."""
        self._prefect("deployment", "run", "benchmark/crash")
        return start(self.clone, "worker", "start", "--pool", POOL, module="prefect", **self.variables)

    @property
    def database(self) -> Path | None:
        """That of the MLflow server, None without one."""
        return self.home / "mlflow.db" if "mlflow" in self.processes else None

    def flow_runs(self) -> list[tuple[str, str]]:
        """Name and state of all flow and task runs that the Prefect server knows; none without a server."""
        found: list[tuple[str, str]] = []
        for kind in ("flow_runs", "task_runs") if "prefect" in self.processes else ():
            request = urllib.request.Request(
                f"{self.variables['PREFECT_API_URL']}/{kind}/filter",
                data=b"{}",
                headers={"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=30) as answer:
                found += [(run["name"], run["state_type"]) for run in json.loads(answer.read())]
        return found

    def _environment(self) -> dict[str, str]:
        own = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        return environment(self.clone, **own, **self.variables)

    def _prefect(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        subprocess.run(command, cwd=self.clone, env=self._environment(), check=True, capture_output=True)

    def _start(self, name: str, command: list[str], health: str) -> None:
        with (self.home / f"{name}.log").open("a") as log:
            process = psutil.Popen(
                [sys.executable, "-m", *command],
                cwd=self.home,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        if not until(lambda: _answers(health), 120):
            raise RuntimeError(f"{name} does not answer at {health}: see {self.home / name}.log")

    def stop(self) -> None:
        """End all servers and what they have started."""
        for process in self.processes.values():
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                for child in process.children(recursive=True):
                    child.kill()
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self.home, ignore_errors=True)


def _answers(address: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
        return answer.status == 200
    return False
