"""Regressions in MLflow's own database: the run of a record, the outbox, and the aliases of commits."""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from stages.tracking import baseline, mirror
from stages.tracking.regression_record import RecordFault, read, read_all
from tests.regressions import BASE, CANDIDATE, case, record
from tests.tracking.conftest import environment


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database: creating one takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        mirror.Mirror()
    return folder / "mlflow.db"


@pytest.fixture
def project(store: Path, tmp_path: Path) -> Path:
    """A repository of two commits, with a database of its own."""
    shutil.copy(store, tmp_path / "mlflow.db")
    git(tmp_path, "init", "-q")
    for number in range(2):
        (tmp_path / "file").write_text(str(number))
        git(tmp_path, "add", "file")
        git(tmp_path, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-q", "-m", str(number))
    git(tmp_path, "tag", "v0.1", "HEAD~1")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, text=True, capture_output=True, check=True)
    return done.stdout.strip()


def call(folder: Path, module: str, *arguments: str, **env: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", f"stages.tracking.{module}", *arguments],
        cwd=folder,
        env=environment(**env),
        text=True,
        capture_output=True,
        timeout=120,
    )
    return done.returncode, done.stdout.strip(), done.stderr


def runs(folder: Path) -> list[Run]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.get_experiment_by_name("eugen")
    assert found is not None
    return list(client.search_runs([found.experiment_id], "tags.stage = 'regression'"))


def left(folder: Path, content: object, name: str = "r.json") -> str:
    path = folder / "results" / "regressions" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path.relative_to(folder).as_posix()


@pytest.mark.slow
def test_a_record_becomes_one_run_also_later(project: Path):
    slow = case("odd|name <1>", 1.1, "fail")
    nothing = case("not timed", latency=None, control=None, quality=None)
    path = left(project, record(slow, nothing, verdict="fail", reason="odd|name is slower", injected=0.25))
    nobody = "http://127.0.0.1:9"  # the port that the rules leave unused
    code, _, complaint = call(project, "regression", path, MLFLOW_TRACKING_URI=nobody)
    assert code == 0 and "kept in .work/outbox" in complaint
    assert not runs(project) and len(list((project / ".work/outbox").iterdir())) == 1
    (project / path).unlink()  # the outbox holds what it needs
    path = left(project, record(time="2026-01-03T03:04:05Z"), "second.json")
    code, _, complaint = call(project, "regression", path)
    assert code == 0 and complaint == "" and not list((project / ".work/outbox").iterdir())

    later, first = sorted(runs(project), key=lambda run: run.data.tags["verdict"], reverse=True)
    assert (first.data.tags["verdict"], later.data.tags["verdict"]) == ("fail", "pass")
    check_tags(first)
    metrics = first.data.metrics
    assert metrics["odd_name _1_/ratio"] == 1.1 and metrics["odd_name _1_/pairs"] == 300
    assert metrics["odd_name _1_/macs_difference"] == 0 and not any("not timed/r" in m for m in metrics)
    check_samples(project, first, slow["latency"]["log_ratios"])


def check_tags(run: Run) -> None:
    expected = {"git_commit": CANDIDATE, "base_commit": BASE, "base": "v0.1", "host": "abcdef012345"}
    expected |= {"injected": "0.25", "verdict.not timed": "pass", "measured": "2026-01-02T03:04:05+00:00"}
    assert expected.items() <= run.data.tags.items()
    assert run.info.status == "FINISHED"


def check_samples(project: Path, run: Run, samples: list[float]) -> None:
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    folder = Path(client.download_artifacts(run.info.run_id, "regression", str(project)))
    with (folder / "log_ratios.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["log_ratio"]) for row in rows] == samples
    assert {row["case"] for row in rows} == {"odd|name <1>"}
    assert read(folder / "r.json").injected == 0.25


def test_what_is_no_record_is_refused_with_its_name(project: Path):
    path = left(project, record(verdict="splendid"))
    code, _, complaint = call(project, "regression", path, EUGEN_TRACKING="off")
    assert code == 2 and path in complaint and "verdict" in complaint and "Traceback" not in complaint


@pytest.mark.parametrize(
    "broken",
    [
        "{",
        "[]",
        record(schema=2),
        record(
            case(latency={"pairs": 3, "ratio": -1.0, "low": 1, "high": 1, "base_ms": 1, "candidate_ms": 1})
        ),
        record(base={"ref": "x", "commit": "--upload-pack=evil"}),
        record(time="yesterday"),
        record(seconds=math.inf),
    ],
)
def test_a_broken_file_is_named_and_stops_no_other(tmp_path: Path, broken: object):
    left(tmp_path, broken, "broken.json")
    left(tmp_path, record() | {"added later": 1}, "good.json")
    left(tmp_path, record(time="2026-02-02T03:04:05+02:00"), "newer.json")
    records, (fault,) = read_all(tmp_path / "results" / "regressions")
    assert [found.time.month for found in records] == [2, 1], "newest first"
    assert "broken.json" in fault and "delete it" in fault


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path: Path):
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(RecordFault, match="folder.json: cannot be read"):
        read(tmp_path / "folder.json")


@pytest.mark.slow
def test_an_alias_set_by_the_command_is_got_by_it(project: Path):
    code, out, complaint = call(project, "baseline", "get", "@baseline")
    assert (code, out) == (3, "") and "make baseline REF=" in complaint
    assert call(project, "baseline", "set", "v0.1")[0] == 0
    assert call(project, "baseline", "get", "@baseline")[:2] == (0, git(project, "rev-parse", "v0.1"))


def test_an_alias_moves_and_a_commit_is_registered_once(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(project)
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    first, second = git(project, "rev-parse", "v0.1"), git(project, "rev-parse", "HEAD")
    assert baseline.resolve(client, "baseline") is None, "no such model"
    assert baseline.assign(client, "baseline", "v0.1") == first == baseline.resolve(client, "baseline")
    assert baseline.resolve(client, "release") is None, "no such alias"
    baseline.assign(client, "release", "HEAD")
    baseline.assign(client, "baseline", "HEAD")
    assert baseline.resolve(client, "baseline") == second
    versions = client.search_model_versions("name = 'eugen'")
    tagged = sorted((v.tags["git_commit"], v.tags["git_ref"], v.source) for v in versions)
    assert tagged == sorted([(first, "v0.1", f"git:{first}"), (second, "HEAD", f"git:{second}")])


def test_a_version_of_a_run_counts_by_the_runs_commit_and_one_without_is_said(project: Path):
    client = MlflowClient(f"sqlite:///{project}/mlflow.db")
    run = client.create_run("1", tags={"git_commit": BASE})
    client.create_registered_model("eugen")
    for alias, source in (("trained", run.info.run_id), ("bare", None)):
        version = client.create_model_version("eugen", "s3://somewhere/else", run_id=source)
        client.set_registered_model_alias("eugen", alias, str(version.version))
    assert baseline.resolve(client, "trained") == BASE
    with pytest.raises(ValueError, match="no tag git_commit.*make baseline"):
        baseline.resolve(client, "bare")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["set", "no-such-ref"], "no-such-ref"),
        (["set", "--", "--all"], "--all"),
        (["set", "HEAD", "--alias", "a b"], "'a b'"),
        (["get", "v3"], "'v3'"),
    ],
)
def test_wrong_names_are_refused_before_mlflow(tmp_path: Path, arguments: list[str], named: str):
    git(tmp_path, "init", "-q")
    code, out, complaint = call(tmp_path, "baseline", *arguments)
    assert (code, out) == (2, "") and named in complaint and "Traceback" not in complaint
    assert [path.name for path in tmp_path.iterdir()] == [".git"], "a look creates no database"
