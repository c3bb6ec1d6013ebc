"""End-to-end distillation: the whole compressed network against the dense one's output."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from eugen.capture import evaluating
from eugen.compression.outputs import kl, main_output

LEARNING_RATES = (3e-5, 1e-4, 3e-4)
CHECKS = 10
"""How often in one run the validation part is asked."""
PATIENCE = 3
"""A run ends after so many checks without a better one."""


@dataclass(frozen=True)
class Distilled:
    """The better of the network given and the best one found; None where nothing was better.

    Attributes:
        before, after: loss on the validation part.
    """

    model: nn.Module
    learning_rate: float | None
    before: float
    after: float


def distill(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    *,
    validation: Sequence[Any],
    steps: int,
    call: Callable[[nn.Module, Any], Any],
    seed: int = 0,
    learning_rates: Sequence[float] = LEARNING_RATES,
    progress: Callable[[str], None] | None = None,
) -> Distilled:
    """Train all floating-point parameters of a copy of the student, once with each learning rate.

    Adam, one-cycle; the loss is the KL divergence of logits over a vocabulary, else the squared error
    relative to the teacher's output. Both networks are in evaluation mode, so the target has no noise. What
    is kept was chosen on `validation`, which has to be other data than those reported on.

    Raises:
        ValueError: there is nothing to train on or to choose by.
    """
    if not batches or not validation:
        raise ValueError("distillation needs batches to train on and others to choose by: give both")
    with evaluating(student, teacher):
        best = _best(student, teacher, batches, validation, steps, call, seed, learning_rates, progress)
    return dataclasses.replace(best, model=best.model.train(student.training))


def _best(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    validation: Sequence[Any],
    steps: int,
    call: Callable[[nn.Module, Any], Any],
    seed: int,
    learning_rates: Sequence[float],
    progress: Callable[[str], None] | None,
) -> Distilled:
    before = _mean_loss(student, teacher, validation, call)
    best = Distilled(student, None, before, before)
    for rate in learning_rates:
        found = _run(student, teacher, batches, validation, rate, steps, call, seed)
        if progress is not None:
            progress(
                f"distillation at learning rate {rate:g}: validation loss {before:.5f} → {found.after:.5f}"
            )
        if found.after < best.after:
            best = dataclasses.replace(found, before=before)
    return best


def _run(
    start: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Any],
    validation: Sequence[Any],
    rate: float,
    steps: int,
    call: Callable[[nn.Module, Any], Any],
    seed: int,
) -> Distilled:
    """One learning rate; the state of the check with the lowest validation loss."""
    model = copy.deepcopy(start)
    trained = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    optimiser = torch.optim.Adam(trained, lr=rate)
    schedule = OneCycleLR(optimiser, max_lr=rate, total_steps=max(2, steps))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(batches), (steps,), generator=generator).tolist()
    best, state, waited = math.inf, None, 0
    every = max(1, steps // CHECKS)
    for step, index in enumerate(order, start=1):
        with torch.enable_grad():
            value = _loss(model, teacher, batches[index], call)
            optimiser.zero_grad(set_to_none=True)
            value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        schedule.step()
        if step % every and step != steps:
            continue
        found = _mean_loss(model, teacher, validation, call)
        if found < best:  # never true of NaN
            best, state, waited = found, copy.deepcopy(model.state_dict()), 0
        elif (waited := waited + 1) == PATIENCE:
            break
    if state is not None:
        model.load_state_dict(state)
    for ours, theirs in zip(model.parameters(), start.parameters(), strict=True):
        ours.requires_grad_(theirs.requires_grad)
        ours.grad = None
    return Distilled(model, rate, math.nan, best)


def _loss(model: nn.Module, teacher: nn.Module, batch: Any, call: Callable[[nn.Module, Any], Any]) -> Tensor:
    with torch.no_grad():
        wanted, kind = main_output(teacher, call(teacher, batch))
    given, _ = main_output(teacher, call(model, batch))
    if kind == "language":
        return kl(given, wanted)
    size = wanted.float().square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    return (given.float() - wanted.float()).square().sum() / size


@torch.no_grad()
def _mean_loss(
    model: nn.Module, teacher: nn.Module, batches: Sequence[Any], call: Callable[[nn.Module, Any], Any]
) -> float:
    return sum(float(_loss(model, teacher, batch, call)) for batch in batches) / len(batches)
