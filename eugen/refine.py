"""Local refinement: a few Adam steps on one layer alone, then its readout is solved once more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from eugen import parallel
from eugen.activations import Activations

if TYPE_CHECKING:
    from eugen.ffn import FFNLayer

PEAK_LEARNING_RATE = 3e-3
BATCH_TOKENS = 1024


class LocalLoss:
    """A layer's own weighted squared error on random batches of its inputs and targets.

    In units of the target's spread, so that one learning rate fits every block. Several processes
    (`eugen.parallel`) draw one batch from the tokens of all, and each has the part of the error that its own
    tokens make.

    Args:
        data: chunks `(x, target, token weight)`; a batch is read from where they are kept.
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
        self.data = data if isinstance(data, Activations) else Activations.of(data)
        self.first, self.count = parallel.place(self.data.tokens)
        variance, self.mean_weight = self._spread()
        importance = torch.ones_like(variance) if output_weight is None else output_weight.double()
        spread = (importance * variance).sum()
        self.importance = (importance / torch.where(spread > 0, spread, 1)).to(self.data[0][1].dtype)
        self.generator = generator

    @torch.no_grad()
    def _spread(self) -> tuple[Tensor, float]:
        """Variance of each target `[out]`, float64, and the mean weight of a token, 1 without weights."""
        y = self.data[0][1].double()
        (start,) = parallel.from_first(y[0] if len(y) else y.new_zeros(y.shape[1]))
        total, square, weights = torch.zeros_like(start), torch.zeros_like(start), 0.0
        for _, y, weight in self.data:
            away = y.double() - start  # exactly 0 for targets that do not vary
            total, square = total + away.sum(0), square + away.square().sum(0)
            weights += len(y) if weight is None else float(weight.double().sum())
        total, square = parallel.total(total, square)
        (weights,) = parallel.total_of(weights)
        return (square / self.count - (total / self.count).square()).clamp(min=0), weights / self.count

    def draw(self) -> Tensor:
        """The next batch's tokens, counted over all processes."""
        return torch.randint(self.count, (min(BATCH_TOKENS, self.count),), generator=self.generator)

    def _own(self, rows: Tensor) -> Tensor:
        """Which of a batch's tokens this process has, counted over its own."""
        own = rows - self.first
        return own[(own >= 0) & (own < self.data.tokens)]

    def share(self, rows: Tensor) -> float:
        """The part of a batch that this process has."""
        return len(self._own(rows)) / len(rows)

    def __call__(self, layer: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        """The mean error of the layer on these tokens: this process's summand of it."""
        x, y, weight = self.data.gather(self._own(rows))
        error = ((layer(x) - y).square() * self.importance).sum(-1)
        error = error if weight is None else error * (weight / self.mean_weight)
        return error.sum() / len(rows)


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
        parallel.sum_gradients(module.parameters())
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
        data: chunks `(x, target, token weight)`.
        output_weight: importance of each output dimension `[out]`.
    """
    refined = copy.deepcopy(layer)
    loss = LocalLoss(data, generator=generator, output_weight=output_weight)
    train(refined, loss, steps=steps, peak_learning_rate=peak_learning_rate)
    refined.fit_readout(data)
    return refined
