"""Means over seeds with Student-t intervals, and the paired test behind every "better"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Literal, TypeVar

from scipy.stats import t as student_t

from stages.tracking.record import CellRecord

CONFIDENCE = 0.95
NEAR = 0.3
"""The budget that stands for a row where one must."""

Row = TypeVar("Row")
Stage = Literal["transfer", "finetuned"]
STAGES: tuple[Stage, ...] = ("transfer", "finetuned")
STAGE_NAMES: dict[Stage, str] = {"transfer": "after transfer alone", "finetuned": "after fine-tuning"}


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds; `half` is the 95 % interval's half-width, None below two seeds."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float:
        """Lower end; the mean itself where there is no interval."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end; the mean itself where there is no interval."""
        return self.mean + (self.half or 0.0)


@dataclass(frozen=True)
class Comparison:
    """`first` against `second` on the seeds that both have."""

    difference: Interval
    verdict: Literal["better", "worse", "no difference shown"]


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Mean and Student-t half-width; None for no values."""
    n = len(values)
    if n == 0:
        return None
    if n == 1:
        return Interval(values[0], None, 1)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Interval(fmean(values), quantile * stdev(values) / sqrt(n), n)


def compare(
    first: Mapping[int, float], second: Mapping[int, float], higher_is_better: bool
) -> Comparison | None:
    """Paired t interval over common seeds; None without one.

    Differences that are exactly equal on all seeds hold one observation, however many seeds
    there are: they show nothing about other seeds, and the verdict says so.
    """
    seeds = sorted(first.keys() & second.keys())
    difference = mean_interval([first[seed] - second[seed] for seed in seeds])
    if difference is None:
        return None
    if not difference.half or difference.low <= 0 <= difference.high:
        return Comparison(difference, "no difference shown")
    return Comparison(difference, "better" if (difference.mean > 0) == higher_is_better else "worse")


def best_first(
    found: Iterable[tuple[Interval | None, Row]], higher_is_better: bool
) -> list[tuple[Interval, Row]]:
    """The rows that have a mean, ordered by it."""
    measured = [(interval, row) for interval, row in found if interval]
    return sorted(measured, key=lambda pair: pair[0].mean, reverse=higher_is_better)


def scores(record: CellRecord, budget: float, stage: Stage) -> dict[int, float]:
    """Quality by seed at one budget; fine-tuned only where it was fine-tuned."""
    results = [result for result in record.seeds if result.budget == budget]
    if stage == "transfer":
        return {result.seed: result.quality_transfer_only for result in results}
    return {r.seed: r.quality_finetuned for r in results if r.quality_finetuned is not None}


def dense_scores(record: CellRecord, budget: float) -> dict[int, float]:
    """The dense network's quality by seed, as recorded beside the method's."""
    return {result.seed: result.quality_dense for result in record.seeds if result.budget == budget}


def final_scores(record: CellRecord, budget: float) -> dict[int, float]:
    """What the column `quality` is made of: fine-tuned if fine-tuned, else after transfer alone."""
    return scores(record, budget, "finetuned") or scores(record, budget, "transfer")


def validation_scores(record: CellRecord, budget: float) -> dict[int, float]:
    """Quality on the validation part by seed, of those behind `final_scores`; empty if one lacks it."""
    results = [result for result in record.seeds if result.budget == budget]
    if scores(record, budget, "finetuned"):
        tuned = [r for r in results if r.quality_finetuned is not None]
        found = {r.seed: r.validation_finetuned for r in tuned}
    else:
        found = {r.seed: r.validation_transfer_only for r in results}
    known = {seed: value for seed, value in found.items() if value is not None}
    return known if len(known) == len(found) else {}


def refine_steps(record: CellRecord) -> int:
    """Local refinement of each block, in Adam steps; 0 is the closed form alone."""
    return record.params.get("task", {}).get("transfer", {}).get("refine_steps", 0)


def closed_form_scores(record: CellRecord, budget: float) -> dict[int, float]:
    """Quality by seed of transfer in closed form; empty where only that after refinement is recorded."""
    if not refine_steps(record):
        return scores(record, budget, "transfer")
    results = [result for result in record.seeds if result.budget == budget]
    return {r.seed: r.quality_closed_form for r in results if r.quality_closed_form is not None}


def has_closed_form(records: Sequence[CellRecord]) -> bool:
    """Whether any record tells the closed form from what refinement made of it."""
    return any(r.quality_closed_form is not None for record in records for r in record.seeds)


def budgets(record: CellRecord) -> list[float]:
    """Budgets of a record, from the cheapest network to the dearest."""
    return sorted({result.budget for result in record.seeds})


def nearest(found: Sequence[float]) -> float:
    """The budget that stands for several; of two equally near the smaller."""
    return min(found, key=lambda budget: (round(abs(budget - NEAR), 9), budget))


def fullest(found: Sequence[float]) -> float | None:
    """The budget below 1 that is found most often, of several the largest; None without one."""
    swept = [budget for budget in found if budget < 1]
    return max(swept, key=lambda budget: (swept.count(budget), budget), default=None)
