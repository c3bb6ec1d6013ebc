"""Polynomials that stand in for an activation: least squares under given inputs, and Bernstein's.

Coefficients are in ascending order: `a[i]` belongs to `zⁱ`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen import parallel
from eugen.ffn import DenseFFN, TokenStream
from eugen.shapes import Float

QUANTILES = 256
"""Points at which a neuron's normal distribution is sampled where there are no data."""
TOKENS_PER_CHUNK = 128
NEURONS_PER_CHUNK = 256
"""How many pre-activations of a chunk are fitted: enough for a few coefficients, and little memory."""


class Polynomial(nn.Module):
    """The activation `Σ a_i zⁱ`.

    Args:
        coefficients: `a_0, a_1, …`, kept as a float64 buffer.

    Raises:
        ValueError: there is no coefficient, or one is not finite.
    """

    coefficients: Tensor

    def __init__(self, coefficients: Sequence[float]) -> None:
        super().__init__()
        values = [float(a) for a in coefficients]
        if not (values and all(map(math.isfinite, values))):
            raise ValueError(f"coefficients={values} must be finite numbers a_0, a_1, …: give at least one")
        self.register_buffer("coefficients", torch.tensor(values, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        coefficients = self.coefficients.to(z.dtype)
        result = torch.zeros_like(z) + coefficients[-1]
        for i in range(len(coefficients) - 2, -1, -1):
            result = result * z + coefficients[i]
        return result


@dataclass(frozen=True)
class PolynomialFit:
    """Coefficients `a_0 … a_k`, and the RMS error over the samples relative to the activation's RMS."""

    coefficients: tuple[float, ...]
    error: float


@torch.no_grad()
def fit_polynomial(
    act: Callable[[Tensor], Tensor],
    degree: int,
    samples: Tensor,
    weights: Tensor | None = None,
) -> PolynomialFit:
    """The polynomial of this degree with the least squared error under the samples (any shape).

    Args:
        weights: importance of each sample, of their shape; None for equal.

    Raises:
        ValueError: a negative degree, NaN or infinity among samples or values, or fewer samples than
            coefficients.
    """
    z = samples.detach().double().flatten()
    share = torch.ones_like(z) if weights is None else weights.detach().double().flatten()
    _check(degree, z, share)
    share = share / share.sum()
    mean = (share * z).sum()
    deviation = (share * (z - mean).square()).sum().sqrt()
    deviation = deviation if deviation > 0 else torch.ones_like(deviation)
    # Powers of the standardised samples: those of z itself are far worse conditioned.
    columns = torch.linalg.vander((z - mean) / deviation, N=degree + 1)
    own = copy.deepcopy(act).double() if isinstance(act, nn.Module) else act
    values = own(z.clone()).double()  # a clone: nn.ReLU(inplace=True) writes into what it is given
    if not torch.isfinite(values).all():
        raise ValueError("the activation is NaN or not finite at some samples: polynomials cannot follow it")
    root = share.sqrt()[:, None]
    solution = torch.linalg.lstsq(columns * root, values[:, None] * root).solution[:, 0]
    error = (share * (columns @ solution - values).square()).sum().sqrt()
    size = (share * values.square()).sum().sqrt()
    relative = float(error / size) if size > 0 else float(error)
    return PolynomialFit(_unshifted(solution.tolist(), float(mean), float(deviation)), relative)


def bernstein(act: Callable[[Tensor], Tensor], degree: int, low: float, high: float) -> tuple[float, ...]:
    """Coefficients of Bernstein's polynomial of an activation on `[low, high]`.

    `B_n(z) = Σ_k act(low + (high−low) k/n) C(n,k) u^k (1−u)^(n−k)`, `u = (z−low)/(high−low)`: it
    converges for every continuous activation, which the theorem needs, though slowly.

    Raises:
        ValueError: a degree below 1, or an empty interval.
    """
    if degree < 1:
        raise ValueError(f"degree={degree} must be at least 1 for a Bernstein polynomial")
    if not low < high:
        raise ValueError(f"low={low} must be below high={high}")
    nodes = low + (high - low) * torch.arange(degree + 1, dtype=torch.float64) / degree
    differences = act(nodes).detach().double()
    powers = []
    for i in range(degree + 1):  # the power form: C(n,i) times the i-th forward difference at the left end
        powers.append(math.comb(degree, i) * float(differences[0]))
        differences = differences.diff()
    return _unshifted(powers, low, high - low)


def pre_activation_polynomial(
    dense: DenseFFN, degree: int, data: TokenStream | None, *, generator: torch.Generator
) -> PolynomialFit:
    """Coefficients of a layer's activation: its own if it is a `Polynomial`, else a least-squares fit.

    The fit is under the layer's pre-activations on `data`; without data, inputs are taken to be
    layer-normalised (‖x‖² = d), so that `z_j ~ N(b_j, ‖w_j‖²)`.

    Raises:
        ValueError: the activation's own polynomial is of a higher degree.
    """
    if dense.up.weight.is_meta:  # no values to look at: any coefficients give the shape, and 0 fits any order
        return PolynomialFit((0.0,) * (degree + 1), 0.0)
    if isinstance(dense.act, Polynomial):
        own = dense.act.coefficients.tolist()
        highest = max((i for i, a in enumerate(own) if a), default=0)
        if highest > degree:
            raise ValueError(f"order={degree} is below the degree {highest} of the activation's polynomial")
        return PolynomialFit(tuple((own + [0.0] * degree)[: degree + 1]), 0.0)
    if data is None:
        return fit_polynomial(dense.act, degree, assumed_pre_activations(dense.up))
    return fit_polynomial(dense.act, degree, *calibrated_pre_activations(dense.up, data, generator))


@torch.no_grad()
def assumed_pre_activations(up: nn.Linear) -> Float[Tensor, "n h"]:
    """Quantiles of `N(b_j, ‖w_j‖²)` for each neuron j, float64."""
    steps = torch.arange(QUANTILES, dtype=torch.float64, device=up.weight.device)
    z = torch.special.ndtri((steps + 0.5) / QUANTILES)[:, None] * up.weight.double().norm(dim=1)
    return z if up.bias is None else z + up.bias.double()


@torch.no_grad()
def calibrated_pre_activations(
    up: nn.Linear, data: TokenStream, generator: torch.Generator
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Pre-activations of some tokens and neurons of every chunk, and each one's share of the weight.

    Raises:
        ValueError: the stream is empty.
    """
    samples, shares = [], []
    for x, _, weight in data:
        chosen = torch.randperm(len(x), generator=generator)[:TOKENS_PER_CHUNK].to(x.device)
        neurons = torch.randperm(up.out_features, generator=generator)[:NEURONS_PER_CHUNK].to(x.device)
        if not len(chosen):
            continue
        z = up(x[chosen])[:, neurons].double()
        token = z.new_ones(len(chosen)) if weight is None else weight[chosen].double()
        samples.append(z.flatten())
        shares.append((token * (len(x) / len(chosen))).repeat_interleave(len(neurons)))
    if not samples:
        raise ValueError("the calibration stream is empty: give at least one chunk of tokens")
    parallel.draw_alike(generator)  # processes with more chunks drew more
    return parallel.gathered(torch.cat(samples)), parallel.gathered(torch.cat(shares))


def _check(degree: int, z: Tensor, share: Tensor) -> None:
    if degree < 0:
        raise ValueError(f"degree={degree} must be at least 0")
    if share.shape != z.shape:
        raise ValueError(f"weights has {len(share)} entries for {len(z)} samples: give one for each")
    if len(z) <= degree:
        raise ValueError(f"samples has {len(z)} entries: degree={degree} needs at least {degree + 1}")
    if not (torch.isfinite(z).all() and torch.isfinite(share).all()):
        raise ValueError("samples or weights hold NaN or are not finite: check the calibration data")
    if not (share >= 0).all() or share.sum() <= 0:
        raise ValueError("weights must not be negative, and at least one must be positive")


def _unshifted(coefficients: list[float], shift: float, scale: float) -> tuple[float, ...]:
    """Coefficients in z of a polynomial given in `t = (z − shift)/scale`."""
    result = [0.0] * len(coefficients)
    for i, a in enumerate(coefficients):
        for j in range(i + 1):
            result[j] += a / scale**i * math.comb(i, j) * (-shift) ** (i - j)
    return tuple(result)
