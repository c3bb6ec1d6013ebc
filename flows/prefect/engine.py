"""The benchmark as a Prefect flow: the DVC graph as tasks, one per stage, in parallel where independent."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow, tags, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture
from prefect.logging.handlers import APILogHandler

from flows import results
from flows.clone import own_clone
from flows.dvc.runner import DvcRunner, StageFailed
from flows.machine import devices
from flows.prefect.flow_runs import close_killed, own_tags, tag
from flows.prefect.life import signs_of_life
from flows.run import LOG, Outcome, cores, finish, note_failure, plan, ready, recorder, say
from flows.schedule import LAST, Schedule, verb

TIMEOUT_S = {"baseline": 4 * 3600.0, "transfer": 2 * 3600.0, "finetune": 4 * 3600.0}
"""After this a stage is killed, by verb."""
DEFAULT_TIMEOUT_S = 1800.0

LOG.addHandler(APILogHandler())


def _worth_a_retry(_task: Any, _task_run: Any, state: Any) -> bool:
    return isinstance(state.data, StageFailed) and state.data.worth_a_retry


@task(
    task_run_name="{stage}",
    retries=1,
    retry_condition_fn=_worth_a_retry,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def run_stage(stage: str, runner: DvcRunner, needs: devices.Needs, timeout_s: float) -> None:
    """One stage of dvc.yaml in its slot; a failure that is not the parameters' fault gets a second try."""
    with devices.slot(needs, stage, say) as variables:
        started = time.monotonic()
        say(f"{stage}  started" + "".join(f", {name}={value}" for name, value in variables.items()))
        try:
            outcome = runner.run_stage(
                stage, timeout_s=timeout_s, say=lambda line: say(f"{stage}  {line}"), env=variables
            )
        except StageFailed as error:
            say(f"{stage}  FAILED after {time.monotonic() - started:.1f} s: {error.reason}")
            raise
    results.clear_failures(runner.project, [stage])
    say(f"{stage}  {outcome} in {time.monotonic() - started:.1f} s")


@flow(name="benchmark", persist_result=False)
def benchmark(
    project: str | None = None,
    profile: str | None = None,
    jobs: int | None = None,
    timeouts_s: dict[str, float] | None = None,
    pool: str | None = None,
) -> None:
    """Bring every stage of `project` up to date, `jobs` at a time, and the report whatever failed.

    `project` is the clone that this code or EUGEN_CLONE belongs to unless given. `jobs` is one more than the
    cores: a stage that starts or ends waits more than it computes. `timeouts_s` overrides `TIMEOUT_S` by
    verb. With `pool` the cells are sent to the workers of this work pool. Raises `CellsFailed` if a stage
    failed, `WrongParameters` before any work.
    """
    folder = own_clone(project)
    tag(folder)
    with signs_of_life(), ready(folder, profile) as runner:
        close_killed(folder, say)
        outcome = plan(runner)
        with recorder(runner, outcome):
            if pool is None:
                run_graph(runner, outcome, jobs or cores() + 1, TIMEOUT_S | (timeouts_s or {}))
            else:
                from flows.fan_out.coordinator import run_cells

                run_cells(runner, outcome, pool, timeouts_s or {})
        if rows := results.result_rows(folder):
            create_table_artifact(rows, key="benchmark-results", description=f"Pipeline run {runner.run_id}")
        finish(runner, outcome)


def run_tagged(project: Path, jobs: int | None, pool: str | None) -> None:
    """The flow from the command line: tagged from its first moment on, so that a kill is noticed later."""
    with tags(*own_tags(project)):
        benchmark(str(project), jobs=jobs, pool=pool)


def run_graph(
    runner: DvcRunner,
    outcome: Outcome,
    jobs: int,
    timeouts_s: dict[str, float],
    *,
    until: float = math.inf,
    ended: Callable[[str], None] = lambda _stage: None,
) -> None:
    """Run `outcome.todo` as Prefect tasks; all are killed if this is left early.

    After the time `until` (monotonic) no further cell is begun: what waits goes to `outcome.left`. `ended`
    hears of each stage that is good.
    """
    upstream, needs = runner.survey.upstream, devices.Needs.of(runner.project)
    schedule = Schedule(upstream, outcome.todo, needs.timing)
    futures: dict[str, PrefectFuture[None]] = {}
    over = queue.SimpleQueue[str]()
    try:
        while schedule.open:
            if time.monotonic() > until:
                outcome.left += schedule.give_back()
            for stage in schedule.take(jobs):
                # Only for Prefect's picture of the run: what is needed has finished before.
                needed = [
                    futures[other] for other in upstream[stage] if other in futures and verb(stage) != LAST
                ]
                limit_s = timeouts_s.get(verb(stage), DEFAULT_TIMEOUT_S)
                futures[stage] = run_stage.submit(
                    stage, runner, needs, limit_s, wait_for=needed, return_state=False
                )
                futures[stage].add_done_callback(lambda _, stage=stage: over.put(stage))
            if not schedule.open:
                break
            stage = over.get()
            error = futures[stage].result(raise_on_failure=False)
            if error is None:
                ended(stage)
            else:
                note_failure(runner, outcome, stage, error)
            schedule.end(stage, failed=error is not None)
    except BaseException:
        # Before Prefect waits for its threads, which wait for these processes.
        runner.stop()
        raise
    outcome.skipped |= schedule.skipped
