"""Pruned neurons beside a low-rank linear path: what the activation leaves linear needs no neuron.

y = A [act(W1 x + b1) ; V x] + c: neurons with the largest `var(h_j − ĥ_j)·‖γ∘W2[:, j]‖²`, where ĥ_j is the
best linear prediction of h_j from x; V the best directions of reduced-rank regression; A by least squares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen import least_squares
from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, FFNLayer, TokenStream, copy_activation, linear_of_parts, new_linear
from eugen.layers.low_rank_aware import moment_root, second_moment
from eugen.parts.experts import copy_rows
from eugen.parts.feature_map import given_linear
from eugen.parts.neurons import neuron_scores, strongest
from eugen.shapes import Float


class PruneLinear(FFNLayer):
    """The layer. `path` is V, without a bias; the readout's first columns are the neurons'."""

    readout: nn.Linear

    def __init__(
        self, up: nn.Linear, act: nn.Module, gate: nn.Linear | None, path: nn.Linear, readout: nn.Linear
    ) -> None:
        super().__init__()
        self.up, self.act, self.gate, self.path, self.readout = up, act, gate, path, readout
        self.in_features, self.out_features = up.in_features, readout.out_features

    def neurons(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch h"]:
        """The kept neurons."""
        return self.act(self.up(x)) if self.gate is None else self.act(self.gate(x)) * self.up(x)

    def features(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch f"]:
        return torch.cat([self.neurons(x), self.path(x)], dim=-1)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        flat = x.reshape(-1, self.in_features)
        y = linear_of_parts(self.readout, [self.neurons(flat), self.path(flat)])
        return y.reshape(*x.shape[:-1], self.out_features)

    @property
    def macs_per_token(self) -> int:
        maps = [self.up, self.path, self.readout, *([] if self.gate is None else [self.gate])]
        return sum(m.in_features * m.out_features for m in maps)


@dataclass(frozen=True, kw_only=True)
class PruneLinearConfig(LayerConfig, name="prune_linear"):
    """Neurons and a linear path that share the budget.

    Args:
        linear_share: the path's share of the MACs, in (0, 1); a path of full rank gives the rest back.

    Raises:
        ValueError: a share outside (0, 1), or no budget.
    """

    linear_share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.linear_share < 1:
            raise ValueError(f"linear_share={self.linear_share} must be in (0, 1): a share of the MACs")

    def sizes_for(self, dense: DenseFFN) -> tuple[int, int]:
        """Neurons and the path's rank."""
        out = self.require_down(dense).out_features
        per_rank = dense.in_features + out
        least = dense.macs_per_neuron + per_rank
        self.size_for(dense, least, unit="features")  # one neuron and one direction, or too small
        allowed = (self.budget or 1) * dense.macs_per_token
        rank = max(1, int(self.linear_share * allowed / per_rank))
        rank = min(rank - rank % 8 if rank >= 8 else rank, dense.in_features, out)
        hidden = self.size_for(dense, dense.macs_per_neuron, rank * per_rank, unit="features")
        return min(hidden, dense.hidden_features), rank

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> PruneLinear:
        hidden, rank = self.sizes_for(dense)

        def linear(n_in: int, n_out: int, bias: bool = True) -> nn.Linear:
            return new_linear(n_in, n_out, like=dense.up.weight, generator=generator, bias=bias)

        return PruneLinear(
            linear(dense.in_features, hidden),
            copy_activation(dense.act),
            None if dense.gate is None else linear(dense.in_features, hidden),
            linear(dense.in_features, rank, bias=False),
            linear(hidden + rank, dense.out_features),
        )

    @torch.no_grad()
    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> PruneLinear:
        layer = self.build(dense, generator=generator)
        line = given_linear(
            *least_squares.ridge((x, dense.features(x), w) for x, _, w in data), like=dense.up.weight
        )
        scores = neuron_scores(dense, data, output_weight, beside=line)
        kept = strongest(scores, layer.up.out_features)
        copy_rows(layer.up, dense.up, kept)
        if layer.gate is not None and dense.gate is not None:
            copy_rows(layer.gate, dense.gate, kept)
        rank = layer.path.out_features
        layer.path.weight.copy_(best_directions(layer, data, output_weight)[:rank])
        layer.fit_readout(data)
        return layer


def best_directions(
    layer: PruneLinear, data: TokenStream, output_weight: Tensor | None
) -> Float[Tensor, "r d_in"]:
    """Directions of x, best first, that say most beside the neurons (reduced-rank regression)."""
    beside = ((torch.cat([layer.neurons(x), x], dim=-1), y, w) for x, y, w in data)
    full = least_squares.ridge(beside)[0][:, layer.up.out_features :]
    return directions_of(full, second_moment(data, lambda x: x), output_weight)


def directions_of(
    full: Float[Tensor, "d_out d_in"],
    moment: Float[Tensor, "d_in d_in"],
    output_weight: Float[Tensor, " d_out"] | None,
) -> Float[Tensor, "r d_in"]:
    """The right singular vectors of the full linear map beside the neurons, best first.

    Under the inputs' second moment and the outputs' importance, brought back to the inputs.
    """
    if output_weight is not None:
        full = full * output_weight.double().sqrt()[:, None]
    root = moment_root(moment)
    _, values, right = torch.linalg.svd(full @ root, full_matrices=False)
    directions = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    # In units of the features beside them: one learning rate has to fit both.
    return directions * (values / values[0].clamp(min=1e-30)).sqrt()[:, None]
