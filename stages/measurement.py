"""What the profile stage measures of a network beside the dense one: cost, time, memory, energy, quality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import eugen
from eugen.cost import CallCost, call_cost, model_cost
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
from stages.deployment import Precision, between_float32, deployed, floating
from stages.params import Params
from stages.tasks import Task
from stages.tracking import Run, record

ENERGY_SECONDS = 1.0
"""How long a call is repeated where the device has a meter."""


@dataclass(frozen=True)
class Pair:
    """The dense network and the one beside it.

    Attributes:
        marked: the dense network, its blocks as layers: one that stays dense is no part of the cost.
        traces: folder of the traces, which MLflow copies.
    """

    dense: nn.Module
    marked: nn.Module
    student: nn.Module
    budget: float
    traces: Path

    def deployed(self, precision: Precision, device: str) -> tuple[nn.Module, nn.Module]:
        """Copies of both in one precision."""
        return deployed(self.dense, precision, device), deployed(self.student, precision, device)


def precisions(task: Task, pair: Pair, run: Run) -> list[Precision]:
    """Those of the task's in which this network can be deployed."""
    found = []
    for precision in task.settings.profile.precisions:
        try:
            deployed(pair.student, precision, "cpu")
        except eugen.UnsuitableBlock as refused:
            run.progress(f"budget {pair.budget:g}, {precision}: not measured: {refused}")
        else:
            found.append(precision)
    return found


def cost(task: Task, pair: Pair) -> record.Cost:
    """Exact cost of both networks for one example."""
    base = model_cost(pair.marked, task.example(1), task.call)
    own = model_cost(pair.student, task.example(1), task.call)
    return record.Cost(
        budget=pair.budget,
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


def latencies(
    task: Task, pair: Pair, precision: Precision, settings: Params, run: Run
) -> list[record.Latency]:
    """Interleaved whole-model latencies of both networks in one precision, at each batch size."""
    chosen, device = task.settings.profile, settings.run.device
    models = pair.deployed(precision, device)
    measured = []
    for batch in chosen.batches:
        example = task.example(batch).to(device)
        example = example.to(floating(precision)) if example.is_floating_point() else example
        timed = compare_models(
            *(placed(model, example, task.call) for model in models),
            placements=chosen.placements,
            pairs=2 * math.ceil(chosen.pairs / chosen.placements / 2),
            max_seconds=chosen.seconds,
            clock=Clock(device),
        )
        speedup, low, high = timed.speedup()
        run.progress(
            f"budget {pair.budget:g}, {precision}, batch {batch}: {speedup:.2f}x [{low:.2f}, {high:.2f}]"
        )
        calls = [partial(task.call, model, example) for model in models]
        latency = record.Latency(
            budget=pair.budget,
            device=device,
            dtype=precision,
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
        measured.append(latency)
        _trace(run, calls[1], pair.traces, f"budget {pair.budget:g} {precision} batch {batch}", device)
    return measured


def _limits(calls: list[partial[Any]], models: tuple[nn.Module, nn.Module], device: str) -> dict[str, Any]:
    dense, own = (call_cost(call, model) for call, model in zip(calls, models, strict=True))
    # Anew each time: what a shared machine reaches changes within a stage.
    known = Rates(copy_rate(device), {}).knowing({*dense.macs, *own.macs}, device)
    least = known.limit(own)
    return {
        "speedup_limit": _macs(dense) / _macs(own),
        "least_ms_dense": known.limit(dense).ms,
        "least_ms_method": least.ms,
        "binds": least.binds,
    }


def _macs(cost: CallCost) -> int:
    return sum(cost.macs.values())


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


def _trace(run: Run, call: partial[Any], folder: Path, name: str, device: str) -> None:
    """Leave PyTorch's trace with the MLflow run; the file stays until the next one takes its place."""
    run.artifact(write_trace(call, folder, name, device=device), "traces")


def quality(
    task: Task, pair: Pair, precision: Precision, settings: Params, run: Run
) -> list[record.PrecisionQuality]:
    """Quality on the test part in this precision, where more than one is profiled."""
    if len(task.settings.profile.precisions) == 1:
        return []
    network = between_float32(deployed(pair.student, precision, settings.run.device), precision)
    found = task.evaluate(network, "test")[task.quality_name]
    run.progress(f"budget {pair.budget:g}, {precision}: {task.quality_name} {found:.4f}")
    return [record.PrecisionQuality(budget=pair.budget, dtype=precision, quality=found)]
