"""How many tokens calibration data hold, and how many of them a level of effort takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eugen.capture import capturing, evaluating
from eugen.compression.budgets import built
from eugen.compression.levels import Level
from eugen.config import LayerConfig
from eugen.sites import FFNSite, find_ffns
from eugen.sites.faults import SiteFault, called_by_keyword, did_not_run

LEAST_TOKENS = 2
"""Calibration tokens a feature below which a fit is useless (docs/transfer.md)."""


@torch.no_grad()
def enough(
    model: nn.Module,
    blocks: Mapping[str, LayerConfig],
    calibration: Iterable[Any],
    level: Level,
    call: Callable[[nn.Module, Any], Any],
    progress: Callable[[str], None] | None,
) -> tuple[list[Any], dict[str, Any]]:
    """As many of the batches as the level asks for, and how many tokens they give each block.

    Raises:
        ValueError: a block did not run, or has fewer than two tokens for each feature.
    """
    sites = [site for site in find_ffns(model) if site.name in blocks]
    features = {site.name: _features(site, blocks[site.name]) for site in sites}
    wanted = {name: level.tokens_for(count) for name, count in features.items()}
    taken, counts = take(model, sites, calibration, wanted, call)
    if not taken or not sites:
        return taken, {"calibration_tokens": 0, "calibration_tokens_wanted": max(wanted.values(), default=0)}
    name = min(counts, key=lambda each: counts[each] / max(wanted[each], 1))
    tokens, least = counts[name], LEAST_TOKENS * features[name]
    if tokens < least:
        if not tokens:
            raise ValueError(did_not_run(next(site for site in sites if site.name == name)))
        raise ValueError(
            f"the calibration data give block {name or '(the model itself)'} {tokens} tokens, too few for "
            f"{features[name]} features: give at least {least}, better {wanted[name]} (level {level.name})"
        )
    if progress is not None:
        short = tokens < wanted[name]
        less = f"; the level asks for {wanted[name]}, quality gains by more data" if short else ""
        progress(f"calibration: {tokens} tokens in {len(taken)} batches{less}")
    return taken, {"calibration_tokens": tokens, "calibration_tokens_wanted": wanted[name]}


def _features(site: FFNSite, config: LayerConfig) -> int:
    """Of the layer to be fitted; 0 where nothing is fitted."""
    return built([site], config)[0].num_features if config.needs_calibration else 0


def take(
    model: nn.Module,
    sites: Sequence[FFNSite],
    calibration: Iterable[Any],
    wanted: Mapping[str, int],
    call: Callable[[nn.Module, Any], Any],
) -> tuple[list[Any], dict[str, int]]:
    """The first batches that give each block the tokens wanted for it, or all; and how many they give."""
    taken: list[Any] = []
    counts = dict.fromkeys((site.name for site in sites), 0)
    for batch in calibration:
        taken.append(batch)
        for name, tokens in tokens_through(model, sites, batch, call).items():
            counts[name] += tokens
        if all(tokens >= wanted[name] for name, tokens in counts.items()):
            break
    return taken, counts


def tokens_through(
    model: nn.Module, sites: Sequence[FFNSite], batch: Any, call: Callable[[nn.Module, Any], Any]
) -> dict[str, int]:
    """How many tokens pass each block in one call, by the block's name; those of a shared block as often."""
    seen = dict.fromkeys((site.name for site in sites), 0)

    def counting(site: FFNSite) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def count(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if not args:
                raise SiteFault(called_by_keyword(site))
            seen[site.name] += args[0].shape[:-1].numel()

        return count

    with torch.no_grad(), evaluating(model), capturing(model, []):
        handles = [model.get_submodule(s.name).register_forward_pre_hook(counting(s)) for s in sites]
        try:
            call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return seen
