"""Cost and latency of one method, and its record: `python -m stages.profile --task T --method M`."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from torch import Tensor

import eugen
from stages import measurement, params, timings
from stages.data.verify import sha256_file
from stages.models import (
    DENSE_FILE,
    FINETUNED,
    RECORD_FILE,
    TRANSFERRED,
    dense_model,
    read_json,
    student_model,
    transferred_plan,
    unit_name,
)
from stages.params import Method, Params
from stages.tasks import BASELINE, Task, open_task
from stages.tracking import Run, environment, record, stage_run

CELLS, METRICS = Path("results/cells"), Path("results/metrics")
PICTURES, TRACES = Path("results/pictures"), Path(".work/traces")


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
    """Cost, latency and quality in each precision, at every budget that was transferred; and the record."""
    costs, latencies, qualities = [], [], []
    for budget in dict.fromkeys(unit["budget"] for unit in moved["units"]):
        dense, seed = dense_model(task), task.settings.transfer.seeds[0]
        plan = transferred_plan(task.name, row.name, seed, budget)
        student = student_model(dense, plan, last_weights(task, row, unit_name(seed, budget)))
        # The dense network with the same blocks marked: one that stays dense is no part of the cost.
        marked = eugen.replace(dense, dict.fromkeys(plan, eugen.DenseConfig())).model
        costs.append(measurement.cost(task, marked, student, budget))
        traces = TRACES / task.name / row.name
        for both in measurement.deployments(task, dense, student, budget, traces, settings, run):
            latencies += measurement.latencies(task, both, settings, run)
            qualities += measurement.quality(task, both, run)
    return assemble(settings, task, row, costs, latencies, qualities, run.overhead_seconds)


def last_weights(task: Task, row: Method, unit: str) -> dict[str, Tensor]:
    """What a unit's last stage changed: fine-tuned if it was, else transferred."""
    tuned = FINETUNED / task.name / row.name / f"{unit}.safetensors"
    return load_file(tuned if tuned.exists() else TRANSFERRED / task.name / row.name / tuned.name)


def picture(task: Task, row: Method, moved: dict[str, Any]) -> list[Path]:
    """Leave what the task shows of the first seed's network per budget; the dense row has the truth too."""
    out = PICTURES / task.name / row.name
    seed, made = task.settings.transfer.seeds[0], []
    for budget in dict.fromkeys(unit["budget"] for unit in moved["units"]):
        plan = transferred_plan(task.name, row.name, seed, budget)
        student = student_model(dense_model(task), plan, last_weights(task, row, unit_name(seed, budget)))
        made += task.pictures(student, out / f"budget{budget:g}")
    return made + (task.truth_pictures(out / "truth") if row.layer == "dense" else [])


def not_applicable(settings: Params, task: str, method: str, why: str) -> record.NotApplicable:
    """What stands in the place of a cell that has no meaning."""
    return record.NotApplicable(task=task, method=method, profile=settings.profile, not_applicable=why)


def assemble(
    settings: Params,
    task: Task,
    method: Method,
    costs: list[record.Cost],
    latencies: list[record.Latency],
    qualities: list[record.PrecisionQuality],
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
        precisions=qualities,
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

    Those of the first budget and precision have plain names: a chart shows them beside the dense row's.
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
    first = cell.latencies[0].dtype if cell.latencies else ""
    for latency in cell.latencies:
        named = "" if latency.dtype == first else f"{latency.dtype}."
        prefix = f"{prefixes[latency.budget]}{named}batch{latency.batch}."
        flat[f"{prefix}speedup"] = latency.speedup
        flat[f"{prefix}ms"] = median(latency.method_ms)
        flat[f"{prefix}peak_memory_mb"] = latency.peak_bytes_method / 1e6
        if latency.limit_share is not None:
            flat[f"{prefix}limit_share"] = latency.limit_share
        if latency.joules_method is not None:
            flat[f"{prefix}energy_mj"] = 1e3 * latency.joules_method
    for found in cell.precisions:
        if found.dtype != first:
            flat[f"{prefixes[found.budget]}{found.dtype}.{cell.quality_name}"] = found.quality
    return flat


if __name__ == "__main__":
    typer.run(profile)
