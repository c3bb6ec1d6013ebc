"""The benchmark with plain `dvc repro`: one stage after another, without Prefect."""

from __future__ import annotations

from flows import results
from flows.dvc.runner import DvcRunner, StageFailed
from flows.run import Outcome, make_report, note_failure, plan, recorder
from flows.schedule import LAST, verb


def run_graph(runner: DvcRunner) -> Outcome:
    """Run what is stale; the output of DVC is shown as it is."""
    outcome = plan(runner)
    with recorder(runner, outcome):
        failed = bool(outcome.todo) and runner.run_all(print) != 0
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
