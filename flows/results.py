"""What a run left in `results/` and `reports/`, as far as a flow needs it: failures and the table."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from flows.clone import write_whole


def failure_path(project: Path, stage: str) -> Path:
    """Where the failure of `transfer@vision-eugen` is recorded: one file per cell, or per task.

    What is trained from scratch is a cell of its own.
    """
    name, _, cell = stage.partition("@")
    task, _, method = cell.partition("-")
    prefix = "scratch-" if name == "scratch" else ""
    return project / "results" / "failures" / f"{prefix}{task or 'all'}-{method or 'all'}.json"


def read_failure(project: Path, stage: str) -> str | None:
    """The error that `stage` recorded, None if it recorded none."""
    try:
        failure = json.loads(failure_path(project, stage).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return failure["error"] if failure.get("stage") == stage.partition("@")[0] else None


def record_failure(project: Path, stage: str, error: str) -> None:
    """Record the failure of a stage that was killed, or ended, before it could do so itself."""
    if read_failure(project, stage) is not None:
        return
    name, _, cell = stage.partition("@")
    task, _, method = cell.partition("-")
    record = {
        "stage": name,
        "task": task,
        "method": method or None,
        "error": error,
        "traceback": "",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_whole(failure_path(project, stage), (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


def clear_failures(project: Path, good: Iterable[str]) -> bool:
    """Remove the failures of stages that are good now, as when DVC restored them; whether there were any."""
    old = [stage for stage in good if read_failure(project, stage) is not None]
    for stage in old:
        failure_path(project, stage).unlink()
    return bool(old)


def result_rows(project: Path) -> list[dict[str, str]]:
    """The rows of `reports/results.csv`, none if there is no such file."""
    path = project / "reports" / "results.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
