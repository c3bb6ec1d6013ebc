"""The block itself: the row that every other row is measured against, and the exactness check of surgery."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, TokenStream, copy_activation, new_linear


@dataclass(frozen=True, kw_only=True)
class DenseConfig(LayerConfig, name="dense"):
    """A copy of the block. Its budget is 1 by definition.

    Raises:
        ValueError: any other budget.
    """

    needs_calibration = False

    def __post_init__(self) -> None:
        if self.budget not in (None, 1):
            raise ValueError(f"budget={self.budget}: the dense block costs 1; use 'narrow' for a smaller one")

    @property
    def only_budget(self) -> float | None:
        return 1.0

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> DenseFFN:
        layer = new_block(dense, dense.hidden_features, whole=dense.down is not None, generator=generator)
        for built, own in zip(layer.children(), dense.children(), strict=True):
            if isinstance(own, torch.nn.Linear) and own.bias is None:
                built.register_parameter("bias", None)
        return layer

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> DenseFFN:
        return copy.deepcopy(dense)


def new_block(
    dense: DenseFFN, hidden_features: int, *, generator: torch.Generator, whole: bool = True
) -> DenseFFN:
    """A freshly initialised block of the same form with another number of neurons.

    Args:
        whole: with an output matrix, also where the block has none: a single feed-forward layer then
            becomes a narrow block onto its outputs.
    """
    like = dense.up.weight

    def linear(in_features: int, out_features: int) -> torch.nn.Linear:
        return new_linear(in_features, out_features, like=like, generator=generator)

    return DenseFFN(
        up=linear(dense.in_features, hidden_features),
        act=copy_activation(dense.act),
        down=linear(hidden_features, dense.out_features) if whole else None,
        gate=None if dense.gate is None else linear(dense.in_features, hidden_features),
    )


def hidden_for_budget(config: LayerConfig, dense: DenseFFN, given: int | None) -> int:
    """How many neurons of the block's own form the budget buys, or the number given."""
    return config.size_for(dense, dense.macs_per_neuron, unit="hidden_features", given=given)
