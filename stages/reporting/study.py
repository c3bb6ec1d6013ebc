"""reports/study.md: every committed result that may be quoted, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from stages.reporting import tables, text, verdicts
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import (
    Interval,
    budgets,
    closed_form_scores,
    final_scores,
    fullest,
    has_closed_form,
    mean_interval,
    scores,
)
from stages.reporting.markdown import escape, folded, shortened, table
from stages.reporting.scratch import readme as scratch_readme
from stages.reporting.scratch import runs
from stages.reporting.table import cost_at, is_provisional, latencies_at
from stages.tracking.record import CellRecord, Latency, ScratchRecord

HEAD = """# The study

Generated from [`records/`](records) by `python -m stages.report --readme`; what the papers claim stands in
[`ledger.md`](ledger.md). Provisional results (one seed, uncommitted source, toy sizes) never enter.
"""


def study(records: list[CellRecord], scratch: Sequence[ScratchRecord] = ()) -> str:
    """The page."""
    return f"{HEAD}\n{study_tables(records, scratch).strip()}\n"


def study_tables(records: list[CellRecord], scratch: Sequence[ScratchRecord] = ()) -> str:
    """Markdown: per task the rows of the budget that most have, the others folded; only quotable rows."""
    rows = quotable(records)
    trained = [kept for record in scratch if (kept := runs.quotable(record))]
    parts = []
    for task in sorted({record.task for record, _ in rows} | {record.task for record in trained}):
        parts += _task(task, [row for row in rows if row[0].task == task])
        parts += scratch_readme.task([record for record in trained if record.task == task])
    none = "No result of the `study` profile is committed yet; `make bench` measures on your machine."
    return "\n".join(parts) if parts else none


def _task(task: str, rows: list[tuple[CellRecord, float]]) -> list[str]:
    replaced = [row for row in rows if row[0].method != DENSE]
    if not replaced:
        return []
    # A budget of 1 is no size: rows that cost the dense block's MACs stand with dense, above the others.
    whole = [row for row in rows if row[1] == 1]
    swept = sorted({budget for _, budget in replaced if budget < 1}, reverse=True)
    shown = fullest([budget for _, budget in replaced]) or 1.0
    others = [budget for budget in swept if budget != shown]
    finding = verdicts.verdict([record for record, _ in _at(replaced, shown)], shown, "transfer")
    lines = ["", _caption(task, replaced), "", escape(finding), ""]
    lines += shortened(_table(_at(whole, 1) + (_at(replaced, shown) if swept else [])))
    if len(swept) > verdicts.MOST_BUDGETS:
        lines += ["", *folded("All budgets", by_budget(replaced))]
    elif others:
        lines += ["", *folded("Other budgets", _table([r for b in others for r in _at(replaced, b)]))]
    measured = list({id(record): record for record, _ in rows if record.precisions}.values())
    if measured:
        found = tables.precision(measured)
        lines += ["", *folded("Precisions", [found.caption, "", *table(found.columns, found.rows)])]
    return lines


def quotable(records: Sequence[CellRecord]) -> list[tuple[CellRecord, float]]:
    """Records with their budgets, without provisional results."""
    return [(r, budget) for r in records for budget in budgets(r) if not is_provisional(r, budget)]


def by_budget(rows: list[tuple[CellRecord, float]]) -> list[str]:
    """Final quality of methods that have several budgets, best at the smallest first; nothing without one."""
    found: dict[str, dict[float, str]] = {}
    for budget in sorted({budget for _, budget in rows if budget < 1}):
        for record, _ in _at(rows, budget):
            found.setdefault(record.method, {})[budget] = text.quality(_final(record, budget))
    swept = {name: own for name, own in found.items() if len(own) > 1}
    if not swept:
        return []
    name = rows[0][0].quality_name.replace("_", " ")
    columns = sorted({budget for own in swept.values() for budget in own})
    lines = [[name, *(own.get(budget, text.NONE) for budget in columns)] for name, own in swept.items()]
    caption = f"Final {name} by budget, mean ± 95 % interval over seeds."
    return [caption, "", *table(["method", *(f"{budget:g}" for budget in columns)], lines)]


def _at(rows: list[tuple[CellRecord, float]], budget: float) -> list[tuple[CellRecord, float]]:
    """Rows of one budget, best mean first, dense before all."""
    found = [row for row in rows if row[1] == budget]
    sign = -1 if rows and rows[0][0].higher_is_better else 1
    return sorted(found, key=lambda row: (row[0].method != DENSE, sign * _final(*row).mean))


def _final(record: CellRecord, budget: float) -> Interval:
    interval = mean_interval(list(final_scores(record, budget).values()))
    assert interval is not None, "a budget is listed because it has seeds"
    return interval


def _caption(task: str, rows: list[tuple[CellRecord, float]]) -> str:
    first = rows[0][0]
    better = "higher" if first.higher_is_better else "lower"
    hosts = sorted({f"{r.environment.processor}, {r.environment.cores} cores" for r, _ in rows})
    commits = sorted({r.environment.commit[:9] for r, _ in rows})
    return (
        f"**{escape(task)}**: {escape(first.quality_name)} ({better} is better), mean ± 95 % interval over n "
        "seeds; speed-up of the whole model over dense ± its 95 % interval, limit by MACs in brackets. "
        f"{escape('; '.join(hosts))}; commit {escape(', '.join(commits))}."
    )


def _table(rows: list[tuple[CellRecord, float]]) -> list[str]:
    timings = sorted(
        {_timing(x) for r, budget in rows for x in latencies_at(r, budget)}, key=lambda t: (t[:2], t[2])
    )
    closed = has_closed_form([record for record, _ in rows])
    columns = ["method", "budget", "n", "quality", *(["closed form"] if closed else []), "transfer alone"]
    columns.append("parameters")
    columns += [f"speed-up, {device} {dtype}, batch {batch}" for device, dtype, batch in timings]
    return table(columns, [_row(record, budget, timings, closed) for record, budget in rows])


def _row(record: CellRecord, budget: float, timings: list[tuple[str, str, int]], closed: bool) -> list[str]:
    final = _final(record, budget)
    cost = cost_at(record, budget)
    row = [record.method, f"{budget:g}", str(final.n), text.quality(final)]
    if closed:
        row.append(text.quality(mean_interval(list(closed_form_scores(record, budget).values()))))
    row.append(text.quality(mean_interval(list(scores(record, budget, "transfer").values()))))
    row.append(text.ratio(cost.params / cost.params_dense if cost else None))
    timed = {_timing(x): x for x in latencies_at(record, budget)}
    return row + [_speedup(timed.get(timing)) for timing in timings]


def _timing(latency: Latency) -> tuple[str, str, int]:
    return latency.device, latency.dtype, latency.batch


def _speedup(latency: Latency | None) -> str:
    if latency is None:
        return text.NONE
    half = (latency.speedup_high - latency.speedup_low) / 2
    return f"{latency.speedup:.2f}× ± {half:.2f} ({latency.speedup_limit:.2f}×)"
