"""What the image-classification tasks share: the data and their parts, training, accuracy.

A task adds its network (`build`) and how many tokens an image makes (`tokens_per_image`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from stages.params import Section, TaskSettings, TrainingRecipe
from stages.tasks import DataSource, Task

if TYPE_CHECKING:
    from stages.data.parts import LabelledImages

LABEL_SMOOTHING = 0.05
STATISTICS_IMAGES = 10_000
"""From how many training images, at most, the pixels' mean and deviation are taken: their order is random."""
EVALUATION_BATCH = 250


class DataSettings(Section):
    """Which images, and how many are held out; the rest is for training."""

    source: Literal["mnist_5k", "cifar10", "folder"] = "mnist_5k"
    folder: str | None = None
    """For `folder`: ImageNet's layout (`stages.data.folders`). For `cifar10`: where a copy may lie."""
    side: PositiveInt | None = None
    """For `folder`: pixels along each edge to which images are resized."""
    limit: PositiveInt | None = None
    """At most so many images of each class, an official test split not counted; None for all."""
    validation: PositiveInt
    test: PositiveInt

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.source == "folder" and (self.folder is None or self.side is None):
            raise ValueError("source: folder needs `folder`, its path, and `side`, pixels along each edge")
        if self.source != "folder" and self.side is not None:
            raise ValueError(f"side = {self.side}: images of {self.source} have a fixed size, leave it out")
        if self.source == "mnist_5k" and self.folder is not None:
            raise ValueError(f"folder = {self.folder!r}: mnist_5k is read from its archive, leave it out")
        return self


class TrainingSettings(Section):
    """How the dense network is trained; a task adds its sizes."""

    epochs: PositiveInt
    """In steps of an epoch each; images are drawn with replacement, so one epoch sees about 63 % of them."""
    batch_size: PositiveInt
    learning_rate: PositiveFloat
    seed: int = 0
    mixup: float = Field(default=0.0, ge=0)
    """Parameter of mixup's Beta distribution (arXiv:1710.09412); 0 for none."""
    cutmix: float = Field(default=0.0, ge=0)
    """The same of CutMix (arXiv:1905.04899). With both, a fair coin decides for each image."""
    precision: Literal["float32", "bfloat16"] = "float32"
    micro_batch: PositiveInt | None = None


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
        from stages.data import parts

        data, source = self.settings.data, self._source()
        where = f"tasks.{self.name}.data"
        chosen = parts.split(
            source, test=data.test, validation=data.validation, limit=data.limit, where=where
        )
        parts.write(folder / "images.safetensors", source, chosen)
        return {data.source: DataSource(source.sha256, source.rows)}

    def _source(self) -> LabelledImages:
        from stages.data import folders, parts, sources

        data = self.settings.data
        path = None if data.folder is None else Path(data.folder)
        if data.source == "folder":
            assert path is not None and data.side is not None
            return folders.ImageFolder(path, data.side)
        if data.source == "cifar10":
            images, labels = sources.cifar10(path)
            return parts.DecodedImages(
                "cifar10",
                images,
                labels,
                classes=sources.CIFAR10_CLASSES,
                official=sources.CIFAR10_TEST,
            )
        return parts.DecodedImages("mnist_5k", *sources.mnist_5k(), classes=[*"0123456789"])

    @cached_property
    def _data(self) -> dict[str, Tensor]:
        """Mapped from the file, not loaded: the images may be more than memory holds."""
        return load_file(self.folder / "images.safetensors")

    def _images(self, part: str, rows: Tensor) -> Tensor:
        """Images `[n, channels, side, side]`, normalised by the training part's mean and deviation."""
        mean, deviation = self._statistics
        images = self._data[f"{part}.images"][rows].to(self.device)
        images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2)
        return ((images - mean) / deviation).contiguous()

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of each colour's pixels, `[channels, 1, 1]`."""
        pixels = self._data["train.images"][:STATISTICS_IMAGES].reshape(-1, self.channels)
        total = squares = torch.zeros(self.channels, dtype=torch.int64)
        for chunk in pixels.split(1 << 22):  # sums of integers: exact in any order
            total = total + chunk.long().sum(0)
            squares = squares + chunk.long().square().sum(0)
        mean = total.double() / len(pixels)
        variance = squares.double() / len(pixels) - mean.square()
        # Images of one colour only would be divided by 0.
        both = mean, variance.clamp(min=1.0).sqrt()
        mean, deviation = (values.float().view(-1, 1, 1).to(self.device) for values in both)
        return mean, deviation

    def _labels(self, part: str) -> Tensor:
        return self._data[f"{part}.labels"].to(self.device, torch.int64)

    @cached_property
    def classes(self) -> int:
        """How many classes the data have; each has an image in one of the parts."""
        return 1 + max(int(self._labels(part).max()) for part in ("train", "validation", "test"))

    @property
    def side(self) -> int:
        """Pixels along each edge."""
        return self._data["train.images"].shape[1]

    @property
    def channels(self) -> int:
        """Colours of a pixel."""
        images = self._data["train.images"]
        return 1 if images.dim() == 3 else images.shape[-1]

    def recipe(self) -> TrainingRecipe:
        settings = self.settings.baseline
        images = len(self._data["train.labels"])
        steps = images // settings.batch_size
        if not steps:
            raise ValueError(
                f"tasks.{self.name}.baseline.batch_size = {settings.batch_size}: there are only {images} "
                "training images, lower it"
            )
        return TrainingRecipe(
            steps=steps * settings.epochs,
            batch_size=settings.batch_size,
            micro_batch=settings.micro_batch,
            learning_rate=settings.learning_rate,
            warmup=0.15,
            weight_decay=0.05,
            betas=(0.9, 0.98),
            seed=settings.seed,
            precision=settings.precision,
            evaluate_every=steps,
        )

    def training_batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training images, shuffled and augmented; an incomplete last batch is left out."""
        labels = self._labels("train")
        size = self.settings.baseline.batch_size
        order = torch.randperm(len(labels), generator=generator)
        for rows in order[: len(labels) // size * size].view(-1, size):
            yield self._augmented(rows, generator), labels[rows.to(self.device)]

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch)

    def calibration(self, seed: int, tokens: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        count = -(-tokens // self.tokens_per_image)
        rows = torch.randint(len(self._data["train.labels"]), (count,), generator=generator)
        return [self._augmented(part, generator) for part in rows.split(64)]

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        model.eval()
        labels = self._labels(part)
        batches = torch.arange(len(labels)).split(EVALUATION_BATCH)
        predicted = torch.cat([model(self._images(part, rows)).argmax(-1) for rows in batches])
        return {"top1": float((predicted == labels).double().mean())}

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images `[n, channels, side, side]` with labels `[n]`; if mixed, probabilities `[n, classes]`.

        With replacement. Of several processes each makes the whole batch and takes its share.
        """
        labels = self._labels("train")
        rows = torch.randint(len(labels), (batch_size,), generator=generator)
        images, labels = self._augmented(rows, generator), labels[rows.to(self.device)]
        mixup, cutmix = self.settings.baseline.mixup, self.settings.baseline.cutmix
        if not (mixup or cutmix):
            return images, labels
        targets = F.one_hot(labels, self.classes).float()
        return mix(images, targets, generator, mixup=mixup, cutmix=cutmix)

    def batch_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        images, targets = batch
        return F.cross_entropy(model(images), targets, label_smoothing=LABEL_SMOOTHING)

    def _augmented(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        augment = distort if self.channels == 1 else crop_and_flip
        return augment(self._images("train", rows), generator)

    def example(self, batch: int) -> Tensor:
        return self._images("test", torch.arange(batch) % len(self._data["test.labels"]))


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random rotation, scale, shear and shift of each digit, `[N, C, H, W]`."""

    def uniform(*shape: int, most: float) -> Tensor:
        return ((torch.rand(*shape, generator=generator) * 2 - 1) * most).to(images.device)

    n = len(images)
    angle, scale, shear = uniform(n, most=0.2), 1 + uniform(n, most=0.12), uniform(n, most=0.2)
    shift = uniform(n, 2, most=0.14)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cos, shear - sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each photograph, `[N, C, side, side]`, shifted by up to an eighth of its side and mirrored or not.

    What comes in at the edges is the picture's reflection.
    """
    n, _, side, _ = images.shape
    most = side // 8
    shift = torch.randint(-most, most + 1, (2, n, 1), generator=generator)
    rows, columns = _reflected(torch.arange(side) + shift, side)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    # Indices on both sides of a slice bring their dimensions to the front: [N, side, side, C].
    which = torch.arange(n)[:, None, None].to(images.device)
    rows, columns = rows[:, :, None].to(images.device), columns[:, None, :].to(images.device)
    return images[which, :, rows, columns].permute(0, 3, 1, 2).contiguous()


def _reflected(index: Tensor, side: int) -> Tensor:
    """Indices beyond the edges count backwards from there, the edge itself not repeated."""
    return side - 1 - (side - 1 - index.abs()).abs()


def mix(
    images: Tensor, targets: Tensor, generator: torch.Generator, *, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """Each image, `[N, C, H, W]`, blended with its neighbour in the batch, or with a rectangle of it put in.

    Targets, probabilities `[N, classes]`, are blended by the share that each image has in the pixels.
    """
    n, _, height, width = images.shape
    seed = int(torch.randint(1 << 62, (), generator=generator))  # torch's Beta takes no generator
    random = np.random.default_rng(seed)
    cut = random.random(n) < (0.5 if mixup and cutmix else float(cutmix > 0))
    alpha = np.where(cut, cutmix, mixup)
    drawn = np.stack([cut, random.beta(alpha, alpha), *random.random((2, n))])
    cut, share, centre_y, centre_x = torch.from_numpy(drawn).float().to(images.device).view(4, n, 1, 1)
    half = (1 - share).sqrt() / 2
    y = (torch.arange(height, device=images.device).view(-1, 1) + 0.5) / height
    x = (torch.arange(width, device=images.device) + 0.5) / width
    outside = ((y - centre_y).abs() >= half) | ((x - centre_x).abs() >= half)
    weights = torch.where(cut > 0, outside, share)
    kept = weights.mean((1, 2)).unsqueeze(1)
    weights = weights.unsqueeze(1)
    mixed = weights * images + (1 - weights) * images.roll(1, 0)
    return mixed, kept * targets + (1 - kept) * targets.roll(1, 0)
