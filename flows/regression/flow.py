"""Is this commit slower, larger or worse than another? The regression measurement as a Prefect flow.

How a run ends, as the flow run's state: pass: Completed. fail and wrong usage: Failed. inconclusive: a failed
state with the name Inconclusive. void: one with the name Void; so does whatever breaks on the way. Whatever
is no pass is red in Prefect. A run that a worker began is also told of when it cannot measure.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State, StateType
from prefect.events import emit_event
from prefect.logging.handlers import APILogHandler
from prefect.runtime import deployment

from flows import clone
from flows.clone import WrongParameters
from flows.dvc.repair import wait_for_other_dvc
from flows.dvc.runner import DvcRunner, StageFailed
from flows.machine import devices
from flows.machine.programs import answer, run
from flows.prefect.flow_runs import close_killed, tag
from flows.prefect.life import signs_of_life
from flows.regression import verdict_page
from flows.regression.measurement import ALIAS_NOT_SET, measure, void
from flows.run import LOG, REPORT_TIMEOUT_S, UPLOAD_S, new_run_id, say
from flows.schedule import LAST

BASELINE, PARENT = "@baseline", "HEAD~1"
"""The base, unless one is named: what the alias points at; without it the commit before."""
EVENT = "eugen.regression"
"""Events are `eugen.regression.<verdict>`, their resources `eugen.regression.<fingerprint of the host>`."""
VERDICTS = {"Completed": "pass", "Failed": "fail", "Inconclusive": "inconclusive", "Void": "void"}
"""By the name of the flow run's state."""

if not any(isinstance(handler, APILogHandler) for handler in LOG.handlers):
    LOG.addHandler(APILogHandler())


@flow(name="regression", persist_result=False)
def regression(
    project: str | None = None,
    base: str | None = None,
    cases: list[str] | None = None,
    inject: float = 0.0,
    seconds: float | None = None,
) -> State[Any]:
    """Measure the working tree of `project`, by default this clone, against `base`.

    `base` is a git ref or the alias `@name` of one. `cases` names some of the measurement's cases, `seconds`
    bounds the time of each, `inject` slows the candidate down by that share, to see the alarm work. The state
    that it returns is described above. Raises `WrongParameters` before any work.
    """
    folder = clone.own_clone(project)
    arguments = ["--cases", ",".join(cases)] if cases else []
    arguments += ["--inject", f"{inject:g}"] if inject else []
    arguments += ["--seconds", f"{seconds:g}"] if seconds else []
    try:
        tag(folder)
        with signs_of_life(), clone.held(folder, say):
            record = judge(folder, base, arguments)
    except WrongParameters as error:
        if deployment.id:  # nobody looks at a terminal
            tell(void(str(error)))
        raise
    except Exception as error:  # of whatever kind: an alarm that cannot ring must not look like silence
        record = void(f"{type(error).__name__}: {error}")
        tell(record)
    return state_of(record)


def judge(project: Path, base: str | None, arguments: list[str]) -> dict[str, Any]:
    """Measure, tell the verdict, and enter it into MLflow and the report; returns the record."""
    run_id = os.environ.get("EUGEN_PIPELINE_RUN") or new_run_id()
    close_killed(project, say)
    wait_for_other_dvc(project, say)
    arguments = ["--base", resolve(project, base), *arguments]
    with devices.cpu_alone("regression", say):
        record = measure(project, arguments, say, run_id)
    tell(record)
    mirror(project, record, run_id)
    refresh_report(project, run_id)
    return record


def resolve(project: Path, base: str | None) -> str:
    """The git ref that `base` means. Raises `WrongParameters` for an alias that is not to be had."""
    if base is not None and not base.startswith("@"):
        return base
    if not (project / "stages" / "tracking" / "baseline.py").exists():
        if base is None:
            return PARENT
        raise WrongParameters(f"base {base!r}: this project keeps no aliases; name a git ref")
    code, commit, complaint = answer(project, "stages.tracking.baseline", "get", base or BASELINE)
    if code == 0:
        say(f"base: {base or BASELINE} is {commit}")
        return commit
    if base is None and code == ALIAS_NOT_SET:
        say(f"base: {PARENT}, because {complaint}")
        return PARENT
    # Without an answer the commit before is no stand-in: the user may have set the alias to another one.
    raise WrongParameters(f"base {base or BASELINE}: {complaint}")


def tell(record: dict[str, Any]) -> None:
    """The verdict as a line, an artifact and an event."""
    line = verdict_page.headline(record)
    say(line)
    create_markdown_artifact(verdict_page.page(record), key="regression", description=line)
    host = record.get("host", {"fingerprint": "unknown", "processor": "an unknown host"})
    emit_event(
        event=f"{EVENT}.{record['verdict']}",
        resource={
            "prefect.resource.id": f"{EVENT}.{host['fingerprint']}",
            "prefect.resource.name": f"regressions on {host['processor']}",
            "eugen.verdict": record["verdict"],
        },
        payload={
            "message": line,
            "verdict": record["verdict"],
            "reason": record["reason"],
            "base": record.get("base"),
            "candidate": record.get("candidate"),
            "injected": record.get("injected", 0.0),
            "cases": {case["name"]: case["verdict"] for case in record["cases"]},
            "file": record["file"],
        },
    )


def mirror(project: Path, record: dict[str, Any], run_id: str) -> None:
    """Send the record to MLflow; whatever goes wrong there is said, and changes no verdict."""
    program = project / "stages" / "tracking" / "regression.py"
    if record["file"] is None or not program.exists() or os.environ.get("EUGEN_TRACKING") == "off":
        return
    code, _ = run(
        project, "stages.tracking.regression", [record["file"]], say, run_id, timeout_s=2 * UPLOAD_S
    )
    if code != 0:
        say("MLflow has no run of this regression: its record is not lost, see the lines above")


def refresh_report(project: Path, run_id: str) -> None:
    """Enter the regression into the report, if there is one; a report that fails changes no verdict."""
    if not (project / "reports" / "report.html").exists():
        return
    try:
        DvcRunner(project, run_id, say).run_stage(LAST, timeout_s=REPORT_TIMEOUT_S, say=say)
    except StageFailed as error:
        say(f"the report does not show this regression: {error.reason}")


def state_of(record: dict[str, Any]) -> State[Any]:
    """The flow run's state, by the verdict."""
    names = {verdict: name for name, verdict in VERDICTS.items()}
    kind = StateType.COMPLETED if record["verdict"] == "pass" else StateType.FAILED
    return State(type=kind, name=names[record["verdict"]], message=verdict_page.headline(record))
