"""The readout of EUGen computed from the weights alone (theorem 3.1 of arXiv 2410.09771, and SNNK's).

With w⁺ = [w ; b ; 0] and x⁺ = [x ; 1 ; ‖x‖], `⟨ψ(w), φ(x)⟩` has mean `act(w·x + b)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from eugen.config import UnsuitableBlock
from eugen.features import FIXED_ACTIVATIONS, Rows, product_features
from eugen.ffn import DenseFFN, TokenStream
from eugen.polynomials import pre_activation_polynomial
from eugen.shapes import Float

if TYPE_CHECKING:
    from eugen.layers.eugen import EUGenConfig


def readout_from_weights(
    config: EUGenConfig,
    dense: DenseFFN,
    rows: Rows,
    data: TokenStream | None,
    *,
    generator: torch.Generator,
) -> tuple[Rows, Float[Tensor, "h f"], Float[Tensor, " h"], float | None]:
    """Rows, A, c for `Linear + act` of the block, and the relative error of its polynomial.

    Args:
        data: where an activation that is no polynomial is fitted; None for layer-normalised inputs.

    Raises:
        UnsuitableBlock: the block is gated.
        ValueError: the features cannot hold the bias or the polynomial.
    """
    if dense.gate is not None:
        raise UnsuitableBlock(
            f"layer {config.name!r} with from_weights=True does not take gated blocks: leave it out to fit"
        )
    if dense.up.bias is not None and not config.bias_slot:
        raise ValueError("bias_slot=False with from_weights=True leaves out the block's bias: use True")
    form = {"lowest": config.lowest_order, "sharing": config.sharing, "direct_linear": config.direct_linear}
    if config.activation == config.weight_activation == "identity":
        fit = pre_activation_polynomial(dense, config.order, data, generator=generator)
        return *unbiased_readout(dense.up, fit.coefficients, rows, **form), fit.error
    psi = FIXED_ACTIVATIONS[config.weight_activation]()
    weight, bias = kernel_readout(dense.up, rows, psi, order=config.order, **form)
    return rows, weight, bias, None


def unbiased_readout(
    up: nn.Linear,
    coefficients: Sequence[float],
    rows: Rows,
    *,
    lowest: int,
    sharing: str,
    direct_linear: bool,
) -> tuple[Rows, Float[Tensor, "h f"], Float[Tensor, " h"]]:
    """Scaled rows, A and c such that `E[A f(x) + c] = Σ a_i (W x + b)ⁱ` over the draw of the rows.

    Each factor of order i is scaled by `|a_i|^(1/2i) / (σ m^(1/2i))` on both sides, σ² being the
    entries' variance (1 for every kind of `random_rows`), and the side of the weights alone carries
    sign(a_i). Order 0 is the constant a_0; the norm slot of a weight is 0.

    Args:
        coefficients: `a_0 … a_k`; those of orders without features must be 0.
        rows: zero-mean with E[g gᵀ] = I, independent between groups, acting on x as it is.
        direct_linear: order 1 is x itself, so that its part of A is exact.

    Raises:
        ValueError: an order that the features leave out has a coefficient.
    """
    order = len(coefficients) - 1
    covered = {0, *([1] if direct_linear else []), *range(lowest, order + 1)}
    for i, a in enumerate(coefficients):
        if a and i not in covered:
            raise ValueError(f"min_order={lowest} leaves out order {i}, whose coefficient is {a:g}")
    scales = factor_scales(coefficients, rows, lowest=lowest, sharing=sharing)
    scaled = Rows(weight=rows.weight * scales[:, None], bias=rows.bias * scales, norm=rows.norm * scales)
    psi = product_features(_of_weights(up, scaled), order, lowest, sharing)
    signs = [float(a > 0) - float(a < 0) for a in coefficients[lowest:]]
    parts = [sign * part for sign, part in zip(signs, psi, strict=True)]
    weight, bias = _wide(up)
    constant = torch.full_like(bias, coefficients[0])
    if direct_linear:
        parts = [coefficients[1] * weight, *parts]
        constant = constant + coefficients[1] * bias
    return scaled, torch.cat(parts, dim=1), constant


def factor_scales(
    coefficients: Sequence[float], rows: Rows, *, lowest: int, sharing: str
) -> Float[Tensor, " p"]:
    """The scale of every row: the product over a feature's factors is √(|a_i|/m).

    Features of shared rows continue those of the order below, so that a factor brings the ratio of
    two orders' scales. An order without a coefficient is scaled as if it were 1; its sign is 0.
    """
    order = len(coefficients) - 1
    orders = range(1, order + 1) if sharing == "shared" else range(lowest, order + 1)
    groups = order if sharing == "shared" else sum(orders)
    m = len(rows.weight) // groups
    whole = {i: (abs(coefficients[i] or 1.0) / m) ** 0.5 for i in orders}
    if sharing == "shared":
        scales = [whole[i] / whole.get(i - 1, 1.0) for i in orders]
    else:
        scales = [whole[i] ** (1 / i) for i in orders for _ in range(i)]
    return torch.tensor(scales, dtype=torch.float64).repeat_interleave(m)


def kernel_readout(
    up: nn.Linear, rows: Rows, psi: nn.Module, *, order: int, lowest: int, sharing: str, direct_linear: bool
) -> tuple[Float[Tensor, "h f"], Float[Tensor, " h"]]:
    """`A = Ψ(φ(w))/m` and c = 0: the layer's mean is the kernel `Σ_i E[Ψ(φ_i(w)) Φ(φ_i(x))]`, as in SNNK.

    With Φ = Ψ = relu at order 1 that is the arc-cosine kernel. A direct linear part has weight 0.
    """
    features = product_features(_of_weights(up, rows), order, lowest, sharing)
    parts = [psi(part) / part.shape[1] for part in features]
    weight, bias = _wide(up)
    if direct_linear:
        parts = [torch.zeros_like(weight), *parts]
    return torch.cat(parts, dim=1), torch.zeros_like(bias)


def _of_weights(up: nn.Linear, rows: Rows) -> Float[Tensor, "h p"]:
    """G w⁺ for every neuron; its norm slot is 0, so the rows' norm entries play no part."""
    weight, bias = _wide(up)
    return weight @ rows.weight.to(weight).T + bias[:, None] * rows.bias.to(bias)


def _wide(up: nn.Linear) -> tuple[Float[Tensor, "h d"], Float[Tensor, " h"]]:
    weight = up.weight.detach().double()
    return weight, weight.new_zeros(len(weight)) if up.bias is None else up.bias.detach().double()
