"""Prefect's runs of this clone that a kill left alive in its books."""

from __future__ import annotations

import hashlib
import socket
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, TaskRunFilter
from prefect.client.schemas.objects import StateType
from prefect.runtime import flow_run
from prefect.states import Crashed

from flows.dvc.repair import Say

_ALIVE = {"type": {"any_": [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]}}


def clone_tag(project: Path) -> str:
    """The tag of all flow runs of this folder on this machine."""
    return f"clone:{hashlib.sha256(f'{socket.gethostname()}:{project}'.encode()).hexdigest()[:12]}"


def close_killed(project: Path, say: Say) -> None:
    """Tag this flow run with its clone, and set others of the clone that are not over to Crashed.

    Called while the clone is held: no other run of it is at work, so what Prefect takes for running was
    killed before it could say so. Outside a flow run nothing happens.
    """
    if (own := flow_run.id) is None:
        return
    tag = clone_tag(project)
    with get_client(sync_client=True) as client:
        present = client.read_flow_run(UUID(own))
        if tag not in present.tags:
            client.update_flow_run(present.id, tags=[*present.tags, tag])
        wanted = FlowRunFilter.model_validate({"tags": {"all_": [tag]}, "state": _ALIVE})
        for other in client.read_flow_runs(flow_run_filter=wanted):
            if other.id != present.id and other.flow_id == present.flow_id:
                _crash(client, other.id)
                left = f"Prefect's flow run {other.name} of a killed process was left {other.state_name}"
                say(f"{left}: now Crashed")


def _crash(client: SyncPrefectClient, run: UUID) -> None:
    """Set a flow run and its task runs that are not over to Crashed."""
    state = Crashed(message="Its process was killed; found by the next run of the clone.")
    tasks = TaskRunFilter.model_validate({"flow_run_id": {"any_": [run]}, "state": _ALIVE})
    for task in client.read_task_runs(task_run_filter=tasks):
        client.set_task_run_state(task.id, state, force=True)
    client.set_flow_run_state(run, state, force=True)
