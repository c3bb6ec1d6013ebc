"""Prefect's runs of this clone that a kill left alive in its books."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path
from uuid import UUID

import psutil
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows.clone import killed_mark
from flows.dvc.repair import Say
from flows.machine.process import lives

_ALIVE = {"type": {"any_": [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]}}


def own_tags(project: Path) -> tuple[str, str]:
    """The tags of a flow run: this folder on this machine, and this process."""
    place = hashlib.sha256(f"{socket.gethostname()}:{project}".encode()).hexdigest()[:12]
    return f"clone:{place}", f"process:{os.getpid()}-{psutil.Process().create_time():.0f}"


def tag(project: Path) -> None:
    """Tag the present flow run, if it is one, before it waits for anything: a kill is then noticed later."""
    if (own := flow_run.id) is not None:
        with get_client(sync_client=True) as client:
            present = client.read_flow_run(UUID(own))
            client.update_flow_run(present.id, tags=sorted({*present.tags, *own_tags(project)}))


def close_killed(project: Path, say: Say) -> None:
    """Set flow runs of this clone to Crashed that are not over though their process is gone."""
    if (own := flow_run.id) is None:
        return
    with get_client(sync_client=True) as client:
        wanted = FlowRunFilter.model_validate(
            {"tags": {"all_": [own_tags(project)[0]]}, "state": _ALIVE, "id": {"not_any_": [own]}}
        )
        for other in client.read_flow_runs(flow_run_filter=wanted):
            if not any(_lives(label) for label in other.tags):
                _crash(client, other.id)
                left = f"Prefect's flow run {other.name} of a killed process was left {other.state_name}"
                say(f"{left}: now Crashed")
    killed_mark(project).unlink(missing_ok=True)


def _lives(label: str) -> bool:
    """Whether a tag names a process that still runs; a later one with the same id has another start."""
    kind, _, named = label.partition(":")
    number, _, started = named.partition("-")
    if kind != "process" or not number.isdigit():
        return False
    try:
        return lives(int(number), float(started))
    except ValueError:
        return False


def _crash(client: SyncPrefectClient, run: UUID) -> None:
    """Set a flow run and its task runs that are not over to Crashed."""
    state = Crashed(message="Its process was killed; found by the next run of the clone.")
    tasks = TaskRunFilter.model_validate({"flow_run_id": {"any_": [run]}, "state": _ALIVE})
    for task in client.read_task_runs(task_run_filter=tasks):
        client.set_task_run_state(task.id, state, force=True)
    client.set_flow_run_state(run, state, force=True)
