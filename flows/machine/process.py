"""Processes told apart: a number is given again, a start time with it is not."""

from __future__ import annotations

import psutil

CLOCK_S = 2.0
"""By so much the clocks of two looks at one start may differ."""


def lives(pid: int, created: float) -> bool:
    """Whether the process of this number that started at `created` (Unix seconds) still runs."""
    try:
        return abs(psutil.Process(pid).create_time() - created) < CLOCK_S
    except psutil.NoSuchProcess:
        return False
