"""EUGen: products of random projections of the input and its norm (arXiv 2410.09771, 2601.22563).

φ_i(x) = G_1^i x⁺ ⊙ … ⊙ G_i^i x⁺,   x⁺ = [x ; 1 ; ‖x‖],   y = A Φ(concat_i φ_i(x)) + c
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen.features import (
    ACTIVATIONS,
    PROJECTIONS,
    Rows,
    draw_projection,
    input_rms,
    neuron_scores,
    product_features,
    projection_groups,
    strongest,
    teacher_projection,
)
from eugen.ffn import DenseFFN, FFNLayer, LayerConfig, TokenStream, new_linear
from eugen.shapes import Float

SHARING = ("independent", "shared", "powers")


class EUGen(FFNLayer):
    """The layer. Projections are parameters (trainable) or buffers (fixed), so a checkpoint is complete.

    Args:
        rows: the stacked projections; their number is a multiple of the features per order.
        readout: `[out, d if direct_linear + features]`; its first d columns act on x itself.
        down: the dense block's own output matrix where the layer is not merged with it.
    """

    weight: Tensor
    bias: Tensor | None
    norm: Tensor | None
    readout: nn.Linear
    down: nn.Linear | None

    def __init__(self, config: EUGenConfig, rows: Rows, readout: nn.Linear, down: nn.Linear | None) -> None:
        super().__init__()
        self.config = config
        self.readout, self.down = readout, down
        self.act = ACTIVATIONS[config.activation]()
        self.in_features = rows.weight.shape[1]
        self.out_features = readout.out_features if down is None else down.out_features
        self._store("weight", rows.weight)
        self._store("bias", rows.bias if config.bias_slot else None)
        self._store("norm", rows.norm if config.norm_slot else None)

    def _store(self, name: str, value: Tensor | None) -> None:
        like = self.readout.weight
        tensor = None if value is None else value.to(device=like.device, dtype=like.dtype)
        if self.config.trainable:
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)

    def _orders(self, x: Float[Tensor, "t d_in"]) -> list[Float[Tensor, "t m"]]:
        z = x @ self.weight.T if self.bias is None else torch.addmm(self.bias, x, self.weight.T)
        if self.norm is not None:
            z = z + torch.linalg.vector_norm(x, dim=-1, keepdim=True) * self.norm
        config = self.config
        return [self.act(f) for f in product_features(z, config.order, config.lowest_order, config.sharing)]

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch f"]:
        flat = x.reshape(-1, self.in_features)
        parts = ([flat] if self.config.direct_linear else []) + self._orders(flat)
        joined = torch.cat(parts, dim=-1)
        return joined.reshape(*x.shape[:-1], joined.shape[-1])

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        flat = x.reshape(-1, self.in_features)
        parts = ([flat] if self.config.direct_linear else []) + self._orders(flat)
        # One addmm per part: 3-D inputs and `cat` would cost a copy of the features.
        y, column = self.readout.bias, 0
        for part in parts:
            width = part.shape[1]
            y = torch.addmm(y, part, self.readout.weight[:, column : column + width].T)
            column += width
        if self.down is not None:
            y = self.down(y)
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def macs_per_token(self) -> int:
        own = self.weight.shape[0] * self.in_features + self.readout.weight.numel()
        return own + (0 if self.down is None else self.down.weight.numel())

    def merged(self) -> EUGen:
        """The same function as one layer: A becomes W2 A, c becomes W2 c + b2 (exact up to rounding)."""
        if self.down is None:
            return self
        weight = self.down.weight.detach().double()
        readout = new_linear(
            self.readout.in_features, self.out_features, like=weight.float(), generator=torch.Generator()
        ).to(self.readout.weight.dtype)
        merged = EUGen(self.config, Rows(self.weight.detach().clone(), *self._slots()), readout, down=None)
        bias = weight @ self.readout.bias.detach().double()
        bias = bias if self.down.bias is None else bias + self.down.bias.detach().double()
        merged.set_readout(weight @ self.readout.weight.detach().double(), bias)
        return merged

    def _slots(self) -> tuple[Tensor, Tensor]:
        zero = torch.zeros_like(self.weight[:, 0])
        return (
            zero if self.bias is None else self.bias.detach().clone(),
            zero if self.norm is None else self.norm.detach().clone(),
        )

    @torch.no_grad()
    def set_readout(self, weight: Float[Tensor, "d_out f"], bias: Float[Tensor, " d_out"]) -> None:
        """Set A and c so that the layer's output is `weight f(x) + bias`.

        Not merged, W2 stays as it is and A = W2⁺·weight, the smallest A with W2 A = weight.
        """
        if self.down is not None:
            inverse = torch.linalg.pinv(self.down.weight.double())
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
        projection: rows of G: `gaussian`, `rademacher`, `orthogonal`, `teacher` (the dense layer's strongest
            rows; untrained layers get orthogonal ones) or `learned` (Gaussian start, always trained).
        sharing: `independent` rows per factor, `shared` between orders, or `powers` of one projection.
        direct_linear: order 1 as a linear map of x itself instead of features.
        bias_slot, norm_slot: whether G acts on the constant and on ‖x‖.
        activation: Φ, element-wise on the features.
        trainable: whether training and refinement may change G; fixed rows are buffers.
        merge: fold the block's output matrix into A; False keeps it and replaces `Linear + act`.

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

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value, allowed in (
            ("projection", self.projection, PROJECTIONS),
            ("sharing", self.sharing, SHARING),
            ("activation", self.activation, tuple(ACTIVATIONS)),
        ):
            if value not in allowed:
                raise ValueError(f"{field}={value!r} is unknown: use one of {', '.join(allowed)}")
        if not 1 <= self.min_order <= self.order:
            raise ValueError(f"min_order={self.min_order} must be in 1…order={self.order}")
        if self.direct_linear and self.order < 2:
            raise ValueError("direct_linear=True with order=1 is a plain linear map: use LinearConfig")
        if self.projection == "learned" and not self.trainable:
            raise ValueError("projection='learned' is trained by definition: leave trainable=True")
        if self.num_features is not None and self.num_features < 1:
            raise ValueError(f"num_features={self.num_features} must be at least 1")

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
        out = dense.out_features if self.merge else dense.hidden_features
        fixed = dense.in_features * out if self.direct_linear else 0
        if not self.merge:
            fixed += self.require_plain_block(dense).weight.numel()
        per_feature = self.groups * dense.in_features + (self.order - self.lowest_order + 1) * out
        m = self.size_for(dense, per_feature, fixed, unit="num_features", given=self.num_features)
        if self.projection != "teacher" or self.groups * m <= dense.hidden_features:
            return m
        if self.num_features is not None or dense.hidden_features < self.groups:
            raise ValueError(
                f"num_features={m} needs {self.groups * m} rows of the dense layer, which has only "
                f"{dense.hidden_features} neurons: lower it, or use sharing='powers'"
            )
        return dense.hidden_features // self.groups

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> EUGen:
        m = self.features_for(dense)
        kind = {"teacher": "orthogonal", "learned": "gaussian"}.get(self.projection, self.projection)
        # Without data, inputs are taken to be layer-normalised: ‖x‖² = d.
        rms = math.sqrt(dense.in_features)
        rows = draw_projection(kind, self.groups, m, dense.in_features, input_rms=rms, generator=generator)
        return self._assemble(dense, rows, generator)

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> EUGen:
        m = self.features_for(dense)
        if self.projection == "teacher":
            scores = neuron_scores(dense, data, output_weight)
            rows = teacher_projection(dense, strongest(scores, self.groups * m))
        else:
            kind = "gaussian" if self.projection == "learned" else self.projection
            rms = input_rms(data)
            rows = draw_projection(
                kind, self.groups, m, dense.in_features, input_rms=rms, generator=generator
            )
        layer = self._assemble(dense, rows, generator)
        layer.fit_readout(data)
        return layer

    def _assemble(self, dense: DenseFFN, rows: Rows, generator: torch.Generator) -> EUGen:
        m = len(rows.weight) // self.groups
        columns = (self.order - self.lowest_order + 1) * m + (dense.in_features if self.direct_linear else 0)
        down = None if self.merge else self.require_plain_block(dense)
        out = dense.out_features if down is None else dense.hidden_features
        readout = new_linear(columns, out, like=dense.up.weight, generator=generator)
        return EUGen(self, rows, readout, copy.deepcopy(down))
