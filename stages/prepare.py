"""Fetch, verify and unpack a task's data: `python -m stages.prepare --task embedding`."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from typing import Annotated, Any

import typer

from stages import timings, validate
from stages.tasks import DATA, DataSource, Task, open_task
from stages.tracking import record, stage_run

MANIFEST = "manifest.json"


def manifest(task: Task, sources: dict[str, DataSource]) -> dict[str, Any]:
    """What the prepared data are: their sources, and every setting of `data` with its default filled in.

    Some settings change no prepared byte, only what later stages measure. DVC compares folders, so that
    the manifest makes those stages stale too.
    """
    return {
        "sources": {name: asdict(source) for name, source in sources.items()},
        "data": task.settings.data.model_dump(mode="json"),
    }


def prepare(task: Annotated[str, typer.Option(help="Task of params.yaml.")]) -> None:
    """Write data/<task> whole or not at all."""
    settings = validate.check()  # a fault anywhere in params.yaml stops the pipeline here, before any work
    opened = open_task(settings, task)
    with stage_run("prepare", task=task, params={"data": opened.settings.data.model_dump()}) as run:
        target, partial = DATA / task, DATA / f".{task}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        known = manifest(opened, opened.prepare(partial))
        record.write_json(partial / MANIFEST, known)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for name, source in known["sources"].items():
            run.dataset(name, **source)
        timings.write("prepare", task, overhead=run.overhead_seconds)
        run.artifact(target / MANIFEST)


if __name__ == "__main__":
    typer.run(prepare)
