"""Locks and deaths, with real processes."""

from __future__ import annotations

import os
import signal

import pytest

from stages.tracking import process
from tests.tracking.conftest import Stage, finish, until

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes and signals of POSIX")

HOLD = """
from stages.tracking import stage_run
with stage_run("transfer", task="vision", method="eugen", params={}) as run:
    run.progress("inside")
    input()
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE, stdin=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
input()
"""


def test_a_second_stage_of_the_cell_says_who_and_waits(start: Stage) -> None:
    first, second = start(HOLD, EUGEN_TRACKING="off"), None
    assert first.stdout is not None and first.stdout.readline() == "inside\n"
    second = start(HOLD, EUGEN_TRACKING="off")
    assert second.stdout is not None
    waits = second.stdout.readline()
    assert f"transfer-vision-eugen is already running (process {first.pid})" in waits and "waiting" in waits
    first.communicate("\n", timeout=60)
    assert second.stdout.readline() == "inside\n"
    second.communicate("\n", timeout=60)
    assert (first.returncode, second.returncode) == (0, 0)


def test_the_lock_of_a_killed_stage_is_free(start: Stage) -> None:
    first = start(HOLD, EUGEN_TRACKING="off")
    assert first.stdout is not None and first.stdout.readline() == "inside\n"
    first.kill()
    first.communicate()
    second = start(HOLD, EUGEN_TRACKING="off")
    assert second.stdout is not None and second.stdout.readline() == "inside\n"
    second.communicate("\n", timeout=60)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="PR_SET_PDEATHSIG is Linux's")
def test_a_stage_dies_with_its_parent(start: Stage) -> None:
    parent = start(PARENT.format(child=HOLD), EUGEN_TRACKING="off")
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert process.create_time(child) is not None
    parent.send_signal(signal.SIGKILL)
    until(lambda: process.create_time(child) is None, "the stage's end", seconds=10)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="PR_SET_PDEATHSIG is Linux's")
def test_an_orphan_does_not_begin(start: Stage) -> None:
    source = """
import os
import sys
if os.fork() == 0:
    from stages.tracking import stage_run
    import time
    parent = os.getppid()
    print("child", flush=True)
    while os.getppid() == parent:
        time.sleep(0.01)
    with stage_run("transfer", task="vision", method="eugen", params={}) as run:
        run.progress("inside")
else:
    import time
    time.sleep(2)
"""
    out, err = finish(start(source, EUGEN_TRACKING="off"))
    assert out == "child\n"
    assert "gone" in err


def test_a_reused_pid_is_not_the_same_process() -> None:
    created = process.create_time(os.getpid())
    assert created is not None
    assert process.is_alive(os.getpid(), created)
    assert not process.is_alive(os.getpid(), created - 60)


def test_a_pipeline_run_is_named_by_the_flow_else_by_the_parent(start: Stage) -> None:
    source = "from stages.tracking import process; print(process.pipeline_run())"
    assert finish(start(source))[0].endswith(f"-{os.getpid()}\n")
    assert finish(start(source, EUGEN_PIPELINE_RUN="night-7"))[0] == "night-7\n"
