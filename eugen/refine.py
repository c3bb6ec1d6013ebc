"""Local refinement: a few Adam steps on one layer alone, then its readout is solved once more."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

if TYPE_CHECKING:
    from eugen.ffn import FFNLayer

PEAK_LEARNING_RATE = 3e-3
BATCH_TOKENS = 1024


@torch.enable_grad()
def refine(
    layer: FFNLayer,
    data: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    *,
    steps: int,
    generator: torch.Generator,
    output_weight: Tensor | None = None,
    peak_learning_rate: float = PEAK_LEARNING_RATE,
) -> FFNLayer:
    """A refined copy of the layer.

    Adam with a one-cycle learning rate on the layer's own weighted squared error; no gradient
    of the network. The last linear map is solved in closed form at the end.

    Args:
        data: chunks `(x, target, token weight)`, held in memory.
        output_weight: importance of each output dimension `[out]`.
    """
    x, y = torch.cat([c[0] for c in data]), torch.cat([c[1] for c in data])
    weight = None if data[0][2] is None else torch.cat([c[2] for c in data if c[2] is not None])
    weight = None if weight is None else weight / weight.mean()
    importance = torch.ones_like(y[0]) if output_weight is None else output_weight.to(y.dtype)
    # Errors are measured in units of the target's spread, so that one learning rate fits every block.
    importance = importance / (importance * y.var(0)).sum()
    refined = copy.deepcopy(layer)
    optimiser = torch.optim.Adam(refined.parameters(), lr=peak_learning_rate)
    schedule = OneCycleLR(optimiser, max_lr=peak_learning_rate, total_steps=max(2, steps))
    for _ in range(steps):
        rows = torch.randint(len(x), (min(BATCH_TOKENS, len(x)),), generator=generator).to(x.device)
        error = ((refined(x[rows]) - y[rows]).square() * importance).sum(-1)
        loss = (error if weight is None else error * weight[rows]).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
    refined.fit_readout(data)
    return refined
