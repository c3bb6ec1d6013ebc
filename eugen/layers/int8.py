"""Another row in 8-bit integers: what a practitioner tries first, here of the dense block or of any row."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch

from eugen.config import LayerConfig, UnsuitableBlock
from eugen.ffn import FFNLayer
from eugen.layers.dense import DenseConfig
from eugen.parts.int8_linear import Int8Linear, WeightOnlyInt8Linear, quantise
from eugen.parts.wrapper import WrappedFFN, WrapperConfig


class Int8FFN(WrappedFFN):
    """A layer whose `nn.Linear` maps hold or multiply bytes (`eugen.parts.int8_linear`); all else stays.

    It counts as merged: the product of two quantised maps would be quantised anew, another function.
    """

    @property
    def precision(self) -> torch.dtype:
        # Weight-only, the definition already has the rounded weights, and multiplies floats.
        multiplies_bytes = any(isinstance(module, Int8Linear) for module in self.modules())
        return torch.int8 if multiplies_bytes else self.inner.precision


@dataclass(frozen=True, kw_only=True)
class Int8Config(WrapperConfig, name="int8"):
    """Weights as bytes per output row, inputs quantised per token as they come: nothing is calibrated.

    The products cost as many MACs as the inner row's; a MAC of bytes is cheaper where the device has them.

    Args:
        of: the row to quantise; all of its products must be those of `nn.Linear` maps.
        weight_only: leave inputs and products in the model's own precision. The weights take a quarter of
            float32's memory, half of bfloat16's; time is gained where reading them takes it, in bfloat16 at
            up to 8 tokens on a CPU.
    """

    of: LayerConfig = field(default_factory=DenseConfig)
    weight_only: bool = False

    @property
    def kind(self) -> type[WeightOnlyInt8Linear]:
        """What stands in the place of each `nn.Linear`."""
        return WeightOnlyInt8Linear if self.weight_only else Int8Linear

    def wrap(self, layer: FFNLayer) -> Int8FFN:
        inner = copy.deepcopy(layer)
        if quantise(inner, self.kind) != layer.macs_per_token:
            raise UnsuitableBlock(
                f"of={self.of.name!r} has products other than those of nn.Linear maps, which cannot be "
                "quantised; use 'bf16' for it"
            )
        return Int8FFN(inner)
