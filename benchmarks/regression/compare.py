"""One run: every case counted, computed and timed in both trees, a failed latency once more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.regression import verdict
from benchmarks.regression.cases import CASES, QUALITY, Case
from benchmarks.regression.processes import Refused, Worker, Workers, started
from benchmarks.regression.sampling import Limits, Samples, said, sample
from benchmarks.regression.verdict import FAIL, PASS, Finding

SEEDS = (0, 1, 2, 3, 4, 5)


@dataclass(frozen=True)
class Trees:
    """Where the two libraries are."""

    base: Path
    candidate: Path


def compare(
    trees: Trees, names: Sequence[str], limits: Limits, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The record's `cases`. `say` gets one line for each.

    Raises:
        WorkerLost: a worker died.
    """
    found = []
    with started(trees.base, trees.candidate, limits.threads) as workers:
        for number, name in enumerate(names, 1):
            found.append(_case(CASES[name], workers, trees, limits))
            say(f"{number}/{len(names)} {name}: {found[-1]['verdict']}, {found[-1]['reason']}")
    return found


def _case(case: Case, workers: Workers, trees: Trees, limits: Limits) -> dict[str, Any]:
    empty = {"name": case.name, "exact": None, "latency": None, "control": None, "quality": None}
    try:
        base = workers.base.ask("prepare", case=case.name)
        ours = [_error(workers.base, case, seed) for seed in SEEDS] if case.fitted else []
        workers.control.ask("prepare", case=case.name)
        candidate = workers.candidate.ask("prepare", case=case.name)
        theirs = [_error(workers.candidate, case, seed) for seed in SEEDS] if case.fitted else []
    except Refused as refusal:
        found = _refused(refusal)
        return {**empty, **found.said(), "noise_free": found.verdict}
    exact = {name: [count, candidate[name]] for name, count in base.items()}
    quality = _quality(ours, theirs) if case.fitted else None
    counted, computed = verdict.judge_exact(exact), verdict.judge_quality(quality)
    certain = [counted.verdict, computed.verdict]
    try:
        judged, latency, control = _latency(case, workers, trees, limits)
    except Refused as refusal:  # though its first call went well
        judged, latency, control = _refused(refusal), None, None
        certain.append(judged.verdict)
    return {
        **empty,
        **verdict.judge_case(counted, computed, judged).said(),
        "noise_free": FAIL if FAIL in certain else PASS,
        "exact": exact,
        "latency": latency,
        "control": control,
        "quality": quality,
    }


def _refused(refusal: Refused) -> Finding:
    """What it means that a library cannot build, fit or call the case."""
    if refusal.name == "candidate":
        return Finding(FAIL, f"the candidate cannot: {refusal}")
    return Finding(PASS, f"{verdict.NEW}, the base says {refusal}")


def _error(worker: Worker, case: Case, seed: int) -> float:
    return worker.ask("quality", case=case.name, seed=seed)["error_of_fit"]


def _quality(base: list[float], candidate: list[float]) -> dict[str, Any]:
    difference, low, high = verdict.relative_differences(base, candidate)
    values = {"seeds": list(SEEDS), "base": base, "candidate": candidate}
    return {"name": QUALITY, "better": "lower", **values, "difference": difference, "low": low, "high": high}


def _latency(
    case: Case, workers: Workers, trees: Trees, limits: Limits
) -> tuple[Finding, dict[str, Any], dict[str, Any]]:
    """Verdict, latency and control of a case that is prepared.

    Raises:
        Refused: a library fails in a later call than its first.
    """
    main, control = sample(workers, limits)
    found = verdict.judge_latency(main.ratio, control.ratio, least_pairs=limits.pairs)
    latency = {**main.said(), "confirmed": None}
    if found.verdict == FAIL:
        again, control_again = _again(case, trees, limits)
        found = verdict.judge_latency(
            main.ratio, control_again.ratio, least_pairs=limits.pairs, again=again.ratio
        )
        latency |= {"confirmed": again.ratio.slower, "again": said(again.ratio)}
        control = control_again if control_again.ratio.alarms else control
    return found, latency, said(control.ratio)


def _again(case: Case, trees: Trees, limits: Limits) -> tuple[Samples, Samples]:
    """The same measurement by fresh processes."""
    with started(trees.base, trees.candidate, limits.threads) as workers:
        for worker in workers.all():
            worker.ask("prepare", case=case.name)
        return sample(workers, limits)
