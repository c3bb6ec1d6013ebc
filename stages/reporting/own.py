"""Questions of our own: what this library adds to the papers' layer, beside the best of the other rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean

from stages.reporting.findings import Finding, answers, compared, or_needs
from stages.reporting.outcomes import Outcome
from stages.reporting.verdicts import EUGENS
from stages.rows import AUTO

EXPERTS, PRUNE = "eugen_experts", "prune"


def experts(outcomes: list[Outcome]) -> list[Finding]:
    """Conditional EUGens against the best row that is no EUGen and no choice, under each setting."""
    said = _beside(outcomes, lambda o: o.layer == EXPERTS, lambda o: o.layer not in (*EUGENS, AUTO))
    return or_needs(said, f"records of `{EXPERTS}` and rivals at one budget")


def choice(outcomes: list[Outcome]) -> list[Finding]:
    """A choice for each block against pruning everywhere, under each setting."""
    said = _beside(outcomes, lambda o: o.layer == AUTO, lambda o: o.layer == PRUNE)
    return or_needs(said, f"records of `{AUTO}` rows and `{PRUNE}` at one budget")


def _beside(
    outcomes: list[Outcome], ours: Callable[[Outcome], bool], theirs: Callable[[Outcome], bool]
) -> list[Finding]:
    """Each of our rows against the best of theirs, with the speed of both."""
    found = []
    for outcome in filter(ours, outcomes):
        others = [o for o in outcomes if theirs(o) and o.setting == outcome.setting and o.scores]
        if not others:
            continue
        sign = 1 if outcome.higher_is_better else -1
        best = max(others, key=lambda other: sign * fmean(other.scores.values()))
        comparison = outcome.against(best)
        if comparison:
            finding = compared(outcome, best, comparison)
            speeds = f"; {outcome.speed}, theirs {best.speed}" if outcome.speed and best.speed else ""
            found.append(replace(finding, ours=finding.ours + speeds))
    return answers(found)
