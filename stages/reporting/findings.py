"""What the records say of one claim: a number with its interval, the conditions, a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from stages.reporting import text, verdicts
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import (
    STAGE_NAMES,
    STAGES,
    Comparison,
    Interval,
    Stage,
    budgets,
    dense_scores,
    mean_interval,
    scores,
)
from stages.reporting.table import cost_at
from stages.tracking.record import CellRecord

KEPT = 0.99
"""The share of dense quality that the papers' transfer is said to keep."""
IMAGE_TASK, SWEEP_TASK = "vision", "kernel"
Verdict = Literal["reproduced", "not reproduced", "not comparable", "open", "measured"]


@dataclass(frozen=True)
class Finding:
    """One row's answer to a claim."""

    ours: str
    conditions: str
    verdict: Verdict


def needs(what: str) -> Callable[[list[CellRecord]], list[Finding]]:
    """An entry that no record can answer yet, and what would."""
    return lambda records: [no_record(what)]


def image_points(records: list[CellRecord]) -> list[Finding]:
    """Quality lost and parameters saved on the image task: another network, other data than the claim's."""
    said = []
    for record, budget, stage in eugens(records, IMAGE_TASK):
        comparison = verdicts.against_dense(record, budget, stage)
        cost = cost_at(record, budget)
        if comparison and cost:
            saved = f"parameters {100 * (cost.params / cost.params_dense - 1):+.1f} %".replace("-", "−")
            lost = f"{text.difference(comparison.difference)} {record.quality_name}"
            size = f"a network of {text.number(cost.params_dense / 1e6)} M parameters, ViT-B has 86 M"
            where = f"{_where(record, budget, stage, comparison.difference)}; {size}"
            said.append(Finding(f"{lost}, {saved}", where, "not comparable"))
    return said or [no_record(f"records of a task `{IMAGE_TASK}`")]


def above_low_rank(records: list[CellRecord]) -> list[Finding]:
    """EUGens against low-rank rows at equal budget on the image task."""
    images = [record for record in records if record.task == IMAGE_TASK]
    rivals = [record for record in images if verdicts.layer_of(record).startswith("low_rank")]
    said = [
        _compared(record, other, budget, stage, comparison)
        for record, budget, stage in eugens(images)
        for other in rivals
        if (comparison := verdicts.against(record, other, budget, stage))
    ]
    return said or [no_record(f"records of a task `{IMAGE_TASK}` with EUGen and low-rank rows at one budget")]


def retention(records: list[CellRecord]) -> list[Finding]:
    """Share of the dense quality that transfer alone keeps, and its seconds."""
    said = []
    for record, budget, stage in eugens(records):
        if stage != "transfer" or not record.higher_is_better:
            continue
        dense = dense_scores(record, budget)
        kept = mean_interval([value / dense[seed] for seed, value in scores(record, budget, stage).items()])
        if kept is None or kept.half is None:
            continue
        seconds = fmean(result.transfer_seconds for result in record.seeds if result.budget == budget)
        verdict = "reproduced" if kept.low >= KEPT else "not reproduced" if kept.high < KEPT else "open"
        if verdict == "reproduced" and _refine_steps(record):
            verdict = "not comparable"  # local steps helped: it is more than the closed form
        share = f"{100 * kept.mean:.1f} ± {100 * kept.half:.1f} % of {record.quality_name}"
        said.append(
            Finding(share, f"{_where(record, budget, stage, kept)}; {text.number(seconds)} s", verdict)
        )
    return said or [no_record("records of EUGen rows on any task")]


def trainable_projection(records: list[CellRecord]) -> list[Finding]:
    """Rows whose projection is trained, as it is by default, against the same row with a fixed one."""
    pairs = list(variants(records, "trainable", lambda a, b: a is not False and b is False))
    return _of_pairs(pairs, "EUGen rows that differ in `trainable` alone")


def norm_slot(records: list[CellRecord]) -> list[Finding]:
    """Rows with the norm slot, as it is by default, against the same row without."""
    pairs = list(variants(records, "norm_slot", lambda a, b: a is not False and b is False))
    return [
        _as_answer(finding) for finding in _of_pairs(pairs, "EUGen rows that differ in `norm_slot` alone")
    ]


def against_narrow(records: list[CellRecord]) -> list[Finding]:
    """EUGens against the narrower block at equal budget, every task and stage."""
    said = [
        _as_answer(_compared(record, other, budget, stage, comparison))
        for record, budget, stage in eugens(records)
        for other in records
        if other.task == record.task and verdicts.layer_of(other) == "narrow"
        if (comparison := verdicts.against(record, other, budget, stage))
    ]
    return said or [no_record("records of EUGen and `narrow` rows at one budget")]


def training_cost(records: list[CellRecord]) -> list[Finding]:
    """Seconds to make an EUGen network from a trained one, beside those of training the dense one."""
    said = []
    for record, budget, stage in eugens(records):
        at_budget = [result for result in record.seeds if result.budget == budget]
        if stage == "finetuned":
            at_budget = [result for result in at_budget if result.quality_finetuned is not None]
        extra = stage == "finetuned"
        spent = mean_interval([r.transfer_seconds + (r.finetune_seconds if extra else 0) for r in at_budget])
        if spent is None:
            continue
        dense = record.train_seconds_dense
        beside = f"dense training {text.number(dense)} s" if dense else "the dense network came trained"
        where = f"{_where(record, budget, stage, spent)}; {beside}; {record.environment.processor}"
        said.append(Finding(f"{text.number(spent.mean)} s per seed", where, "measured"))
    return said or [no_record("records of EUGen rows on any task")]


def error_bars(records: list[CellRecord]) -> list[Finding]:
    """How many seeds stand behind the rows."""
    counts = [len(scores(r, b, s)) for r in records if r.method != DENSE for b in budgets(r) for s in STAGES]
    counts = [count for count in counts if count]
    if not counts:
        return [no_record("committed records")]
    enough = sum(count >= 3 for count in counts)
    ours = f"{min(counts)} to {max(counts)} seeds; {enough} of {len(counts)} results have 3 or more"
    return [Finding(ours, "all committed rows, each stage; 95 % Student-t intervals", "measured")]


def in_transformers(records: list[CellRecord]) -> list[Finding]:
    """EUGens against the dense Transformer of each task."""
    said = []
    for record, budget, stage in eugens(records):
        comparison = verdicts.against_dense(record, budget, stage)
        if comparison and record.task in ("embedding", IMAGE_TASK):
            ours = f"{text.difference(comparison.difference)} {record.quality_name} against dense"
            said.append(Finding(ours, _where(record, budget, stage, comparison.difference), "measured"))
    return said or [no_record("records of a Transformer task")]


def eugens(records: list[CellRecord], task: str | None = None) -> Iterator[tuple[CellRecord, float, Stage]]:
    """EUGen rows at every budget and stage that has a result.

    Args:
        task: of this one; None for all but the synthetic sweep, whose many budgets are summed up elsewhere.
    """
    for record in records:
        wanted = record.task == task if task else record.task != SWEEP_TASK
        if verdicts.is_eugen(record) and wanted:
            for budget in budgets(record):
                for stage in STAGES:
                    if scores(record, budget, stage):
                        yield record, budget, stage


def _section(record: CellRecord) -> dict[str, Any]:
    """The method's own parameters in a record."""
    return next((v for v in record.params.values() if isinstance(v, dict) and "layer" in v), {})


def variants(
    records: list[CellRecord], key: str, wanted: Callable[[Any, Any], bool]
) -> Iterator[tuple[CellRecord, CellRecord]]:
    """EUGen rows of one task whose parameters differ in `key` alone."""
    family = [record for record in records if verdicts.is_eugen(record)]
    for first in family:
        for second in (record for record in family if record.task == first.task):
            a, b = _section(first), _section(second)
            rest = {k: v for k, v in a.items() if k != key} == {k: v for k, v in b.items() if k != key}
            if rest and wanted(a.get(key), b.get(key)):
                yield first, second


def _of_pairs(pairs: list[tuple[CellRecord, CellRecord]], missing: str) -> list[Finding]:
    said = [
        _compared(first, second, budget, stage, comparison)
        for first, second in pairs
        for budget in budgets(first)
        for stage in STAGES
        if (comparison := verdicts.against(first, second, budget, stage))
    ]
    return said or [no_record(missing)]


def _compared(
    first: CellRecord, second: CellRecord, budget: float, stage: Stage, comparison: Comparison
) -> Finding:
    """A clear difference was claimed: one seed leaves it open, an interval over 0 fails it."""
    where = f"{_where(first, budget, stage, comparison.difference)}, against {second.method}"
    if comparison.difference.half is None:
        verdict = "open"
    else:
        verdict = "reproduced" if comparison.verdict == "better" else "not reproduced"
    shown = f"{text.difference(comparison.difference)} {first.quality_name}: {comparison.verdict}"
    return Finding(shown, where, verdict)


def _as_answer(finding: Finding) -> Finding:
    """A question claims nothing: its answer is a measurement, not a reproduction."""
    if finding.verdict == "open":
        return finding
    return Finding(finding.ours, finding.conditions, "measured")


def _where(record: CellRecord, budget: float, stage: Stage, interval: Interval) -> str:
    steps = _refine_steps(record)
    how = f" with {steps} local steps a block" if steps else " in closed form"
    made = STAGE_NAMES[stage] + (how if stage == "transfer" else "")
    return f"{record.task}, {record.method}, budget {budget:g}, {made}, n={interval.n}"


def _refine_steps(record: CellRecord) -> int:
    """Local refinement of each block, in Adam steps; 0 is the closed form alone."""
    return record.params.get("task", {}).get("transfer", {}).get("refine_steps", 0)


def no_record(missing: str) -> Finding:
    """An open entry, and what would answer it."""
    return Finding(text.NONE, f"needs {missing}", "open")
