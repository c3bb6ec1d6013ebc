"""reports/results.csv: one row per (task, method, budget, device, dtype, batch)."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import pandas as pd

from stages.reporting.intervals import budgets, dense_scores, final_scores, mean_interval, scores
from stages.tracking.record import CellRecord, Cost, Latency

COLUMNS = {
    "task": "what the network does",
    "method": "what stands in for every feed-forward block; dense is the untouched network",
    "budget": "allowed fraction of a dense block's multiply-accumulates (MACs) at inference",
    "seeds": "number of seeds behind quality",
    "quality_name": "the quality measure",
    "higher_is_better": "whether a larger quality is a better one",
    "quality": "mean over seeds after fine-tuning; after transfer alone where nothing was fine-tuned",
    "quality_ci95": "half-width of the 95 % Student-t interval of quality over seeds; empty for one seed",
    "quality_dense": "mean quality of the dense network at the seeds behind quality",
    "quality_transfer_only": "mean over all seeds after transfer alone: no gradient through the network",
    "params_ratio": "parameters of the whole model over those of the dense one",
    "macs_ratio": "MACs of the whole model over those of the dense one",
    "device": "where latency was measured",
    "dtype": "precision in which latency was measured, for both networks",
    "batch": "examples per forward pass",
    "speedup": "dense latency over the method's: whole model, interleaved pairs",
    "speedup_ci95": "half-width of the 95 % interval of speedup",
    "speedup_limit": "the speed-up if time followed MACs",
    "peak_memory_ratio": "peak memory of a forward pass over the dense network's",
    "energy_ratio": "energy of a forward pass over the dense network's; empty without a meter",
    "limit_share": "the roofline's least time over the method's latency: the achieved share of the limit",
    "quality_in_dtype": "the first seed's quality in this precision; empty where one alone was profiled",
    "transfer_seconds": "mean seconds per seed to transfer all blocks",
    "finetune_seconds": "mean seconds per seed to fine-tune; empty if it was not",
    "provisional": "smoke sizes, uncommitted source or a single seed: never in the README",
}

MAYBE = ("energy_ratio", "limit_share", "quality_in_dtype")
"""Columns that may be empty throughout: still numbers."""


def results(records: list[CellRecord]) -> pd.DataFrame:
    """All rows with the columns of `COLUMNS`, in the order of the records."""
    rows = [row for record in records for row in _rows(record)]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"batch": "Int64"} | dict.fromkeys(MAYBE, float))


def to_csv(frame: pd.DataFrame) -> str:
    """The table as CSV: ten significant digits, empty where there is no number."""
    return frame.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def is_provisional(record: CellRecord, budget: float) -> bool:
    """Whether one budget's row may not be quoted: by its profile, a dirty tree, or a single seed."""
    return record.provisional or record.environment.dirty or len(final_scores(record, budget)) < 2


def cost_at(record: CellRecord, budget: float) -> Cost | None:
    """The exact cost at one budget."""
    return next((cost for cost in record.costs if cost.budget == budget), None)


def every_latency_at(record: CellRecord, budget: float) -> list[Latency]:
    """The latencies at one budget: by device, by precision in the order of the profile, by batch."""
    found = [latency for latency in record.latencies if latency.budget == budget]
    order = list(dict.fromkeys(latency.dtype for latency in record.latencies))
    return sorted(found, key=lambda latency: (latency.device, order.index(latency.dtype), latency.batch))


def latencies_at(record: CellRecord, budget: float) -> list[Latency]:
    """Those in the profile's first precision, which quality and its intervals are of."""
    return [x for x in every_latency_at(record, budget) if x.dtype == record.latencies[0].dtype]


def quality_in(record: CellRecord, budget: float, dtype: str) -> float | None:
    """The first seed's quality in one precision; None where only one was profiled, or not this one."""
    found = (x.quality for x in record.precisions if (x.budget, x.dtype) == (budget, dtype))
    return next(found, None)


def _rows(record: CellRecord) -> list[dict[str, Any]]:
    """A budget that was not timed keeps its row, with empty timing columns."""
    rows = []
    for budget in budgets(record):
        shared = _quality_columns(record, budget) | _cost_columns(record, budget)
        for latency in every_latency_at(record, budget) or [None]:
            rows.append(shared | _timing_columns(record, latency))
    return rows


def _quality_columns(record: CellRecord, budget: float) -> dict[str, Any]:
    final = final_scores(record, budget)
    dense = dense_scores(record, budget)
    interval = mean_interval(list(final.values()))
    assert interval is not None, "a budget is listed because it has seeds"
    return {
        "task": record.task,
        "method": record.method,
        "budget": budget,
        "seeds": interval.n,
        "quality_name": record.quality_name,
        "higher_is_better": record.higher_is_better,
        "quality": interval.mean,
        "quality_ci95": interval.half,
        "quality_dense": fmean(dense[seed] for seed in final),
        "quality_transfer_only": fmean(scores(record, budget, "transfer").values()),
        "provisional": is_provisional(record, budget),
    }


def _cost_columns(record: CellRecord, budget: float) -> dict[str, Any]:
    at_budget = [result for result in record.seeds if result.budget == budget]
    tuned = [result.finetune_seconds for result in at_budget if result.quality_finetuned is not None]
    cost = cost_at(record, budget)
    return {
        "params_ratio": cost and cost.params / cost.params_dense,
        "macs_ratio": cost and cost.macs / cost.macs_dense,
        "transfer_seconds": fmean(result.transfer_seconds for result in at_budget),
        "finetune_seconds": fmean(tuned) if tuned else None,
    }


def energy_ratio(latency: Latency) -> float | None:
    """Energy of a forward pass over the dense network's; None without a meter."""
    if latency.joules_method is None or latency.joules_dense is None:
        return None
    return latency.joules_method / latency.joules_dense


def _timing_columns(record: CellRecord, latency: Latency | None) -> dict[str, Any]:
    if latency is None:
        return {}
    return {
        "device": latency.device,
        "dtype": latency.dtype,
        "batch": latency.batch,
        "speedup": latency.speedup,
        "speedup_ci95": (latency.speedup_high - latency.speedup_low) / 2,
        "speedup_limit": latency.speedup_limit,
        "peak_memory_ratio": latency.peak_bytes_method / latency.peak_bytes_dense,
        "energy_ratio": energy_ratio(latency),
        "limit_share": latency.limit_share,
        "quality_in_dtype": quality_in(record, latency.budget, latency.dtype),
    }
