"""The tasks: one file each, found by name.

A task is data, a model, a training recipe and a quality measure.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import eugen
from eugen.local_training import Passes
from stages.faults import ParamsError, validate
from stages.params import Params, ScratchVariant, TaskSettings, TrainingRecipe

DATA = Path("data")
BASELINE = Path("artifacts/baseline")

Log = Callable[[str, float, int], None]
"""Receives one point of a training curve: name, value, step."""


@dataclass(frozen=True)
class DataSource:
    """A verified data set: SHA-256 of what was decoded, and how many rows (images, works, files) it has."""

    sha256: str
    rows: int


class DoesNotApply(ValueError):
    """A row that has no meaning for a task; the message says why."""


class Task(ABC):
    """What the six verbs ask of a task. Data are read from `folder` when first needed.

    Subclasses are named by their module: `stages/tasks/<name>.py` defines one `Task` subclass.
    """

    name: ClassVar[str]
    quality_name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    computed: ClassVar[bool] = False
    """Whether the data are computed here, without an archive to fetch."""
    Settings: ClassVar[type[TaskSettings]]

    def __init__(self, settings: TaskSettings, folder: Path, device: str = "cpu") -> None:
        self.settings = settings
        self.folder = folder
        self.device = device

    @abstractmethod
    def prepare(self, folder: Path) -> dict[str, DataSource]:
        """Fetch, verify and write the task's data into `folder`; returns the sources by name."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The dense architecture on the task's device, its weights not those of the baseline."""

    def recipe(self) -> TrainingRecipe:
        """How a network of this task is trained from scratch.

        Raises:
            DoesNotApply: the task's network comes trained, or is never trained.
        """
        recipe = getattr(self.settings.baseline, "training", None)
        if not isinstance(recipe, TrainingRecipe):
            raise DoesNotApply(f"task {self.name!r} trains no network from scratch")
        return recipe

    def fresh(self, seed: int) -> nn.Module:
        """The dense architecture with initial weights drawn by the seed."""
        # Initial weights come from the global generator: fork it, so that nobody else notices.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.build()

    def train_dense(self, out: Path, checkpoint: Path, log: Log) -> nn.Module:
        """The trained dense network; further files that later stages need go to `out`.

        Args:
            checkpoint: file to save progress in and to resume from, if it exists.
        """
        from stages.training import train

        model = self.fresh(self.recipe().seed)
        train(self, model, self.recipe(), checkpoint=checkpoint, log=log)
        return model

    @abstractmethod
    def call(self, model: nn.Module, batch: Any) -> Tensor:
        """How a batch of `calibration` or `example` goes into the model."""

    @abstractmethod
    def calibration(self, seed: int, tokens: int) -> list[Any]:
        """Batches of training inputs with about that many tokens in all, chosen by the seed."""

    @abstractmethod
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        """Quality measures on the `validation` or `test` part; holds `quality_name`."""

    @abstractmethod
    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """One random training batch; the first dimension of every tensor is the example.

        All that is random (augmentation, jitter along rays) is in the batch, so that a batch can be cut into
        micro-batches and over processes.
        """

    @abstractmethod
    def batch_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Training loss, the mean over the batch's examples."""

    def loss(self, model: nn.Module, batch_size: int, generator: torch.Generator) -> Tensor:
        """Training loss on one random batch."""
        return self.batch_loss(model, self.draw(batch_size, generator))

    @abstractmethod
    def example(self, batch: int) -> Any:
        """An input of fixed shape with that many examples, for cost and latency."""

    def pictures(self, model: nn.Module, folder: Path) -> list[Path]:
        """Small PNG files that show what a network makes, for the report; most tasks have none."""
        return []

    def truth_pictures(self, folder: Path) -> list[Path]:
        """What the network's pictures should show, under the same names."""
        return []

    def local_units(self, model: nn.Module) -> tuple[list[nn.Module], nn.Linear]:
        """The network as a chain of units and its head, for rows that train layer by layer.

        Raises:
            DoesNotApply: the task's network is no such chain.
        """
        raise DoesNotApply(f"task {self.name!r} has no chain of units that could be trained one by one")

    def local_data(self, seed: int) -> Passes:
        """The training data for such rows: as many passes as the dense network gets, drawn by the seed."""
        raise DoesNotApply(f"task {self.name!r} has no labelled examples for layer-local training")


def task_names() -> list[str]:
    """Every task there is a file for."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def task_class(name: str) -> type[Task]:
    """The task of that name.

    Raises:
        ParamsError: there is no file of that name.
    """
    if name not in task_names():
        raise ParamsError(f"tasks.{name}: unknown task, there is a file for {', '.join(task_names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    (found,) = [
        c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Task) and c is not Task
    ]
    return found


def task_settings(params: Params, name: str, baseline: dict[str, Any] | None = None) -> TaskSettings:
    """The validated section of a task, keys of `baseline` in place of its own."""
    cls = task_class(name)
    if name not in params.tasks:
        raise ParamsError(f"tasks.{name}: not in params.yaml, which has {', '.join(params.tasks)}")
    section = params.tasks[name]
    if baseline:
        section = {**section, "baseline": {**section.get("baseline", {}), **baseline}}
    return validate(cls.Settings, section, f"tasks.{name}")


def open_task(params: Params, name: str, baseline: dict[str, Any] | None = None) -> Task:
    """A task with its settings and its data folder; `baseline` replaces keys of that part of its section."""
    return task_class(name)(task_settings(params, name, baseline), DATA / name, params.run.device)


def changed_baseline(params: Params, name: str, variant: ScratchVariant) -> dict[str, Any]:
    """The keys of a task's `baseline` that a variant trained from scratch replaces."""
    changed = dict(variant.sizes)
    if variant.training:
        changed["training"] = {**params.tasks[name]["baseline"]["training"], **variant.training}
    return changed


def last_blocks(model: nn.Module, wanted: int | None) -> Callable[[eugen.FFNSite], bool] | None:
    """The `where` of `eugen.replace` that takes the model's last blocks; None, hence all, for None.

    Raises:
        ValueError: the model has fewer blocks.
    """
    if wanted is None:
        return None
    found = len(eugen.find_ffns(model))
    if wanted > found:
        raise ValueError(f"blocks = {wanted}: the network has {found} feed-forward blocks")
    return lambda site: site.index >= found - wanted
