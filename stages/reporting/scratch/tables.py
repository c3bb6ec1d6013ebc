"""The page's tables of rows trained from scratch, as plain text cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stages.reporting import text
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import mean_interval
from stages.reporting.scratch import runs
from stages.reporting.tables import Table
from stages.tracking.record import ScratchRecord, ScratchRun

DIVERGED = "diverged"
COSTS = 5
"""Cells of a row that `_costs` fills."""


def of_task(records: Sequence[ScratchRecord]) -> Iterator[Table]:
    """A task's tables, in the order of the page."""
    yield results(records)
    yield comparisons(records)
    yield sweep(records)


def cells(records: Sequence[ScratchRecord]) -> Iterator[tuple[ScratchRecord, str, float]]:
    """(record, variant, budget) of every result: variants in order, dense first, then by budget."""
    for variant in runs.variants(records):
        for record in sorted(records, key=lambda record: record.row != DENSE):
            for budget in reversed(runs.budgets(record, variant)):
                yield record, variant, budget


def results(records: Sequence[ScratchRecord]) -> Table:
    """Quality at the chosen rate beside dense, size, and speed of training."""
    extras = runs.extras(records)
    columns = ["variant", "row", "budget", "n", "rates tried", "learning rate", records[0].quality_name]
    columns += ["difference to dense", "against dense", "parameters", "MACs", "training speed-up"]
    columns += ["examples/s", "examples/s, dense", *extras, "provisional"]
    rows = [_result(records, *cell, extras) for cell in cells(records)]
    caption = (
        "Trained from scratch: quality on the test part at the rate that the validation part chose, mean ± "
        "95 % Student-t half-width over n seeds. Differences are paired over seeds. Parameters and MACs of "
        "the whole model over dense; speed of a training step beside dense with its 95 % bootstrap interval, "
        "from pairs that ran interleaved; examples per second in training at the dense network's median "
        "step over all rows of the variant, times that speed-up."
    )
    return Table(caption, columns, rows, labels=2)


def _result(
    records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float, extras: list[str]
) -> list[str]:
    compared = runs.compared(record, variant, budget)
    mean = mean_interval(list(runs.scores(record, variant, budget).values()))
    row = [variant, record.row, f"{budget:g}", str(mean.n if mean else 0)]
    row += tuning(record, variant, budget)
    row.append(text.quality(mean) if mean else DIVERGED)
    comparison = None if record.row == DENSE else runs.against_dense(records, record, variant, budget)
    row += (
        [text.difference(comparison.difference), text.verdict(comparison)] if comparison else [text.NONE] * 2
    )
    row += _costs(records, record, variant, budget)
    row += [_extra(compared, name) for name in extras]
    return [*row, "yes" if runs.is_provisional(record, variant, budget) else "no"]


def tuning(record: ScratchRecord, variant: str, budget: float) -> list[str]:
    """How many rates were tried and which was chosen, marked where it is an end of them."""
    tried, rate = runs.tried(record, variant, budget), runs.rate(record, variant, budget)
    if rate is None:
        return [str(tried), text.NONE]
    end = ", end of the grid" if tried > 1 else ", no other tried"
    return [str(tried), f"{rate:g}{end if runs.rate_at_end(record, variant, budget) else ''}"]


def _costs(records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float) -> list[str]:
    cost = runs.cost_at(record, variant, budget)
    if cost is None:
        return [text.NONE] * COSTS
    speed = text.speedup(cost.training_speedup, cost.training_speedup_low, cost.training_speedup_high)
    ratios = [text.ratio(cost.params / cost.params_dense), text.ratio(cost.macs / cost.macs_dense)]
    throughput = runs.examples_per_second(records, record, variant, budget)
    return [*ratios, speed, *(text.number(value) for value in throughput)]


def _extra(compared: list[ScratchRun], name: str) -> str:
    return text.quality(mean_interval([run.extra[name] for run in compared if name in run.extra]))


def comparisons(records: Sequence[ScratchRecord]) -> Table:
    """Every EUGen row against every other row at equal variant and budget."""
    rows = []
    family = [record for record in records if runs.is_eugen(record)]
    for variant in runs.variants(records):
        for first in family:
            for budget in reversed(runs.budgets(first, variant)):
                for second in (record for record in records if record is not first and record.row != DENSE):
                    comparison = runs.against(first, second, variant, budget)
                    if comparison is not None:
                        labels = [variant, first.row, second.row, f"{budget:g}"]
                        shown = [text.difference(comparison.difference), text.verdict(comparison)]
                        rows.append([*labels, *shown])
    caption = (
        "EUGens trained from scratch against every other row at equal budget, paired over seeds, with the "
        "95 % interval of the difference. Intervals are not widened for the number of comparisons."
    )
    return Table(caption, ["variant", "EUGen", "against", "budget", "difference", "verdict"], rows, labels=3)


def sweep(records: Sequence[ScratchRecord]) -> Table:
    """Validation quality of the first seed at every learning rate, the chosen one marked."""
    rates = sorted({run.learning_rate for record in records for run in record.runs})
    rows = []
    for record, variant, budget in cells(records):
        found = {run.learning_rate: run for run in runs.trials(record, variant, budget)}
        rows.append([variant, record.row, f"{budget:g}", *(_trial(found.get(rate)) for rate in rates)])
    caption = (
        "Learning rates: quality on the validation part with the first seed. The marked one was chosen, and "
        "the other seeds ran with it."
    )
    return Table(caption, ["variant", "row", "budget", *(f"{rate:g}" for rate in rates)], rows, labels=2)


def _trial(run: ScratchRun | None) -> str:
    if run is None:
        return text.NONE
    value = DIVERGED if run.validation is None else text.number(run.validation, 4)
    return f"{value} (chosen)" if run.chosen else value
