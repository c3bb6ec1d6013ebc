"""What the figures of rows trained from scratch draw: plain rows from the records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from stages.reporting.inputs import DENSE
from stages.reporting.intervals import mean_interval, nearest
from stages.reporting.scratch import runs
from stages.tracking.record import ScratchRecord

SETTLED = 0.4
"""Share of the steps after which curves are compared: before it all rows fall from the same height."""
Point = dict[str, Any]


def shown(records: Sequence[ScratchRecord], variant: str) -> list[tuple[ScratchRecord, float]]:
    """The rows of a figure with the budget that stands for each: the nearest to 0.3; dense has its own."""
    swept = [budget for budget in runs.row_budgets(records, variant) if budget < 1]
    wanted = nearest(swept) if swept else 1.0
    found = []
    for record in records:
        own = runs.budgets(record, variant)
        only = own if record.row == DENSE or own == [1.0] else [b for b in own if b == wanted]
        found += [(record, budget) for budget in only]
    return found


def curves(records: Sequence[ScratchRecord], variant: str) -> list[Point]:
    """Validation quality along the training, mean over the seeds at the chosen rate that reached the end."""
    found = shown(records, variant)
    return [point for record, budget in found for point in _curve(records, record, variant, budget)]


def _curve(
    records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float
) -> Iterator[Point]:
    """Seconds are steps of the usual length, not what the training took by the clock."""
    cost, usual = runs.cost_at(record, variant, budget), runs.step_ms(records, record, variant, budget)
    finished = [run for run in runs.compared(record, variant, budget) if not run.diverged and run.curve]
    if cost is None or usual is None or not finished:
        return
    steps = set.intersection(*({point.step for point in run.curve} for run in finished))
    for step in sorted(steps):
        found = [point for run in finished for point in run.curve if point.step == step]
        yield {
            "row": record.row,
            "budget": budget,
            "step": step,
            "flops": 6 * cost.macs * cost.batch_size * step,
            "seconds": step * usual[0] / 1000,
            "quality": fmean(point.validation for point in found),
        }


def settled(points: Sequence[Point]) -> list[float]:
    """Lowest and highest quality after the first steps: the range worth drawing."""
    last = max(point["step"] for point in points)
    later = [point["quality"] for point in points if point["step"] >= SETTLED * last]
    margin = 0.04 * (max(later) - min(later)) or 0.01 * abs(max(later)) or 1e-3
    return [min(later) - margin, max(later) + margin]


def rates(records: Sequence[ScratchRecord], variant: str) -> tuple[list[Point], list[str]]:
    """Validation quality of the first seed at each rate, and the runs that diverged in words."""
    points, lost = [], []
    for record, budget in shown(records, variant):
        for run in runs.trials(record, variant, budget):
            if run.validation is None:
                lost.append(f"{record.row} at {run.learning_rate:g}")
                continue
            point = {"row": record.row, "budget": budget, "rate": run.learning_rate, "chosen": run.chosen}
            points.append(point | {"quality": run.validation})
    return points, lost


def depths(records: Sequence[ScratchRecord]) -> list[tuple[list[str], list[Point]]]:
    """Variants of one network and training that replace different numbers of blocks, with their results."""
    groups: dict[tuple[int, ...], dict[int, str]] = {}
    for variant in runs.variants(records):
        for record, budget in shown(records, variant):
            cost = runs.cost_at(record, variant, budget)
            if cost and record.row != DENSE:
                groups.setdefault(runs.network(cost), {}).setdefault(cost.blocks_replaced, variant)
    found = []
    for group in groups.values():
        names = [group[count] for count in sorted(group)]
        points = [point for name in names for point in _depth(records, name)]
        if len(names) > 1 and points:
            found.append((names, points))
    return found


def _depth(records: Sequence[ScratchRecord], variant: str) -> Iterator[Point]:
    for record, budget in shown(records, variant):
        mean = mean_interval(list(runs.scores(record, variant, budget).values()))
        cost = runs.cost_at(record, variant, budget)
        if mean and cost and record.row != DENSE:
            yield {
                "row": record.row,
                "budget": budget,
                "replaced": cost.blocks_replaced,
                "quality": mean.mean,
                "quality_low": mean.low,
                "quality_high": mean.high,
            }
