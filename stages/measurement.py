"""What the profile stage measures of a network beside the dense one: cost, time, memory, energy, quality."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import eugen
from eugen.cost import call_cost, model_cost
from eugen.timing import (
    Clock,
    Rates,
    compare_models,
    copy_rate,
    energy_per_call,
    peak_memory,
    placed,
    write_trace,
)
from eugen.timing.subjects import moved
from stages.deployment import Precision, between_float32, deployed, floating
from stages.params import Params
from stages.tasks import Task
from stages.tracking import Run, record

ENERGY_SECONDS = 1.0
"""How long a call is repeated where the device has a meter."""


@dataclass(frozen=True)
class Deployment:
    """Both networks in one precision on the device; `traces`: folder of the traces, which MLflow copies."""

    budget: float
    precision: Precision
    dense: nn.Module
    student: nn.Module
    traces: Path


def deployments(
    task: Task, dense: nn.Module, student: nn.Module, budget: float, traces: Path, settings: Params, run: Run
) -> Iterator[Deployment]:
    """One for each of the task's precisions in which the student can be deployed."""
    device = settings.run.device
    for precision in task.settings.profile.precisions:
        try:
            theirs = deployed(student, precision, device)
        except eugen.UnsuitableBlock as refused:
            run.progress(f"budget {budget:g}, {precision}: not measured: {refused}")
            continue
        yield Deployment(budget, precision, deployed(dense, precision, device), theirs, traces)


def cost(task: Task, dense: nn.Module, student: nn.Module, budget: float) -> record.Cost:
    """Exact cost of both networks for one example."""
    base = model_cost(dense, task.example(1), task.call)
    own = model_cost(student, task.example(1), task.call)
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


def latencies(task: Task, both: Deployment, settings: Params, run: Run) -> list[record.Latency]:
    """Interleaved whole-model latencies of both networks at each batch size."""
    return [_latency(task, both, batch, settings, run) for batch in task.settings.profile.batches]


def _latency(task: Task, both: Deployment, batch: int, settings: Params, run: Run) -> record.Latency:
    chosen, device = task.settings.profile, settings.run.device
    models = both.dense, both.student
    example = moved(task.example(batch), device, floating(both.precision))
    timed = compare_models(
        *(placed(model, example, task.call) for model in models),
        placements=chosen.placements,
        pairs=2 * math.ceil(chosen.pairs / chosen.placements / 2),
        max_seconds=chosen.seconds,
        clock=Clock(device),
    )
    speedup, low, high = timed.speedup()
    place = f"budget {both.budget:g}, {both.precision}, batch {batch}"
    run.progress(f"{place}: {speedup:.2f}x [{low:.2f}, {high:.2f}]")
    calls = [partial(task.call, model, example) for model in models]
    latency = record.Latency(
        budget=both.budget,
        device=device,
        dtype=both.precision,
        batch=batch,
        threads=settings.run.timing_threads,
        placements=chosen.placements,
        dense_ms=timed.base_ms,
        method_ms=timed.other_ms,
        speedup=speedup,
        speedup_low=low,
        speedup_high=high,
        **_limits(calls, models, device),
        **_memory(calls, models, device),
        **_energy(calls, device),
    )
    # The file stays until the next one takes its place.
    trace = write_trace(calls[1], both.traces, place.replace(",", ""), device=device)
    run.artifact(trace, "traces")
    return latency


def _limits(calls: list[partial[Any]], models: tuple[nn.Module, nn.Module], device: str) -> dict[str, Any]:
    dense, own = (call_cost(call, model) for call, model in zip(calls, models, strict=True))
    # Anew each time: what a shared machine reaches changes within a stage.
    known = Rates(copy_rate(device), {}).knowing({*dense.macs, *own.macs}, device)
    least = known.limit(own)
    return {
        "speedup_limit": dense.total_macs / own.total_macs,
        "least_ms_dense": known.limit(dense).ms,
        "least_ms_method": least.ms,
        "binds": least.binds,
    }


def _memory(calls: list[partial[Any]], models: tuple[nn.Module, nn.Module], device: str) -> dict[str, Any]:
    dense, own = (peak_memory(call, model, device=device) for call, model in zip(calls, models, strict=True))
    return {
        "peak_bytes_dense": dense.allocated,
        "peak_bytes_method": own.allocated,
        "reserved_bytes_dense": dense.reserved,
        "reserved_bytes_method": own.reserved,
    }


def _energy(calls: list[partial[Any]], device: str) -> dict[str, Any]:
    dense, own = (energy_per_call(call, device=device, seconds=ENERGY_SECONDS) for call in calls)
    return {
        "joules_dense": dense.joules_per_call,
        "joules_method": own.joules_per_call,
        "energy_meter": own.meter,
    }


def quality(task: Task, both: Deployment, run: Run) -> list[record.PrecisionQuality]:
    """The student's quality on the test part, where more than one precision is profiled.

    It takes and returns float32 from then on: the last that is done with it.
    """
    if len(task.settings.profile.precisions) == 1:
        return []
    network = between_float32(both.student, both.precision)
    found = task.evaluate(network, "test")[task.quality_name]
    run.progress(f"budget {both.budget:g}, {both.precision}: {task.quality_name} {found:.4f}")
    return [record.PrecisionQuality(budget=both.budget, dtype=both.precision, quality=found)]
