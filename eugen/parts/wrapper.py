"""Rows that hold another row and change its precision."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eugen.config import LayerConfig, UnsuitableBlock
from eugen.ffn import DenseFFN, FFNLayer, TokenStream
from eugen.shapes import Float


class WrappedFFN(FFNLayer):
    """Another layer in lower precision. It is fitted before it is wrapped, and has no readout to solve."""

    def __init__(self, inner: FFNLayer) -> None:
        super().__init__()
        self.inner, self.readout = inner, None
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.inner.reference(x)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.inner(x)

    @property
    def macs_per_token(self) -> int:
        return self.inner.macs_per_token

    @property
    def num_features(self) -> int:
        return self.inner.num_features


@dataclass(frozen=True, kw_only=True)
class WrapperConfig(LayerConfig):
    """A row over another row. It is fitted and refined in full precision, then wrapped.

    Args:
        budget: the inner row's budget, unless `of` names one itself.
        of: the inner row's configuration.

    Raises:
        ValueError: what the inner configuration refuses, or two different budgets.
    """

    of: LayerConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.of.budget not in (None, self.budget):
            raise ValueError(
                f"budget={self.budget} differs from of.budget={self.of.budget}: give one of them"
            )
        _ = self.inner  # it may refuse the budget

    @property
    def inner(self) -> LayerConfig:
        """The inner row's configuration at this budget."""
        return self.of if self.budget is None else replace(self.of, budget=self.budget)

    @property
    def only_budget(self) -> float | None:
        return self.inner.only_budget

    @property
    def needs_calibration(self) -> bool:
        return self.inner.needs_calibration

    @abstractmethod
    def wrap(self, layer: FFNLayer) -> FFNLayer:
        """A layer of its own with the same function in this precision; the one given is left as it was."""

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> FFNLayer:
        with self._refusing():
            return self.wrap(self.inner.build(dense, generator=generator))

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> FFNLayer:
        with self._refusing():
            return self.wrap(self.inner.fit(dense, data, generator=generator, output_weight=output_weight))

    def fit_and_refine(
        self,
        dense: DenseFFN,
        data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        steps: int,
        judge: Callable[[FFNLayer], float],
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> FFNLayer:
        with self._refusing():
            inner = self.inner.fit_and_refine(
                dense, data, steps=steps, judge=judge, generator=generator, output_weight=output_weight
            )
            return self.wrap(inner)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except UnsuitableBlock as error:
            raise UnsuitableBlock(f"layer {self.name!r}: {error}") from error
