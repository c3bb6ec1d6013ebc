"""`python -m stages.tracking.regression RECORD`: mirror a regression's record to MLflow as one run.

As with the stages, a journal is written first: without a server it waits in the outbox.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import typer

from stages.tracking import Run, stage_run
from stages.tracking.regression_record import Case, RecordFault, Regression, read
from stages.tracking.run import digest


def metrics(case: Case) -> Iterator[tuple[str, float]]:
    """The numbers of one case, by names that MLflow takes."""
    name = re.sub(r"[^\w\-. ]", "_", case.name)[:150]
    if case.latency is not None:
        for key in ("ratio", "low", "high", "pairs", "base_ms", "candidate_ms"):
            yield f"{name}/{key}", getattr(case.latency, key)
    if case.control is not None:
        for key in ("ratio", "low", "high"):
            yield f"{name}/control_{key}", getattr(case.control, key)
    if case.quality is not None:
        for key in ("difference", "low", "high"):
            yield f"{name}/quality_{key}", getattr(case.quality, key)
    for key, (base, candidate) in case.exact.items():
        if base is not None and candidate is not None:
            yield f"{name}/{re.sub(r'[^a-z_]', '_', key)}_difference", candidate - base


def write_samples(record: Regression, path: Path) -> None:
    """The paired log ratios of every case as CSV: case, pair, log_ratio."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["case", "pair", "log_ratio"])
        for case in record.cases:
            samples = case.latency.log_ratios if case.latency else []
            rows.writerows((case.name, pair, value) for pair, value in enumerate(samples))


def describe(run: Run, record: Regression) -> None:
    """Tags that runs are found by, and the numbers."""
    tags = {
        "git_commit": record.candidate.commit,
        "base": record.base.ref,
        "base_commit": record.base.commit,
        "verdict": record.verdict,
        "reason": record.reason,
        "host": record.host.fingerprint,
        "dirty": str(record.candidate.dirty).lower(),
        "injected": f"{record.injected:g}",
        "measured": record.time.isoformat(),
    }
    for key, value in tags.items():
        run.tag(key, value)
    for case in record.cases:
        run.tag(f"verdict.{re.sub(r'[^-A-Za-z0-9_./ ]', '_', case.name)[:150]}", case.verdict)
        run.metrics(dict(metrics(case)))
    run.metrics({"seconds": record.seconds})


def main(path: Path) -> None:
    """Mirror one record. Exit codes: 0 (delivered or kept for later), 2 if it is no record."""
    try:
        record = read(path)
    except RecordFault as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    params = {"base": record.base.ref, "cases": [case.name for case in record.cases], "file": path.name}
    # The samples are read when the run is delivered, which is at the end of its block.
    with TemporaryDirectory(prefix="eugen-regression-") as folder:
        samples = Path(folder) / "log_ratios.csv"
        write_samples(record, samples)
        with stage_run("regression", task="all", params=params, work_key=digest(path.read_text())) as run:
            describe(run, record)
            run.artifact(path, folder="regression")
            run.artifact(samples, folder="regression")


if __name__ == "__main__":
    typer.run(main)
