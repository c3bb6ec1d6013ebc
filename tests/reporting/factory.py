"""Random valid records of a made-up run. Only tests use them: no number here was measured."""

from __future__ import annotations

import random
from typing import Any

from stages.tracking.record import (
    CellRecord,
    Cost,
    Environment,
    Failure,
    Latency,
    NotApplicable,
    SeedResult,
)

METHODS = {
    "dense": {"layer": "dense"},
    "narrow": {"layer": "narrow"},
    "prune": {"layer": "prune"},
    "linear": {"layer": "linear"},
    "low_rank_aware": {"layer": "low_rank_aware"},
    "snnk": {"layer": "snnk"},
    "eugen": {"layer": "eugen", "order": 2, "projection": "orthogonal"},
    "eugen_teacher": {"layer": "eugen", "order": 2, "projection": "teacher", "direct_linear": True},
}
QUALITY = {
    "dense": 1.0,
    "narrow": 0.70,
    "prune": 0.90,
    "linear": 0.80,
    "low_rank_aware": 0.83,
    "snnk": 0.72,
    "eugen": 0.81,
    "eugen_teacher": 0.88,
}
TASKS = {"embedding": ("cosine", 1.0, (0.3,)), "vision": ("top-1", 0.97, (0.15, 0.3))}


def params(methods: dict[str, Any] | None = None, profile: str = "study") -> dict[str, Any]:
    """A params.yaml for both tasks."""
    tasks = {
        task: {"transfer": {"budgets": list(b), "seeds": [0, 1, 2]}} for task, (_, _, b) in TASKS.items()
    }
    return {"profile": profile, "run": {"device": "cpu"}, "tasks": tasks, "methods": methods or METHODS}


def environment(**change: Any) -> Environment:
    """A made-up machine."""
    values: dict[str, Any] = {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "versions": {"python": "3.11.2", "torch": "2.14.1"},
        "processor": "Example CPU",
        "cores": 2,
        "memory_gb": 8.0,
        "fingerprint": "abc123",
    }
    return Environment(**(values | change))


def cell(task: str, method: str, *, layer: dict[str, Any] | None = None, **change: Any) -> CellRecord:
    """A random valid record; the same for the same names."""
    rng = random.Random(f"{task}/{method}")
    name, dense, budgets = TASKS[task]
    budgets = (1.0,) if method == "dense" else budgets
    values: dict[str, Any] = {
        "task": task,
        "method": method,
        "profile": "study",
        "provisional": False,
        "quality_name": name,
        "higher_is_better": True,
        "params": {"task": {"transfer": {"seeds": [0, 1, 2]}}, "method": layer or METHODS.get(method, {})},
        "dense_metrics": {name: dense},
        "seeds": [seed_result(rng, method, dense, b, s) for b in budgets for s in range(3)],
        "costs": [cost(b) for b in budgets],
        "latencies": [latency(rng, method, b, batch) for b in budgets for batch in (1, 32)],
        "train_seconds_dense": 80.0,
        "environment": environment(),
        "data_sha256": {"data": "0" * 64},
        "weights_sha256": {"dense": "1" * 64},
        "stage_overhead_seconds": {"transfer": 3.1 + rng.random(), "profile": 2.2 + rng.random()},
    }
    return CellRecord(**(values | change))


def seed_result(rng: random.Random, method: str, dense: float, budget: float, seed: int) -> SeedResult:
    """One seed; fine-tuned at budget 0.3 only."""
    quality = dense * QUALITY.get(method, 0.8) * (0.9 + 0.1 * min(1.0, budget / 0.3))
    quality += 0.0 if method == "dense" else rng.gauss(0, 0.004)
    tuned = quality + 0.03 if budget == 0.3 else None
    return SeedResult(
        seed=seed,
        budget=budget,
        quality_dense=dense,
        quality_transfer_only=quality,
        quality_finetuned=tuned,
        learning_rate=3e-4 if tuned else None,
        extra_transfer_only={"top10": quality - 0.2},
        extra_finetuned={"top10": tuned - 0.2} if tuned else {},
        fit_r2=[] if method == "dense" else [quality - 0.15 - 0.02 * block for block in range(6)],
        transfer_seconds=2 + rng.random(),
        finetune_seconds=9 + rng.random() if tuned else 0.0,
    )


def tuned(record: CellRecord, budgets: tuple[float, ...]) -> CellRecord:
    """The record fine-tuned at these budgets alone."""
    seeds = [
        s.model_copy(
            update={"quality_finetuned": s.quality_transfer_only + 0.01 if s.budget in budgets else None}
        )
        for s in record.seeds
    ]
    return record.model_copy(update={"seeds": seeds})


def cost(budget: float) -> Cost:
    """Exact cost of a made-up network half of which is feed-forward."""
    ffn = int(12_000_000 * budget)
    return Cost(
        budget=budget,
        params=10_000_000 + ffn,
        params_dense=22_000_000,
        ffn_params=ffn,
        ffn_params_dense=12_000_000,
        macs=64 * (10_000_000 + ffn),
        macs_dense=64 * 22_000_000,
        ffn_macs=ffn,
        ffn_macs_dense=12_000_000,
        weight_bytes=4 * (10_000_000 + ffn),
        weight_bytes_dense=4 * 22_000_000,
    )


def latency(rng: random.Random, method: str, budget: float, batch: int) -> Latency:
    """Paired samples whose stated median and interval go together."""
    speedup = 1.0 if method == "dense" else rng.uniform(1.3, 1.8)
    dense_ms = [batch * rng.uniform(9.5, 10.5) for _ in range(20)]
    return Latency(
        budget=budget,
        device="cpu",
        dtype="float32",
        batch=batch,
        threads=2,
        dense_ms=dense_ms,
        method_ms=[sample / speedup for sample in dense_ms],
        speedup=speedup,
        speedup_low=speedup * 0.97,
        speedup_high=speedup * 1.03,
        speedup_limit=22 / (10 + 12 * budget),
        peak_bytes_dense=90_000_000,
        peak_bytes_method=int(90_000_000 * (0.5 + budget / 2)),
    )


def failure(task: str, method: str | None, stage: str = "transfer") -> Failure:
    """A note that a failed stage leaves."""
    return Failure(
        stage=stage,
        task=task,
        method=method,
        error="ValueError: loss is NaN at step 3; lower the learning rate",
        traceback="Traceback (most recent call last):\n  <module>\nValueError: loss is NaN at step 3",
        time="2026-11-21T09:00:00+00:00",
    )


def all_cells(**change: Any) -> list[CellRecord]:
    """Both tasks, all methods."""
    return [cell(task, method, **change) for task in TASKS for method in METHODS]


SETTINGS = [f"{act}.{inputs}" for act in ("relu", "softplus", "gelu") for inputs in ("gaussian", "power_law")]
SWEEP = (0.05, 0.1, 0.2, 0.4, 0.8)
REPEATS = 4


def kernel_cell(
    method: str, *, strength: float = 1.0, budgets: tuple[float, ...] = SWEEP, **change: Any
) -> CellRecord:
    """A record of a task whose quality is an error, the mean over settings; a greater strength is better."""
    rng = random.Random(f"kernel/{method}")
    budgets = (1.0,) if method == "dense" else budgets
    seeds = [
        _kernel_seed(rng, method, strength, budget, seed) for budget in budgets for seed in range(REPEATS)
    ]
    values: dict[str, Any] = {
        "quality_name": "relative_mse",
        "higher_is_better": False,
        "params": {"method": METHODS.get(method, {"layer": method})},
        "dense_metrics": {"relative_mse": 8e-14},
        "seeds": seeds,
        "costs": [cost(budget) for budget in budgets],
        "latencies": [latency(rng, method, budget, 128) for budget in budgets],
    }
    return cell("embedding", method).model_copy(update={"task": "kernel"} | values | change)


def _kernel_seed(rng: random.Random, method: str, strength: float, budget: float, seed: int) -> SeedResult:
    level = 8e-14 if method == "dense" else 1 / (1 + 6 * strength * budget)
    own = {
        f"relative_mse.{name}": level * (1 - 0.08 * i) * rng.gauss(1, 0.01) for i, name in enumerate(SETTINGS)
    }
    return SeedResult(
        seed=seed,
        budget=budget,
        quality_dense=8e-14,
        quality_transfer_only=sum(own.values()) / len(own),
        extra_transfer_only=own,
        fit_r2=[1 - value for value in own.values()],
        num_features=[max(1, round(256 * budget))] * len(own),
        transfer_seconds=1 + rng.random(),
    )


def not_applicable(task: str, method: str) -> NotApplicable:
    """What stands in the place of a cell that has no meaning."""
    reason = f"layer {method!r} replaces whole blocks; this one has no output matrix (down=None)"
    return NotApplicable(task=task, method=method, profile="study", not_applicable=reason)
