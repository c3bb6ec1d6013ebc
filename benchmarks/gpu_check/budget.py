"""Parts that end in time, and what each of them did, left out and found wrong."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

NOT_BEGUN = "not begun"


class TimeUp(BaseException):
    """The command must end now; no `except Exception` on the way holds it up."""


@dataclass
class Outcome:
    """What a part found, as it goes on: what was measured before time ran out stays.

    Attributes:
        results: of the part, as they stand in the record.
        cut: what was left out because time was up.
        failed: checks that failed, and what broke.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    cut: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    begun: bool = False
    ended: bool = False

    @property
    def status(self) -> str:
        return "failed" if self.failed else "done" if self.ended and not self.cut else "cut"


@dataclass(frozen=True)
class Part:
    """One part of the command.

    Attributes:
        run: takes the outcome to fill and when to end, of `time.perf_counter`.
        seconds: its share of the time; what it leaves goes to the next one.
    """

    name: str
    seconds: float
    run: Callable[[Outcome, float], None]


def run_parts(parts: list[Part], seconds: float) -> dict[str, Outcome]:
    """Each part in its order, until all are done or time is up. A part that breaks hides no other."""
    outcomes = {part.name: Outcome() for part in parts}
    end = begin = time.perf_counter()
    try:
        with ending_after(seconds):
            for part in parts:
                end += part.seconds
                _run(part, outcomes[part.name], min(end, begin + seconds))
    except TimeUp:
        pass
    for outcome in outcomes.values():
        if not outcome.ended:
            outcome.cut.append("stopped: time was up" if outcome.begun else NOT_BEGUN)
    return outcomes


def _run(part: Part, outcome: Outcome, deadline: float) -> None:
    start, outcome.begun = time.perf_counter(), True
    try:
        part.run(outcome, deadline)
        outcome.ended = True
    except Exception as failure:
        outcome.failed.append(f"{part.name}: {type(failure).__name__}: {failure}")
        outcome.ended = True
    finally:
        outcome.seconds = round(time.perf_counter() - start, 1)


@contextmanager
def ending_after(seconds: float) -> Iterator[None]:
    """Raise `TimeUp` in here after so long, or when somebody asks the process to end (SIGTERM)."""

    def stop(*_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise TimeUp

    before = {name: signal.signal(name, stop) for name in (signal.SIGALRM, signal.SIGTERM)}
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of whoever else was waiting
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for name, handler in before.items():
            signal.signal(name, handler)
        signal.setitimer(signal.ITIMER_REAL, left)
