"""The budget at which one method, the same everywhere, meets a target."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from eugen.capture import evaluating
from eugen.config import BudgetTooSmall, LayerConfig, UnsuitableBlock
from eugen.ffn import FFNLayer
from eugen.search.target import Target, Unreachable
from eugen.sites import FFNSite
from eugen.surgery import replace

SPEED_STEPS, SPEED_PLACEMENTS, SPEED_PAIRS, SPEED_SECONDS = 5, 4, 6, 4.0
"""Halvings of the interval of budgets, and the effort of each measurement."""


def built(sites: Sequence[FFNSite], config: LayerConfig) -> list[FFNLayer]:
    """Untrained layers without memory, one for each block."""
    return [config.build(copy.deepcopy(site.dense).to("meta"), generator=torch.Generator()) for site in sites]


def _least_budget(sites: Sequence[FFNSite], row: LayerConfig) -> float:
    """The smallest budget, in thousandths, that buys something in every block.

    Raises:
        ValueError: the row names its size itself, or its least layer costs more than a block.
    """
    budget = 0.001
    while True:
        try:
            built(sites, dataclasses.replace(row, budget=budget))
        except BudgetTooSmall as error:
            least = max(error.least, budget + 0.001)
            if least > 1:
                raise ValueError(
                    f"the least layer of {row.name!r} costs {error.least:g} times a block: take another row"
                ) from None
            budget = least
        except UnsuitableBlock:
            raise
        except ValueError as error:
            raise ValueError(
                f"{error}; a target of parameters or speed decides the size, so leave it out of {row}"
            ) from None
        else:
            return budget


def budget_for_parameters(sites: Sequence[FFNSite], row: LayerConfig, target: Target) -> float:
    """The largest budget, in thousandths, whose layers store at most this fraction of the weights.

    Raises:
        eugen.search.Unreachable: not even the smallest layers do.
    """
    dense, wanted = sum(site.dense.num_parameters() for site in sites), target.value

    def ratio(budget: float) -> float:
        layers = built(sites, dataclasses.replace(row, budget=budget))
        return sum(layer.num_parameters() for layer in layers) / dense

    low, high = round(1000 * _least_budget(sites, row)), 1000
    if ratio(low / 1000) > wanted:
        raise Unreachable(
            target, ratio(low / 1000), f"those are the smallest layers of {row.name!r}: take another row"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if ratio(middle / 1000) <= wanted else (low, middle - 1)
    return low / 1000


def budget_for_speed(
    model: nn.Module,
    sites: Sequence[FFNSite],
    row: LayerConfig,
    target: Target,
    example: Any,
    call: Callable[[nn.Module, Any], Any],
    progress: Callable[[str], None] | None,
) -> float:
    """The largest of a few budgets whose untrained network measured this much faster than the dense one.

    Raises:
        eugen.search.Unreachable: not even the smallest layers do.
    """

    def speedup(budget: float) -> float:
        from eugen.timing import Clock, compare_models, placed

        student = replace(model, dataclasses.replace(row, budget=budget)).model.eval()
        with evaluating(model):
            found, low, high = compare_models(
                placed(model, example, call),
                placed(student, example, call),
                placements=SPEED_PLACEMENTS,
                pairs=SPEED_PAIRS,
                max_seconds=SPEED_SECONDS,
                clock=Clock(str(sites[0].dense.up.weight.device)),
            ).speedup()
        if progress is not None:
            progress(f"budget {budget:.3f}: {found:.2f}× (95 % {low:.2f}–{high:.2f})")
        return found

    low, high = _least_budget(sites, row), 1.0
    best = speedup(low)
    if best < target.value:
        raise Unreachable(
            target,
            best,
            f"measured with the smallest layers of {row.name!r}, budget {low:g}: take another row",
        )
    for _ in range(SPEED_STEPS):
        middle = round((low + high) / 2, 3)
        low, high = (middle, high) if speedup(middle) >= target.value else (low, middle)
    return low
