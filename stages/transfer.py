"""Layer-wise transfer of one method: `python -m stages.transfer --task embedding --method eugen`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import eugen
from eugen import DenseConfig, LayerConfig, PruneConfig
from eugen.local_training import LocalRule
from eugen.search import Target, Unreachable, choose, speed_of
from eugen.surgery import blocks_of
from stages import params, timings
from stages.checkpoint import Progress, save_tensors
from stages.models import RECORD_FILE, TRANSFERRED, changed_tensors, dense_model, plan_data, unit_name
from stages.params import Method
from stages.tasks import DoesNotApply, Task, last_blocks, open_task
from stages.tracking import Run, record, stage_run

RULE_SEEDS = 40_000
"""Where the seeds of layer-local rules begin: from one stream, their draws would be the initial weights."""


def transfer(
    task: Annotated[str, typer.Option(help="Task of params.yaml.")],
    method: Annotated[str, typer.Option(help="Method of params.yaml.")],
) -> None:
    """Write artifacts/transfer/<task>/<method>: replaced blocks and their quality, per budget and seed.

    A budget that buys nothing is left out, and a row that has no meaning for the task makes nothing at
    all; the record says so, with the reason.
    """
    settings = params.load()
    opened, row = open_task(settings, task), settings.method(method)
    # A row that aims at a measured time is timed as profiling times it, and runs alone for that.
    timed = row.target == "time"
    torch.set_num_threads(settings.run.timing_threads if timed else settings.run.threads)
    chosen = {
        "run": settings.run.model_dump(),
        "transfer": opened.settings.transfer.model_dump(),
        "method": row.section,
    }
    with stage_run("transfer", task=task, method=method, params=chosen) as run:
        out = TRANSFERRED / task / method
        out.mkdir(parents=True, exist_ok=True)
        progress = Progress("transfer", task=task, method=method, params=chosen)
        units: list[dict[str, Any]] = []
        omitted: list[dict[str, Any]] = []
        why_not = None
        try:
            transfer_all(opened, row, out, progress, run, units, omitted)
        except (eugen.UnsuitableBlock, DoesNotApply) as error:
            why_not = str(error)
            run.tag("not_applicable", why_not)
            run.progress(f"does not apply: {why_not}")
        log_units(run, units, opened.quality_name)
        seconds = {unit_name(u["seed"], u["budget"]): u.pop("seconds") for u in units}
        made = {"units": units, "omitted": omitted, "not_applicable": why_not}
        record.write_json(out / RECORD_FILE, made)
        run.artifact(out, folder="weights")
        timings.write("transfer", task, method, overhead=run.overhead_seconds, **seconds)
        progress.clear()


def transfer_all(
    task: Task,
    row: Method,
    out: Path,
    progress: Progress,
    run: Run,
    units: list[dict[str, Any]],
    omitted: list[dict[str, Any]],
) -> None:
    """Add every unit's values to `units`, and each budget that buys nothing, with the reason, to `omitted`.

    Raises:
        UnsuitableBlock, DoesNotApply: the row makes nothing for this task at any of its budgets.
    """
    dense = dense_model(task)
    for budget in row.budgets(task.settings.transfer.budgets):
        for seed in task.settings.transfer.seeds:
            name = unit_name(seed, budget)
            found = progress.load(name)
            if found is None:
                try:
                    found = transfer_unit(task, dense, row, budget, seed, run)
                except eugen.BudgetTooSmall as error:
                    omitted.append({"budget": budget, "reason": str(error)})
                    run.progress(f"budget {budget:g} is left out: {error}")
                    break  # a matter of sizes: the same for every seed
                progress.store(name, *found)
            save_tensors(out / f"{name}.safetensors", found[1])
            units.append(found[0])
            run.progress(f"{name}: {task.quality_name} {units[-1]['quality']:.4f}")
    if omitted and not units:
        most = max(omitted, key=lambda omission: omission["budget"])
        raise DoesNotApply(f"no budget of the task is enough: {most['reason']}")


def transfer_unit(
    task: Task, dense: nn.Module, method: Method, budget: float, seed: int, run: Run
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One transfer: its values and the tensors that changed."""
    start = time.perf_counter()
    steps = task.settings.transfer.refine_steps
    config = chosen_layers(task, dense, method, budget, seed, run)
    if method.training is not None:
        assert isinstance(config, LayerConfig)
        result = train_locally(task, config, method.training, seed)
    else:
        result = replace_blocks(task, dense, config, budget, seed, steps, run)
    seconds = time.perf_counter() - start
    measured = task.evaluate(result.model, "test")
    values = {
        "seed": seed,
        "budget": budget,
        "plan": plan_data(result, config),
        "quality": measured.pop(task.quality_name),
        "validation": task.evaluate(result.model, "validation")[task.quality_name],
        "extra": measured,
        "fit_r2": [site.fit_r2 for site in result.sites if site.fit_r2 is not None],
        "macs_ratio": [site.macs_ratio for site in result.sites],
        "num_features": [site.layer.num_features for site in result.sites],
        "seconds": seconds,
    }
    if method.training is None and steps:
        closed = replace_blocks(task, dense, config, budget, seed, 0, run)
        values["closed_form"] = task.evaluate(closed.model, "test")[task.quality_name]
    return values, changed_tensors(result.model, dense)


def chosen_layers(
    task: Task, dense: nn.Module, method: Method, budget: float, seed: int, run: Run
) -> LayerConfig | dict[str, LayerConfig]:
    """The row's layer, or the one that the search chose for each block.

    Raises:
        UnsuitableBlock, DoesNotApply: there is nothing to choose, or pruning makes the network no faster.
        BudgetTooSmall: no plan is as cheap.
    """
    if method.target is None:
        return method.config(budget)
    where = last_blocks(dense, task.settings.transfer.blocks)
    batches = task.calibration(seed, task.settings.transfer.calibration_tokens)
    example = task.example(task.settings.profile.batches[0])
    like = None
    if method.target == "macs":
        target = Target(macs=budget)
    else:
        like = PruneConfig(budget=budget)
        speedup = speed_of(dense, like, example, task.call, where=where)
        run.progress(f"{unit_name(seed, budget)}: pruning is {speedup:.3f}x as fast as the dense network")
        if speedup <= 1:
            raise DoesNotApply(f"pruning to {budget:g} makes the network no faster here: {speedup:.3f}x")
        target = Target(speedup=speedup)
    try:
        plan = choose(
            dense,
            batches,
            target=target,
            call=task.call,
            example=example,
            like=like,
            where=where,
            refine_steps=task.settings.transfer.refine_steps,
            seed=seed,
            progress=lambda line: run.progress(f"{unit_name(seed, budget)}, {line}"),
        )
    except Unreachable as error:
        if target.macs is None:
            raise DoesNotApply(str(error)) from error
        raise eugen.BudgetTooSmall(budget, repr(method.name), error.best) from error
    return {site.name: plan.blocks.get(site.name, DenseConfig()) for site in blocks_of(dense, where)}


def replace_blocks(
    task: Task,
    dense: nn.Module,
    config: LayerConfig | dict[str, LayerConfig],
    budget: float,
    seed: int,
    refine_steps: int,
    run: Run,
) -> eugen.Replacement:
    """The dense network with its blocks taken over by those of the configuration."""
    name = unit_name(seed, budget) + ("" if refine_steps else ", closed form")
    return eugen.replace(
        dense,
        config,
        calibration=task.calibration(seed, task.settings.transfer.calibration_tokens),
        where=last_blocks(dense, task.settings.transfer.blocks),
        call=task.call,
        refine_steps=refine_steps,
        seed=seed,
        progress=lambda line: run.progress(f"{name}, {line}"),
    )


def train_locally(task: Task, config: LayerConfig, rule: LocalRule, seed: int) -> eugen.Replacement:
    """A network with blocks of that kind, trained from scratch without backpropagation through it.

    Raises:
        DoesNotApply: the task's network is no chain of units.
    """
    # Initial weights come from the global generator: fork it, so that nobody else notices.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = task.build()
    result = eugen.replace(fresh, config, seed=seed)
    units, head = task.local_units(result.model)
    generator = torch.Generator().manual_seed(RULE_SEEDS + seed)
    rule.train(units, head, task.local_data(seed), generator=generator)
    result.model.eval()
    return result


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
