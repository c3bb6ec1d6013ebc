"""Layers in every form of the feature map, on tensors with and without numbers, and what they call."""

from __future__ import annotations

import itertools

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from eugen import EUGenConfig
from eugen.features import SHARING
from eugen.layers.eugen import EUGen
from tests.eugen.blocks import block, generator

FORMS = [
    {"order": order, "min_order": lowest, "sharing": sharing, "direct_linear": direct}
    for order, lowest, sharing, direct in itertools.product((1, 2, 3), (1, 2, 3), SHARING, (False, True))
    if lowest <= order and not (direct and order == 1)
]
OPERATOR = torch.ops.eugen.feature_map.default


def built(*, d: int = 10, dtype: torch.dtype = torch.float32, **options) -> EUGen:
    config = EUGenConfig(**{"num_features": 7, **options})
    return config.build(block(d, 24, dtype=dtype), generator=generator()).eval()


class Calls(TorchDispatchMode):
    """Which operators run, and between which devices they move numbers."""

    def __enter__(self):
        self.operators, self.devices = [], set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        result = func(*args, **(kwargs or {}))
        held = [t for t in (*args, result) if isinstance(t, torch.Tensor)]
        self.devices |= {t.device.type for t in held}
        return result


def on_gpu(layer: EUGen, dtype: torch.dtype) -> EUGen:
    """The layer with such tensors in the place of its own, which torch's `to` cannot make."""
    for module in layer.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    held[name] = torch.empty(value.shape, device="cuda", dtype=dtype)
    layer.map.fused = layer.map._choice()
    return layer
