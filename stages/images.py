"""What the image-classification tasks share: the data and their parts, training, accuracy.

A task adds its network (`build`) and how many tokens an image makes (`tokens_per_image`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from pydantic import PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from stages.checkpoint import resume, save
from stages.params import Section, TaskSettings
from stages.tasks import DataSource, Log, Task

LABEL_SMOOTHING = 0.05
OFFICIAL_TEST = {"cifar10": 10_000}
"""Sources whose last images are an official test split: the test part is drawn from it alone."""
SPLIT_SEED = 0
CLASSES = 10
"""Of either source."""


class DataSettings(Section):
    """Which images, and how many are held out; the rest is for training."""

    source: Literal["mnist_5k", "cifar10"] = "mnist_5k"
    validation: PositiveInt
    test: PositiveInt


class TrainingSettings(Section):
    """How the dense network is trained; a task adds its sizes."""

    epochs: PositiveInt
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    seed: int = 0


class ImageSettings(TaskSettings):
    """The part of a section that the tasks have in common."""

    data: DataSettings
    baseline: TrainingSettings


class ImageTask(Task):
    """Top-1 accuracy on held-out images."""

    quality_name = "top1"
    settings: ImageSettings

    @property
    @abstractmethod
    def tokens_per_image(self) -> int:
        """How many tokens of a feed-forward block an image makes."""

    def prepare(self, folder: Path) -> dict[str, DataSource]:
        from stages.data import sources, verify

        images, labels = getattr(sources, self.settings.data.source)()
        data = self.settings.data
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        official = OFFICIAL_TEST.get(data.source, 0)
        order = torch.randperm(len(images) - official, generator=generator)
        if official:
            if data.test > official:
                raise ValueError(
                    f"tasks.{self.name}.data.test = {data.test}: {data.source} has {official} test images"
                )
            chosen = torch.randperm(official, generator=generator)[: data.test]
            order = torch.cat([len(images) - official + chosen, order])
        held_out = data.test + data.validation
        if held_out >= len(images):
            raise ValueError(
                f"tasks.{self.name}.data: test={data.test} and validation={data.validation} leave nothing of "
                f"{len(images)} images for training"
            )
        parts = {
            "test": order[: data.test],
            "validation": order[data.test : held_out],
            "train": order[held_out:],
        }
        tensors = {}
        for part, rows in parts.items():
            tensors[f"{part}.images"] = torch.from_numpy(images)[rows].contiguous()
            tensors[f"{part}.labels"] = torch.from_numpy(labels)[rows].contiguous()
        save_file(tensors, folder / "images.safetensors")
        sha256 = verify.sha256_arrays({"images": images, "labels": labels})
        return {data.source: DataSource(sha256, len(images))}

    @cached_property
    def _data(self) -> dict[str, Tensor]:
        return load_file(self.folder / "images.safetensors")

    def _images(self, part: str) -> Tensor:
        """Images `[N, channels, side, side]`, normalised by the training part's mean and deviation."""
        mean, deviation = self._statistics
        images = self._data[f"{part}.images"].to(self.device, torch.float32)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return ((images - mean) / deviation).contiguous()

    @cached_property
    def _statistics(self) -> tuple[float, float]:
        train = self._data["train.images"].float()
        return float(train.mean()), float(train.std())

    def _labels(self, part: str) -> Tensor:
        return self._data[f"{part}.labels"].to(self.device, torch.int64)

    @property
    def side(self) -> int:
        """Pixels along each edge."""
        return self._data["train.images"].shape[1]

    @property
    def channels(self) -> int:
        """Colours of a pixel."""
        images = self._data["train.images"]
        return 1 if images.dim() == 3 else images.shape[-1]

    def train_dense(self, out: Path, checkpoint: Path, log: Log) -> nn.Module:
        settings = self.settings.baseline
        generator = torch.Generator().manual_seed(settings.seed)
        # Initial weights come from the global generator: fork it, so that nobody else notices.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model = self.build()
        steps = len(self._train[0]) // settings.batch_size
        optimiser = torch.optim.AdamW(
            model.parameters(), lr=settings.learning_rate, weight_decay=0.05, betas=(0.9, 0.98)
        )
        schedule = OneCycleLR(
            optimiser, max_lr=settings.learning_rate, total_steps=steps * settings.epochs, pct_start=0.15
        )
        first = resume(checkpoint, model, optimiser, schedule, generator)
        for epoch in range(first, settings.epochs):
            model.train()
            total = 0.0
            for batch, labels in self.training_batches(generator):
                loss = F.cross_entropy(model(batch), labels, label_smoothing=LABEL_SMOOTHING)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimiser.step()
                schedule.step()
                total += float(loss.detach())
            log("train_loss", total / steps, epoch)
            log("validation_top1", self.evaluate(model, "validation")["top1"], epoch)
            save(checkpoint, epoch + 1, model, optimiser, schedule, generator)
        return model.eval()

    def training_batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training images, shuffled and augmented; an incomplete last batch is left out."""
        images, labels = self._train
        size = self.settings.baseline.batch_size
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(images) // size * size].view(-1, size):
            yield augment(images[rows], generator), labels[rows]

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    def calibration(self, seed: int, tokens: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        images, _ = self._train
        count = -(-tokens // self.tokens_per_image)
        rows = torch.randint(len(images), (count,), generator=generator)
        return list(augment(images[rows], generator).split(64))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        model.eval()
        predicted = torch.cat([model(batch).argmax(-1) for batch in self._images(part).split(250)])
        return {"top1": float((predicted == self._labels(part)).double().mean())}

    def loss(self, model: nn.Module, batch_size: int, generator: torch.Generator) -> Tensor:
        images, labels = self._train
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        return F.cross_entropy(
            model(augment(images[rows], generator)), labels[rows], label_smoothing=LABEL_SMOOTHING
        )

    @cached_property
    def _train(self) -> tuple[Tensor, Tensor]:
        return self._images("train"), self._labels("train")

    def example(self, batch: int) -> Tensor:
        images = self._images("test")
        return images[torch.arange(batch) % len(images)]


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random rotation, scale, shear and shift of each image, `[N, C, H, W]`."""

    def uniform(*shape: int, most: float) -> Tensor:
        return ((torch.rand(*shape, generator=generator) * 2 - 1) * most).to(images.device)

    n = len(images)
    angle, scale, shear = uniform(n, most=0.2), 1 + uniform(n, most=0.12), uniform(n, most=0.2)
    shift = uniform(n, 2, most=0.14)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, shear - sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
