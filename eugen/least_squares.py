"""Streaming, centred, standardised, weighted ridge regression.

Chunks are multiplied in float32 (or wider) and summed in float64, so that memory is that of
one chunk and one Gram matrix, whatever the number of tokens.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from eugen import parallel
from eugen.shapes import Float

RIDGE = 1e-4
"""Relative ridge (on standardised features) with enough tokens; the result is flat from 1e-6 to 1e-3."""
RIDGE_FEW_TOKENS = 1e-1
"""Relative ridge below `FEW_TOKENS_PER_FEATURE` tokens per feature."""
FEW_TOKENS_PER_FEATURE = 2
HELD_OUT = 8
"""One token in so many, at the end of each chunk, is held out to judge a fit."""


class Moments:
    """Weighted first and second moments of features and targets, accumulated chunk by chunk.

    Features are shifted and scaled by the first chunk's mean and deviation before the products,
    and targets shifted, which keeps float32 accurate for values far from zero. Several processes
    (`eugen.parallel`) take those of the first one, and `totals` are the sums over all of them.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._empty = True

    def add(
        self,
        features: Float[Tensor, "t f"],
        target: Float[Tensor, "t d"],
        weight: Float[Tensor, " t"] | None = None,
    ) -> None:
        """Add one chunk; `weight` is each token's weight in the error, None for equal."""
        wide = torch.promote_types(features.dtype, torch.float32)
        features, target = features.detach().to(wide), target.detach().to(wide)
        if self._empty:
            self._start(features, target)
        features = (features - self._shift.to(wide)) / self._scale.to(wide)
        target = target - self._target_shift.to(wide)
        weighted = features if weight is None else features * weight.to(wide)[:, None]
        self.tokens += len(features)
        self._weight += len(features) if weight is None else weight.double().sum()
        self._gram += (features.T @ weighted).double()
        self._cross += (weighted.T @ target).double()
        self._feature_sum += weighted.sum(0, dtype=torch.float64)
        weighted_target = target if weight is None else target * weight.to(wide)[:, None]
        self._target_sum += weighted_target.sum(0, dtype=torch.float64)

    def _start(self, features: Tensor, target: Tensor) -> None:
        double = {"dtype": torch.float64, "device": features.device}
        n_features, n_targets = features.shape[1], target.shape[1]
        tokens = max(1, len(features))
        mean, target_mean = (t.sum(0, dtype=torch.float64) / tokens for t in (features, target))
        deviation = ((features.double() - mean).square().sum(0) / tokens).sqrt()
        count, self._shift, self._target_shift, deviation = parallel.from_first(
            torch.tensor(len(features)), mean, target_mean, deviation
        )
        if not count:
            raise ValueError("the first chunk of the stream holds no token")
        self._scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        self._weight = torch.zeros((), **double)
        self._gram = torch.zeros(n_features, n_features, **double)
        self._cross = torch.zeros(n_features, n_targets, **double)
        self._feature_sum = torch.zeros(n_features, **double)
        self._target_sum = torch.zeros(n_targets, **double)
        self._empty = False

    def totals(self) -> tuple[int, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Sums over all chunks, of all processes, in float64; features and targets shifted and scaled.

        Tokens; their weight; `Σ ω f fᵀ [f, f]`; `Σ ω f yᵀ [f, d]`; `Σ ω f [f]`; `Σ ω y [d]`.
        """
        tokens, *sums = parallel.total(
            torch.tensor(self.tokens),
            self._weight,
            self._gram,
            self._cross,
            self._feature_sum,
            self._target_sum,
        )
        total, gram, cross, feature_sum, target_sum = sums
        return int(tokens), total, gram, cross, feature_sum, target_sum

    def solve(self, ridge: float | None = None) -> tuple[Float[Tensor, "d f"], Float[Tensor, " d"]]:
        """Weight and bias, in float64, that minimise the weighted squared error.

        Args:
            ridge: relative to the standardised features' unit variance; by default `RIDGE`, or
                `RIDGE_FEW_TOKENS` where tokens are scarce. Features without variance get weight 0.

        Raises:
            ValueError: no token was added, the weights sum to 0, or a moment is NaN or infinite.
        """
        if self._empty:
            raise ValueError("the calibration stream is empty: give at least one chunk of tokens")
        tokens, total, gram, cross, feature_sum, target_sum = self.totals()
        if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
            raise ValueError(
                "features or targets hold NaN or infinity: check the calibration data and the model"
            )
        if total <= 0:
            raise ValueError("the token weights sum to 0")
        if ridge is None:
            ridge = RIDGE if tokens >= FEW_TOKENS_PER_FEATURE * len(gram) else RIDGE_FEW_TOKENS
        mean, target_mean = feature_sum / total, target_sum / total
        covariance = gram / total - torch.outer(mean, mean)
        variance = covariance.diagonal().clamp(min=0)
        alive = variance > 1e-10
        deviation = torch.where(alive, variance.sqrt(), torch.ones_like(variance))
        correlation = covariance / torch.outer(deviation, deviation)
        cross = (cross / total - torch.outer(mean, target_mean)) / deviation[:, None]
        cross = torch.where(alive[:, None], cross, torch.zeros_like(cross))
        weight = (_solve_positive(correlation, cross, ridge) / (deviation * self._scale)[:, None]).T
        bias = target_mean + self._target_shift - weight @ (mean * self._scale + self._shift)
        return weight.contiguous(), bias

    def part(self, columns: Tensor) -> Moments:
        """The moments of some of the features alone, by their numbers: what a stream of these would give."""
        chosen = copy.copy(self)
        chosen._gram = self._gram[columns][:, columns]
        for name in ("_shift", "_scale", "_cross", "_feature_sum"):
            setattr(chosen, name, getattr(self, name)[columns])
        return chosen

    def mapped(self, matrix: Float[Tensor, "g f"]) -> Moments:
        """The moments of linear maps of the features, `features @ matrix.T`, with the same targets."""
        chosen = copy.copy(self)
        scaled = matrix.double() * self._scale
        chosen._shift, chosen._scale = matrix.double() @ self._shift, self._scale.new_ones(len(matrix))
        chosen._gram = scaled @ self._gram @ scaled.T
        chosen._cross, chosen._feature_sum = scaled @ self._cross, scaled @ self._feature_sum
        return chosen

    def between(self, columns: Tensor, targets: Tensor) -> Moments:
        """The moments of some features with others of them as the targets, all by their numbers."""
        chosen = self.part(columns)
        scale = self._scale[targets]
        chosen._cross = self._gram[columns][:, targets] * scale
        chosen._target_shift, chosen._target_sum = self._shift[targets], self._feature_sum[targets] * scale
        return chosen

    def covariance(self) -> tuple[Float[Tensor, " f"], Float[Tensor, "f f"]]:
        """Weighted mean and covariance of the features as they came."""
        _, total, gram, _, feature_sum, _ = self.totals()
        mean = feature_sum / total
        covariance = (gram / total - torch.outer(mean, mean)) * torch.outer(self._scale, self._scale)
        return mean * self._scale + self._shift, covariance


def _solve_positive(matrix: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve `(matrix + ridge·I) z = right`, raising the ridge until the Cholesky factor exists."""
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(12):
        factor, failed = torch.linalg.cholesky_ex(matrix + ridge * identity)
        if not failed:
            return torch.cholesky_solve(right, factor)
        ridge *= 10
    raise ValueError("the Gram matrix is not positive definite: the features are degenerate")


def ridge(
    stream: Iterable[tuple[Tensor, Tensor, Tensor | None]], *, ridge: float | None = None
) -> tuple[Float[Tensor, "d f"], Float[Tensor, " d"]]:
    """Weight and bias of the best linear map from features to targets over a stream of chunks."""
    moments = Moments()
    with torch.no_grad():
        for features, target, weight in stream:
            moments.add(features, target, weight)
    return moments.solve(ridge)


class ErrorMeter:
    """Weighted R² of predictions over a stream, of all processes: 1 − Σω‖D^½(y−ŷ)‖² / Σω‖D^½(y−ȳ)‖²."""

    def __init__(self, output_weight: Float[Tensor, " d"] | None = None) -> None:
        self._output_weight = output_weight
        self._error = self._weight = torch.zeros((), dtype=torch.float64)
        self._sum = self._square = torch.zeros((), dtype=torch.float64)

    def add(self, prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> None:
        """Add one chunk of predictions and targets, `[T, d]` both, and token weights `[T]`."""
        token = (torch.ones(len(target), device=target.device) if weight is None else weight).double()[
            :, None
        ]
        target, prediction = target.double(), prediction.double()
        self._error = self._error + (token * (target - prediction).square()).sum(0)
        self._sum = self._sum + (token * target).sum(0)
        self._square = self._square + (token * target.square()).sum(0)
        self._weight = self._weight + token.sum()

    def r2(self) -> float:
        """The R² so far; NaN if the targets do not vary."""
        error, weight, total, square = parallel.total(self._error, self._weight, self._sum, self._square)
        spread = square - total.square() / weight
        if self._output_weight is not None:
            importance = self._output_weight.double()
            spread, error, square = spread * importance, error * importance, square * importance
        if spread.sum() <= 1e-14 * square.sum():  # what rounding leaves of equal targets
            return math.nan
        return float(1 - error.sum() / spread.sum())


def fit_quality(
    layer: Callable[[Tensor], Tensor],
    data: Iterable[tuple[Tensor, Tensor, Tensor | None]],
    output_weight: Float[Tensor, " d"] | None = None,
) -> float:
    """Weighted R² of a layer over a stream of `(x, target, token weight)`."""
    meter = ErrorMeter(output_weight)
    with torch.no_grad():
        for x, y, weight in data:
            meter.add(layer(x), y, weight)
    return meter.r2()
