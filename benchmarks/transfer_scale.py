"""Time and memory of closed-form transfer at scale: `python -m benchmarks.transfer_scale`.

A block of ViT-B's shape, and all twelve blocks of an encoder of that shape, each in a fresh process whose
peak resident set is the kernel's own count (Linux). Random weights and tokens: neither time nor memory asks
what they mean.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import eugen
from benchmarks.machine import FORMAT, environment, load, table, write_json
from eugen.activations import MEMORY_LIMIT
from eugen.least_squares import fit_quality

WIDTH, HIDDEN, HEADS, DEPTH, LENGTH = 768, 3072, 12, 12, 197
TOKENS, BUDGET = 50_000, 0.3
CHUNK = 4096
ROWS: dict[str, eugen.LayerConfig] = {
    "prune": eugen.PruneConfig(budget=BUDGET),
    "eugen": eugen.EUGenConfig(budget=BUDGET, projection="teacher", order=1),
    "low_rank_aware": eugen.LowRankAwareConfig(budget=BUDGET),
}
"""The best pruning, the EUGen of the teacher's rows, and the row with a second moment of all neurons."""
GOALS = {"block": {"seconds": 25.0, "peak_bytes": 3e9}, "network": {"peak_bytes": 6e9}}


def main(arguments: list[str] | None = None) -> int:
    """Measure each case in a process of its own, print the table, write the record."""
    options = _parse(arguments)
    if options.case is not None:
        part, row = options.case.split(":")
        print(json.dumps(measure(part, row, options)))
        return 0
    before, started = environment(), time.perf_counter()
    cases = [f"block:{row}" for row in options.rows] + [f"network:{row}" for row in options.network]
    results = [_in_child(case, options) for case in cases]
    record = {
        "format": FORMAT,
        "benchmark": "transfer_scale",
        "environment": {**before, "threads": options.threads, "load_end": load()},
        "settings": {
            "tokens": options.tokens,
            "depth": options.depth,
            "budget": BUDGET,
            "memory_limit": options.memory_limit,
            "shape": [WIDTH, HIDDEN],
        },
        "results": results,
        "wall_seconds": round(time.perf_counter() - started, 1),
    }
    write_json(options.out, record)
    print(*_table(results), sep="\n")
    return 0 if all(result["met"] for result in results) else 1


def measure(part: str, row: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak of one case, in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run = block if part == "block" else network
    started = time.perf_counter()
    r2, seconds = run(ROWS[row], options)
    found = {"part": part, "row": row, "seconds": seconds, "r2": r2, "peak_bytes": _peak_bytes()}
    goals = GOALS[part]
    met = all(found[name] is not None and found[name] <= most for name, most in goals.items())
    return found | {"goals": goals, "met": met, "process_seconds": time.perf_counter() - started}


def block(config: eugen.LayerConfig, options: argparse.Namespace) -> tuple[float, float]:
    """One block's closed form on chunks that are there already; judged on the last of them."""
    encoder = _encoder(1)
    (site,) = eugen.find_ffns(encoder)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        x = torch.randn(options.tokens, WIDTH, generator=generator)
        y = torch.cat([site.dense(part) for part in x.split(CHUNK)])
        data = [(a, b, None) for a, b in zip(x.split(CHUNK), y.split(CHUNK), strict=True)]
        started = time.perf_counter()
        layer = config.fit(site.dense, data, generator=generator)
        seconds = time.perf_counter() - started
        return fit_quality(layer, data[-1:]), seconds


def network(config: eugen.LayerConfig, options: argparse.Namespace) -> tuple[float, float]:
    """All blocks of an encoder, front to back; batches of 16 sequences as long as ViT-B's."""
    count = -(-options.tokens // (16 * LENGTH))
    batches = list(torch.randn(count, 16, LENGTH, WIDTH))
    model, started = _encoder(options.depth), time.perf_counter()
    result = eugen.replace(
        model, config, calibration=batches, memory_limit=options.memory_limit, progress=_say
    )
    return min(site.fit_r2 or 0.0 for site in result.sites), time.perf_counter() - started


def _encoder(depth: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, HEADS, HIDDEN, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False).eval()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _peak_bytes() -> int | None:
    """The kernel's peak of this process; not `ru_maxrss`, which starts at what the parent held."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def _in_child(case: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.transfer_scale", "--case", case]
    for name in ("tokens", "depth", "threads", "memory_limit"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def _table(results: list[dict[str, Any]]) -> list[str]:
    def peak(result: dict[str, Any]) -> str:
        return "unknown" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e9:.2f}"

    rows = [
        [r["part"], r["row"], f"{r['seconds']:.1f}", peak(r), f"{r['r2']:.3f}", "yes" if r["met"] else "no"]
        for r in results
    ]
    return table(("part", "row", "seconds", "peak GB", "least R²", "goals met"), rows)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer_scale", description=__doc__)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"calibration tokens ({TOKENS})")
    parser.add_argument("--depth", type=int, default=DEPTH, help=f"blocks of the network ({DEPTH})")
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS), help="of the single block")
    parser.add_argument("--network", nargs="*", choices=ROWS, default=["prune"], help="of the whole network")
    parser.add_argument("--memory-limit", type=int, default=MEMORY_LIMIT, help="of replace, in bytes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("reports", "benchmarks", "transfer-scale.json"))
    options = parser.parse_args(arguments)
    for name, least in (("tokens", 100), ("depth", 1), ("threads", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name} {getattr(options, name)} must be at least {least}")
    return options


if __name__ == "__main__":
    sys.exit(main())
