"""Feed-forward blocks: the dense one, and the contract of the modules that take its place."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from eugen import least_squares
from eugen.shapes import Float

TokenStream = Iterable[tuple[Tensor, Tensor, Tensor | None]]
"""Re-iterable chunks `(x [T, in], y [T, out], weight [T] or None)` of a layer's inputs and targets."""


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

    @property
    def num_features(self) -> int:
        """Columns of the readout; without one, the width of the narrowest linear map: a rank, the neurons."""
        if self.readout is not None:
            return self.readout.in_features
        linears = [module for module in self.modules() if isinstance(module, nn.Linear)]
        return min([self.out_features, *(min(m.in_features, m.out_features) for m in linears)])

    def auxiliary_loss(self) -> Tensor | None:
        """What the last forward pass in training mode asks for beside the task's loss, if anything."""
        return None

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
        """Copy a solved linear map (any float dtype) into the layer.

        Raises:
            ValueError: the readout has no bias to take the intercept.
        """
        assert self.readout is not None
        self.readout.weight.copy_(weight)
        if self.readout.bias is None:
            raise ValueError("the readout has no bias, and the solution an intercept: give the map a bias")
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
    def macs_per_neuron(self) -> int:
        """Multiply-accumulates of one hidden neuron for one token, its way to the outputs included."""
        return self.in_features * (1 if self.gate is None else 2) + self.out_features

    @property
    def macs_per_token(self) -> int:
        up = self.in_features * self.hidden_features * (1 if self.gate is None else 2)
        return up + (0 if self.down is None else self.hidden_features * self.out_features)


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
    """`linear(cat(parts))` of 2-D parts without the copy that `cat` makes (up to 25 % at batch 1).

    In inference all parts after the first are added to its result in place.
    """
    if len(parts) == 1:
        return linear(parts[0])
    if type(linear) is not nn.Linear:
        return linear(torch.cat(parts, dim=-1))
    # Under autocast the sum so far is in the lower dtype, the part in its own, and addmm_ casts neither.
    in_place = runs_inference() and not autocasts(parts[0].device)
    first, *rest = parts
    column = first.shape[1]
    weight = linear.weight.narrow(1, 0, column).T
    y = first @ weight if linear.bias is None else torch.addmm(linear.bias, first, weight)
    for part in rest:
        weight = linear.weight.narrow(1, column, part.shape[1]).T
        y = y.addmm_(part, weight) if in_place else torch.addmm(y, part, weight)
        column += part.shape[1]
    return y


def runs_inference() -> bool:
    """No gradients are asked for. Not in an export: programs go where they are, and the operator is not."""
    return not torch.is_grad_enabled() and not torch.compiler.is_exporting()


def autocasts(device: torch.device) -> bool:
    """Whether products on this device are cast; torch has no answer for some, as `meta`, and raises."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def copy_activation(act: nn.Module) -> nn.Module:
    """An activation of its own for a new layer, of any number of neurons.

    Raises:
        ValueError: it has a weight for each neuron of the layer it comes from.
    """
    if any(parameter.numel() > 1 for parameter in act.parameters()):
        raise ValueError(f"act={act} has a weight for each neuron, a new layer has others: share one weight")
    return copy.deepcopy(act)
