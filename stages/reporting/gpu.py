"""The ledger's goals on a GPU, from the committed records of `make gpu-check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu_check.record import FOLDER, read
from benchmarks.gpu_check.verdicts import NOT_MEASURED, Verdict, verdicts
from stages.reporting import text
from stages.reporting.faults import ReportError
from stages.reporting.markdown import table

COMMAND = "`make gpu-check`"
OPEN = f"needs a GPU: {COMMAND}"


def goals() -> list[str]:
    """The lines of a table: every goal on each GPU that has a record, or that it is open.

    Raises:
        ReportError: a record that is none.
    """
    rows = []
    for record in _newest() or [None]:
        where, provisional = _where(record)
        for verdict in verdicts(record):
            rows.append([verdict.what, f"≥ {verdict.goal:g}", *_answer(verdict, where, provisional)])
    return table(["goal", "least", "ours", "conditions", "verdict"], rows)


def _answer(verdict: Verdict, where: str, provisional: bool) -> list[str]:
    if verdict.verdict == NOT_MEASURED:
        return [text.NONE, where or OPEN, "open"]
    if provisional:
        return [text.NONE, f"{where}; the code had changes: {COMMAND} from a clean commit", "open"]
    return [verdict.said, where, verdict.verdict]


def _where(record: dict[str, Any] | None) -> tuple[str, bool]:
    """Device, date and commit, and whether the code was no commit's."""
    if record is None:
        return "", False
    found = record["environment"]
    torch = f"torch {found['versions']['torch']}"
    return f"{found['accelerator']}, {torch}, {record['date']}, {found['commit'][:10]}", found["dirty"]


def _newest() -> list[dict[str, Any]]:
    """Of each GPU the last record at full size."""
    newest: dict[str, dict[str, Any]] = {}
    for path in sorted(Path(FOLDER).glob("*.json")):
        try:
            record = read(path)
        except ValueError as error:
            raise ReportError(f"{error}; restore it with `git checkout -- {path}`") from error
        name = record["environment"]["accelerator"]
        if not record["quick"] and name and (name not in newest or record["date"] >= newest[name]["date"]):
            newest[name] = record
    return list(newest.values())
