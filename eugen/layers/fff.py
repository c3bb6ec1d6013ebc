"""Fast feed-forward: a tree of hyperplanes sends each token to one small block (arXiv 2308.14711).

y = Σ_leaf c_leaf(x) (W2[leaf] act(W1[leaf] x + b1[leaf]) + b2[leaf]) + a block that every token uses

Training mixes the leaves by the decisions on the way to them, c_leaf = Π σ(±(n·x + b)), under the
hardening loss of that paper; evaluation takes the one leaf on the side of every hyperplane. Load
balancing and the master leaf, which every token uses, are those of arXiv 2405.16836.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen import parallel
from eugen.config import BudgetTooSmall, LayerConfig
from eugen.ffn import DenseFFN, FFNLayer, TokenStream, copy_activation, new_linear
from eugen.parts.experts import ExpertFFN, copy_rows, part
from eugen.parts.grouped import reads_are_free
from eugen.parts.intercepts import ridge_with_intercepts
from eugen.parts.neurons import neuron_scores, strongest
from eugen.parts.tree import balance_loss, descend, descend_one, grow_tree, hardening_loss, mixture
from eugen.refine import LocalLoss, train
from eugen.shapes import Float

MOST_LEVELS = 5
"""The deepest tree that is chosen where the configuration names none."""


class FFF(ExpertFFN):
    """The layer. Leaves are experts; the master leaf's neurons are shared.

    Args:
        nodes: hyperplanes in level order, the children of node i being 2i + 1 and 2i + 2.
        hardening, balance: weights of the two losses in `auxiliary_loss`.
    """

    def __init__(
        self,
        nodes: nn.Linear,
        up: nn.Linear,
        act: nn.Module,
        readout: nn.Linear,
        gate: nn.Linear | None,
        *,
        width: int,
        hardening: float,
        balance: float,
    ) -> None:
        leaves = nodes.out_features + 1
        super().__init__(up, act, readout, gate, experts=leaves, width=width)
        # Plain parameters: a hyperplane in a lower precision would send tokens elsewhere.
        self.node_weight, self.node_bias = nodes.weight, nodes.bias
        self.leaf_bias = nn.Parameter(readout.weight.new_zeros(leaves, readout.out_features))
        self.depth = leaves.bit_length() - 1
        self.hardening, self.balance = hardening, balance
        self._auxiliary: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_auxiliary": None}  # part of a graph, which cannot be copied

    @property
    def active(self) -> int:
        return 1

    @property
    def routing_macs(self) -> int:
        return self.depth * self.in_features

    def route(self, x: Float[Tensor, "t d_in"]) -> tuple[Tensor, Tensor | None]:
        """The one leaf; its factor carries the gradient of its soft share straight through."""
        leaf, share = descend(x, self.node_weight, self.node_bias, self.depth)
        factor = None if share is None else (1 + (share - share.detach())).unsqueeze(1)
        return leaf.unsqueeze(1), factor

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        flat = x.reshape(-1, self.in_features)
        if not self.training:
            own = flat.shape[0] == 1 and self._reads_its_leaf(flat)
            return self._leaf_of_one(flat).view(*x.shape[:-1], -1) if own else super().forward(x)
        shares, right = mixture(flat, self.node_weight, self.node_bias, self.depth)
        self._auxiliary = self.hardening * hardening_loss(right) + self.balance * balance_loss(shares)
        y = self.readout(self.weighted_neurons(flat, shares)) + shares @ self.leaf_bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _reads_its_leaf(self, x: Float[Tensor, "1 d_in"]) -> bool:
        simple = self.up.out_features == self.routed and x.dtype in (torch.float32, torch.float64)
        return simple and reads_are_free(x) and not torch.is_grad_enabled() and self.sliceable()

    def _leaf_of_one(self, x: Float[Tensor, "1 d_in"]) -> Float[Tensor, "1 d_out"]:
        """One token without a master leaf: small products whose own cost counts, so as few as can be."""
        leaf = descend_one(x, self.node_weight, self.node_bias, self.depth)
        start, end = leaf * self.width, (leaf + 1) * self.width
        neurons = self.neurons(lambda linear: part(linear, x, start, end))
        return F.linear(neurons, self.readout.weight[:, start:end], self.leaf_bias[leaf])

    def reference(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        flat = x.reshape(-1, self.in_features)
        shares = self.shares(flat)
        y = self.readout(self.weighted_neurons(flat, shares)) + shares @ self.leaf_bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def finish(
        self, y: Float[Tensor, "t d_out"], x: Float[Tensor, "t d_in"], chosen: Tensor, factor: Tensor | None
    ) -> Float[Tensor, "t d_out"]:
        bias = self.leaf_bias[chosen[:, 0]]
        return super().finish(y, x, chosen, factor) + (bias if factor is None else bias * factor)

    def auxiliary_loss(self) -> Tensor | None:
        """What training adds to its loss, for the last forward pass in training mode."""
        return self._auxiliary

    @torch.no_grad()
    def set_readout(self, weight: Float[Tensor, "d_out f"], bias: Float[Tensor, " d_out"]) -> None:
        self.readout.weight.copy_(weight)
        self.leaf_bias.copy_(bias.expand_as(self.leaf_bias))

    @torch.no_grad()
    def fit_readout(self, data: TokenStream) -> None:
        """Output matrices by one ridge, in which each leaf has a bias of its own.

        Without a master leaf the Gram matrix is block-diagonal: a regression for every leaf.
        """

        def stream() -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
            return ((self.features(x), y, weight, self.route(x)[0][:, 0]) for x, y, weight in data)

        weight, bias = ridge_with_intercepts(stream, self.experts)
        self.readout.weight.copy_(weight)
        self.leaf_bias.copy_(bias)


class _TreeLoss(LocalLoss):
    """The local error and the layer's own losses; over several processes the balance is that of each part."""

    def __call__(self, layer: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        assert isinstance(layer, FFF)
        error = super().__call__(layer, rows)
        auxiliary = layer.auxiliary_loss()
        return error if auxiliary is None else error + self.share(rows) * auxiliary


@dataclass(frozen=True, kw_only=True)
class FFFConfig(LayerConfig, name="fff"):
    """A tree over leaves of the block's own form.

    MACs are D·d for the way down and (leaf + master)·(d + l) for the neurons used; stored are 2^D
    times as many leaf neurons. `fit` grows the tree on the inputs, gives each leaf the block's neurons
    that matter most to its tokens, `var(h_j)·‖γ∘W2[:, j]‖²` over these, and solves the output matrices.

    Args:
        depth: D, the levels of the tree; None chooses the most levels, up to 5, that keep `max_neurons`.
        leaf_features: neurons of a leaf; None derives it from `budget`, in whole multiples of 4 (from
            32 neurons up) or 8 (from 128), as grouped products want them.
        master_features: neurons that every token uses beside its leaf.
        max_neurons: stored neurons over the block's own, where the depth is chosen; one level is always
            there.
        hardening, balance: weights of the losses that training adds, the mean entropy of the decisions
            and `E Σ_e (mean share of leaf e)²`.

    Raises:
        ValueError: a size below 1 (`master_features` and the losses' weights: below 0).
    """

    depth: int | None = None
    leaf_features: int | None = None
    master_features: int = 0
    max_neurons: float = 1.25
    hardening: float = 0.1
    balance: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, least in (("depth", 1), ("master_features", 0), ("hardening", 0), ("balance", 0)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise ValueError(f"{field}={value} must be at least {least}")
        if self.max_neurons <= 0:
            raise ValueError(f"max_neurons={self.max_neurons} must be positive: times the block's own")

    def sizes_for(self, dense: DenseFFN) -> tuple[int, int]:
        """Depth and neurons of a leaf."""
        if self.master_features >= dense.hidden_features:
            raise ValueError(
                f"master_features={self.master_features} leaves no neuron of the block's "
                f"{dense.hidden_features} to the leaves: lower it"
            )
        if self.depth is not None:
            return self.depth, self._leaf(dense, self.depth)
        depth, most = 1, self.max_neurons * dense.hidden_features
        while depth < MOST_LEVELS:
            try:
                leaf = self._leaf(dense, depth + 1)
            except BudgetTooSmall:
                break
            if 2 ** (depth + 1) * leaf + self.master_features > most:
                break
            depth += 1
        return depth, self._leaf(dense, depth)

    def _leaf(self, dense: DenseFFN, depth: int) -> int:
        self.require_down(dense)
        per_neuron = dense.macs_per_neuron
        fixed = depth * dense.in_features + self.master_features * per_neuron
        leaf = self.size_for(dense, per_neuron, fixed, unit="leaf_features", given=self.leaf_features)
        if self.leaf_features is not None:
            return leaf
        leaf = min(leaf, dense.hidden_features - self.master_features)
        return leaf - leaf % (8 if leaf >= 128 else 4 if leaf >= 32 else 1)

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> FFF:
        """In evaluation mode, where one leaf is taken; `train()` mixes them."""
        depth, leaf = self.sizes_for(dense)
        neurons = 2**depth * leaf + self.master_features

        def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
            return new_linear(in_features, out_features, like=dense.up.weight, generator=generator, bias=bias)

        return FFF(
            linear(dense.in_features, 2**depth - 1),
            linear(dense.in_features, neurons),
            copy_activation(dense.act),
            linear(neurons, dense.out_features, bias=False),
            None if dense.gate is None else linear(dense.in_features, neurons),
            width=leaf,
            hardening=self.hardening,
            balance=self.balance,
        ).eval()

    @torch.no_grad()
    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> FFF:
        layer = self.build(dense, generator=generator)
        weight, bias = grow_tree(data, layer.depth)
        layer.node_weight.copy_(weight)
        layer.node_bias.copy_(bias)
        rows = self._neurons(layer, dense, data, output_weight)
        copy_rows(layer.up, dense.up, rows)
        if layer.gate is not None and dense.gate is not None:
            copy_rows(layer.gate, dense.gate, rows)
        layer.fit_readout(data)
        return layer

    def _neurons(
        self, layer: FFF, dense: DenseFFN, data: TokenStream, output_weight: Tensor | None
    ) -> Tensor:
        """Which of the block's neurons stand in the leaves, leaf by leaf, and in the master leaf."""
        overall = neuron_scores(dense, data, output_weight)
        master = strongest(overall, self.master_features)
        chosen = []
        for leaf in range(layer.experts):
            own = [chunk for chunk in _of_leaf(layer, data, leaf) if len(chunk[0])]
            weights = (len(x) if weight is None else float(weight.sum()) for x, _, weight in own)
            counted = parallel.total_of(sum(weights))[0] > 0
            scores = neuron_scores(dense, own, output_weight) if counted else overall.clone()
            scores[master] = -torch.inf
            chosen.append(strongest(scores, layer.width))
        return torch.cat([*chosen, master])

    def refine(
        self,
        layer: FFNLayer,
        dense: DenseFFN,
        data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        steps: int,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> FFNLayer:
        """Steps on the soft mixture with its losses; then the leaves are taken one by one again."""
        refined = copy.deepcopy(layer).train()
        train(refined, _TreeLoss(data, generator=generator, output_weight=output_weight), steps=steps)
        refined.eval().fit_readout(data)
        return refined


def _of_leaf(layer: FFF, data: TokenStream, leaf: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    for x, y, weight in data:
        own = layer.route(x)[0][:, 0] == leaf
        yield x[own], y[own], None if weight is None else weight[own]
