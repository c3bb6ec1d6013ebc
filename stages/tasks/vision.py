"""Image classification: a Vision Transformer trained from scratch on real images."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import PositiveInt, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import eugen
from stages import images
from stages.params import TaskSettings


class BaselineSettings(images.TrainingSettings):
    """The transformer and its training."""

    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    patch: PositiveInt

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"heads = {self.heads}: must divide the width, {self.width}")
        return self


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
        if self.side % baseline.patch:
            raise ValueError(
                f"tasks.vision.baseline.patch = {baseline.patch}: must divide the images' side, {self.side}"
            )
        model = VisionTransformer(
            img_size=self.side,
            patch_size=baseline.patch,
            in_chans=self.channels,
            num_classes=self.classes,
            embed_dim=baseline.width,
            depth=baseline.depth,
            num_heads=baseline.heads,
            class_token=False,
            global_pool="avg",
        )
        for site in eugen.find_ffns(model):
            # timm draws 0.02 at every width, meant for ViT-B: blocks this narrow would start almost linear
            # and learn late, a handicap that no other row has.
            assert site.dense.down is not None
            site.dense.up.reset_parameters()
            site.dense.down.reset_parameters()
        return model.to(self.device)
