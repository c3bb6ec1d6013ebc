"""Rows trained from scratch: `python -m stages.scratch --task language --method narrow`.

Every row starts from new weights, sees the same batches in the same order and gets the same number of
learning-rate trials; the validation part chooses among them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import eugen
from eugen.cost import model_cost
from eugen.timing import compare
from stages import distributed, params, timings
from stages.checkpoint import Progress
from stages.models import read_json
from stages.params import Params, ParamsError, ScratchSettings, ScratchVariant, TrainingRecipe
from stages.rows import Method
from stages.tasks import DATA, DoesNotApply, Task, changed_baseline, last_blocks, open_task
from stages.tracking import Run, environment, record, stage_run
from stages.training import Diverged, optimiser_of, step, train

RESULTS = Path("results/scratch")
BLOCK_SEEDS = 60_000
"""Where the seeds of the replaced blocks begin: from one stream, their draws would be the other weights."""
TIMING_SECONDS = 20.0
"""The longest that the training steps of one cost are timed; ten pairs are, whatever they take."""


@dataclass(frozen=True)
class Comparison:
    """One variant on one task: what every row of it has in common."""

    name: str
    task: Task
    settings: ScratchSettings
    variant: ScratchVariant

    @property
    def recipe(self) -> TrainingRecipe:
        return self.task.recipe()

    @property
    def seeds(self) -> list[int]:
        return self.variant.seeds or self.settings.seeds

    @property
    def rates(self) -> list[float]:
        return self.variant.learning_rates or self.settings.learning_rates

    def budgets(self, row: Method) -> list[float]:
        return row.budgets(self.variant.budgets or self.settings.budgets)

    def network(self, config: eugen.LayerConfig, seed: int) -> nn.Module:
        """The untrained network with the variant's blocks replaced. Dense blocks are drawn anew too."""
        fresh = self.task.fresh(seed)
        where = last_blocks(fresh, self.variant.blocks)
        return eugen.replace(fresh, config, where=where, seed=BLOCK_SEEDS + seed).model


def scratch(
    task: Annotated[str, typer.Option(help="Task under scratch.tasks of params.yaml.")],
    method: Annotated[str, typer.Option(help="Row under scratch.rows.")],
) -> None:
    """Write results/scratch/<task>-<row>.json: every training of the row, its curve and its cost."""
    settings = params.load()
    if task not in settings.scratch_tasks or method not in settings.scratch_rows:
        known = f"{', '.join(settings.scratch_tasks)} and {', '.join(settings.scratch_rows)}"
        raise ParamsError(f"scratch of {task!r} / {method!r}: params.yaml has {known}")
    row, section = settings.scratch_rows[method], settings.scratch_tasks[task]
    torch.set_num_threads(settings.run.threads)
    chosen = {
        "run": settings.run.model_dump(),
        "task": open_task(settings, task).settings.model_dump(),
        "scratch": section.model_dump(),
        "row": row.section,
    }
    with (
        distributed.group(settings.run.device) as place,
        stage_run("scratch", task=task, method=method, params=chosen) as run,
    ):
        progress = Progress("scratch", task=task, method=method, params=chosen)
        made = Made([], [], [])
        try:
            for comparison in comparisons(settings, task, method):
                run_variant(comparison, row, progress, run, made)
            why_not = None
        except (eugen.UnsuitableBlock, DoesNotApply) as error:
            why_not = str(error)
            run.progress(f"does not apply: {why_not}")
        if place.first:
            written = assemble(settings, task, method, chosen, made, why_not)
            record.write_record(RESULTS / f"{task}-{method}.json", written)
            run.metrics(flat_metrics(written))
            run.artifact(RESULTS / f"{task}-{method}.json")
            timings.write("scratch", task, method, overhead=run.overhead_seconds)
            progress.clear()


@dataclass
class Made:
    """What a row has so far."""

    runs: list[record.ScratchRun]
    costs: list[record.ScratchCost]
    omitted: list[record.Omission]


def comparisons(settings: Params, task: str, row: str) -> Iterator[Comparison]:
    """The variants that a row takes part in."""
    section = settings.scratch_tasks[task]
    for name, variant in section.variants.items():
        if variant.rows is None or row in variant.rows:
            opened = open_task(settings, task, changed_baseline(settings, task, variant))
            yield Comparison(name, opened, section, variant)


def run_variant(comparison: Comparison, row: Method, progress: Progress, run: Run, made: Made) -> None:
    """All trainings and costs of a row in one variant; a budget that buys nothing is left out."""
    for budget in comparison.budgets(row):
        config = row.config(budget)
        try:
            comparison.network(config, seed=0)
        except eugen.BudgetTooSmall as error:
            reason = f"{comparison.name}: {error}"
            made.omitted.append(record.Omission(budget=budget, reason=reason))
            run.progress(f"budget {budget:g} is left out: {error}")
            continue
        rates = comparison.rates
        trials = [train_once(comparison, config, budget, rate, None, progress, run) for rate in rates]
        finished = [trial for trial in trials if trial.validation is not None]
        if not finished:
            raise Diverged(f"{comparison.name}, budget {budget:g}: every learning rate diverged")
        sign = 1 if comparison.task.higher_is_better else -1
        best = max(finished, key=lambda trial: sign * (trial.validation or 0.0)).learning_rate
        made.runs += [t.model_copy(update={"chosen": t.learning_rate == best}) for t in trials]
        for seed in comparison.seeds[1:]:
            made.runs.append(train_once(comparison, config, budget, best, seed, progress, run))
        made.costs.append(measure_cost(comparison, config, budget))


def train_once(
    comparison: Comparison,
    config: eugen.LayerConfig,
    budget: float,
    rate: float,
    seed: int | None,
    progress: Progress,
    run: Run,
) -> record.ScratchRun:
    """One training, taken up where it stopped; `seed` None is a trial of the rate with the first seed."""
    task, seed_used = comparison.task, comparison.seeds[0] if seed is None else seed
    name = f"{comparison.name}-budget{budget:g}-lr{rate:g}-seed{seed_used}"
    if (found := progress.load(name)) is not None:
        return record.ScratchRun.model_validate(found[0])
    recipe = comparison.recipe.model_copy(update={"learning_rate": rate, "seed": seed_used})
    model = comparison.network(config, seed_used)
    checkpoint = progress.folder / f"{name}.pt"
    began = time.perf_counter()
    done: dict[str, Any] = {"validation": None, "quality": None, "diverged": True}
    try:
        curve = train(task, model, recipe, checkpoint=checkpoint)
        measured = task.evaluate(model, "test")
        done = {"validation": curve[-1].validation, "quality": measured.pop(task.quality_name)}
        done |= {"extra": measured, "curve": curve, "seconds": curve[-1].seconds}
        run.curve(f"{name}.{task.quality_name}", [(point.step, point.validation) for point in curve])
    except Diverged as error:
        run.progress(f"{name}: {error}")
    result = record.ScratchRun(
        variant=comparison.name,
        budget=budget,
        seed=seed_used,
        learning_rate=rate,
        chosen=seed is not None,
        **{"seconds": time.perf_counter() - began, **done},
    )
    if distributed.here().first:
        progress.store(name, result.model_dump(mode="json"), {})
        checkpoint.unlink(missing_ok=True)
    if result.quality is not None:
        run.progress(f"{name}: {task.quality_name} {result.quality:.4f}")
    return result


def measure_cost(comparison: Comparison, config: eugen.LayerConfig, budget: float) -> record.ScratchCost:
    """Exact cost, and training steps timed beside the dense network's."""
    task, recipe = comparison.task, comparison.recipe
    networks = [comparison.network(c, seed=0) for c in (eugen.DenseConfig(), config)]
    costs = [model_cost(network.eval(), task.example(1), task.call) for network in networks]
    batch = task.draw(recipe.batch_size, torch.Generator().manual_seed(0))
    steps = [Step(task, network.train(), recipe, batch) for network in networks]
    timed = compare(
        *steps, pairs=comparison.settings.timing_pairs, max_seconds=TIMING_SECONDS, device=task.device
    )
    speedup, low, high = timed.speedup()
    replaced = sum(isinstance(module, eugen.FFNLayer) for module in networks[0].modules())
    return record.ScratchCost(
        variant=comparison.name,
        budget=budget,
        blocks=len(eugen.find_ffns(task.fresh(0))),
        blocks_replaced=replaced,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        params=costs[1].params,
        params_dense=costs[0].params,
        macs=costs[1].macs,
        macs_dense=costs[0].macs,
        ffn_macs=costs[1].ffn_macs,
        ffn_macs_dense=costs[0].ffn_macs,
        step_ms_dense=timed.base_ms,
        step_ms=timed.other_ms,
        training_speedup=speedup,
        training_speedup_low=low,
        training_speedup_high=high,
    )


class Step:
    """A training step on one batch, to be timed."""

    def __init__(
        self, task: Task, model: nn.Module, recipe: TrainingRecipe, batch: tuple[torch.Tensor, ...]
    ) -> None:
        self.task, self.model, self.recipe, self.batch = task, copy.deepcopy(model), recipe, batch
        self.optimiser = optimiser_of(self.model, recipe)

    def __call__(self) -> None:
        with torch.enable_grad():
            step(self.task, self.model, self.recipe, self.optimiser, self.batch)


def assemble(
    settings: Params, task: str, row: str, chosen: dict[str, Any], made: Made, why_not: str | None
) -> record.ScratchRecord:
    """The row's record."""
    opened, here = open_task(settings, task), environment.environment()
    seeds = {run.seed for run in made.runs if run.chosen}
    hashes = read_json(DATA / task / "manifest.json")["sources"]
    return record.ScratchRecord(
        task=task,
        row=row,
        profile=settings.profile,
        provisional=settings.run.provisional or here.dirty or len(seeds) < 2,
        quality_name=opened.quality_name,
        higher_is_better=opened.higher_is_better,
        params=chosen,
        runs=made.runs,
        costs=made.costs,
        environment=here,
        data_sha256={name: source["sha256"] for name, source in hashes.items()},
        omitted=made.omitted,
        not_applicable=why_not,
    )


def flat_metrics(made: record.ScratchRecord) -> dict[str, float]:
    """Mean quality at the chosen rate and training speed, by variant and budget."""
    flat: dict[str, float] = {}
    for cost in made.costs:
        runs = [r for r in made.runs if r.chosen and (r.variant, r.budget) == (cost.variant, cost.budget)]
        found = [run.quality for run in runs if run.quality is not None]
        prefix = f"scratch.{cost.variant}.b{cost.budget:g}"
        flat[f"{prefix}.{made.quality_name}"] = sum(found) / len(found)
        flat[f"{prefix}.training_speedup"] = cost.training_speedup
    return flat


if __name__ == "__main__":
    typer.run(scratch)
