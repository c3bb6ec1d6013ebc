"""Projections `G` and the feature maps built on them.

Rows act on the augmented input x⁺ = [x ; 1 ; ‖x‖]: a weight row, a bias entry and a norm entry.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen import parallel
from eugen.ffn import DenseFFN, TokenStream, autocasts, runs_inference
from eugen.parts.neurons import neuron_scores, strongest
from eugen.shapes import Float

RANDOM_PROJECTIONS = ("gaussian", "rademacher", "orthogonal", "orthogonal_chi")
PROJECTIONS = (*RANDOM_PROJECTIONS, "teacher", "learned")
"""`learned` starts at Gaussian rows and is always trained; `teacher` starts at rows of the dense layer."""
SHARING = ("independent", "shared", "powers")
"""Rows of a feature's factors: each order's own, those of the order below and one more, or one alone."""


class Exp(nn.Module):
    """`exp(z)`."""

    def forward(self, z: Tensor) -> Tensor:
        return z.exp()


class Univariate(nn.Module):
    """A learnable function per feature, `a gelu(z) + b z + c z²` (KAN, arXiv 2404.19756); starts at GELU."""

    def __init__(self, features: int = 1) -> None:
        super().__init__()
        self.gelu = nn.Parameter(torch.ones(features))
        self.linear = nn.Parameter(torch.zeros(features))
        self.square = nn.Parameter(torch.zeros(features))

    def forward(self, z: Float[Tensor, "*batch f"]) -> Float[Tensor, "*batch f"]:
        if not runs_inference() or autocasts(z.device):
            return self.gelu * nn.functional.gelu(z) + (self.linear + self.square * z) * z
        # Four passes over the features instead of six, in two buffers.
        slope = torch.addcmul(self.linear, self.square, z)
        return nn.functional.gelu(z).mul_(self.gelu).addcmul_(slope, z)


FIXED_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "exp": Exp,
}
ACTIVATIONS = FIXED_ACTIVATIONS | {"univariate": Univariate, "rbf": Exp}
"""Element-wise functions Φ of the features. `rbf` is exp(−‖x − c‖²/2s²): of rows made by `rbf_rows`, less
‖x‖²/2s²."""


def new_activation(name: str, features: int) -> nn.Module:
    """One of `ACTIVATIONS` for so many features."""
    return Univariate(features) if name == "univariate" else ACTIVATIONS[name]()


@dataclass(frozen=True)
class Rows:
    """Rows of a projection split by slot: `weight [p, d]`, `bias [p]`, `norm [p]`."""

    weight: Float[Tensor, "p d"]
    bias: Float[Tensor, " p"]
    norm: Float[Tensor, " p"]


def orthogonal_rows(
    rows: int, columns: int, *, generator: torch.Generator, chi: bool = False
) -> Float[Tensor, "rows columns"]:
    """Rows of independent Haar-orthogonal blocks, scaled so that E[g gᵀ] = I.

    Unscaled orthonormal rows would shrink an order-i feature's mean by columns^(−i).

    Args:
        chi: scale each row by a chi variable, the length of a Gaussian row, instead of by √columns.
    """
    shape = (math.ceil(rows / columns), columns, columns)
    q, r = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
    q = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # the sign makes Q Haar-distributed
    length = math.sqrt(columns)
    if chi:
        length = torch.randn(shape, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return (q * length).flatten(0, 1)[:rows].float()


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
    if kind in ("orthogonal", "orthogonal_chi"):
        return orthogonal_rows(rows, columns, generator=generator, chi=kind == "orthogonal_chi")
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
    total, tokens = parallel.total_of(total, tokens)
    if not (tokens and math.isfinite(total) and total > 0):
        raise ValueError(f"the stream's inputs are empty, all zero or not finite ({tokens:.0f} tokens)")
    return math.sqrt(total / tokens)


def teacher_factors(dense: DenseFFN, order: int, lowest: int, sharing: str) -> list[tuple[nn.Linear, int]]:
    """Per group of m rows the matrix and which m neurons, counted from the strongest, it is taken from.

    A gated block is itself a product: its factors alternate between gate and up rows of one neuron.
    """
    groups = projection_groups(order, lowest, sharing)
    if dense.gate is None:
        return [(dense.up, group) for group in range(groups)]
    positions = list(range(groups))
    if sharing == "independent":
        positions = [position for i in range(lowest, order + 1) for position in range(i)]
    return [(dense.up if position % 2 else dense.gate, position // 2) for position in positions]


def neurons_per_feature(factors: list[tuple[nn.Linear, int]]) -> int:
    """How many neurons the groups of `teacher_factors` take for each of the m features."""
    return 1 + max(place for _, place in factors)


def teacher_projection(
    dense: DenseFFN,
    data: TokenStream,
    m: int,
    factors: list[tuple[nn.Linear, int]],
    output_weight: Float[Tensor, " d_out"] | None = None,
) -> Rows:
    """Rows and biases of the dense layer's strongest neurons; the norm slot of a weight is 0.

    Args:
        factors: where each group of m rows is taken from, see `teacher_factors`.
    """
    best = strongest(neuron_scores(dense, data, output_weight), neurons_per_feature(factors) * m)
    weights, biases = [], []
    for linear, place in factors:
        chosen = best[place * m : (place + 1) * m]
        weights.append(linear.weight.detach()[chosen].float())
        zeros = weights[-1].new_zeros(m)
        biases.append(zeros if linear.bias is None else linear.bias.detach()[chosen].float())
    bias = torch.cat(biases)
    return Rows(weight=torch.cat(weights), bias=bias, norm=torch.zeros_like(bias))


def rbf_rows(rows: Rows, input_rms: float) -> Rows:
    """Rows of `exp(−‖x − c‖²/2s²)`: `c/s²`, with the bias −‖c‖²/2s².

    Centres lie along the given rows at the inputs' distance from the origin, r; s² = r²/2, so that the
    exponent is −‖x − c‖²/r² (scikit-learn's default width for inputs of unit variance).
    """
    centres = nn.functional.normalize(rows.weight.double(), dim=-1) * input_rms
    bias = torch.full_like(centres[:, 0], -1.0)
    return Rows(weight=centres * (2 / input_rms**2), bias=bias, norm=torch.zeros_like(bias))


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


def products_in_place(
    z: Float[Tensor, "t p"], order: int, lowest: int, sharing: str
) -> Float[Tensor, "t f"] | None:
    """`product_features` side by side, written over z without a copy; None where z holds no room for that."""
    if order == 1:
        return z
    if sharing == "powers":
        return None if lowest < order else z.pow_(order)
    parts = z.chunk(projection_groups(order, lowest, sharing), dim=-1)
    if sharing == "shared" and lowest == 1:
        for below, part in itertools.pairwise(parts):
            part.mul_(below)
        return z
    if sharing == "independent" and order == 2:
        parts[-2].mul_(parts[-1])
        return z.narrow(1, 0, z.shape[1] - parts[-1].shape[1])
    return None


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
