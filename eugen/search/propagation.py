"""What one block's replacement does to the network's output, and how that follows from its own error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eugen.ffn import FFNLayer
from eugen.search.calibration import Call, as_dense_ran, first_tensor
from eugen.sites import FFNSite
from eugen.surgery import install

JUDGING_VALUES = 2**27
"""Of the dense network's outputs no further batches are held from so many values on: 512 MiB in float32."""
LEAST = 1e-12
"""Errors and effects below are taken for this: they have logarithms."""


class OutputChange:
    """The relative squared change of a network's output, Σ‖y' − y‖² / Σ‖y‖², over batches that no fit saw.

    The output is the first floating-point tensor of what the call returns.

    Raises:
        ValueError: the dense network's output is 0 or not finite.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[Any], call: Call) -> None:
        self.model, self.call = model, call
        self.batches: list[Any] = []
        self.outputs: list[Tensor] = []
        with as_dense_ran(model):
            for batch in batches:
                self.batches.append(batch)
                self.outputs.append(first_tensor(call(model, batch)))
                if sum(y.numel() for y in self.outputs) >= JUDGING_VALUES:
                    break
        self._size = sum(_squares(y) for y in self.outputs)
        if not (math.isfinite(self._size) and self._size > 0):
            raise ValueError("the model's output on held-out calibration data is 0 or not finite")

    def alone(self, site: FFNSite) -> Callable[[FFNLayer], float]:
        """A function of a layer: the change that it makes at this site of the otherwise dense network."""
        student = copy.deepcopy(self.model)

        @torch.no_grad()
        def change(layer: FFNLayer) -> float:
            trial = install(student, site, layer)
            total = 0.0
            with as_dense_ran(trial):
                for batch, dense in zip(self.batches, self.outputs, strict=True):
                    output = first_tensor(self.call(trial, batch))
                    total += _squares(output - dense)
            return total / self._size

        return change


class EffectMap:
    """From a block's local error to its effect on the output: monotone for the block, each method beside it.

    A small error of a block moves the output in proportion, however it came about; how far methods stray
    from that is their offset, interpolated between the sizes at which they were measured. All in logarithms.

    Args:
        measured: for each method its points `(local error, effect)`.
    """

    def __init__(self, measured: dict[str, list[tuple[float, float]]]) -> None:
        points = sorted((log_of(e), log_of(f)) for method in measured.values() for e, f in method)
        if not points:
            raise ValueError("no size of any candidate was measured")
        self._errors = [e for e, _ in points]
        self._effects = rising([f for _, f in points])
        self._offsets: dict[str, list[tuple[float, float]]] = {}
        for method, own in measured.items():
            logs = sorted((log_of(e), log_of(f)) for e, f in own)
            self._offsets[method] = [(e, f - self._common(e)) for e, f in logs]

    def __call__(self, method: str, error: float) -> float:
        """The effect expected of this method at this local error."""
        place, offset = log_of(error), 0.0
        own = self._offsets.get(method)
        if own:
            offset = interpolate(place, [e for e, _ in own], [o for _, o in own])
        return math.exp(self._common(place) + offset)

    def _common(self, place: float) -> float:
        """Beyond the measured errors the effect follows the error."""
        inside = min(max(place, self._errors[0]), self._errors[-1])
        return interpolate(inside, self._errors, self._effects) + place - inside


def _squares(values: Tensor) -> float:
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return float(wide.square().sum(dtype=torch.float64))


def rising(values: Sequence[float]) -> list[float]:
    """The closest sequence that never falls, by least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, others = pools.pop()
            mean, count = (before * others + mean * count) / (others + count), others + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def interpolate(place: float, at: Sequence[float], values: Sequence[float]) -> float:
    """Linear between the points, which rise; constant beyond them."""
    if place <= at[0]:
        return values[0]
    for left, right, low, high in zip(at, at[1:], values, values[1:], strict=False):
        if place <= right:
            return high if right == left else low + (high - low) * (place - left) / (right - left)
    return values[-1]


def log_of(value: float) -> float:
    """The logarithm of an error or effect, which may be 0."""
    return math.log(max(value, LEAST))
