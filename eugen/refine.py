"""Local refinement: a few Adam steps on one layer alone, then its readout is solved once more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

if TYPE_CHECKING:
    from eugen.ffn import FFNLayer

PEAK_LEARNING_RATE = 3e-3
BATCH_TOKENS = 1024


class LocalLoss:
    """A layer's own weighted squared error on random batches of its inputs and targets.

    In units of the target's spread, so that one learning rate fits every block.

    Args:
        data: chunks `(x, target, token weight)`, held in memory.
        output_weight: importance of each output dimension `[out]`.
    """

    def __init__(
        self,
        data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
        *,
        generator: torch.Generator,
        output_weight: Tensor | None = None,
    ) -> None:
        if not data:
            raise ValueError("the calibration data are empty: give at least one chunk of tokens")
        self.x, self.y = torch.cat([c[0] for c in data]), torch.cat([c[1] for c in data])
        weight = torch.cat([x.new_ones(len(x)) if w is None else w for x, _, w in data])
        self.weight = None if all(w is None for _, _, w in data) else weight / weight.mean()
        importance = torch.ones_like(self.y[0]) if output_weight is None else output_weight.to(self.y.dtype)
        spread = (importance * self.y.var(0, correction=0)).sum()
        self.importance = importance / torch.where(spread > 0, spread, 1)
        self.generator = generator

    def draw(self) -> Tensor:
        """Indices of the next batch's tokens."""
        count = len(self.x)
        rows = torch.randint(count, (min(BATCH_TOKENS, count),), generator=self.generator)
        return rows.to(self.x.device)

    def __call__(self, layer: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """The mean error of the layer on these tokens."""
        error = ((layer(self.x[rows]) - self.y[rows]).square() * self.importance).sum(-1)
        return (error if self.weight is None else error * self.weight[rows]).mean()


@torch.enable_grad()
def train(
    module: nn.Module,
    loss: LocalLoss,
    *,
    steps: int,
    peak_learning_rate: float = PEAK_LEARNING_RATE,
    after_step: Callable[[], None] | None = None,
) -> None:
    """So many steps of Adam with a one-cycle learning rate, in place; no gradient of the network."""
    optimiser = torch.optim.Adam(module.parameters(), lr=peak_learning_rate)
    schedule = OneCycleLR(optimiser, max_lr=peak_learning_rate, total_steps=max(2, steps))
    for _ in range(steps):
        value = loss(module, loss.draw())
        optimiser.zero_grad(set_to_none=True)
        value.backward()
        optimiser.step()
        schedule.step()
        if after_step is not None:
            after_step()


def refine(
    layer: FFNLayer,
    data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    *,
    steps: int,
    generator: torch.Generator,
    output_weight: Tensor | None = None,
    peak_learning_rate: float = PEAK_LEARNING_RATE,
) -> FFNLayer:
    """A copy of the layer after `train`; the last linear map is solved in closed form at the end.

    Args:
        data: chunks `(x, target, token weight)`, held in memory.
        output_weight: importance of each output dimension `[out]`.
    """
    refined = copy.deepcopy(layer)
    loss = LocalLoss(data, generator=generator, output_weight=output_weight)
    train(refined, loss, steps=steps, peak_learning_rate=peak_learning_rate)
    refined.fit_readout(data)
    return refined
