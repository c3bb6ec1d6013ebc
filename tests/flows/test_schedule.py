"""Order, limits and failures, without a process."""

import random

import pytest

from flows.schedule import ALONE, Schedule, verb, with_ancestors, with_descendants

UPSTREAM = {
    "prepare@a": frozenset[str](),
    "prepare@b": frozenset[str](),
    "transfer@a-x": frozenset({"prepare@a"}),
    "transfer@a-y": frozenset({"prepare@a"}),
    "transfer@b-x": frozenset({"prepare@b"}),
    "profile@a-x": frozenset({"transfer@a-x"}),
    "profile@a-y": frozenset({"transfer@a-y"}),
    "profile@b-x": frozenset({"transfer@b-x"}),
    "report": frozenset({"profile@a-x", "profile@a-y", "profile@b-x"}),
}


def play(jobs: int, failing: frozenset[str], seed: int) -> tuple[list[str], Schedule]:
    """Run to the end, ending stages in a random order; checks the rules at every step."""
    schedule, choose = Schedule(UPSTREAM, UPSTREAM.keys()), random.Random(seed)
    running: list[str] = []
    ended: list[str] = []
    while schedule.open:
        for stage in schedule.take(jobs):
            assert verb(stage) == "report" or UPSTREAM[stage] <= set(ended) - failing
            running.append(stage)
        assert 0 < len(running) <= jobs
        assert len(running) == 1 or not any(verb(stage) in ALONE for stage in running)
        stage = running.pop(choose.randrange(len(running)))
        ended.append(stage)
        schedule.end(stage, failed=stage in failing)
    return ended, schedule


@pytest.mark.parametrize("jobs", [1, 2, 8])
@pytest.mark.parametrize("seed", range(5))
def test_every_stage_runs_once_after_what_it_needs_and_timings_are_alone(jobs: int, seed: int):
    ended, schedule = play(jobs, frozenset(), seed)
    assert sorted(ended) == sorted(UPSTREAM) and ended[-1] == "report" and not schedule.skipped


@pytest.mark.parametrize("seed", range(5))
def test_a_failure_skips_only_what_needs_it_and_the_report_still_runs_last(seed: int):
    ended, schedule = play(2, frozenset({"prepare@b", "transfer@a-y"}), seed)
    assert schedule.skipped == {
        "transfer@b-x": "prepare@b",
        "profile@b-x": "prepare@b",
        "profile@a-y": "transfer@a-y",
    }
    assert ended[-1] == "report" and set(ended) | set(schedule.skipped) == set(UPSTREAM)


def test_independent_stages_start_together():
    schedule = Schedule(UPSTREAM, UPSTREAM.keys())
    assert schedule.take(2) == ["prepare@a", "prepare@b"] and schedule.take(2) == []
    schedule.end("prepare@a", failed=False)
    assert schedule.take(2) == ["transfer@a-x"]


def test_cells_that_have_not_begun_are_given_back():
    schedule = Schedule(UPSTREAM, UPSTREAM.keys() - {"prepare@a", "prepare@b", "report"})
    assert schedule.take(1) == ["transfer@a-x"]
    assert schedule.give_back() == ["transfer@a-y", "transfer@b-x", "profile@a-y", "profile@b-x"]
    schedule.end("transfer@a-x", failed=False)
    assert schedule.take(1) == ["profile@a-x"], "a cell that has begun is finished"
    schedule.end("profile@a-x", failed=False)
    assert not schedule.open


def test_what_a_stage_needs_is_found_through_all_levels():
    assert with_ancestors(UPSTREAM, {"profile@a-x"}) == {"profile@a-x", "transfer@a-x", "prepare@a"}


def test_a_stage_named_as_timing_runs_alone():
    stages = UPSTREAM.keys() - {"prepare@a", "prepare@b"}
    schedule = Schedule(UPSTREAM, stages, frozenset({"transfer@a-x"}))
    assert schedule.take(4) == ["transfer@a-y", "transfer@b-x"]
    for stage in ("transfer@a-y", "transfer@b-x"):
        assert schedule.take(4) == []
        schedule.end(stage, failed=False)
    assert schedule.take(4) == ["transfer@a-x"] and schedule.take(4) == []


def test_what_is_up_to_date_holds_nothing_up():
    schedule = Schedule(UPSTREAM, {"profile@a-x", "report"})
    assert schedule.take(4) == ["profile@a-x"]
    schedule.end("profile@a-x", failed=False)
    assert schedule.take(4) == ["report"]


def test_descendants_are_followed_to_the_end():
    assert with_descendants(UPSTREAM, {"prepare@b"}) == {"prepare@b", "transfer@b-x", "profile@b-x", "report"}
    assert with_descendants(UPSTREAM, set()) == set()
