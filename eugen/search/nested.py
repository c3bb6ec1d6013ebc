"""Sizes that nest: one Gram matrix of a block's neurons and inputs holds the least-squares fit of each.

`prune` solves for the k strongest neurons, `linear` for the inputs, `ffsplit` over `linear` for both, and
`prune_linear` for neurons and linear maps of the inputs: each is a part of the same moments, so no size costs
another pass over the data.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, FFNLayer
from eugen.layers.ffsplit import FFSplitConfig, SplitFFN, part_of
from eugen.layers.linear import LinearConfig
from eugen.layers.prune import PruneConfig
from eugen.layers.prune_linear import PruneLinear, PruneLinearConfig, directions_of
from eugen.least_squares import Moments
from eugen.parts.experts import copy_rows
from eugen.parts.neurons import neuron_scores, output_sizes, strongest
from eugen.search.calibration import Chunk


def nests(config: LayerConfig) -> bool:
    """Whether `NestedFits.fit` knows this configuration."""
    if isinstance(config, FFSplitConfig):
        return type(config.of) is LinearConfig
    return type(config) in (PruneConfig, LinearConfig, PruneLinearConfig)


def solves_alone(config: LayerConfig) -> bool:
    """Whether one solve makes the layer: cheap enough for every size. The path wants a decomposition, too."""
    return nests(config) and not isinstance(config, PruneLinearConfig)


class NestedFits:
    """Layers of one block fitted from one pass over its inputs and targets.

    Args:
        data: chunks `(x, target, token weight)`.
        output_weight: importance of each output dimension, which orders the neurons.
    """

    @torch.no_grad()
    def __init__(self, dense: DenseFFN, data: list[Chunk], output_weight: Tensor | None = None) -> None:
        self.dense, self.output_weight = dense, output_weight
        scores = neuron_scores(dense, data, output_weight)
        self.order = strongest(scores, len(scores))
        self.moments = Moments()
        for x, y, weight in data:
            self.moments.add(torch.cat([dense.features(x)[:, self.order], x], dim=1), y, weight)
        self.neurons, self.inputs = torch.arange(
            len(scores) + dense.in_features, device=self.order.device
        ).tensor_split([len(scores)])

    @torch.no_grad()
    def fit(self, config: LayerConfig) -> FFNLayer:
        """What `config.fit` makes of the same data."""
        dense, generator = self.dense, torch.Generator()
        layer = config.build(dense, generator=generator)
        if isinstance(layer, PruneLinear):
            return self._beside_a_path(layer)
        if isinstance(layer, DenseFFN):
            _copy_neurons(layer, dense, self.order[: layer.hidden_features])
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
        last = self.inputs if inputs else self.inputs[:0]
        return self.moments.part(torch.cat([self.neurons[:neurons], last]))

    def _beside_a_path(self, layer: PruneLinear) -> PruneLinear:
        """Neurons by what the inputs leave of them, the path by what the neurons leave of the outputs."""
        count, rank = layer.up.out_features, layer.path.out_features
        kept = self._unexplained[:count]
        _copy_neurons(layer, self.dense, self.order[kept])
        beside = self.moments.part(torch.cat([kept, self.inputs]))
        mean, covariance = self._input_covariance
        moment = covariance + torch.outer(mean, mean)
        path = directions_of(beside.solve()[0][:, count:], moment, self.output_weight)[:rank]
        layer.path.weight.copy_(path)
        rows = layer.path.weight.double()
        of_both = torch.block_diag(torch.eye(count, dtype=rows.dtype, device=rows.device), rows)
        layer.set_readout(*beside.mapped(of_both).solve())
        return layer

    @cached_property
    def _input_covariance(self) -> tuple[Tensor, Tensor]:
        return self.moments.part(self.inputs).covariance()

    @cached_property
    def _unexplained(self) -> Tensor:
        """The neurons, most important first, by what is not a linear map of the inputs."""
        line, _ = self.moments.between(self.inputs, self.neurons).solve()
        _, covariance = self.moments.covariance()
        whole, shared = covariance.diagonal()[self.neurons], covariance[self.neurons][:, self.inputs]
        left = whole - 2 * (line * shared).sum(1) + (line @ self._input_covariance[1] * line).sum(1)
        if self.dense.down is not None:
            left = left * output_sizes(self.dense.down, self.output_weight)[self.order].square()
        return strongest(left, len(left))


def _copy_neurons(layer: DenseFFN | PruneLinear, dense: DenseFFN, kept: Tensor) -> None:
    copy_rows(layer.up, dense.up, kept)
    if layer.gate is not None and dense.gate is not None:
        copy_rows(layer.gate, dense.gate, kept)
