"""Compare the working tree with a commit: `python -m benchmarks.regression --base REF`.

Exit codes: 0 pass, 1 fail, 2 wrong usage, 3 inconclusive, 4 void (the machine was too unsteady), 5 a worker
died or anything else went wrong that no verdict foresees, as a full disk, 130 stopped.
"""

from __future__ import annotations

import argparse
import math
import signal
import sys
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.machine import ROOT
from benchmarks.regression import record, verdict
from benchmarks.regression.cases import CASES
from benchmarks.regression.compare import Trees, compare
from benchmarks.regression.processes import WorkerLost
from benchmarks.regression.sampling import Limits
from benchmarks.regression.worktree import WrongReference, candidate, checked_out, held, resolve

WRONG_USAGE, BROKEN, STOPPED = 2, 5, 130


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write the record; returns the exit code."""
    options = _parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, _stop)
    try:
        found = run(options.project.resolve(), options.base, options.cases, options.limits)
        try:
            path = record.save(found, options.out)
        finally:  # a full disk does not take the table, too
            print(record.text(found), flush=True)
        print(f"record: {path}", flush=True)
    except WrongReference as error:
        return _leave(str(error), WRONG_USAGE)
    except WorkerLost as error:
        return _leave(f"no verdict: {error}", BROKEN)
    except KeyboardInterrupt:
        return _leave("stopped: no worker runs any more, nothing was written", STOPPED)
    except Exception as error:  # Python's own exit code, 1, would blame the candidate
        traceback.print_exc()
        return _leave(f"ended by an error, not by a verdict: {type(error).__name__}: {error}", BROKEN)
    return verdict.EXIT_CODES[found["verdict"]]


def run(project: Path, base: str, names: list[str], limits: Limits) -> dict[str, Any]:
    """The record of one comparison in the clone `project`.

    Raises:
        WrongReference: the base is no commit.
        WorkerLost: a worker died, or cannot start.
    """
    begun = datetime.now(UTC)
    theirs, ours = resolve(project, base), candidate(project)
    with held(project, _say), checked_out(project, theirs.commit) as tree:
        cases = compare(Trees(tree, project), names, limits, _say)
    settings = {key: value for key, value in asdict(limits).items() if key != "inject"}
    return record.make(
        base=theirs,
        candidate=ours,
        injected=limits.inject,
        settings=settings,
        begun=begun,
        judged=verdict.judge_run(cases),
        cases=cases,
    )


def _stop(*_: object) -> NoReturn:
    """Interrupt once; a second signal must not break into the cleaning up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _leave(message: str, code: int) -> int:
    _say(message)
    return code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.regression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = Limits()
    parser.add_argument("--base", required=True, metavar="REF", help="branch, tag or commit to compare with")
    parser.add_argument("--cases", help=f"comma-separated; all of {', '.join(CASES)}")
    parser.add_argument("--pairs", type=int, default=defaults.pairs, help="at least so many (300)")
    parser.add_argument("--seconds", type=float, default=defaults.seconds, help="at most, for each case (25)")
    parser.add_argument("--inject", type=float, default=0.0, help="slow the candidate: 0.10 is 10 %% (0)")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="of each worker (1)")
    parser.add_argument("--out", type=Path, default=Path("results", "regressions"), help="folder of records")
    parser.add_argument("--project", type=Path, default=ROOT, help="the clone to judge (this one)")
    options = parser.parse_args(arguments)
    options.cases = list(CASES) if options.cases is None else options.cases.split(",")
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"--cases {','.join(unknown)} is unknown: use {', '.join(CASES)}")
    if options.pairs < 6 or options.threads < 1:
        parser.error("--pairs must be at least 6 (two in each of three places), --threads at least 1")
    if not (0 < options.seconds < math.inf and 0 <= options.inject < math.inf):
        parser.error("--seconds must be above 0, --inject 0 or more, both finite")
    options.limits = Limits(options.pairs, options.seconds, options.inject, options.threads)
    return options


if __name__ == "__main__":
    sys.exit(main())
