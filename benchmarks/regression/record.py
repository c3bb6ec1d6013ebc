"""The record of a run, and what a person reads of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import environment, table, write_json
from benchmarks.regression.verdict import Finding, Ratio
from benchmarks.regression.worktree import Revision

SCHEMA = 1


def host() -> dict[str, Any]:
    """The machine, with the fingerprint that the suite's records have (stages/tracking/environment.py)."""
    found = environment()
    accelerator = _accelerator()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    name = f"{found['processor']}|{found['cores']}|{round(memory, 1):.0f}|{accelerator}"
    return {
        "fingerprint": hashlib.sha256(name.encode()).hexdigest()[:12],
        "processor": found["processor"],
        "cores": found["cores"],
        "memory_gb": round(memory, 1),
        "accelerator": accelerator,
    }


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def make(
    *,
    base: Revision,
    candidate: Revision,
    injected: float,
    settings: dict[str, Any],
    begun: datetime,
    judged: Finding,
    cases: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The whole record. `begun` is UTC."""
    return {
        "schema": SCHEMA,
        "time": begun.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - begun).total_seconds(), 1),
        "base": base.said(),
        "candidate": candidate.said(),
        "host": host(),
        "versions": environment()["versions"],
        "settings": settings,
        "injected": injected,
        "verdict": judged.verdict,
        "reason": judged.reason,
        "cases": list(cases),
    }


def save(record: dict[str, Any], folder: Path) -> Path:
    """Write it whole, under its time and its candidate's commit."""
    time = datetime.fromisoformat(record["time"]).strftime("%Y%m%dT%H%M%S")
    path = folder / f"{time}-{record['candidate']['commit'][:7]}.json"
    write_json(path, record)
    return path


def text(record: dict[str, Any]) -> str:
    """A table, and under it the verdict of the run."""
    columns = ["case", "candidate / base", "pairs", "base ms", "control", "verdict", "why"]
    base, candidate = record["base"], record["candidate"]
    dirty = ", with uncommitted changes" if candidate["dirty"] else ""
    injected = f", slowed by {100 * record['injected']:g} % on purpose" if record["injected"] else ""
    return "\n".join(
        [
            f"candidate {candidate['commit'][:12]}{dirty}{injected}; "
            f"base {base['ref']} = {base['commit'][:12]}",
            "",
            *table(columns, [_row(case) for case in record["cases"]]),
            "",
            f"{record['verdict'].upper()}: {record['reason']} ({record['seconds']:.0f} s)",
        ]
    )


def _row(case: dict[str, Any]) -> list[str]:
    latency, control = case["latency"], case["control"]
    if latency is None:
        return [case["name"], "–", "–", "–", "–", case["verdict"], case["reason"]]
    return [
        case["name"],
        _interval(latency),
        str(latency["pairs"]),
        f"{latency['base_ms']:.3f}",
        _interval(control),
        case["verdict"],
        case["reason"],
    ]


def _interval(found: dict[str, Any]) -> str:
    return str(Ratio(found["pairs"], found["ratio"], found["low"], found["high"]))
