"""`compress`: a model and a target go in, the cheaper model and what it costs come out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from eugen.compression.budgets import budget_for_parameters, budget_for_speed, built
from eugen.compression.distill import distill
from eugen.compression.levels import LEVELS, Level
from eugen.compression.tokens import enough, take
from eugen.config import LayerConfig
from eugen.ffn import FFNLayer
from eugen.least_squares import HELD_OUT
from eugen.plan import Plan
from eugen.search.block import FITTED_TOKENS
from eugen.search.target import Target
from eugen.sites import find_ffns
from eugen.sites.faults import nothing_found
from eugen.surgery import FittedBlock, ReplacedSite, replace
from eugen.transfer import default_call

Call = Callable[[nn.Module, Any], Any]
Progress = Callable[[str], None]

SEARCH_TOKENS, MOST_SEARCH_TOKENS = 25, FITTED_TOKENS * HELD_OUT // (HELD_OUT - 1)
"""Calibration tokens for each neuron of a block that the choice reads; what it fits and holds out at most."""
HELD_BACK = 8
"""Every eighth batch is for choosing where distillation is given no other data."""


@dataclass(frozen=True)
class Compressed:
    """A compressed model.

    Attributes:
        plan: the configuration of each block, with the figures of the layers that it became.
        sites: what was replaced.
        measured: seconds of each part of the work, calibration tokens, and what distillation brought.
    """

    model: nn.Module
    plan: Plan
    sites: list[ReplacedSite]
    measured: dict[str, Any] = field(default_factory=dict)


def compress(
    model: nn.Module,
    calibration: Sequence[Any],
    *,
    target: Target,
    row: LayerConfig | None = None,
    level: str | Level = "standard",
    call: Call | None = None,
    example: Any = None,
    validation: Sequence[Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    finished: MutableMapping[str, FittedBlock] | None = None,
) -> Compressed:
    """The model at this target: `plan_for`, then `carry_out`. The model given stays as it was.

    Args:
        calibration: batches of model inputs; the level says how many of them are read.
        row: one method at the same budget everywhere; None chooses for each block (`eugen.search`).
        level: how much effort, a name of `eugen.LEVELS` or a level of your own.
        call: how a batch goes into the model; `model(batch)` by default.
        example: the batch that latency is measured on; the first one by default.
        validation: batches that only choose, where the level distils; by default every eighth of
            `calibration`, which is then not trained on.
        progress: called with a line now and then.
        finished: see `eugen.replace`.

    Raises:
        ValueError: as `eugen.replace`; an unknown level; fewer than two calibration tokens a feature.
        eugen.search.Unreachable: no plan reaches the target.
    """
    chosen = level_of(level)
    plan = plan_for(
        model,
        calibration,
        target=target,
        row=row,
        level=chosen,
        call=call,
        example=example,
        seed=seed,
        progress=progress,
    )
    return carry_out(
        model,
        calibration,
        plan,
        level=chosen,
        call=call,
        validation=validation,
        seed=seed,
        progress=progress,
        finished=finished,
    )


def level_of(level: str | Level) -> Level:
    """The level of this name.

    Raises:
        ValueError: there is none.
    """
    if isinstance(level, Level):
        return level
    if level not in LEVELS:
        raise ValueError(f"level={level!r} is unknown: use one of {', '.join(LEVELS)}")
    return LEVELS[level]


def plan_for(
    model: nn.Module,
    calibration: Sequence[Any],
    *,
    target: Target,
    row: LayerConfig | None = None,
    level: str | Level = "standard",
    call: Call | None = None,
    example: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Plan:
    """Which layer takes each block's place; see `compress`."""
    if not len(calibration):
        raise ValueError("the calibration data are empty: give at least one batch of model inputs")
    example = calibration[0] if example is None else example
    sites = find_ffns(model)
    if not sites:
        raise ValueError(nothing_found(model))
    if row is None:
        from eugen.search import choose

        wanted = {s.name: min(SEARCH_TOKENS * s.dense.hidden_features, MOST_SEARCH_TOKENS) for s in sites}
        taken, _ = take(model, sites, calibration, wanted, call or default_call)
        options = {"call": call, "example": example, "seed": seed, "progress": progress}
        return choose(model, taken, target=target, refine_steps=level_of(level).refine_steps, **options)
    if target.macs is not None:
        budget = target.macs
    elif target.parameters is not None:
        budget = budget_for_parameters(sites, row, target)
    else:
        budget = budget_for_speed(model, sites, row, target, example, call or default_call, progress)
    config = dataclasses.replace(row, budget=budget)
    built(sites, config)  # a budget that is too small is refused before any work
    wanted = {name: value for name, value in dataclasses.asdict(target).items() if value is not None}
    return Plan({site.name: config for site in sites}, {"target": wanted, "row": row.name})


def carry_out(
    model: nn.Module,
    calibration: Sequence[Any],
    plan: Plan,
    *,
    level: str | Level = "standard",
    call: Call | None = None,
    validation: Sequence[Any] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    finished: MutableMapping[str, FittedBlock] | None = None,
) -> Compressed:
    """Fit the plan's layers with the effort of the level; see `compress`."""
    level, call = level_of(level), call or default_call
    train = calibration
    if level.distill_steps and validation is None:
        train, validation = _held_back(calibration)
    batches, measured = enough(model, plan.blocks, train, level, call, progress)
    start, before = time.perf_counter(), len(finished or ())
    done = replace(
        model,
        plan.blocks,
        calibration=batches,
        call=call,
        refine_steps=level.refine_steps,
        seed=seed,
        progress=progress,
        finished=finished,
    )
    measured["transfer_seconds"] = time.perf_counter() - start
    measured["blocks_finished_before"] = before
    measured["fit_r2"] = {site.name: site.fit_r2 for site in done.sites}
    student = done.model
    if level.distill_steps:
        assert validation is not None
        start = time.perf_counter()
        steps, options = level.distill_steps, {"call": call, "seed": seed, "progress": progress}
        found = distill(student, model, train, validation=validation, steps=steps, **options)
        student = found.model
        measured["distillation"] = {
            "seconds": time.perf_counter() - start,
            "learning_rate": found.learning_rate,
            "validation_loss_before": found.before,
            "validation_loss_after": found.after,
        }
    # Distillation works on a copy: the layers are those of the model that is given back.
    sites = [dataclasses.replace(site, layer=_layer(student, site.name)) for site in done.sites]
    return Compressed(student, Plan(plan.blocks, {**plan.figures, **figures(model, sites)}), sites, measured)


def figures(model: nn.Module, sites: Sequence[ReplacedSite]) -> dict[str, Any]:
    """Cost of the feed-forward blocks, the dense model's beside it: MACs for one token, stored weights.

    Blocks that stay dense count on both sides, and in `replaced_macs_per_token` on neither.
    """
    layers: Mapping[str, FFNLayer] = {site.name: site.layer for site in sites}
    dense = find_ffns(model)
    macs = sum(site.dense.macs_per_token for site in dense)
    params = sum(site.dense.num_parameters() for site in dense)
    ours = [layers.get(site.name, site.dense) for site in dense]
    return {
        "replaced_macs_per_token": sum(layer.macs_per_token for layer in layers.values()),
        "ffn_macs_per_token": sum(layer.macs_per_token for layer in ours),
        "ffn_macs_per_token_dense": macs,
        "ffn_parameters": sum(layer.num_parameters() for layer in ours),
        "ffn_parameters_dense": params,
        "macs_per_token_ratio": sum(layer.macs_per_token for layer in ours) / macs,
        "parameters_ratio": sum(layer.num_parameters() for layer in ours) / params,
    }


def _held_back(calibration: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """What is trained on, and every eighth batch, which chooses.

    Raises:
        ValueError: there is one batch alone.
    """
    if len(calibration) < 2:
        raise ValueError("this level distils and needs data to choose by: give two batches, or validation=")
    every = min(HELD_BACK, len(calibration))
    chosen = [batch for index, batch in enumerate(calibration) if index % every == every - 1]
    return [batch for index, batch in enumerate(calibration) if index % every != every - 1], chosen


def _layer(model: nn.Module, name: str) -> FFNLayer:
    layer = model.get_submodule(name)
    assert isinstance(layer, FFNLayer)
    return layer
