"""Signs of life of a flow run that a worker has started, and its end when the worker ends.

A worker that is killed leaves its flow runs behind, and a flow run that is killed stays RUNNING on the
server. So a deployed run ends with its worker, and writes a beat into its own labels for whoever waits for
it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from uuid import UUID

BEAT_S = 5.0
"""How often a run writes its beat."""
SILENT_S = 45.0
"""A run without a new beat for so long is dead."""
BEAT = "eugen.beat"
"""The label that holds the time of the last beat."""


@contextmanager
def signs_of_life() -> Iterator[None]:
    """Within a deployed flow run: beat every `BEAT_S`, and die with the worker."""
    from prefect.runtime import deployment, flow_run

    if not flow_run.id or not deployment.id:
        yield
        return
    over = threading.Event()
    for work, about in ((_die_with, os.getppid()), (_beat, UUID(flow_run.id))):
        threading.Thread(target=work, args=(about, over), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _die_with(parent: int, over: threading.Event) -> None:
    """Kill this process when its parent has changed; its children end with it."""
    while not over.wait(0.5):
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


def _beat(flow_run_id: UUID, over: threading.Event) -> None:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        while not over.is_set():
            with suppress(Exception):  # a server that is away for a while ends no run
                client.update_flow_run_labels(flow_run_id, {BEAT: time.time()})
            over.wait(BEAT_S)
