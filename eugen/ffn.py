"""Feed-forward blocks and the contract that every replacement fulfils.

A layer is two things: a frozen configuration (`LayerConfig`) and a module (`FFNLayer`).
The configuration's type selects the method; its `budget` is the fraction of the dense
block's inference MACs that the layer may use.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from eugen import least_squares
from eugen.refine import refine
from eugen.shapes import Float

TokenStream = Iterable[tuple[Tensor, Tensor, Tensor | None]]
"""Re-iterable chunks `(x [T, in], y [T, out], weight [T] or None)` of a layer's inputs and targets."""


class UnsuitableBlock(ValueError):
    """A method cannot take this form of block (gated, without output matrix) at any size."""


class FFNLayer(nn.Module):
    """A block: any map to features, then, in most layers, one linear map of them, the readout.

    Subclasses provide `features`, and `readout` (None where nothing linear follows), and override
    `forward` where a faster equivalent form exists. Matrix products go through `nn.Linear` submodules
    where they can, so that another precision can take their place.
    """

    in_features: int
    out_features: int
    readout: nn.Linear | None

    @abstractmethod
    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch f"]:
        """Everything before the last linear map."""

    def reference(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """The layer by its definition in evaluation mode; `forward` agrees with it and may be faster."""
        features = self.features(x)
        return features if self.readout is None else self.readout(features)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.reference(x)

    @property
    def precision(self) -> torch.dtype:
        """The dtype whose rounding bounds the result: the weights' own, or a lower one for the products."""
        return next(iter((*self.parameters(), *self.buffers()))).dtype

    @property
    @abstractmethod
    def macs_per_token(self) -> int:
        """Multiply-accumulates of all matrix products for one token in evaluation mode.

        Element-wise work is not counted.
        """

    def num_parameters(self) -> int:
        """Weights that a checkpoint stores: parameters and buffers."""
        return sum(t.numel() for t in (*self.parameters(), *self.buffers()))

    def merged(self) -> FFNLayer:
        """The same function with consecutive linear maps multiplied out. Most layers are merged already."""
        return self

    def fit_readout(self, data: TokenStream) -> None:
        """Solve the last linear map, if there is one, in closed form (ridge) for these data, in place."""
        if self.readout is None:
            return
        weight, bias = least_squares.ridge((self.features(x), y, w) for x, y, w in data)
        self.set_readout(weight, bias)

    @torch.no_grad()
    def set_readout(self, weight: Float[Tensor, "d_out f"], bias: Float[Tensor, " d_out"]) -> None:
        """Copy a solved linear map (any float dtype) into the layer."""
        assert self.readout is not None
        self.readout.weight.copy_(weight)
        self.readout.bias.copy_(bias)


class DenseFFN(FFNLayer):
    """`y = down(act(up(x)))`; gated: `down(act(gate(x)) * up(x))`; a single layer without `down`."""

    def __init__(
        self, up: nn.Linear, act: nn.Module, down: nn.Linear | None = None, gate: nn.Linear | None = None
    ) -> None:
        super().__init__()
        if down is not None and down.in_features != up.out_features:
            raise ValueError(
                f"down.in_features={down.in_features} must equal up.out_features={up.out_features}"
            )
        if gate is not None and (gate.in_features, gate.out_features) != (up.in_features, up.out_features):
            raise ValueError(
                f"gate must have up's shape {tuple(up.weight.shape)}, not {tuple(gate.weight.shape)}"
            )
        self.up, self.act, self.down, self.gate = up, act, down, gate
        self.in_features = up.in_features
        self.hidden_features = up.out_features
        self.out_features = up.out_features if down is None else down.out_features

    @property
    def readout(self) -> nn.Linear | None:
        """The output matrix `down`; None for a single feed-forward layer."""
        return self.down

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch h"]:
        """The hidden neurons."""
        if self.gate is None:
            return self.act(self.up(x))
        return self.act(self.gate(x)) * self.up(x)

    @property
    def macs_per_token(self) -> int:
        up = self.in_features * self.hidden_features * (1 if self.gate is None else 2)
        return up + (0 if self.down is None else self.hidden_features * self.out_features)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What to build. Subclass with `name=` in the class line to register a method.

    Args:
        budget: fraction of the dense block's inference MACs, in (0, 1]; the layer never exceeds it.
            None where the configuration names its sizes itself.

    Raises:
        ValueError: a budget outside (0, 1].
    """

    budget: float | None = None
    name: ClassVar[str] = ""
    needs_calibration: ClassVar[bool] = True
    """Whether `fit` reads its stream; without, `replace` spares the forward passes."""
    registry: ClassVar[dict[str, type[LayerConfig]]] = {}

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        if name is None:
            return
        if name in LayerConfig.registry:
            raise ValueError(f"layer name {name!r} is taken by {LayerConfig.registry[name].__qualname__}")
        cls.name = name
        LayerConfig.registry[name] = cls

    @property
    def only_budget(self) -> float | None:
        """The one budget at which this configuration makes sense, None where any will do."""
        return None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget={self.budget} must be in (0, 1]: a fraction of the dense block's MACs")

    @abstractmethod
    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> FFNLayer:
        """An untrained layer of the block's shape, on its device and in its dtype."""

    @abstractmethod
    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Float[Tensor, " d_out"] | None = None,
    ) -> FFNLayer:
        """A layer fitted in closed form to a re-iterable stream.

        Args:
            output_weight: importance of each output dimension in the error, None for equal.
        """

    def refine(
        self,
        layer: FFNLayer,
        dense: DenseFFN,
        data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        steps: int,
        generator: torch.Generator,
        output_weight: Float[Tensor, " d_out"] | None = None,
    ) -> FFNLayer:
        """A fitted layer after so many steps of local training; override to train in another way."""
        return refine(layer, data, steps=steps, generator=generator, output_weight=output_weight)

    def fit_and_refine(
        self,
        dense: DenseFFN,
        data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        steps: int,
        judge: Callable[[FFNLayer], float],
        generator: torch.Generator,
        output_weight: Float[Tensor, " d_out"] | None = None,
    ) -> FFNLayer:
        """`fit`, then `refine` for so many steps, kept only where `judge` (higher is better) prefers it."""
        layer = self.fit(dense, data, generator=generator, output_weight=output_weight)
        if not steps or not any(p.requires_grad for p in layer.parameters()):
            return layer
        refined = self.refine(
            layer, dense, data, steps=steps, generator=generator, output_weight=output_weight
        )
        return refined if judge(refined) > judge(layer) else layer

    def size_for(
        self, dense: DenseFFN, per_unit: int, fixed: int = 0, *, unit: str, given: int | None = None
    ) -> int:
        """The largest number of units whose MACs, `fixed + units·per_unit`, stay within the budget.

        Args:
            given: the number that the configuration names itself, taken if it is within the budget.

        Raises:
            ValueError: neither a budget nor a size was given, the size is below 1 or beyond the
                budget, or the budget buys no unit.
        """
        if given is not None and given < 1:
            raise ValueError(f"{unit}={given} must be at least 1")
        if self.budget is None:
            if given is None:
                raise ValueError(f"{type(self).__name__} needs budget= or an explicit {unit}=")
            return given
        allowed = math.floor(self.budget * dense.macs_per_token + 1e-9)
        if given is not None:
            if fixed + given * per_unit > allowed:
                raise ValueError(f"{unit}={given} is beyond budget={self.budget}: give only one of them")
            return given
        units = (allowed - fixed) // per_unit
        if units < 1:
            least = math.ceil(1000 * (fixed + per_unit) / dense.macs_per_token) / 1000
            raise ValueError(
                f"budget={self.budget} is too small for {self.name!r} on this block ({dense.in_features}→"
                f"{dense.hidden_features}→{dense.out_features}): the least is {least:.3f}"
            )
        return units

    def require_ungated(self, dense: DenseFFN) -> None:
        """Raise UnsuitableBlock for a gated block, naming the rows that take one."""
        if dense.gate is not None:
            raise UnsuitableBlock(
                f"layer {self.name!r} does not take gated blocks; use 'linear', 'narrow' or 'prune'"
            )

    def require_plain_block(self, dense: DenseFFN) -> nn.Linear:
        """The block's output matrix.

        Raises:
            UnsuitableBlock: the block is gated or has no output matrix.
        """
        self.require_ungated(dense)
        return self.require_down(dense)

    def require_down(self, dense: DenseFFN) -> nn.Linear:
        """The block's output matrix.

        Raises:
            UnsuitableBlock: the block has none.
        """
        if dense.down is None:
            raise UnsuitableBlock(
                f"layer {self.name!r} replaces whole blocks; this one has no output matrix (down=None)"
            )
        return dense.down


def new_linear(
    in_features: int, out_features: int, *, like: Tensor, generator: torch.Generator, bias: bool = True
) -> nn.Linear:
    """A linear map with torch's default initialisation, drawn from `generator`.

    Device and dtype are those of `like`.
    """
    layer = nn.Linear(in_features, out_features, bias=bias, device="meta").to_empty(device=like.device)
    bound = 1 / math.sqrt(in_features)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
    return layer.to(like.dtype)


def linear_of_parts(linear: nn.Module, parts: list[Float[Tensor, "t _"]]) -> Float[Tensor, "t d_out"]:
    """`linear(cat(parts))` of 2-D parts without the copy that `cat` makes (up to 25 % at batch 1)."""
    if type(linear) is not nn.Linear:
        return linear(torch.cat(parts, dim=-1))
    y, column = linear.bias, 0
    for part in parts:
        weight = linear.weight[:, column : column + part.shape[1]].T
        y = part @ weight if y is None else torch.addmm(y, part, weight)
        column += part.shape[1]
    return y


def copy_activation(act: nn.Module) -> nn.Module:
    """An activation of its own for a new layer."""
    return copy.deepcopy(act)
