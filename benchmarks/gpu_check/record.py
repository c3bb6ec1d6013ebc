"""The record of a run: what it must hold, and a reader that refuses anything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FORMAT = 1
FOLDER, QUICK_FOLDER = Path("reports", "gpu"), Path(".work", "gpu-check")
"""Where records are committed, and where toy sizes go."""
PARTS = ("kernels", "tests", "forms", "layers", "models")
KEYS = {
    "format": int,
    "benchmark": str,
    "quick": bool,
    "device": str,
    "date": str,
    "environment": dict,
    "budget_seconds": (int, float),
    "wall_seconds": (int, float),
    "parts": list,
    **dict.fromkeys(PARTS, list),
}
PART_KEYS = {
    "part": str,
    "status": str,
    "budget_seconds": (int, float),
    "seconds": (int, float),
    "cut": list,
    "failed": list,
}
STATUSES = {
    "kernels": ("passed", "failed"),
    "tests": ("passed", "failed", "not run"),
    "forms": ("timed", "refused", "failed"),
    "layers": ("timed", "refused", "failed", "cut"),
}
TIMED_KEYS = {
    "forms": ("tokens", "d", "dtype", "cuda_graph", "fused_ms", "composed_ms", "limit_ms", "of_limit"),
    "layers": ("tokens", "d", "dtype", "row", "void", "dense_ms", "row_ms", "limit_macs", "of_limit"),
}


def read(path: Path) -> dict[str, Any]:
    """A record as it was written.

    Raises:
        ValueError: the file is no such record; the message names file and fault.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        validate(found)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no record of `make gpu-check` ({error})") from error
    return found


def validate(found: Any) -> None:
    """Check keys, kinds, statuses and intervals; profiles by their own reader.

    Raises:
        ValueError: the first fault.
    """
    _check_keys("the record", found, KEYS)
    if (found["format"], found["benchmark"]) != (FORMAT, "gpu_check"):
        raise ValueError(
            f"format {found['format']!r} of {found['benchmark']!r} is not {FORMAT} of 'gpu_check'"
        )
    for part in found["parts"]:
        _check_keys("a part", part, PART_KEYS)
    named = tuple(part["part"] for part in found["parts"])
    if named != PARTS:
        raise ValueError(f"parts {named} are not {PARTS}")
    for name, allowed in STATUSES.items():
        for result in found[name]:
            _check_result(name, result, allowed)
    if found["models"]:
        _check_profiles(found["models"])


def _check_profiles(found: list[Any]) -> None:
    from eugen.timing import Profile  # loads torch

    for profile in found:
        Profile.of(profile)


def failures(record: dict[str, Any]) -> list[str]:
    """Every check that failed and every row that broke."""
    return [failure for part in record["parts"] for failure in part["failed"]]


def cuts(record: dict[str, Any]) -> list[str]:
    """Everything that was left out because time was up."""
    return [f"{part['part']}: {cut}" for part in record["parts"] for cut in part["cut"]]


def _check_keys(where: str, found: Any, keys: dict[str, Any]) -> None:
    if not isinstance(found, dict) or found.keys() != keys.keys():
        has = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{where} has {has}, not {sorted(keys)}")
    for key, kind in keys.items():
        if not isinstance(found[key], kind):
            raise ValueError(f"{where}: {key}={found[key]!r} is of another kind")


def _check_result(part: str, result: Any, allowed: tuple[str, ...]) -> None:
    status = result.get("status") if isinstance(result, dict) else None
    if status not in allowed:
        raise ValueError(f"{part}: status {status!r} is none of {', '.join(allowed)}")
    if status == "timed":
        missing = [key for key in (*TIMED_KEYS[part], "speedup", "low", "high") if key not in result]
        if missing:
            raise ValueError(f"{part}: a timed row without {', '.join(missing)}")
        if not 0 < result["low"] <= result["speedup"] <= result["high"]:
            raise ValueError(f"{part}: the interval of {result['speedup']} is not around it")
