"""reports/report.html: everything a reader needs, in one file that asks nothing of the network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment as Templates
from jinja2 import FileSystemLoader, StrictUndefined
from markupsafe import Markup

from stages.reporting import conditions, pictures, regression_trends, regressions, tables, verdicts
from stages.reporting.drawing import Figure
from stages.reporting.inputs import Inputs, ReportError
from stages.reporting.intervals import budgets
from stages.reporting.scratch import runs
from stages.reporting.scratch import table as scratch_table
from stages.reporting.scratch import tables as scratch_tables
from stages.reporting.scratch import verdicts as scratch_verdicts
from stages.reporting.scratch.figures import PART
from stages.reporting.table import COLUMNS, is_provisional
from stages.tracking.record import CellRecord


def render(inputs: Inputs, figures: list[Figure], template: Path) -> str:
    """The page. Every name and message is escaped; only the project's own SVG is not."""
    if not template.is_file():
        raise ReportError(f"{template}: missing; restore it with `git checkout -- {template}`")
    templates = Templates(
        loader=FileSystemLoader(template.parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    measured: list[conditions.Measured] = [*inputs.records, *inputs.scratch]
    trained = sum(bool(record.runs) for record in inputs.scratch)
    return templates.get_template(template.name).render(
        profile=inputs.params.get("profile", "unknown"),
        cells=len(inputs.records) + len(inputs.failures),
        inapplicable=len(inputs.inapplicable) + len(inputs.scratch) - trained,
        trained=trained,
        trainings=trained + len(inputs.scratch_failures),
        omissions=conditions.not_applicable(measured, inputs.inapplicable),
        finished=len(inputs.records),
        provisional=provisional_reasons(inputs),
        tasks=[_task(inputs, figures, task) for task in inputs.tasks],
        failures=inputs.failures + inputs.scratch_failures,
        overview=tables.all_rows(inputs.records),
        machines=conditions.machines(measured),
        mixed=mixed_environments(measured),
        versions=conditions.versions(measured),
        data=conditions.hashes(measured),
        overheads=conditions.overheads(inputs.records),
        regressions=_regressions(inputs, figures),
        study=_study(inputs),
        glossary=COLUMNS | scratch_table.COLUMNS if trained else COLUMNS,
        parameters=yaml.safe_dump(inputs.params, sort_keys=False, allow_unicode=True),
    )


def provisional_reasons(inputs: Inputs) -> list[str]:
    """Why rows of this report may not be quoted; empty if all may."""
    records = inputs.records
    rows = [(record, budget) for record in records for budget in budgets(record)]
    trained = [cell for task in inputs.tasks for cell in scratch_tables.cells(inputs.scratch_of(task))]
    marked = sum(is_provisional(*row) for row in rows) + sum(runs.is_provisional(*cell) for cell in trained)
    if not marked:
        return []
    said = [f"{marked} of {len(rows) + len(trained)} rows are provisional."]
    if any(record.environment.dirty for record in [*records, *inputs.scratch]):
        said.append("The source tree held changes that were not committed.")
    single = sum(len({r.seed for r in record.seeds if r.budget == budget}) < 2 for record, budget in rows)
    single += sum(len(runs.scores(*cell)) < 2 for cell in trained)
    tuned_once = sum(_fine_tuned_once(record, budget) for record, budget in rows)
    if single:
        said.append(f"{single} of them rest on a single seed.")
    if tuned_once:
        said.append(f"{tuned_once} of them were fine-tuned with a single seed.")
    if inputs.params.get("run", {}).get("provisional"):
        said.append(f"The sizes of profile {inputs.params.get('profile')} are too small to conclude from.")
    return said


def mixed_environments(records: list[conditions.Measured]) -> str:
    """A warning if the cells were not measured by one commit on one kind of machine."""
    machines = {record.environment.fingerprint for record in records}
    commits = {record.environment.commit for record in records}
    if len(machines) <= 1 and len(commits) <= 1:
        return ""
    return (
        f"Cells come from {len(machines)} kinds of machine and {len(commits)} commits. A speed-up compares "
        "two networks in one process, so each row stands; comparing rows of different machines does not."
    )


def _fine_tuned_once(record: CellRecord, budget: float) -> bool:
    results = [result for result in record.seeds if result.budget == budget]
    return len(results) > 1 and sum(result.quality_finetuned is not None for result in results) == 1


def _task(inputs: Inputs, figures: list[Figure], task: str) -> dict[str, Any]:
    records, scratch = inputs.of_task(task), inputs.scratch_of(task)
    drawn = _drawn(f for f in figures if f.task == task)
    return {
        "name": task,
        "headline": verdicts.headline(inputs, task) + (scratch_verdicts.headline(scratch) if scratch else []),
        "control": verdicts.control(records) if records else [],
        "figures": [item for item in drawn if item["figure"].part != PART],
        "tables": list(tables.of_task(records)),
        "pictures": pictures.by_name(inputs.pictures, task),
        "scratch": _scratch(inputs, task, [item for item in drawn if item["figure"].part == PART]),
    }


def _drawn(figures: Iterable[Figure]) -> list[dict[str, Any]]:
    return [{"figure": figure, "svg": Markup(figure.svg)} for figure in figures]


def _regressions(inputs: Inputs, figures: list[Figure]) -> dict[str, Any] | None:
    """The section on regressions; None where nothing was ever compared."""
    found = regressions.section(inputs)
    return found and found | {"figures": _drawn(f for f in figures if f.part == regression_trends.PART)}


def _scratch(inputs: Inputs, task: str, drawn: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The part of a task's section on training from scratch; None where nothing was."""
    records = inputs.scratch_of(task)
    failed = [failure for failure in inputs.scratch_failures if failure.task == task]
    if not records:
        return None
    told, more = scratch_verdicts.sentences(records)
    return {
        "sentences": told,
        "more": more,
        "failed": [failure.method for failure in failed],
        "figures": drawn,
        "tables": list(scratch_tables.of_task(records)),
    }


def _study(inputs: Inputs) -> tables.Table | None:
    """What the `study` profile does beyond this one; None if this is it, or if it is not at hand."""
    if inputs.study is None or inputs.params.get("profile") == inputs.study.get("profile"):
        return None
    here, there = dict(_flatten(inputs.params)), dict(_flatten(inputs.study))
    return conditions.differences(here, there)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, str(value)
