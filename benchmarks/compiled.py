"""Whether compiled code beats torch's own operators for merged EUGen: `python -m benchmarks.compiled`.

Merged EUGen as it is, what `torch.compile` makes of it in several modes, and the dense block, each compared
in several places of memory (`eugen.timing.compare_models`) after its result agreed with the definition.
docs/benchmarks.md says how to read the result.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import eugen
from benchmarks.layers import DTYPES, TOLERANCES, Condition, dense_block, shapes_of
from benchmarks.machine import FORMAT, environment, load, machine_name, table, write, write_json
from eugen.ffn import FFNLayer
from eugen.timing import compare_models, placed
from eugen.timing.placements import Factory
from eugen.timing.rows import compare_outputs

SHAPES = ((1, 384), (1, 768), (128, 384), (128, 768))
MODES: dict[str, dict[str, Any]] = {
    "compiled": {},
    "compiled, max-autotune": {"mode": "max-autotune-no-cudagraphs"},
    "compiled, freezing": {"options": {"freezing": True}},
}
COMPOSED, DENSE = "eugen", "dense"
WORTH = 1.10
"""So many times as fast at one token is what would be worth a compiler at run time."""
CONFIDENCE, PAIRS = 0.95, 100


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and the verdict, write the record. Returns 1 if a form failed its check."""
    options = _parse(arguments)
    torch.set_num_threads(options.threads)
    started, before = time.perf_counter(), environment()
    conditions = [Condition(t, d, dtype, "cpu") for dtype in options.dtype for t, d in options.shapes]
    single = sum(condition.tokens == 1 for condition in conditions)
    # Together the intervals behind the verdict, the control's and each mode's at one token, hold so often.
    confidence = 1 - (1 - CONFIDENCE) / max(1, (len(MODES) + 1) * single)
    results = []
    for condition in conditions:
        results += measure(condition, options.budget, options.seconds, options.placements, confidence)
    settings = {key: getattr(options, key) for key in ("budget", "seconds", "placements")}
    record = {
        "format": FORMAT,
        "benchmark": "compiled",
        "environment": {**before, "threads": options.threads, "device": "cpu", "load_end": load()},
        "settings": {**settings, "pairs": PAIRS, "confidence": confidence},
        "wall_seconds": round(time.perf_counter() - started, 1),
        "results": results,
        "verdict": verdict(results),
    }
    text = markdown(record)
    write_json(options.out, record)
    write(options.out.with_suffix(".md"), text)
    print(text)
    return int(any(result["status"] == "failed" for result in results))


def measure(
    condition: Condition, budget: float, seconds: float, placements: int, confidence: float
) -> list[dict[str, Any]]:
    """Every form beside merged EUGen and beside the dense block under one condition."""
    generator = torch.Generator().manual_seed(0)
    dense = dense_block(condition, generator)
    x = torch.randn(condition.tokens, condition.d, generator=generator).to(dense.up.weight)
    layer = eugen.EUGenConfig(budget=budget).build(dense, generator=torch.Generator().manual_seed(1)).eval()
    merged = layer.merged()
    forms: dict[str, tuple[FFNLayer, dict[str, Any] | None]] = {COMPOSED: (merged, None)}
    forms |= {name: (merged, options) for name, options in MODES.items()}
    bases = {COMPOSED: placed(merged, x, _run), DENSE: placed(dense, x, _run)}
    results = []
    for name, (form, options) in forms.items():
        try:
            other = placed(form, x, _run) if options is None else compiled(form, x, options)
            with torch.no_grad():
                allowed = TOLERANCES[x.dtype]
                error = compare_outputs(other()(), layer.reference(x), allowed)
            for base, factory in bases.items():
                timed = compare_models(
                    factory, other, placements=placements, pairs=PAIRS, max_seconds=seconds
                )
                speedup, low, high = timed.speedup(confidence)
                found = {"speedup": speedup, "low": low, "high": high, "scatter": timed.scatter()}
                found |= {"base_ms": _median(timed.base_ms), "other_ms": _median(timed.other_ms)}
                results.append({"form": name, "base": base, "status": "timed", "check_error": error, **found})
        except Exception as failure:  # no C++ compiler here, say: the other forms are still of use
            reason = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
            results.append({"form": name, "base": COMPOSED, "status": "failed", "reason": reason})
        print(results[-1], file=sys.stderr, flush=True)
    return [asdict(condition) | result for result in results]


def compiled(layer: FFNLayer, x: Tensor, options: dict[str, Any]) -> Factory:
    """A factory of compiled copies. Each is compiled anew: frozen weights lie where the compiler put them."""

    def make() -> Callable[[], Tensor]:
        torch.compiler.reset()  # or torch gives up after a few copies of one module
        own, call = x.clone(), torch.compile(copy.deepcopy(layer), fullgraph=True, dynamic=False, **options)
        with torch.no_grad():
            call(own)
        return lambda: call(own)

    return make


def verdict(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether one mode is at least `WORTH` times as fast as merged EUGen at one token, at every width.

    Returns:
        `answer`, yes, no or void, and `why`. Yes takes intervals that lie above, whole; it is void where
        merged EUGen beside its own copy does not cover 1, or nothing was measured at one token.
    """
    single = [r for r in results if r["tokens"] == 1 and r["base"] == COMPOSED]
    control = [r for r in single if r["form"] == COMPOSED]
    if not control or any(r["status"] != "timed" for r in control):
        return {"answer": "void", "why": "nothing was measured at one token"}
    if not all(r["low"] <= 1 <= r["high"] for r in control):
        return {"answer": "void", "why": "merged EUGen beside its own copy does not cover 1"}
    by_mode = {mode: [r for r in single if r["form"] == mode] for mode in MODES}
    timed = {mode: rs for mode, rs in by_mode.items() if rs and all(r["status"] == "timed" for r in rs)}
    if not timed:
        return {"answer": "void", "why": "no compiled form could be measured at every width"}
    best = max(timed, key=lambda mode: min(r["low"] for r in timed[mode]))
    found = ", ".join(f"{_interval(r)} at d={r['d']} {r['dtype']}" for r in timed[best])
    answer = "yes" if all(r["low"] >= WORTH for r in timed[best]) else "no"
    possible = any(all(r["high"] >= WORTH for r in rs) for rs in timed.values())
    doubt = "; an interval still reaches it" if answer == "no" and possible else ""
    return {"answer": answer, "why": f"best is '{best}': {found}{doubt}"}


def markdown(record: dict[str, Any]) -> str:
    """The verdict, one table, and what was not measured."""
    found, settings, said = record["environment"], record["settings"], record["verdict"]
    dirty = ", with uncommitted changes" if found["dirty"] else ""
    timed = [r for r in record["results"] if r["status"] == "timed"]
    rows = [
        [f"{r['tokens']} × {r['d']}", r["dtype"], r["form"], r["base"], _interval(r)]
        + [f"{r[key]:.3f}" for key in ("base_ms", "other_ms", "scatter")]
        for r in timed
    ]
    absent = [
        f"- {r['tokens']} × {r['d']} {r['dtype']} {r['form']}: {r['reason']}"
        for r in record["results"]
        if r["status"] != "timed"
    ]
    columns = ["tokens × d", "dtype", "form", "beside", "speed-up", "beside ms", "form ms", "scatter"]
    lines = [
        "# Compiled or composed",
        "",
        f"**≥ 10 % faster at batch 1: {said['answer']}** ({said['why']}).",
        "",
        f"{found['processor']}, {found['threads']} threads; torch {found['versions']['torch']}, "
        f"Python {found['versions']['python']}; commit {found['commit'][:12]}{dirty}; "
        f"load {found['load']} before and {found['load_end']} after; {record['wall_seconds']:.0f} s.",
        "",
        f"EUGen at {100 * settings['budget']:g} % of the MACs of a dense block d → 4d → d with GELU, merged. "
        f"Geometric mean over {settings['placements']} places in memory with its "
        f"{100 * settings['confidence']:.3g} % interval; the form `{COMPOSED}` beside itself is the control.",
        "",
        *table(columns, rows),
        "",
    ]
    return "\n".join([*lines, "Not measured:", "", *absent, ""] if absent else lines)


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _median(samples: list[float]) -> float:
    return float(torch.tensor(samples, dtype=torch.float64).quantile(0.5))


def _interval(result: dict[str, Any]) -> str:
    return f"{result['speedup']:.2f} [{result['low']:.2f}, {result['high']:.2f}]"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--budget", type=float, default=0.3, help="fraction of the dense MACs (0.3)")
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=["float32"], help="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", type=shapes_of, default=SHAPES, help="tokens x width, as 1x384,128x768")
    parser.add_argument("--seconds", type=float, default=4.0, help="for the pairs of each comparison (4)")
    parser.add_argument("--placements", type=int, default=12, help="places in memory, 3 or more (12)")
    parser.add_argument("--out", type=Path, help="record; reports/benchmarks/compiled-<machine>.json")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.dtype if name not in DTYPES]
    if unknown:
        parser.error(f"--dtype {','.join(unknown)} is unknown: use {', '.join(DTYPES)}")
    if not 0 < options.budget <= 1:
        parser.error(f"--budget {options.budget} must be in (0, 1]: a fraction of the dense block's MACs")
    if options.threads < 1 or not 0 <= options.seconds < math.inf:
        parser.error("--threads must be at least 1, --seconds finite and not negative")
    if options.placements < 3:
        parser.error(f"--placements {options.placements} must be at least 3 to tell their scatter")
    if options.out is None:
        options.out = Path("reports", "benchmarks", f"compiled-{machine_name()}.json")
    return options


if __name__ == "__main__":
    sys.exit(main())
