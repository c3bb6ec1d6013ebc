"""One linear map in place of the block (TOAST, arXiv 2410.04941)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, FFNLayer, new_linear
from eugen.shapes import Float


class LinearLayer(FFNLayer):
    """`y = A x + c`."""

    def __init__(self, readout: nn.Linear) -> None:
        super().__init__()
        self.readout = readout
        self.in_features, self.out_features = readout.in_features, readout.out_features

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        return x

    @property
    def macs_per_token(self) -> int:
        return self.in_features * self.out_features


@dataclass(frozen=True, kw_only=True)
class LinearConfig(LayerConfig, name="linear"):
    """The least-squares map d→d. It has one size, d², and ignores what the budget leaves over."""

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> LinearLayer:
        if self.budget is not None:
            self.size_for(dense, dense.in_features * dense.out_features, unit="budget")
        return LinearLayer(
            new_linear(dense.in_features, dense.out_features, like=dense.up.weight, generator=generator)
        )
