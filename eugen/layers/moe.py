"""Experts carved out of a trained block: its neurons split into equal groups, a few active per token.

y = Σ_{e chosen} W2[e] act(W1[e] x + b1[e]) + shared neurons + b2

Two ways to split and to choose, both without training:

- `moefication` (arXiv 2110.01786): balanced k-means on the rows of W1; the choice is a ridge regression
  from x to what each expert would contribute, `Σ_j |h_j|·‖γ∘W2[:, j]‖`.
- `cmoe` (arXiv 2502.04416): neurons that are often among a token's strongest are shared; the others are
  grouped by the tokens that they are strong on, and the neuron nearest to each group's mean, its
  representative, chooses: its pre-activation, or in gated blocks the size of its activation.

W2 is then solved once more on what remains active.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen import least_squares, parallel
from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, TokenStream, copy_activation, new_linear
from eugen.parts.clusters import balanced_clusters
from eugen.parts.experts import ExpertFFN, copy_rows
from eugen.parts.neurons import output_sizes
from eugen.shapes import Float

VARIANTS = ("moefication", "cmoe")
EXPERTS = 16
"""About so many experts, where the configuration names no number."""
STRONG_SHARE = 8
"""A neuron is strong on a token if it is among the first one in so many there."""
MARKED_TOKENS = 4096
"""So many tokens mark which neurons are strong together."""


class MoE(ExpertFFN):
    """The layer.

    Args:
        router: scores of the experts; the `active` largest are used.
        router_gate: the representatives' gates, where gated neurons choose.
    """

    def __init__(
        self,
        up: nn.Linear,
        act: nn.Module,
        readout: nn.Linear,
        gate: nn.Linear | None,
        *,
        router: nn.Linear,
        router_gate: nn.Linear | None,
        width: int,
        active: int,
    ) -> None:
        super().__init__(up, act, readout, gate, experts=router.out_features, width=width)
        self.router, self.router_gate = router, router_gate
        self._active = active

    @property
    def active(self) -> int:
        return self._active

    @property
    def routing_macs(self) -> int:
        return self.experts * self.in_features * (1 if self.router_gate is None else 2)

    def scores(self, x: Float[Tensor, "t d_in"]) -> Float[Tensor, "t e"]:
        """What each expert is taken by; in float32 at least, since rounded scores would tie."""
        wide = torch.promote_types(x.dtype, torch.float32)

        def linear(module: nn.Linear) -> Tensor:
            bias = None if module.bias is None else module.bias.to(wide)
            return nn.functional.linear(x.to(wide), module.weight.to(wide), bias)

        scores = linear(self.router)
        return scores if self.router_gate is None else (self.act(linear(self.router_gate)) * scores).abs()

    def route(self, x: Float[Tensor, "t d_in"]) -> tuple[Tensor, Tensor | None]:
        """The experts of the largest scores; factors carry the gradient of their softmax straight through."""
        scores = self.scores(x)
        chosen = scores.topk(self.active, dim=1).indices
        if not torch.is_grad_enabled():
            return chosen, None
        share = torch.softmax(scores, dim=1).gather(1, chosen)
        return chosen, (1 + (share - share.detach())).to(x.dtype)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        # In training most experts are used by some token: plain products of all are as fast, and simpler.
        return self.reference(x) if self.training else super().forward(x)


@dataclass(frozen=True, kw_only=True)
class MoEConfig(LayerConfig, name="moe"):
    """Experts of the block's own neurons; those at the end are padded with neurons of zeros.

    Args:
        variant: `moefication` or `cmoe`.
        experts: groups of neurons, shared ones included; None chooses about 16, whose width is a
            multiple of 8 where the block is wide enough.
        active_experts: groups that each token uses, shared ones included; None derives it from `budget`.
        shared_experts: groups that all tokens use; None is half the active ones in `cmoe`, else 0.

    Raises:
        ValueError: an unknown variant, or numbers that contradict each other.
    """

    variant: str = "cmoe"
    experts: int | None = None
    active_experts: int | None = None
    shared_experts: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} is unknown: use one of {', '.join(VARIANTS)}")
        if self.experts is not None and self.experts < 1:
            raise ValueError(f"experts={self.experts} must be at least 1")
        if self.shared_experts is not None and self.shared_experts < 0:
            raise ValueError(f"shared_experts={self.shared_experts} must be at least 0")
        if self.shared_experts and self.variant == "moefication":
            raise ValueError(f"shared_experts={self.shared_experts} is for variant='cmoe': leave it out")

    @property
    def _scored_by_neurons(self) -> bool:
        return self.variant == "cmoe"

    def sizes_for(self, dense: DenseFFN) -> tuple[int, int, int, int]:
        """Routed experts, their width, how many of them are active, and shared neurons."""
        out = self.require_down(dense).out_features
        if self.experts is None:
            width = -(-dense.hidden_features // EXPERTS)
            width = width if width < 8 else -(-width // 8) * 8
        else:
            width = -(-dense.hidden_features // self.experts)
        experts = -(-dense.hidden_features // width)
        gates = 1 if dense.gate is None else 2
        routing = experts * dense.in_features * (gates if self._scored_by_neurons else 1)
        per_expert = width * (dense.in_features * gates + out)
        active = self.size_for(dense, per_expert, routing, unit="active_experts", given=self.active_experts)
        active = min(active, experts)
        shared = self.shared_experts
        if shared is None:
            shared = active // 2 if self.variant == "cmoe" else 0
        if shared >= active:
            raise ValueError(
                f"shared_experts={shared} leaves none of the {active} active experts to choose: lower it"
            )
        return experts - shared, width, active - shared, shared * width

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> MoE:
        """In evaluation mode; `train()` computes all experts and masks them."""
        experts, width, active, shared = self.sizes_for(dense)
        neurons = experts * width + shared

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return new_linear(in_features, out_features, like=dense.up.weight, generator=generator)

        scored_by_gated = dense.gate is not None and self._scored_by_neurons
        return MoE(
            linear(dense.in_features, neurons),
            copy_activation(dense.act),
            linear(neurons, dense.out_features),
            None if dense.gate is None else linear(dense.in_features, neurons),
            router=linear(dense.in_features, experts),
            router_gate=linear(dense.in_features, experts) if scored_by_gated else None,
            width=width,
            active=active,
        ).eval()

    @torch.no_grad()
    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> MoE:
        layer = self.build(dense, generator=generator)
        assert dense.down is not None
        size = output_sizes(dense.down, output_weight).float()
        if self.variant == "cmoe":
            self._carve(layer, dense, data, size, generator)
        else:
            self._cluster(layer, dense, data, size, generator)
        layer.fit_readout(data)
        return layer

    def _carve(
        self, layer: MoE, dense: DenseFFN, data: TokenStream, size: Tensor, generator: torch.Generator
    ) -> None:
        markers = strong_neurons(dense, data, size)
        rate = markers.float().mean(0)
        order = rate.argsort(descending=True, stable=True)
        shared, routed = (
            order[: layer.up.out_features - layer.routed],
            order[layer.up.out_features - layer.routed :],
        )
        vectors = nn.functional.normalize(markers.T[routed].float(), dim=1)
        groups, centres = balanced_clusters(vectors, layer.experts, layer.width, generator=generator)
        place_neurons(layer, dense, routed, groups, shared)
        nearest = (vectors @ centres.T).masked_fill(
            groups[:, None] != torch.arange(layer.experts, device=groups.device), -torch.inf
        )
        representative = routed[nearest.argmax(0)]
        copy_rows(layer.router, dense.up, representative)
        if layer.router_gate is not None and dense.gate is not None:
            copy_rows(layer.router_gate, dense.gate, representative)

    def _cluster(
        self, layer: MoE, dense: DenseFFN, data: TokenStream, size: Tensor, generator: torch.Generator
    ) -> None:
        weight = dense.up.weight if dense.gate is None else dense.gate.weight
        rows = nn.functional.normalize(weight.float(), dim=1)
        groups, _ = balanced_clusters(rows, layer.experts, layer.width, generator=generator)
        place_neurons(
            layer, dense, torch.arange(len(rows), device=rows.device), groups, rows.new_zeros(0).long()
        )
        member = nn.functional.one_hot(groups, layer.experts).to(rows.dtype)
        wanted = ((x, (dense.features(x).float().abs() * size) @ member, w) for x, _, w in data)
        weight, bias = least_squares.ridge(wanted)
        layer.router.weight.copy_(weight)
        layer.router.bias.copy_(bias)


def strong_neurons(dense: DenseFFN, data: TokenStream, size: Tensor) -> Float[Tensor, "t h"]:
    """Which neurons are among a token's strongest, `|h_j|·size_j`: bools for up to `MARKED_TOKENS` tokens.

    Raises:
        ValueError: no tokens of any weight, or activations that are not finite.
    """
    marked, count = [], max(1, dense.hidden_features // STRONG_SHARE)
    found = not_finite = 0
    for x, _, weight in data:
        strength = dense.features(x if weight is None else x[weight > 0]).float().abs() * size
        not_finite += int((~torch.isfinite(strength)).sum())
        marker = torch.zeros_like(strength, dtype=torch.bool)
        marked.append(marker.scatter(1, strength.topk(count, dim=1).indices, True))
        found += len(strength)
    before, everywhere = parallel.place(found)
    if parallel.total_of(not_finite)[0]:
        raise ValueError("the block's activations hold NaN or infinity: check the calibration data")
    if not everywhere:
        raise ValueError("the calibration stream is empty, or its token weights sum to 0")
    step = -(-everywhere // MARKED_TOKENS)
    return parallel.gathered(torch.cat(marked)[-before % step :: step])


def place_neurons(layer: MoE, dense: DenseFFN, neurons: Tensor, groups: Tensor, shared: Tensor) -> None:
    """Copy the block's neurons to the places of their groups; places left over hold zeros."""
    rows = torch.full((layer.experts, layer.width), -1, device=neurons.device)
    for expert in range(layer.experts):
        own = neurons[groups == expert]
        rows[expert, : len(own)] = own
    rest = torch.full((layer.up.out_features - layer.routed - len(shared),), -1, device=neurons.device)
    everywhere = torch.cat([rows.flatten(), shared, rest])
    copy_rows(layer.up, dense.up, everywhere)
    if layer.gate is not None and dense.gate is not None:
        copy_rows(layer.gate, dense.gate, everywhere)
