"""Lines about the work, with an estimate of the time that is left."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import typer

BLOCK = re.compile(r"^block (\d+)/(\d+) ")


def say(line: str) -> None:
    """A line for the person who waits; results go to standard output, these do not."""
    typer.echo(line, err=True)


class Progress:
    """Passes lines on; to those of fitted blocks it adds how long the others will take.

    Args:
        resumed: blocks that an earlier run finished, and that take no time in this one.
        total: blocks of the whole work.
    """

    def __init__(self, resumed: int, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.resumed, self.total, self.done = resumed, total, 0
        self._clock = clock
        self._start: float | None = None

    def __call__(self, line: str) -> None:
        if self._start is None:
            self._start = self._clock()
        if BLOCK.match(line):
            self.done += 1
            left = self.total - self.resumed - self.done
            if left > 0:
                each = (self._clock() - self._start) / self.done
                line = f"{line}; about {duration(left * each)} left"
        say(line)


def duration(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
