"""A worker's part of a benchmark that is fanned out: some cells, from the DVC remote and back to it.

The worker's clone must be at the coordinator's commit; it gets the coordinator's params.yaml.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.states import Completed, State

from flows import clone
from flows.clone import Busy, own_clone
from flows.dvc import lock
from flows.dvc.remote import Remote, RemoteError
from flows.dvc.runner import DvcRunner
from flows.prefect.engine import TIMEOUT_S, run_graph
from flows.prefect.flow_runs import close_killed, tag
from flows.prefect.life import signs_of_life
from flows.run import Outcome, Sent, cores, ready, recorder, say
from flows.schedule import with_ancestors

PUSH_S = 30.0
"""What is finished is pushed at least so often."""
BUSY_S = 10.0
"""A clone in which another run works gives its cells back after this."""


class WrongClone(Exception):
    """This clone cannot run the cells. The message says why and what to do."""


@flow(name="cells", persist_result=False)
def cells(
    stages: list[str],
    params: str,
    run_id: str,
    locked: dict[str, Any],
    commit: str | None = None,
    seconds: float = 60.0,
    jobs: int | None = None,
    timeouts_s: dict[str, float] | None = None,
) -> State[Any]:
    """Run `stages` in this worker's clone; after `seconds` no further cell is begun.

    `params` is the coordinator's params.yaml, `run_id` its pipeline run, `commit` its commit, `locked` its
    entries of dvc.lock for what the stages need. The outputs come from the DVC remote, and what is made goes
    there. The final state's message is JSON: stages `done`, with their entries in `locked`, `failed` (with
    the reason), `skipped` (with the failed one) and `left`, and why the clone is `busy` if it is: then all
    are left. Raises `WrongClone`, `WrongParameters` and `RemoteError` before any work.
    """
    folder = own_clone()
    tag(folder)
    check_commit(folder, commit)
    remote = Remote(folder)
    delivery, limits = Delivery(remote), TIMEOUT_S | (timeouts_s or {})
    try:
        # Signs of life from here on: to fetch the inputs may take long.
        with signs_of_life(), ready(folder, None, Sent(params, run_id)) as runner:
            close_killed(folder, say)
            outcome = _todo(runner, remote, stages, locked)
            delivery.shared = set(stages).difference(outcome.todo)
            with delivery.running(), recorder(runner, outcome):
                until = time.monotonic() + seconds
                run_graph(runner, outcome, jobs or cores() + 1, limits, until=until, ended=delivery.add)
            told = _told(stages, outcome)
            told["locked"] = lock.entries(folder, told["done"])
    except Busy as busy:
        say(str(busy))
        time.sleep(BUSY_S)
        told = {"done": [], "failed": {}, "skipped": {}, "left": stages, "locked": {}, "busy": str(busy)}
    return Completed(message=json.dumps(told))


def _todo(runner: DvcRunner, remote: Remote, stages: list[str], locked: lock.Entries) -> Outcome:
    """Stand where the coordinator stands, fetch what the remote has of `stages`; what is left to do."""
    lock.take_over(runner.project, locked)
    remote.fetch(*locked, say=say)
    pulled = remote.pull(*stages, say=say)
    upstream = runner.survey.upstream
    todo = with_ancestors(upstream, set(stages)).difference(pulled.restored, pulled.present)
    return Outcome([stage for stage in upstream if stage in todo], len(upstream) - len(todo))


def _told(stages: list[str], outcome: Outcome) -> dict[str, Any]:
    unfinished = {*outcome.failed, *outcome.skipped, *outcome.left}
    return {
        "done": [stage for stage in stages if stage not in unfinished],
        "failed": outcome.failed,
        "skipped": {stage: cause for stage, cause in outcome.skipped.items() if stage in stages},
        "left": [stage for stage in outcome.left if stage in stages],
    }


def check_commit(folder: Path, wanted: str | None) -> None:
    """Raise `WrongClone` unless the clone's code is that of the commit `wanted`; None fits any."""
    if wanted is None:
        return
    if (here := clone.commit(folder)) != wanted:
        raise WrongClone(
            f"{folder} is at {here[:10] if here else 'no commit'}, the coordinator at {wanted[:10]}: "
            f"git -C {folder} fetch && git -C {folder} checkout {wanted[:10]}"
        )
    if changed := clone.changed_sources(folder):
        raise WrongClone(f"{folder} has changes that no commit has: git -C {folder} stash -u\n{changed}")


class Delivery:
    """Pushes what is finished, every `PUSH_S` and at the end; `shared` is in the remote already."""

    def __init__(self, remote: Remote) -> None:
        self._remote, self._made = remote, set[str]()
        self.shared: set[str] = set()
        self._over = threading.Event()

    def add(self, stage: str) -> None:
        """A stage is good."""
        self._made.add(stage)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Push in the background within, and what is left at the end. Raises `RemoteError` if that fails."""
        thread = threading.Thread(target=self._now_and_then)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
        self._push()

    def _now_and_then(self) -> None:
        while not self._over.wait(PUSH_S):
            try:
                self._push()
            except RemoteError as error:
                say(f"{error}; trying again")

    def _push(self) -> None:
        if new := sorted(self._made - self.shared):
            self._remote.push(*new, say=say)
            self.shared = self.shared.union(new)
