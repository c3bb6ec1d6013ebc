"""What both engines share: a clone held and checked, what is to do, how it ended, and how that is said."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from flows import clone, results
from flows.dvc.repair import Say
from flows.dvc.runner import DvcRunner, StageFailed
from flows.machine import disk
from flows.schedule import LAST, verb, with_descendants

LOG = logging.getLogger("eugen.flows")
"""Everything that a person reads of a run; the Prefect engine adds its server as a second reader."""
LOG.setLevel(logging.INFO)
LOG.propagate = False
_terminal = logging.StreamHandler(sys.stdout)
_terminal.setFormatter(logging.Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
LOG.addHandler(_terminal)

REPORT_TIMEOUT_S = 1800.0
UPLOAD_S = 120.0
"""How long the end of a run waits for the last uploads."""

_ready: dict[Path, DvcRunner] = {}


def say(line: str) -> None:
    """One line for the person who follows the run."""
    LOG.info("%s", line)


class CellsFailed(Exception):
    """The run went to its end, but not every stage did."""


@dataclass
class Outcome:
    """How a run ended."""

    todo: list[str]
    """Stages that were stale, or need one that was, in the order of dvc.yaml."""
    cached: int
    """How many others there are."""
    failed: dict[str, str] = field(default_factory=dict)
    """Reason by stage."""
    skipped: dict[str, str] = field(default_factory=dict)
    """The failed stage it needs, by stage."""
    left: list[str] = field(default_factory=list)
    """Stages that were given back for others to run."""


@dataclass(frozen=True)
class Sent:
    """What a coordinator sends with the cells of its run."""

    params: str
    """Its params.yaml."""
    run_id: str


def new_run_id() -> str:
    """Names a pipeline run: the time, and four letters by chance."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


@contextmanager
def ready(project: Path, profile: str | None, sent: Sent | None = None) -> Iterator[DvcRunner]:
    """Hold the clone, put the parameters in place, check them and ask DVC what is stale.

    The parameters are those of `profile`, those that a coordinator has sent, or params.yaml as it is. What is
    sent does not wait for another benchmark of the clone: raises `Busy`. Within another `ready` of the same
    process it only hands over the runner of that one.
    """
    if project in _ready:
        yield _ready[project]
        return
    with clone.held(project, say, wait=sent is None) as after_kill:
        disk.check_disks(project)
        if profile is not None:
            clone.choose_profile(project, profile, say)
        if sent is not None:
            clone.place_parameters(project, sent.params.encode(), "the coordinator's")
        run_id = sent.run_id if sent else os.environ.get("EUGEN_PIPELINE_RUN") or new_run_id()
        runner = _ready[project] = DvcRunner(project, run_id, say)
        runner.after_kill = after_kill
        try:
            with ThreadPoolExecutor(1) as pool:
                survey = pool.submit(runner.look)
                clone.check_parameters(project)
            survey.result()
            yield runner
        except BaseException:
            runner.stop()
            raise
        finally:
            del _ready[project]


@contextmanager
def recorder(runner: DvcRunner, outcome: Outcome) -> Iterator[None]:
    """One process that uploads all stages' journals to MLflow; without it each stage loads MLflow anew.

    It also runs when there is nothing to do but to upload what a killed run left.
    """
    source = runner.project / "stages" / "tracking" / "recorder.py"
    waiting = any((runner.project / ".work" / "outbox").glob("*/start.json"))
    if not (outcome.todo or waiting) or not source.exists() or os.environ.get("EUGEN_TRACKING") == "off":
        yield
        return
    # In a session of its own: what stops the stages must leave it time to upload what they left.
    command = [sys.executable, "-m", "stages.tracking.recorder"]
    process = subprocess.Popen(command, cwd=runner.project, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        try:
            process.communicate(timeout=UPLOAD_S)  # it ends when its standard input does
        except subprocess.TimeoutExpired:
            process.kill()
            say(
                f"MLflow took more than {UPLOAD_S:.0f} s: what is left waits in .work/outbox for the next run"
            )


def plan(runner: DvcRunner) -> Outcome:
    """Say what there is to do; failures of stages that DVC finds up to date are forgotten."""
    upstream = runner.survey.upstream
    todo = with_descendants(upstream, runner.survey.stale)
    if results.clear_failures(runner.project, upstream.keys() - todo):
        todo |= {stage for stage in upstream if verb(stage) == LAST}
    outcome = Outcome([stage for stage in upstream if stage in todo], len(upstream) - len(todo))
    say(f"run {runner.run_id}: {len(upstream)} stages, {outcome.cached} up to date, {len(todo)} to do")
    return outcome


def note_failure(runner: DvcRunner, outcome: Outcome, stage: str, error: object) -> None:
    """Enter a failed stage; its reason, if it left none itself, goes where the report finds it."""
    reason = error.reason if isinstance(error, StageFailed) else repr(error)
    try:
        results.record_failure(runner.project, stage, reason)
    except OSError as problem:  # a full disk, which may be what the stage failed of
        say(f"the failure of {stage} could not be recorded: {problem}")
    outcome.failed[stage] = results.read_failure(runner.project, stage) or reason


def make_report(runner: DvcRunner, outcome: Outcome, tell: Say) -> None:
    """Bring the report up to date with what there is, whatever failed; its output goes to `tell`."""
    for stage in (stage for stage in runner.survey.upstream if verb(stage) == LAST):
        try:
            runner.run_stage(stage, timeout_s=REPORT_TIMEOUT_S, say=tell)
        except StageFailed as error:
            note_failure(runner, outcome, stage, error)


def finish(runner: DvcRunner, outcome: Outcome) -> None:
    """Say how the run ended and where the report is; raise `CellsFailed` if a stage failed."""
    for stage, reason in outcome.failed.items():
        say(f"FAILED {stage}: {reason}")
        if skipped := [other for other, cause in outcome.skipped.items() if cause == stage]:
            say(f"  skipped, because they need it: {', '.join(skipped)}")
    done = len(outcome.todo) - len(outcome.failed) - len(outcome.skipped)
    counts = f"{outcome.cached} stages up to date before, {done} done"
    if outcome.failed:
        counts += f", {len(outcome.failed)} failed, {len(outcome.skipped)} skipped"
    say(f"{counts}, in {time.monotonic() - runner.started:.0f} s")
    report = runner.project / "reports" / "report.html"
    say(f"report: {report}" if report.exists() else "there is no report: its stage did not finish")
    if outcome.failed:
        raise CellsFailed(f"failed: {', '.join(outcome.failed)}")


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
