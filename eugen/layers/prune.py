"""Structured pruning: keep the neurons that matter to the output, refit the output matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, TokenStream
from eugen.layers.dense import hidden_for_budget, new_block
from eugen.parts.experts import copy_rows
from eugen.parts.neurons import neuron_scores, strongest


@dataclass(frozen=True, kw_only=True)
class PruneConfig(LayerConfig, name="prune"):
    """Keeps the neurons with the largest `var(h_j)·‖γ∘W2[:, j]‖²`; W2 by least squares.

    Args:
        hidden_features: number of neurons kept; None derives it from `budget`.
    """

    hidden_features: int | None = None

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> DenseFFN:
        hidden = hidden_for_budget(self, dense, self.hidden_features)
        return new_block(dense, hidden, generator=generator)

    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> DenseFFN:
        layer = self.build(dense, generator=generator)
        kept = strongest(neuron_scores(dense, data, output_weight), layer.hidden_features)
        copy_rows(layer.up, dense.up, kept)
        if layer.gate is not None and dense.gate is not None:
            copy_rows(layer.gate, dense.gate, kept)
        layer.fit_readout(data)
        return layer
