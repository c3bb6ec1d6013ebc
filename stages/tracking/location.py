"""Where the runs are kept: database, artifacts, experiment, and the address a person opens."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from pathlib import Path
from urllib.parse import quote

from stages.tracking.redaction import MARK, hidden
from stages.tracking.whole_file import write_json

EXPERIMENT = "eugen"
UI_HOST, UI_PORT = "127.0.0.1", 5000
_MEMORY = Path(".work/experiment.json")
_COMPARED = "tags.stage = 'profile'"
"""The profile stage has one run per (task, method) with every final number: dense beside the rest."""


def default_uri() -> str:
    """The project's own database."""
    return f"sqlite:///{Path('mlflow.db').resolve()}"


def database() -> Path | None:
    """The file of the database in use, None if that is no SQLite file."""
    kind, _, path = tracking_uri().partition("sqlite:///")
    return Path(path.partition("?")[0]) if kind == "" and path else None


def artifact_folder() -> Path:
    """The project's own artifact folder."""
    return Path("mlartifacts").resolve()


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, else the project's own database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or default_uri()


def is_server(uri: str) -> bool:
    """True if `uri` is an MLflow server, False for a database."""
    return uri.startswith(("http://", "https://"))


def artifact_location() -> str | None:
    """Where a new experiment puts its artifacts; None leaves that to the server."""
    return None if is_server(tracking_uri()) else artifact_folder().as_uri()


def checkout() -> str:
    """This machine and folder, as a short hash: whose runs a rerun may declare dead."""
    return hashlib.sha256(f"{socket.gethostname()}:{Path.cwd()}".encode()).hexdigest()[:12]


def remember_experiment(experiment_id: str) -> None:
    """Note the experiment's id, so that a link costs no import of MLflow."""
    memory = {"uri": hidden(tracking_uri()), "experiment_id": experiment_id}
    if _recall() != memory:
        write_json(_MEMORY, memory)


def _recall() -> dict[str, str]:
    try:
        return json.loads(_MEMORY.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def comparison_link(base: str | None = None, task: str | None = None) -> str | None:
    """Address of the chart view of all `profile` runs, dense and the rest side by side.

    `base` defaults to the tracking server, or to where `python -m stages.tracking.ui` listens.
    `task` leaves the others out: MLflow draws ten runs at a time.
    None if nothing was tracked yet at the present MLFLOW_TRACKING_URI.
    """
    uri, memory = hidden(tracking_uri()), _recall()
    if memory.get("uri") != uri:
        return None
    base = base or (uri.replace(f"{MARK}@", "") if is_server(uri) else f"http://{UI_HOST}:{UI_PORT}")
    chosen = _COMPARED if task is None else f"{_COMPARED} and tags.task = '{task}'"
    query = f"compareRunsMode=CHART&searchFilter={quote(chosen, safe='')}"
    return f"{base.rstrip('/')}/#/experiments/{memory['experiment_id']}/runs?{query}"
