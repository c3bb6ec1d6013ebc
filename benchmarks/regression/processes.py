"""Long-lived workers: the base, the candidate, and the base once more as control."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 300.0
"""Seconds that a reply may take: fits take seconds, a dead lock for ever."""
GRACE = 2.0
"""Seconds that a worker has to end by itself."""


class WorkerLost(RuntimeError):
    """A worker died, or does not answer."""


class Refused(Exception):
    """A worker's library cannot do what was asked of it. The message is its own, `name` the worker's."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


class Worker:
    """A process that holds the library of one tree. Requests are the methods of `worker.Subject`."""

    def __init__(self, name: str, tree: Path, threads: int) -> None:
        self.name, self.tree = name, tree.resolve()
        environment = {**os.environ, "PYTHONPATH": str(self.tree), "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), str(self.tree), str(os.getpid()), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=self.tree,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, do: str, **request: Any) -> None:
        """Ask without waiting for the reply.

        Raises:
            WorkerLost: it died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._lost() from error

    def reply(self) -> dict[str, Any]:
        """What it answers.

        Raises:
            WorkerLost: it died, or takes more than `PATIENCE` seconds.
            Refused: its library raised an error.
        """
        assert self._process.stdout is not None
        # Every request has one reply of one line: nothing waits in the buffer that select does not see.
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:
            raise WorkerLost(f"the {self.name}'s worker did not answer for {PATIENCE:.0f} s")
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise self._lost()
        answer = json.loads(line)
        if "error" in answer:
            raise Refused(self.name, answer["error"])
        return answer

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """`send` and `reply`."""
        self.send(do, **request)
        return self.reply()

    def stop(self) -> None:
        """End it: by the end of its input, else by a kill."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # it died before it read what was written
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._process.stdout.close()

    def _lost(self) -> WorkerLost:
        try:
            code = self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            code = None
        return WorkerLost(f"the {self.name}'s worker died (exit code {code}); its messages are above")


@dataclass(frozen=True)
class Workers:
    """The three that are compared: base and candidate, base and control."""

    base: Worker
    candidate: Worker
    control: Worker

    def all(self) -> tuple[Worker, Worker, Worker]:
        return self.base, self.candidate, self.control


@contextmanager
def started(base: Path, candidate: Path, threads: int) -> Iterator[Workers]:
    """Three fresh workers, ended with the block.

    Raises:
        WorkerLost: one of them cannot even import its library.
    """
    running: list[Worker] = []
    try:
        for name, tree in (("base", base), ("candidate", candidate), ("control", base)):
            running.append(Worker(name, tree, threads))
        for worker in running:
            worker.send("hello")
        for worker in running:
            try:
                worker.reply()
            except Refused as error:
                raise WorkerLost(
                    f"the {worker.name}'s worker cannot start in {worker.tree}: {error}"
                ) from error
        yield Workers(*running)
    finally:
        for worker in running:
            worker.stop()
