"""Rows trained from scratch in one variant: equal starts, equal batches, and what a training step costs."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import eugen
from eugen.cost import model_cost
from eugen.timing import compare
from stages import distributed
from stages.checkpoint import Progress
from stages.params import ScratchSettings, ScratchVariant
from stages.recipe import TrainingRecipe
from stages.rows import Method
from stages.tasks import DoesNotApply, Task, last_blocks
from stages.tracking import Run, record
from stages.tracking.run import digest
from stages.training import Diverged, optimiser_of, step, train

BLOCK_SEEDS = 60_000
"""Where the seeds of the replaced blocks begin: from one stream, their draws would be the other weights."""
SCALE_SEEDS, SCALE_TOKENS = 70_000, 1024
"""Where the seeds of the inputs begin that set the blocks' scale, and how many these are."""
TIMING_SECONDS = 20.0
"""The longest that the training steps of one cost are timed; ten pairs are, whatever they take."""


@dataclass(frozen=True)
class Comparison:
    """One variant on one task: what every row of it has in common."""

    name: str
    task: Task
    settings: ScratchSettings
    variant: ScratchVariant

    @property
    def recipe(self) -> TrainingRecipe:
        return self.task.recipe()

    @property
    def seeds(self) -> list[int]:
        return self.variant.seeds or self.settings.seeds

    @property
    def rates(self) -> list[float]:
        return self.variant.learning_rates or self.settings.learning_rates

    def budgets(self, row: Method) -> list[float]:
        return row.budgets(self.variant.budgets or self.settings.budgets)

    def network(self, config: eugen.LayerConfig, seed: int) -> nn.Module:
        """The untrained network with the variant's blocks replaced.

        Dense blocks stay as the task draws them. Others get the output scale of the dense blocks in whose
        place they stand, so that no row gains or loses by its initialiser.
        """
        fresh = self.task.fresh(seed)
        where = last_blocks(fresh, self.variant.blocks)
        result = eugen.replace(fresh, config, where=where, seed=BLOCK_SEEDS + seed)
        known = {site.name: site.dense for site in eugen.find_ffns(fresh)}
        for site in result.sites:
            start_as(site.layer, known[site.name], torch.Generator().manual_seed(SCALE_SEEDS + seed))
        return result.model


@torch.no_grad()
def start_as(layer: eugen.FFNLayer, dense: eugen.DenseFFN, generator: torch.Generator) -> None:
    """Give an untrained layer the dense block's scale: equal output deviation on standard normal inputs.

    Raises:
        DoesNotApply: the layer ends in no linear map whose scale could be set.
    """
    if isinstance(layer, eugen.DenseFFN) and layer.hidden_features == dense.hidden_features:
        layer.load_state_dict(dense.state_dict())
        return
    if layer.readout is None:
        raise DoesNotApply(f"{type(layer).__name__} has no output map to set its initial scale by")
    weight = layer.readout.weight
    x = torch.randn(SCALE_TOKENS, dense.in_features, generator=generator).to(weight.device, weight.dtype)
    factor = dense(x).std() / layer(x).std()
    for parameter in layer.readout.parameters():
        parameter.mul_(factor)


class Trainings:
    """The trainings of a row at one budget of a variant."""

    def __init__(
        self, comparison: Comparison, row: Method, budget: float, progress: Progress, run: Run
    ) -> None:
        self.comparison, self.budget, self.progress, self.run = comparison, budget, progress, run
        self.config = row.config(budget)
        # The first budget goes without saying, so that a chart shows its curve beside the dense row's.
        first = budget == comparison.budgets(row)[0]
        self.chart = comparison.name if first else f"{comparison.name}-budget{budget:g}"
        settings = comparison.task.settings
        # What a training depends on besides its rate and seed: a finished one serves while this is the same,
        # in other variants too. Dense blocks replace nothing, so their number does not matter.
        blocks = None if isinstance(self.config, eugen.DenseConfig) else comparison.variant.blocks
        depends = [settings.data.model_dump(), settings.baseline.model_dump(), blocks]
        self.key = digest([*depends, row.section])

    def one(self, rate: float, seed: int) -> record.ScratchRun:
        """One training, taken up where it stopped."""
        label = f"budget{self.budget:g}-lr{rate:g}-seed{seed}"
        name, unit = f"{self.comparison.name}-{label}", f"{label}-{self.key}"
        if (found := self.progress.load(unit)) is not None:
            return record.ScratchRun.model_validate(found[0] | {"variant": self.comparison.name})
        began, checkpoint = time.perf_counter(), self.progress.folder / f"{unit}.pt"
        done: dict[str, Any] = {"validation": None, "quality": None, "diverged": True}
        try:
            done = self._train(rate, seed, checkpoint)
            curve = [(point.step, point.validation) for point in done["curve"]]
            self.run.curve(f"{self.chart}-lr{rate:g}-seed{seed}.{self.comparison.task.quality_name}", curve)
            self.run.progress(f"{name}: {self.comparison.task.quality_name} {done['quality']:.4f}")
        except Diverged as error:
            self.run.progress(f"{name}: {error}")
        done = {"seconds": time.perf_counter() - began, **done}
        named = {"variant": self.comparison.name, "budget": self.budget, "seed": seed, "learning_rate": rate}
        result = record.ScratchRun(**named, chosen=False, **done)
        if distributed.here().first:
            self.progress.store(unit, result.model_dump(mode="json"), {})
            checkpoint.unlink(missing_ok=True)
        return result

    def _train(self, rate: float, seed: int, checkpoint: Path) -> dict[str, Any]:
        """Train and judge. Raises Diverged if anything measured is not finite."""
        task = self.comparison.task
        recipe = self.comparison.recipe.model_copy(update={"learning_rate": rate, "seed": seed})
        model = self.comparison.network(self.config, seed)
        curve = train(task, model, recipe, checkpoint=checkpoint)
        measured = task.evaluate(model, "test")
        if not all(math.isfinite(value) for value in measured.values()):
            raise Diverged(f"on the test part: {measured}")
        quality = measured.pop(task.quality_name)
        last = curve[-1]
        return {
            "validation": last.validation,
            "quality": quality,
            "extra": measured,
            "curve": curve,
            "seconds": last.seconds,
        }


def measure_cost(comparison: Comparison, config: eugen.LayerConfig, budget: float) -> record.ScratchCost:
    """Exact cost, and training steps timed beside the dense network's."""
    task, recipe = comparison.task, comparison.recipe
    networks = [comparison.network(c, seed=0) for c in (eugen.DenseConfig(), config)]
    costs = [model_cost(network.eval(), task.example(1), task.call) for network in networks]
    batch = task.draw(recipe.batch_size, torch.Generator().manual_seed(0))
    steps = [Step(task, network.train(), recipe, batch) for network in networks]
    timed = compare(
        *steps, pairs=comparison.settings.timing_pairs, max_seconds=TIMING_SECONDS, device=task.device
    )
    speedup, low, high = timed.speedup()
    blocks = len(eugen.find_ffns(task.fresh(0)))
    return record.ScratchCost(
        variant=comparison.name,
        budget=budget,
        blocks=blocks,
        blocks_replaced=comparison.variant.blocks or blocks,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        params=costs[1].params,
        params_dense=costs[0].params,
        macs=costs[1].macs,
        macs_dense=costs[0].macs,
        ffn_macs=costs[1].ffn_macs,
        ffn_macs_dense=costs[0].ffn_macs,
        step_ms_dense=timed.base_ms,
        step_ms=timed.other_ms,
        training_speedup=speedup,
        training_speedup_low=low,
        training_speedup_high=high,
    )


class Step:
    """A training step on one batch, to be timed."""

    def __init__(
        self, task: Task, model: nn.Module, recipe: TrainingRecipe, batch: tuple[torch.Tensor, ...]
    ) -> None:
        self.task, self.model, self.recipe, self.batch = task, copy.deepcopy(model), recipe, batch
        self.optimiser = optimiser_of(self.model, recipe)

    def __call__(self) -> None:
        with torch.enable_grad():
            step(self.task, self.model, self.recipe, self.optimiser, self.batch)
