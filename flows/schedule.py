"""Which stage may start next: dependencies, a limit of jobs, stages that must be alone, failures."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import Any

Upstream = Mapping[str, Set[str]]
"""The stages that each stage needs, by name, in the order of dvc.yaml."""

ALONE = frozenset({"profile", "report"})
"""Verbs that nothing may run beside: a neighbour would disturb the timings."""
TIMING_VERB = "transfer"
"""Of this verb, the cells of a row that aims at a measured time run alone, too."""
LAST = "report"
"""The verb that runs after everything else, whatever failed."""


def verb(stage: str) -> str:
    """The verb of a stage: `transfer` of `transfer@vision-eugen`."""
    return stage.partition("@")[0]


def cell(stage: str) -> str:
    """The cell of a stage: `vision-eugen` of `transfer@vision-eugen`, empty for the report."""
    return stage.partition("@")[2]


def timing_stages(params: Mapping[str, Any]) -> frozenset[str]:
    """Stages that time although their verb does not say so, by the contents of params.yaml."""
    rows = [name for name, row in params.get("methods", {}).items() if row.get("target") == "time"]
    return frozenset(f"{TIMING_VERB}@{task}-{row}" for task in params.get("tasks", {}) for row in rows)


def with_ancestors(upstream: Upstream, stages: Set[str]) -> set[str]:
    """`stages` and everything that they need, directly or not."""
    found = set(stages)
    while grown := {need for stage in found for need in upstream[stage]} - found:
        found |= grown
    return found


def with_descendants(upstream: Upstream, stages: Set[str]) -> set[str]:
    """`stages` and everything that needs one of them, directly or not."""
    found = set(stages)
    while grown := {stage for stage, needs in upstream.items() if stage not in found and needs & found}:
        found |= grown
    return found


class Schedule:
    """The state of one run over the stages `todo`; a stage is started by `take` and ended by `end`.

    The stages `timing` run alone, as those of the verbs `ALONE` do.
    """

    def __init__(self, upstream: Upstream, todo: Collection[str], timing: Set[str] = frozenset()) -> None:
        self._upstream, self._timing = upstream, timing
        self._waiting = [stage for stage in upstream if stage in todo]
        self._running: set[str] = set()
        self._begun: set[str] = set()
        self.skipped: dict[str, str] = {}
        """Stages that will not run, with the failed stage they need."""

    @property
    def open(self) -> bool:
        """Whether anything runs or will."""
        return bool(self._waiting or self._running)

    def take(self, jobs: int) -> list[str]:
        """Mark as running, and return, the stages to start now so that at most `jobs` run at a time.

        Stages that must be alone wait until no other is left, so the parallel ones keep all cores busy.
        """
        if any(self._alone(stage) for stage in self._running):
            return []
        ready = [stage for stage in self._waiting if self._ready(stage)]
        shared = [stage for stage in ready if not self._alone(stage)]
        chosen = shared[: max(0, jobs - len(self._running))]
        if not shared and not self._running:
            chosen = ready[:1]
        self._waiting = [stage for stage in self._waiting if stage not in chosen]
        self._running.update(chosen)
        self._begun.update(cell(stage) for stage in chosen)
        return chosen

    def give_back(self) -> list[str]:
        """Begin no further cell: drops, and returns, the waiting stages of those not begun."""
        left = [stage for stage in self._waiting if cell(stage) not in self._begun]
        self._waiting = [stage for stage in self._waiting if stage not in left]
        return left

    def end(self, stage: str, *, failed: bool) -> None:
        """Note that a running stage ended; what needs a failed one is skipped, except the last verb."""
        self._running.remove(stage)
        if not failed:
            return
        needing = with_descendants(self._upstream, {stage})
        for other in [other for other in self._waiting if other in needing and verb(other) != LAST]:
            self._waiting.remove(other)
            self.skipped[other] = stage

    def _alone(self, stage: str) -> bool:
        return verb(stage) in ALONE or stage in self._timing

    def _ready(self, stage: str) -> bool:
        if verb(stage) == LAST:
            return not self._running and all(verb(other) == LAST for other in self._waiting)
        unfinished = self._running.union(self._waiting)
        return not self._upstream[stage] & unfinished
