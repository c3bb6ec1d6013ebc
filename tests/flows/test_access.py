"""Who may use the Prefect server: other machines only where it asks for a password."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from flows.operate import access
from flows.operate.access import OpenToTheNetwork
from tests.flows.toy import Toy

NAMES = ("PREFECT_SERVER_API_AUTH_STRING", "PREFECT_API_AUTH_STRING")


@pytest.fixture(autouse=True)
def no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "[::1]"])
def test_this_machine_needs_no_password(host: str):
    assert access.server_environment(host) == {}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org", ""])
def test_another_address_without_a_password_is_refused(host: str):
    with pytest.raises(OpenToTheNetwork, match="PREFECT_API_AUTH_STRING"):
        access.server_environment(host)


@pytest.mark.parametrize("name", NAMES)
def test_the_server_takes_the_password_of_its_clients(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setenv(name, "name:password")
    assert access.server_environment("0.0.0.0") == {NAMES[0]: "name:password"}


def test_a_request_without_the_password_is_refused(prefect_server: dict[str, str]):
    url = f"{prefect_server['PREFECT_API_URL']}/flow_runs/filter"
    name, _, password = prefect_server["PREFECT_API_AUTH_STRING"].partition(":")
    assert httpx.post(url, json={}).status_code == 401
    assert httpx.post(url, json={}, auth=(name, "wrong")).status_code == 401
    assert httpx.post(url, json={}, auth=(name, password)).status_code == 200


def test_a_flow_without_the_password_runs_nothing(finished: Toy, prefect_server: dict[str, str]):
    """The flows of test_benchmark.py run with it."""
    with (finished.folder / "stages/report.py").open("a") as file:
        file.write("# changed\n")
    code, said = finished.bench(PREFECT_API_URL=prefect_server["PREFECT_API_URL"])
    assert code != 0 and "401" in said and not finished.calls(), said


def test_no_planted_password_is_in_anything_that_a_flow_leaves(
    finished: Toy, prefect_server: dict[str, str], clean_env: dict[str, str]
):
    """A cell fails, so that errors are told and kept: by the flow, by DVC and by Prefect's server."""
    planted = {"MLFLOW_TRACKING_PASSWORD": "planted-mlflow-1", "AWS_SECRET_ACCESS_KEY": "planted-aws-2"}
    planted |= {"MLFLOW_TRACKING_URI": "http://somebody:planted-url-3@127.0.0.1:9"}
    finished.dvc("remote", "add", "--local", "-d", "other", "http://me:planted-dvc-4@127.0.0.1:9/x")
    config = finished.folder / ".dvc/config.local"
    stage = "transfer@vision-eugen"
    finished.behave(**{stage: {"fail": "loss is NaN", "code": 2}})
    with (finished.folder / "stages/transfer.py").open("a") as file:
        file.write("# changed\n")
    code, said = finished.bench(**prefect_server, **planted)
    assert code == 1 and "loss is NaN" in said, said
    _, password = prefect_server["PREFECT_API_AUTH_STRING"].split(":")
    words = ["planted-mlflow-1", "planted-aws-2", "planted-url-3", "planted-dvc-4", password]
    assert [word for word in words if word in said] == []
    kept = [*finished.folder.rglob("*"), *Path(clean_env["PREFECT_HOME"]).rglob("*")]
    files = [path for path in kept if path.is_file() and path != config]
    assert any(path.name == "prefect.db" for path in files)
    assert any(b"loss is NaN" in path.read_bytes() for path in files if path.name.startswith("prefect.db"))
    assert [(path, word) for path in files for word in words if word.encode() in path.read_bytes()] == []
