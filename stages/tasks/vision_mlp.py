"""Image classification by a multilayer perceptron: the dense network learns by backpropagation.

Its parts form a plain chain, so that layer-local rules (`eugen.local_training`) can train the same network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, overload

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from stages import images
from stages.params import TaskSettings

PASS_SEEDS = 50_000
"""Where the seeds of the passes begin; each transfer seed has so many of its own."""

Batches = list[tuple[Tensor, Tensor]]


class BaselineSettings(images.TrainingSettings):
    """The perceptron and its training."""

    width: PositiveInt
    hidden: PositiveInt
    depth: PositiveInt


class VisionMLPSettings(images.ImageSettings):
    """The task's section of params.yaml."""

    baseline: BaselineSettings


class Block(nn.Module):
    """`relu(ffn(norm(x)))`: a feed-forward block without a residual connection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.ffn(self.norm(x)))


class MLP(nn.Module):
    """Images to class scores: a stem, blocks, a head. Blocks normalise their inputs."""

    def __init__(self, pixels: int, classes: int, baseline: BaselineSettings) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(pixels, baseline.width), nn.ReLU())
        self.blocks = nn.Sequential(*(Block(baseline.width, baseline.hidden) for _ in range(baseline.depth)))
        self.head = nn.Linear(baseline.width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class VisionMLP(images.ImageTask):
    """A multilayer perceptron; an image is one token."""

    name = "vision_mlp"
    Settings: ClassVar[type[TaskSettings]] = VisionMLPSettings
    settings: VisionMLPSettings

    @property
    def tokens_per_image(self) -> int:
        return 1

    def build(self) -> nn.Module:
        pixels = self.channels * self.side**2
        return MLP(pixels, self.classes, self.settings.baseline).to(self.device)

    def local_units(self, model: nn.Module) -> tuple[list[nn.Module], nn.Linear]:
        assert isinstance(model, MLP)
        return [model.stem, *model.blocks], model.head

    def local_data(self, seed: int) -> Sequence[Batches]:
        return AugmentedPasses(self, PASS_SEEDS * (1 + seed))


class AugmentedPasses(Sequence[Batches]):
    """As many passes over the training images as the dense network gets, each shuffled and augmented anew.

    A pass is the same whenever it is read.
    """

    def __init__(self, task: VisionMLP, first_seed: int) -> None:
        self.task, self.first_seed = task, first_seed

    def __len__(self) -> int:
        return self.task.settings.baseline.epochs

    @overload
    def __getitem__(self, index: int) -> Batches: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batches]: ...
    def __getitem__(self, index: int | slice) -> Batches | list[Batches]:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        generator = torch.Generator().manual_seed(self.first_seed + number)
        return list(self.task.training_batches(generator))
