"""Slots of GPUs and of the CPU, between processes as between clones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flows.machine import devices
from tests.flows.toy import ROOT, wait_for

HOLD = """
import sys, time
from flows.machine import devices
with devices.slot(devices.Needs(sys.argv[1]), sys.argv[2], print) as variables:
    print("held", variables.get("CUDA_VISIBLE_DEVICES"), flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary folder, two GPUs and no server of its own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def hold(device: str, stage: str) -> tuple[subprocess.Popen[str], str]:
    """Another process in a slot, and what it said last before it got it."""
    command = [sys.executable, "-c", HOLD, device, stage]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    return process, line.strip()


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


def test_each_gpu_has_one_slot_and_a_kill_frees_it():
    first, line = hold("cuda", "transfer@vision-eugen")
    second, other = hold("cuda", "transfer@vision-dense")
    assert (line, other) == ("held 4", "held 7")
    said: list[str] = []
    got: list[str] = []

    def third() -> None:
        with devices.slot(devices.Needs("cuda"), "baseline@vision", said.append) as variables:
            got.append(variables["CUDA_VISIBLE_DEVICES"])

    thread = threading.Thread(target=third)
    thread.start()
    wait_for(lambda: said, "word that it waits", 10)
    assert said == ["baseline@vision  waits for a GPU: 4, 7 in use"] and not got
    killed = time.monotonic()
    kill(second)
    thread.join(10)
    assert got == ["7"] and time.monotonic() - killed < 5
    kill(first)


def test_a_named_gpu_is_held_but_all_stay_visible():
    process, line = hold("cuda:7", "profile@vision-eugen")
    assert line == "held None"
    with devices.slot(devices.Needs("cuda"), "transfer@vision-eugen", print) as variables:
        assert variables == {"CUDA_VISIBLE_DEVICES": "4"}
    kill(process)


def test_stages_without_need_of_a_gpu_never_wait_for_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4")
    process, _ = hold("cuda", "transfer@vision-eugen")
    for stage in ("prepare@vision", "report"):
        with devices.slot(devices.Needs("cuda"), stage, pytest.fail) as variables:
            assert variables == {}
    kill(process)


def test_without_a_gpu_the_stage_itself_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with devices.slot(devices.Needs("cuda"), "transfer@vision-eugen", pytest.fail) as variables:
        assert variables == {}


def test_timings_wait_until_nothing_runs_and_keep_newcomers_out():
    beside, line = hold("cpu", "transfer@vision-eugen")
    assert line == "held None"
    with devices.slot(devices.Needs("cpu"), "transfer@vision-dense", pytest.fail):
        pass  # stages that are not timed share the machine
    said: list[str] = []
    order: list[str] = []

    def run(stage: str) -> None:
        with devices.slot(devices.Needs("cpu"), stage, said.append):
            order.append(stage)
            time.sleep(0.3)

    threads = [
        threading.Thread(target=run, args=(stage,)) for stage in ("profile@vision-eugen", "finetune@vision-x")
    ]
    threads[0].start()
    wait_for(lambda: len(said) == 1, "word that the timing waits", 10)
    threads[1].start()
    wait_for(lambda: len(said) == 2, "word that the newcomer waits", 10)
    assert order == []
    kill(beside)
    for thread in threads:
        thread.join(10)
    assert order == ["profile@vision-eugen", "finetune@vision-x"], "the timing came first"


def test_a_transfer_that_aims_at_a_time_waits_as_a_timing_does():
    beside, line = hold("cpu", "transfer@vision-eugen")
    assert line == "held None"
    needs = devices.Needs("cpu", frozenset({"transfer@vision-auto_time"}))
    said: list[str] = []

    def run() -> None:
        with devices.slot(needs, "transfer@vision-auto_time", said.append):
            said.append("held")

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: said, "word that it waits", 10)
    assert "held" not in said
    kill(beside)
    thread.join(10)
    assert said[-1] == "held"


def test_what_the_stages_need_stands_in_params_yaml(tmp_path: Path):
    (tmp_path / "params.yaml").write_text("run: {device: 'cuda:1'}\n")
    assert devices.Needs.of(tmp_path) == devices.Needs("cuda:1")
    rows = "{dense: {layer: dense}, auto: {layer: auto}, soon: {layer: auto, target: time}}"
    (tmp_path / "params.yaml").write_text(f"tasks: {{vision: {{}}, kernel: {{}}}}\nmethods: {rows}\n")
    needs = devices.Needs.of(tmp_path)
    assert needs == devices.Needs("cpu", frozenset({"transfer@vision-soon", "transfer@kernel-soon"}))
    stages = ("profile@vision-dense", "transfer@vision-soon", "transfer@vision-auto", "finetune@vision-soon")
    assert [needs.times(stage) for stage in stages] == [True, True, False, False]
