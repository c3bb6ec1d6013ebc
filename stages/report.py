"""Stage `report`: everything that was measured, as results.csv, scratch.csv, figures and one HTML page.

`--readme` writes the README's table and reports/ledger.md from the committed records instead;
`--check` fails if either has drifted from them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from stages.reporting import readme as committed
from stages.reporting.inputs import Inputs, ReportError, read_run
from stages.tracking.whole_file import write_text

ROOT = Path()
"""Stages run in the repository root."""


def main(
    readme: Annotated[
        bool, typer.Option(help="Write README table and ledger from reports/records/.")
    ] = False,
    check: Annotated[bool, typer.Option(help="Fail if README table or ledger drifted.")] = False,
) -> None:
    """Make the report of the current run, or keep the README's numbers true."""
    try:
        if check:
            _check()
        elif readme:
            for path, text in committed.generate(ROOT).items():
                write_text(path, text)
                print(f"wrote {path}")
        else:
            report()
    except ReportError as error:
        print(f"report: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


def report() -> None:
    """Write the page, both tables and the figures of the current run to reports/, mirrored to MLflow."""
    from stages.tracking import stage_run

    with stage_run("report", task="all", method=None, params={}) as run:
        inputs = read_run(ROOT)
        written = build(inputs, ROOT / "reports")
        for path in written:
            run.artifact(path, folder="report/figures" if path.suffix == ".svg" else "report")
        finished, failed, none = len(inputs.records), len(inputs.failures), len(inputs.inapplicable)
        run.metrics({"cells_finished": finished, "cells_failed": failed, "cells_not_applicable": none})
        tail = f", {none} do not apply" if none else ""
        if inputs.scratch or inputs.scratch_failures:
            trained, lost = sum(bool(r.runs) for r in inputs.scratch), len(inputs.scratch_failures)
            run.metrics({"scratch_finished": trained, "scratch_failed": lost})
            tail += f"; from scratch {trained} rows trained, {lost} without"
        print(f"reports/report.html: {finished} cells finished, {failed} without{tail}")


def build(inputs: Inputs, folder: Path) -> list[Path]:
    """Write table, figures and page under `folder`; returns what a reader opens: all but the specs."""
    from stages.reporting.figures import figures
    from stages.reporting.page import render
    from stages.reporting.scratch.table import results as scratch_results
    from stages.reporting.table import results, to_csv

    drawn = figures(inputs)
    page = render(inputs, drawn, folder / "template.html")
    wanted = {f"{figure.name}.json": figure.spec for figure in drawn}
    wanted |= {f"{figure.name}.svg": figure.svg + "\n" for figure in drawn}
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for old in (folder / "figures").iterdir():
        if old.suffix in (".json", ".svg") and old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        write_text(folder / "figures" / name, text)
    write_text(folder / "results.csv", to_csv(results(inputs.records)))
    trained = [record for task in inputs.tasks for record in inputs.scratch_of(task)]
    write_text(folder / "scratch.csv", to_csv(scratch_results(trained)))
    write_text(folder / "report.html", page)
    drawings = [folder / "figures" / name for name in wanted if name.endswith(".svg")]
    return [*(folder / name for name in ("results.csv", "scratch.csv", "report.html")), *drawings]


def _check() -> None:
    drift = committed.drift(ROOT)
    if drift:
        print(drift)
        raise ReportError(
            "README table or ledger drifted from reports/records/; run `python -m stages.report --readme`"
        )
    print("README table and ledger agree with reports/records/")


if __name__ == "__main__":
    typer.run(main)
