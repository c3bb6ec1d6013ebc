"""Choice of method and size for each block, for a target of MACs, parameters or measured latency."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from eugen.config import LayerConfig, UnsuitableBlock
from eugen.layers.dense import DenseConfig
from eugen.plan import Plan
from eugen.search.choice import cheapest, choose_options
from eugen.search.figure import plan_svg, shares
from eugen.search.latency import DENSE, Measure, Pace, interleaved, measure_plan
from eugen.search.record import Chosen, figures
from eugen.search.sensitivity import Option, Sensitivity
from eugen.search.speed import Reached, for_speedup
from eugen.search.target import Target, Unreachable
from eugen.sites import FFNSite
from eugen.sites.faults import check_weights
from eugen.surgery import blocks_of
from eugen.transfer import default_call

__all__ = ["Target", "Unreachable", "choose", "plan_svg", "shares", "speed_of"]


def choose(
    model: nn.Module,
    calibration: Sequence[Any],
    *,
    target: Target,
    call: Callable[[nn.Module, Any], Any] | None = None,
    example: Any = None,
    candidates: Sequence[LayerConfig] | None = None,
    where: Callable[[FFNSite], bool] | None = None,
    refine_steps: int = 0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    measure: Measure = interleaved,
    like: LayerConfig | None = None,
) -> Plan:
    """The plan of least expected change of the model's output that keeps the target.

    Every option of every block is judged alone in the otherwise dense network, and changes are taken to add
    up. The model is left as it was.

    Args:
        calibration: batches of model inputs. One in eight judges and is not fitted to; a single batch is cut.
        call: how a batch goes into the model; `model(batch)` by default.
        example: the batch that latency is measured on; the first calibration batch by default.
        candidates: configurations without a budget, which the search gives sizes to; None for the default
            ones. A block may always stay dense.
        where: which blocks; all by default.
        refine_steps: of the transfer that follows; methods are judged by what refinement leaves of their
            errors.
        seed: for layers with random parts.
        progress: called with one line after each block.
        measure: the clock for `target.speedup`.
        like: a layer that reaches `target.speedup` if it stands everywhere. Plans are then timed beside it
            and not beside the dense model, and are as fast as it is, whatever the clock said of it before.

    Returns:
        Plan: blocks that stay dense are not named, unless all do. `figures` has the target, what is
            predicted, each block's choice with its alternatives, seconds and forward passes.

    Raises:
        ValueError: no block was found, or the calibration data do not serve.
        UnsuitableBlock: none takes a candidate.
        Unreachable: no plan keeps the target.
    """
    sites, call = blocks_of(model, where), call or default_call
    check_weights(model, sites, fitted=True, refined=refine_steps > 0)
    seconds: dict[str, float] = {}
    with _timed(seconds, "capture"):
        study = Sensitivity(
            model, sites, calibration, call, given=candidates, refine_steps=refine_steps, seed=seed
        )
    with _timed(seconds, "first block"):
        _look(study, sites[len(sites) // 2], progress)
    with _timed(seconds, "sensitivity"):
        options = {site.name: _options(study, site, sites, progress) for site in sites}
    if all(len(own) == 1 for own in options.values()):
        blocks = ", ".join(options)
        raise UnsuitableBlock(f"no candidate takes a block of this model: {blocks} would stay dense")
    weights = study.token_weights
    with _timed(seconds, "choice"):
        if target.speedup is None:
            reached = Reached(_for_fraction(target, sites, options, weights), None, {})
        else:
            batch = next(iter(calibration)) if example is None else example
            pace = DENSE if like is None else Pace({site.name: like for site in sites}, target.speedup)
            reached = for_speedup(target, model, sites, options, batch, call, measure, pace, progress)
    found = [Chosen(site, options[site.name], i) for site, i in zip(sites, reached.chosen, strict=True)]
    record = figures(target, found, weights, reached.predicted) | reached.figures
    record |= {"seconds": seconds, "forward_passes": study.passes}
    configs = {each.site.name: each.option.sized.config for each in found}
    replaced = {name: c for name, c in configs.items() if not isinstance(c, DenseConfig)}
    return Plan(replaced or configs, record)


def speed_of(
    model: nn.Module,
    config: LayerConfig,
    example: Any,
    call: Callable[[nn.Module, Any], Any] | None = None,
    *,
    where: Callable[[FFNSite], bool] | None = None,
    measure: Measure = interleaved,
) -> float:
    """How many times as fast the model is with one layer everywhere, both timed side by side here and now."""
    plan = {site.name: config for site in blocks_of(model, where)}
    return measure_plan(model, plan, example, call or default_call, measure)


def _look(study: Sensitivity, site: FFNSite, progress: Callable[[str], None] | None) -> None:
    study.look(site)
    if progress is not None:
        left_out = ", ".join(sorted(study.left_out)) or "nothing"
        progress(f"all methods tried on block {site.name}; left out elsewhere: {left_out}")


def _options(
    study: Sensitivity, site: FFNSite, sites: list[FFNSite], progress: Callable[[str], None] | None
) -> list[Option]:
    start = time.perf_counter()
    found = study.options(site)
    if progress is not None:
        progress(
            f"block {site.index + 1}/{len(sites)} {site.name}: {len(found)} options in "
            f"{time.perf_counter() - start:.1f} s"
        )
    return found


def _for_fraction(
    target: Target, sites: list[FFNSite], options: dict[str, list[Option]], weights: dict[str, float]
) -> list[int]:
    """Each block's option for a fraction of the dense blocks' MACs or parameters."""
    costs = []
    for site in sites:
        own = [each.sized for each in options[site.name]]
        weight = weights[site.name]
        costs.append([o.macs * weight if target.macs is not None else float(o.parameters) for o in own])
    errors = [[each.output_effect for each in options[site.name]] for site in sites]
    whole = sum(row[-1] for row in costs)
    chosen = choose_options(costs, errors, target.value * whole)
    if chosen is None:
        least = sum(row[cheapest(row, e)] for row, e in zip(costs, errors, strict=True))
        raise Unreachable(target, least / whole, "give other candidates, or a larger fraction")
    return chosen


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start
