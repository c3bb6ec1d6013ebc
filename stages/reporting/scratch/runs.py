"""Which runs of a from-scratch record say what: the comparison at the chosen rate, the sweep, the cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from stages.reporting import claimed
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import Comparison, compare
from stages.tracking.record import ScratchCost, ScratchRecord, ScratchRun

BASE = "base"
"""The variant that is told first."""


def section_of(record: ScratchRecord) -> dict[str, Any]:
    """The row's own parameters in a record."""
    return next((v for v in record.params.values() if isinstance(v, dict) and "layer" in v), {})


def layer_of(record: ScratchRecord) -> str:
    """The layer behind a row; the row's name if the record lacks it."""
    return str(section_of(record).get("layer", record.row))


def is_eugen(record: ScratchRecord) -> bool:
    """Whether a row belongs to the EUGen family."""
    return layer_of(record) == "eugen"


def claimed_row(records: Sequence[ScratchRecord]) -> ScratchRecord | None:
    """The row that answers for EUGen among a task's rows; see `claimed.CLAIMED`."""
    name = claimed.claimed((record.row, section_of(record)) for record in records)
    return next((record for record in records if record.row == name), None)


def variants(records: Sequence[ScratchRecord]) -> list[str]:
    """Names of the variants in order of first appearance, the base before all."""
    found = list(dict.fromkeys(run.variant for record in records for run in record.runs))
    return sorted(found, key=lambda name: name != BASE)


def budgets(record: ScratchRecord, variant: str) -> list[float]:
    """Budgets of a row in a variant, from the cheapest network to the dearest."""
    return sorted({run.budget for run in record.runs if run.variant == variant})


def row_budgets(records: Sequence[ScratchRecord], variant: str) -> list[float]:
    """The budgets of all rows but dense."""
    return sorted({b for record in records if record.row != DENSE for b in budgets(record, variant)})


def at(record: ScratchRecord, variant: str, budget: float) -> list[ScratchRun]:
    """All runs of a row at a budget of a variant."""
    return [run for run in record.runs if run.variant == variant and run.budget == budget]


def compared(record: ScratchRecord, variant: str, budget: float) -> list[ScratchRun]:
    """The runs at the chosen rate, those that diverged among them."""
    return [run for run in at(record, variant, budget) if run.chosen]


def trials(record: ScratchRecord, variant: str, budget: float) -> list[ScratchRun]:
    """The sweep: the first seed's run at each rate, by rate. The other rates have no other seed."""
    found = at(record, variant, budget)
    swept = [run for run in found if not run.chosen] or found
    return sorted((run for run in found if run.seed == swept[0].seed), key=lambda run: run.learning_rate)


def scores(record: ScratchRecord, variant: str, budget: float) -> dict[int, float]:
    """Quality on the test part by seed at the chosen rate; a run that diverged has none."""
    found = compared(record, variant, budget)
    return {run.seed: run.quality for run in found if run.quality is not None}


def validation(record: ScratchRecord, variant: str, budget: float) -> float | None:
    """Mean quality on the validation part at the chosen rate: what may choose between rows."""
    found = [run.validation for run in compared(record, variant, budget) if run.validation is not None]
    return fmean(found) if found else None


def rate(record: ScratchRecord, variant: str, budget: float) -> float | None:
    """The chosen learning rate; None where every rate diverged."""
    return next((run.learning_rate for run in compared(record, variant, budget)), None)


def tried(record: ScratchRecord, variant: str, budget: float) -> int:
    """How many learning rates a row was tried at."""
    return len(trials(record, variant, budget))


def rate_at_end(record: ScratchRecord, variant: str, budget: float) -> bool | None:
    """Whether no rate was tried on one side of the chosen one, where the best may lie; None without one."""
    chosen = rate(record, variant, budget)
    rates = [run.learning_rate for run in trials(record, variant, budget)]
    return None if chosen is None else chosen in (min(rates), max(rates))


def is_lost(record: ScratchRecord, variant: str, budget: float) -> bool:
    """Whether a row was trained there and no training at its rate, or at any, has a quality."""
    return bool(at(record, variant, budget)) and not scores(record, variant, budget)


def cost_at(record: ScratchRecord, variant: str, budget: float) -> ScratchCost | None:
    """What the row costs at a budget of a variant."""
    return next((cost for cost in record.costs if (cost.variant, cost.budget) == (variant, budget)), None)


def network(cost: ScratchCost) -> tuple[int, ...]:
    """What the dense network and its training depend on: equal for variants that replace other blocks."""
    return cost.blocks, cost.steps, cost.batch_size, cost.params_dense, cost.macs_dense


def dense_scores(
    records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float
) -> dict[int, float]:
    """The dense network's quality by seed in the variant, or in one with the same dense training."""
    dense = next((other for other in records if (other.task, other.row) == (record.task, DENSE)), None)
    own = cost_at(record, variant, budget)
    if dense is None:
        return {}
    alike = [cost.variant for cost in dense.costs if own and network(cost) == network(own)]
    for name in [variant, *alike]:
        for found in reversed(budgets(dense, name)):
            return scores(dense, name, found)
    return {}


def against(first: ScratchRecord, second: ScratchRecord, variant: str, budget: float) -> Comparison | None:
    """Paired comparison of two rows at equal budget."""
    pair = scores(first, variant, budget), scores(second, variant, budget)
    return compare(*pair, first.higher_is_better)


def against_dense(
    records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float
) -> Comparison | None:
    """Paired comparison with the dense network trained with the same seeds."""
    pair = scores(record, variant, budget), dense_scores(records, record, variant, budget)
    return compare(*pair, record.higher_is_better)


def is_provisional(record: ScratchRecord, variant: str, budget: float) -> bool:
    """Whether a result may not be quoted: by its profile, a dirty tree, or a single seed."""
    return record.provisional or record.environment.dirty or len(scores(record, variant, budget)) < 2


def quotable(record: ScratchRecord) -> ScratchRecord | None:
    """The record without its provisional results; None if nothing remains.

    Where every training diverged there is no number, and that stays: left out, a failure would be hidden.
    """
    told = not record.provisional and not record.environment.dirty
    runs = [
        run
        for run in record.runs
        if not is_provisional(record, run.variant, run.budget)
        or (told and is_lost(record, run.variant, run.budget))
    ]
    return record.model_copy(update={"runs": runs}) if runs else None


def step_ms(
    records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float
) -> tuple[float, float] | None:
    """Milliseconds of a training step of the row and of the dense network; None where nothing was timed.

    Other stages run beside a training, so what it took by the clock tells of its neighbours too. Hence the
    dense network's median step over the pairs of all rows of the variant, and for the row that over its
    training speed-up, which was measured in pairs. All seconds and rates of training come from here.
    """
    own = cost_at(record, variant, budget)
    costs = (cost for other in records if other.task == record.task for cost in other.costs)
    samples = [ms for cost in costs if cost.variant == variant for ms in cost.step_ms_dense]
    if own is None or not samples:
        return None
    dense = median(samples)
    return dense / own.training_speedup, dense


def training_seconds(
    records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float
) -> float | None:
    """Seconds of all optimiser steps of one training of the row."""
    cost, step = cost_at(record, variant, budget), step_ms(records, record, variant, budget)
    return cost.steps * step[0] / 1000 if cost and step else None


def examples_per_second(
    records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float
) -> tuple[float | None, float | None]:
    """Training throughput of the row and of the dense network."""
    cost, step = cost_at(record, variant, budget), step_ms(records, record, variant, budget)
    if cost is None or step is None:
        return None, None
    return 1000 * cost.batch_size / step[0], 1000 * cost.batch_size / step[1]


def constants(records: Sequence[ScratchRecord]) -> dict[str, float]:
    """Baselines among the extra measures: the quality that the data alone give, whatever the network.

    Such a measure is named `<what>_<quality name>` and is the same, and not 0, in every run of two rows or
    more with two seeds or more. A measure that all networks fail alike, or pass alike, is no baseline.
    """
    runs = [run for record in records for run in record.runs if not run.diverged]
    rows = {record.row for record in records if any(not run.diverged for run in record.runs)}
    if len(rows) < 2 or len({run.seed for run in runs}) < 2:
        return {}
    first, suffix = runs[0].extra, f"_{records[0].quality_name}"
    named = {name: value for name, value in first.items() if name.endswith(suffix) and value != 0}
    return {name: v for name, v in named.items() if all(run.extra.get(name) == v for run in runs)}


def extras(records: Sequence[ScratchRecord]) -> list[str]:
    """Names of the further measures that tell networks apart."""
    names = {name for record in records for run in record.runs for name in run.extra}
    return sorted(names - constants(records).keys())
