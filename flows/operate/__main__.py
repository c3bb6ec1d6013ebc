"""python -m flows.operate server|worker|deploy: the benchmark as a service on one machine or many.

The worker and the deployments go to the Prefect server that PREFECT_API_URL names, or to this clone's.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.operate import servers
from flows.operate.servers import CannotServe

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
Project = Annotated[Path, typer.Option(help="The clone.", file_okay=False, exists=True)]


def say(line: str) -> None:
    """One line for the person at the terminal."""
    print(line, flush=True)


@app.command()
def server(
    host: Annotated[str, typer.Option(help="Other addresses than loopback need credentials.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Prefect's.")] = 4200,
    mlflow_port: Annotated[int, typer.Option(help="MLflow's.")] = 5000,
    project: Project = Path(),
) -> None:
    """Start the Prefect server and the MLflow server of this clone; ctrl-C stops both."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        servers.serve(project.resolve(), host, port, mlflow_port, say)
    except KeyboardInterrupt:
        say("stopped")


@app.command()
def worker(
    pool: Annotated[str, typer.Option(help="cpu-pool, gpu-pool, or one of your own.")] = "cpu-pool",
    limit: Annotated[int | None, typer.Option(min=1, help="Runs at a time; default: GPUs, or 1.")] = None,
    project: Project = Path(),
) -> None:
    """Serve a work pool with this clone; makes the pool, and a slot for each GPU, if they are missing."""
    _need_server()
    from flows.operate import pools

    pools.work(project.resolve(), pool, limit, say)


@app.command()
def deploy(
    notify: Annotated[str | None, typer.Option(help="Post here when a regression fails or is void.")] = None,
    project: Project = Path(),
) -> None:
    """Put the deployments of flows/prefect.yaml on the server, with their schedules."""
    _need_server()
    from flows.operate import pools

    pools.deploy(project.resolve(), say)
    if notify:
        from flows.operate.notify import notify as tell

        tell(notify)
        say("a regression that fails or is void will be posted to the address given")


def _need_server() -> None:
    if "PREFECT_API_URL" not in os.environ:
        raise CannotServe("no Prefect server: run make server in this clone, or set PREFECT_API_URL")


if __name__ == "__main__":
    try:
        app()
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
