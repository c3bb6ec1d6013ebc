"""EUGen: products of random projections of the input and its norm (arXiv 2410.09771, 2601.22563).

φ_i(x) = G_1^i x⁺ ⊙ … ⊙ G_i^i x⁺,   x⁺ = [x ; 1 ; ‖x‖],   y = A Φ(concat_i φ_i(x)) + c
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen.config import LayerConfig
from eugen.features import (
    ACTIVATIONS,
    FIXED_ACTIVATIONS,
    PROJECTIONS,
    SHARING,
    Rows,
    draw_projection,
    input_rms,
    neurons_per_feature,
    projection_groups,
    rbf_rows,
    teacher_factors,
    teacher_projection,
)
from eugen.ffn import DenseFFN, FFNLayer, TokenStream, linear_of_parts, new_linear
from eugen.kernels.feature_map import KERNELS
from eugen.parts.estimator import readout_from_weights
from eugen.parts.feature_map import FeatureMap, given_linear
from eugen.shapes import Float


class EUGen(FFNLayer):
    """The layer: a feature map, the readout A, and the block's own output matrix where it is not merged.

    Args:
        rows: the stacked projections; their number is a multiple of the features per order.
        readout: `[out, d if direct_linear + features]`; its first d columns act on x itself.
        input_rms: the inputs' typical ‖x‖.
    """

    readout: nn.Linear
    polynomial_error: float | None = None
    """Relative RMS error of the polynomial behind a readout computed from weights; it is not stored."""

    def __init__(
        self,
        config: EUGenConfig,
        rows: Rows,
        readout: nn.Linear,
        down: nn.Linear | None,
        *,
        input_rms: float = 1.0,
    ) -> None:
        super().__init__()
        self.config, self.in_features = config, rows.weight.shape[1]
        self.out_features = readout.out_features if down is None else down.out_features
        self.map = FeatureMap(config, rows, like=readout.weight, input_rms=input_rms)
        self.readout, self.down = readout, down

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch f"]:
        joined = torch.cat(self.map(x.reshape(-1, self.in_features)), dim=-1)
        return joined.reshape(*x.shape[:-1], joined.shape[-1])

    def reference(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        y = self.readout(self.features(x))
        return y if self.down is None else self.down(y)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        # In 2-D and part by part: 3-D inputs and `cat` would cost a copy of the features.
        y = linear_of_parts(self.readout, self.map(x.reshape(-1, self.in_features)))
        y = y if self.down is None else self.down(y)
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def macs_per_token(self) -> int:
        products = [self.map.projection, self.readout, *([] if self.down is None else [self.down])]
        return sum(product.in_features * product.out_features for product in products)

    def merged(self) -> EUGen:
        """The same function as one layer: A becomes W2 A, c becomes W2 c + b2 (exact up to rounding)."""
        if self.down is None:
            return self
        down, readout = self.down.weight.detach().double(), self.readout
        bias = down @ readout.bias.detach().double()
        bias = bias if self.down.bias is None else bias + self.down.bias.detach().double()
        merged = copy.deepcopy(self)
        merged.down = None
        merged.readout = given_linear(down @ readout.weight.detach().double(), bias, like=readout.weight)
        return merged

    @torch.no_grad()
    def set_readout(self, weight: Float[Tensor, "d_out f"], bias: Float[Tensor, " d_out"]) -> None:
        """Set A and c so that the layer's output is `weight f(x) + bias`.

        Not merged, W2 stays as it is and A = W2⁺·weight, the smallest A with W2 A = weight.
        """
        if self.down is not None:
            down = self.down.weight
            # Singular values below the stored dtype's rounding are 0: their inverse would be noise.
            tolerance = min(1e-3, torch.finfo(down.dtype).eps * max(down.shape))
            inverse = torch.linalg.pinv(down.double(), rtol=tolerance)
            bias = bias if self.down.bias is None else bias - self.down.bias.double()
            weight, bias = inverse @ weight, inverse @ bias
        super().set_readout(weight, bias)


@dataclass(frozen=True, kw_only=True)
class EUGenConfig(LayerConfig, name="eugen"):
    """EUGen of a whole block (merged) or of its `Linear + act` only.

    Args:
        num_features: m, features per order; None derives it from `budget`.
        order: k, the highest order.
        min_order: the lowest order of product features, 1 unless low orders are left out.
        projection: rows of G: `gaussian`, `rademacher`, `orthogonal` (rows of length √d), `orthogonal_chi`
            (of a Gaussian row's length), `teacher` (the dense layer's strongest rows, of a gated block gate
            and up rows in turn; untrained layers get orthogonal ones) or `learned` (Gaussian start).
        sharing: `independent` rows per factor, `shared` between orders, or `powers` of one projection.
        direct_linear: order 1 as a linear map of x itself instead of features.
        bias_slot, norm_slot: whether G acts on the constant and on ‖x‖.
        norm_gate: multiply each feature by a learned `1 + g (‖x‖/rms − 1)`, g = 0 at the start.
        activation: Φ, element-wise on the features; `univariate` is learned per feature, `rbf` needs order 1.
        trainable: whether training and refinement may change G.
        merge: fold the block's output matrix into A; False keeps it and replaces `Linear + act`.
        from_weights: A = g(W) by theorem 3.1, unbiased over the draw of G where the activation is a
            polynomial of degree `order` or less; another one is replaced by its least-squares polynomial.
        weight_activation: Ψ of the weights' features. With Φ or Ψ other than the identity, A = Ψ(φ(W))/m
            gives a random-feature kernel (SNNK), whatever the block's activation.
        kernel: `fused` computes the features with the operator `eugen::feature_map`, `composed` with torch's
            own, `auto` with the first in inference on a GPU, in half precision, on many tokens. Chosen anew
            whenever the layer is moved or cast.

    Raises:
        ValueError: an unknown option, or options that contradict each other.
    """

    num_features: int | None = None
    order: int = 2
    min_order: int = 1
    projection: str = "orthogonal"
    sharing: str = "independent"
    direct_linear: bool = False
    bias_slot: bool = True
    norm_slot: bool = True
    activation: str = "identity"
    trainable: bool = True
    merge: bool = True
    norm_gate: bool = False
    from_weights: bool = False
    weight_activation: str = "identity"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value, allowed in (
            ("projection", self.projection, PROJECTIONS),
            ("sharing", self.sharing, SHARING),
            ("activation", self.activation, tuple(ACTIVATIONS)),
            ("weight_activation", self.weight_activation, tuple(FIXED_ACTIVATIONS)),
            ("kernel", self.kernel, KERNELS),
        ):
            if value not in allowed:
                raise ValueError(f"{field}={value!r} is unknown: use one of {', '.join(allowed)}")
        if not 1 <= self.min_order <= self.order:
            raise ValueError(f"min_order={self.min_order} must be in 1…order={self.order}")
        if self.direct_linear and self.order < 2:
            raise ValueError("direct_linear=True with order=1 is a plain linear map: use LinearConfig")
        if self.num_features is not None and self.num_features < 1:
            raise ValueError(f"num_features={self.num_features} must be at least 1")
        for contradiction, message in self._contradictions():
            if contradiction:
                raise ValueError(message)

    def _contradictions(self) -> tuple[tuple[bool, str], ...]:
        rbf, given = self.activation == "rbf", self.from_weights
        return (
            (
                self.projection == "learned" and not self.trainable,
                "projection='learned' is trained by definition: leave trainable=True",
            ),
            (
                rbf and (self.order > 1 or self.norm_slot or not self.bias_slot),
                "activation='rbf' needs order=1, bias_slot=True and norm_slot=False: a product of Gaussians "
                "is one again, and their width takes the place of the norm slot",
            ),
            (
                self.weight_activation != "identity" and not given,
                f"weight_activation={self.weight_activation!r} acts on features of the weights: it needs "
                "from_weights=True",
            ),
            (
                given and self.sharing == "powers",
                "sharing='powers' with from_weights=True is biased: use 'independent' or 'shared'",
            ),
            (
                given and self.projection == "teacher",
                "projection='teacher' with from_weights=True is biased: use random rows like 'orthogonal'",
            ),
            (given and rbf, "activation='rbf' has no features of weights: leave out from_weights=True"),
        )

    @property
    def lowest_order(self) -> int:
        """The lowest order that is made of product features."""
        return max(2, self.min_order) if self.direct_linear else self.min_order

    @property
    def groups(self) -> int:
        """Projections of m rows each."""
        return projection_groups(self.order, self.lowest_order, self.sharing)

    def features_for(self, dense: DenseFFN) -> int:
        """m, from `num_features` or from the budget; teacher rows may use less than the budget."""
        down = self._kept_down(dense)
        out = dense.out_features if down is None else dense.hidden_features
        fixed = dense.in_features * out if self.direct_linear else 0
        fixed += 0 if down is None else down.weight.numel()
        per_feature = self.groups * dense.in_features + (self.order - self.lowest_order + 1) * out
        m = self.size_for(dense, per_feature, fixed, unit="num_features", given=self.num_features)
        neurons = neurons_per_feature(self._teacher_factors(dense))
        if self.projection != "teacher" or neurons * m <= dense.hidden_features:
            return m
        if self.num_features is not None or dense.hidden_features < neurons:
            raise ValueError(
                f"num_features={m} needs {neurons * m} rows of the dense layer, which has only "
                f"{dense.hidden_features} neurons: lower it, or use sharing='powers'"
            )
        return dense.hidden_features // neurons

    def _kept_down(self, dense: DenseFFN) -> nn.Linear | None:
        """The output matrix that stays, if the layer is not merged with it."""
        if self.merge or (self.from_weights and dense.down is None):
            return None
        return self.require_plain_block(dense)

    def _teacher_factors(self, dense: DenseFFN) -> list[tuple[nn.Linear, int]]:
        return teacher_factors(dense, self.order, self.lowest_order, self.sharing)

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> EUGen:
        # Without data, inputs are taken to be layer-normalised: ‖x‖² = d.
        rms = math.sqrt(dense.in_features)
        if self.from_weights:
            return self._from_weights(dense, None, rms, generator)
        return self._assemble(dense, self._draw(dense, rms, generator), rms, generator)

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> EUGen:
        if self.from_weights:
            return self._from_weights(dense, data, input_rms(data), generator)
        rms = input_rms(data)
        if self.projection == "teacher":
            factors, m = self._teacher_factors(dense), self.features_for(dense)
            rows = teacher_projection(dense, data, m, factors, output_weight)
        else:
            rows = self._draw(dense, rms, generator)
        layer = self._assemble(dense, rows, rms, generator)
        layer.fit_readout(data)
        return layer

    def _draw(self, dense: DenseFFN, rms: float, generator: torch.Generator) -> Rows:
        m = self.features_for(dense)
        kind = {"teacher": "orthogonal", "learned": "gaussian"}.get(self.projection, self.projection)
        return draw_projection(kind, self.groups, m, dense.in_features, input_rms=rms, generator=generator)

    def _assemble(self, dense: DenseFFN, rows: Rows, rms: float, generator: torch.Generator) -> EUGen:
        m = len(rows.weight) // self.groups
        columns = (self.order - self.lowest_order + 1) * m + (dense.in_features if self.direct_linear else 0)
        down = self._kept_down(dense)
        out = dense.out_features if down is None else dense.hidden_features
        readout = new_linear(columns, out, like=dense.up.weight, generator=generator)
        rows = rbf_rows(rows, rms) if self.activation == "rbf" else rows
        return EUGen(self, rows, readout, copy.deepcopy(down), input_rms=rms)

    def _from_weights(
        self, dense: DenseFFN, data: TokenStream | None, rms: float, generator: torch.Generator
    ) -> EUGen:
        """The readout of theorem 3.1, on x⁺ = [x ; 1 ; ‖x‖] as it is."""
        rows = self._draw(dense, 1.0, generator)
        rows, weight, bias, error = readout_from_weights(self, dense, rows, data, generator=generator)
        readout = given_linear(weight, bias, like=dense.up.weight)
        layer = EUGen(self, rows, readout, copy.deepcopy(dense.down), input_rms=rms)
        layer.polynomial_error = error
        return layer.merged() if self.merge else layer
