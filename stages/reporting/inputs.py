"""What the report reads: params.yaml, the cells' records and the notes of failed cells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from stages.reporting.faults import ReportError
from stages.reporting.pictures import Picture, read_pictures
from stages.tracking.record import (
    SCHEMA_VERSION,
    CellRecord,
    Failure,
    NotApplicable,
    Record,
    ScratchRecord,
)
from stages.tracking.regression_record import FOLDER as REGRESSIONS
from stages.tracking.regression_record import Regression
from stages.tracking.regression_record import read_all as read_regressions

DENSE = "dense"
"""The row that every other row is measured against."""
SCRATCH = "scratch"
"""The stage, the section of params.yaml and the folders of rows trained from scratch."""
_RESTORE = "restore it with `git checkout -- {}`"
_R = TypeVar("_R", bound=Record)


@dataclass(frozen=True)
class Inputs:
    """All that a report is made of, cells in the order of params.yaml."""

    params: dict[str, Any]
    records: list[CellRecord]
    failures: list[Failure] = field(default_factory=list)
    study: dict[str, Any] | None = None
    """The `study` profile's parameters, to say what it would add; None where it is not at hand."""
    inapplicable: list[NotApplicable] = field(default_factory=list)
    """Cells that have no meaning; neither finished nor failed."""
    scratch: list[ScratchRecord] = field(default_factory=list)
    """Rows trained from scratch, in the order of params.yaml; those without a meaning say why."""
    scratch_failures: list[Failure] = field(default_factory=list)
    """Rows trained from scratch that have no record; `method` names the row."""
    pictures: list[Picture] = field(default_factory=list)
    regressions: list[Regression] = field(default_factory=list)
    """Comparisons of commits on any machine, newest first."""
    regression_faults: list[str] = field(default_factory=list)
    """Files beside them that are no such record, and why."""

    @property
    def tasks(self) -> list[str]:
        """Tasks that have at least one record of either part."""
        found = [record.task for record in self.records]
        return list(dict.fromkeys(found + [record.task for record in self.scratch if record.runs]))

    @property
    def methods(self) -> list[str]:
        """Methods of all records, in order of first appearance."""
        return list(dict.fromkeys(record.method for record in self.records))

    def of_task(self, task: str) -> list[CellRecord]:
        """The records of one task."""
        return [record for record in self.records if record.task == task]

    def scratch_of(self, task: str) -> list[ScratchRecord]:
        """The rows of one task that were trained from scratch."""
        return [record for record in self.scratch if record.task == task and record.runs]


def read_params(path: Path) -> dict[str, Any]:
    """Read a parameter file. Raises ReportError if it is missing or not a parameter file."""
    try:
        params = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(
            f"{path}: cannot be read ({error.strerror}); run from the repository root"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReportError(f"{path}: not valid YAML ({_one_line(error)}); restore it from params/") from error
    sections = ("tasks", "methods")
    if not isinstance(params, dict) or not all(isinstance(params.get(name), dict) for name in sections):
        raise ReportError(f"{path}: lacks the sections tasks and methods; restore it from params/")
    return params


def read_record(path: Path, kind: type[_R], cure: str) -> _R:
    """Read one validated record. Raises ReportError naming the file, the fault and the cure."""
    try:
        record = kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}); {cure}") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"]) or "the file"
        raise ReportError(f"{path}: not a valid {kind.__name__} ({where}: {fault['msg']}); {cure}") from error
    version = getattr(record, "schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ReportError(f"{path}: schema version {version}, this code reads {SCHEMA_VERSION}; {cure}")
    return record


def read_cell(path: Path, task: str, method: str, cure: str) -> CellRecord | NotApplicable:
    """Read the record of a named cell. Raises ReportError also if it is some other cell's."""
    record = read_record(path, NotApplicable if _says_not_applicable(path) else CellRecord, cure)
    if (record.task, record.method) != (task, method):
        raise ReportError(
            f"{path}: holds the cell {record.task}/{record.method}, not {task}/{method}; {cure}"
        )
    return record


def _says_not_applicable(path: Path) -> bool:
    """Which of the two records a cell's file is; a broken file is left to the reader of whole records."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "not_applicable" in content


def read_run(root: Path) -> Inputs:
    """Read what the current run left under `root`: a record or a reason for every cell of params.yaml."""
    params = read_params(root / "params.yaml")
    notes = read_failures(root / "results" / "failures")
    records, failures, inapplicable = [], [], []
    for task in params["tasks"]:
        for method in params["methods"]:
            outcome = _outcome(root, params, notes, task, method)
            if isinstance(outcome, Failure):
                failures.append(outcome)
            elif isinstance(outcome, NotApplicable):
                inapplicable.append(outcome)
            else:
                records.append(outcome)
    study = root / "params" / "study.yaml"
    known = read_params(study) if study.is_file() else None
    outcomes = [_scratch_outcome(root, params, notes, task, row) for task, row in scratch_rows(params)]
    scratch = [outcome for outcome in outcomes if isinstance(outcome, ScratchRecord)]
    missing = [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    pictures = read_pictures(root / "results" / "pictures", records)
    regressions, faults = read_regressions(root / REGRESSIONS)
    return Inputs(
        params, records, failures, known, inapplicable, scratch, missing, pictures, regressions, faults
    )


def scratch_rows(params: dict[str, Any]) -> list[tuple[str, str]]:
    """(task, row) of everything that is trained from scratch; none where params.yaml has no such section."""
    section = params.get(SCRATCH) or {}
    rows, tasks = section.get("rows") or {}, section.get("tasks") or {}
    return [(task, row) for task in tasks for row in rows]


def read_failures(folder: Path) -> list[Failure]:
    """Read the notes of failed stages."""
    cure = "delete it and run the report again"
    return [read_record(path, Failure, cure) for path in sorted(folder.glob("*.json"))]


def read_committed(root: Path) -> list[CellRecord]:
    """Read reports/records/<task>/<method>.json, sorted by path; cells that do not apply hold no numbers."""
    return [cell for cell in _committed(root / "reports" / "records") if isinstance(cell, CellRecord)]


def read_committed_scratch(root: Path) -> list[ScratchRecord]:
    """Read reports/records/scratch/<task>/<row>.json, sorted by path; rows without a meaning are left out."""
    folder = root / "reports" / "records" / SCRATCH
    found = [
        read_scratch(path, path.parent.name, path.stem, _RESTORE.format(path))
        for path in sorted(folder.glob("*/*.json"))
    ]
    return [record for record in found if record.runs]


def _committed(folder: Path) -> Iterator[CellRecord | NotApplicable]:
    for path in sorted(folder.glob("*/*.json")):
        yield read_cell(path, path.parent.name, path.stem, _RESTORE.format(path))


def read_scratch(path: Path, task: str, row: str, cure: str) -> ScratchRecord:
    """Read the record of a named row. Raises ReportError also if it is some other row's."""
    record = read_record(path, ScratchRecord, cure)
    if (record.task, record.row) != (task, row):
        raise ReportError(f"{path}: holds the row {record.task}/{record.row}, not {task}/{row}; {cure}")
    return record


def _outcome(
    root: Path, params: dict, notes: list[Failure], task: str, method: str
) -> CellRecord | NotApplicable | Failure:
    """A failed stage wins over a record: DVC leaves the last run's record in place when a cell fails."""
    for note in notes:
        if note.task == task and note.method in (None, method) and note.stage != SCRATCH:
            return note.model_copy(update={"method": method})
    path = root / "results" / "cells" / f"{task}-{method}.json"
    name = path.relative_to(root).as_posix()
    if not path.is_file():
        return _missing(task, method, f"{name} does not exist: the cell has not run; run `dvc repro`")
    record = read_cell(path, task, method, f"delete it and run `dvc repro profile@{task}-{method}`")
    profile = params.get("profile", record.profile)
    if record.profile != profile:
        reason = f"{name} is left over from profile {record.profile}, this run is {profile}; run `dvc repro`"
        return _missing(task, method, reason)
    return record


def _scratch_outcome(
    root: Path, params: dict[str, Any], notes: list[Failure], task: str, row: str
) -> ScratchRecord | Failure:
    """Of the stages before it, training from scratch needs the data alone."""
    for note in notes:
        if note.task == task and (note.stage, note.method) in (
            (SCRATCH, row),
            (SCRATCH, None),
            ("prepare", None),
        ):
            return note.model_copy(update={"method": row})
    path = root / "results" / SCRATCH / f"{task}-{row}.json"
    name = path.relative_to(root).as_posix()
    if not path.is_file():
        reason = f"{name} does not exist: the row has not been trained; run `dvc repro`"
        return _missing(task, row, reason, SCRATCH)
    record = read_scratch(path, task, row, f"delete it and run `dvc repro {SCRATCH}@{task}-{row}`")
    profile = params.get("profile", record.profile)
    if record.profile != profile:
        reason = f"{name} is left over from profile {record.profile}, this run is {profile}; run `dvc repro`"
        return _missing(task, row, reason, SCRATCH)
    return record


def _missing(task: str, method: str, reason: str, stage: str = "–") -> Failure:
    return Failure(stage=stage, task=task, method=method, error=reason, traceback="", time="")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
