"""DVC as a set of processes: what is stale, run one stage, run all, stop everything.

Only the command line of DVC is used; it alone decides what is stale. Every process is the leader of a
group of its own, so that a timeout or a cancel reaches the stage and whatever the stage has started.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from flows.dvc.repair import Say, remove_dvc_parts, repair_dvc_lock, wait_for_other_dvc
from flows.machine import child, disk
from flows.machine.programs import environment

GRACE_S = 3.0
"""How long DVC may take to note that its stage was killed before it is killed too."""

TAIL = 60
"""Last lines of a stage in which the reason of its end is looked for."""

_EDGE = re.compile(r'"([^"]+)"(?: -> "([^"]+)")?;')
_EXIT = re.compile(r"exited with (-?\d+)\s*$")
_NOISE = re.compile(
    r"\s*$|Running stage '|> |(Updating|Generating) lock file |To track the changes with git|\s+git add "
    r"|To enable auto staging|\s+dvc config core\.autostage|Use `dvc push`|Data and pipelines are up to date"
    r"|Stage '.+' (didn't change, skipping|is cached - skipping run)|WARNING: '.+' is empty\."
    r"|ERROR: failed to repro"
)


class StageFailed(Exception):
    """A stage ended without its outputs."""

    def __init__(self, stage: str, reason: str, *, code: int = 1, again: bool = True) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage, self.reason, self.code = stage, reason, code
        self.worth_a_retry = again and code != 2


class Stopped(Exception):
    """The run was stopped: no process is started any more."""


@dataclass(frozen=True)
class Survey:
    """The stages of a project, each with those it directly needs, and those whose state is stale."""

    upstream: dict[str, frozenset[str]]
    stale: frozenset[str]


class DvcRunner:
    """The DVC processes of one run in the folder `project`; its stages share the pipeline run `run_id`."""

    def __init__(self, project: Path, run_id: str, say: Say = print) -> None:
        self.project, self.run_id, self._say = project, run_id, say
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._stopped = False
        self.started = time.monotonic()
        self.after_kill = False
        """Whether the last run of the clone was killed."""
        self.survey = Survey({}, frozenset())
        """What the last look found."""

    def look(self) -> Survey:
        """Ask DVC for the graph and for what is stale, repairing what a killed run left broken."""
        wait_for_other_dvc(self.project, self._say)
        remove_dvc_parts(self.project, self._say)
        with ThreadPoolExecutor() as pool:
            graph = pool.submit(self._answer, "dag", "--dot")
            try:
                stale = self.changes()
            except RuntimeError as error:
                if "dvc.lock" not in str(error):
                    raise
                repair_dvc_lock(self.project, self._say)
                stale = self.changes()
                graph = pool.submit(self._answer, "dag", "--dot")
        self.survey = Survey(_parse_graph(graph.result()), frozenset(stale))
        return self.survey

    def changes(self, *targets: str) -> dict[str, Any]:
        """What `dvc status` finds changed, by stage, of all or of `targets`."""
        return json.loads(self._answer("status", "--json", *targets) or "{}")

    def run_stage(
        self, stage: str, *, timeout_s: float, say: Say, env: Mapping[str, str] | None = None
    ) -> str:
        """Bring one stage up to date; its output goes line by line to `say`.

        `env` is added to its environment. Returns `run`, `restored` (from DVC's cache) or `unchanged`. Raises
        `StageFailed` with the reason, after at most `timeout_s` seconds plus the grace, and `Stopped` once
        the run was stopped.
        """
        try:
            disk.check_disks(self.project)
        except disk.DiskRefuses as error:
            raise StageFailed(stage, str(error), again=False) from error
        outcome, reason, last, expired = "run", "", "", threading.Event()
        lines: deque[str] = deque(maxlen=TAIL)
        with self._started("repro", "--single-item", stage, env=env) as process:
            timer = threading.Timer(timeout_s, lambda: (expired.set(), end([process])))
            timer.daemon = True
            timer.start()
            try:
                for line in _lines(process):
                    lines.append(line)
                    if " didn't change, skipping" in line:
                        outcome = "unchanged"
                    elif " is cached - skipping run" in line:
                        outcome = "restored"
                    elif line.startswith("ERROR: failed to repro"):
                        reason = line.removeprefix("ERROR: ")
                    if not _NOISE.match(line):
                        last = line
                        say(line)
            finally:
                timer.cancel()
            code = process.wait()
        if self._stopped:
            raise Stopped(stage)
        if expired.is_set():
            raise StageFailed(stage, f"killed after {timeout_s:g} s, its time limit", again=False)
        if code and (refused := disk.reason(self.project, list(lines))):
            raise StageFailed(stage, refused, again=False)
        if code:
            exited = _EXIT.search(reason)
            raise StageFailed(
                stage, last or reason or f"DVC ended with {code}", code=int(exited[1]) if exited else 1
            )
        return outcome

    def run_all(self, say: Say, env: Mapping[str, str]) -> int:
        """Plain `dvc repro --keep-going` with `env` added to its environment; returns DVC's exit code."""
        return self.follow(say, "repro", "--keep-going", env=env)

    def follow(self, say: Say, *arguments: str, env: Mapping[str, str] | None = None) -> int:
        """Any DVC command, its output line by line to `say`; returns DVC's exit code.

        `env` overrides variables of the command and of what it starts.
        """
        with self._started(*arguments, env=env) as process:
            for line in _lines(process):
                say(line)
            return process.wait()

    def stop(self) -> None:
        """Kill every process of this run and let none start any more."""
        with self._lock:
            self._stopped = True
            running = list(self._processes)
        end(running)

    def _answer(self, *arguments: str) -> str:
        """The standard output of a DVC command that only looks; raises `RuntimeError` with its message."""
        with self._started(*arguments, stderr=subprocess.PIPE) as process:
            answer, complaint = process.communicate()
        if process.returncode:
            raise RuntimeError(f"dvc {' '.join(arguments)}: {complaint.strip() or answer.strip()}")
        return answer

    @contextmanager
    def _started(
        self, *arguments: str, stderr: int = subprocess.STDOUT, env: Mapping[str, str] | None = None
    ) -> Iterator[subprocess.Popen[str]]:
        command = child.command("dvc", "--wait-for-lock", *arguments)
        with self._lock:
            if self._stopped:
                raise Stopped(arguments[-1])
            process = subprocess.Popen(
                command,
                cwd=self.project,
                env=environment(self.run_id) | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._processes.add(process)
        try:
            yield process
        finally:
            end([process], grace_s=0)
            with self._lock:
                self._processes.discard(process)


def end(processes: Iterable[subprocess.Popen[str]], *, grace_s: float = GRACE_S) -> None:
    """Kill the stages of these DVC processes, then, when DVC has noted it or `grace_s` is over, their groups.

    DVC is given the time to release its locks: one that is killed while it writes them leaves them broken.
    """
    processes = list(processes)
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        for process in processes:
            _kill_stage(process.pid)
        time.sleep(0.02)
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _kill_stage(leader: int) -> None:
    """Kill what DVC has started; DVC itself is the only child of its group's leader."""
    with suppress(psutil.NoSuchProcess):
        for dvc in psutil.Process(leader).children():
            for process in dvc.children(recursive=True):
                process.kill()


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line.rstrip()


def _parse_graph(dot: str) -> dict[str, frozenset[str]]:
    """The direct needs of every stage from `dvc dag --dot`, where `"a" -> "b"` says that b needs a."""
    needs: dict[str, set[str]] = {}
    for source, target in _EDGE.findall(dot):
        needs.setdefault(source, set())
        if target:
            needs.setdefault(target, set()).add(source)
    return {stage: frozenset(found) for stage, found in needs.items()}
