"""reports/scratch.csv: one row per (task, row, variant, budget) trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from stages.reporting.inputs import DENSE
from stages.reporting.intervals import mean_interval
from stages.reporting.scratch import runs
from stages.tracking.record import ScratchCost, ScratchRecord

COLUMNS = {
    "task": "what the network does",
    "row": "what stands in for feed-forward blocks of a network that is trained from scratch",
    "variant": "the sizes and the length of that training",
    "budget": "allowed fraction of a dense block's multiply-accumulates (MACs) at inference",
    "seeds": "number of seeds behind quality",
    "diverged": "seeds at the chosen learning rate that diverged and have no quality; without one, all runs",
    "quality_name": "the quality measure",
    "higher_is_better": "whether a larger quality is a better one",
    "learning_rate": "the rate that the validation part chose with the first seed; empty if all diverged",
    "rate_at_end": "whether it is the least or the greatest of the rates tried: a further one may be better",
    "rates_tried": "learning rates tried with the first seed",
    "quality": "mean over seeds on the test part at the chosen rate",
    "quality_ci95": "half-width of the 95 % Student-t interval of quality over seeds; empty for one seed",
    "validation": "mean over seeds on the validation part",
    "quality_dense": "mean of the dense network trained the same way, over its own seeds",
    "difference": "quality less that of dense, mean over the seeds that both have",
    "difference_ci95": "half-width of the 95 % Student-t interval of difference",
    "verdict": "better or worse than dense where that interval excludes 0",
    "blocks": "feed-forward blocks of the network",
    "blocks_replaced": "how many of them the row stands in for",
    "steps": "optimiser steps of a training",
    "batch_size": "examples per training step",
    "params_ratio": "parameters of the whole model over those of the dense one",
    "macs_ratio": "MACs of the whole model over those of the dense one",
    "training_speedup": "dense training step over the row's: median over interleaved pairs",
    "training_speedup_ci95": "half-width of the 95 % bootstrap interval of training_speedup",
    "examples_per_second": "training throughput: that of the dense network times training_speedup",
    "examples_per_second_dense": "that of the dense network: its median step over all rows of the variant",
    "train_seconds": "seconds of a training's steps at that throughput",
    "provisional": "smoke sizes, uncommitted source or a single seed: never in the README",
}


def results(records: Sequence[ScratchRecord]) -> pd.DataFrame:
    """All rows with the columns of `COLUMNS`, in the order of the records."""
    rows = [row for record in records for row in _rows(records, record)]
    whole = ["seeds", "diverged", "rates_tried", "blocks", "blocks_replaced", "steps", "batch_size"]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(whole, "Int64"))


def _rows(records: Sequence[ScratchRecord], record: ScratchRecord) -> Iterator[dict[str, Any]]:
    for variant in runs.variants([record]):
        for budget in runs.budgets(record, variant):
            key = {"task": record.task, "row": record.row, "variant": variant, "budget": budget}
            cost = runs.cost_at(record, variant, budget)
            quality, speed = (f(records, record, variant, budget) for f in (_quality, _speed))
            yield key | quality | (_cost(cost) if cost else {}) | speed


def _quality(
    records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float
) -> dict[str, Any]:
    compared = runs.compared(record, variant, budget)
    mean = mean_interval(list(runs.scores(record, variant, budget).values()))
    dense = list(runs.dense_scores(records, record, variant, budget).values())
    comparison = None if record.row == DENSE else runs.against_dense(records, record, variant, budget)
    return {
        "seeds": mean.n if mean else 0,
        "diverged": sum(run.diverged for run in compared or runs.at(record, variant, budget)),
        "quality_name": record.quality_name,
        "higher_is_better": record.higher_is_better,
        "learning_rate": runs.rate(record, variant, budget),
        "rate_at_end": runs.rate_at_end(record, variant, budget),
        "rates_tried": runs.tried(record, variant, budget),
        "quality": mean and mean.mean,
        "quality_ci95": mean and mean.half,
        "validation": runs.validation(record, variant, budget),
        "quality_dense": fmean(dense) if dense else None,
        "difference": comparison and comparison.difference.mean,
        "difference_ci95": comparison and comparison.difference.half,
        "verdict": comparison and comparison.verdict,
        "provisional": runs.is_provisional(record, variant, budget),
    }


def _cost(cost: ScratchCost) -> dict[str, Any]:
    return {
        "blocks": cost.blocks,
        "blocks_replaced": cost.blocks_replaced,
        "steps": cost.steps,
        "batch_size": cost.batch_size,
        "params_ratio": cost.params / cost.params_dense,
        "macs_ratio": cost.macs / cost.macs_dense,
        "training_speedup": cost.training_speedup,
        "training_speedup_ci95": (cost.training_speedup_high - cost.training_speedup_low) / 2,
    }


def _speed(
    records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float
) -> dict[str, Any]:
    own, dense = runs.examples_per_second(records, record, variant, budget)
    return {
        "examples_per_second": own,
        "examples_per_second_dense": dense,
        "train_seconds": runs.training_seconds(records, record, variant, budget),
    }
