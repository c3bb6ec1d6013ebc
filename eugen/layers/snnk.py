"""Scalable Neural Network Kernels: the weights act on random features of the input (ICLR 2024, 4iPw1klFWa).

`y = A f(x) + c` with ReLU features, `f(x) = relu(G x + g)`, or universal random features (URF), the real
pair `f(x) = [cos(Ω x) ; sin(Ω x)]`. A is fitted, or, for an activation with a Fourier transform, computed
from the weights so that the layer is an unbiased estimate of the block (section 3 of the paper).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen import parallel
from eugen.config import LayerConfig
from eugen.features import RANDOM_PROJECTIONS, draw_projection, input_rms, random_rows
from eugen.ffn import DenseFFN, FFNLayer, TokenStream, linear_of_parts, new_linear
from eugen.least_squares import HELD_OUT, fit_quality
from eugen.shapes import Float

FEATURES = ("relu", "urf")
FREQUENCY_SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Candidates for the spread of Ω x, in units of the dense layer's root mean square pre-activation."""


class FourierActivation(nn.Module):
    """An activation `act(z) = E[a·cos(ξz) + b·sin(ξz)]`: its Fourier transform is a finite measure.

    Subclass it with `forward` and `spectrum` to make an activation known to `from_weights=True`.
    """

    @abstractmethod
    def spectrum(self, count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Independent draws of ξ with their a and b, `[count]` each, float64, on the CPU."""


class Cosine(FourierActivation):
    """cos z: the frequency 1."""

    def forward(self, z: Tensor) -> Tensor:
        return z.cos()

    def spectrum(self, count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones(count, dtype=torch.float64)
        return one, one, 0 * one


class Sine(FourierActivation):
    """sin z: the frequency 1."""

    def forward(self, z: Tensor) -> Tensor:
        return z.sin()

    def spectrum(self, count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones(count, dtype=torch.float64)
        return one, 0 * one, one


class Gaussian(FourierActivation):
    """exp(−z²/2): standard normal frequencies."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.exp(-0.5 * z.square())

    def spectrum(self, count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.ones(count, dtype=torch.float64)
        return torch.randn(count, generator=generator, dtype=torch.float64), one, 0 * one


class SNNK(FFNLayer):
    """A linear map of element-wise functions of one projection."""

    readout: nn.Linear

    def __init__(self, projection: nn.Linear, readout: nn.Linear) -> None:
        super().__init__()
        self.projection, self.readout = projection, readout
        self.in_features, self.out_features = projection.in_features, readout.out_features

    @property
    def macs_per_token(self) -> int:
        return self.projection.out_features * self.in_features + self.readout.in_features * self.out_features


class ReluSNNK(SNNK):
    """`y = A relu(G [x ; 1]) / √m + c`."""

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch m"]:
        return F.relu(self.projection(x)) * (1 / math.sqrt(self.projection.out_features))


class FourierSNNK(SNNK):
    """`y = A [cos(Ω x) ; sin(Ω x)] / √m + c`.

    A fitted layer computes `1 − cos`, as `2 sin²(Ω x / 2)`, and has A's sign and c absorb the rest: at small
    angles all digits of the cosine are in the 1. The unbiased estimate multiplies both functions of row j by
    `exp(growth_j·‖x‖²)`, growth `[m]`, which nothing absorbs.
    """

    growth: Tensor | None

    def __init__(self, projection: nn.Linear, readout: nn.Linear, growth: Tensor | None = None) -> None:
        super().__init__(projection, readout)
        self.register_buffer("growth", growth)

    def _parts(self, x: Float[Tensor, "*batch d_in"]) -> list[Float[Tensor, "*batch m"]]:
        angle, scale = self.projection(x), 1 / math.sqrt(self.projection.out_features)
        if self.growth is None:
            return [(angle / 2).sin().square() * (2 * scale), angle.sin() * scale]
        size = torch.exp(x.square().sum(-1, keepdim=True) * self.growth) * scale
        return [angle.cos() * size, angle.sin() * size]

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch f"]:
        return torch.cat(self._parts(x), dim=-1)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        y = linear_of_parts(self.readout, self._parts(x.reshape(-1, self.in_features)))
        return y.reshape(*x.shape[:-1], self.out_features)


@dataclass(frozen=True, kw_only=True)
class SNNKConfig(LayerConfig, name="snnk"):
    """SNNK of the whole block, its output matrix folded in.

    Args:
        num_features: m, rows of the projection, each a product with x. A row gives one ReLU feature, or
            two URF features, cosine and sine: m(d + l) and m(d + 2l) MACs. None derives it from `budget`.
        projection: one of `eugen.features.RANDOM_PROJECTIONS`.
        features: `relu` or `urf`.
        frequency_scale: spread of the URF angles Ω x in units of the dense layer's root mean square
            pre-activation; None takes the one of `FREQUENCY_SCALES` with the least held-out error.
        from_weights: compute A from the block's weights instead of fitting it; calibration then only tells
            the inputs' size. For small ‖w‖‖x‖: the variance grows with its exponential.

    Raises:
        ValueError: an unknown option, or options that contradict each other.
    """

    num_features: int | None = None
    projection: str = "gaussian"
    features: str = "relu"
    frequency_scale: float | None = None
    from_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.features not in FEATURES:
            raise ValueError(f"features={self.features!r} is unknown: use one of {', '.join(FEATURES)}")
        if self.projection not in RANDOM_PROJECTIONS:
            raise ValueError(
                f"projection={self.projection!r} is unknown: use one of {', '.join(RANDOM_PROJECTIONS)}"
            )
        if self.features == "relu" and (self.from_weights or self.frequency_scale is not None):
            raise ValueError("frequency_scale= and from_weights=True belong to features='urf'")
        if self.from_weights and self.frequency_scale is not None:
            raise ValueError("from_weights=True has frequencies of its own: leave frequency_scale=None")
        if self.from_weights and self.projection not in ("gaussian", "orthogonal_chi"):
            raise ValueError(
                f"from_weights=True needs normally distributed rows: projection='gaussian' or "
                f"'orthogonal_chi', not {self.projection!r}"
            )
        if self.frequency_scale is not None and not 0 < self.frequency_scale < math.inf:
            raise ValueError(f"frequency_scale={self.frequency_scale} must be positive and finite")

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> SNNK:
        # Without data, inputs are taken to be layer-normalised, ‖x‖² = d, and pre-activations of size 1.
        rms = math.sqrt(dense.in_features)
        if self.from_weights:
            return self._estimate(dense, rms, generator)
        if self.features == "relu":
            return self._relu(dense, rms, generator)
        rows = random_rows(self.projection, self._units(dense), dense.in_features, generator=generator)
        return self._fourier(dense, rows * ((self.frequency_scale or 1) / rms), generator)

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> SNNK:
        rms = input_rms(data)
        if self.from_weights:
            return self._estimate(dense, rms, generator)
        if self.features == "relu":
            layer = self._relu(dense, rms, generator)
        else:
            rows = random_rows(self.projection, self._units(dense), dense.in_features, generator=generator)
            rows = rows * (preactivation_rms(dense, data) / rms)
            scales = FREQUENCY_SCALES if self.frequency_scale is None else (self.frequency_scale,)
            layers = [self._fourier(dense, rows * scale, generator) for scale in scales]
            layer = layers[0] if len(layers) == 1 else _best_on_held_out(layers, data, output_weight)
        layer.fit_readout(data)
        return layer

    def _units(self, dense: DenseFFN) -> int:
        per_feature = dense.in_features + dense.out_features * (1 if self.features == "relu" else 2)
        return self.size_for(dense, per_feature, unit="num_features", given=self.num_features)

    def _relu(self, dense: DenseFFN, rms: float, generator: torch.Generator) -> ReluSNNK:
        d, m, like = dense.in_features, self._units(dense), dense.up.weight
        layer = ReluSNNK(
            new_linear(d, m, like=like, generator=generator),
            new_linear(m, dense.out_features, like=like, generator=generator),
        )
        rows = draw_projection(self.projection, 1, m, d, input_rms=rms, generator=generator)
        with torch.no_grad():
            layer.projection.weight.copy_(rows.weight)
            layer.projection.bias.copy_(rows.bias)
        return layer

    def _fourier(
        self, dense: DenseFFN, rows: Tensor, generator: torch.Generator, growth: Tensor | None = None
    ) -> FourierSNNK:
        d, m, like = dense.in_features, len(rows), dense.up.weight
        layer = FourierSNNK(
            new_linear(d, m, like=like, generator=generator, bias=False),
            new_linear(2 * m, dense.out_features, like=like, generator=generator),
            growth if growth is None else growth.to(like.dtype),
        )
        with torch.no_grad():
            layer.projection.weight.copy_(rows)
        return layer

    @torch.no_grad()
    def _estimate(self, dense: DenseFFN, rms: float, generator: torch.Generator) -> FourierSNNK:
        """The unbiased estimate of the block: per row a frequency ξ and a Gaussian direction g.

        `e^{iξw·x} = E_g[e^{ir g·x} e^{s g·w}] e^{(r²‖x‖² − s²‖w‖²)/2}` wherever rs = ξ; the variance is
        least where both sides are alike, `r‖x‖ = s‖w‖`, here for the root mean square norms.
        """
        self.require_ungated(dense)
        if not isinstance(dense.act, FourierActivation):
            raise ValueError(
                f"from_weights=True needs an activation with a Fourier transform, not {dense.act}: use "
                "Cosine, Sine or Gaussian, subclass FourierActivation, or fit with from_weights=False"
            )
        m, weight = self._units(dense), dense.up.weight.double()
        frequency, a, b = (t.to(weight) for t in dense.act.spectrum(m, generator=generator))
        rows = random_rows(self.projection, m, dense.in_features, generator=generator).to(weight)
        row_rms = weight.square().sum(1).mean().sqrt().clamp(min=1e-30)
        r = frequency.sign() * (frequency.abs() * row_rms / rms).sqrt()
        s = (frequency.abs() * rms / row_rms).sqrt()
        size = torch.exp((weight @ rows.T) * s - weight.square().sum(1)[:, None] * s.square() / 2)
        size = size / math.sqrt(m)  # the features have the other 1/√m
        phase = 0 * size if dense.up.bias is None else dense.up.bias.double()[:, None] * frequency
        cos, sin = a * phase.cos() + b * phase.sin(), b * phase.cos() - a * phase.sin()
        readout = torch.cat([size * cos, size * sin], dim=1)
        readout = readout if dense.down is None else dense.down.weight.double() @ readout
        constant = None if dense.down is None else dense.down.bias
        layer = self._fourier(dense, rows * r[:, None], generator, growth=r.square() / 2)
        layer.set_readout(readout, 0 * readout[:, 0] if constant is None else constant)
        return layer


@torch.no_grad()
def preactivation_rms(dense: DenseFFN, data: TokenStream) -> float:
    """Root mean square of what the activation is given, over tokens and neurons; 1 if all of it is 0."""
    total, count = 0.0, 0
    for x, _, _ in data:
        z = (dense.up if dense.gate is None else dense.gate)(x)
        total, count = total + float(z.double().square().sum()), count + z.numel()
    total, count = parallel.total_of(total, count)
    return math.sqrt(total / max(1, count)) or 1.0


def _best_on_held_out(
    layers: list[FourierSNNK], data: TokenStream, output_weight: Tensor | None
) -> FourierSNNK:
    """The layer with the least error on the end of each chunk, fitted to what stands before it."""
    best, highest = layers[0], -math.inf
    for layer in layers:
        layer.fit_readout(_Cut(data, held_out=False))
        quality = fit_quality(layer, _Cut(data, held_out=True), output_weight)
        if quality > highest:
            best, highest = layer, quality
    return best


@dataclass(frozen=True)
class _Cut:
    """One side of each chunk of a stream: the last of `HELD_OUT` parts, or what stands before it."""

    data: TokenStream
    held_out: bool

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for x, y, weight in self.data:
            cut = len(x) - len(x) // HELD_OUT
            side = slice(cut, None) if self.held_out else slice(cut)
            yield x[side], y[side], None if weight is None else weight[side]
