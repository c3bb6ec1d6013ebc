"""Kill the benchmark at random moments: `python -m benchmarks.crash --kills 30 --seed 0`.

A small benchmark of the real stages runs once undisturbed. Then every trial runs it in a fresh clone,
kills one of its processes with -9, runs the same command again and compares. Fresh, not half done by the
trial before: a verdict is then about one kill, and that trial alone can be repeated with `--only`.
The record is saved after every trial; the same command goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.crash import kill, scratch, verdict
from benchmarks.crash.servers import Servers
from benchmarks.machine import environment, table, write_json

FORMAT = 1
OUT = Path("reports/benchmarks/crash.json")
REPAIR = ("deleted", "moved to", "come back", "was killed", "removed", "Crashed", "delivered")
"""Words of the lines by which a rerun says that it mended something."""


def main(arguments: list[str] | None = None) -> int:
    """Run the trials that the record lacks; returns 1 if any trial failed."""
    options = _parse(arguments)
    home = Path(tempfile.mkdtemp(prefix="crash-"))
    try:
        record = _resumed(options)
        reference = Reference(home / "undisturbed")
        record["undisturbed_seconds"] = round(reference.seconds, 1)
        numbers = options.only if options.only else range(options.kills)
        for number in numbers:
            if any(trial["number"] == number for trial in record["trials"]):
                continue
            record["trials"].append(trial(number, options.seed, home / f"trial{number}", reference))
            write_json(options.out, record)
            print(_line(record["trials"][-1]), flush=True)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    print("\n".join(_table(record["trials"])))
    return int(any(trial["verdict"] != "passed" for trial in record["trials"]))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="how many trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of the trials to run")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


def _resumed(options: argparse.Namespace) -> dict[str, Any]:
    """The record so far if it is of the same seed and commit, else a new one."""
    here = environment()
    if options.out.exists():
        found = json.loads(options.out.read_text(encoding="utf-8"))
        if (found["seed"], found["environment"]["commit"]) == (options.seed, here["commit"]):
            return found
    return {"format": FORMAT, "benchmark": "crash", "seed": options.seed, "environment": here, "trials": []}


class Reference:
    """The undisturbed run: its results, its stages, and when each verb was at work."""

    def __init__(self, folder: Path) -> None:
        running = scratch.start(scratch.clone(folder))
        if code := running.wait():
            raise SystemExit(f"the undisturbed run ended with {code}: {running.output()[-20:]}")
        self.seconds = time.monotonic() - running.started
        self.moments = kill.moments(running, self.seconds)
        self.results = verdict.results(folder)
        if found := verdict.faults(folder, self.results, set(scratch.VERBS)):
            raise SystemExit(f"the undisturbed run itself has faults: {found}")


def trial(number: int, seed: int, folder: Path, reference: Reference) -> dict[str, Any]:
    """One kill and one rerun in a fresh clone."""
    aim = kill.draw(number, seed)
    scratch.clone(folder)
    servers = Servers(folder.with_name(f"{folder.name}.servers"), folder)
    try:
        first = _begin(aim, folder, servers)
        killed, second = kill.strike(aim, folder, first, reference.moments[aim.moment], servers.processes)
        working = first.at_work()
        code = first.wait()
        if aim.victim == "mlflow":
            servers.restart_mlflow()
        began = time.monotonic()
        again = scratch.start(folder, **servers.variables)
        recovered = again.wait()
        seconds = time.monotonic() - began
        found = [] if killed else ["nothing was killed"]
        found += [f"the rerun ended with {recovered}: {again.output()[-3:]}"] if recovered else []
        found += verdict.faults(folder, reference.results, set(scratch.VERBS), servers)
    finally:
        servers.stop()
    _clean(folder)
    return {
        "number": number,
        **asdict(aim),
        "killed": killed,
        "second": round(second, 1),
        "working": working,
        "exit_code": code,
        "recovery_seconds": round(seconds, 1),
        "repaired": [line for line in again.output() if any(word in line for word in REPAIR)],
        "faults": found,
        "verdict": "failed" if found else "passed",
        "output": {"first": first.output()[-30:], "again": again.output()[-30:]} if found else None,
    }


def _begin(aim: kill.Aim, folder: Path, servers: Servers) -> scratch.Running:
    """Start the run that will be disturbed: by a worker, beside an MLflow server, or plainly."""
    if aim.victim in ("worker", "worker group"):
        servers.start_prefect()
        return servers.start_worker()
    if aim.victim == "mlflow":
        servers.start_mlflow()
    return scratch.start(folder, **servers.variables)


def _clean(folder: Path) -> None:
    """End what is left of a trial, and remove its folders."""
    for process in scratch.inhabitants(folder):
        process.kill()
    for path in folder.parent.glob(f"{folder.name}*"):
        shutil.rmtree(path, ignore_errors=True)


COLUMNS = ("trial", "killed", "in", "second", "stages at work", "recovered in s", "repaired", "verdict")


def _line(trial: dict[str, Any]) -> str:
    where = f"trial {trial['number']}: {trial['victim']} in {trial['moment']}"
    return "\n  ".join([f"{where}: {trial['verdict']}", *trial["faults"]])


def _table(trials: list[dict[str, Any]]) -> list[str]:
    rows = [
        [
            str(trial["number"]),
            trial["victim"],
            trial["moment"],
            f"{trial['second']:.1f}",
            ", ".join(trial["working"]),
            f"{trial['recovery_seconds']:.0f}",
            str(len(trial["repaired"])),
            trial["verdict"],
        ]
        for trial in trials
    ]
    return table(COLUMNS, rows)


if __name__ == "__main__":
    sys.exit(main())
