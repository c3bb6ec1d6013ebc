"""Old runs of a real MLflow database, with their artifacts."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from tests.tracking.conftest import environment

pytestmark = pytest.mark.slow
DAY = 86400


def clean(folder: Path, *arguments: str, **extra: str) -> str:
    words = [
        sys.executable,
        "-m",
        "stages.tracking.clean",
        "--before",
        str(time.time() - 30 * DAY),
        *arguments,
    ]
    done = subprocess.run(words, cwd=folder, env=environment(**extra), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_old_runs_go_with_their_artifacts_and_what_is_held_stays(tmp_path: Path):
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.create_experiment("eugen", (tmp_path / "mlartifacts").as_uri())
    (tmp_path / "weights.bin").write_bytes(bytes(500_000))
    runs: dict[str, str] = {}
    for name, days in {"old": 60, "marked": 60, "registered": 60, "running": 60, "young": 1}.items():
        then = int((time.time() - days * DAY) * 1000)
        run = client.create_run(experiment, then, run_name=name)
        runs[name] = run.info.run_id
        client.log_metric(run.info.run_id, "quality", 0.5)
        client.log_artifact(run.info.run_id, str(tmp_path / "weights.bin"))
        if name != "running":
            client.set_terminated(run.info.run_id, "FINISHED", then + 1000)
    client.delete_run(runs["marked"])
    client.create_registered_model("eugen")
    client.create_model_version("eugen", "file:///nowhere", runs["registered"])
    assert "runs in MLflow: 2, 1.0 MB, would go" in clean(tmp_path)
    assert len(client.search_runs([experiment], run_view_type=ViewType.ALL)) == len(runs)
    before = (tmp_path / "mlflow.db").stat().st_size
    assert "runs in MLflow: 2, 1.0 MB, deleted" in clean(tmp_path, "--apply")
    left = client.search_runs([experiment], run_view_type=ViewType.ALL)
    assert {run.info.run_id for run in left} == {runs["registered"], runs["running"], runs["young"]}
    kept = {path.parents[1].name for path in (tmp_path / "mlartifacts").rglob("weights.bin")}
    assert kept == {run.info.run_id for run in left}
    assert (tmp_path / "mlflow.db").stat().st_size <= before
    said = clean(tmp_path, "--apply", MLFLOW_TRACKING_URI="http://me:planted-word@127.0.0.1:9")
    assert "mlflow gc" in said and "planted-word" not in said
