"""Latency of every layer against the dense block: `python -m benchmarks.layers`.

Both run in one process in turn (`eugen.timing.compare`), in the same dtype, after the layer's fast
path agreed with its definition. docs/benchmarks.md says how to read the result.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import FORMAT, environment, load, machine_name, write, write_json
from benchmarks.rows import CONTROL, Row, rows
from benchmarks.tables import markdown
from eugen.ffn import DenseFFN, FFNLayer, new_linear
from eugen.kernels.feature_map import lack
from eugen.timing import compare
from eugen.timing.roofline import measure_rates

SHAPES = ((1, 384), (128, 768), (1576, 768), (4096, 1024))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Relative RMS between fast path and definition; a dtype that is not listed is as coarse as bfloat16."""
PAIRS = 300
CUT = {"status": "cut", "reason": "not begun: time was up"}
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Condition:
    """Where a row is measured: `tokens` inputs of width d, a block d → 4d → d with GELU."""

    tokens: int
    d: int
    dtype: str
    device: str


@dataclass(frozen=True)
class Rates:
    """What this machine reaches at a block's shapes: the roofline's two sides."""

    macs_per_s: float
    bytes_per_s: float

    def seconds(self, layer: FFNLayer, tokens: int) -> tuple[float, float]:
        """Least time for a layer's MACs, and for reading its weights once."""
        return tokens * layer.macs_per_token / self.macs_per_s, _weight_bytes(layer) / self.bytes_per_s


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the record. Returns 1 if a row failed its check."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    started, before = time.perf_counter(), environment(options.device)
    conditions = [
        Condition(tokens, d, dtype, options.device) for dtype in options.dtype for tokens, d in options.shapes
    ]
    results = []
    for condition in conditions:
        results += measure_all(condition, options.chosen, options.seconds, conditions=len(conditions))
    record = {
        "format": FORMAT,
        "benchmark": "layers",
        "environment": {**before, "threads": options.threads, "device": options.device, "load_end": load()},
        "settings": {"budget": options.budget, "seconds": options.seconds, "pairs": PAIRS},
        "wall_seconds": round(time.perf_counter() - started, 1),
        "results": results,
    }
    text = markdown(record)
    write_json(options.out, record)
    write(options.out.with_suffix(".md"), text)
    print(text)
    return int(any(result["status"] == "failed" for result in results))


def measure_all(
    condition: Condition,
    chosen: list[Row],
    seconds: float,
    *,
    conditions: int = 1,
    deadline: float = math.inf,
) -> list[dict[str, Any]]:
    """Every row under one condition; void where the control does not cover 1.

    Args:
        seconds: at most this long for the pairs of a row, though never fewer than ten pairs.
        conditions: how many share the control's confidence, so that chance alone voids one run in twenty.
        deadline: of `time.perf_counter`; rows not begun by then are listed as cut, but for the control.
    """
    generator = torch.Generator().manual_seed(0)
    dense = dense_block(condition, generator)
    x = torch.randn(condition.tokens, condition.d, generator=generator).to(dense.up.weight)
    rates = _rates(dense)
    results = []
    for row in chosen:
        late = row.name != CONTROL and time.perf_counter() > deadline
        found = CUT if late else _attempt(row, dense, x, rates, seconds, conditions)
        results.append(asdict(condition) | {"row": row.name} | found)
        print(_progress(results[-1]), file=sys.stderr, flush=True)
    control = next(result for result in results if result["row"] == CONTROL)
    void = is_void(control)
    return [result | {"void": void} for result in results]


def is_void(control: dict[str, Any]) -> bool:
    """Whether the block against its own copy shows a difference: then nothing beside it counts."""
    return control["status"] != "timed" or not control["low"] <= 1 <= control["high"]


def _attempt(
    row: Row, dense: DenseFFN, x: Tensor, rates: Rates, seconds: float, conditions: int
) -> dict[str, Any]:
    """A row's measurement, or why there is none; one broken row does not hide the others."""
    try:
        if row.name == CONTROL:
            tail = (1 - CONFIDENCE) / conditions
            return _timed(copy.deepcopy(dense), dense, x, rates, seconds, confidence=1 - tail)
        lacking = lack(x.device, x.dtype) if row.needs_kernel else None
        if lacking is not None:
            raise ValueError(f"the fused kernel does not run here, `eugen` is composed: {lacking}")
        config = row.config()
        layer = config.build(dense, generator=torch.Generator().manual_seed(1)).eval()
        with torch.no_grad():
            fast = layer.merged() if row.merge else layer
            error = check(fast, layer, x)
        measured = _timed(fast, dense, x, rates, seconds, confidence=CONFIDENCE)
        return {"config": repr(config), "check_error": error} | measured
    except ValueError as refusal:
        return {"status": "refused", "reason": str(refusal)}
    except Exception as failure:
        return {"status": "failed", "reason": f"{type(failure).__name__}: {failure}"}


def check(fast: FFNLayer, layer: FFNLayer, x: Tensor) -> float:
    """Relative RMS error of the measured form against the definition of the layer as it was built.

    Raises:
        ArithmeticError: they differ by more than the dtype allows, or a result is not finite.
    """
    expected, actual = layer.reference(x).double(), fast(x).double()
    error = float(torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected))
    coarsest = TOLERANCES[torch.bfloat16]
    allowed = max(TOLERANCES.get(dtype, coarsest) for dtype in (x.dtype, fast.precision))
    if not error <= allowed:  # NaN fails too
        raise ArithmeticError(
            f"forward is {error:.1e} off its reference, {allowed:.0e} is allowed: not timed"
        )
    return error


def _timed(
    layer: FFNLayer, dense: DenseFFN, x: Tensor, rates: Rates, seconds: float, *, confidence: float
) -> dict[str, Any]:
    device = str(x.device)
    timed = compare(
        lambda: dense(x), lambda: layer(x), pairs=PAIRS, max_seconds=seconds, warmup=1, device=device
    )
    speedup, low, high = timed.speedup(confidence)
    limit = dense.macs_per_token / layer.macs_per_token
    by_macs, by_bytes = rates.seconds(layer, len(x))
    return {
        "status": "timed",
        "speedup": speedup,
        "low": low,
        "high": high,
        "confidence": confidence,
        "limit_macs": limit,
        "of_limit": speedup / limit,
        "limit_roofline": max(rates.seconds(dense, len(x))) / max(by_macs, by_bytes),
        "binds": "bytes" if by_bytes > by_macs else "MACs",
        "macs_per_token": layer.macs_per_token,
        "weight_bytes": _weight_bytes(layer),
        "rates": asdict(rates),
        "dense_ms": _summary(timed.base_ms),
        "row_ms": _summary(timed.other_ms),
    }


def dense_block(condition: Condition, generator: torch.Generator) -> DenseFFN:
    """The block of a condition, with random weights."""
    like = torch.empty(0, dtype=DTYPES[condition.dtype], device=condition.device)
    d = condition.d
    up = new_linear(d, 4 * d, like=like, generator=generator)
    return DenseFFN(up, nn.GELU(), new_linear(4 * d, d, like=like, generator=generator)).eval()


def _rates(dense: DenseFFN) -> Rates:
    """A matrix product of the block's shape, and a matrix-vector product that reads as many bytes.

    On a GPU, which products of that size do not fill, those of `eugen.timing.roofline`.
    """
    weight, d = dense.up.weight.detach(), dense.in_features
    if weight.is_cuda:
        dtype = str(weight.dtype).removeprefix("torch.")
        found = measure_rates(str(weight.device), dtype)
        return Rates(found.macs_per_s[dtype], found.bytes_per_s)
    tokens = torch.zeros(1024, d).to(weight)
    lines = _weight_bytes(dense) // (4 * d)
    read, vector = torch.zeros(lines, d, device=weight.device), torch.zeros(d, device=weight.device)
    timed = compare(
        lambda: tokens @ weight.T,
        lambda: read @ vector,
        pairs=100,
        max_seconds=0.3,
        device=weight.device.type,
    )
    product, reading = min(timed.base_ms) / 1e3, min(timed.other_ms) / 1e3
    return Rates(len(tokens) * weight.numel() / product, 4 * read.numel() / reading)


def _weight_bytes(layer: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))


def _summary(samples: list[float]) -> dict[str, float]:
    lower, median, upper = statistics.quantiles(samples, n=4)
    return {"n": len(samples), "lower_quartile": lower, "median": median, "upper_quartile": upper}


def _progress(result: dict[str, Any]) -> str:
    place = f"{result['dtype']} {result['tokens']}x{result['d']} {result['row']}"
    if result["status"] != "timed":
        return f"{place}: {result['status']}: {result['reason']}"
    return f"{place}: {result['speedup']:.2f} [{result['low']:.2f}, {result['high']:.2f}]"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--rows", type=lambda text: text.split(","), help="names, comma-separated; all")
    parser.add_argument("--budget", type=float, default=0.3, help="fraction of the dense MACs (0.3)")
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=list(DTYPES), help="both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--shapes", type=shapes_of, default=SHAPES, help="tokens x width, as 1x384,128x768")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the pairs of each row (1)")
    parser.add_argument("--out", type=Path, help="record; reports/benchmarks/layers-<machine>.json")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.dtype if name not in DTYPES]
    if unknown:
        parser.error(f"--dtype {','.join(unknown)} is unknown: use {', '.join(DTYPES)}")
    if not 0 < options.budget <= 1:
        parser.error(f"--budget {options.budget} must be in (0, 1]: a fraction of the dense block's MACs")
    if options.threads < 1 or not 0 <= options.seconds < math.inf:
        parser.error("--threads must be at least 1, --seconds finite and not negative")
    if options.device != "cpu" and not (options.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device {options.device} is not here: use cpu, or cuda where torch sees one")
    try:
        options.chosen = rows(options.budget, options.rows)
    except ValueError as error:
        parser.error(str(error))
    if options.out is None:
        options.out = Path("reports", "benchmarks", f"layers-{machine_name(options.device)}.json")
    return options


def shapes_of(text: str) -> tuple[tuple[int, int], ...]:
    """Pairs of tokens and width from the command line, or an `ArgumentTypeError`."""
    try:
        shapes = tuple((int(t), int(d)) for t, d in (part.split("x") for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be tokens x width, as in 1x384,128x768") from None
    if any(t < 1 or d < 1 for t, d in shapes):
        raise argparse.ArgumentTypeError(f"{text!r}: tokens and width must be at least 1")
    return shapes


if __name__ == "__main__":
    sys.exit(main())
