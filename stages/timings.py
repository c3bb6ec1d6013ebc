"""How long each stage took, apart from its results.

Times differ from run to run. Beside the results they would make everything after a rerun stale,
so each stage keeps them in a file of its own, which only the cell's record reads.
"""

from __future__ import annotations

import json
from pathlib import Path

from stages.tracking.whole_file import write_json

TIMINGS = Path("results/timings")


def write(stage: str, task: str, method: str | None = None, **seconds: float) -> None:
    """Keep named times in seconds of one stage."""
    write_json(_path(stage, task, method), seconds)


def read(stage: str, task: str, method: str | None = None) -> dict[str, float]:
    """The times of one stage."""
    return json.loads(_path(stage, task, method).read_text(encoding="utf-8"))


def _path(stage: str, task: str, method: str | None) -> Path:
    return TIMINGS / f"{'-'.join(part for part in (stage, task, method) if part)}.json"
