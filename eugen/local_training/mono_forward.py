"""Mono-Forward: each unit minimises a cross-entropy of its own.

Gong, Li and Abdulla, https://arxiv.org/abs/2501.09238: unit `i` with output `a_i [B, n]` has a matrix
`M_i [classes, n]`; its goodness for each class is `G_i = a_i M_iᵀ`, and the unit and `M_i` together
minimise `cross_entropy(G_i, labels)`. The last unit's matrix predicts, so it becomes the network's head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from eugen.ffn import new_linear
from eugen.local_training.rule import Learner, LocalRule, Passes, batches, require_something


@dataclass(frozen=True, kw_only=True)
class MonoForward(LocalRule, name="mono_forward"):
    """Local cross-entropy behind a projection of each unit's output.

    Args:
        learning_rate: peak of Adam's one-cycle schedule, the same for every unit.
    """

    learning_rate: float = 2e-3

    def __post_init__(self) -> None:
        self.require_positive("learning_rate")

    @torch.enable_grad()
    def train(
        self, units: Sequence[nn.Module], head: nn.Linear, data: Passes, *, generator: torch.Generator
    ) -> None:
        require_something(units, data)
        projections: list[nn.Linear] = []
        learners: list[Learner] = []
        for progress, x, labels in batches(data, head):
            a = x
            for i, unit in enumerate(units):
                a = unit(a.detach())
                if len(learners) == i:  # the width of a unit's output is known by now
                    projections.append(
                        new_linear(
                            a.shape[-1], head.out_features, like=head.weight, generator=generator, bias=False
                        )
                    )
                    learners.append(Learner(unit, projections[i], learning_rate=self.learning_rate))
                learners[i].step(F.cross_entropy(projections[i](a), labels), progress)
        with torch.no_grad():
            head.weight.copy_(projections[-1].weight)
            if head.bias is not None:
                head.bias.zero_()
