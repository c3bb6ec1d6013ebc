"""Interval of a mean of few values: Student's, with its quantile in closed form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean_interval(values: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """Mean of independent values and Student's interval for what they scatter about.

    With a handful of values a percentile bootstrap is too narrow: it never leaves their range and divides
    by their number instead of its degrees of freedom (Hesterberg, What teachers should know about the
    bootstrap, 2015, section 3.1: 5 to 15 points of coverage at n = 5 to 10).
    """
    mean = statistics.fmean(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = student_quantile(confidence, len(values) - 1) * error
    return mean, mean - half, mean + half


def student_quantile(confidence: float, freedom: int) -> float:
    """t with P(|T| ≤ t) = confidence for that many degrees of freedom, by bisection.

    Raises:
        ValueError: confidence outside (0, 1), or no degree of freedom.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must be between 0 and 1")
    if freedom < 1:
        raise ValueError(f"freedom={freedom} must be at least 1: two values, one degree")
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _within(angle, freedom) < confidence else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _within(angle: float, freedom: int) -> float:
    """P(|T| ≤ √ν tan θ): Abramowitz and Stegun, 26.7.3 for odd ν, 26.7.4 for even."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 or not odd else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
