"""Work pools, limits and deployments on the Prefect server, and the worker of this clone."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

from flows.dvc.repair import Say
from flows.machine import devices

POOLS = ("cpu-pool", "gpu-pool")
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]
WORKER_SETTINGS = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_WORKER_HEARTBEAT_SECONDS": "5"}
"""A worker takes a run within 2 s, and is known to be gone after 15 s."""


class CannotOperate(RuntimeError):
    """A command of Prefect failed. The message holds its words."""


def deploy(project: Path, say: Say) -> None:
    """Make the work pools that are missing, and all deployments of flows/prefect.yaml as it is now."""
    for pool in POOLS:
        ensure_pool(pool, say)
    _prefect(project, "deploy", "--prefect-file", "flows/prefect.yaml", "--all")
    say("deployed: prefect deployment ls; a deployment runs where a worker of its pool does")


def ensure_pool(pool: str, say: Say) -> None:
    """Make a work pool of type process unless it is there."""
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            _prefect(Path(), "work-pool", "create", pool, "--type", "process")
            say(f"work pool {pool} made")


def ensure_limits(say: Say) -> list[str]:
    """One slot on the server for each GPU of this machine; returns the limits' names."""
    names = [devices.limit_name(gpu) for gpu in devices.gpus()]
    with get_client(sync_client=True) as client:
        for name in names:
            client.upsert_global_concurrency_limit_by_name(name, 1)
    if names:
        say(f"one slot each: {', '.join(names)}")
    return names


def work(project: Path, pool: str, limit: int | None, say: Say) -> None:
    """Become the worker of this clone for `pool`; returns at once if one runs.

    `limit` is how many runs it works on at a time, by default the number of GPUs for a pool whose name begins
    with gpu, and one elsewhere.
    """
    (project / ".work").mkdir(exist_ok=True)
    # Kept open across exec, so that the worker itself holds the lock; its children do not get it.
    lock = os.open(project / ".work" / f"worker-{pool}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"a worker of this clone serves {pool} (process {os.pread(lock, 20, 0).decode()})")
        return
    os.truncate(lock, 0)
    os.pwrite(lock, str(os.getpid()).encode(), 0)
    os.set_inheritable(lock, True)
    ensure_pool(pool, say)
    slots = ensure_limits(say) if pool.startswith("gpu") else []
    runs = limit or max(1, len(slots))
    name = worker_name(project)
    say(f"worker {name}: {runs} run{'s' if runs > 1 else ''} at a time; ctrl-C stops it")
    command = [*PREFECT, "worker", "start", "--pool", pool, "--type", "process", "--name", name]
    os.execve(sys.executable, [*command, "--limit", str(runs)], _environment(project))  # noqa: S606


def worker_name(project: Path) -> str:
    """Machine, folder and a hash that tells folders of one name apart; Prefect allows no slashes."""
    digest = hashlib.sha256(str(project).encode()).hexdigest()[:6]
    return f"{socket.gethostname()}-{project.name}-{digest}"


def _environment(project: Path) -> dict[str, str]:
    """What a worker's runs need: this clone's code before any other, and this interpreter."""
    paths = {"PYTHONPATH": str(project), "PATH": str(Path(sys.executable).parent)}
    joined = {
        name: os.pathsep.join(filter(None, [first, os.environ.get(name)])) for name, first in paths.items()
    }
    return WORKER_SETTINGS | dict(os.environ) | joined | {"EUGEN_CLONE": str(project)}


def _prefect(project: Path, *arguments: str) -> None:
    done = subprocess.run(
        [*PREFECT, *arguments],
        check=False,
        cwd=project,
        text=True,
        capture_output=True,
        env=_environment(project.resolve()),
    )
    if done.returncode:
        raise CannotOperate(f"prefect {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
