"""Train (or load) a task's dense network: `python -m stages.baseline --task vision`.

`torchrun --nproc-per-node 8 -m stages.baseline --task language` shares every batch among eight processes.
"""

from __future__ import annotations

import time
from typing import Annotated

import torch
import typer

from stages import distributed, params, timings
from stages.checkpoint import Progress, save_tensors
from stages.models import DENSE_FILE, RECORD_FILE, read_json
from stages.tasks import BASELINE, DATA, open_task
from stages.tracking import record, stage_run


def baseline(task: Annotated[str, typer.Option(help="Task of params.yaml.")]) -> None:
    """Write artifacts/baseline/<task>: weights, caches for later stages, and the dense quality."""
    settings = params.load()
    opened = open_task(settings, task)
    torch.set_num_threads(settings.run.threads)
    chosen = {"run": settings.run.model_dump(), "baseline": opened.settings.baseline.model_dump()}
    with (
        distributed.group(settings.run.device) as place,
        stage_run("baseline", task=task, params=chosen) as run,
    ):
        out = BASELINE / task
        out.mkdir(parents=True, exist_ok=True)
        progress = Progress("baseline", task=task, params=chosen)

        def log(name: str, value: float, step: int) -> None:
            run.metrics({name: value}, step=step)
            run.progress(f"step {step}: {name} {value:.4f}")

        start = time.perf_counter()
        model = opened.train_dense(out, progress.folder / "checkpoint.pt", log)
        seconds = time.perf_counter() - start
        if not place.first:  # it has helped; the first process reports
            return
        save_tensors(out / DENSE_FILE, model.state_dict())
        quality = opened.evaluate(model, "test")
        manifest = read_json(DATA / task / "manifest.json")
        run.metrics({**quality, "train_seconds": seconds})
        for name, source in manifest["sources"].items():
            run.dataset(name, **source)
        run.artifact(out / DENSE_FILE, folder="weights")
        hashes = {name: source["sha256"] for name, source in manifest["sources"].items()}
        record.write_json(out / RECORD_FILE, {"quality": quality, "data_sha256": hashes})
        timings.write("baseline", task, overhead=run.overhead_seconds, train=seconds)
        progress.clear()


if __name__ == "__main__":
    typer.run(baseline)
