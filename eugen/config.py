"""The contract of a configuration: what to build, how to fit it, and what it may cost.

A layer is two things, a frozen configuration and a module (`eugen.ffn.FFNLayer`). The configuration's
type selects the method; its `budget` is the fraction of the dense block's inference MACs that the
layer may use.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from eugen.ffn import DenseFFN, FFNLayer, TokenStream
from eugen.refine import refine
from eugen.shapes import Float

ALIGNED = 8
"""Sizes that a budget decides are multiples of this: products of odd widths are slower."""
LEAST_KEPT = 0.98
"""Unless that would give away more than 2 % of the size."""


class UnsuitableBlock(ValueError):
    """A method cannot take this form of block (gated, without output matrix) at any size."""


class BudgetTooSmall(ValueError):
    """A budget buys not one unit of a method on this block.

    Args:
        budget: the one asked for.
        row: the method and the block, in words.
        least: the smallest that buys one, rounded up to a thousandth.
    """

    def __init__(self, budget: float | None, row: str, least: float) -> None:
        self.least = math.ceil(1000 * least - 1e-9) / 1000
        super().__init__(f"budget={budget} is too small for {row}: the least is {self.least:.3f}")


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What to build. Subclass with `name=` in the class line to register a method.

    Args:
        budget: fraction of the dense block's inference MACs, in (0, 1]; the layer never exceeds it.
            None where the configuration names its sizes itself.

    Raises:
        ValueError: a budget outside (0, 1].
    """

    budget: float | None = None
    name: ClassVar[str] = ""
    needs_calibration: ClassVar[bool] = True
    """Whether `fit` reads its stream; without, `replace` spares the forward passes."""
    registry: ClassVar[dict[str, type[LayerConfig]]] = {}

    def __init_subclass__(cls, *, name: str | None = None) -> None:
        if name is None:
            return
        if name in LayerConfig.registry:
            raise ValueError(f"layer name {name!r} is taken by {LayerConfig.registry[name].__qualname__}")
        cls.name = name
        LayerConfig.registry[name] = cls

    @property
    def only_budget(self) -> float | None:
        """The one budget at which this configuration makes sense, None where any will do."""
        return None

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise ValueError(f"budget={self.budget} must be in (0, 1]: a fraction of the dense block's MACs")

    @abstractmethod
    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> FFNLayer:
        """An untrained layer of the block's shape, on its device and in its dtype."""

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Float[Tensor, " d_out"] | None = None,
    ) -> FFNLayer:
        """A layer fitted in closed form to a re-iterable stream: by default the readout alone.

        Args:
            output_weight: importance of each output dimension in the error, None for equal.
        """
        layer = self.build(dense, generator=generator)
        layer.fit_readout(data)
        return layer

    def refine(
        self,
        layer: FFNLayer,
        dense: DenseFFN,
        data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        steps: int,
        generator: torch.Generator,
        output_weight: Float[Tensor, " d_out"] | None = None,
    ) -> FFNLayer:
        """A fitted layer after so many steps of local training; override to train in another way."""
        return refine(layer, data, steps=steps, generator=generator, output_weight=output_weight)

    def fit_and_refine(
        self,
        dense: DenseFFN,
        data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        steps: int,
        judge: Callable[[FFNLayer], float],
        generator: torch.Generator,
        output_weight: Float[Tensor, " d_out"] | None = None,
    ) -> FFNLayer:
        """`fit`, then `refine` for so many steps, kept only where `judge` (higher is better) prefers it."""
        layer = self.fit(dense, data, generator=generator, output_weight=output_weight)
        if not steps or not any(p.requires_grad for p in layer.parameters()):
            return layer
        refined = self.refine(
            layer, dense, data, steps=steps, generator=generator, output_weight=output_weight
        )
        return refined if judge(refined) > judge(layer) else layer

    def size_for(
        self, dense: DenseFFN, per_unit: int, fixed: int = 0, *, unit: str, given: int | None = None
    ) -> int:
        """The number of units whose MACs, `fixed + units·per_unit`, come closest to the budget from below.

        A large number is a multiple of 8, for the speed of the products.

        Args:
            given: the number that the configuration names itself, taken if it is within the budget.

        Raises:
            ValueError: neither a budget nor a size was given, or the size is below 1 or beyond the budget.
            BudgetTooSmall: the budget buys no unit.
        """
        if given is not None and given < 1:
            raise ValueError(f"{unit}={given} must be at least 1")
        if self.budget is None:
            if given is None:
                raise ValueError(f"{type(self).__name__} needs budget= or an explicit {unit}=")
            return given
        allowed = math.floor(self.budget * dense.macs_per_token + 1e-9)
        if given is not None:
            if fixed + given * per_unit > allowed:
                raise ValueError(f"{unit}={given} is beyond budget={self.budget}: give only one of them")
            return given
        units = (allowed - fixed) // per_unit
        if units < 1:
            block = f"{dense.in_features}→{dense.hidden_features}→{dense.out_features}"
            least = (fixed + per_unit) / dense.macs_per_token
            raise BudgetTooSmall(self.budget, f"{self.name!r} on this block ({block})", least)
        aligned = units - units % ALIGNED
        return aligned if aligned >= LEAST_KEPT * units else units

    def require_ungated(self, dense: DenseFFN) -> None:
        """Raise UnsuitableBlock for a gated block, naming the rows that take one."""
        if dense.gate is not None:
            raise UnsuitableBlock(
                f"layer {self.name!r} does not take gated blocks; use 'linear', 'narrow' or 'prune'"
            )

    def require_plain_block(self, dense: DenseFFN) -> nn.Linear:
        """The block's output matrix.

        Raises:
            UnsuitableBlock: the block is gated or has no output matrix.
        """
        self.require_ungated(dense)
        return self.require_down(dense)

    def require_down(self, dense: DenseFFN) -> nn.Linear:
        """The block's output matrix.

        Raises:
            UnsuitableBlock: the block has none.
        """
        if dense.down is None:
            raise UnsuitableBlock(
                f"layer {self.name!r} replaces whole blocks; this one has no output matrix (down=None)"
            )
        return dense.down
