"""Which stages may share a machine: one slot per GPU, and CPU timings with no neighbour in any clone.

Slots are locks of files in the machine's temporary folder, which end with the process that holds them, so a
kill leaks none. For a GPU the Prefect server counts too: one concurrency limit per GPU, whose lease ends by
itself.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from flows.dvc.repair import Say
from flows.schedule import ALONE, LAST, timing_stages, verb

LEASE_S = 60
"""A killed flow's slot on the server is free after this; 60 s is the least that Prefect accepts."""
POLL_S = 0.2
WITHOUT_GPU = frozenset({"prepare", "report"})
"""Verbs that never use a GPU."""
TIMED = ALONE - {LAST}
"""Verbs that measure time."""


@dataclass(frozen=True)
class Needs:
    """What the stages of a clone need of the machine.

    Attributes:
        device: `run.device` of params.yaml: cpu, mps, cuda or cuda:N.
        timing: stages that measure time although their verb does not say so.
    """

    device: str
    timing: frozenset[str] = frozenset()

    @staticmethod
    def of(project: Path) -> Needs:
        """By the clone's params.yaml."""
        params = yaml.safe_load((project / "params.yaml").read_text(encoding="utf-8"))
        return Needs(params.get("run", {}).get("device", "cpu"), timing_stages(params))

    def times(self, stage: str) -> bool:
        """Whether the stage measures time."""
        return verb(stage) in TIMED or stage in self.timing


def gpus() -> list[str]:
    """The GPUs of this machine that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return []


def limit_name(gpu: str) -> str:
    """The name of the server's concurrency limit for a GPU of this machine."""
    return f"gpu-{socket.gethostname()}-{gpu}"


@contextmanager
def slot(needs: Needs, stage: str, say: Say, *, counted: bool = True) -> Iterator[dict[str, str]]:
    """Hold what a stage needs of this machine; yields the variables its process must see.

    On the device `cuda` the first free GPU is taken; `cuda:N` names one. On the CPU a stage
    that times waits until no stage of any clone on this machine runs, and the others wait while it does.
    Where there is no Prefect server, or none is to be asked, `counted` is False.
    """
    device = needs.device
    if not device.startswith("cuda"):
        with _cpu(alone=needs.times(stage), stage=stage, say=say):
            yield {}
    elif verb(stage) in WITHOUT_GPU:
        yield {}
    else:
        with _gpu(device, stage, say, counted=counted) as variables:
            yield variables


@contextmanager
def cpu_alone(what: str, say: Say) -> Iterator[None]:
    """Hold this machine's CPU alone, for timings that are no stage."""
    with _cpu(alone=True, stage=what, say=say):
        yield


@contextmanager
def _gpu(device: str, stage: str, say: Say, *, counted: bool) -> Iterator[dict[str, str]]:
    present = gpus()
    wanted = [device.removeprefix("cuda:")] if ":" in device else present
    if not wanted:  # the stage itself says what is wrong with the device
        yield {}
        return
    with _first_free(wanted, stage, say) as gpu, _counted(limit_name(gpu) if counted else None):
        yield {} if ":" in device else {"CUDA_VISIBLE_DEVICES": gpu}


@contextmanager
def _first_free(names: list[str], stage: str, say: Say) -> Iterator[str]:
    told = False
    while True:
        for name in names:
            with _opened(f"gpu-{name}") as file:
                if _locked(file, fcntl.LOCK_EX):
                    yield name
                    return
        if not told:
            say(f"{stage}  waits for a GPU: {', '.join(names)} in use")
            told = True
        time.sleep(POLL_S)


@contextmanager
def _counted(limit: str | None) -> Iterator[None]:
    """Hold one of the server's slots, where a worker has made the limit."""
    if limit is None or "PREFECT_API_URL" not in os.environ:
        yield
        return
    from prefect.concurrency.sync import concurrency

    with concurrency(limit, lease_duration=LEASE_S, strict=False):
        yield


@contextmanager
def _cpu(*, alone: bool, stage: str, say: Say) -> Iterator[None]:
    """Readers and one writer over all clones; the door keeps new readers out while a writer waits."""
    with _opened("cpu-door") as door, _opened("cpu") as room:
        _take(door, fcntl.LOCK_EX, stage, say)
        _take(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH, stage, say)
        if not alone:
            fcntl.flock(door, fcntl.LOCK_UN)
        yield


def _take(file: int, mode: int, stage: str, say: Say) -> None:
    if not _locked(file, mode):
        say(f"{stage}  waits: timings share no machine with other stages")
        while not _locked(file, mode):
            time.sleep(POLL_S)


def _locked(file: int, mode: int) -> bool:
    try:
        fcntl.flock(file, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _opened(name: str) -> Iterator[int]:
    folder = Path(tempfile.gettempdir()) / f"eugen-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Not inherited by children: a lock must end with the flow that took it.
    file = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)
