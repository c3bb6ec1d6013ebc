"""Gradients of the feature map, composed of torch's operators: z is computed anew instead of being kept.

What training stores per token is x alone, not the groups·m projections and their products.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from eugen.kernels.feature_map.naive import chains, projections
from eugen.shapes import Float

_aten = torch.ops.aten


def feature_map_gradients(
    gradient: Float[Tensor, "t f"],
    x: Float[Tensor, "t d_in"],
    weight: Float[Tensor, "p d_in"],
    bias: Float[Tensor, " p"] | None,
    norm: Float[Tensor, " p"] | None,
    order: int,
    lowest: int,
    sharing: str,
    activation: str,
    *,
    needed: Sequence[bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The loss's gradients by x, weight, bias and norm from the one by the features; None where not `needed`.

    Fixed rows, and the network's own inputs, each spare a product as large as the forward one.
    """
    by_x, by_weight, by_bias, by_norm = needed
    wanted = chains(order, lowest, sharing)
    z = projections(x, weight, bias, norm)
    groups = z.chunk(1 + max(max(chain) for chain in wanted), dim=-1)
    terms: dict[int, Tensor] = {}
    for chain, part in zip(wanted, gradient.chunk(len(wanted), dim=-1), strict=True):
        by_factor = _chain_gradients(part, [groups[group] for group in chain], activation)
        for group, term in zip(chain, by_factor, strict=True):
            terms[group] = terms[group] + term if group in terms else term
    dz = torch.cat([terms[group] for group in range(len(groups))], dim=-1)
    dx, dnorm = dz @ weight if by_x else None, None
    if norm is not None:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        if dx is not None:
            # ‖x‖ has no derivative at 0; like torch's own norm, take 0.
            direction = torch.where(length > 0, x / length, 0)
            dx = dx + (dz @ norm)[:, None] * direction
        dnorm = (dz * length).sum(0) if by_norm else None
    return dx, dz.T @ x if by_weight else None, dz.sum(0) if bias is not None and by_bias else None, dnorm


def _chain_gradients(gradient: Tensor, factors: list[Tensor], activation: str) -> list[Tensor]:
    """By each factor of `Φ(Π factors)`: the product of those before it and those behind it, times Φ'."""
    before = [factors[0]]
    for factor in factors[1:]:
        before.append(before[-1] * factor)
    behind = _activation_gradient(gradient, before[-1], activation)
    terms = []
    for factor, product in zip(reversed(factors[1:]), reversed(before[:-1]), strict=True):
        terms.append(behind * product)
        behind = behind * factor
    return [behind, *reversed(terms)]


def _activation_gradient(gradient: Tensor, p: Tensor, activation: str) -> Tensor:
    """`gradient`·Φ'(p), where it can be by the operators that torch's own modules use."""
    match activation:
        case "relu":
            return _aten.threshold_backward(gradient, p, 0)
        case "gelu":
            return _aten.gelu_backward(gradient, p)
        case "silu":
            gate = p.sigmoid()  # torch's own operator has no second derivative
            return gradient * gate * (1 + p * (1 - gate))
        case "softplus":
            return _aten.softplus_backward(gradient, p, 1, 20)
        case "tanh":
            return _aten.tanh_backward(gradient, p.tanh())
        case "exp":
            return gradient * p.exp()
    return gradient
