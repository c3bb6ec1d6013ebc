"""The benchmark on several machines: cells go as deployment runs to the workers of a work pool.

The coordinator holds the graph, the workers hold clones; they meet in the DVC remote alone. A worker gets a
chunk of cells and gives back those it could not begin in time, so that short cells travel together and long
ones alone. The cells of a dead worker go to another.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, WorkPoolFilter
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.states import Cancelling, Crashed

from flows import clone, results
from flows.clone import WrongParameters
from flows.dvc import lock
from flows.dvc.remote import Remote
from flows.dvc.runner import DvcRunner, StageFailed
from flows.prefect.life import BEAT, SILENT_S
from flows.run import Outcome, make_report, note_failure, say
from flows.schedule import LAST, Schedule, Upstream, cell, verb, with_ancestors

CHUNK_S = 60.0
"""A worker begins no further cell after this."""
POLL_S = 0.5
PENDING_S = 90.0
"""A run that a worker has taken but not begun for so long is dead."""
TRIES = 3
"""So many runs may die with a cell before the cell counts as failed."""


def run_cells(runner: DvcRunner, outcome: Outcome, pool: str, timeouts_s: dict[str, float]) -> None:
    """Have the workers of `pool` run `outcome.todo`, fetch what they made, and make the report here.

    Raises `WrongParameters` where the clone or the server cannot fan out: uncommitted sources, no remote, no
    deployment for the pool.
    """
    commit = _commit(runner.project)
    remote = Remote(runner.project)
    remote.make_writable()
    upstream, todo = runner.survey.upstream, set(outcome.todo)
    if here := with_ancestors(upstream, todo) - todo:
        remote.push(*sorted(here), say=say)
    with get_client(sync_client=True) as client:
        deployment = _deployment(client, pool)
        fan_out = FanOut(runner, outcome, client, pool, deployment, _parameters(runner, commit, timeouts_s))
        fan_out.run()
    made = [
        stage
        for stage in outcome.todo
        if stage not in outcome.failed | outcome.skipped and verb(stage) != LAST
    ]
    remote.fetch(*made, say=say)
    results.clear_failures(runner.project, made)
    make_report(runner, outcome, say)


def _commit(project: Path) -> str | None:
    """The commit that the workers must be at, None outside a repository."""
    if changed := clone.changed_sources(project):
        raise WrongParameters(f"fan-out sends a commit to the workers: commit or stash first\n{changed}")
    return clone.commit(project)


def _parameters(runner: DvcRunner, commit: str | None, timeouts_s: dict[str, float]) -> dict[str, Any]:
    params = (runner.project / "params.yaml").read_text(encoding="utf-8")
    told = {"params": params, "run_id": runner.run_id, "commit": commit}
    return told | {"seconds": CHUNK_S, "timeouts_s": timeouts_s}


def _deployment(client: SyncPrefectClient, pool: str) -> UUID:
    """The deployment of the flow `cells` on `pool`; `WrongParameters` if there is none."""
    found = client.read_deployments(
        flow_filter=FlowFilter.model_validate({"name": {"any_": ["cells"]}}),
        work_pool_filter=WorkPoolFilter.model_validate({"name": {"any_": [pool]}}),
    )
    if not found:
        raise WrongParameters(f"no deployment of `cells` on the work pool {pool!r}: make deploy")
    return found[0].id


def cell_graph(upstream: Upstream, todo: list[str]) -> tuple[dict[str, list[str]], dict[str, set[str]]]:
    """The stages of each cell, and the cells that each needs; without the report. Names are `cell@…`."""
    stages: dict[str, list[str]] = {}
    for stage in (stage for stage in todo if verb(stage) != LAST):
        stages.setdefault(f"cell@{cell(stage)}", []).append(stage)
    home = {stage: name for name, members in stages.items() for stage in members}
    needs = {
        name: {home[need] for stage in members for need in upstream[stage] if need in home} - {name}
        for name, members in stages.items()
    }
    return stages, needs


@dataclass
class Chunk:
    """Cells that one deployment run works on."""

    run_id: UUID
    cells: list[str]
    beat: Any = None
    """The last beat, and when it was first seen."""
    seen: float = field(default_factory=time.monotonic)


class FanOut:
    """One fan-out: which cells wait, and which run where."""

    def __init__(
        self,
        runner: DvcRunner,
        outcome: Outcome,
        client: SyncPrefectClient,
        pool: str,
        deployment: UUID,
        parameters: dict[str, Any],
    ) -> None:
        self.runner, self.outcome, self.client = runner, outcome, client
        self.pool, self.deployment, self.parameters = pool, deployment, parameters
        self.stages, needs = cell_graph(runner.survey.upstream, outcome.todo)
        self.schedule = Schedule(needs, list(self.stages))
        self.waiting: list[str] = []
        self.chunks: list[Chunk] = []
        self.deaths: dict[str, int] = {}
        self._told = 0

    def run(self) -> None:
        """Until every cell is done, failed or skipped. Left early, it cancels what runs."""
        say(f"fan-out to {self.pool}: {len(self.stages)} cells")
        try:
            while self.schedule.open:
                self.waiting += self.schedule.take(len(self.stages))
                self._send()
                time.sleep(POLL_S)
                for chunk in list(self.chunks):
                    self._look(chunk)
        except BaseException:
            for chunk in self.chunks:
                self.client.set_flow_run_state(chunk.run_id, Cancelling(), force=True)
            raise
        for name, cause in self.schedule.skipped.items():
            failed = next(stage for stage in self.stages[cause] if stage in self.outcome.failed)
            self.outcome.skipped |= dict.fromkeys(self.stages[name], failed)

    def _send(self) -> None:
        """One chunk for each worker that has none; equal shares of what waits."""
        while self.waiting and len(self.chunks) < (workers := max(1, self._workers())):
            share = math.ceil(len(self.waiting) / (workers - len(self.chunks)))
            names, self.waiting = self.waiting[:share], self.waiting[share:]
            stages = [stage for name in names for stage in self.stages[name]]
            run = run_deployment(
                self.deployment,
                parameters=self.parameters | {"stages": stages, "locked": self._locked(stages)},
                flow_run_name=names[0].removeprefix("cell@")
                + (f" and {len(names) - 1} more" if names[1:] else ""),
                tags=[self.runner.run_id],
                timeout=0,
            )
            assert isinstance(run, FlowRun), "the synchronous client answers at once"
            self.chunks.append(Chunk(run.id, names))
            say(f"{run.name}  sent ({len(stages)} stages)")

    def _locked(self, stages: list[str]) -> lock.Entries:
        """With what the stages that these need were left."""
        needed = with_ancestors(self.runner.survey.upstream, set(stages)) - set(stages)
        return lock.entries(self.runner.project, needed)

    def _workers(self) -> int:
        online = [
            worker
            for worker in self.client.read_workers_for_work_pool(self.pool)
            if worker.status == "ONLINE"
        ]
        if len(online) != self._told:
            self._told = len(online)
            say(
                f"{self.pool}: {len(online)} workers online"
                + ("" if online else f"; make worker POOL={self.pool}")
            )
        return len(online)

    def _look(self, chunk: Chunk) -> None:
        run = self.client.read_flow_run(chunk.run_id)
        state = run.state
        if state is None or state.is_scheduled():
            return
        if state.is_completed():
            self._settle(chunk, json.loads(state.message or "{}"))
        elif state.is_final():
            self._died(chunk, run.name, f"{state.name}: {state.message}")
        elif (silent := self._silent_s(chunk, run)) > (PENDING_S if state.is_pending() else SILENT_S):
            why = f"no sign of life for {silent:.0f} s"
            self.client.set_flow_run_state(chunk.run_id, Crashed(message=why), force=True)
            self._died(chunk, run.name, why)

    def _silent_s(self, chunk: Chunk, run: FlowRun) -> float:
        state, beat = run.state, run.labels.get(BEAT)
        mark = (state.type if state else None, beat)
        if mark != chunk.beat:
            chunk.beat, chunk.seen = mark, time.monotonic()
        return time.monotonic() - chunk.seen

    def _settle(self, chunk: Chunk, told: dict[str, Any]) -> None:
        """Enter what a finished run says of its cells."""
        self.chunks.remove(chunk)
        lock.take_over(self.runner.project, told["locked"])
        for stage, reason in told["failed"].items():
            note_failure(self.runner, self.outcome, stage, StageFailed(stage, reason))
        self.outcome.skipped |= told["skipped"]
        if busy := told.get("busy"):
            say(f"{len(chunk.cells)} cells came back: {busy}")
        left = {cell(stage) for stage in told["left"]}
        for name in chunk.cells:
            if cell(name) in left:
                self.waiting.append(name)
                continue
            failed = any(stage in self.outcome.failed for stage in self.stages[name])
            self.schedule.end(name, failed=failed)

    def _died(self, chunk: Chunk, name: str, why: str) -> None:
        """Give the cells of a dead run back; what it had pushed is restored by whoever gets them."""
        self.chunks.remove(chunk)
        say(f"{name}  {why}; its cells go to another worker")
        for lost in chunk.cells:
            self.deaths[lost] = self.deaths.get(lost, 0) + 1
            if self.deaths[lost] < TRIES:
                self.waiting.append(lost)
                continue
            stage = self.stages[lost][0]
            note_failure(
                self.runner, self.outcome, stage, StageFailed(stage, f"{TRIES} runs ended with it: {why}")
            )
            self.outcome.skipped |= dict.fromkeys(self.stages[lost][1:], stage)
            self.schedule.end(lost, failed=True)
