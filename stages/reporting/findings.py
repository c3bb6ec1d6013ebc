"""What the records say of one claim: a number with its interval, the conditions, a verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from stages.reporting import text
from stages.reporting.intervals import Comparison, mean_interval
from stages.reporting.outcomes import FROM_SCRATCH, Outcome

KEPT = 0.99
"""The share of dense quality that the papers' transfer is said to keep."""
DISTILLED = 0.998
"""The share that distillation with a trained projection is said to keep."""
CLOSED_FORM = "in closed form"
IMAGE_TASK, SWEEP_TASK = "vision", "kernel"
TRANSFORMERS = ("embedding", "language", IMAGE_TASK)
RECONSTRUCTION = ("radiance", "distance")
Verdict = Literal["reproduced", "not reproduced", "not comparable", "open", "measured"]
WORST: tuple[Verdict, ...] = ("not reproduced", "open", "not comparable", "measured", "reproduced")
"""The verdict of several results is the first of these that occurs."""


@dataclass(frozen=True)
class Finding:
    """One answer to a claim."""

    ours: str
    conditions: str
    verdict: Verdict
    row: str = ""
    """Findings of one row stand in one line of the ledger; empty: a line of its own."""
    rank: tuple[Any, ...] = ()
    """Of a row's findings those of the least rank are shown; the others are counted, and folded below."""
    tally: str = ""
    """What is counted; the verdict if empty."""


def condense(found: list[Finding]) -> list[Finding]:
    """One finding a row, in the order of first appearance."""
    groups: dict[str, list[Finding]] = {}
    for i, finding in enumerate(found):
        groups.setdefault(finding.row or f"#{i}", []).append(finding)
    return [_condensed(group) for group in groups.values()]


def _condensed(group: list[Finding]) -> Finding:
    least = min(finding.rank for finding in group)
    shown = [finding for finding in group if finding.rank == least]
    verdict: Verdict = next(v for v in WORST if any(finding.verdict == v for finding in shown))
    conditions = shown[0].conditions
    if len(shown) < len(group):
        counts = Counter(finding.tally or finding.verdict for finding in group)
        conditions += f"; all {len(group)} results below"
        if counts.keys() != {"measured"}:
            named = [f"{count} {what}" for what, count in counts.most_common()]
            conditions += f": {text.listing(named)}"
    return Finding("; ".join(finding.ours for finding in shown), conditions, verdict)


def needs(what: str) -> Finding:
    """An open entry, and what would answer it."""
    return Finding(text.NONE, f"needs {what}", "open")


def or_needs(found: list[Finding], what: str) -> list[Finding]:
    """The findings, or what would give some."""
    return found or [needs(what)]


def eugens(outcomes: list[Outcome], *tasks: str) -> Iterator[Outcome]:
    """Outcomes of EUGen rows on these tasks; on all but the synthetic sweep, summed up elsewhere, if none."""
    for outcome in outcomes:
        wanted = outcome.task in tasks if tasks else outcome.task != SWEEP_TASK
        if outcome.layer == "eugen" and wanted:
            yield outcome


def sized(outcomes: list[Outcome], task: str, theirs: str) -> list[Finding]:
    """Quality lost, parameters saved and speed gained, on another network and other data than the claim's.

    Args:
        theirs: the claim's own network, in words.
    """
    said = []
    for outcome in eugens(outcomes, task):
        comparison = outcome.against_dense()
        if comparison is None or outcome.params is None:
            continue
        own, dense = outcome.params
        saved = f"parameters {100 * (own / dense - 1):+.1f} %".replace("-", "−")
        lost = f"{text.difference(comparison.difference)} {outcome.quality_name}"
        size = f"a network of {text.number(dense / 1e6)} M parameters, {theirs}"
        where = f"{outcome.where(comparison.difference.n)}; {size}"
        ours = "; ".join(part for part in (lost, saved, outcome.speed) if part)
        tally = f"{comparison.verdict} than dense" if comparison.verdict != "no difference shown" else ""
        said.append(
            Finding(ours, where, "not comparable", outcome.row, outcome.rank, tally or comparison.verdict)
        )
    return or_needs(said, f"EUGen rows in records of a task `{task}`")


def above_low_rank(outcomes: list[Outcome]) -> list[Finding]:
    """EUGens against low-rank rows at equal budget on the image task."""
    said = against(outcomes, lambda layer: layer.startswith("low_rank"), IMAGE_TASK)
    return or_needs(said, f"records of a task `{IMAGE_TASK}` with EUGen and low-rank rows at one budget")


def retention(outcomes: list[Outcome]) -> list[Finding]:
    """Share of the dense quality that transfer in closed form keeps, and its seconds."""
    said, refined = [], []
    for outcome in (outcome for outcome in eugens(outcomes) if outcome.protocol == "transfer"):
        if not outcome.closed_form:  # after local refinement it is more than the closed form
            refined.append(f"{outcome.task}, {outcome.name}")
            continue
        finding = _kept(replace(outcome, scores=outcome.closed_form, how=CLOSED_FORM), KEPT)
        if finding and outcome.refine_steps:
            finding = replace(
                finding, conditions=f"{finding.conditions} with {outcome.refine_steps} local steps"
            )
        said += [finding] if finding else []
    if refined:
        named = "; ".join(dict.fromkeys(refined))
        said.append(needs(f"records with quality in closed form, without local refinement, of {named}"))
    return or_needs(said, "records of EUGen rows on any task")


def distillation(outcomes: list[Outcome]) -> list[Finding]:
    """Share of the dense quality that a student keeps whose projection was trained, on 3D reconstruction."""
    said = []
    for outcome in eugens(outcomes, *RECONSTRUCTION):
        refined = outcome.protocol == "transfer" and outcome.refine_steps > 0
        trained = outcome.section.get("trainable", True) is not False
        if trained and (refined or outcome.protocol == "finetuned"):
            finding = _kept(outcome, DISTILLED)
            said += [finding] if finding else []
    return or_needs(
        said, "refined or fine-tuned EUGen rows in records of the tasks `radiance` and `distance`"
    )


def _kept(outcome: Outcome, least: float) -> Finding | None:
    """The share of dense quality, of an error the dense error over ours; None below two seeds."""
    pairs = [(value, outcome.dense[seed]) for seed, value in outcome.scores.items() if seed in outcome.dense]
    if any(value <= 0 or dense <= 0 for value, dense in pairs):
        return None
    kept = mean_interval([v / dense if outcome.higher_is_better else dense / v for v, dense in pairs])
    if kept is None or kept.half is None:
        return None
    verdict = "reproduced" if kept.low >= least else "not reproduced" if kept.high < least else "open"
    what = outcome.quality_name if outcome.higher_is_better else f"{outcome.quality_name} (dense over ours)"
    share = f"{100 * kept.mean:.1f} ± {100 * kept.half:.1f} % of {what}"
    where = f"{outcome.where(kept.n)}; {text.number(outcome.seconds)} s"
    return Finding(share, where, verdict, outcome.row, outcome.rank)


def against_layer(outcomes: list[Outcome], layer: str) -> list[Finding]:
    """EUGens against rows of one layer at equal budget, every task and protocol: a question's answer."""
    said = answers(against(outcomes, lambda other: other == layer))
    return or_needs(said, f"records of EUGen and `{layer}` rows at one budget")


def training_cost(outcomes: list[Outcome]) -> list[Finding]:
    """Seconds to make an EUGen network, and from scratch its training step beside dense."""
    said = []
    for outcome in eugens(outcomes):
        scratch = outcome.protocol == FROM_SCRATCH
        ours, _, beside = outcome.effort.partition("; ")
        ours = f"{outcome.speed}; {ours}" if scratch and outcome.speed else ours
        where = f"{outcome.where(len(outcome.scores))}; {beside}"
        said.append(Finding(ours, where, "measured", outcome.row, outcome.rank))
    return or_needs(said, "records of EUGen rows on any task")


def error_bars(outcomes: list[Outcome]) -> list[Finding]:
    """How many seeds stand behind the rows."""
    counts = [len(outcome.scores) for outcome in outcomes]
    if not counts:
        return [needs("committed records")]
    enough = sum(count >= 3 for count in counts)
    ours = f"{min(counts)} to {max(counts)} seeds; {enough} of {len(counts)} results have 3 or more"
    return [Finding(ours, "all committed rows, each protocol; 95 % Student-t intervals", "measured")]


def in_transformers(outcomes: list[Outcome]) -> list[Finding]:
    """EUGens against the dense Transformer of each task."""
    said = []
    for outcome in eugens(outcomes, *TRANSFORMERS):
        comparison = outcome.against_dense()
        if comparison:
            ours = f"{text.difference(comparison.difference)} {outcome.quality_name} against dense: "
            where = outcome.where(comparison.difference.n)
            said.append(
                Finding(
                    ours + comparison.verdict,
                    where,
                    "measured",
                    outcome.row,
                    outcome.rank,
                    comparison.verdict,
                )
            )
    return or_needs(said, "records of a Transformer task")


def against(outcomes: list[Outcome], rival: Callable[[str], bool], *tasks: str) -> list[Finding]:
    """EUGens against the rows of these layers under one setting."""
    return [
        compared(outcome, other, comparison)
        for outcome in eugens(outcomes, *tasks)
        for other in outcomes
        if rival(other.layer) and (comparison := outcome.against(other))
    ]


def compared(first: Outcome, second: Outcome, comparison: Comparison) -> Finding:
    """A clear difference was claimed: one seed leaves it open, an interval over 0 fails it."""
    if comparison.difference.half is None:
        verdict = "open"
    else:
        verdict = "reproduced" if comparison.verdict == "better" else "not reproduced"
    size = f"{text.difference(comparison.difference)} {first.quality_name}"
    ours = f"{size} against {second.name}: {comparison.verdict}"
    where = first.where(comparison.difference.n)
    return Finding(ours, where, verdict, first.row, first.rank, comparison.verdict)


def answers(found: list[Finding]) -> list[Finding]:
    """A question claims nothing: its answers are measurements, not reproductions."""
    return [f if f.verdict == "open" else replace(f, verdict="measured") for f in found]
