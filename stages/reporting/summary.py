"""The README's table: per task an EUGen beside the dense network and its rival, at one budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from stages.reporting import text, verdicts
from stages.reporting.ablations import GATED
from stages.reporting.claimed import CLAIMED, ORDER
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import (
    Comparison,
    budgets,
    compare,
    dense_scores,
    final_scores,
    mean_interval,
    nearest,
    validation_scores,
)
from stages.reporting.markdown import table
from stages.reporting.scratch import runs
from stages.reporting.scratch.verdicts import NARROW
from stages.reporting.table import is_provisional, latencies_at
from stages.tracking.record import CellRecord, ScratchRecord

NOTHING = "No result of the study is committed yet; `make bench` measures on your machine."
TRANSFER = """**Taken over from a trained network**, fine-tuned where that helped: the best EUGen and the
best other row at one budget, {picked}. Speed: whole model over dense, smallest batch."""
ON_VALIDATION = "picked on the validation part"
ON_TEST = "picked by their mean here (no validation figure in these records)"
SCRATCH = f"""**Trained from scratch**, each row at the learning rate that validation chose. The EUGen is one
declared row, `{CLAIMED}` or else the first of order {ORDER}, whatever others reached. `{GATED}` is its
control: a gated block multiplies two projections too."""


class Pair(NamedTuple):
    """One line of a table, and the comparison in it."""

    cells: list[str]
    comparison: Comparison | None
    task: str
    notes: tuple[str, ...] = ()
    """What qualifies the line: how its rows were picked, or how they were tuned."""


def summary(records: Sequence[CellRecord], scratch: Sequence[ScratchRecord]) -> str:
    """Two tables and what they come to; only results that may be quoted."""
    trained = [kept for record in scratch if (kept := runs.quotable(record))]
    parts: list[str] = []
    moved = [pair for task in _tasks(records) if (pair := _transfer(_quotable(records, task)))]
    if moved:
        columns = ["task", "budget", "dense", "best EUGen", "best other row", "difference", "speed of both"]
        parts += [
            TRANSFER.format(picked=_picked(moved)),
            "",
            *table(columns, [pair.cells for pair in moved]),
            "",
            _count(moved),
            "",
        ]
    fresh = [pair for task in _tasks(trained) if (pair := _scratch([r for r in trained if r.task == task]))]
    if fresh:
        columns = ["task", "budget", "dense", NARROW, GATED, "EUGen", "against dense", f"against {GATED}"]
        notes = [note for pair in fresh for note in pair.notes]
        lines = table(columns, [pair.cells for pair in fresh])
        parts += [SCRATCH, "", *lines, "", " ".join([_count(fresh), *notes]), ""]
    return "\n".join(parts) if parts else NOTHING


def _tasks(records: Sequence[CellRecord] | Sequence[ScratchRecord]) -> list[str]:
    return sorted({record.task for record in records})


def _quotable(records: Sequence[CellRecord], task: str) -> list[tuple[CellRecord, float]]:
    """A task's rows at their budgets; a choice of layers is neither an EUGen nor its rival."""
    replaced = [r for r in records if r.task == task and r.method != DENSE and not verdicts.is_choice(r)]
    return [(r, b) for r in replaced for b in budgets(r) if b < 1 and not is_provisional(r, b)]


def _transfer(rows: list[tuple[CellRecord, float]]) -> Pair | None:
    """A task's line; None without an EUGen and a rival at one budget."""
    if not rows:
        return None
    budget = nearest(sorted({budget for _, budget in rows}))
    here = [record for record, own in rows if own == budget]
    sign = 1 if here[0].higher_is_better else -1
    validated = all(validation_scores(record, budget) for record in here)
    judged = validation_scores if validated else final_scores

    def mean(record: CellRecord) -> float:
        return sign * fmean(judged(record, budget).values())

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
    cells += [_said(comparison), f"{_speed(best, budget)}, {_speed(rival, budget)}"]
    return Pair(cells, comparison, best.task, (ON_VALIDATION if validated else ON_TEST,))


def _picked(pairs: list[Pair]) -> str:
    """How the rows of the lines were picked; by task where that differs."""
    ways = {way: [pair.task for pair in pairs if way in pair.notes] for way in (ON_VALIDATION, ON_TEST)}
    found = {way: tasks for way, tasks in ways.items() if tasks}
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{text.listing(tasks)}: {way}" for way, tasks in found.items())


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
    """A task's line at the base variant; None without the declared EUGen beside a gated block."""
    variant = runs.variants(records)[0]
    swept, eugen = runs.row_budgets(records, variant), runs.claimed_row(records)
    known = {record.row: record for record in records}
    if not swept or eugen is None or GATED not in known:
        return None
    budget = nearest(swept)
    shown = [known[name] for name in (NARROW, GATED) if name in known] + [eugen]
    if any(not runs.at(row, variant, budget) for row in (known[GATED], eugen)):
        return None
    cells = [_named(eugen), f"{budget:g}", _mean(runs.dense_scores(records, eugen, variant, budget))]
    cells += [
        _reached(known[name], variant, budget) if name in known else text.NONE for name in (NARROW, GATED)
    ]
    cells.append(f"{eugen.row} {_reached(eugen, variant, budget)}")
    comparison = runs.against(eugen, known[GATED], variant, budget)
    cells += [_said(runs.against_dense(records, eugen, variant, budget)), _said(comparison)]
    return Pair(cells, comparison, eugen.task, (_tuning(records, shown, variant, budget),))


def _reached(record: ScratchRecord, variant: str, budget: float) -> str:
    """A row's mean; that it diverged, or that it was not trained there."""
    return (
        "diverged" if runs.is_lost(record, variant, budget) else _mean(runs.scores(record, variant, budget))
    )


def _tuning(
    records: Sequence[ScratchRecord], shown: Sequence[ScratchRecord], variant: str, budget: float
) -> str:
    """How many rates the rows of a line were tried at, and which stand at an end of them."""
    cells = [(r, b) for r in records if r.row == DENSE for b in runs.budgets(r, variant)]
    cells += [(r, budget) for r in shown if runs.at(r, variant, budget)]
    counts: dict[int, list[str]] = {}
    for record, own in cells:
        counts.setdefault(runs.tried(record, variant, own), []).append(record.row)
    said = [
        f"{text.plural(count, 'learning rate')} {'a row' if len(counts) == 1 else f'({text.listing(names)})'}"
        for count, names in counts.items()
    ]
    ends = [record.row for record, own in cells if runs.rate_at_end(record, variant, own)]
    end = f"; chosen at an end of them: {text.listing(ends)}" if ends else ""
    return f"Tried on {records[0].task}: {text.listing(said)}{end}."


def _count(pairs: list[Pair]) -> str:
    """How often the EUGen of the line's comparison was better, worse or neither."""
    found = Counter(pair.comparison.verdict for pair in pairs if pair.comparison)
    said = [f"no difference is shown on {found['no difference shown']}"]
    said = [*(f"it is {verdict} on {found[verdict]}" for verdict in ("better", "worse")), *said]
    return f"The EUGen, {text.plural(len(pairs), 'task')}: {text.listing(said)}."
