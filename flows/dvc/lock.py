"""dvc.lock as data: with what each stage was left, so that one clone can tell another.

Two clones that compute the same stage differ in what it measured, and all that follows from that. A clone
that is to go on where another stands therefore takes over its entries, and the outputs by their hashes.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from flows.clone import write_whole

Entries = dict[str, Any]
"""Command, parameters, and the hashes of dependencies and outputs, by stage."""


def entries(project: Path, stages: Iterable[str]) -> Entries:
    """The entries of `stages` that the clone has, in its order."""
    wanted = set(stages)
    return {stage: entry for stage, entry in _read(project)["stages"].items() if stage in wanted}


def take_over(project: Path, known: Entries) -> None:
    """Make `known` the clone's entries of these stages. No DVC may run in it meanwhile."""
    lock = _read(project)
    if any(lock["stages"].get(stage) != entry for stage, entry in known.items()):
        lock["stages"] |= known
        write_whole(project / "dvc.lock", yaml.safe_dump(lock, sort_keys=False).encode())


def _read(project: Path) -> dict[str, Any]:
    path = project / "dvc.lock"
    if not path.exists():
        return {"schema": "2.0", "stages": {}}
    return yaml.safe_load(path.read_text(encoding="utf-8"))
