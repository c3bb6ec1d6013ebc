"""Does the verdict hold? `python -m benchmarks.regression.validate --runs 16`: twelve minutes on two cores.

One commit is compared with itself, in turn as it is and with the candidate slowed by 10 %. Of 16 slow-downs
15 must be found, of 16 equals one may raise an alarm. A stopped validation goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import FORMAT, ROOT, environment, load, table, write, write_json
from benchmarks.regression import verdict
from benchmarks.regression.cases import CASES
from benchmarks.regression.compare import Trees, compare
from benchmarks.regression.processes import WorkerLost
from benchmarks.regression.sampling import Limits
from benchmarks.regression.worktree import WrongReference, checked_out, held, resolve

REPRESENTATIVE = ("eugen-1", "eugen-128")
"""One where calls weigh most, one where products do."""
PROGRESS = Path(".work", "regression-validation.json")
OUT = Path("reports", "benchmarks", "regression-validation.json")
KINDS = {"equal": "equal", "slowed": "slowed on purpose"}
KEPT = ("pairs", "ratio", "low", "high", "confirmed")


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, write the record, print the table; 0 if the goals are met, 1 if not."""
    options = _parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    commit = resolve(ROOT, "HEAD").commit
    settings = {
        "runs": options.runs,
        "inject": options.inject,
        "cases": options.cases,
        "pairs": options.pairs,
        "seconds": options.seconds,
    }
    try:
        with held(ROOT, print), checked_out(ROOT, commit) as tree:
            found = _resumed({"settings": settings, "commit": commit})
            for number in range(len(found["results"]), 2 * options.runs):
                found["results"].append(_run(tree, number, options))
                write_json(ROOT / PROGRESS, found)
    except (WrongReference, WorkerLost, KeyboardInterrupt) as error:
        said = str(error) or "stopped: the same command goes on where this one ended"
        print(said, file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    record = _record(found)
    write_json(options.out, record)
    write(options.out.with_suffix(".md"), markdown(record))
    (ROOT / PROGRESS).unlink()
    print(markdown(record))
    return int(not record["verdict"]["met"])


def _resumed(wanted: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command with these settings at this commit left, or a beginning."""
    fresh = {**wanted, "environment": environment(), "results": []}
    try:
        found = json.loads((ROOT / PROGRESS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return fresh
    same = all(found.get(key) == value for key, value in wanted.items())
    return found if same and found["environment"]["dirty"] is False else fresh


def _run(tree: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One comparison of the tree with itself; odd ones are slowed."""
    kind, started = list(KINDS)[number % 2], time.perf_counter()
    inject = options.inject if kind == "slowed" else 0.0
    limits = Limits(options.pairs, options.seconds, inject)
    cases = compare(Trees(tree, tree), options.cases, limits, lambda line: None)
    judged = verdict.judge_run(cases)
    print(f"{number + 1}/{2 * options.runs} {KINDS[kind]}: {judged.verdict}, {judged.reason}", flush=True)
    return {
        "kind": kind,
        **judged.said(),
        "load": load(),
        "seconds": round(time.perf_counter() - started, 1),
        "cases": [_summary(case) for case in cases],
    }


def _summary(case: dict[str, Any]) -> dict[str, Any]:
    latency = {key: case["latency"][key] for key in KEPT}
    return {**{key: case[key] for key in ("name", "verdict", "reason", "control")}, "latency": latency}


def _record(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "benchmark": "regression-validation",
        "environment": {**found["environment"], "load_end": load()},
        "settings": found["settings"],
        "wall_seconds": round(sum(result["seconds"] for result in found["results"]), 1),
        "verdict": judge(found["results"]),
        "results": found["results"],
    }


def judge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """How often each verdict fell on equals and on slow-downs, and whether that is good enough."""
    counts = {
        kind: {
            said: sum(r["kind"] == kind and r["verdict"] == said for r in results)
            for said in verdict.EXIT_CODES
        }
        for kind in KINDS
    }
    runs = {kind: sum(count.values()) for kind, count in counts.items()}
    found, alarms = counts["slowed"][verdict.FAIL], counts["equal"][verdict.FAIL]
    met = 16 * found >= 15 * runs["slowed"] and 16 * alarms <= runs["equal"]
    return {"met": met, "found": found, "false_alarms": alarms, "runs": runs, "counts": counts}


def markdown(record: dict[str, Any]) -> str:
    """The answer and two tables: runs by verdict, then every ratio."""
    said, found, settings = record["verdict"], record["environment"], record["settings"]
    dirty = ", with uncommitted changes" if found["dirty"] else ""
    counts = [[KINDS[kind], *map(str, by.values())] for kind, by in said["counts"].items()]
    rows = [
        [KINDS[r["kind"]], r["verdict"], case["name"], case["verdict"], *_measured(case)]
        for r in record["results"]
        for case in r["cases"]
    ]
    lines = [
        "# Validation of the regression benchmark",
        "",
        f"**Slow-downs of {100 * settings['inject']:g} % found: {said['found']} of {said['runs']['slowed']}; "
        f"false alarms: {said['false_alarms']} of {said['runs']['equal']}** "
        f"({'good enough' if said['met'] else 'not good enough'}: 15 and 1 of 16).",
        "",
        f"{found['processor']}, {found['cores']} cores; torch {found['versions']['torch']}; commit "
        f"{found['commit'][:12]}{dirty}, with itself; load {found['load']} before and {found['load_end']} "
        f"after; {record['wall_seconds']:.0f} s.",
        "",
        *table(["candidate", *verdict.EXIT_CODES], counts),
        "",
        "Every run, candidate / base with its 99 % interval:",
        "",
        *table(["candidate", "run", "case", "verdict", "candidate / base", "control", "pairs"], rows),
        "",
    ]
    return "\n".join(lines)


def _measured(case: dict[str, Any]) -> list[str]:
    latency = case["latency"]
    return [_interval(latency), _interval(case["control"]), str(latency["pairs"])]


def _interval(found: dict[str, Any]) -> str:
    return f"{found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.regression.validate", description=__doc__)
    defaults = Limits()
    parser.add_argument("--runs", type=int, default=16, help="of each kind (16)")
    parser.add_argument("--inject", type=float, default=0.10, help="share of the slow-down (0.10)")
    parser.add_argument("--cases", help=f"comma-separated ({','.join(REPRESENTATIVE)})")
    parser.add_argument("--pairs", type=int, default=defaults.pairs, help=f"at least ({defaults.pairs})")
    parser.add_argument(
        "--seconds", type=float, default=defaults.seconds, help=f"at most ({defaults.seconds:g})"
    )
    parser.add_argument("--out", type=Path, default=OUT, help=f"record ({OUT})")
    options = parser.parse_args(arguments)
    options.cases = list(REPRESENTATIVE) if options.cases is None else options.cases.split(",")
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"--cases {','.join(unknown)} is unknown: use {', '.join(CASES)}")
    if options.runs < 1:
        parser.error("--runs must be at least 1")
    return options


if __name__ == "__main__":
    sys.exit(main())
