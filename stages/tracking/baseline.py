"""Commits that regressions are measured against, by name: aliases of MLflow's registered model `eugen`.

`python -m stages.tracking.baseline set REF [--alias baseline]` and `… get ALIAS`. A version of the model holds
no weights: it is one commit, in its source `git:<commit>` and its tag `git_commit`. A version that somebody
registered from a run counts too, by the run's tag `git_commit`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

import typer

from stages.tracking import location

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

MODEL = "eugen"
NOT_SET = 3
"""Exit code of `get` for an alias that nobody has set."""
_ALIAS = re.compile(r"[A-Za-z0-9_-]{1,200}")
_NUMBER = re.compile(r"v\d+", re.IGNORECASE)  # MLflow keeps these for itself
app = typer.Typer(help=__doc__, add_completion=False, pretty_exceptions_enable=False)


def commit_of(ref: str) -> str:
    """The full id of the commit that `ref` names. Raises ValueError if it names none."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise ValueError(f"{ref!r} names no commit of this repository; `git log` shows those there are")
    return found.stdout.strip()


def assign(client: MlflowClient, alias: str, ref: str) -> str:
    """Point `alias` at the commit of `ref`, which is registered if need be; returns the commit."""
    from mlflow.exceptions import MlflowException

    commit = commit_of(ref)
    try:
        client.create_registered_model(MODEL, description="Commits to compare with; see make baseline")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    known = client.search_model_versions(f"name = '{MODEL}' and tags.git_commit = '{commit}'")
    tags = {"git_commit": commit, "git_ref": ref}
    version = known[0] if known else client.create_model_version(MODEL, f"git:{commit}", tags=tags)
    client.set_registered_model_alias(MODEL, alias, version.version)
    return commit


def resolve(client: MlflowClient, alias: str) -> str | None:
    """The commit that `alias` points at, None if there is no such alias.

    Raises ValueError if its version names no commit.
    """
    from mlflow.exceptions import MlflowException

    try:
        version = client.get_model_version_by_alias(MODEL, alias)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST" or "not found" in str(error):
            return None
        raise
    commit = _tagged(client, version)
    if not re.fullmatch(r"[0-9a-f]{40}", commit):
        cure = f"point it at a commit with `make baseline REF=<git ref> ALIAS={alias}`"
        raise ValueError(f"@{alias}: version {version.version} of {MODEL!r} has no tag git_commit; {cure}")
    return commit


def _tagged(client: MlflowClient, version: ModelVersion) -> str:
    if "git_commit" in version.tags or not version.run_id:
        return version.tags.get("git_commit", "")
    return client.get_run(version.run_id).data.tags.get("git_commit", "")


def _checked(alias: str) -> str:
    """The alias without its `@`. Raises ValueError for one that MLflow would refuse."""
    bare = alias.removeprefix("@")
    if not _ALIAS.fullmatch(bare) or _NUMBER.fullmatch(bare) or bare == "latest":
        raise ValueError(
            f"alias {alias!r}: use letters, digits, _ and -, and neither a version's number nor `latest`"
        )
    return bare


@contextmanager
def _faults_are_said() -> Iterator[None]:
    """Standard output is for the answer, one line on the error stream for what went wrong."""
    from stages.tracking.recorder import reason

    try:
        with redirect_stdout(sys.stderr):  # MLflow prints there
            yield
    except typer.Exit:
        raise
    except ValueError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    except Exception as error:
        print(f"MLflow at {location.tracking_uri()}: {reason(error)}", file=sys.stderr)
        raise typer.Exit(1) from None


@app.command("get")
def get_command(alias: str) -> None:
    """Print the commit of an alias. Exit codes: 0, 3 if it is not set, 2 wrong name, 1 MLflow out of reach."""
    with _faults_are_said():
        name, database, commit = _checked(alias), location.database(), None
        if database is None or database.exists():
            from stages.tracking import mirror

            commit = resolve(mirror.MlflowClient(location.tracking_uri()), name)
    if commit is None:
        cure = f"set it with `make baseline REF=<git ref> ALIAS={name}`"
        print(f"@{name} is not set at {location.tracking_uri()}: {cure}", file=sys.stderr)
        raise typer.Exit(NOT_SET)
    print(commit)


@app.command("set")
def set_command(ref: str, alias: str = "baseline") -> None:
    """Point an alias at the commit of a git ref."""
    with _faults_are_said():
        name = _checked(alias)
        commit_of(ref)  # before MLflow's seconds
        from stages.tracking import mirror

        commit = assign(mirror.Mirror().client, name, ref)
    print(f"@{name} is {commit}")


if __name__ == "__main__":
    app()
