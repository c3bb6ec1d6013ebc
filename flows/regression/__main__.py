"""Is this commit slower, larger or worse than another?

python -m flows.regression [--base REF|@ALIAS] [--cases NAME,…] [--seconds S] [--inject SHARE]
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from flows.benchmark import leave
from flows.clone import WrongParameters, held
from flows.prefect.own_server import own_server
from flows.regression.measurement import CODES, WRONG_USAGE
from flows.run import say


def main(
    base: Annotated[
        str | None, typer.Option(help="Git ref or @alias; default @baseline, else HEAD~1.")
    ] = None,
    cases: Annotated[str | None, typer.Option(help="Names of cases, with commas; default: all.")] = None,
    inject: Annotated[
        float, typer.Option(min=0, help="Slow the candidate down by this share: a drill.")
    ] = 0.0,
    seconds: Annotated[float | None, typer.Option(min=0, help="Bound of a case's measurement.")] = None,
    project: Annotated[Path, typer.Option(help="The clone to judge.", file_okay=False, exists=True)] = Path(),
) -> None:
    """Judge the working tree. Exit codes: 0 pass, 1 fail, 2 usage, 3 inconclusive, 4 void, 130 stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    folder = project.resolve()
    chosen = [name.strip() for name in cases.split(",")] if cases else None
    try:
        # Held first: two servers of a clone's own must not meet on its database.
        with held(folder, say), own_server():
            from flows.regression.flow import VERDICTS, regression

            state = regression(str(folder), base, chosen, inject, seconds, return_state=True)
    except KeyboardInterrupt:
        leave("stopped: nothing is measured any more, and there is no verdict", 130)
    except Exception as error:  # only a measured verdict may end with the code of a failed one
        leave(f"there is no verdict: {error}", CODES["void"])
    error = None if state.is_completed() else state.result(raise_on_failure=False)
    if isinstance(error, WrongParameters):
        leave(str(error), WRONG_USAGE)
    if isinstance(error, Exception):  # of the flow itself: nothing was learnt about the code
        leave(f"there is no verdict: {error}", CODES["void"])
    raise typer.Exit(CODES[VERDICTS[state.name or ""]])


if __name__ == "__main__":
    typer.run(main)
