"""Made-up records of regressions, as plain JSON data. Only tests use them: no number here was measured."""

from __future__ import annotations

import math
import random
from typing import Any

BASE, CANDIDATE = "1" * 40, "2" * 40


def case(
    name: str = "eugen block", ratio: float = 1.0, verdict: str = "pass", **change: Any
) -> dict[str, Any]:
    """One case whose candidate takes `ratio` times as long as the base; the same for the same arguments."""
    rng = random.Random(f"{name}/{ratio}")
    samples = [math.log(ratio) + rng.gauss(0, 0.02) for _ in range(300)]
    times = {"pairs": 300, "ratio": ratio, "low": ratio * 0.99, "high": ratio * 1.01}
    return {
        "name": name,
        "verdict": verdict,
        "reason": f"{100 * (ratio - 1):+.1f} % in time",
        "exact": {"macs": [1000, 1000], "parameters": [500, 500], "bytes": [2000, 2000]},
        "latency": times
        | {"base_ms": 2.0, "candidate_ms": 2.0 * ratio, "confirmed": None, "log_ratios": samples},
        "control": {"pairs": 300, "ratio": 1.001, "low": 0.992, "high": 1.01},
        "quality": {
            "name": "relative error",
            "better": "lower",
            "seeds": [0, 1, 2],
            "base": [0.10, 0.11, 0.12],
            "candidate": [0.10, 0.11, 0.12],
            "difference": 0.0,
            "low": -0.001,
            "high": 0.001,
        },
    } | change


def record(*cases: dict[str, Any], **change: Any) -> dict[str, Any]:
    """A whole record; its verdict is its only case's, or `pass`."""
    chosen = list(cases) or [case()]
    verdict = chosen[0]["verdict"] if len(chosen) == 1 else "pass"
    return {
        "schema": 1,
        "time": "2026-01-02T03:04:05+00:00",
        "seconds": 63.5,
        "base": {"ref": "v0.1", "commit": BASE},
        "candidate": {"ref": "HEAD", "commit": CANDIDATE, "dirty": False},
        "host": {
            "fingerprint": "abcdef012345",
            "processor": "Example CPU",
            "cores": 2,
            "memory_gb": 8.0,
            "accelerator": None,
        },
        "versions": {"python": "3.11.2", "torch": "2.14.1"},
        "injected": 0.0,
        "verdict": verdict,
        "reason": chosen[0]["reason"],
        "cases": chosen,
    } | change
