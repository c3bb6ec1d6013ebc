"""The whole benchmark with one command, by Prefect or by plain `dvc repro`, with the same results.

python -m flows.benchmark [--profile NAME] [--engine prefect|dvc] [--jobs N] [--pool WORK_POOL]
"""

from __future__ import annotations

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from flows.clone import WrongParameters
from flows.dvc import engine as dvc_engine
from flows.prefect.own_server import own_server
from flows.run import CellsFailed, finish, ready


class Engine(StrEnum):
    """What runs the stages."""

    prefect = "prefect"
    dvc = "dvc"


def run(
    project: Path, profile: str | None, engine: Engine, jobs: int | None, pool: str | None = None
) -> None:
    """Run the benchmark in the clone `project`, which is held from the check of the parameters on."""
    with ready(project, profile) as runner:
        # A run with nothing to order, retry or watch does not wait for a Prefect server to start.
        # After a kill there is one thing to mend even so: what Prefect still takes for running.
        if engine is Engine.prefect and (runner.survey.stale or runner.after_kill):
            with own_server():
                from flows.prefect import engine as prefect_engine

                prefect_engine.run_tagged(project, jobs, pool)
        else:
            finish(runner, dvc_engine.run_graph(runner))


def main(
    profile: Annotated[str | None, typer.Option(help="A file of params/; else params.yaml as it is.")] = None,
    engine: Annotated[Engine, typer.Option(help="Prefect runs stages side by side.")] = Engine.prefect,
    jobs: Annotated[int | None, typer.Option(min=1, help="Stages at a time; default: cores + 1.")] = None,
    pool: Annotated[str | None, typer.Option(help="Send the cells to this work pool's workers.")] = None,
    project: Annotated[Path, typer.Option(help="The clone to run.", file_okay=False, exists=True)] = Path(),
) -> None:
    """Run the benchmark. Exit codes: 0 all passed, 1 some failed, 2 wrong parameters, 130 stopped."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        if pool is not None and engine is Engine.dvc:
            raise WrongParameters("--pool sends cells through Prefect: leave --engine out")
        if pool is not None and "PREFECT_API_URL" not in os.environ:
            raise WrongParameters("--pool needs a server that workers reach: make server, or PREFECT_API_URL")
        run(project.resolve(), profile, engine, jobs, pool)
    except WrongParameters as error:
        leave(str(error), 2)
    except CellsFailed as error:
        leave(str(error), 1)
    except KeyboardInterrupt:
        leave("stopped: no stage runs any more; the same command goes on where this one ended", 130)
    except (RuntimeError, OSError) as error:
        leave(f"the benchmark cannot run: {error}", 1)


def leave(message: str, code: int) -> NoReturn:
    """End the program with a message on the error stream."""
    print(message, file=sys.stderr, flush=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(main)
