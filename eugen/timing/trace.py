"""A trace of one row for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

CALLS = 3


def write_trace(call: Callable[[], Any], folder: Path, name: str, *, device: str) -> Path:
    """Run a few times under PyTorch's profiler; returns the file, `<name>.json.gz` in plain letters."""
    # Kineto reports an error where there is no GPU, and each start; it reads this when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    gpu = device.startswith("cuda")
    path = folder / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name).strip('-')}.json.gz"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        call()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as trace:
            for _ in range(CALLS):
                call()
            if gpu:
                torch.cuda.synchronize(device)
    trace.export_chrome_trace(str(path))
    return path
