"""What a stage owes to the operating system: it dies with its parent, runs alone, knows its own age."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

LOCKS = Path(".work/locks")
_PR_SET_PDEATHSIG = 1
_PARENT_AT_IMPORT = os.getppid()


def die_with_parent() -> None:
    """Have the kernel kill this process (SIGKILL) when its parent ends; Linux only, elsewhere no-op.

    `kill -9` of DVC alone would otherwise leave the training running beside the one a rerun starts.
    Raises SystemExit if the parent is gone already, in which case no signal would ever come.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl(PR_SET_PDEATHSIG): {os.strerror(number)}")
    if os.getppid() != _PARENT_AT_IMPORT:
        raise SystemExit("the process that started this stage is gone: stopping before any work")


def seconds_since_start() -> float:
    """Age of this process in seconds, start-up of the interpreter and all imports included."""
    if sys.platform != "linux":
        return time.time() - psutil.Process().create_time()
    # Field 22 of stat, in clock ticks since boot: exact to 10 ms, where psutil's boot time rounds to 1 s.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def create_time(pid: int) -> float | None:
    """Start of process `pid` (Unix seconds), None if there is no such process."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def identity() -> dict[str, float | None]:
    """This process, told apart from a later one with the same pid."""
    return {"pid": os.getpid(), "created": create_time(os.getpid())}


def is_alive(pid: int, created: float) -> bool:
    """True if the process that had this pid and start time still runs; a reused pid is told apart."""
    now = create_time(pid)
    return now is not None and abs(now - created) < 2.0


def pipeline_run() -> str:
    """Identity of the pipeline run: EUGEN_PIPELINE_RUN, else the same for all children of one parent."""
    named = os.environ.get("EUGEN_PIPELINE_RUN")
    if named:
        return named
    started = time.gmtime(create_time(_PARENT_AT_IMPORT) or 0)
    return f"{time.strftime('%Y%m%dT%H%M%S', started)}-{_PARENT_AT_IMPORT}"


def _holder(path: Path) -> str:
    """The pid a lock's holder left beside it, as words."""
    try:
        return f"process {path.read_text().strip()}"
    except OSError:
        return "another process"


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Hold the file lock of `name`; while somebody else has it, say who and wait."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(LOCKS / f"{name}.lock"), LOCKS / f"{name}.pid"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{name} is already running ({_holder(owner)}): waiting until it ends", flush=True)
        lock.acquire()
    try:
        owner.write_text(str(os.getpid()))
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()
