"""Planted passwords: whatever a stage prints, keeps or sends, none of them is in it."""

from __future__ import annotations

import json
import logging
import socket
from pathlib import Path

import pytest

from stages.tracking import location, redaction
from tests.tracking.conftest import Stage

PLANTED = {
    "MLFLOW_TRACKING_PASSWORD": "planted-mlflow-1",
    "PREFECT_API_AUTH_STRING": "operator:planted-prefect-2",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+3=",
    "GITHUB_TOKEN": "planted-token-4",
}
WORDS = ["planted-mlflow-1", "planted-prefect-2", "planted/aws+3=", "planted-token-4", "planted-url-5"]

FAILING = """
import os
from pathlib import Path
from stages.tracking import stage_run
secrets = [os.environ[name] for name in NAMES]
params = {"seeds": [0], "mirror": os.environ["MLFLOW_TRACKING_URI"], "extra": {"keys": secrets}}
with stage_run("transfer", task="vision", method="dense", params=params) as run:
    run.metrics({"quality": 0.5})
    run.tag("note", f"from {os.environ['MLFLOW_TRACKING_URI']} with {secrets}")
    run.progress(f"reading {os.environ['MLFLOW_TRACKING_URI']} {secrets[2]}")
    raise ConnectionError(f"{os.environ['MLFLOW_TRACKING_URI']} refused {' '.join(secrets)}")
""".replace("NAMES", str(list(PLANTED)))
PLAIN = """
from stages.tracking import stage_run
with stage_run("baseline", task="vision", params={"seeds": [0]}):
    pass
"""


def leaks(folder: Path) -> dict[str, list[str]]:
    """Files below `folder` that hold a planted word, as it is or as JSON or a URL writes it."""
    forms = [word.encode() for word in WORDS] + [b"planted%2Faws"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = {str(path): [str(form) for form in forms if form in path.read_bytes()] for path in files}
    return {path: words for path, words in found.items() if words}


@pytest.mark.slow
def test_no_planted_password_leaves_a_stage_that_fails(tmp_path: Path, start: Stage):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dead = f"http://somebody:planted-url-5@127.0.0.1:{probe.getsockname()[1]}"
        process = start(FAILING, MLFLOW_TRACKING_URI=dead, **PLANTED)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "ConnectionError" in err and "unreachable" in err and "reading http://" in out
    said = out + err
    assert not [word for word in WORDS if word in said], said
    journal = next((tmp_path / ".work/outbox").iterdir())
    assert "transfer" in (journal / "start.json").read_text() and not leaks(tmp_path)

    process = start(PLAIN, **PLANTED)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert not list((tmp_path / ".work/outbox").iterdir()), "both runs are in MLflow's database now"
    failure = json.loads(next((tmp_path / "mlartifacts").rglob("failure/*.json")).read_text())
    assert redaction.MARK in failure["error"] and redaction.MARK in failure["traceback"]
    assert b"ConnectionError" in (tmp_path / "mlflow.db").read_bytes() and not leaks(tmp_path)


def test_the_link_and_the_memory_of_a_server_hold_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://somebody:planted-url-5@mlflow.example.org:8443/base")
    location.remember_experiment("7")
    link = location.comparison_link()
    assert link is not None and link.startswith("https://mlflow.example.org:8443/base/#/experiments/7/")
    assert not leaks(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example.org:8443/other")
    assert location.comparison_link() is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://u:p%40w@host/db?x=1", "postgresql+psycopg://[hidden]@host/db?x=1"),
        ("at 'https://token@host', 'ftp://a:b@c'", "at 'https://[hidden]@host', 'ftp://[hidden]@c'"),
        ("http://u:p@ss@host/a@b", "http://[hidden]@host/a@b"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("https://host/a?mail=me@host", "https://host/a?mail=me@host"),
        ("write to me@host", "write to me@host"),
    ],
)
def test_only_the_passwords_of_addresses_are_hidden(text: str, shown: str):
    assert redaction.hidden(text) == shown


def test_which_variables_are_secret(monkeypatch: pytest.MonkeyPatch):
    for name in list(redaction.os.environ):
        if redaction._SECRET_NAME.search(name):
            monkeypatch.delenv(name)
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/token")
    monkeypatch.setenv("KEYBOARD", "qwertz-layout")
    monkeypatch.setenv("DB_PASSWORD", "no")
    assert set(redaction.secrets()) == {*PLANTED.values(), "planted-prefect-2"}
    nested = redaction.hidden_in({"planted-token-4": [1.5, None, ("planted-mlflow-1", True)]})
    assert nested == {"[hidden]": [1.5, None, ["[hidden]", True]]}


def test_a_logged_traceback_is_hidden(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("GITHUB_TOKEN", "planted-token-4")
    try:
        raise ValueError("planted-token-4")
    except ValueError as error:
        record = logging.LogRecord(
            "x", 40, "", 0, "at %s", ("http://a:planted-url-5@b",), (type(error), error, None)
        )
    text = redaction.HidingFormatter("%(message)s").format(record)
    assert text.startswith("at http://[hidden]@b") and text.endswith("ValueError: [hidden]")
