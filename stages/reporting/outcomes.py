"""One shape for what the ledger compares: a row at a budget, after transfer, fine-tuning or from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from stages.reporting import text
from stages.reporting.claimed import claimed
from stages.reporting.inputs import DENSE
from stages.reporting.intervals import (
    NEAR,
    STAGE_NAMES,
    STAGES,
    Comparison,
    Stage,
    budgets,
    closed_form_scores,
    compare,
    dense_scores,
    refine_steps,
    scores,
)
from stages.reporting.scratch import runs
from stages.reporting.table import cost_at, latencies_at
from stages.tracking.record import CellRecord, ScratchCost, ScratchRecord

FROM_SCRATCH = "scratch"


@dataclass(frozen=True)
class Outcome:
    """What one row reached at one budget, and what that cost."""

    task: str
    name: str
    section: dict[str, Any]
    """The row's own parameters."""
    protocol: str
    """`transfer`, `finetuned` or `scratch`."""
    variant: str
    """Of a training from scratch; empty otherwise."""
    how: str
    """The protocol in words."""
    budget: float
    scores: dict[int, float]
    dense: dict[int, float]
    quality_name: str
    higher_is_better: bool
    params: tuple[int, int] | None
    """Of the whole model and of the dense one."""
    speed: str
    """Measured speed-up over dense with its interval; empty where it was not timed."""
    effort: str
    """What it took to make the network."""
    refine_steps: int = 0
    """Local refinement of each block, in Adam steps; 0 is the closed form alone."""
    seconds: float = 0.0
    """Mean seconds per seed to make the network by transfer, fine-tuning included; 0 from scratch."""
    closed_form: dict[int, float] = field(default_factory=dict)
    """Quality by seed of transfer in closed form; empty where only that after refinement is known."""
    claimed: bool = False
    """Whether the row answers for EUGen; see `stages.reporting.claimed`."""
    trials: int = 0
    """Learning rates tried; 0 without a gradient through the network."""

    @property
    def layer(self) -> str:
        """The layer behind the row."""
        return str(self.section.get("layer", self.name))

    @property
    def row(self) -> str:
        """What stands for the row in the ledger, whatever its budget and stage."""
        return f"{self.task}, {self.name}" + (", from scratch" if self.protocol == FROM_SCRATCH else "")

    @property
    def rank(self) -> tuple[Any, ...]:
        """The least stands for the row: the base variant, the budget nearest to 0.3, the last stage."""
        near = round(abs(self.budget - NEAR), 9)
        return self.variant != runs.BASE, self.variant, near, self.budget, self.protocol == "transfer"

    @property
    def setting(self) -> tuple[Any, ...]:
        """Equal for outcomes that may be compared."""
        return self.task, self.protocol, self.variant, self.budget

    def where(self, n: int) -> str:
        """The conditions of a number over n seeds."""
        return f"{self.task}, {self.name}, budget {self.budget:g}, {self.how}, n={n}"

    def against(self, other: Outcome) -> Comparison | None:
        """Paired comparison; None without a common seed or under another setting."""
        if self.setting != other.setting:
            return None
        return compare(self.scores, other.scores, self.higher_is_better)

    def against_dense(self) -> Comparison | None:
        """Paired comparison with the dense network of the same seeds."""
        return compare(self.scores, self.dense, self.higher_is_better)


def of_cells(records: Iterable[CellRecord]) -> Iterator[Outcome]:
    """Every replaced row at every budget and stage that has a result."""
    known = list(records)
    for record in (record for record in known if record.method != DENSE):
        own = [(other.method, _section(other)) for other in known if other.task == record.task]
        answers = claimed(own) == record.method
        for budget in budgets(record):
            yield from (_of_cell(record, budget, s, answers) for s in STAGES if scores(record, budget, s))


def _section(record: CellRecord) -> dict[str, Any]:
    return next((v for v in record.params.values() if isinstance(v, dict) and "layer" in v), {})


def _of_cell(record: CellRecord, budget: float, stage: Stage, answers: bool) -> Outcome:
    cost = cost_at(record, budget)
    steps = refine_steps(record)
    rates = record.params.get("task", {}).get("finetune", {}).get("learning_rates", [])
    local = f" with {steps} local steps a block" if steps else " in closed form"
    seconds = _seconds(record, budget, stage)
    dense = record.train_seconds_dense
    beside = f"dense training {text.number(dense)} s" if dense else "the dense network came trained"
    timed = latencies_at(record, budget)
    speed = ""
    if timed:
        x = max(timed, key=lambda latency: latency.batch)
        speed = f"inference {text.speedup(x.speedup, x.speedup_low, x.speedup_high)} at batch {x.batch}"
    return Outcome(
        task=record.task,
        name=record.method,
        section=_section(record),
        protocol=stage,
        variant="",
        how=STAGE_NAMES[stage] + (local if stage == "transfer" else ""),
        budget=budget,
        scores=scores(record, budget, stage),
        dense=dense_scores(record, budget),
        quality_name=record.quality_name,
        higher_is_better=record.higher_is_better,
        params=(cost.params, cost.params_dense) if cost else None,
        speed=speed,
        effort=f"{text.number(seconds)} s per seed; {beside}; {record.environment.processor}",
        refine_steps=steps,
        seconds=seconds,
        closed_form=closed_form_scores(record, budget),
        claimed=answers,
        trials=len(rates) if stage == "finetuned" else 0,
    )


def _seconds(record: CellRecord, budget: float, stage: Stage) -> float:
    """Mean over seeds of transfer and, where the network was fine-tuned, of that too."""
    results = [result for result in record.seeds if result.budget == budget]
    if stage == "transfer":
        return fmean(result.transfer_seconds for result in results)
    tuned = [result for result in results if result.quality_finetuned is not None]
    return fmean(result.transfer_seconds + result.finetune_seconds for result in tuned)


def of_scratch(records: list[ScratchRecord]) -> Iterator[Outcome]:
    """Every row trained from scratch, at every budget of every variant that has a result."""
    for record in (record for record in records if record.row != DENSE):
        own = [other for other in records if other.task == record.task]
        for variant in runs.variants([record]):
            for budget in runs.budgets(record, variant):
                if runs.scores(record, variant, budget):
                    yield _of_scratch(own, record, variant, budget)


def _of_scratch(records: list[ScratchRecord], record: ScratchRecord, variant: str, budget: float) -> Outcome:
    cost = runs.cost_at(record, variant, budget)
    seconds = text.number(runs.training_seconds(records, record, variant, budget))
    return Outcome(
        task=record.task,
        name=record.row,
        section=runs.section_of(record),
        protocol=FROM_SCRATCH,
        variant=variant,
        how=_trained(variant, cost),
        budget=budget,
        scores=runs.scores(record, variant, budget),
        dense=runs.dense_scores(records, record, variant, budget),
        quality_name=record.quality_name,
        higher_is_better=record.higher_is_better,
        params=(cost.params, cost.params_dense) if cost else None,
        speed=_training_speed(cost),
        effort=f"{seconds} s per training; {record.environment.processor}",
        claimed=runs.claimed_row(records) is record,
        trials=runs.tried(record, variant, budget),
    )


def _trained(variant: str, cost: ScratchCost | None) -> str:
    said = f"trained from scratch ({variant})"
    if cost is None:
        return said
    return f"{said}, {cost.blocks_replaced} of {cost.blocks} blocks, {cost.steps} steps"


def _training_speed(cost: ScratchCost | None) -> str:
    if cost is None:
        return ""
    ends = cost.training_speedup, cost.training_speedup_low, cost.training_speedup_high
    return f"training {text.speedup(*ends)}"
