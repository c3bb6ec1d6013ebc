"""Image classification: a Vision Transformer trained from scratch on real images."""

from __future__ import annotations

from typing import ClassVar

from pydantic import PositiveInt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from stages import images
from stages.params import TaskSettings


class BaselineSettings(images.TrainingSettings):
    """The transformer and its training."""

    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    patch: PositiveInt


class VisionSettings(images.ImageSettings):
    """The task's section of params.yaml."""

    baseline: BaselineSettings


class Vision(images.ImageTask):
    """A Vision Transformer; each patch is a token."""

    name = "vision"
    Settings: ClassVar[type[TaskSettings]] = VisionSettings
    settings: VisionSettings

    @property
    def tokens_per_image(self) -> int:
        return (self.side // self.settings.baseline.patch) ** 2

    def build(self) -> nn.Module:
        baseline = self.settings.baseline
        model = VisionTransformer(
            img_size=self.side,
            patch_size=baseline.patch,
            in_chans=self.channels,
            num_classes=images.CLASSES,
            embed_dim=baseline.width,
            depth=baseline.depth,
            num_heads=baseline.heads,
            class_token=False,
            global_pool="avg",
        )
        return model.to(self.device)
