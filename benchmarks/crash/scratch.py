"""A scratch clone of this repository with a small benchmark of the real stages, and its runs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
VERBS = ("prepare", "baseline", "transfer", "finetune", "scratch", "profile", "report")
LIMIT_S = 1200.0
"""A run that takes longer hangs."""

_PROFILE = {"batches": [1], "placements": 3, "pairs": 10, "seconds": 0.2, "precisions": ["float32"]}
_NETWORK = {"width": 64, "depth": 2, "heads": 2, "patch": 7, "epochs": 3, "batch_size": 64}
PARAMS: dict[str, Any] = {
    "profile": "crash",
    "run": {"device": "cpu", "threads": 1, "timing_threads": 2, "provisional": True},
    "tasks": {
        "vision": {
            "data": {"validation": 100, "test": 200},
            "baseline": _NETWORK | {"learning_rate": 2e-3},
            "transfer": {"budgets": [0.3], "seeds": [0, 1], "calibration_tokens": 2048, "refine_steps": 10},
            "finetune": {
                "budgets": [0.3],
                "seeds": [0],
                "steps": 10,
                "batch_size": 16,
                "learning_rates": [3e-4],
            },
            "profile": _PROFILE,
        }
    },
    "methods": {
        "dense": {"layer": "dense"},
        "eugen": {"layer": "eugen", "order": 2, "projection": "orthogonal"},
    },
    "scratch": {
        "rows": {"narrow": {"layer": "narrow"}},
        "tasks": {
            "vision": {
                "budgets": [0.3],
                "seeds": [0],
                "learning_rates": [2e-3],
                "timing_pairs": 10,
                "variants": {"base": {"sizes": {"epochs": 2}}},
            }
        },
    },
}
"""One task, two methods, one row from scratch: every verb, in about half a minute on two cores."""


def clone(folder: Path) -> Path:
    """Clone the last commit of this repository to `folder`, with the small benchmark in its params.yaml."""
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    (folder / "params.yaml").write_text(json.dumps(PARAMS, indent=1))  # JSON is YAML too
    return folder


def environment(folder: Path, **extra: str) -> dict[str, str]:
    """The environment of a run in the clone: nothing of this process's own servers and settings."""
    own = ("PREFECT_", "MLFLOW_", "EUGEN_", "DVC_", "PYTHONPATH")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    archives = os.environ.get("EUGEN_DATA_DIR") or str(ROOT / "data" / ".downloads")
    return kept | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": str(folder),
        "PYTHONUNBUFFERED": "1",
        "DO_NOT_TRACK": "1",
        "DVC_SITE_CACHE_DIR": str(folder.with_name(f"{folder.name}.dvc-site")),
        "EUGEN_DATA_DIR": str(Path(archives).resolve()),
        **extra,
    }


@dataclass
class Running:
    """A started run: its process and what it has said so far, each line with the second it came."""

    process: subprocess.Popen[str]
    started: float = field(default_factory=time.monotonic)
    lines: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append((time.monotonic() - self.started, line.rstrip()))

    def said(self, pattern: str) -> float | None:
        """When a line first matched, in seconds after the start; None if none did."""
        return next((second for second, line in list(self.lines) if re.search(pattern, line)), None)

    def output(self) -> list[str]:
        """Every line so far."""
        return [line for _, line in list(self.lines)]

    def at_work(self) -> list[str]:
        """The stages that had started and not ended."""
        begun = [line.split()[-2] for line in self.output() if line.endswith("  started")]
        ended = {
            line.split()[1] for line in self.output() if re.search(r"  (run|restored|unchanged) in ", line)
        }
        return [stage for stage in begun if stage not in ended]

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """The exit code; a run that hangs is killed and counts as one that ended by that."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            code = self.process.wait()
        self._reader.join(5)
        return code


def start(folder: Path, *arguments: str, module: str = "flows.benchmark", **extra: str) -> Running:
    """Start `python -m flows.benchmark` in the clone, as the leader of a session."""
    return Running(
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=folder,
            env=environment(folder, **extra),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    )


def inhabitants(folder: Path) -> list[psutil.Process]:
    """Living processes whose working folder or command lies in the clone."""
    found = []
    for process in psutil.process_iter(["cwd", "cmdline", "status"]):
        places = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        here = any(place == str(folder) or place.startswith(f"{folder}/") for place in places)
        if here and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
            found.append(process)
    return found


def until(condition: Callable[[], Any], limit_s: float) -> Any:
    """Poll until `condition` holds; its value, or that after `limit_s` seconds."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
