"""The clone's own Prefect server: it ends with its run, however that ends, and the next run meets none."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.flows.toy import Toy, gone, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def states(home: Path, table: str) -> Counter[str]:
    """How many runs the database of a Prefect server has in each state."""
    with closing(sqlite3.connect(f"file:{home / 'prefect.db'}?mode=ro", uri=True)) as database:
        return Counter(state for (state,) in database.execute(f"select state_type from {table}"))


def servers(pid: int) -> list[int]:
    """The Prefect servers that a run has started."""
    children = psutil.Process(pid).children(recursive=True)
    servers = {"flows.prefect.server_child", "uvicorn"}
    return [child.pid for child in children if servers & set(child.cmdline())]


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_second_run_waits_for_the_first_and_goes_on_when_that_is_stopped(
    finished: Toy, tmp_path: Path, stop: signal.Signals
):
    """As in a terminal, the signal reaches the whole group of the first run."""
    home = {"PREFECT_HOME": str(tmp_path / "home")}
    with (finished.folder / "stages" / "report.py").open("a") as source:
        source.write("# changed\n")
    finished.behave(report={"hang": True})
    first = finished.start(**home)
    started = [first]
    try:
        pids = finished.hanging(240)  # a new database takes its time
        served = servers(first.pid)
        assert len(served) == 1, "one server, or this test sees none"
        second = finished.start(**home)
        started.append(second)
        assert second.stdout is not None
        waits = second.stdout.readline()
        assert "another benchmark holds this clone" in waits and f"process {first.pid}" in waits
        finished.behave()
        os.killpg(first.pid, stop)
        said, _ = first.communicate(timeout=60)
        assert "Traceback" not in said
        wait_for(lambda: all(gone(pid) for pid in [*pids, *served]), "end of the stages and the server", 20)
        output, _ = second.communicate(timeout=240)
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert second.returncode == 0, output
    assert ("was killed" in output and "now Crashed" in output) == (stop == signal.SIGKILL), output
    assert states(tmp_path / "home", "flow_run") == {"CRASHED": 1, "COMPLETED": 1}
    assert not {"RUNNING", "PENDING"} & states(tmp_path / "home", "task_run").keys()
