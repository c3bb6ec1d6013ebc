"""Which runs of a from-scratch record say what: the comparison at the chosen rate, the sweep, the cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from stages.reporting.inputs import DENSE
from stages.reporting.intervals import Comparison, compare
from stages.tracking.record import ScratchCost, ScratchRecord, ScratchRun

BASE = "base"
"""The variant that is told first."""
CLAIMED_ORDER = 2
"""The papers' order, and the configuration's default."""


def section_of(record: ScratchRecord) -> dict[str, Any]:
    """The row's own parameters in a record."""
    return next((v for v in record.params.values() if isinstance(v, dict) and "layer" in v), {})


def layer_of(record: ScratchRecord) -> str:
    """The layer behind a row; the row's name if the record lacks it."""
    return str(section_of(record).get("layer", record.row))


def is_eugen(record: ScratchRecord) -> bool:
    """Whether a row belongs to the EUGen family."""
    return layer_of(record) == "eugen"


def is_gated_eugen(record: ScratchRecord) -> bool:
    """Whether a row is an EUGen of order 2: the products that a gated block has too."""
    return is_eugen(record) and section_of(record).get("order", CLAIMED_ORDER) == CLAIMED_ORDER


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
    """The record without its provisional results; None if nothing remains."""
    runs = [run for run in record.runs if not is_provisional(record, run.variant, run.budget)]
    return record.model_copy(update={"runs": runs}) if runs else None


def examples_per_second(cost: ScratchCost) -> tuple[float | None, float | None]:
    """Training throughput of the row and of the dense network beside it, at the median step."""
    samples = cost.step_ms, cost.step_ms_dense
    own, dense = (1000 * cost.batch_size / median(ms) if ms else None for ms in samples)
    return own, dense


def constants(records: Sequence[ScratchRecord]) -> dict[str, float]:
    """Extra measures that are the same in all runs, two or more: they tell of the data alone."""
    runs = [run for record in records for run in record.runs if not run.diverged]
    if len(runs) < 2:
        return {}
    first = runs[0].extra
    return {name: v for name, v in first.items() if all(run.extra.get(name) == v for run in runs)}


def extras(records: Sequence[ScratchRecord]) -> list[str]:
    """Names of the further measures that tell networks apart."""
    names = {name for record in records for run in record.runs for name in run.extra}
    return sorted(names - constants(records).keys())
