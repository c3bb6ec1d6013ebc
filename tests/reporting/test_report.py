"""The verb itself, run as DVC runs it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stages.reporting.readme import BEGIN, END

from . import factory
from .conftest import REPOSITORY, Run


def verb(run: Run, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m stages.report` in the folder of a run, tracking off."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "EUGEN_TRACKING": "off", "COLUMNS": "200"}
    command = [sys.executable, "-m", "stages.report", *arguments]
    return subprocess.run(
        command, cwd=run.root, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_report_writes_page_table_and_figures(run: Run):
    run.cells(factory.all_cells()[:8])
    run.fail(factory.failure("vision", None, stage="baseline"))
    done = verb(run)
    assert done.returncode == 0, done.stderr
    reports = run.root / "reports"
    assert "8 cells finished, 8 without" in done.stdout
    assert "loss is NaN at step 3" in (reports / "report.html").read_text()
    assert len((reports / "results.csv").read_text().splitlines()) == 1 + 2 * 8
    assert {path.suffix for path in (reports / "figures").iterdir()} == {".svg", ".json"}


def test_corrupt_record_stops_the_report_and_leaves_the_old_one(run: Run):
    run.cells(factory.all_cells())
    (run.root / "results" / "cells" / "vision-prune.json").write_text("{")
    (run.root / "reports" / "report.html").write_text("old")
    done = verb(run)
    assert done.returncode == 1
    assert "vision-prune.json: not a valid CellRecord" in done.stderr
    assert "Traceback" not in done.stderr
    assert (run.root / "reports" / "report.html").read_text() == "old"


@pytest.mark.parametrize("drifted", [False, True])
def test_check_fails_exactly_on_drift(run: Run, drifted: bool):
    readme = run.root / "README.md"
    readme.write_text(f"{BEGIN.format('table')}\n{END.format('table')}\n")
    run.commit(factory.all_cells())
    assert verb(run, "--readme").returncode == 0
    if drifted:
        readme.write_text(readme.read_text().replace("± 0.0", "± 0.1"))
    done = verb(run, "--check")
    assert done.returncode == int(drifted), done.stderr
    assert ("run `python -m stages.report --readme`" in done.stderr) == drifted
