"""Scalable Neural Network Kernels with ReLU features (ICLR 2024, openreview 4iPw1klFWa)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen.features import Rows, draw_projection, input_rms
from eugen.ffn import DenseFFN, FFNLayer, LayerConfig, TokenStream, new_linear
from eugen.shapes import Float


class ReluSNNK(FFNLayer):
    """`y = A relu(G [x ; 1]) / √m + c`."""

    def __init__(self, projection: nn.Linear, readout: nn.Linear) -> None:
        super().__init__()
        self.projection, self.readout = projection, readout
        self.in_features, self.out_features = projection.in_features, readout.out_features

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch m"]:
        return F.relu(self.projection(x)) * (1 / math.sqrt(self.projection.out_features))

    @property
    def macs_per_token(self) -> int:
        return self.projection.out_features * (self.in_features + self.out_features)

    @torch.no_grad()
    def set_projection(self, rows: Rows) -> None:
        """Copy drawn rows in; the SNNK has no norm slot."""
        self.projection.weight.copy_(rows.weight)
        self.projection.bias.copy_(rows.bias)


@dataclass(frozen=True, kw_only=True)
class SNNKConfig(LayerConfig, name="snnk"):
    """ReLU-SNNK of the whole block, its output matrix folded in.

    Args:
        num_features: m; None derives it from `budget`.
        projection: `gaussian`, `rademacher` or `orthogonal`.
    """

    num_features: int | None = None
    projection: str = "gaussian"

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> ReluSNNK:
        return self._build(dense, math.sqrt(dense.in_features), generator)

    def _build(self, dense: DenseFFN, rms: float, generator: torch.Generator) -> ReluSNNK:
        d, out, like = dense.in_features, dense.out_features, dense.up.weight
        m = self.size_for(dense, d + out, unit="num_features", given=self.num_features)
        layer = ReluSNNK(
            new_linear(d, m, like=like, generator=generator),
            new_linear(m, out, like=like, generator=generator),
        )
        layer.set_projection(draw_projection(self.projection, 1, m, d, input_rms=rms, generator=generator))
        return layer

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> ReluSNNK:
        layer = self._build(dense, input_rms(data), generator)
        layer.fit_readout(data)
        return layer
