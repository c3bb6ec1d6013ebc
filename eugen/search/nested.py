"""Sizes that nest: one Gram matrix of a block's neurons and inputs holds the least-squares fit of each.

`prune` solves for the k strongest neurons, `linear` for the inputs, and `ffsplit` over `linear` for both:
each is a principal submatrix of the same moments, so no size costs another pass over the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, FFNLayer
from eugen.layers.ffsplit import FFSplitConfig, SplitFFN, part_of
from eugen.layers.linear import LinearConfig
from eugen.layers.prune import PruneConfig
from eugen.least_squares import Moments
from eugen.parts.experts import copy_rows
from eugen.parts.neurons import neuron_scores, strongest
from eugen.search.calibration import Chunk


def nests(config: LayerConfig) -> bool:
    """Whether `NestedFits.fit` knows this configuration."""
    if isinstance(config, FFSplitConfig):
        return type(config.of) is LinearConfig
    return type(config) in (PruneConfig, LinearConfig)


class NestedFits:
    """Layers of one block fitted from one pass over its inputs and targets.

    Args:
        data: chunks `(x, target, token weight)`.
        output_weight: importance of each output dimension, which orders the neurons.
    """

    @torch.no_grad()
    def __init__(self, dense: DenseFFN, data: list[Chunk], output_weight: Tensor | None = None) -> None:
        self.dense = dense
        scores = neuron_scores(dense, data, output_weight)
        self.order = strongest(scores, len(scores))
        self.moments = Moments()
        for x, y, weight in data:
            self.moments.add(torch.cat([dense.features(x)[:, self.order], x], dim=1), y, weight)

    @torch.no_grad()
    def fit(self, config: LayerConfig) -> FFNLayer:
        """What `config.fit` makes of the same data."""
        dense, generator = self.dense, torch.Generator()
        layer = config.build(dense, generator=generator)
        if isinstance(layer, DenseFFN):
            kept = self.order[: layer.hidden_features]
            copy_rows(layer.up, dense.up, kept)
            if layer.gate is not None and dense.gate is not None:
                copy_rows(layer.gate, dense.gate, kept)
            neurons, inputs = layer.hidden_features, False
        elif isinstance(layer, SplitFFN):
            neurons, inputs = layer.heavy.hidden_features, True
            heavy = part_of(dense, self.order[:neurons], bias=False)
            layer = SplitFFN(heavy, layer.rest)
        else:
            neurons, inputs = 0, True
        layer.set_readout(*self._part(neurons, inputs).solve())
        return layer

    def _part(self, neurons: int, inputs: bool) -> Moments:
        last = torch.arange(len(self.order), len(self.order) + self.dense.in_features * inputs)
        return self.moments.part(torch.cat([torch.arange(neurons), last]))
