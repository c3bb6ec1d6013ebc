"""The one training loop: AdamW with warm-up and decay, accumulation, several processes, exact resume."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from eugen import FFNLayer
from stages import checkpoint as checkpoints
from stages.distributed import Place, here, without_sync
from stages.recipe import TrainingRecipe
from stages.tasks import Log, Task
from stages.tracking.record import CurvePoint


class Diverged(FloatingPointError):
    """The loss became NaN or infinite; the message says when. Such a training never counts as a number."""


@dataclasses.dataclass
class State:
    """What a training is made of besides its network, and how far it is."""

    optimiser: torch.optim.Optimizer
    schedule: LRScheduler
    generator: torch.Generator
    curve: list[CurvePoint]

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.curve[-1].step if self.curve else 0

    @property
    def seconds(self) -> float:
        """Spent on them."""
        return self.curve[-1].seconds if self.curve else 0.0


def train(
    task: Task,
    model: nn.Module,
    recipe: TrainingRecipe,
    *,
    checkpoint: Path | None = None,
    log: Log | None = None,
) -> list[CurvePoint]:
    """Train the model in place; returns its curve, a point every `recipe.evaluate_every` steps.

    Under torchrun each process takes its part of every batch, and the result is that of one process with
    the whole batch. A point is also a checkpoint: a training that goes on from one ends as if it had never
    stopped.

    Args:
        checkpoint: file to save progress in and to resume from, if it exists.
        log: receives `train_loss` and the validation quality at each point.

    Raises:
        Diverged: loss or validation quality is not finite at a point.
        ValueError: the checkpoint is of another configuration.
    """
    place, replica = here(), here().replica(model)
    state, identity = _start(model, recipe), _identity(task, model, recipe)
    if checkpoint is not None:
        state.curve = checkpoints.resume(checkpoint, identity, model, state)
    while state.step < recipe.steps:
        stop = min(recipe.steps, state.step + recipe.evaluate_every)
        began = time.perf_counter()
        loss = _advance(task, replica, recipe, state, place, stop)
        seconds = state.seconds + time.perf_counter() - began
        validation = task.evaluate(model, "validation")[task.quality_name]
        _check_finite(loss, validation, f"steps {state.step} and {stop}, lr {recipe.learning_rate:g}")
        point = CurvePoint(step=stop, seconds=seconds, train_loss=loss, validation=validation)
        state.curve.append(point)
        if log is not None and place.first:
            log("train_loss", point.train_loss, stop)
            log(f"validation_{task.quality_name}", point.validation, stop)
        if checkpoint is not None and place.first:
            checkpoints.save(checkpoint, identity, model, state)
    model.eval()
    return state.curve


def step(
    task: Task,
    replica: nn.Module,
    recipe: TrainingRecipe,
    optimiser: torch.optim.Optimizer,
    batch: tuple[Tensor, ...],
    place: Place | None = None,
) -> Tensor:
    """One optimiser step on a whole batch; returns the loss of this process's part of it."""
    batch = (place or Place()).share(batch)
    size = len(batch[0])
    parts = list(zip(*(tensor.split(recipe.micro_batch or size) for tensor in batch), strict=True))
    device = batch[0].device
    total = torch.zeros((), device=device)
    optimiser.zero_grad(set_to_none=True)
    for number, part in enumerate(parts):
        with (
            without_sync(replica, number < len(parts) - 1),
            torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"),
        ):
            share = len(part[0]) / size
            loss = share * (task.batch_loss(replica, part) + auxiliary_loss(replica))
            loss.backward()
        total += loss.detach()
    nn.utils.clip_grad_norm_(_trained(replica), recipe.clip)
    optimiser.step()
    return total


def optimiser_of(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases and gains do not."""
    weights = _trained(model)
    groups = [
        {"params": [w for w in weights if w.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas)


def rate(recipe: TrainingRecipe, done: int) -> float:
    """Learning rate of the step after `done` ones, over the highest: linear warm-up, then cosine to 0."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if done < warmup:
        return (done + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1, recipe.steps - warmup)))


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """What the replaced blocks ask for beside the task's loss, for example hard decisions of a tree."""
    asked = [layer.auxiliary_loss() for layer in model.modules() if isinstance(layer, FFNLayer)]
    return sum((loss for loss in asked if loss is not None), 0.0)


def _start(model: nn.Module, recipe: TrainingRecipe) -> State:
    optimiser = optimiser_of(model, recipe)
    schedule = LambdaLR(optimiser, partial(rate, recipe))
    return State(optimiser, schedule, torch.Generator().manual_seed(recipe.seed), [])


def _advance(
    task: Task, replica: nn.Module, recipe: TrainingRecipe, state: State, place: Place, stop: int
) -> float:
    """Train up to step `stop`; returns the mean loss on the way."""
    replica.train()
    first = state.step
    total: Tensor | float = 0.0
    with torch.random.fork_rng():
        # Dropout draws from the global generator. Seeded at each point, a resumed training draws the same.
        torch.manual_seed(recipe.seed + 1_000_003 * first + place.rank)
        for _ in range(first, stop):
            batch = task.draw(recipe.batch_size, state.generator)
            total = total + step(task, replica, recipe, state.optimiser, batch, place)
            state.schedule.step()
    return float(place.mean(torch.as_tensor(total))) / (stop - first)


def _check_finite(loss: float, validation: float, where: str) -> None:
    if not math.isfinite(loss + validation):
        raise Diverged(f"loss {loss}, validation quality {validation} between {where}")


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _identity(task: Task, model: nn.Module, recipe: TrainingRecipe) -> dict[str, str]:
    """What a checkpoint must agree with, by name: settings, the tensors' shapes, a digest of the modules."""
    parts = {"data": task.settings.data, "baseline": task.settings.baseline, "recipe": recipe}
    named = {f"{part}.{key}": str(value) for part, settings in parts.items() for key, value in settings}
    shapes = {name: str(tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    return named | shapes | {"modules": hashlib.sha256(str(model).encode()).hexdigest()[:16]}
