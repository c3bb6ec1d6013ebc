"""What the operator computes, in plain torch: the truth that the fused kernel and the gradients are held to.

z = x Gᵀ + 1 bᵀ + ‖x‖ nᵀ,   f(x) = Φ(concat_i Π_j z_j^i),   y = f(x) Aᵀ + c (+ x Dᵀ)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from eugen.shapes import Float

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda p: p,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "softplus": functional.softplus,
    "tanh": torch.tanh,
    "exp": torch.exp,
}


def projections(
    x: Float[Tensor, "t d_in"],
    weight: Float[Tensor, "p d_in"],
    bias: Float[Tensor, " p"] | None,
    norm: Float[Tensor, " p"] | None,
) -> Float[Tensor, "t p"]:
    """z, every row of G on [x ; 1 ; ‖x‖]."""
    z = functional.linear(x, weight, bias)
    if norm is None:
        return z
    return z + torch.linalg.vector_norm(x, dim=-1, keepdim=True) * norm


def chains(order: int, lowest: int, sharing: str) -> list[tuple[int, ...]]:
    """For each order `lowest`…`order`, which of the groups of m projections are its factors.

    `independent` has i groups of its own for order i, `shared` the first i, `powers` i times the only one.
    """
    orders = range(lowest, order + 1)
    if sharing == "powers":
        return [(0,) * i for i in orders]
    if sharing == "shared":
        return [tuple(range(i)) for i in orders]
    first = [sum(range(lowest, i)) for i in orders]
    return [tuple(range(start, start + i)) for start, i in zip(first, orders, strict=True)]


def feature_map(
    x: Float[Tensor, "t d_in"],
    weight: Float[Tensor, "p d_in"],
    bias: Float[Tensor, " p"] | None,
    norm: Float[Tensor, " p"] | None,
    order: int,
    lowest: int,
    sharing: str,
    activation: str,
) -> Float[Tensor, "t f"]:
    """f(x): m features for each of the orders, side by side.

    Args:
        weight: G, groups of m rows each; `bias` and `norm` are its columns for 1 and for ‖x‖.
        sharing, activation: as in `EUGenConfig`, an activation of `ACTIVATIONS`.
    """
    wanted = chains(order, lowest, sharing)
    groups = projections(x, weight, bias, norm).chunk(1 + max(max(chain) for chain in wanted), dim=-1)
    parts = []
    for chain in wanted:
        product = groups[chain[0]]
        for group in chain[1:]:
            product = product * groups[group]
        parts.append(ACTIVATIONS[activation](product))
    return torch.cat(parts, dim=-1)


def output(
    x: Float[Tensor, "t d_in"],
    features: Float[Tensor, "t f"],
    readout: Float[Tensor, "d_out _"],
    bias: Float[Tensor, " d_out"],
) -> Float[Tensor, "t d_out"]:
    """y; a readout with d_in columns more than there are features acts on x first: D and A side by side."""
    direct = readout.shape[1] - features.shape[1]
    y = features @ readout[:, direct:].T + bias
    return y + x @ readout[:, :direct].T if direct else y
