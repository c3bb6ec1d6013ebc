"""How many tokens calibration data hold, and how many of them a level of effort takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eugen.capture import evaluating, listening
from eugen.compression.budgets import built
from eugen.compression.levels import Level
from eugen.config import LayerConfig
from eugen.sites import FFNSite, find_ffns

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
        ValueError: fewer than two tokens for each feature of the widest layer.
    """
    sites = [site for site in find_ffns(model) if site.name in blocks]
    fitted = [built([site], blocks[site.name])[0] for site in sites if blocks[site.name].needs_calibration]
    features = max((layer.num_features for layer in fitted), default=0)
    wanted = level.tokens_for(features)
    taken, tokens = take(model, sites, calibration, wanted, call)
    if taken and tokens < LEAST_TOKENS * features:
        raise ValueError(
            f"the calibration data give {tokens} tokens, too few for {features} features: give at least "
            f"{LEAST_TOKENS * features}, better {wanted} (level {level.name})"
        )
    if progress is not None:
        less = "" if tokens >= wanted else f"; the level asks for {wanted}, quality gains by more data"
        progress(f"calibration: {tokens} tokens in {len(taken)} batches{less}")
    return taken, {"calibration_tokens": tokens, "calibration_tokens_wanted": wanted}


def take(
    model: nn.Module,
    sites: Sequence[FFNSite],
    calibration: Iterable[Any],
    wanted: int,
    call: Callable[[nn.Module, Any], Any],
) -> tuple[list[Any], int]:
    """The first batches that give each block so many tokens, or all of them; and how many they give."""
    taken: list[Any] = []
    counts = dict.fromkeys((site.name for site in sites), 0)
    for batch in calibration:
        taken.append(batch)
        for name, tokens in tokens_through(model, sites, batch, call).items():
            counts[name] += tokens
        if min(counts.values(), default=0) >= wanted:
            break
    return taken, min(counts.values(), default=0)


def tokens_through(
    model: nn.Module, sites: Sequence[FFNSite], batch: Any, call: Callable[[nn.Module, Any], Any]
) -> dict[str, int]:
    """How many tokens pass each block in one call, by the block's name."""
    seen = dict.fromkeys((site.name for site in sites), 0)

    def count(site: FFNSite, what: str, value: Tensor) -> None:
        if what == "input":
            seen[site.name] += len(value)

    with torch.no_grad(), evaluating(model), listening(model, sites, count):
        call(model, batch)
    return seen
