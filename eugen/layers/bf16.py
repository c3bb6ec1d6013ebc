"""Another row in bfloat16: half the bytes, and half-precision products where the device has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eugen.config import LayerConfig
from eugen.ffn import FFNLayer
from eugen.layers.dense import DenseConfig
from eugen.parts.wrapper import WrappedFFN, WrapperConfig
from eugen.shapes import Float


class Bf16FFN(WrappedFFN):
    """A layer with weights and arithmetic of its own dtype between inputs and outputs of any other.

    In an ONNX graph, whose runtimes have no such products on the CPU, the rounded weights are stored as
    they are and multiplied in the inputs' dtype.
    """

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.inner.reference(self._lower(x)).to(x.dtype)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        if torch.onnx.is_in_onnx_export():
            floats = {name: t.to(x.dtype) for name, t in self._state() if t.is_floating_point()}
            return torch.func.functional_call(self.inner, floats, x)
        return self.inner(self._lower(x)).to(x.dtype)

    def _lower(self, x: Tensor) -> Tensor:
        # The weights' dtype, not bfloat16 by name: `.double()` of a model reaches them too.
        dtype = next(t.dtype for _, t in self._state() if t.is_floating_point())
        return x.to(dtype, memory_format=torch.contiguous_format)

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.inner.named_parameters()
        yield from self.inner.named_buffers()

    @property
    def precision(self) -> torch.dtype:
        return self.inner.precision

    def merged(self) -> Bf16FFN:
        merged = self.inner.merged()
        return self if merged is self.inner else Bf16FFN(merged)


@dataclass(frozen=True, kw_only=True)
class Bf16Config(WrapperConfig, name="bf16"):
    """The inner row's weights rounded to bfloat16; inputs are cast to it and outputs back."""

    of: LayerConfig = field(default_factory=DenseConfig)

    def wrap(self, layer: FFNLayer) -> Bf16FFN:
        return Bf16FFN(copy.deepcopy(layer).bfloat16())
