"""The regression measurement as a bound child process: its lines, its record, and a missing one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flows.clone import WrongParameters
from flows.dvc.repair import Say
from flows.machine.programs import run

MODULE = "benchmarks.regression"
RECORDS = Path("results/regressions")
CODES = {"pass": 0, "fail": 1, "inconclusive": 3, "void": 4}
"""Exit code by verdict, of the measurement and of the flow; 2 is wrong usage."""
WRONG_USAGE, ALIAS_NOT_SET = 2, 3
TIMEOUT_S = 4 * 3600.0
"""A measurement that takes longer is killed: it would hold the clone for ever."""


def measure(
    project: Path, arguments: list[str], say: Say, run_id: str, *, timeout_s: float = TIMEOUT_S
) -> dict[str, Any]:
    """Run the measurement in `project` and return its record, with its file's name under `file`.

    One that ends without a record gives a verdict `void` with the reason: nothing can be said about the code.
    Raises `WrongParameters` with the program's message for wrong usage.
    """
    before = _records(project)
    code, last = run(project, MODULE, arguments, say, run_id, timeout_s=timeout_s)
    if code == WRONG_USAGE:
        raise WrongParameters(last or f"{MODULE} refused {' '.join(arguments)}")
    new = sorted(path for path, written in _records(project).items() if before.get(path) != written)
    if not new:
        ended = f"was killed after {timeout_s:g} s" if code is None else f"ended with code {code}"
        return void(f"the measurement {ended} and left no record" + (f": {last}" if last else ""))
    try:
        record = json.loads(new[-1].read_text(encoding="utf-8"))
        known = CODES[record["verdict"]]
    except (ValueError, KeyError, TypeError) as error:
        return void(f"{new[-1].relative_to(project)} is no record ({type(error).__name__}: {error})")
    if known != code:
        return void(
            f"the record says {record['verdict']}, but the measurement ended with code {code}: {last}"
        )
    return record | {"file": new[-1].relative_to(project).as_posix()}


def _records(project: Path) -> dict[Path, int]:
    """The records that there are, with the time each was written."""
    return {path: path.stat().st_mtime_ns for path in (project / RECORDS).glob("*.json")}


def void(reason: str) -> dict[str, Any]:
    """The record of a measurement that says nothing about the code, and why."""
    return {"verdict": "void", "reason": reason, "cases": [], "file": None}
