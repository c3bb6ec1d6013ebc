"""What the fronts are made of: every row's quality beside its time, its MACs and its parameters.

Costs are ratios to the dense network's, which stands at 1. A row is on the (Pareto) front if no other row has
a better quality at a cost that is not higher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from stages.reporting import points, text
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import STAGES, Interval, budgets, mean_interval, scores
from stages.reporting.table import cost_at, is_provisional, latencies_at
from stages.tracking.record import CellRecord

NEAR = 0.01
"""Costs that differ by less of the dense network's are one cost: sizes are whole numbers, budgets are not."""
OWN_PRECISION = ("int8", "bf16")
"""Layers that compute in another precision than the network around them."""
Ends = tuple[float, float, float]
"""A cost over the dense network's, and the ends of its 95 % interval."""
Row = dict[str, Any]
Stage = Literal["transfer", "final"]


@dataclass(frozen=True)
class Axis:
    """One kind of cost: its name in sentences, its axis' title, and what a row costs, None where unknown."""

    name: str
    title: str
    cost: Callable[[CellRecord, float], Ends | None]
    timed: bool = False


def axes(records: Sequence[CellRecord], timings: Sequence[points.Timing]) -> list[Axis]:
    """Time at each batch, MACs, parameters: those that a replaced network has."""
    known = [Axis(f"time at batch {t[2]}", f"time, batch {t[2]}", _time(t), timed=True) for t in timings]
    known += [Axis("MACs", "block MACs", _macs), Axis("parameters", "parameters", _parameters)]
    return [axis for axis in known if any(row["method"] != DENSE for row in rows(records, axis))]


def rows(records: Sequence[CellRecord], axis: Axis) -> list[Row]:
    """A row per method, budget and stage that has a quality and this cost; dense always has its cost, 1."""
    found = [row for record in records for budget in budgets(record) for row in _rows(record, budget, axis)]
    if found and all(record.method != DENSE for record in records):
        quality = fmean(result.quality_dense for record in records for result in record.seeds)
        found.append(_row(DENSE, 1.0, "dense", Interval(quality, None, 1), (1.0, 1.0, 1.0), True))
    return found


def _rows(record: CellRecord, budget: float, axis: Axis) -> Iterator[Row]:
    cost = (1.0, 1.0, 1.0) if record.method == DENSE else axis.cost(record, budget)
    found = {s: mean_interval(list(scores(record, budget, s).values())) for s in STAGES}
    known = {stage: interval for stage, interval in found.items() if interval}
    if cost is None or not known:
        return
    for stage, interval in known.items():
        alone = record.method == DENSE and len(known) == 1
        said = "dense" if alone else stage
        yield _row(record.method, budget, said, interval, cost, stage == list(known)[-1])


def _row(method: str, budget: float, stage: str, quality: Interval, cost: Ends, final: bool) -> Row:
    return {
        "method": method,
        "budget": budget,
        "stage": stage,
        "final": final,
        "quality": quality.mean,
        "quality_low": quality.low,
        "quality_high": quality.high,
        "cost": cost[0],
        "cost_low": cost[1],
        "cost_high": cost[2],
    }


def of_stage(found: Sequence[Row], stage: Stage) -> list[Row]:
    """What competes: all rows after transfer alone, or each in its last stage."""
    return [row for row in found if (row["final"] if stage == "final" else row["stage"] != "finetuned")]


def front(found: Sequence[Row], higher_is_better: bool) -> list[Row]:
    """The rows that no other one beats at a cost that is not higher, from the cheapest to the best."""
    sign = 1 if higher_is_better else -1
    kept = [row for row in found if not any(_beats(other, row, sign) for other in found)]
    return sorted(kept, key=lambda row: row["cost"])


def _beats(other: Row, row: Row, sign: int) -> bool:
    gain = sign * (other["quality"] - row["quality"])
    return (gain > 0 and other["cost"] <= row["cost"] + NEAR) or (gain == 0 and other["cost"] < row["cost"])


def own_precision(records: Sequence[CellRecord]) -> list[str]:
    """Methods that compute in another precision than the timing says: their time is no like for like."""
    return [record.method for record in records if _layers(record.params) & set(OWN_PRECISION)]


def _layers(section: dict[str, Any]) -> set[str]:
    own = {str(section["layer"])} if "layer" in section else set()
    return own.union(*(_layers(inner) for inner in section.values() if isinstance(inner, dict)))


def provisional(records: Sequence[CellRecord]) -> Iterator[str]:
    """Which rows may not be quoted, in a sentence; none if all may."""
    known = [(record, budget) for record in records for budget in budgets(record)]
    marked = [(record.method, budget) for record, budget in known if is_provisional(record, budget)]
    if marked:
        yield "All rows are provisional." if len(marked) == len(known) else f"Provisional: {named(marked)}."


def named(found: Sequence[tuple[str, float]]) -> str:
    """Methods with their budgets, `prune 0.1 and 0.3, dense`; a method stands where its first budget does."""
    together: dict[str, list[str]] = {}
    for method, budget in found:
        together.setdefault(method, []).append(f"{budget:g}")
    said = [m if m == DENSE else f"{m} {text.listing(own)}" for m, own in together.items()]
    return ", ".join(said)


def _time(timing: points.Timing) -> Callable[[CellRecord, float], Ends | None]:
    """A forward pass over the dense network's in the same precision at the same batch: 1 / speed-up."""

    def cost(record: CellRecord, budget: float) -> Ends | None:
        for x in () if own_precision([record]) else latencies_at(record, budget):
            if (x.device, x.dtype, x.batch) == timing:
                return 1 / x.speedup, 1 / x.speedup_high, 1 / x.speedup_low
        return None

    return cost


def _macs(record: CellRecord, budget: float) -> Ends | None:
    cost = cost_at(record, budget)
    return cost and _exact(cost.ffn_macs / cost.ffn_macs_dense)


def _parameters(record: CellRecord, budget: float) -> Ends | None:
    cost = cost_at(record, budget)
    return cost and _exact(cost.params / cost.params_dense)


def _exact(ratio: float) -> Ends:
    return ratio, ratio, ratio
