"""What a benchmark's numbers depend on, and how they are written down."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
"""Of the records; what reads them refuses another."""
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("eugen", "benchmarks", "stages/networks", "pyproject.toml")
"""What counts as source: the records themselves do not."""


def environment(device: str = "cpu") -> dict[str, Any]:
    """Code, versions and machine at this moment, the load of the last minute included."""
    commit = _git("rev-parse", "--verify", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=all", "--", *SOURCES)
    return {
        "commit": commit or "unknown",
        "dirty": commit is None or changes != "",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "accelerator": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "load": load(),
    }


def load() -> float | None:
    """Processes that wanted a core, averaged over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def machine_name(device: str = "cpu") -> str:
    """A short name for files: the accelerator's, or the processor's with its number of cores."""
    found = environment(device)
    name = found["accelerator"] or f"{found['processor']} {found['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as indented JSON. NaN is refused."""
    write(path, json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose columns stand under each other as plain text too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines.insert(1, ["-" * width for width in widths])
    return ["| " + " | ".join(line) + " |" for line in lines]


def _git(*arguments: str) -> str | None:
    """Output of a git command in the repository, None where there is none."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, check=False, capture_output=True, text=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
