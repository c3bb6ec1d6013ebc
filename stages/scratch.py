"""Rows trained from scratch: `python -m stages.scratch --task language --method narrow`.

Every row starts from new weights, sees the same batches in the same order and gets the same number of
learning-rate trials; the validation part chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import eugen
from stages import distributed, params, timings
from stages.checkpoint import Progress
from stages.comparison import Comparison, Trainings, measure_cost
from stages.models import read_json
from stages.params import Params, ParamsError
from stages.rows import Method
from stages.tasks import DATA, DoesNotApply, changed_baseline, open_task
from stages.tracking import Run, environment, record, stage_run
from stages.training import Diverged

RESULTS = Path("results/scratch")


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
        # Kept after success, unlike other stages': another variant trains only what is new.
        progress = Progress("scratch", task=task, method=method, params=settings.run.model_dump())
        made, why_not = Made([], [], []), None
        try:
            for comparison in comparisons(settings, task, method):
                run_variant(comparison, row, progress, run, made)
        except (eugen.UnsuitableBlock, DoesNotApply) as error:
            why_not = str(error)
            run.progress(f"does not apply: {why_not}")
        if made.runs and not made.costs:
            raise Diverged("every training diverged, at each learning rate")
        if place.first:
            written = assemble(settings, task, method, chosen, made, why_not)
            record.write_record(RESULTS / f"{task}-{method}.json", written)
            run.metrics(flat_metrics(written))
            run.artifact(RESULTS / f"{task}-{method}.json")
            timings.write("scratch", task, method, overhead=run.overhead_seconds)


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
        trainings = Trainings(comparison, row, budget, progress, run)
        try:
            comparison.network(trainings.config, seed=0)
        except eugen.BudgetTooSmall as error:
            reason = f"{comparison.name}: {error}"
            made.omitted.append(record.Omission(budget=budget, reason=reason))
            run.progress(f"budget {budget:g} is left out: {error}")
            continue
        first, *others = comparison.seeds
        trials = [trainings.one(rate, first) for rate in comparison.rates]
        finished = {t.learning_rate: t.validation for t in trials if t.validation is not None}
        if not finished:
            made.runs += trials
            run.progress(f"{comparison.name}, budget {budget:g}: every learning rate diverged")
            continue
        sign = 1 if comparison.task.higher_is_better else -1
        best = max(finished, key=lambda rate: sign * finished[rate])
        runs = trials + [trainings.one(best, seed) for seed in others]
        made.runs += [r.model_copy(update={"chosen": r.learning_rate == best}) for r in runs]
        made.costs.append(measure_cost(comparison, trainings.config, budget))


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
    """Mean quality at the chosen rate and training speed, by variant and budget.

    Those of a variant's first budget have plain names, so that a chart shows them beside the dense row's.
    """
    flat: dict[str, float] = {}
    first = {cost.variant: cost.budget for cost in reversed(made.costs)}
    for cost in made.costs:
        runs = [r for r in made.runs if r.chosen and (r.variant, r.budget) == (cost.variant, cost.budget)]
        found = [run.quality for run in runs if run.quality is not None]
        prefix = f"scratch.{cost.variant}"
        prefix += "" if cost.budget == first[cost.variant] else f".b{cost.budget:g}"
        flat[f"{prefix}.{made.quality_name}"] = sum(found) / len(found)
        flat[f"{prefix}.training_speedup"] = cost.training_speedup
    return flat


if __name__ == "__main__":
    typer.run(scratch)
