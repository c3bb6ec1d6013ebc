"""The operator `eugen::feature_map`: EUGen's features in one launch on a GPU, in plain torch elsewhere.

A custom operator with a fake kernel and gradients: `torch.compile(fullgraph=True)` and `torch.export` keep
it as it is, and a program that holds it runs wherever `eugen` is imported. `choice` says whether a layer
calls it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
from typing import Any

import torch
from torch import Tensor

from eugen.kernels.feature_map import naive
from eugen.kernels.feature_map.backward import feature_map_gradients

KERNELS = ("auto", "composed", "fused")
LEAST_TOKENS = 4096
"""With fewer, `auto` composes: the passes over z are then short beside a launch from Python (an estimate)."""
MOST_GROUPS = 6
"""Each is an accumulator of its own in registers; order 3 with independent rows has so many."""
_HALVES = (torch.bfloat16, torch.float16)
_log = logging.getLogger("eugen")


@torch.library.custom_op("eugen::feature_map", mutates_args=())
def feature_map(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    order: int,
    lowest: int,
    sharing: str,
    activation: str,
) -> Tensor:
    """f(x) `[t, orders·m]`, as `naive.feature_map` defines it."""
    arguments = (x, weight, bias, norm, order, lowest, sharing, activation)
    if lack(x.device, x.dtype) is not None:
        return naive.feature_map(*arguments)
    from eugen.kernels.feature_map import fused  # loads Triton

    return fused.feature_map(*arguments)


@feature_map.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    order: int,
    lowest: int,
    sharing: str,
    activation: str,
) -> Tensor:
    chains = naive.chains(order, lowest, sharing)
    groups = 1 + max(max(chain) for chain in chains)
    return x.new_empty(x.shape[0], len(chains) * (weight.shape[0] // groups))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.form = inputs[4:]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:4]
    found = feature_map_gradients(gradient, *ctx.saved_tensors, *ctx.form, needed=needed)
    return *found, None, None, None, None


feature_map.register_autograd(_backward, setup_context=_keep)
OPERATOR = torch.ops.eugen.feature_map
"""As it appears to what watches operators, `eugen.cost` for one."""


def choice(kernel: str, weight: Tensor, *, groups: int, activation: str, gated: bool) -> bool:
    """Whether a layer with these weights calls the operator; a reason against it is logged once.

    Args:
        kernel: one of `KERNELS`. `fused` calls the operator for every layer of a form that it has, where it
            composes too; `auto` only where it runs the kernel, in half precision: float32 is the vendor's.
            Neither does under autocast, which casts an operator's inputs only where torch knows it.
        gated: whether features are multiplied by a learned gate.
    """
    if kernel == "composed":
        return False
    form = None
    if gated or activation not in naive.ACTIVATIONS:
        form = "it has no norm gate and no activation with weights or centres of its own"
    elif groups > MOST_GROUPS:
        form = f"{groups} groups of projections need too many registers, {MOST_GROUPS} is the most"
    missing = form or lack(weight.device, weight.dtype)
    if missing is None and kernel == "auto" and weight.dtype not in _HALVES:
        missing = f"kernel='auto' takes it in half precision only, and the weights are {weight.dtype}"
    if missing is not None:
        _say(missing)
    return missing is None or (kernel == "fused" and form is None)


@functools.cache
def lack(device: torch.device, dtype: torch.dtype) -> str | None:
    """What this machine or these numbers lack for the kernel, in words; None where the kernel runs."""
    if dtype not in (torch.float32, *_HALVES):
        return f"it has no {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return f"the weights are on {device.type}, not on an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability} is below (8, 0)"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return None if compiler else "Triton builds its launcher with a C compiler: install gcc, or set CC"


@functools.cache
def _say(reason: str) -> None:
    _log.info("features are composed of torch operators instead of the fused kernel: %s", reason)
