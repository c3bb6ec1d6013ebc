"""The report's sentences: every one is computed from the records, and "better" only from a paired test."""

from __future__ import annotations

from stages.reporting import text
from stages.reporting.inputs import DENSE, Inputs
from stages.reporting.intervals import (
    STAGE_NAMES,
    STAGES,
    Comparison,
    Interval,
    Stage,
    best_first,
    budgets,
    compare,
    dense_scores,
    fullest,
    mean_interval,
    scores,
)
from stages.reporting.table import every_latency_at, latencies_at
from stages.rows import AUTO
from stages.tracking.record import CellRecord, Latency

MOST_BUDGETS = 3
"""A task with more has sentences for the smallest, the largest and the one that most rows have."""
CONTROLS = ("narrow", "prune")
"""Rows that cost nothing to think of: what an EUGen must beat to be worth its name."""
EUGENS = ("eugen", "eugen_experts")
"""Layers of the EUGen family."""


def layer_of(record: CellRecord) -> str:
    """The layer behind a method, from the parameters in its record; the method's name if they lack it."""
    sections = [record.params, *(value for value in record.params.values() if isinstance(value, dict))]
    return next((str(section["layer"]) for section in sections if "layer" in section), record.method)


def is_eugen(record: CellRecord) -> bool:
    """Whether a row belongs to the EUGen family."""
    return layer_of(record) in EUGENS


def is_choice(record: CellRecord) -> bool:
    """Whether a row chooses a layer for each block: it may hold any of the others."""
    return layer_of(record) == AUTO


def rivals(records: list[CellRecord], budget: float) -> list[CellRecord]:
    """The replaced networks that were measured at a budget."""
    return [record for record in records if record.method != DENSE and budget in budgets(record)]


def task_budgets(records: list[CellRecord]) -> list[float]:
    """The budgets of the replaced networks of a task."""
    return sorted({budget for record in records if record.method != DENSE for budget in budgets(record)})


def against(first: CellRecord, second: CellRecord, budget: float, stage: Stage) -> Comparison | None:
    """Paired comparison of two rows at equal budget and stage."""
    pair = scores(first, budget, stage), scores(second, budget, stage)
    return compare(*pair, first.higher_is_better)


def against_dense(record: CellRecord, budget: float, stage: Stage) -> Comparison | None:
    """Paired comparison with the dense network of the same seeds."""
    return compare(scores(record, budget, stage), dense_scores(record, budget), record.higher_is_better)


def headline(inputs: Inputs, task: str) -> list[str]:
    """What was measured on a task, then per budget the verdicts and the speed; nothing without a cell."""
    records = inputs.of_task(task)
    if not records:
        return []
    said = [_scope(inputs, records)]
    told, others = _told(records)
    if others:
        told_of, named = (text.listing([f"{budget:g}" for budget in some]) for some in (told, others))
        said.append(f"Sentences are for budgets {told_of}; {named} are in the tables.")
    for budget in reversed(told):
        said += [verdict(records, budget, stage) for stage in STAGES if _ranked(records, budget, stage)]
        said += _speed(records, budget)
    return said


def _told(records: list[CellRecord]) -> tuple[list[float], list[float]]:
    """The budgets of the headline, and those that only tables show: of a long sweep its ends are told, and
    the budget that most rows have.

    A budget of 1 is not a sweep's end: rows that cost what the dense block costs have it.
    """
    found = task_budgets(records)
    swept = [budget for budget in found if budget < 1]
    if len(swept) <= MOST_BUDGETS:
        return found, []
    told = {swept[0], fullest([b for r in records for b in budgets(r)]), swept[-1]}
    return (
        [budget for budget in found if budget in told or budget == 1],
        [budget for budget in swept if budget not in told],
    )


def control(records: list[CellRecord]) -> list[tuple[bool, str]]:
    """The A/A control: dense timed against itself must cover 1. (passed, sentence) per timing."""
    dense = [record for record in records if record.method == DENSE]
    if not dense:
        return [
            (False, "No dense cell: this task has no A/A control, so a bias of its timings would not show.")
        ]
    said = []
    for latency in (x for budget in budgets(dense[0]) for x in every_latency_at(dense[0], budget)):
        where = f"{latency.device}, {latency.dtype}, batch {latency.batch}"
        measured = text.speedup(latency.speedup, latency.speedup_low, latency.speedup_high)
        if latency.speedup_low <= 1 <= latency.speedup_high:
            said.append((True, f"{where}: dense against itself {measured} covers 1, as it should."))
        else:
            warning = "does not cover 1: these timings are biased by about that much."
            said.append((False, f"{where}: dense against itself {measured} {warning}"))
    return said or [(False, "The dense cell was not timed: this task has no A/A control.")]


def _scope(inputs: Inputs, records: list[CellRecord]) -> str:
    first = records[0]
    cheap = text.listing([f"{budget:g}" for budget in task_budgets(records)])
    methods = text.plural(len({record.method for record in records} - {DENSE}), "method")
    dense = mean_interval([result.quality_dense for record in records for result in record.seeds])
    better = "higher" if first.higher_is_better else "lower"
    failed = sum(failure.task == first.task for failure in inputs.failures)
    ends = f"; {text.plural(failed, 'cell')} failed" if failed else ""
    return (
        f"{methods} in place of every feed-forward block, at {cheap} of a block's MACs. "
        f"Quality is {first.quality_name} ({better} is better); the dense network has "
        f"{text.number(dense.mean if dense else None, 4)}{ends}."
    )


def _ranked(records: list[CellRecord], budget: float, stage: Stage) -> list[tuple[Interval, CellRecord]]:
    """Rows with a result, best mean first."""
    found = [(mean_interval(list(scores(r, budget, stage).values())), r) for r in rivals(records, budget)]
    return best_first(found, records[0].higher_is_better)


def verdict(records: list[CellRecord], budget: float, stage: Stage) -> str:
    """The best mean, whether it differs from the runner-up and from dense, and how the EUGens do."""
    ranked = _ranked(records, budget, stage)
    mean, first = ranked[0]
    parts = [f"best mean {text.quality(mean)} (n={mean.n}) by {first.method}"]
    if len(ranked) > 1:
        second = ranked[1][1]
        parts.append(
            relation(against(first, second, budget, stage), f"the next ({second.method})", size=True)
        )
    parts.append(relation(against_dense(first, budget, stage), "the dense network", size=True))
    sentences = [f"Budget {budget:g}, {STAGE_NAMES[stage]}: {'; '.join(parts)}."]
    controls = [record for _, record in ranked if record.method in CONTROLS]
    alike: dict[str, list[str]] = {}
    for record in (record for _, record in ranked if is_eugen(record)):
        relations = [relation(against(record, other, budget, stage), other.method) for other in controls]
        if relations:
            alike.setdefault(text.listing(relations), []).append(record.method)
    sentences += [f"{text.listing(methods)}: {relation}." for relation, methods in alike.items()]
    return " ".join(sentences)


def relation(comparison: Comparison | None, other: str, size: bool = False) -> str:
    """`better than X by 0.02 [0.01, 0.03] (n=3)` or `no difference shown from X (n=1)`."""
    if comparison is None:
        return f"not compared with {other}: no common seed"
    n = comparison.difference.n
    if comparison.verdict == "no difference shown":
        return f"no difference shown from {other} (n={n})"
    by = f" by {_size(comparison.difference)}" if size else ""
    return f"{comparison.verdict} than {other}{by} (n={n})"


def _size(interval: Interval) -> str:
    """Size and interval of a difference without its sign."""
    low, high = sorted((abs(interval.low), abs(interval.high)))
    return text.difference(Interval(abs(interval.mean), (high - low) / 2, interval.n)).replace("+", "")


def _speed(records: list[CellRecord], budget: float) -> list[str]:
    """Range of measured speed-ups beside the limit, and who is not shown to be faster, per timing."""
    timed: dict[tuple[str, str, int], list[tuple[str, Latency]]] = {}
    for record in rivals(records, budget):
        for x in latencies_at(record, budget):
            timed.setdefault((x.device, x.dtype, x.batch), []).append((record.method, x))
    parts = []
    for (device, dtype, batch), rows in sorted(timed.items()):
        measured = _range([latency.speedup for _, latency in rows])
        limits = _range([latency.speedup_limit for _, latency in rows])
        slow = [method for method, latency in rows if latency.speedup_low <= 1]
        tail = f"; not shown to be faster than dense: {text.listing(slow)}" if slow else ""
        parts.append(f"{measured} at batch {batch} on {device} in {dtype} (MACs allow {limits}{tail})")
    return (
        [f"Budget {budget:g}, speed of the whole model over dense: {text.listing(parts)}."] if parts else []
    )


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return f"{low}×" if low == high else f"{low}–{high}×"
