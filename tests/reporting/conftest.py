"""A made-up run on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

from stages.reporting import drawing
from stages.tracking.record import CellRecord, Failure, ScratchRecord, write_record

from . import factory

REPOSITORY = Path(__file__).parents[2]


class Run:
    """A folder that looks like a repository after `dvc repro`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "reports").mkdir()
        for name in ("reports/template.html", "reports/benchmarks/transfer-levels.json", "docs/transfer.md"):
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(REPOSITORY / name, root / name)
        self.params(factory.params())

    def params(self, params: dict) -> None:
        """Write params.yaml."""
        (self.root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def cells(self, records: Iterable[CellRecord]) -> None:
        """Write records where the profile stage does."""
        for record in records:
            write_record(self.root / "results" / "cells" / f"{record.task}-{record.method}.json", record)

    def scratch(self, records: Iterable[ScratchRecord]) -> None:
        """Write records where the stage `scratch` does."""
        for record in records:
            write_record(self.root / "results" / "scratch" / f"{record.task}-{record.row}.json", record)

    def fail(self, failure: Failure) -> None:
        """Write a failure where a stage does."""
        cell = f"{failure.task}-{failure.method or 'all'}.json"
        name = f"scratch-{cell}" if failure.stage == "scratch" else cell
        write_record(self.root / "results" / "failures" / name, failure)

    def commit(self, records: Iterable[CellRecord]) -> None:
        """Write records where those of the study profile are committed."""
        for record in records:
            write_record(self.root / "reports" / "records" / record.task / f"{record.method}.json", record)

    def commit_scratch(self, records: Iterable[ScratchRecord]) -> None:
        """Write records where those of trainings from scratch are committed."""
        folder = self.root / "reports" / "records" / "scratch"
        for record in records:
            write_record(folder / record.task / f"{record.row}.json", record)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """An empty run with the parameters of both made-up tasks."""
    return Run(tmp_path)


@pytest.fixture
def no_svg(monkeypatch: pytest.MonkeyPatch):
    """Specification and caption without the drawing, which takes the time."""
    monkeypatch.setattr(drawing, "_draw", lambda spec, name: "<svg/>")
