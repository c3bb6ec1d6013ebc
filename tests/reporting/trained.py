"""Random valid records of rows trained from scratch. Only tests use them: no number here was measured."""

from __future__ import annotations

import random
from typing import Any

from stages.tracking.record import CurvePoint, ScratchCost, ScratchRecord, ScratchRun

from . import factory

ROWS = {
    "dense": {"layer": "dense"},
    "narrow": {"layer": "narrow"},
    "narrow_gated": {"layer": "narrow_gated"},
    "low_rank": {"layer": "low_rank"},
    "eugen": {"layer": "eugen", "order": 2, "projection": "learned"},
    "eugen_product": {"layer": "eugen", "order": 2, "min_order": 2, "projection": "learned"},
    "eugen_order1": {"layer": "eugen", "order": 1, "projection": "learned"},
    "eugen_shared": {"layer": "eugen", "order": 2, "projection": "learned", "sharing": "shared"},
}
LOSS = {
    "dense": 2.77,
    "narrow": 2.83,
    "narrow_gated": 2.735,
    "low_rank": 3.05,
    "eugen": 2.76,
    "eugen_product": 2.73,
    "eugen_order1": 2.99,
    "eugen_shared": 2.75,
}
VARIANTS = {"base": (400, 4, 1.0), "long": (1000, 4, 0.93), "half": (400, 2, 0.995)}
"""Steps, replaced blocks of four, and the factor of the loss."""
RATES = (1e-3, 2e-3, 4e-3)
BASELINES = {"unigram_bits_per_byte": 4.41, "bigram_bits_per_byte": 3.37}


def scratch_params(task: str = "language", rows: dict[str, Any] | None = None) -> dict[str, Any]:
    """A params.yaml that trains from scratch."""
    section = {"rows": rows or ROWS, "tasks": {task: {"budgets": [0.3], "seeds": [0, 1, 2]}}}
    return factory.params() | {"scratch": section}


def scratch_record(
    row: str,
    *,
    task: str = "language",
    loss: float | None = None,
    layer: dict[str, Any] | None = None,
    budgets: tuple[float, ...] = (0.3,),
    variants: tuple[str, ...] = tuple(VARIANTS),
    seeds: int = 3,
    **change: Any,
) -> ScratchRecord:
    """A row trained from scratch; the same for the same names. Lower is better."""
    rng = random.Random(f"{task}/{row}")
    budgets = (1.0,) if row == "dense" else budgets
    level = LOSS.get(row, 2.9) if loss is None else loss
    keys = [(variant, budget) for variant in variants for budget in budgets]
    values: dict[str, Any] = {
        "task": task,
        "row": row,
        "profile": "study",
        "provisional": False,
        "quality_name": "bits_per_byte",
        "higher_is_better": False,
        "params": {"task": {}, "scratch": {}, "row": layer or ROWS.get(row, {"layer": row})},
        "runs": [run for key in keys for run in scratch_runs(rng, *key, level, seeds)],
        "costs": [scratch_cost(rng, variant, 1.0 if row == "dense" else b) for variant, b in keys],
        "environment": factory.environment(),
        "data_sha256": {"data": "0" * 64},
    }
    return ScratchRecord(**(values | change))


def scratch_runs(
    rng: random.Random, variant: str, budget: float, loss: float, seeds: int
) -> list[ScratchRun]:
    """Three rates with the first seed, of which the middle one is the best; the other seeds at that."""
    steps, _, factor = VARIANTS[variant]
    level = loss * factor + 0.1 * (0.3 - min(budget, 0.3))
    plan = [(rate, 0, rate == RATES[1]) for rate in RATES] + [(RATES[1], s, True) for s in range(1, seeds)]
    return [scratch_run(rng, variant, budget, level, steps, *trial) for trial in plan]


def scratch_run(
    rng: random.Random,
    variant: str,
    budget: float,
    level: float,
    steps: int,
    rate: float,
    seed: int,
    chosen: bool,
) -> ScratchRun:
    """One training whose curve falls to its quality."""
    end = level + (0.0 if chosen else 0.05) + 0.01 * seed + rng.gauss(0, 0.002)
    speed = 0.05 * (0.5 + 0.5 * budget)
    curve = [
        CurvePoint(
            step=step,
            seconds=step * speed,
            train_loss=end + 4 * 0.99**step,
            validation=end + 4 * 0.99**step,
        )
        for step in range(0, steps + 1, 40)
    ]
    return ScratchRun(
        variant=variant,
        budget=budget,
        seed=seed,
        learning_rate=rate,
        chosen=chosen,
        validation=end,
        quality=end + 0.02,
        extra=BASELINES | {"accuracy": 1 / end},
        curve=curve,
        seconds=steps * speed,
    )


def scratch_cost(rng: random.Random, variant: str, budget: float) -> ScratchCost:
    """Exact cost of a made-up network, half of it in the four blocks."""
    steps, replaced, _ = VARIANTS[variant]
    ffn_dense = replaced * 300_000
    ffn = int(ffn_dense * budget)
    saved = ffn_dense - ffn
    speedup = 1.0 if budget == 1 else rng.uniform(1.1, 1.6)
    dense_ms = [rng.uniform(48, 52) for _ in range(20)]
    return ScratchCost(
        variant=variant,
        budget=budget,
        blocks=4,
        blocks_replaced=replaced,
        steps=steps,
        batch_size=24,
        params=2_400_000 - saved,
        params_dense=2_400_000,
        macs=128 * (2_400_000 - saved),
        macs_dense=128 * 2_400_000,
        ffn_macs=ffn,
        ffn_macs_dense=ffn_dense,
        step_ms_dense=dense_ms,
        step_ms=[ms / speedup for ms in dense_ms],
        training_speedup=speedup,
        training_speedup_low=speedup * 0.98,
        training_speedup_high=speedup * 1.02,
    )


def diverging(record: ScratchRecord, rate: float) -> ScratchRecord:
    """The record with its runs at a rate diverged."""
    lost = {"validation": None, "quality": None, "diverged": True, "curve": [], "extra": {}}
    runs = [r.model_copy(update=lost) if r.learning_rate == rate else r for r in record.runs]
    return record.model_copy(update={"runs": runs})


def all_scratch(**change: Any) -> list[ScratchRecord]:
    """Every row of one task."""
    return [scratch_record(row, **change) for row in ROWS]


def duel(gap: float, **change) -> list[ScratchRecord]:
    """Dense, a narrow, a gated block and an order-2 EUGen that is better than the gated one by `gap`."""
    losses = {"dense": 2.8, "narrow": 2.9, "narrow_gated": 2.7, "eugen_product": 2.7 - gap}
    return [scratch_record(row, loss=loss, **change) for row, loss in losses.items()]
