"""What the records say of EUGen's parts: rows that differ in one key, and the declared row's control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any

from stages.reporting import text
from stages.reporting.claimed import ORDER
from stages.reporting.findings import Finding, Verdict, answers, compared, eugens, or_needs
from stages.reporting.intervals import Comparison
from stages.reporting.outcomes import FROM_SCRATCH, Outcome

ENOUGH = 3
"""The order above which the papers find no gain."""
MARGIN = 0.01
"""A difference within this share of the lower order's mean quality is none."""
GATED = "narrow_gated"
"""The control of the declared row: a gated block multiplies two projections too."""


def trainable_projection(outcomes: list[Outcome]) -> list[Finding]:
    """Rows whose projection is trained, as it is by default, against the same row with a fixed one."""
    pairs = variants(outcomes, "trainable", lambda a, b: a is not False and b is False)
    return or_needs([compared(*pair) for pair in pairs], "EUGen rows that differ in `trainable` alone")


def norm_slot(outcomes: list[Outcome]) -> list[Finding]:
    """Rows with the norm slot, as it is by default, against the same row without."""
    pairs = variants(outcomes, "norm_slot", lambda a, b: a is not False and b is False)
    return or_needs(
        answers([compared(*pair) for pair in pairs]), "EUGen rows that differ in `norm_slot` alone"
    )


def order(outcomes: list[Outcome]) -> list[Finding]:
    """Rows of a higher order against the same row at order 3: enough if they are shown to gain nothing."""
    pairs = variants(outcomes, "order", lambda a, b: (a or ORDER) > ENOUGH and b == ENOUGH)
    return or_needs(
        [_enough(*pair) for pair in pairs],
        "EUGen rows that differ in `order` alone, one of order 3 and one above",
    )


def _enough(above: Outcome, enough: Outcome, comparison: Comparison) -> Finding:
    """That no difference is shown does not show that there is none: a few seeds seldom show one."""
    finding, found = compared(above, enough, comparison), comparison.difference
    margin = MARGIN * abs(fmean(enough.scores.values()))
    verdict: Verdict = "open"
    if found.half and (comparison.verdict == "worse" or max(abs(found.low), abs(found.high)) <= margin):
        verdict = "reproduced"
    elif comparison.verdict == "better":
        verdict = "not reproduced"
    said = f"{finding.conditions}; margin ±{text.number(margin)}, {100 * MARGIN:g} % of {enough.name}"
    return replace(finding, conditions=said, verdict=verdict)


def gated(outcomes: list[Outcome]) -> list[Finding]:
    """The declared row against gated blocks at equal budget: the answer; then all other EUGens, apart."""
    rivals = [outcome for outcome in outcomes if outcome.layer == GATED]
    pairs = [
        (outcome, other, comparison)
        for outcome in eugens(outcomes)
        for other in rivals
        if (comparison := outcome.against(other))
    ]
    said = [_declared(*pair) for pair in pairs if pair[0].claimed]
    said += [_ablation(*pair, pairs) for pair in pairs if not pair[0].claimed]
    return or_needs(answers(said), f"records of EUGen and `{GATED}` rows at one budget")


def _declared(outcome: Outcome, other: Outcome, comparison: Comparison) -> Finding:
    finding = compared(outcome, other, comparison)
    said = f"{finding.conditions}; declared to answer"
    if outcome.trials:
        said += f", {text.plural(outcome.trials, 'rate')} tried, {other.name} {other.trials}"
    return replace(finding, conditions=said)


def _ablation(
    outcome: Outcome,
    other: Outcome,
    comparison: Comparison,
    pairs: list[tuple[Outcome, Outcome, Comparison]],
) -> Finding:
    """One line for all of them: how many rows, and how many trials, stand behind it."""
    alike = [a for a, b, _ in pairs if not a.claimed and b is other and a.setting == outcome.setting]
    finding = compared(outcome, other, comparison)
    said = f"{outcome.task}, ablations: {text.plural(len(alike), 'further EUGen row')}"
    if outcome.trials:
        spent = text.plural(sum(row.trials for row in alike), "rate")
        said += f" with {spent} tried, {other.name} {other.trials}"
    said += f"; budget {outcome.budget:g}, {outcome.how}, n={comparison.difference.n}"
    line = f"{outcome.task}, ablations" + (", from scratch" if outcome.protocol == FROM_SCRATCH else "")
    return replace(finding, ours=f"{outcome.name}: {finding.ours}", conditions=said, row=line)


def variants(
    outcomes: list[Outcome], key: str, wanted: Callable[[Any, Any], bool]
) -> Iterator[tuple[Outcome, Outcome, Comparison]]:
    """EUGen rows under one setting whose parameters differ in `key` alone, compared."""
    family = [outcome for outcome in outcomes if outcome.layer == "eugen"]
    for first in family:
        for second in (outcome for outcome in family if outcome.setting == first.setting):
            a, b = first.section, second.section
            rest = {k: v for k, v in a.items() if k != key} == {k: v for k, v in b.items() if k != key}
            comparison = first.against(second) if rest and wanted(a.get(key), b.get(key)) else None
            if comparison:
                yield first, second, comparison
