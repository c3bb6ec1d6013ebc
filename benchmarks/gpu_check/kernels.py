"""Whether the kernel gives what its definition gives: a check that needs torch alone, then the tests."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks import kernel_cases
from benchmarks.gpu_check.budget import Outcome
from benchmarks.kernel_cases import Case
from benchmarks.machine import ROOT
from eugen.kernels.feature_map import feature_map, lack

TESTS = tuple(f"tests/eugen/kernels/test_{name}.py" for name in ("feature_map", "choice", "fused"))
"""Those that run on this device; test_interpreter.py is about machines without a GPU."""
NEEDS = ("pytest", "pytest_timeout", "hypothesis")
WORKERS = 8
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"


def check_cases(outcome: Outcome, deadline: float, cases: Sequence[Case], device: str) -> None:
    """The operator, as it runs here, against the definition in float64 for each case.

    Where the kernel does not run, in float32 alone: composed operators round to half precision at each step.
    """
    for index, case in enumerate(cases):
        if time.perf_counter() > deadline:
            outcome.cut.append(f"{len(cases) - index} of {len(cases)} cases of the kernel's check")
            return
        if lack(torch.device(device), case.dtype) is not None:
            case = dataclasses.replace(case, dtype=torch.float32)  # noqa: PLW2901
        try:
            found, error = PASSED, kernel_cases.run(case, feature_map, device)
        except Exception as failure:
            found, error = FAILED, None
            outcome.failed.append(f"kernel, {case}: {type(failure).__name__}: {failure}")
        outcome.results.append({"case": str(case), "status": found, "of_allowed": error})


def run_tests(outcome: Outcome, deadline: float, *arguments: str) -> None:
    """The kernel's tests in a process of their own, where their packages are installed."""
    result = {"case": "pytest tests/eugen/kernels", "status": NOT_RUN, "of_allowed": None}
    missing = [name.replace("_", "-") for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        outcome.results.append(result | {"said": f"{missing[0]} is not installed: kernel tests not run"})
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *arguments]
    if not arguments and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    left = deadline - time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=max(left, 1)
        )
    except subprocess.TimeoutExpired:
        outcome.cut.append("pytest tests/eugen/kernels")
        outcome.results.append(result | {"said": f"not done within {left:.0f} s"})
        return
    said = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1].strip("= ")
    status = FAILED if done.returncode else PASSED
    outcome.results.append(result | {"status": status, "said": said})
    if done.returncode:
        outcome.failed.append(f"pytest tests/eugen/kernels: {said}")
        print(done.stdout[-8000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
