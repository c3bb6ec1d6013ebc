"""Self-guided training (arXiv 2406.16450, Section 4): a dense guide leads, fades and is thrown away."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen.config import LayerConfig
from eugen.ffn import DenseFFN, FFNLayer
from eugen.refine import LocalLoss, train
from eugen.shapes import Float

GUIDED = 0.5
"""Part of a refinement's steps that has a guide, as in the paper's runs of a whole training."""


class SelfGuided(nn.Module):
    """`o = α·guide(x) + (1 − α)·layer(x)`, α on a cosine from 1 to 0; both are trained.

    The paper mixes each structured matrix with a dense one; here whole blocks are mixed, so that any
    layer can be guided and a trained block can be the guide.

    Args:
        layer: the layer that stays.
        guide: a dense block of the same shape, copied.
        steps: training steps until α is 0; `advance` counts them.

    Raises:
        ValueError: the shapes differ, or `steps` is negative.
    """

    step: Tensor

    def __init__(self, layer: FFNLayer, guide: DenseFFN, steps: int) -> None:
        super().__init__()
        shapes = [(part.in_features, part.out_features) for part in (layer, guide)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"guide maps {shapes[1]} features, the layer {shapes[0]}: give equal shapes")
        if steps < 0:
            raise ValueError(f"steps={steps} must be at least 0")
        self.layer, self.guide, self.steps = layer, copy.deepcopy(guide), steps
        self.guide.requires_grad_(True)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @property
    def alpha(self) -> float:
        """The guide's share now."""
        step = int(self.step)
        return 0.5 * (1 + math.cos(math.pi * step / self.steps)) if step < self.steps else 0.0

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        alpha = self.alpha
        if alpha == 0:
            return self.layer(x)
        return alpha * self.guide(x) + (1 - alpha) * self.layer(x)

    def advance(self) -> None:
        """Count one training step: call it after the optimiser's."""
        self.step += 1

    def finished(self) -> FFNLayer:
        """The layer alone, without the guide."""
        return self.layer


def refine_guided(
    layer: FFNLayer,
    guide: DenseFFN,
    data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    *,
    steps: int,
    generator: torch.Generator,
    output_weight: Tensor | None = None,
) -> FFNLayer:
    """`eugen.refine.refine` with a guide in the first half of as many steps of the same optimiser."""
    guided = SelfGuided(copy.deepcopy(layer), guide, math.ceil(GUIDED * steps))
    loss = LocalLoss(data, generator=generator, output_weight=output_weight)
    train(guided, loss, steps=steps, after_step=guided.advance)
    refined = guided.finished()
    refined.fit_readout(data)
    return refined


@dataclass(frozen=True, kw_only=True)
class SelfGuidedConfig(LayerConfig):
    """A configuration whose layers are refined beside the dense block.

    Args:
        self_guided: whether they are.
    """

    self_guided: bool = True

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
        options = {"steps": steps, "generator": generator, "output_weight": output_weight}
        if self.self_guided:
            return refine_guided(layer, dense, data, **options)
        return super().refine(layer, dense, data, **options)
