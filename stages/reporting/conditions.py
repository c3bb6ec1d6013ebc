"""Tables of what stands behind the numbers: machines, versions, hashes, parameters, and what was left out."""

from __future__ import annotations

from statistics import median

from stages.reporting import text
from stages.reporting.tables import Table
from stages.tracking.record import CellRecord, NotApplicable, ScratchRecord

Measured = CellRecord | ScratchRecord
UNUSED = "no variant of the task trained this row"


def name_of(record: Measured) -> str:
    """`task / method`, or `task / row, from scratch`."""
    if isinstance(record, ScratchRecord):
        return f"{record.task} / {record.row}, from scratch"
    return f"{record.task} / {record.method}"


def not_applicable(records: list[Measured], cells: list[NotApplicable]) -> Table:
    """Cells, rows and budgets without a number, because they would mean nothing."""
    rows = [[f"{cell.task} / {cell.method}", "all", cell.not_applicable] for cell in cells]
    for record in records:
        name = name_of(record)
        if isinstance(record, ScratchRecord) and (record.not_applicable or not record.runs):
            rows.append([name, "all", record.not_applicable or UNUSED])
        rows += [[name, f"{omission.budget:g}", omission.reason] for omission in record.omitted]
    caption = "Rows that have no meaning for a task, and budgets that buy nothing of a row: not failures."
    return Table(caption, ["cell", "budget", "reason"], rows, labels=3)


def machines(records: list[Measured]) -> Table:
    """Every distinct machine and commit, with the cells that ran there."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for record in records:
        e = record.environment
        commit = e.commit[:12] + (" + uncommitted changes" if e.dirty else "")
        key = (
            e.processor,
            str(e.cores),
            f"{e.memory_gb:.1f}",
            e.accelerator or "none",
            commit,
            e.fingerprint,
        )
        rows.setdefault(key, []).append(name_of(record).replace(" / ", "/"))
    columns = ["processor", "cores", "memory, GB", "accelerator", "commit", "fingerprint", "cells"]
    body = [[*key, str(len(cells)) if len(rows) == 1 else text.listing(cells)] for key, cells in rows.items()]
    return Table("Where the numbers were made.", columns, body)


def versions(records: list[Measured]) -> Table:
    """Package versions, all that occur."""
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record.environment.versions.items():
            found.setdefault(package, set()).add(version)
    rows = [[package, text.listing(sorted(found[package]))] for package in sorted(found)]
    return Table("Versions.", ["package", "version"], rows)


def hashes(records: list[Measured]) -> Table:
    """SHA-256 of data and weights, shortened for reading."""
    rows = []
    for record in records:
        weights = {} if isinstance(record, ScratchRecord) else record.weights_sha256
        own = record.row + ", from scratch" if isinstance(record, ScratchRecord) else record.method
        for kind, named in (("data", record.data_sha256), ("weights", weights)):
            rows += [[record.task, own, kind, name, digest[:16]] for name, digest in named.items()]
    return Table(
        "First 16 digits of SHA-256 of data and weights.",
        ["task", "method", "kind", "name", "sha256"],
        rows,
        5,
    )


def overheads(records: list[CellRecord]) -> Table:
    """Seconds of each stage that were not its own work."""
    found: dict[str, list[float]] = {}
    for record in records:
        for stage, value in record.stage_overhead_seconds.items():
            found.setdefault(stage, []).append(value)
    rows = [[s, str(len(v)), text.number(median(v)), text.number(max(v))] for s, v in found.items()]
    caption = "Seconds of each stage spent on import, tracking and start-up."
    return Table(caption, ["stage", "runs", "median", "most"], rows)


def differences(here: dict[str, str], there: dict[str, str]) -> Table:
    """Parameters that differ between this run and the `study` profile."""
    keys = [key for key in {**there, **here} if here.get(key) != there.get(key)]
    rows = [[key, here.get(key, text.NONE), there.get(key, text.NONE)] for key in keys]
    return Table("What the study profile does otherwise.", ["parameter", "this run", "study"], rows, 3)
