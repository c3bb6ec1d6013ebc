"""Forward Projection: each linear map is solved in closed form, front to back, without feedback.

O'Shea and Rajendran, https://arxiv.org/abs/2501.16476: a linear map with input `A [N, in]` gets as the target
of its output `Z̃ = g(A Q) + g(Y U)`, with fixed Gaussian `Q [in, out]` and `U [classes, out]`, one-hot labels
`Y [N, classes]` and `g` the sign, and is the ridge regression of `Z̃` on `A`. The head is the ridge
regression of the labels on the last unit's output. Here the regressions are centred (they have a bias) and
their ridge is relative to standardised inputs (`eugen.least_squares`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eugen.local_training.rule import LocalRule, Passes, batches, require_something, solve, solve_head
from eugen.shapes import Float


@dataclass(frozen=True, kw_only=True)
class ForwardProjection(LocalRule, name="forward_projection"):
    """Closed-form regression of each linear map on targets made of random projections.

    Args:
        passes: how many of the data's passes to use; they are held in memory.
        ridge: of each unit's linear maps, relative to the unit variance of standardised inputs.
        head_ridge: the same for the head.
    """

    passes: int = 1
    ridge: float = 1e-1
    head_ridge: float = 1e-3

    def __post_init__(self) -> None:
        self.require_positive("passes", "ridge", "head_ridge")

    @torch.no_grad()
    def train(
        self, units: Sequence[nn.Module], head: nn.Linear, data: Passes, *, generator: torch.Generator
    ) -> None:
        require_something(units, data)
        for number, unit in enumerate(units):
            _require_linear(unit, number)
        rows = []
        for number in range(min(self.passes, len(data))):  # a pass is one chunk: fewer, larger products
            found = [(x, labels) for _, x, labels in batches([data[number]], head)]
            rows.append((torch.cat([x for x, _ in found]), torch.cat([labels for _, labels in found])))
        for unit in units:
            for linear in linear_maps(unit, rows[0][0]):
                self._fit(unit, linear, rows, head.out_features, generator)
            rows = [(unit(x), labels) for x, labels in rows]
        solve_head(head, rows, ridge=self.head_ridge)

    def _fit(
        self,
        unit: nn.Module,
        linear: nn.Linear,
        rows: list[tuple[Tensor, Tensor]],
        classes: int,
        generator: torch.Generator,
    ) -> None:
        """Solve one linear map of a unit, those before it solved already."""
        q = torch.randn(linear.in_features, linear.out_features, generator=generator).to(linear.weight)
        u = torch.randn(classes, linear.out_features, generator=generator).to(linear.weight)
        seen = [(input_of(unit, linear, x), labels) for x, labels in rows]
        solve(linear, ((a, torch.sign(a @ q) + torch.sign(u)[labels]) for a, labels in seen), self.ridge)


def linear_maps(unit: nn.Module, x: Tensor) -> list[nn.Linear]:
    """The linear maps of a unit in the order in which they run."""
    ran: list[nn.Linear] = []

    def note(linear: nn.Linear) -> Callable[..., None]:
        return lambda *_: ran.append(linear)

    found = [module for module in unit.modules() if isinstance(module, nn.Linear)]
    handles = [linear.register_forward_pre_hook(note(linear)) for linear in found]
    try:
        unit(x[:1])
    finally:
        for handle in handles:
            handle.remove()
    return ran


def input_of(unit: nn.Module, linear: nn.Linear, x: Tensor) -> Float[Tensor, "t d_in"]:
    """What a linear map is given when its unit runs."""
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        unit(x)
    finally:
        handle.remove()
    return seen[0].flatten(0, -2)


def _require_linear(unit: nn.Module, number: int) -> None:
    """Raise ValueError for a unit with weights that no linear map or norm holds."""
    for name, module in unit.named_modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            continue
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            raise ValueError(
                f"forward_projection solves nn.Linear maps; unit {number} has other weights in "
                f"{name or type(module).__name__}: use layer 'dense' or 'narrow', or rule 'mono_forward'"
            )
