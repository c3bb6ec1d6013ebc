"""The benchmark with plain `dvc repro`: one stage after another, without Prefect."""

from __future__ import annotations

from flows import results
from flows.dvc.runner import DvcRunner, StageFailed
from flows.machine import devices
from flows.run import Outcome, make_report, note_failure, plan, recorder
from flows.schedule import LAST, verb

TIMED = "profile@dvc repro"
"""DVC times stages among others that do not, so the whole run counts as one that does."""


def run_graph(runner: DvcRunner) -> Outcome:
    """Run what is stale, alone on the CPU or on one GPU; the output of DVC is shown as it is."""
    outcome = plan(runner)
    with recorder(runner, outcome):
        failed = False
        if outcome.todo:
            needs = devices.Needs.of(runner.project)
            with devices.slot(needs, TIMED, print, counted=False) as variables:
                failed = runner.run_all(print, variables) != 0
        if failed:
            _sort(runner, outcome)
        good = [stage for stage in outcome.todo if stage not in outcome.failed | outcome.skipped]
        if results.clear_failures(runner.project, good) or failed:
            make_report(runner, outcome, print)
    return outcome


def _sort(runner: DvcRunner, outcome: Outcome) -> None:
    """Of the stages that are still stale, those whose needs are met have failed; the others were skipped."""
    survey = runner.look()
    for stage in (stage for stage in survey.upstream if stage in survey.stale and verb(stage) != LAST):
        blocked = survey.upstream[stage] & (outcome.failed.keys() | outcome.skipped.keys())
        if blocked:
            cause = min(blocked)
            outcome.skipped[stage] = outcome.skipped.get(cause, cause)
        else:
            note_failure(runner, outcome, stage, StageFailed(stage, "dvc repro did not finish it; see above"))
