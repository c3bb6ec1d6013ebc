"""What a number depends on besides its parameters: code, packages, machine."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import psutil

from stages.tracking.location import comparison_link
from stages.tracking.record import Environment

__all__ = ["comparison_link", "environment"]

SOURCES = ("eugen", "stages", "flows", "dvc.yaml", "pyproject.toml", "constraints.txt")
"""What counts as source. params.yaml, dvc.lock and everything the pipeline writes do not."""
PACKAGES = ("torch", "torchvision", "timm", "transformers", "tokenizers", "safetensors", "numpy", "triton")


def _git(*arguments: str) -> str | None:
    """Output of a git command, None if it fails or git is missing."""
    try:
        done = subprocess.run(["git", *arguments], check=False, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The checked-out commit, `unknown` outside a repository or before the first commit."""
    return _git("rev-parse", "--verify", "HEAD") or "unknown"


def dirty() -> bool:
    """True if a source file differs from the commit or is new, or if there is no commit to compare to."""
    changes = _git("status", "--porcelain", "--untracked-files=all", "--", *SOURCES)
    return commit() == "unknown" or changes is None or changes != ""


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _accelerator() -> str | None:
    """Name of the GPU in use. Asked of torch, and only where the stage has imported it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()


def environment() -> Environment:
    """The present environment. Reads git and the machine, 30 ms; imports nothing heavy."""
    processor, cores, accelerator = _processor(), _cores(), _accelerator()
    memory_gb = round(psutil.virtual_memory().total / 2**30, 1)
    host = f"{processor}|{cores}|{memory_gb:.0f}|{accelerator}"
    return Environment(
        commit=commit(),
        dirty=dirty(),
        versions=_versions(),
        processor=processor,
        cores=cores,
        memory_gb=memory_gb,
        accelerator=accelerator,
        fingerprint=hashlib.sha256(host.encode()).hexdigest()[:12],
    )
