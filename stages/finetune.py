"""End-to-end fine-tuning of one method: `python -m stages.finetune --task vision --method prune`."""

from __future__ import annotations

import copy
import time
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor, nn

from stages import params, timings
from stages.checkpoint import Progress, save_tensors
from stages.models import (
    FINETUNED,
    RECORD_FILE,
    TRANSFERRED,
    changed_tensors,
    dense_model,
    read_json,
    student_model,
    transferred_plan,
    unit_name,
)
from stages.params import Method
from stages.tasks import Task, open_task
from stages.tracking import Run, record, stage_run
from stages.training import train


def finetune(
    task: Annotated[str, typer.Option(help="Task of params.yaml.")],
    method: Annotated[str, typer.Option(help="Method of params.yaml.")],
) -> None:
    """Write artifacts/finetune/<task>/<method>: what changed and its quality, per budget and seed."""
    settings = params.load()
    opened, row = open_task(settings, task), settings.method(method)
    torch.set_num_threads(settings.run.threads)
    chosen = {"run": settings.run.model_dump(), "finetune": opened.settings.finetune.model_dump()}
    with stage_run("finetune", task=task, method=method, params=chosen) as run:
        out = FINETUNED / task / method
        progress = Progress("finetune", task=task, method=method, params=chosen)
        budgets = budgets_to_tune(opened, row)
        dense = dense_model(opened) if budgets else nn.Identity()
        units = []
        for budget in budgets:
            for seed in opened.settings.finetune.seeds:
                name = unit_name(seed, budget)
                found = progress.load(name)
                if found is None:
                    stored = _transferred(task, method, name)
                    plan = transferred_plan(task, method, seed, budget)
                    start = student_model(dense, plan, stored)
                    found = finetune_unit(opened, dense, start, seed, budget, run)
                    progress.store(name, *found)
                save_tensors(out / f"{name}.safetensors", found[1])
                units.append(found[0])
                run.metrics({f"b{budget:g}.{opened.quality_name}": units[-1]["quality"]}, step=seed)
        out.mkdir(parents=True, exist_ok=True)
        seconds = {unit_name(u["seed"], u["budget"]): u.pop("seconds") for u in units}
        record.write_json(out / RECORD_FILE, {"units": units})
        run.artifact(out, folder="weights")
        timings.write("finetune", task, method, overhead=run.overhead_seconds, **seconds)
        progress.clear()


def budgets_to_tune(task: Task, row: Method) -> list[float]:
    """The budgets to fine-tune at: those that transfer made, none where the row does not apply.

    A row that trains without backpropagation is passed on as it is: fine-tuning would be just that.
    """
    made = read_json(TRANSFERRED / task.name / row.name / RECORD_FILE)
    if made["not_applicable"] or row.training is not None or not task.settings.finetune.steps:
        return []
    left_out = {omission["budget"] for omission in made["omitted"]}
    return [budget for budget in row.budgets(task.settings.finetune.budgets) if budget not in left_out]


def finetune_unit(
    task: Task, dense: nn.Module, start: nn.Module, seed: int, budget: float, run: Run
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every learning rate from the same start; the best on the validation part is judged on the test part.

    The start itself is a candidate with learning rate 0: where no rate helps, the network stays as it is.

    Raises:
        Diverged: a loss became NaN or infinite: the cell fails, it never counts as a number.
    """
    settings = task.settings.finetune
    began = time.perf_counter()
    trials = [(task.evaluate(start, "validation")[task.quality_name], 0.0, start)]
    for rate in settings.learning_rates:
        model = copy.deepcopy(start)
        curve = train(task, model, settings.recipe(rate, seed))
        name = f"{unit_name(seed, budget)}.lr{rate:g}"
        run.curve(f"{name}.loss", [(point.step, point.train_loss) for point in curve])
        trials.append((curve[-1].validation, rate, model))
        run.progress(f"{name}: validation {task.quality_name} {trials[-1][0]:.4f}")
    best = max(trials, key=lambda trial: trial[0] if task.higher_is_better else -trial[0])
    measured = task.evaluate(best[2], "test")
    values = {
        "seed": seed,
        "budget": budget,
        "quality": measured.pop(task.quality_name),
        "validation": best[0],
        "extra": measured,
        "learning_rate": best[1],
        "trials": {f"{rate:g}": quality for quality, rate, _ in trials},
        "seconds": time.perf_counter() - began,
    }
    return values, changed_tensors(best[2], dense)


def _transferred(task: str, method: str, unit: str) -> dict[str, Tensor]:
    path = TRANSFERRED / task / method / f"{unit}.safetensors"
    if not path.exists():
        raise params.ParamsError(
            f"tasks.{task}.finetune asks for {unit}, which tasks.{task}.transfer does not make: "
            "its budgets and seeds must be among those of transfer"
        )
    return load_file(path)


if __name__ == "__main__":
    typer.run(finetune)
