"""The contract of a layer-local training rule, and what the rules share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen.least_squares import Moments

Passes = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""The passes over the data; each is a sequence of batches `(x [B, …], labels [B])`, labels counted from 0."""

WARM_UP = 0.15
"""Part of the steps in which the learning rate rises; then it falls to 0 along a cosine."""


@dataclass(frozen=True, kw_only=True)
class LocalRule:
    """How to train. Subclass with `name=` in the class line to register a rule."""

    name: ClassVar[str] = ""
    registry: ClassVar[dict[str, type[LocalRule]]] = {}

    def __init_subclass__(cls, *, name: str) -> None:
        if name in LocalRule.registry:
            raise ValueError(f"rule name {name!r} is taken by {LocalRule.registry[name].__qualname__}")
        cls.name = name
        LocalRule.registry[name] = cls

    @abstractmethod
    def train(
        self, units: Sequence[nn.Module], head: nn.Linear, data: Passes, *, generator: torch.Generator
    ) -> None:
        """Train a network in place.

        Args:
            units: the network's parts in the order in which they are applied.
            head: takes the last unit's output.
            generator: for everything random; the global generator is not touched.

        Raises:
            ValueError: no unit, empty data, a label that the head has no output for, or NaN.
        """

    def require_positive(self, *fields: str) -> None:
        """Raise ValueError for a hyperparameter that is not a finite number above 0."""
        for field in fields:
            value = getattr(self, field)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field}={value} must be a finite number above 0")


class Learner:
    """Modules with an optimiser of their own (Adam); `step` moves nothing else.

    Args:
        learning_rate: the peak of the schedule.
    """

    def __init__(self, *modules: nn.Module, learning_rate: float) -> None:
        self.weights = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.learning_rate = learning_rate
        self.optimiser = torch.optim.Adam(self.weights, lr=learning_rate) if self.weights else None

    def step(self, loss: Tensor, progress: float) -> None:
        """One step down a loss, at a point of the training between 0 and 1.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        if not torch.isfinite(loss):
            raise FloatingPointError(f"a local loss became {loss.item()}: use a smaller learning_rate")
        if self.optimiser is None:
            return
        for group in self.optimiser.param_groups:
            group["lr"] = self.learning_rate * one_cycle(progress)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def one_cycle(progress: float) -> float:
    """The learning rate at a point of the training, relative to its peak."""
    if progress < WARM_UP:
        return (progress / WARM_UP) * 0.99 + 0.01
    return (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2


def batches(data: Passes, head: nn.Linear) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Every batch of every pass, checked, with its place in the training from 0 to 1.

    Raises:
        ValueError: an empty pass or batch, a label that the head has no output for, or NaN.
    """
    for number, batches_of_pass in enumerate(data):
        if len(batches_of_pass) == 0:
            raise ValueError(f"pass {number} of the training data is empty")
        for i, (x, labels) in enumerate(batches_of_pass):
            check_batch(x, labels, head.out_features)
            yield (number + i / len(batches_of_pass)) / len(data), x, labels


def check_batch(x: Tensor, labels: Tensor, classes: int) -> None:
    """Raise ValueError unless a batch can be learned from."""
    if len(x) == 0 or len(x) != len(labels):
        raise ValueError(f"a batch is empty or uneven: {len(x)} inputs and {len(labels)} labels")
    if not torch.isfinite(x).all():
        raise ValueError("the training inputs hold NaN or infinity")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise ValueError(f"labels from {least} to {most}: the head's classes are 0 to {classes - 1}")


def require_something(units: Sequence[nn.Module], data: Passes) -> None:
    """Raise ValueError where there is nothing to train, or nothing to learn from."""
    if len(units) == 0:
        raise ValueError("units is empty: give the network's parts in the order in which they are applied")
    if len(data) == 0:
        raise ValueError("the training data are empty: give at least one pass")


@torch.no_grad()
def solve(linear: nn.Linear, rows: Iterable[tuple[Tensor, Tensor]], ridge: float) -> None:
    """Give a linear map the weights of the ridge regression of targets `[N, out]` on inputs `[N, in]`."""
    moments = Moments()
    for a, target in rows:
        moments.add(a, target)
    weight, bias = moments.solve(ridge)
    linear.weight.copy_(weight)
    if linear.bias is not None:
        linear.bias.copy_(bias)


def solve_head(head: nn.Linear, rows: Iterable[tuple[Tensor, Tensor]], *, ridge: float) -> None:
    """Solve the head for one-hot labels, given the last unit's outputs `[N, in]` and the labels `[N]`."""
    solve(head, ((a, F.one_hot(labels, head.out_features).to(a.dtype)) for a, labels in rows), ridge)
