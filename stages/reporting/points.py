"""What the figures draw: plain rows from the records."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from stages.reporting.inputs import DENSE
from stages.reporting.intervals import budgets, mean_interval
from stages.reporting.settings import setting_scores
from stages.reporting.table import cost_at, every_latency_at, latencies_at
from stages.tracking.record import CellRecord, Latency

MOST_ROWS = 45
"""Rows of one figure; more are not read, and do not fit a screen."""
Timing = tuple[str, str, int]
"""Device, dtype and batch of a latency."""


def timings(records: list[CellRecord]) -> list[Timing]:
    """The (device, dtype, batch) triples that were timed."""
    found = (x for record in records for budget in budgets(record) for x in latencies_at(record, budget))
    return sorted({(x.device, x.dtype, x.batch) for x in found})


def speeds(records: list[CellRecord], timing: Timing) -> list[dict[str, Any]]:
    """Measured speed-up with its interval and the limit, a row per method and budget."""
    return [
        {
            "row": record.method if record.method == DENSE else f"{record.method} {budget:g}",
            "method": record.method,
            "budget": budget,
            "speedup": latency.speedup,
            "speedup_low": latency.speedup_low,
            "speedup_high": latency.speedup_high,
            "limit": latency.speedup_limit,
        }
        for record in records
        for budget in budgets(record)
        for latency in _timed(record, budget, timing)
    ]


def ends(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """The rows, and whether some were left out: of a sweep too long to draw, each method's two ends stay."""
    if len(rows) <= MOST_ROWS:
        return rows, False
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row["budget"])
    kept = [row for row in rows if row["budget"] in (min(found[row["method"]]), max(found[row["method"]]))]
    return kept, len(kept) < len(rows)


def sweep(records: list[CellRecord], setting: str) -> list[dict[str, Any]]:
    """Quality of one setting beside features and MACs, a row per method and budget below the dense cost."""
    rows = []
    for record in records:
        for budget in budgets(record):
            interval = mean_interval(list(setting_scores(record, budget, setting).values()))
            cost = cost_at(record, budget)
            features = [n for r in record.seeds if r.budget == budget for n in r.num_features]
            if budget == 1 or interval is None or cost is None or not features:
                continue
            rows.append(
                {
                    "method": record.method,
                    "budget": budget,
                    "features": fmean(features),
                    "macs": cost.ffn_macs / cost.ffn_macs_dense,
                    "quality": interval.mean,
                    # A band that reached 0 would have no end on a logarithmic axis.
                    "quality_low": max(interval.low, interval.mean / 10),
                    "quality_high": interval.high,
                }
            )
    return rows


def precisions(records: list[CellRecord], timing: Timing) -> list[dict[str, Any]]:
    """Speed-ups in every precision on this device at this batch, at the largest budget below 1."""
    rows = []
    for record in records:
        swept = budgets(record)
        budget = max((b for b in swept if b < 1), default=swept[-1])
        for x in every_latency_at(record, budget):
            if (x.device, x.batch) == (timing[0], timing[2]):
                bounds = {"speedup_low": x.speedup_low, "speedup_high": x.speedup_high}
                rows.append({"row": record.method, "precision": x.dtype, "speedup": x.speedup} | bounds)
    return rows


def fits(records: list[CellRecord], budget: float) -> list[dict[str, Any]]:
    """Held-out R² of each block at one budget, mean over seeds, a row per method and block."""
    rows = []
    for record in records:
        fits = [result.fit_r2 for result in record.seeds if result.budget == budget]
        for block, values in enumerate(zip(*fits, strict=False), start=1):
            rows.append({"method": record.method, "block": block, "r2": fmean(values)})
    return rows


def _timed(record: CellRecord, budget: float, timing: Timing) -> list[Latency]:
    return [x for x in latencies_at(record, budget) if (x.device, x.dtype, x.batch) == timing]
