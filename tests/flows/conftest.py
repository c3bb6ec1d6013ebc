"""Projects before and after a run, and a Prefect server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flows.toy import Toy, build, serve


@pytest.fixture(scope="session")
def clean_env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment of its own for Prefect and the pipeline."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "EUGEN_"))
    }
    return inherited | {
        "PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "EUGEN_PIPELINE_RUN": "test-run",
        "TMPDIR": str(tmp_path_factory.mktemp("machine")),  # its locks are of all clones on a machine
    }


@pytest.fixture(scope="session")
def fresh_project(tmp_path_factory: pytest.TempPathFactory, clean_env: dict[str, str]) -> Path:
    """The project before any run."""
    folder = tmp_path_factory.mktemp("fresh")
    build(folder)
    toy = Toy(folder, clean_env)
    for arguments in (["init", "--no-scm", "-q"], ["config", "core.analytics", "false"]):
        assert toy.dvc(*arguments).returncode == 0
    return folder


@pytest.fixture(scope="session")
def finished_project(
    tmp_path_factory: pytest.TempPathFactory, fresh_project: Path, clean_env: dict[str, str]
) -> Path:
    """The project after plain `dvc repro`: what every other way of running it must give."""
    folder = tmp_path_factory.mktemp("finished") / "project"
    shutil.copytree(fresh_project, folder)
    finished = Toy(folder, clean_env).dvc("repro", "-q")
    assert finished.returncode == 0, finished.stderr
    return folder


def _toy(source: Path, target: Path, env: dict[str, str]) -> Toy:
    shutil.copytree(source, target)
    (target / "calls.log").unlink(missing_ok=True)
    return Toy(target, env)


@pytest.fixture
def fresh(fresh_project: Path, tmp_path: Path, clean_env: dict[str, str]) -> Toy:
    """A project before any run."""
    return _toy(fresh_project, tmp_path / "fresh", clean_env)


@pytest.fixture
def finished(finished_project: Path, tmp_path: Path, clean_env: dict[str, str]) -> Toy:
    """A project in which everything is up to date."""
    return _toy(finished_project, tmp_path / "finished", clean_env)


@pytest.fixture(scope="session")
def prefect_server(
    tmp_path_factory: pytest.TempPathFactory, clean_env: dict[str, str]
) -> Iterator[dict[str, str]]:
    """The environment that leads to a real Prefect server on this machine, which asks for a password."""
    with serve(tmp_path_factory.mktemp("server") / "log", clean_env) as variables:
        yield variables
