"""Quality, cost and latency of a compressed model beside the dense one."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from eugen.cli.data import Batches, call, shape_of
from eugen.compression.outputs import agreement
from eugen.cost import model_cost
from eugen.timing import Clock, compare_models, placed
from eugen.timing.environment import environment

PLACEMENTS, PAIRS, SECONDS = 8, 10, 20.0
TOLERANCE, TOLERANCE_RATIO, TOLERANCE_EXAMPLES = 1e-3, 0.01, 2
"""What another machine's rounding may change: this much, 1 % of the value, or 2 answers."""


def measure(
    dense: nn.Module, compressed: nn.Module, test: Batches, example: Any, device: str
) -> dict[str, Any]:
    """Sections `quality`, `cost`, `latency` and `conditions`, of values of JSON."""
    clock = Clock(device)
    latency = compare_models(
        placed(dense, example, call),
        placed(compressed, example, call),
        placements=PLACEMENTS,
        pairs=PAIRS,
        max_seconds=SECONDS,
        clock=clock,
    )
    speedup, low, high = latency.speedup()
    found = environment(device)
    return {
        "quality": agreement(dense, compressed, test, call=call),
        "cost": {"dense": _cost(dense, example), "compressed": _cost(compressed, example)},
        "latency": {
            "dense_ms": statistics.median(latency.base_ms),
            "compressed_ms": statistics.median(latency.other_ms),
            "speedup": speedup,
            "speedup_low": low,
            "speedup_high": high,
        },
        "conditions": {
            "batch": shape_of(example),
            "device": found.device,
            "threads": found.threads,
            "load_before": found.load_before,
            "versions": found.versions,
        },
    }


def differences(recorded: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Figures of quality that are not the recorded ones within the tolerance, in words."""
    said = []
    for name, was in recorded.items():
        now = found.get(name)
        if isinstance(was, str) or name == "examples":
            if was != now:
                said.append(f"{name} was {was} and is {now}")
            continue
        if not isinstance(now, int | float):
            said.append(f"{name} was {was:.4f} and is not measured any more")
            continue
        allowed = max(TOLERANCE, TOLERANCE_RATIO * abs(was))
        if name == "top1_agreement":
            allowed = max(allowed, TOLERANCE_EXAMPLES / recorded["examples"])
        if not abs(now - was) <= allowed:
            said.append(f"{name} was {was:.4f} and is {now:.4f}, allowed are ±{allowed:.4f}")
    return said


@torch.no_grad()
def _cost(model: nn.Module, example: Any) -> dict[str, int]:
    cost = model_cost(model, example, call)
    return {"macs": cost.macs, "parameters": cost.params, "weight_bytes": cost.weight_bytes}
