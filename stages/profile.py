"""Cost and latency of one method, and its record: `python -m stages.profile --task T --method M`."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import nn

import eugen
from eugen.cost import ModelCost, count_macs, model_cost
from eugen.timing import Clock, compare_models, energy_per_call, peak_memory, placed
from stages import params, timings
from stages.data.verify import sha256_file
from stages.models import (
    DENSE_FILE,
    FINETUNED,
    RECORD_FILE,
    TRANSFERRED,
    dense_model,
    read_json,
    student_model,
    unit_name,
)
from stages.params import Method, Params
from stages.tasks import BASELINE, Task, open_task
from stages.tracking import Run, environment, record, stage_run

CELLS, METRICS = Path("results/cells"), Path("results/metrics")
PICTURES = Path("results/pictures")
ENERGY_SECONDS = 1.0
"""How long a call is repeated where the device has a meter."""


def profile(
    task: Annotated[str, typer.Option(help="Task of params.yaml.")],
    method: Annotated[str, typer.Option(help="Method of params.yaml.")],
) -> None:
    """Write results/cells/<task>-<method>.json, the cell's whole record."""
    settings = params.load()
    opened, row = open_task(settings, task), settings.method(method)
    torch.set_num_threads(settings.run.timing_threads)
    chosen = {
        "run": settings.run.model_dump(),
        "profile": opened.settings.profile.model_dump(),
        "method": row.section,
    }
    with stage_run("profile", task=task, method=method, params=chosen) as run:
        moved = read_json(TRANSFERRED / task / method / RECORD_FILE)
        made: list[Path] = []
        if moved["not_applicable"]:
            cell, metrics = not_applicable(settings, task, method, moved["not_applicable"]), {}
            run.tag("not_applicable", moved["not_applicable"])
        else:
            cell = measure(settings, opened, row, moved, run)
            metrics = flat_metrics(cell)
            made = picture(opened, row, moved)
        # A list beside the pictures: DVC warns of folders that are empty, as most tasks' would be.
        listed = sorted(path.relative_to(PICTURES / task / method).as_posix() for path in made)
        record.write_json(PICTURES / task / method / "pictures.json", listed)
        record.write_record(CELLS / f"{task}-{method}.json", cell)
        record.write_json(METRICS / f"{task}-{method}.json", metrics)
        run.metrics(metrics)
        run.artifact(CELLS / f"{task}-{method}.json")


def measure(settings: Params, task: Task, row: Method, moved: dict[str, Any], run: Run) -> record.CellRecord:
    """Cost and latency at every budget that was transferred, and the record."""
    costs, latencies = [], []
    for budget in dict.fromkeys(unit["budget"] for unit in moved["units"]):
        dense = dense_model(task)  # anew: timing casts it to the profiled dtype
        first = unit_name(task.settings.transfer.seeds[0], budget)
        weights = load_file(TRANSFERRED / task.name / row.name / f"{first}.safetensors")
        blocks = task.settings.transfer.blocks
        student = student_model(dense, row.config(budget), weights, blocks)
        # The dense network with the same blocks marked: one that stays dense is no part of the comparison.
        marked = dense if blocks is None else student_model(dense, eugen.DenseConfig(), {}, blocks)
        costs.append(measure_cost(task, marked, student, budget))
        latencies += measure_latency(task, dense, student, budget, settings, run)
    return assemble(settings, task, row, costs, latencies, run.overhead_seconds)


def picture(task: Task, row: Method, moved: dict[str, Any]) -> list[Path]:
    """Leave what the task shows of the first seed's network per budget; the dense row has the truth too."""
    out = PICTURES / task.name / row.name
    blocks, made = task.settings.transfer.blocks, []
    for budget in dict.fromkeys(unit["budget"] for unit in moved["units"]):
        seed = task.settings.transfer.seeds[0]
        name = f"{unit_name(seed, budget)}.safetensors"
        tuned = FINETUNED / task.name / row.name / name
        stored = tuned if tuned.exists() else TRANSFERRED / task.name / row.name / name
        student = student_model(dense_model(task), row.config(budget), load_file(stored), blocks)
        made += task.pictures(student, out / f"budget{budget:g}")
    return made + (task.truth_pictures(out / "truth") if row.layer == "dense" else [])


def not_applicable(settings: Params, task: str, method: str, why: str) -> record.NotApplicable:
    """What stands in the place of a cell that has no meaning."""
    return record.NotApplicable(task=task, method=method, profile=settings.profile, not_applicable=why)


def measure_cost(task: Task, dense: nn.Module, student: nn.Module, budget: float) -> record.Cost:
    """Exact cost of both networks for one example."""
    base: ModelCost = model_cost(dense, task.example(1), task.call)
    own: ModelCost = model_cost(student, task.example(1), task.call)
    return record.Cost(
        budget=budget,
        params=own.params,
        params_dense=base.params,
        ffn_params=own.ffn_params,
        ffn_params_dense=base.ffn_params,
        macs=own.macs,
        macs_dense=base.macs,
        ffn_macs=own.ffn_macs,
        ffn_macs_dense=base.ffn_macs,
        weight_bytes=own.weight_bytes,
        weight_bytes_dense=base.weight_bytes,
    )


def measure_latency(
    task: Task, dense: nn.Module, student: nn.Module, budget: float, settings: Params, run: Run
) -> list[record.Latency]:
    """Interleaved whole-model latencies of both networks at each batch size."""
    chosen, device = task.settings.profile, settings.run.device
    dtype = getattr(torch, chosen.dtype)
    models = [model.to(device=device, dtype=dtype) for model in (dense, student)]
    measured = []
    pairs = max(2, chosen.pairs // chosen.placements // 2 * 2)
    for batch in chosen.batches:
        example = task.example(batch)
        example = example.to(device, dtype if example.is_floating_point() else None)
        calls = [partial(task.call, model, example) for model in models]
        macs = [count_macs(call) for call in calls]
        timed = compare_models(
            *(placed(model, example, task.call) for model in models),
            placements=chosen.placements,
            pairs=pairs,
            max_seconds=chosen.seconds,
            clock=Clock(device),
        )
        speedup, low, high = timed.speedup()
        run.progress(f"budget {budget:g}, batch {batch}: {speedup:.2f}x [{low:.2f}, {high:.2f}]")
        peaks = [peak_memory(call, model, device=device) for call, model in zip(calls, models, strict=True)]
        assert peaks[0].allocated and peaks[1].allocated  # counted: nothing here is compiled
        energy = [energy_per_call(call, device=device, seconds=ENERGY_SECONDS) for call in calls]
        latency = record.Latency(
            budget=budget,
            device=device,
            dtype=chosen.dtype,
            batch=batch,
            threads=settings.run.timing_threads,
            placements=chosen.placements,
            dense_ms=timed.base_ms,
            method_ms=timed.other_ms,
            speedup=speedup,
            speedup_low=low,
            speedup_high=high,
            speedup_limit=macs[0] / macs[1],
            peak_bytes_dense=peaks[0].allocated,
            peak_bytes_method=peaks[1].allocated,
            reserved_bytes_dense=peaks[0].reserved,
            reserved_bytes_method=peaks[1].reserved,
            joules_dense=energy[0].joules_per_call,
            joules_method=energy[1].joules_per_call,
            energy_meter=energy[1].meter,
        )
        measured.append(latency)
    return measured


def assemble(
    settings: Params,
    task: Task,
    method: Method,
    costs: list[record.Cost],
    latencies: list[record.Latency],
    overhead: float,
) -> record.CellRecord:
    """The cell's record from what the earlier stages left and what was measured here."""
    base = read_json(BASELINE / task.name / RECORD_FILE)
    moved = read_json(TRANSFERRED / task.name / method.name / RECORD_FILE)
    tuned = read_json(FINETUNED / task.name / method.name / RECORD_FILE)
    here = environment.environment()
    times = {
        stage: timings.read(stage, task.name, None if stage in ("prepare", "baseline") else method.name)
        for stage in ("prepare", "baseline", "transfer", "finetune")
    }
    seeds = seed_results(base, moved["units"], tuned["units"], times, task.quality_name)
    behind = [seed for seed in seeds if seed.quality_finetuned is not None] or seeds
    budgets = {seed.budget for seed in behind}
    single = len(behind) < 2 * len(budgets)
    return record.CellRecord(
        task=task.name,
        method=method.name,
        profile=settings.profile,
        provisional=settings.run.provisional or here.dirty or single,
        quality_name=task.quality_name,
        higher_is_better=task.higher_is_better,
        params={
            "run": settings.run.model_dump(),
            "task": task.settings.model_dump(),
            "method": method.section,
        },
        dense_metrics=base["quality"],
        seeds=seeds,
        costs=costs,
        latencies=latencies,
        train_seconds_dense=times["baseline"]["train"],
        environment=here,
        data_sha256=base["data_sha256"],
        weights_sha256=weight_hashes(task.name, method.name),
        stage_overhead_seconds={stage: took["overhead"] for stage, took in times.items()}
        | {"profile": overhead},
        omitted=moved["omitted"],
    )


def weight_hashes(task: str, method: str) -> dict[str, str]:
    """SHA-256 of every network behind a cell: the dense one, and each unit by its stage."""
    hashes = {"dense": sha256_file(BASELINE / task / DENSE_FILE)}
    for stage, folder in (("transfer", TRANSFERRED), ("finetune", FINETUNED)):
        for path in sorted((folder / task / method).glob("*.safetensors")):
            hashes[f"{stage}.{path.stem}"] = sha256_file(path)
    return hashes


def seed_results(
    base: dict[str, Any],
    moved: list[dict[str, Any]],
    tuned: list[dict[str, Any]],
    times: dict[str, dict[str, float]],
    quality_name: str,
) -> list[record.SeedResult]:
    """Transfer and fine-tuning of each seed and budget, side by side."""
    later = {(unit["seed"], unit["budget"]): unit for unit in tuned}
    results = []
    for unit in moved:
        after = later.get((unit["seed"], unit["budget"]))
        name = unit_name(unit["seed"], unit["budget"])
        results.append(
            record.SeedResult(
                seed=unit["seed"],
                budget=unit["budget"],
                quality_dense=base["quality"][quality_name],
                quality_transfer_only=unit["quality"],
                quality_finetuned=after["quality"] if after else None,
                quality_closed_form=unit.get("closed_form"),
                validation_transfer_only=unit["validation"],
                validation_finetuned=after["validation"] if after else None,
                learning_rate=after["learning_rate"] if after else None,
                extra_transfer_only=unit["extra"],
                extra_finetuned=after["extra"] if after else {},
                fit_r2=unit["fit_r2"],
                num_features=unit["num_features"],
                transfer_seconds=times["transfer"][name],
                finetune_seconds=times["finetune"].get(name, 0.0),
            )
        )
    return results


def flat_metrics(cell: record.CellRecord) -> dict[str, float]:
    """A few numbers a cell is compared by, for `dvc metrics show` and MLflow.

    Those of the first budget have plain names, so that a chart shows them beside the dense row's.
    """
    flat: dict[str, float] = {}
    prefixes = {cost.budget: f"b{cost.budget:g}." for cost in cell.costs}
    prefixes[cell.costs[0].budget] = ""
    for cost in cell.costs:
        here = [seed for seed in cell.seeds if seed.budget == cost.budget]
        tuned = [seed.quality_finetuned for seed in here if seed.quality_finetuned is not None]
        prefix = prefixes[cost.budget]
        flat[f"{prefix}{cell.quality_name}_transfer_only"] = math.fsum(
            s.quality_transfer_only for s in here
        ) / len(here)
        if tuned:
            flat[f"{prefix}{cell.quality_name}"] = math.fsum(tuned) / len(tuned)
        flat[f"{prefix}ffn_macs_ratio"] = cost.ffn_macs / cost.ffn_macs_dense
        flat[f"{prefix}params_ratio"] = cost.params / cost.params_dense
    for latency in cell.latencies:
        flat[f"{prefixes[latency.budget]}batch{latency.batch}.speedup"] = latency.speedup
    return flat


if __name__ == "__main__":
    typer.run(profile)
