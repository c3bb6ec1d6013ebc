"""The commit and its dirty flag, in a real repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from stages.tracking import environment, location

CLEAN = {"stages/a.py": "a", "params.yaml": "p: 1", "dvc.lock": "l", "README.md": "r", "dvc.yaml": "d"}


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in CLEAN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    git("init", "-q")
    git("add", ".")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "one")
    return tmp_path


def test_commit_of_a_clean_tree(repository: Path) -> None:
    now = environment.environment()
    assert now.commit == git("rev-parse", "HEAD") and not now.dirty
    assert now.versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert "torch" in now.versions and now.cores >= 1 and now.memory_gb > 0.1


@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        ("params.yaml", False),
        ("dvc.lock", False),
        ("README.md", False),
        ("reports/records/vision/eugen.json", False),
        ("stages/a.py", True),
        ("stages/new.py", True),
        ("eugen/layers/new.py", True),
        ("dvc.yaml", True),
    ],
)
def test_dirty_means_a_source_file_differs(repository: Path, name: str, dirty: bool) -> None:
    (repository / name).parent.mkdir(parents=True, exist_ok=True)
    (repository / name).write_text("changed")
    assert environment.dirty() == dirty


def test_outside_a_repository_nothing_is_known_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert (environment.commit(), environment.dirty()) == ("unknown", True)


def test_the_fingerprint_is_the_hosts(repository: Path) -> None:
    before = environment.environment().fingerprint
    (repository / "stages/a.py").write_text("changed")
    assert environment.environment().fingerprint == before


def test_the_link_is_of_the_present_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert environment.comparison_link() is None
    location.remember_experiment("7")
    chosen = "compareRunsMode=CHART&searchFilter=tags.stage%20%3D%20%27profile%27"
    assert environment.comparison_link() == f"http://127.0.0.1:5000/#/experiments/7/runs?{chosen}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example/")
    assert environment.comparison_link() is None
    location.remember_experiment("9")
    assert environment.comparison_link() == f"https://tracking.example/#/experiments/9/runs?{chosen}"
