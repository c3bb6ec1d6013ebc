"""The README's table: per task the best EUGen beside the dense network and the best rival, at one budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stages.reporting import text, verdicts
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import (
    Comparison,
    budgets,
    compare,
    dense_scores,
    final_scores,
    mean_interval,
    nearest,
)
from stages.reporting.markdown import table
from stages.reporting.scratch import runs
from stages.reporting.table import is_provisional, latencies_at
from stages.tracking.record import CellRecord, ScratchRecord

NOTHING = "No result of the study is committed yet; `make bench` measures on your machine."
TRANSFER = """**Taken over from a trained network**, fine-tuned where that helped: the best EUGen and the
best other row at one budget, each picked by its mean here. Speed: whole model over dense, smallest batch."""
SCRATCH = """**Trained from scratch**, all rows with the same trials of the learning rate; the EUGen is the
one that validation chose. `narrow_gated` is its control: a gated block multiplies two projections too."""


class Pair(NamedTuple):
    """One line of a table, and the comparison in it."""

    cells: list[str]
    comparison: Comparison | None


def summary(records: Sequence[CellRecord], scratch: Sequence[ScratchRecord]) -> str:
    """Two tables and what they come to; only results that may be quoted."""
    trained = [kept for record in scratch if (kept := runs.quotable(record))]
    parts: list[str] = []
    moved = [pair for task in _tasks(records) if (pair := _transfer(_quotable(records, task)))]
    if moved:
        columns = ["task", "budget", "dense", "best EUGen", "best other row", "difference", "speed of both"]
        parts += [TRANSFER, "", *table(columns, [pair.cells for pair in moved]), "", _count(moved), ""]
    fresh = [pair for task in _tasks(trained) if (pair := _scratch([r for r in trained if r.task == task]))]
    if fresh:
        columns = ["task", "budget", "dense", "narrow", "narrow_gated", "best EUGen", "against dense"]
        columns.append("against narrow_gated")
        parts += [SCRATCH, "", *table(columns, [pair.cells for pair in fresh]), "", _count(fresh), ""]
    return "\n".join(parts) if parts else NOTHING


def _tasks(records: Sequence[CellRecord] | Sequence[ScratchRecord]) -> list[str]:
    return sorted({record.task for record in records})


def _quotable(records: Sequence[CellRecord], task: str) -> list[tuple[CellRecord, float]]:
    own = [record for record in records if record.task == task and record.method != DENSE]
    return [(r, b) for r in own for b in budgets(r) if b < 1 and not is_provisional(r, b)]


def _transfer(rows: list[tuple[CellRecord, float]]) -> Pair | None:
    """A task's line; None without an EUGen and a rival at one budget."""
    if not rows:
        return None
    budget = nearest(sorted({budget for _, budget in rows}))
    here = [record for record, own in rows if own == budget]
    sign = 1 if here[0].higher_is_better else -1

    def mean(record: CellRecord) -> float:
        found = mean_interval(list(final_scores(record, budget).values()))
        return sign * found.mean if found else float("-inf")

    eugens = [record for record in here if verdicts.is_eugen(record)]
    rivals = [record for record in here if not verdicts.is_eugen(record)]
    if not eugens or not rivals:
        return None
    best, rival = max(eugens, key=mean), max(rivals, key=mean)
    comparison = compare(final_scores(best, budget), final_scores(rival, budget), best.higher_is_better)
    cells = [
        _named(best),
        f"{budget:g}",
        _mean(dense_scores(best, budget)),
        _cell(best, budget),
        _cell(rival, budget),
    ]
    return Pair([*cells, _said(comparison), f"{_speed(best, budget)}, {_speed(rival, budget)}"], comparison)


def _named(record: CellRecord | ScratchRecord) -> str:
    direction = "higher" if record.higher_is_better else "lower"
    return f"{record.task}: {record.quality_name.replace('_', ' ')}, {direction} is better"


def _cell(record: CellRecord, budget: float) -> str:
    return f"{record.method} {_mean(final_scores(record, budget))}"


def _mean(found: Mapping[int, float]) -> str:
    return text.quality(mean_interval(list(found.values())))


def _speed(record: CellRecord, budget: float) -> str:
    timed = latencies_at(record, budget)
    return f"{timed[0].speedup:.2f}×" if timed else text.NONE


def _said(comparison: Comparison | None) -> str:
    """The difference with its interval, and the verdict."""
    if comparison is None:
        return text.NONE
    return f"{text.difference(comparison.difference)}: {text.verdict(comparison)}"


def _scratch(records: list[ScratchRecord]) -> Pair | None:
    """A task's line at the base variant; None without an EUGen beside a gated block."""
    variant = runs.variants(records)[0]
    swept = runs.row_budgets(records, variant)
    known = {record.row: record for record in records}
    if not swept or "narrow_gated" not in known:
        return None
    budget, sign = nearest(swept), 1 if records[0].higher_is_better else -1
    eugens = [
        (sign * value, record)
        for record in records
        if runs.is_eugen(record) and (value := runs.validation(record, variant, budget)) is not None
    ]
    if not eugens:
        return None
    best = max(eugens, key=lambda pair: pair[0])[1]
    gated = runs.against(best, known["narrow_gated"], variant, budget)
    cells = [_named(best), f"{budget:g}", _mean(runs.dense_scores(records, best, variant, budget))]
    for name in ("narrow", "narrow_gated"):
        cells.append(_mean(runs.scores(known[name], variant, budget) if name in known else {}))
    own = _mean(runs.scores(best, variant, budget))
    against = _said(runs.against_dense(records, best, variant, budget))
    return Pair([*cells, f"{best.row} {own}", against, _said(gated)], gated)


def _count(pairs: list[Pair]) -> str:
    """How often the EUGen of the line's comparison was better, worse or neither."""
    found = Counter(pair.comparison.verdict for pair in pairs if pair.comparison)
    said = [f"no difference is shown on {found['no difference shown']}"]
    said = [*(f"it is {verdict} on {found[verdict]}" for verdict in ("better", "worse")), *said]
    return f"The EUGen, {text.plural(len(pairs), 'task')}: {text.listing(said)}."
