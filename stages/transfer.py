"""Layer-wise transfer of one method: `python -m stages.transfer --task embedding --method eugen`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import eugen
from stages import params, timings
from stages.checkpoint import Progress, save_tensors
from stages.models import RECORD_FILE, TRANSFERRED, changed_tensors, dense_model, unit_name
from stages.params import Method
from stages.tasks import Task, open_task
from stages.tracking import Run, record, stage_run


def transfer(
    task: Annotated[str, typer.Option(help="Task of params.yaml.")],
    method: Annotated[str, typer.Option(help="Method of params.yaml.")],
) -> None:
    """Write artifacts/transfer/<task>/<method>: replaced blocks and their quality, per budget and seed."""
    settings = params.load()
    opened, row = open_task(settings, task), settings.method(method)
    torch.set_num_threads(settings.run.threads)
    chosen = {
        "run": settings.run.model_dump(),
        "transfer": opened.settings.transfer.model_dump(),
        "method": {"layer": row.layer, **row.fields},
    }
    with stage_run("transfer", task=task, method=method, params=chosen) as run:
        out = TRANSFERRED / task / method
        progress = Progress("transfer", task=task, method=method, params=chosen)
        dense = dense_model(opened)
        units = []
        for budget in row.budgets(opened.settings.transfer.budgets):
            for seed in opened.settings.transfer.seeds:
                name = unit_name(seed, budget)
                found = progress.load(name)
                if found is None:
                    found = transfer_unit(opened, dense, row, budget, seed, run)
                    progress.store(name, *found)
                save_tensors(out / f"{name}.safetensors", found[1])
                units.append(found[0])
                run.progress(f"{name}: {opened.quality_name} {units[-1]['quality']:.4f}")
        log_units(run, units, opened.quality_name)
        run.artifact(out, folder="weights")
        seconds = {unit_name(u["seed"], u["budget"]): u.pop("seconds") for u in units}
        record.write_json(out / RECORD_FILE, {"units": units})
        timings.write("transfer", task, method, overhead=run.overhead_seconds, **seconds)
        progress.clear()


def transfer_unit(
    task: Task, dense: nn.Module, method: Method, budget: float, seed: int, run: Run
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One transfer: its values and the tensors that changed."""
    settings = task.settings.transfer
    start = time.perf_counter()
    result = eugen.replace(
        dense,
        method.config(budget),
        calibration=task.calibration(seed, settings.calibration_tokens),
        call=task.call,
        refine_steps=settings.refine_steps,
        seed=seed,
        progress=lambda line: run.progress(f"{unit_name(seed, budget)}, {line}"),
    )
    seconds = time.perf_counter() - start
    measured = task.evaluate(result.model, "test")
    values = {
        "seed": seed,
        "budget": budget,
        "quality": measured.pop(task.quality_name),
        "extra": measured,
        "fit_r2": [site.fit_r2 for site in result.sites if site.fit_r2 is not None],
        "macs_ratio": [site.macs_ratio for site in result.sites],
        "seconds": seconds,
    }
    return values, changed_tensors(result.model, dense)


def log_units(run: Run, units: list[dict[str, Any]], quality_name: str) -> None:
    """Metrics of a transfer: mean quality per budget, held-out R² along the depth."""
    for budget in sorted({unit["budget"] for unit in units}):
        here = [unit for unit in units if unit["budget"] == budget]
        run.metrics(
            {
                f"b{budget:g}.{quality_name}": sum(u["quality"] for u in here) / len(here),
                f"b{budget:g}.seconds": sum(u["seconds"] for u in here) / len(here),
            }
        )
        for block in range(len(here[0]["fit_r2"])):
            run.metrics(
                {f"b{budget:g}.fit_r2": sum(u["fit_r2"][block] for u in here) / len(here)}, step=block
            )


if __name__ == "__main__":
    typer.run(transfer)
