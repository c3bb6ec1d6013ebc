"""Forward-Forward: each unit tells inputs with the right label from inputs with a wrong one.

Hinton, https://arxiv.org/abs/2212.13345, sections 2 and 3.3: a label is written into the first features of
the input, as a code whose mean over the classes is 0. A unit's goodness is the sum of its squared outputs,
`G = Σ_j a_j²`; it is driven above a threshold `θ` where the label is right (positive pass) and below it
where the label is wrong (negative pass), with `p(positive) = σ(G − θ)`. Each later unit normalises its
input, so that it cannot read the earlier one's goodness off the length.

The network's inference stays one pass: the input goes in as it is, which is the mean of all labels (the
neutral label), and the head is the ridge regression of the labels on the last unit's output for such inputs.
Hinton's best inference, the label with the most goodness, would take a pass for each class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eugen.local_training.rule import Learner, LocalRule, Passes, batches, require_something, solve_head


@dataclass(frozen=True, kw_only=True)
class ForwardForward(LocalRule, name="forward_forward"):
    """Goodness above a threshold for right labels, below it for wrong ones.

    Args:
        learning_rate: peak of Adam's one-cycle schedule, the same for every unit.
        threshold: `θ` divided by the number of the unit's outputs.
        label_strength: a label's feature gets this times the batch's largest absolute value.
        head_ridge: relative to the unit variance of the last unit's standardised outputs.
    """

    learning_rate: float = 6e-4
    threshold: float = 0.1
    label_strength: float = 3.0
    head_ridge: float = 1e-3

    def __post_init__(self) -> None:
        self.require_positive("learning_rate", "threshold", "label_strength", "head_ridge")

    @torch.enable_grad()
    def train(
        self, units: Sequence[nn.Module], head: nn.Linear, data: Passes, *, generator: torch.Generator
    ) -> None:
        require_something(units, data)
        learners = [Learner(unit, learning_rate=self.learning_rate) for unit in units]
        for progress, x, labels in batches(data, head):
            if progress == 0:
                require_normalising(units, x)
            wrong = wrong_labels(labels, head.out_features, generator)
            a = torch.cat([self.overlay(x, which, head.out_features) for which in (labels, wrong)])
            for unit, learner in zip(units, learners, strict=True):
                a = unit(a.detach())
                positive, negative = a.flatten(1).square().sum(-1).chunk(2)
                theta = self.threshold * a[0].numel()
                learner.step((F.softplus(theta - positive) + F.softplus(negative - theta)).mean(), progress)
        with torch.no_grad():
            last = [(nn.Sequential(*units)(x), labels) for x, labels in data[-1]]
        solve_head(head, last, ridge=self.head_ridge)

    def overlay(self, x: Tensor, labels: Tensor, classes: int) -> Tensor:
        """The inputs `[B, …]` with a label written into their first features, one feature per class.

        Raises:
            ValueError: the input has fewer features than there are classes.
        """
        flat = x.flatten(1).clone()
        if flat.shape[1] < classes:
            raise ValueError(f"an input of {flat.shape[1]} features has no room for {classes} labels")
        code = F.one_hot(labels, classes).to(x.dtype) - 1 / classes
        flat[:, :classes] += self.label_strength * x.abs().max() * code
        return flat.view_as(x)


def wrong_labels(labels: Tensor, classes: int, generator: torch.Generator) -> Tensor:
    """A label that is not the right one for each, all others equally likely."""
    if classes < 2:
        raise ValueError(
            f"forward_forward needs a wrong label: head.out_features={classes} must be at least 2"
        )
    shift = torch.randint(1, classes, (len(labels),), generator=generator).to(labels.device)
    return (labels + shift) % classes


@torch.no_grad()
def require_normalising(units: Sequence[nn.Module], x: Tensor) -> None:
    """Raise ValueError if a unit behind the first one sees the length of its input."""
    x = units[0](x)
    for number, unit in enumerate(units[1:], start=1):
        usual, longer = unit(x), unit(4 * x)
        if (longer - usual).norm() > 0.05 * usual.norm():
            raise ValueError(
                f"unit {number} does not normalise its input, so it can read the goodness of the unit before "
                "off the length: let it begin with a LayerNorm, or use 'mono_forward'"
            )
        x = usual
