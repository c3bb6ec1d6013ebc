"""Tables of what stands behind the numbers: machines, versions, hashes, parameters, and what was left out."""

from __future__ import annotations

from statistics import median

from stages.reporting import text
from stages.reporting.tables import Table
from stages.tracking.record import CellRecord, NotApplicable


def not_applicable(records: list[CellRecord], cells: list[NotApplicable]) -> Table:
    """Cells and budgets without a number, because they would mean nothing."""
    rows = [[f"{cell.task} / {cell.method}", "all", cell.not_applicable] for cell in cells]
    for record in records:
        name = f"{record.task} / {record.method}"
        rows += [[name, f"{omission.budget:g}", omission.reason] for omission in record.omitted]
    caption = "Rows that have no meaning for a task, and budgets that buy nothing of a row: not failures."
    return Table(caption, ["cell", "budget", "reason"], rows, labels=3)


def machines(records: list[CellRecord]) -> Table:
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
        rows.setdefault(key, []).append(f"{record.task}/{record.method}")
    columns = ["processor", "cores", "memory, GB", "accelerator", "commit", "fingerprint", "cells"]
    body = [[*key, str(len(cells)) if len(rows) == 1 else text.listing(cells)] for key, cells in rows.items()]
    return Table("Where the numbers were made.", columns, body)


def versions(records: list[CellRecord]) -> Table:
    """Package versions, all that occur."""
    found: dict[str, set[str]] = {}
    for record in records:
        for package, version in record.environment.versions.items():
            found.setdefault(package, set()).add(version)
    rows = [[package, text.listing(sorted(found[package]))] for package in sorted(found)]
    return Table("Versions.", ["package", "version"], rows)


def hashes(records: list[CellRecord]) -> Table:
    """SHA-256 of data and weights, shortened for reading."""
    rows = []
    for record in records:
        for kind, named in (("data", record.data_sha256), ("weights", record.weights_sha256)):
            rows += [[record.task, record.method, kind, name, digest[:16]] for name, digest in named.items()]
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
