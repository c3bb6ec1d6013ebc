"""The feature map f of EUGen: `f(x) = Φ(concat_i G_1^i x⁺ ⊙ … ⊙ G_i^i x⁺)`, x⁺ = [x ; 1 ; ‖x‖]."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eugen.features import (
    FIXED_ACTIVATIONS,
    Rows,
    new_activation,
    product_features,
    products_in_place,
)
from eugen.ffn import autocasts, runs_inference
from eugen.kernels import feature_map as kernel
from eugen.shapes import Float

if TYPE_CHECKING:
    from eugen.layers.eugen import EUGenConfig


class FeatureMap(nn.Module):
    """Everything before the readout. Fixed rows are parameters without gradient: a checkpoint is complete.

    Args:
        rows: the stacked projections; their number is a multiple of the features per order.
        like: a tensor on the device and of the dtype wanted.
        input_rms: the inputs' typical ‖x‖, the unit of the norm gate and of the width of RBFs.
    """

    norm: nn.Parameter | None
    gate: nn.Parameter | None
    input_rms: Tensor
    fused: bool = False
    """Whether inference may call the operator `eugen::feature_map` (`EUGenConfig.kernel`)."""

    def __init__(self, config: EUGenConfig, rows: Rows, *, like: Tensor, input_rms: float) -> None:
        super().__init__()
        self.config = config
        orders, m = config.order - config.lowest_order + 1, len(rows.weight) // config.groups
        self.projection = given_linear(rows.weight, rows.bias if config.bias_slot else None, like=like)
        self.projection.requires_grad_(config.trainable)
        norm = rows.norm.to(like).clone()
        self.norm = nn.Parameter(norm, requires_grad=config.trainable) if config.norm_slot else None
        self.acts = nn.ModuleList(new_activation(config.activation, m).to(like) for _ in range(orders))
        self.gate = nn.Parameter(like.new_zeros(orders, m)) if config.norm_gate else None
        if config.norm_gate or config.activation == "rbf":
            self.register_buffer("input_rms", like.new_full((), input_rms))
        self.register_load_state_dict_post_hook(_choose_anew)  # its `assign` puts other tensors here
        self.fused = self._choice()

    def _choice(self) -> bool:
        if type(self.projection) is not nn.Linear:  # of another precision; `weight` may not be a tensor
            return False
        config, weight = self.config, self.projection.weight
        form = {"groups": config.groups, "activation": config.activation, "gated": config.norm_gate}
        return kernel.choice(config.kernel, weight, **form)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FeatureMap:
        """What moves a module or changes its dtype ends here: the kernel is chosen anew."""
        super()._apply(fn, recurse)
        self.fused = self._choice()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """`torch.load` may have put the weights on another device."""
        super().__setstate__(state)
        self.fused = self._choice()

    def _calls_kernel(self, x: Float[Tensor, "t d_in"]) -> bool:
        if not self.fused or type(self.projection) is not nn.Linear:  # another precision took its place
            return False
        weight = self.projection.weight
        # Of inputs on another device torch complains; the kernel would read what lies at their address.
        if (x.dtype, x.device) != (weight.dtype, weight.device) or autocasts(x.device):
            return False
        if self.config.kernel == "fused":
            return True
        return runs_inference() and len(x) >= kernel.LEAST_TOKENS

    def forward(self, x: Float[Tensor, "t d_in"]) -> list[Float[Tensor, "t _"]]:
        """What the readout's columns act on, part by part: x itself (direct_linear), then each order.

        Without gradients the products are written over the projection's output; hooks should copy it.
        """
        config = self.config
        if self._calls_kernel(x):
            form = (config.order, config.lowest_order, config.sharing, config.activation)
            features = kernel.feature_map(x, self.projection.weight, self.projection.bias, self.norm, *form)
            return [x, features] if config.direct_linear else [features]
        z, in_place = self.projection(x), runs_inference()
        if self.norm is not None:  # one pass over z
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
            z = z.addcmul_(norm, self.norm) if in_place else torch.addcmul(z, norm, self.norm)
        if config.activation == "rbf":
            z = z - (x / self.input_rms).square().sum(-1, keepdim=True)
        if in_place and self.gate is None and (len(self.acts) == 1 or config.activation in FIXED_ACTIVATIONS):
            joined = products_in_place(z, config.order, config.lowest_order, config.sharing)
            if joined is not None:
                return [x, self.acts[0](joined)] if config.direct_linear else [self.acts[0](joined)]
        products = product_features(z, config.order, config.lowest_order, config.sharing)
        parts = [act(product) for act, product in zip(self.acts, products, strict=True)]
        if self.gate is not None:
            excess = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / self.input_rms - 1
            parts = [part * (1 + excess * gate) for part, gate in zip(parts, self.gate, strict=True)]
        return [x, *parts] if config.direct_linear else parts


def _choose_anew(module: FeatureMap, _: object) -> None:
    module.fused = module._choice()


def given_linear(weight: Tensor, bias: Tensor | None, *, like: Tensor) -> nn.Linear:
    """A linear map of copies of these values, on the device and in the dtype of `like`."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(like).clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(like).clone())
    return layer
