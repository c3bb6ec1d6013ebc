"""Low-rank factors of both matrices by truncated SVD: the EUGens paper's baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, FFNLayer, TokenStream, copy_activation, new_linear
from eugen.shapes import Float


class LowRankFFN(FFNLayer):
    """`y = U2 V2 act(U1 V1 x + b1) + b2`; for a single layer `y = act(U1 V1 x + b1)`."""

    def __init__(
        self, v1: nn.Linear, u1: nn.Linear, act: nn.Module, v2: nn.Linear | None, u2: nn.Linear | None
    ) -> None:
        super().__init__()
        self.v1, self.u1, self.act, self.v2, self.readout = v1, u1, act, v2, u2
        self.in_features, self.out_features = v1.in_features, (u2 or u1).out_features

    def hidden(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch h"]:
        """The neurons behind the first pair of factors."""
        return self.act(self.u1(self.v1(x)))

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch r"]:
        hidden = self.hidden(x)
        return hidden if self.v2 is None else self.v2(hidden)

    @property
    def macs_per_token(self) -> int:
        factors = (self.v1, self.u1, self.v2, self.readout)
        return sum(m.in_features * m.out_features for m in factors if m is not None)


@dataclass(frozen=True, kw_only=True)
class LowRankConfig(LayerConfig, name="low_rank"):
    """Truncated SVD of W1 and W2; the last factor is solved by least squares, as in every row.

    A single layer (`down=None`) has only W1: its activation stands behind the factors, and nothing is solved.

    Args:
        rank: r of both pairs of factors; None derives it from `budget`.
    """

    rank: int | None = None

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> LowRankFFN:
        self.require_ungated(dense)
        d, h, like = dense.in_features, dense.hidden_features, dense.up.weight
        out = None if dense.down is None else dense.out_features
        per_rank = d + h + (0 if out is None else h + out)
        rank = self.size_for(dense, per_rank, unit="rank", given=self.rank)

        def linear(n_in: int, n_out: int, bias: bool = True) -> nn.Linear:
            return new_linear(n_in, n_out, like=like, generator=generator, bias=bias)

        return LowRankFFN(
            v1=linear(d, min(rank, d, h), bias=False),
            u1=linear(min(rank, d, h), h),
            act=copy_activation(dense.act),
            v2=None if out is None else linear(h, min(rank, h, out), bias=False),
            u2=None if out is None else linear(min(rank, h, out), out),
        )

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> LowRankFFN:
        layer = self.build(dense, generator=generator)
        set_factors(layer.v1, layer.u1, dense.up, whitening=None)
        if dense.down is not None and layer.v2 is not None and layer.readout is not None:
            set_factors(layer.v2, layer.readout, dense.down, whitening=None)
        layer.fit_readout(data)
        return layer


@torch.no_grad()
def set_factors(v: nn.Linear, u: nn.Linear, full: nn.Linear, *, whitening: Tensor | None) -> None:
    """Best rank-r factors of `full` under the metric of `whitening`.

    Args:
        whitening: L with L Lᵀ = E[x xᵀ] `[in, in]` float64: minimises the output's error; None the weights'.
    """
    weight = full.weight.double()
    shaped = weight if whitening is None else weight @ whitening
    left, values, right = torch.linalg.svd(shaped, full_matrices=False)
    rank = v.out_features
    right = right[:rank]
    if whitening is not None:
        right = torch.linalg.solve_triangular(whitening, right, upper=False, left=False)
    root = values[:rank].sqrt()
    v.weight.copy_(root[:, None] * right)
    u.weight.copy_(left[:, :rank] * root)
    if full.bias is None:
        u.bias.zero_()
    else:
        u.bias.copy_(full.bias)
