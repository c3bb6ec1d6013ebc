"""Ridge regression with one weight matrix and an intercept of its own for each group of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from eugen import least_squares, parallel
from eugen.shapes import Float

GroupedStream = Iterable[tuple[Tensor, Tensor, "Tensor | None", Tensor]]
"""Chunks `(features [T, f], target [T, out], weight [T] or None, group [T])`."""


@torch.no_grad()
def ridge_with_intercepts(
    stream: Callable[[], GroupedStream], groups: int
) -> tuple[Float[Tensor, "d f"], Float[Tensor, "g d"]]:
    """Weight and the groups' biases; a group without tokens gets the mean of the targets.

    Features and targets are centred group by group, which takes the intercepts out of the ridge.

    Args:
        stream: gives the same chunks at every call; it is called twice.

    Raises:
        ValueError: as `Moments.solve`.
    """
    count, feature_mean, target_mean = _means(stream(), groups)

    def centred() -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        for features, target, weight, group in stream():
            wide = torch.promote_types(features.dtype, torch.float32)
            yield (
                features.to(wide) - feature_mean[group].to(wide),
                target.to(wide) - target_mean[group].to(wide),
                weight,
            )

    weight, rest = least_squares.ridge(centred())
    overall = (count[:, None] * target_mean).sum(0) / count.sum()
    bias = target_mean + rest - feature_mean @ weight.T
    return weight, torch.where(count[:, None] > 0, bias, overall)


def _means(stream: GroupedStream, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight `[g]`, mean features `[g, f]` and mean target `[g, out]` of each group, float64."""
    count = features_sum = target_sum = torch.zeros((), dtype=torch.float64)
    for features, target, weight, group in stream:
        member = F.one_hot(group, groups).double().T
        member = member if weight is None else member * weight.double()
        count = count + member.sum(1)
        features_sum = features_sum + member @ features.double()
        target_sum = target_sum + member @ target.double()
    if count.ndim == 0:
        raise ValueError("the calibration stream is empty: give at least one chunk of tokens")
    count, features_sum, target_sum = parallel.total(count, features_sum, target_sum)
    least = count.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return count, features_sum / least, target_sum / least
