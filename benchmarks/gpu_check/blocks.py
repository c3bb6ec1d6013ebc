"""Blocks on this device: the fused kernel beside the composed form, and every row beside the dense block."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import layers
from benchmarks.gpu_check.budget import Outcome
from benchmarks.rows import rows
from eugen import EUGenConfig
from eugen.cost import call_cost
from eugen.kernels.feature_map import lack
from eugen.timing import Clock, Rates, compare_models, placed
from eugen.timing.roofline import measure_rates
from eugen.timing.rows import check

BUDGET = 0.3
CALLS = 10
"""Of one sample: a call at these sizes takes about as long as reading the clock."""


@dataclass(frozen=True)
class Shape:
    """Tokens of width d in one dtype."""

    tokens: int
    d: int
    dtype: str


@dataclass(frozen=True)
class Effort:
    """Of one comparison, see `compare_models`."""

    placements: int = 8
    pairs: int = 20
    seconds: float = 2.0


def compare_forms(
    outcome: Outcome, deadline: float, shapes: Sequence[Shape], device: str, effort: Effort
) -> None:
    """EUGen's block with the fused kernel beside the same with torch's operators; launches, and without."""
    rates: dict[str, Rates] = {}
    graphs = (True, False) if device.startswith("cuda") else (False,)
    for shape in shapes:
        for graph in graphs:
            said = vars(shape) | {"cuda_graph": graph, "calls": CALLS}
            if time.perf_counter() > deadline:
                outcome.cut.append(f"fused beside composed, {shape}, cuda_graph={graph}")
                continue
            try:
                if shape.dtype not in rates:
                    rates[shape.dtype] = measure_rates(device, shape.dtype)
                found = _compared(shape, device, graph, effort, rates[shape.dtype])
            except ValueError as refusal:
                found = {"status": "refused", "reason": str(refusal)}
            except Exception as failure:
                found = {"status": "failed", "reason": f"{type(failure).__name__}: {failure}"}
                outcome.failed.append(f"fused beside composed, {shape}: {found['reason']}")
            outcome.results.append(said | found)


def _compared(shape: Shape, device: str, graph: bool, effort: Effort, rates: Rates) -> dict[str, Any]:
    dtype = getattr(torch, shape.dtype)
    lacking = lack(torch.device(device), dtype)
    if lacking is not None:
        raise ValueError(f"the fused kernel does not run here: {lacking}")
    condition = layers.Condition(shape.tokens, shape.d, shape.dtype, device)
    dense = layers.dense_block(condition, torch.Generator().manual_seed(0))
    x = torch.randn(shape.tokens, shape.d, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    built, other = (
        EUGenConfig(budget=BUDGET, kernel=kernel).build(dense, generator=torch.Generator().manual_seed(2))
        for kernel in ("fused", "composed")
    )
    fused, composed = built.eval().merged(), other.eval().merged()
    with torch.no_grad():
        error = max(check(layer, built, x) for layer in (fused, composed))
    timed = compare_models(
        placed(composed, x, _calls),
        placed(fused, x, _calls),
        placements=effort.placements,
        pairs=effort.pairs,
        max_seconds=effort.seconds,
        clock=Clock(device, cuda_graph=graph),
    )
    speedup, low, high = timed.speedup()
    limit = rates.limit(call_cost(lambda: fused(x), fused))
    fused_ms = statistics.median(timed.other_ms) / CALLS
    return {
        "status": "timed",
        "speedup": speedup,
        "low": low,
        "high": high,
        "composed_ms": statistics.median(timed.base_ms) / CALLS,
        "fused_ms": fused_ms,
        "limit_ms": limit.ms,
        "binds": limit.binds,
        "of_limit": limit.ms / fused_ms,
        "check_error": error,
    }


def _calls(model: nn.Module, x: Tensor) -> Tensor:
    for _ in range(CALLS - 1):
        model(x)
    return model(x)


def measure_rows(
    outcome: Outcome, deadline: float, shapes: Sequence[Shape], device: str, seconds: float
) -> None:
    """Every row of `benchmarks.layers` under each condition."""
    for shape in shapes:
        if time.perf_counter() > deadline:
            outcome.cut.append(f"every row of {shape}")
            continue
        condition = layers.Condition(shape.tokens, shape.d, shape.dtype, device)
        chosen = rows(BUDGET)
        found = layers.measure_all(condition, chosen, seconds, conditions=len(shapes), deadline=deadline)
        outcome.results += found
        cut = [result["row"] for result in found if result["status"] == "cut"]
        outcome.cut += [f"{', '.join(cut)} of {shape}"] if cut else []
        outcome.failed += [f"{r['row']} of {shape}: {r['reason']}" for r in found if r["status"] == "failed"]
