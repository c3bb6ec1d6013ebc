"""Old runs deleted for good from the project's own database, with their artifacts.

`python -m stages.tracking.clean --before UNIX_SECONDS [--apply]`; `make clean-runs` calls it. A run that a
registered model's version was made from stays, whatever its age, and so does one that still runs.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import unquote, urlsplit

import typer
from filelock import FileLock

from stages.tracking import location, process
from stages.tracking.redaction import hidden

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

AT_A_TIME = 500
"""Runs that one call of `mlflow gc` is given."""


def main(
    before: Annotated[float, typer.Option(help="Runs that ended before this go (Unix seconds).")],
    apply: Annotated[bool, typer.Option("--apply", help="Delete; else only say what would go.")] = False,
) -> None:
    """Say what is old in MLflow, or delete it. Exit codes: 0 done, 1 `mlflow gc` failed."""
    uri, database = location.tracking_uri(), location.database()
    if database is None:
        print(
            f"runs in MLflow: {hidden(uri)} is not this clone's own. Delete its old runs in its pages, then"
        )
        print("  run `mlflow gc --older-than 30d --backend-store-uri …` on its machine")
        return
    if not database.exists():
        print("runs in MLflow: none")
        return
    process.LOCKS.mkdir(parents=True, exist_ok=True)
    with FileLock(process.LOCKS / "mlflow.lock", timeout=120):
        from stages.tracking import mirror

        client = mirror.MlflowClient(uri)
        runs = list(old_runs(client, before))
        size = sum(_artifact_bytes(run) for run in runs)
        print(
            f"runs in MLflow: {len(runs)}, {size / 1e6:.1f} MB, {'deleted' if apply else 'would go'}",
            flush=True,
        )
        if apply and runs:
            delete(client, runs)
            _shrink(database)


def old_runs(client: MlflowClient, before: float) -> Iterator[Run]:
    """Runs of all experiments that ended before `before` (Unix seconds) and that nothing registered holds."""
    from mlflow.entities import ViewType

    held = set(_registered(client))
    for experiment in _pages(client.search_experiments, view_type=ViewType.ALL):
        for run in _pages(client.search_runs, [experiment.experiment_id], run_view_type=ViewType.ALL):
            ended = run.info.end_time
            if ended is not None and ended < before * 1000 and run.info.run_id not in held:
                yield run


def _registered(client: MlflowClient) -> Iterator[str]:
    """Runs that a version of a registered model was made from."""
    for version in _pages(client.search_model_versions):
        if version.run_id:
            yield version.run_id


def _pages(search, *arguments, **filters):
    """All that a paged search of MLflow finds."""
    token = None
    while True:
        page = search(*arguments, **filters, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def delete(client: MlflowClient, runs: list[Run]) -> None:
    """Mark the runs as deleted, then have `mlflow gc` remove them with their artifacts.

    Killed in between, the next call goes on: marked runs are found too. Raises typer.Exit if gc fails.
    """
    for run in runs:
        if run.info.lifecycle_stage == "active":
            client.delete_run(run.info.run_id)
    uri = location.tracking_uri()
    ids = [run.info.run_id for run in runs]
    for start in range(0, len(ids), AT_A_TIME):
        command = [sys.executable, "-m", "mlflow", "gc", "--backend-store-uri", uri]
        command += ["--run-ids", ",".join(ids[start : start + AT_A_TIME])]
        done = subprocess.run(
            command,
            env=os.environ | {"MLFLOW_TRACKING_URI": uri},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"mlflow gc failed: {hidden(done.stderr.strip()[-500:])}", file=sys.stderr)
            raise typer.Exit(1)


def _artifact_bytes(run: Run) -> int:
    """What a run's artifacts occupy, 0 where they do not lie on this machine."""
    parts = urlsplit(run.info.artifact_uri or "")
    folder = Path(unquote(parts.path))
    if parts.scheme not in ("file", "") or not folder.is_dir():
        return 0
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def _shrink(database: Path) -> None:
    """Give the database's free pages back to the disk; not while a server works with it."""
    try:
        connection = sqlite3.connect(database, timeout=5)
        try:
            connection.execute("VACUUM")
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        print(f"{database.name} keeps its size ({error}): stop the MLflow server and clean again")


if __name__ == "__main__":
    typer.run(main)
