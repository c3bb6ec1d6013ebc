"""A network as it is deployed: its blocks merged, its weights in one of the profiled precisions."""

from __future__ import annotations

from operator import methodcaller
from typing import Literal

import torch
from torch import nn

import eugen
from eugen.parts.int8_linear import quantise
from eugen.timing.subjects import moved

Precision = Literal["float32", "bfloat16", "float16", "int8", "int8_weight_only"]
"""int8: every `nn.Linear` multiplies bytes, its inputs quantised per token as they come; int8_weight_only:
weights are bytes, products float32's. What stands between linear maps stays float32."""

INT8 = {"int8": eugen.Int8Config(), "int8_weight_only": eugen.Int8Config(weight_only=True)}


def deployed(model: nn.Module, precision: Precision, device: str) -> nn.Module:
    """A merged copy of the network on the device, in this precision.

    Args:
        model: the dense network, or one whose blocks were replaced.

    Raises:
        eugen.UnsuitableBlock: a block whose products cannot be quantised.
    """
    merged = eugen.map_layers(model.eval(), methodcaller("merged")).to(device)
    if precision in INT8:
        blocks = eugen.map_layers(merged, INT8[precision].wrap)
        quantise(blocks, INT8[precision].kind)  # and all else: attention, embeddings' projections, heads
        return blocks.eval()
    return merged.to(getattr(torch, precision))


def floating(precision: Precision) -> torch.dtype:
    """The dtype of the network's inputs and of all that is not quantised."""
    return torch.float32 if precision in INT8 else getattr(torch, precision)


def between_float32(model: nn.Module, precision: Precision) -> nn.Module:
    """The network itself, which from now on takes float32 inputs and returns float32: what `evaluate` gives
    and expects.
    """
    lower = floating(precision)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: moved((args, kwargs), None, lower), with_kwargs=True
    )
    model.register_forward_hook(lambda _, args, outputs: moved(outputs, None, torch.float32))
    return model
