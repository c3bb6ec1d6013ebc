"""What a level and a row buy, in how many seconds: `python -m benchmarks.transfer_levels MODEL --data FILE`.

Every level with every row goes through the command `eugen compress`, one after another, each in a process of
its own. Quality is that of the command: agreement with the original on examples that nothing else sees.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import eugen
from benchmarks.machine import FORMAT, ROOT, environment, load, table, write_json

BENCHMARK = "transfer_levels"
LEVELS = ("fast", "standard")
ROWS = ("prune", "eugen_experts", "auto")
COLUMNS = ("level", "row", "seconds", "of which choice", "tokens", "quality", "parameters", "speed-up")


def main(arguments: list[str] | None = None) -> int:
    """Run the command for each level and row, print the table, write the record.

    What the record has of other levels and rows, at the same settings, stays in it.
    """
    options = _parse(arguments)
    settings = {"model": _name(options.model), "data": Path(options.data).name, "budget": options.budget}
    results = _recorded(options.out, settings)
    for level in options.levels:
        for row in options.rows:
            before = environment()
            found = measure(level, row, options)
            results[level, row] = {**found, "environment": {**before, "load_end": load()}}
            print(*table(COLUMNS, [_cells(found)])[2:], file=sys.stderr, flush=True)
            ordered = [results[key] for key in sorted(results, key=_place)]
            record = {"format": FORMAT, "benchmark": BENCHMARK, "settings": settings, "results": ordered}
            write_json(options.out, record)
    print(*table(COLUMNS, [_cells(results[key]) for key in sorted(results, key=_place)]), sep="\n")
    return 0


def _recorded(path: Path, settings: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Results by level and row, of these settings; none where the file is of others, or is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    same = (record["format"], record["benchmark"], record["settings"]) == (FORMAT, BENCHMARK, settings)
    return {(r["level"], r["row"]): r for r in record["results"] if same and "environment" in r}


def _place(key: tuple[str, str]) -> tuple[int, int, str]:
    """By effort, then as the rows are named here."""
    level, row = key
    return list(eugen.LEVELS).index(level), ROWS.index(row) if row in ROWS else len(ROWS), row


def measure(level: str, row: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run of the command.

    Raises:
        SystemExit: it failed; what it said stands above.
    """
    with tempfile.TemporaryDirectory(prefix="eugen-levels-") as folder:
        out = Path(folder) / "small"
        words = ["compress", options.model, "--data", options.data, "--budget", options.budget]
        words += ["--row", row, "--level", level, "--out", out]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "eugen.cli", *map(str, words)], check=False, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"level {level}, row {row}: the command ended with status {done.returncode}")
        said, plan = (
            json.loads((out / name).read_text(encoding="utf-8")) for name in ("config.json", "plan.json")
        )
    cost = said["cost"]
    return {
        "level": level,
        "row": row,
        "seconds": seconds,
        "choice_seconds": sum(plan["figures"].get("seconds", {}).values()),
        "transfer_seconds": said["work"]["transfer_seconds"],
        "tokens": said["work"]["calibration_tokens"],
        "quality": said["quality"],
        "parameters": cost["compressed"]["parameters"] / cost["dense"]["parameters"],
        "macs": cost["compressed"]["macs"] / cost["dense"]["macs"],
        "latency": said["latency"],
        "threads": said["conditions"]["threads"],
    }


def _cells(result: dict[str, Any]) -> list[str]:
    main, latency = result["quality"]["main"], result["latency"]
    return [
        result["level"],
        result["row"],
        f"{result['seconds']:.0f}",
        f"{result['choice_seconds']:.0f}",
        f"{result['tokens']}",
        f"{main} {result['quality'][main]:.4f}",
        f"{result['parameters']:.2f}",
        f"{latency['speedup']:.2f} [{latency['speedup_low']:.2f}, {latency['speedup_high']:.2f}]",
    ]


def _name(model: str) -> str:
    """Without the folders before a path's last part."""
    kind, _, rest = model.partition(":")
    return f"{kind}:{Path(rest).name}"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer_levels", description=__doc__)
    parser.add_argument("model", help="as for `eugen compress`")
    parser.add_argument("--data", required=True, help="as for `eugen compress`")
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--levels", nargs="+", default=list(LEVELS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    default = ROOT / "reports" / "benchmarks" / "transfer-levels.json"
    parser.add_argument("--out", type=Path, default=default, help=f"default: {default.relative_to(ROOT)}")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
