"""Conditional EUGens: features that all inputs share, and a few more that depend on where the input lies.

f(x) = [Φ(G x⁺) ; Φ(G_e x⁺)],  e the nearest of E centres to x;   y = A f(x) + c

Every feature is one of the teacher's: Φ is its activation and the rows of G are rows of W1, the strongest
over all inputs (shared) and over each centre's own (its expert). A token pays for the shared features and one
expert, so that the layer holds more features than it computes. Centres are those of k-means on the inputs and
stay as they are: routers trained by the readout's gradient sent nearly all tokens to one or two experts, and
lost more than the experts had won.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen import parallel
from eugen.config import ALIGNED, LayerConfig
from eugen.ffn import DenseFFN, TokenStream, copy_activation, new_linear
from eugen.parts.clusters import nearest_centre, token_clusters
from eugen.parts.experts import ExpertFFN, copy_rows
from eugen.parts.neurons import in_pieces, output_sizes, strongest
from eugen.shapes import Float

EXTRA = 0.2
"""What experts may add to the weights beyond what a token pays for, as a share of the dense block's."""
CLUSTERED_TOKENS = 32768
"""So many tokens decide the centres."""


class EUGenExperts(ExpertFFN):
    """The layer.

    Args:
        router: `c·x − ‖c‖²/2` of each centre c; the largest belongs to the nearest. It is not trained.
    """

    def __init__(
        self,
        up: nn.Linear,
        act: nn.Module,
        readout: nn.Linear,
        gate: nn.Linear | None,
        *,
        router: nn.Linear,
        width: int,
    ) -> None:
        super().__init__(up, act, readout, gate, experts=router.out_features, width=width)
        self.router = router.requires_grad_(False)

    @property
    def active(self) -> int:
        return 1

    @property
    def routing_macs(self) -> int:
        return self.experts * self.in_features

    def route(self, x: Float[Tensor, "t d_in"]) -> tuple[Tensor, None]:
        """The expert of the nearest centre; in float32 at least, since rounded scores would tie."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.router.weight.to(wide), self.router.bias.to(wide)
        return nn.functional.linear(x.to(wide), weight, bias).argmax(1, keepdim=True), None

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        # With gradients most experts are used by some token: plain products of all are as fast, and simpler.
        return self.reference(x) if torch.is_grad_enabled() else super().forward(x)


@dataclass(frozen=True, kw_only=True)
class EUGenExpertsConfig(LayerConfig, name="eugen_experts"):
    """Teacher features, most of them shared, the others in experts of which each token uses one.

    Args:
        experts: E, the number of centres.
        parameters: weights of the features and their readout, as a share of the dense block's; None is what
            a token pays for and `EXTRA` more.
        shared: features that all tokens use; None derives it from `budget`.
        width: features of one expert, the first of which is a constant; None derives it from `budget`.

    Raises:
        ValueError: sizes that contradict each other.
    """

    experts: int = 8
    parameters: float | None = None
    shared: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 2:
            raise ValueError(f"experts={self.experts} must be at least 2: one is layer 'eugen'")
        if self.parameters is not None and not 0 < self.parameters <= 2:
            raise ValueError(f"parameters={self.parameters} must be in (0, 2]: a share of the dense block's")
        if (self.shared is None) != (self.width is None):
            raise ValueError(f"shared={self.shared} and width={self.width}: give both or neither")
        if self._given is not None and not (self._given[0] >= 0 and self._given[1] >= 1):
            raise ValueError(f"shared={self.shared} must be at least 0 and width={self.width} at least 1")

    @property
    def _given(self) -> tuple[int, int] | None:
        """Shared features and an expert's, where they are named."""
        return None if self.shared is None or self.width is None else (self.shared, self.width)

    def sizes_for(self, dense: DenseFFN) -> tuple[int, int]:
        """Shared features and features of one expert."""
        self.require_down(dense)
        routing = self.experts * dense.in_features
        sizes = self._given
        paid = self.size_for(
            dense,
            dense.macs_per_neuron,
            routing,
            unit="features",
            given=None if sizes is None else sum(sizes),
        )
        if sizes is not None:
            return sizes
        share = self.parameters
        if share is None:
            share = paid / dense.hidden_features + EXTRA
        held = int(share * dense.hidden_features)
        width = (held - paid) // (self.experts - 1)
        width = min(max(1, width - width % ALIGNED if width >= ALIGNED else width), paid)
        return paid - width, width

    def build(self, dense: DenseFFN, *, generator: torch.Generator) -> EUGenExperts:
        """In evaluation mode, with random rows and centres."""
        shared, width = self.sizes_for(dense)
        features = self.experts * width + shared

        def linear(in_features: int, out_features: int) -> nn.Linear:
            return new_linear(in_features, out_features, like=dense.up.weight, generator=generator)

        return EUGenExperts(
            linear(dense.in_features, features),
            copy_activation(dense.act),
            linear(features, dense.out_features),
            None if dense.gate is None else linear(dense.in_features, features),
            router=linear(dense.in_features, self.experts),
            width=width,
        ).eval()

    @torch.no_grad()
    def fit(
        self,
        dense: DenseFFN,
        data: TokenStream,
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> EUGenExperts:
        layer = self.build(dense, generator=generator)
        centres = token_clusters(data, self.experts, most=CLUSTERED_TOKENS, generator=generator)
        layer.router.weight.copy_(centres)
        layer.router.bias.copy_(-centres.square().sum(1) / 2)
        overall, own = feature_scores(dense, data, centres, output_weight)
        shared = strongest(overall, min(layer.up.out_features - layer.routed, len(overall)))
        own[:, shared] = -1  # a feature that all have is nobody's own
        rows = torch.full((self.experts, layer.width), -1, device=overall.device)
        taken = min(layer.width - 1, dense.hidden_features - len(shared))
        rows[:, 1 : 1 + taken] = own.topk(taken, dim=1).indices
        everywhere = torch.cat([rows.flatten(), shared])
        constants = torch.arange(self.experts, device=overall.device) * layer.width
        for ours, teachers in ((layer.up, dense.up), (layer.gate, dense.gate)):
            if ours is not None and teachers is not None:
                copy_rows(ours, teachers, everywhere)
                ours.bias[constants] = 1
        layer.fit_readout(data)
        return layer


@torch.no_grad()
def feature_scores(
    dense: DenseFFN, data: TokenStream, centres: Float[Tensor, "e d_in"], output_weight: Tensor | None = None
) -> tuple[Float[Tensor, " h"], Float[Tensor, "e h"]]:
    """`var(h_j)·‖γ∘W2[:, j]‖²` over all tokens, and over those of each centre."""
    assert dense.down is not None
    experts, importance = len(centres), output_sizes(dense.down, output_weight).square()
    wide = {"dtype": torch.float64, "device": centres.device}
    count = torch.zeros(experts, 1, **wide)
    total = torch.zeros(experts, dense.hidden_features, **wide)
    square = torch.zeros_like(total)
    for x, weight in in_pieces(data):
        hidden = dense.features(x).double()
        member = nn.functional.one_hot(nearest_centre(x, centres), experts) * weight[:, None]
        count += member.sum(0)[:, None]
        total += member.T @ hidden
        square += member.T @ hidden.square()
    count, total, square = parallel.total(count, total, square)
    everywhere = count.sum()
    overall = square.sum(0) / everywhere - (total.sum(0) / everywhere).square()
    held = count.clamp(min=1e-30)
    own = (square / held - (total / held).square()).clamp(min=0)
    return overall * importance, own * importance
