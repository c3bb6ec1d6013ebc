"""What the cells say of the synthetic kernels and of quantisation: ledger entries."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from statistics import fmean

from stages.reporting import text, verdicts
from stages.reporting.ablations import GATED
from stages.reporting.claimed import ORDER, claimed
from stages.reporting.findings import SWEEP_TASK, Finding, Verdict, needs
from stages.reporting.intervals import Comparison, budgets, compare, final_scores, scores
from stages.reporting.settings import setting_scores, settings_of
from stages.reporting.table import latencies_at
from stages.tracking.record import CellRecord

RIVALS = ("snnk", "low_rank")
"""The layers that the claim names; the stronger, activation-aware low rank stands in the report."""


def synthetic(records: list[CellRecord]) -> list[Finding]:
    """Each EUGen of order 2 against each SNNK and low-rank row: a line per pair, all settings in it."""
    missing = f"records of a task `{SWEEP_TASK}` with EUGen, SNNK and low-rank rows at one budget"
    return _pairs(records, RIVALS) or [needs(missing)]


def against_layer(records: list[CellRecord], layer: str) -> list[Finding]:
    """The same lines as above against the rows of one layer, as a question's answer; none without them."""
    found = _pairs(records, (layer,))
    return [f if f.verdict == "open" else replace(f, verdict="measured") for f in found]


def gated(records: list[CellRecord]) -> list[Finding]:
    """The same lines against gated blocks: the declared row answers, the other EUGens are ablations."""
    rows = [record for record in records if record.task == SWEEP_TASK]
    name = claimed((record.method, record.params.get("method", {})) for record in rows)
    others = [record for record in rows if record.method != name]
    own = [record for record in rows if not _claimed(record) or record.method == name]
    said = f"ablation, one of {sum(map(_claimed, others))} further EUGen rows: "
    apart = [replace(f, conditions=said + f.conditions) for f in against_layer(others, GATED)]
    return against_layer(own, GATED) + apart


def _pairs(records: list[CellRecord], rivals: tuple[str, ...]) -> list[Finding]:
    rows = [record for record in records if record.task == SWEEP_TASK]
    return [
        _pair(first, second)
        for first in rows
        if _claimed(first)
        for second in rows
        if verdicts.layer_of(second) in rivals and set(budgets(first)) & set(budgets(second))
    ]


def _claimed(record: CellRecord) -> bool:
    """Whether the row is an EUGen of the papers' order; other orders are an entry of their own."""
    order = record.params.get("method", {}).get("order", ORDER)
    return verdicts.layer_of(record) == "eugen" and order == ORDER


def _pair(first: CellRecord, second: CellRecord) -> Finding:
    """The mean difference over budgets, then how often a setting at a budget is better, worse or neither."""
    shared = sorted(set(budgets(first)) & set(budgets(second)))
    whole = compare(_over(first, shared), _over(second, shared), first.higher_is_better)
    if whole is None:
        return needs("repeats of both rows with the same seeds")
    counts = Counter(
        comparison.verdict
        for setting in settings_of([first, second])
        for budget in shared
        if (comparison := _at(first, second, budget, setting))
    )
    total = sum(counts.values())
    size = f"{text.difference(whole.difference)} {first.quality_name}"
    ours = (
        f"{size} against {second.method}: {whole.verdict} (of {total} settings × budgets "
        f"{counts['better']} better, {counts['worse']} worse)"
    )
    where = (
        f"{first.task}, {first.method}, mean of budgets "
        f"{text.listing([f'{budget:g}' for budget in shared])}, in closed form, n={whole.difference.n}"
    )
    return Finding(ours, where, _verdict(whole), where)


def _at(first: CellRecord, second: CellRecord, budget: float, setting: str) -> Comparison | None:
    ours, theirs = (setting_scores(record, budget, setting) for record in (first, second))
    return compare(ours, theirs, first.higher_is_better)


def _over(record: CellRecord, shared: list[float]) -> dict[int, float]:
    """Mean quality over budgets by seed, for seeds that have them all."""
    found = [scores(record, budget, "transfer") for budget in shared]
    seeds = set.intersection(*(set(values) for values in found))
    return {seed: fmean(values[seed] for values in found) for seed in seeds}


def _verdict(comparison: Comparison) -> Verdict:
    if comparison.difference.half is None:
        return "open"
    return "reproduced" if comparison.verdict == "better" else "not reproduced"


def quantisation(records: list[CellRecord]) -> list[Finding]:
    """EUGens at their largest budget against the dense block in int8: quality and both speed-ups."""
    said = []
    for record in (record for record in records if _claimed(record)):
        budget = max(budgets(record))
        for other in (r for r in records if r.task == record.task and verdicts.layer_of(r) == "int8"):
            if budgets(other) == [1.0]:  # not a smaller row in int8
                said.append(_quantised(record, budget, other, 1.0))
    return [finding for finding in said if finding] or [needs("a row `int8`, timed in the same runs")]


def _quantised(record: CellRecord, budget: float, other: CellRecord, theirs: float) -> Finding | None:
    pair = final_scores(record, budget), final_scores(other, theirs)
    comparison = compare(*pair, record.higher_is_better)
    if comparison is None:
        return None
    ours = f"{text.difference(comparison.difference)} {record.quality_name}: {comparison.verdict}"
    where = f"{record.task}, {record.method} at budget {budget:g} against {other.method} at {theirs:g}"
    where += f", n={comparison.difference.n}"
    return Finding(ours + _speeds(record, budget, other, theirs), where, "measured")


def _speeds(first: CellRecord, budget: float, second: CellRecord, other: float) -> str:
    """Speed-ups over dense of both at the largest batch that both were timed with."""
    times = [
        {(x.device, x.dtype, x.batch): x for x in latencies_at(*row)}
        for row in ((first, budget), (second, other))
    ]
    shared = sorted(times[0].keys() & times[1].keys(), key=lambda key: key[2])
    if not shared:
        return ""
    ours, theirs = (found[shared[-1]] for found in times)
    said = [text.speedup(x.speedup, x.speedup_low, x.speedup_high) for x in (ours, theirs)]
    return f"; speed-up {said[0]} against {said[1]} at batch {shared[-1][2]}"
