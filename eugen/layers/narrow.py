"""The control every reviewer asks for: the same block with fewer neurons, freshly initialised."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from eugen.config import LayerConfig
from eugen.ffn import DenseFFN
from eugen.layers.dense import hidden_for_budget, new_block


@dataclass(frozen=True, kw_only=True)
class NarrowConfig(LayerConfig, name="narrow"):
    """A narrower block. Transfer solves its output matrix; its neurons start at random.

    Args:
        hidden_features: number of neurons; None derives it from `budget`.
    """

    hidden_features: int | None = None

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> DenseFFN:
        hidden = hidden_for_budget(self, dense, self.hidden_features)
        return new_block(dense, hidden, generator=generator)
