"""Projections `G` and the feature maps built on them.

Rows act on the augmented input x⁺ = [x ; 1 ; ‖x‖]: a weight row, a bias entry and a norm entry.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen.ffn import DenseFFN, TokenStream
from eugen.shapes import Float

RANDOM_PROJECTIONS = ("gaussian", "rademacher", "orthogonal")
PROJECTIONS = (*RANDOM_PROJECTIONS, "teacher", "learned")
"""`learned` starts at Gaussian rows and is always trained; `teacher` starts at rows of the dense layer."""
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class Rows:
    """Rows of a projection split by slot: `weight [p, d]`, `bias [p]`, `norm [p]`."""

    weight: Float[Tensor, "p d"]
    bias: Float[Tensor, " p"]
    norm: Float[Tensor, " p"]


def orthogonal_rows(rows: int, columns: int, *, generator: torch.Generator) -> Float[Tensor, "rows columns"]:
    """Rows of independent Haar-orthogonal blocks, scaled by √columns so that E[g gᵀ] = I.

    Unscaled orthonormal rows would shrink an order-i feature's mean by columns^(−i).
    """
    blocks = []
    for _ in range(math.ceil(rows / columns)):
        q, r = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
        blocks.append(q * r.diagonal().sign())  # the sign makes Q Haar-distributed
    return torch.cat(blocks)[:rows].mul(math.sqrt(columns)).float()


def random_rows(
    kind: str, rows: int, columns: int, *, generator: torch.Generator
) -> Float[Tensor, "rows columns"]:
    """Zero-mean rows with E[g gᵀ] = I, float32, on the CPU.

    Raises:
        ValueError: `kind` is none of `RANDOM_PROJECTIONS`.
    """
    if kind == "gaussian":
        return torch.randn(rows, columns, generator=generator)
    if kind == "rademacher":
        return torch.randint(0, 2, (rows, columns), generator=generator).float().mul_(2).sub_(1)
    if kind == "orthogonal":
        return orthogonal_rows(rows, columns, generator=generator)
    raise ValueError(f"projection={kind!r} is not random: use one of {', '.join(RANDOM_PROJECTIONS)}")


def draw_projection(
    kind: str, groups: int, rows: int, in_features: int, *, input_rms: float, generator: torch.Generator
) -> Rows:
    """`groups` independent random projections of `rows` rows each, stacked.

    Args:
        input_rms: root mean square of ‖x‖; x and ‖x‖ are divided by it before the product.
    """
    drawn = [random_rows(kind, rows, in_features + 2, generator=generator) for _ in range(groups)]
    stacked = torch.cat(drawn)
    return Rows(
        weight=stacked[:, :in_features] / input_rms,
        bias=stacked[:, in_features].clone(),
        norm=stacked[:, in_features + 1] / input_rms,
    )


def input_rms(data: TokenStream) -> float:
    """Root mean square of ‖x‖ over a stream."""
    total, tokens = 0.0, 0
    for x, _, _ in data:
        total += float(x.double().square().sum())
        tokens += len(x)
    if not (tokens and math.isfinite(total) and total > 0):
        raise ValueError(f"the stream's inputs are empty, all zero or not finite ({tokens} tokens)")
    return math.sqrt(total / tokens)


@torch.no_grad()
def neuron_scores(
    dense: DenseFFN, data: TokenStream, output_weight: Float[Tensor, " d_out"] | None = None
) -> Float[Tensor, " h"]:
    """Importance of each hidden neuron: `var(h_j)·‖γ∘W2[:, j]‖²` (`var(h_j)` without an output matrix)."""
    count = torch.zeros((), dtype=torch.float64, device=dense.up.weight.device)
    total = square = count
    for x, _, weight in data:
        hidden = dense.features(x).double()
        token = (
            torch.ones(len(x), 1, dtype=torch.float64, device=x.device)
            if weight is None
            else weight.double()[:, None]
        )
        count = count + token.sum()
        total = total + (token * hidden).sum(0)
        square = square + (token * hidden.square()).sum(0)
    if not count:
        raise ValueError("the calibration stream is empty: give at least one chunk of tokens")
    variance = square / count - (total / count).square()
    if dense.down is None:
        return variance
    columns = dense.down.weight.double().square()
    if output_weight is not None:
        columns = columns * output_weight.double()[:, None]
    return variance * columns.sum(0)


def strongest(scores: Float[Tensor, " h"], count: int) -> Tensor:
    """Indices of the `count` largest scores, strongest first.

    Raises:
        ValueError: there are fewer than `count`.
    """
    if count > len(scores):
        raise ValueError(f"{count} rows asked for, the dense layer has only {len(scores)} neurons")
    return scores.topk(count).indices


def teacher_projection(dense: DenseFFN, indices: Tensor) -> Rows:
    """Rows and biases of the dense layer; the norm slot of a weight is 0."""
    weight = dense.up.weight.detach()[indices].float()
    bias = (
        dense.up.bias.detach()[indices].float()
        if dense.up.bias is not None
        else weight.new_zeros(len(weight))
    )
    return Rows(weight=weight, bias=bias, norm=torch.zeros_like(bias))


def product_features(
    z: Float[Tensor, "t p"], order: int, lowest: int, sharing: str
) -> list[Float[Tensor, "t m"]]:
    """Features φ_i of the orders `lowest`…`order` from projected inputs.

    `independent` multiplies i columns of its own per order, `shared` continues the product of the
    order below, `powers` raises one projection (`projection_groups` says how many columns each needs).
    """
    if sharing == "powers":
        return [z**i if i > 1 else z for i in range(lowest, order + 1)]
    parts = list(z.chunk(projection_groups(order, lowest, sharing), dim=-1))
    if sharing == "shared":
        running, features = parts[0], [parts[0]]
        for part in parts[1:]:
            running = running * part
            features.append(running)
        return features[lowest - 1 :]
    return [_product(parts.pop(0) for _ in range(i)) for i in range(lowest, order + 1)]


def _product(factors: Iterable[Tensor]) -> Tensor:
    result = None
    for factor in factors:
        result = factor if result is None else result * factor
    assert result is not None
    return result


def projection_groups(order: int, lowest: int, sharing: str) -> int:
    """How many projections of m rows the orders `lowest`…`order` need."""
    if sharing == "powers":
        return 1
    return order if sharing == "shared" else sum(range(lowest, order + 1))
