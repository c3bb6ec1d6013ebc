"""What a profile's numbers depend on beside code and settings."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from eugen.timing.record import Environment

SOURCE = Path(__file__).resolve().parents[2]
PACKAGES = ("timm", "transformers", "triton", "torchao")


def environment(device: str) -> Environment:
    """Code, versions and machine at this moment; no commit where the code is installed and no clone."""
    gpu = device.startswith("cuda")
    ours = _output("git", "-C", str(SOURCE), "ls-files", "--error-unmatch", "--", __file__) is not None
    commit = _output("git", "-C", str(SOURCE), "rev-parse", "--verify", "HEAD") if ours else None
    changes = _output("git", "-C", str(SOURCE), "status", "--porcelain", "--", "eugen")
    return Environment(
        device=torch.cuda.get_device_name(device) if gpu else processor(),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        versions={"python": platform.python_version(), "torch": torch.__version__} | _versions(),
        commit=commit,
        dirty=None if commit is None or changes is None else changes != "",
        load_before=load(),
    )


def load() -> float | None:
    """Processes that wanted a core, averaged over the last minute; None where the system does not tell."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def processor() -> str:
    """Its name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str | None:
    """What a command prints, None where it is not there or fails (no clone, no driver)."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
