"""The study page's lines on rows trained from scratch: the base variant, best first, then the others."""

from __future__ import annotations

from collections.abc import Sequence

from stages.reporting import text
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import mean_interval, nearest
from stages.reporting.markdown import escape, folded, shortened, table
from stages.reporting.scratch import runs, tables, verdicts
from stages.tracking.record import ScratchRecord

COLUMNS = ["row", "budget", "n", "rates tried", "learning rate", "quality", "difference to dense"]
COLUMNS += ["parameters", "training speed-up"]


def task(records: Sequence[ScratchRecord]) -> list[str]:
    """A task's lines; none where no row but dense may be quoted."""
    if all(record.row == DENSE for record in records):
        return []
    variant = runs.variants(records)[0]
    swept = list(reversed(runs.row_budgets(records, variant)))
    found = [budget for budget in swept if verdicts.ranked(records, variant, budget)]
    if not found:
        return ["", *(f"**{escape(records[0].task)}** {escape(said)}" for said in verdicts.diverged(records))]
    told = nearest(found)
    said = [verdicts.verdict(records, variant, told), *verdicts.gated(records, variant, told)]
    sentence = " ".join([*said, *verdicts.ends(records, variant), *verdicts.diverged(records)])
    lines = ["", _caption(records, variant), "", escape(sentence), ""]
    lines += shortened(_table(records, variant, [told], dense=True))
    others = [budget for budget in swept if budget != told]
    if others:
        named = text.listing([f"{budget:g}" for budget in others])
        lines += ["", *folded(f"Budgets {named}", _table(records, variant, others, dense=False))]
    for other in runs.variants(records)[1:]:
        lines += _variant(records, other)
    return lines


def _variant(records: Sequence[ScratchRecord], variant: str) -> list[str]:
    """Another variant, folded: what follows of its largest budget and of each smaller one, then its rows."""
    swept = list(reversed(runs.row_budgets(records, variant)))
    found = [budget for budget in swept if verdicts.ranked(records, variant, budget)]
    said = [verdicts.verdict(records, variant, budget) for budget in found]
    said += [line for budget in found for line in verdicts.gated(records, variant, budget)]
    sentence = escape(" ".join([*said, *verdicts.ends(records, variant)]))
    return ["", *folded(f"Variant {variant}", [sentence, "", *_table(records, variant, swept, dense=True)])]


def _caption(records: Sequence[ScratchRecord], variant: str) -> str:
    first = records[0]
    better = "higher" if first.higher_is_better else "lower"
    hosts = sorted({f"{r.environment.processor}, {r.environment.cores} cores" for r in records})
    commits = sorted({r.environment.commit[:9] for r in records})
    return (
        f"**{escape(first.task)}, trained from scratch** ({escape(variant)}): {escape(first.quality_name)} "
        f"({better} is better), mean ± 95 % interval over n seeds at the rate that validation chose; "
        "difference to dense paired over seeds; speed of a training step over dense with its 95 % interval. "
        f"{escape('; '.join(hosts))}; commit {escape(', '.join(commits))}."
    )


def _table(records: Sequence[ScratchRecord], variant: str, wanted: list[float], *, dense: bool) -> list[str]:
    """The rows at these budgets, best mean first within each, diverged ones last; dense above them."""
    first = [r for r in records if r.row == DENSE] if dense else []
    rows = [_row(records, r, variant, b) for r in first for b in runs.budgets(r, variant)]
    for budget in wanted:
        found = verdicts.ranked(records, variant, budget)
        rows += [_row(records, record, variant, budget) for _, record in found]
        lost = [r for r in records if r.row != DENSE and runs.is_lost(r, variant, budget)]
        rows += [_row(records, record, variant, budget) for record in lost]
    return table(COLUMNS, rows)


def _row(records: Sequence[ScratchRecord], record: ScratchRecord, variant: str, budget: float) -> list[str]:
    found = runs.scores(record, variant, budget)
    row = [record.row, f"{budget:g}", str(len(found)), *tables.tuning(record, variant, budget)]
    row.append(text.quality(mean_interval(list(found.values()))) if found else tables.DIVERGED)
    comparison = None if record.row == DENSE else runs.against_dense(records, record, variant, budget)
    row.append(text.difference(comparison.difference) if comparison else text.NONE)
    cost = runs.cost_at(record, variant, budget)
    if cost is None:
        return [*row, text.NONE, text.NONE]
    speed = text.speedup(cost.training_speedup, cost.training_speedup_low, cost.training_speedup_high)
    return [*row, text.ratio(cost.params / cost.params_dense), speed]
