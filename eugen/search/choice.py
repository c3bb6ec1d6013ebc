"""The budgeted choice: one option for each block, the least error in sum, costs in sum within a limit.

The multiple-choice knapsack problem, by dynamic programming over discretised costs (Kellerer, Pferschy and
Pisinger, Knapsack problems, 2004, section 11.5).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

STEPS = 20_000
"""Units that the limit is cut into. Costs are rounded up, so a plan wastes at most a unit for each block."""
ROUNDING = 1e-12


def cheapest(costs: Sequence[float], errors: Sequence[float]) -> int:
    """The option of least cost, among equals that of the least error."""
    return min(range(len(costs)), key=lambda i: (costs[i], errors[i], i))


def choose_options(
    costs: Sequence[Sequence[float]],
    errors: Sequence[Sequence[float]],
    limit: float,
    *,
    steps: int = STEPS,
) -> list[int] | None:
    """The index of one option for each block; None where even the cheapest exceed the limit.

    Args:
        costs, errors: of each block's options, in any unit; a cost is at least 0.
        limit: of the costs' sum, never exceeded.
        steps: of the discretisation; exact where all costs above a block's least are multiples of
            `(limit − sum of the least) / steps`.
    """
    least = [cheapest(c, e) for c, e in zip(costs, errors, strict=True)]
    slack = limit - sum(c[i] for c, i in zip(costs, least, strict=True))
    if slack < -ROUNDING * abs(limit):
        return None
    extra = [[cost - c[i] for cost in c] for c, i in zip(costs, least, strict=True)]
    chosen = _by_programming(extra, errors, slack, steps) if slack > 0 else least
    return _filled_up(extra, errors, slack, chosen)


def _by_programming(
    extra: list[list[float]], errors: Sequence[Sequence[float]], slack: float, steps: int
) -> list[int]:
    """The best choice of costs that are rounded up to multiples of `slack / steps`."""
    best = torch.zeros(steps + 1, dtype=torch.float64)  # at most so many units: the least error
    taken: list[torch.Tensor] = []
    units = [[_rounded_up(cost * steps / slack, steps) for cost in row] for row in extra]
    for row, block_errors in zip(units, errors, strict=True):
        following = torch.full_like(best, float("inf"))
        option = torch.zeros(steps + 1, dtype=torch.int64)
        for index in sorted(range(len(row)), key=lambda i: (row[i], i)):
            if row[index] > steps:
                continue
            candidate = torch.full_like(best, float("inf"))
            candidate[row[index] :] = best[: steps + 1 - row[index]] + block_errors[index]
            better = candidate < following
            following, option = torch.where(better, candidate, following), option.masked_fill(better, index)
        best = following
        taken.append(option)
    chosen, left = [0] * len(units), steps
    for block in reversed(range(len(units))):
        chosen[block] = int(taken[block][left])
        left -= units[block][chosen[block]]
    return chosen


def _rounded_up(units: float, steps: int) -> int:
    """Up, unless floating point alone is what is above a whole number."""
    if units > steps + 1:
        return steps + 1
    nearest = round(units)
    return nearest if abs(units - nearest) <= 1e-9 * max(1, nearest) else int(-(-units // 1))


def _filled_up(
    extra: list[list[float]], errors: Sequence[Sequence[float]], slack: float, chosen: list[int]
) -> list[int]:
    """What rounding left over buys better options, the largest gain first."""
    chosen = list(chosen)
    while True:
        left = slack - sum(row[i] for row, i in zip(extra, chosen, strict=True))
        gains = [
            (errors[b][i] - errors[b][chosen[b]], b, i)
            for b, row in enumerate(extra)
            for i, cost in enumerate(row)
            if cost - row[chosen[b]] <= left + ROUNDING * abs(slack) and errors[b][i] < errors[b][chosen[b]]
        ]
        if not gains:
            return chosen
        _, block, index = min(gains)
        chosen[block] = index
