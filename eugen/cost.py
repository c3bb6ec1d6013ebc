"""What a layer and a model cost: parameters, multiply-accumulates, bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from eugen.ffn import FFNLayer
from eugen.parts import grouped
from eugen.sites import find_ffns


@dataclass(frozen=True)
class ModelCost:
    """Cost of a whole model for one call.

    Attributes:
        params: stored weights (parameters and buffers), shared ones once.
        macs: multiply-accumulates of all matrix products of the call, attention included.
        weight_bytes: bytes that the weights occupy, the least that one call has to read.
        ffn_params, ffn_macs: the feed-forward blocks alone; MACs for one token.
    """

    params: int
    macs: int
    weight_bytes: int
    ffn_params: int
    ffn_macs: int


def _product_flops(a: torch.Size, b: torch.Size, *_: object, **__: object) -> int:
    """Of a product, plain or grouped: each row of a two-dimensional side meets one group only."""
    return 2 * a[-2] * a[-1] * b[-1] * (a[0] if len(a) == len(b) == 3 else 1)


UNCOUNTED_BY_TORCH = {
    torch.ops.aten._int_mm: _product_flops,
    torch.ops.aten._grouped_mm: _product_flops,
    grouped.PRODUCT: _product_flops,
    grouped.OUTER_PRODUCT: lambda a, b, *_, **__: 2 * a[0] * a[1] * b[1],
}
"""Operators that torch's FLOP counter does not know, and their FLOPs (its `custom_mapping`)."""


def count_macs(function: Callable[[], Any]) -> int:
    """Multiply-accumulates of the matrix products inside a call without gradients."""
    from torch.utils.flop_counter import FlopCounterMode  # loads Triton, half a second

    # The counter does not know the CPU's fused attention; the plain one is made of products that it counts.
    counting = FlopCounterMode(display=False, custom_mapping=UNCOUNTED_BY_TORCH)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting as counter:
        function()
    return counter.get_total_flops() // 2


def model_cost(model: nn.Module, batch: Any, call: Callable[[nn.Module, Any], Any]) -> ModelCost:
    """Cost of `call(model, batch)`. Blocks are those replaced by eugen, or else the dense ones."""
    stored = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    layers = _outermost(model) or [site.dense for site in find_ffns(model)]
    return ModelCost(
        params=sum(t.numel() for t in stored),
        macs=count_macs(lambda: call(model, batch)),
        weight_bytes=sum(t.numel() * t.element_size() for t in stored),
        ffn_params=sum(layer.num_parameters() for layer in layers),
        ffn_macs=sum(layer.macs_per_token for layer in layers),
    )


def _outermost(module: nn.Module) -> list[FFNLayer]:
    """Replaced blocks; a layer inside another, such as the one that int8 holds, is part of that."""
    if isinstance(module, FFNLayer):
        return [module]
    return [layer for child in module.children() for layer in _outermost(child)]
