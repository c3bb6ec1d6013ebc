"""Novel views of a scene from posed images: a neural radiance field (NeRF, arXiv 2003.08934).

The scene is rendered here (`stages.data.scene`), or any folder in the layout of `nerf_synthetic`. An example
is a ray, a pixel's; a token is one of its samples.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from safetensors.torch import load_file, save_file
from skimage.metrics import structural_similarity
from torch import Tensor, nn

from stages.data import blender
from stages.networks.nerf import RAY, Encoding, RadianceField, cone_radius
from stages.params import Section, TaskSettings, TrainingRecipe
from stages.tasks import DataSource, Task

FILES = {"train": "train", "validation": "val", "test": "test"}
"""The parts, and what the layout calls them."""
CPU_CHUNK, CHUNK = 256, 8192
"""Rays of one forward pass: on the CPU as many as its caches hold, elsewhere as keep it busy."""
PICTURES, LARGEST = 2, 256
"""How many test views are shown, and their longest side in pixels."""


class ViewCounts(Section):
    """How many views of each part: so many are rendered, or taken from the folder, evenly spaced."""

    train: PositiveInt
    val: PositiveInt
    test: PositiveInt


class DataSettings(Section):
    """The images, and between which depths the scene lies, along the camera's axis."""

    folder: str | None = None
    """In the layout of nerf_synthetic; None for the scene that is rendered here."""
    views: ViewCounts
    side: int = Field(default=64, ge=11)
    """Pixels of the rendered views, across and down; SSIM compares windows of 11."""
    downscale: PositiveInt = 1
    background: Literal["white", "black"] = "white"
    near: PositiveFloat
    far: PositiveFloat

    @model_validator(mode="after")
    def _in_order(self) -> DataSettings:
        if self.near >= self.far:
            raise ValueError(f"near = {self.near:g} must be below far = {self.far:g}")
        return self


class BaselineSettings(Section):
    """The network, see `stages.networks.nerf`, and its training; a batch is one of rays."""

    width: int = Field(ge=2)
    depth: PositiveInt
    skip: PositiveInt | None = None
    """The encoding joins again after so many layers."""
    samples: PositiveInt
    fine_samples: NonNegativeInt = 0
    """Of the second network's pass; 0 for one network and one pass."""
    encoding: Encoding = "positional"
    position_frequencies: PositiveInt = 10
    direction_frequencies: PositiveInt = 4
    training: TrainingRecipe

    @model_validator(mode="after")
    def _in_order(self) -> BaselineSettings:
        if self.skip is not None and self.skip >= self.depth:
            raise ValueError(f"skip = {self.skip} must be below depth = {self.depth}")
        return self


class RadianceSettings(TaskSettings):
    """The task's section of params.yaml."""

    data: DataSettings
    baseline: BaselineSettings


class Radiance(Task):
    """PSNR on held-out views in decibels, mean over views; `ssim` likewise.

    SSIM as its authors set it (Wang et al. 2004): Gaussian windows of σ = 1.5, no sample covariance.
    """

    name = "radiance"
    quality_name = "psnr"
    computed = True
    Settings: ClassVar[type[TaskSettings]] = RadianceSettings
    settings: RadianceSettings

    def prepare(self, folder: Path) -> dict[str, DataSource]:
        from stages.data import scene, verify

        data = self.settings.data
        counts = data.views.model_dump()
        with TemporaryDirectory() as rendered:
            source = Path(data.folder or rendered)
            if data.folder is None:
                scene.write(source, counts, data.side)
            views = {
                part: blender.load(source, file, most=counts[file], downscale=data.downscale)
                for part, file in FILES.items()
            }
        tensors = {}
        for part, found in views.items():
            tensors[f"{part}.pixels"] = torch.from_numpy(found.pixels)
            tensors[f"{part}.poses"] = torch.from_numpy(found.poses)
            tensors[f"{part}.angle"] = torch.tensor(found.angle, dtype=torch.float64)
        save_file(tensors, folder / "views.safetensors")
        sha256 = verify.sha256_arrays({part: found.pixels for part, found in views.items()})
        name = "rendered_scene" if data.folder is None else Path(data.folder).name
        return {name: DataSource(sha256, sum(counts.values()))}

    @cached_property
    def _data(self) -> dict[str, Tensor]:
        return load_file(self.folder / "views.safetensors")

    def _count(self, part: str) -> int:
        return len(self._data[f"{part}.pixels"])

    def _colours(self, part: str, view: int) -> Tensor:
        """RGB in 0..1 in front of the background, `[height, width, 3]`."""
        pixels = self._data[f"{part}.pixels"][view].to(self.device).float() / 255
        return pixels[..., :3] * pixels[..., 3:] + self._background * (1 - pixels[..., 3:])

    def _rays(self, part: str, view: int) -> Tensor:
        """A ray per pixel, row by row: `[height · width, 7]`."""
        height, width = self._data[f"{part}.pixels"].shape[1:3]
        angle = float(self._data[f"{part}.angle"])
        pose = self._data[f"{part}.poses"][view].numpy()
        origins, directions = blender.pixel_rays(pose, angle, height, width)
        radii = np.full((height, width, 1), cone_radius(angle, width))
        rays = np.concatenate([origins, directions, radii], axis=-1)
        return torch.from_numpy(rays).reshape(-1, RAY).to(self.device, torch.float32)

    @cached_property
    def _train(self) -> tuple[Tensor, Tensor]:
        """All training rays `[N, 7]` and their colours `[N, 3]`."""
        views = range(self._count("train"))
        colours = [self._colours("train", view).flatten(0, 1) for view in views]
        return torch.cat([self._rays("train", view) for view in views]), torch.cat(colours)

    @property
    def _chunk(self) -> int:
        return CPU_CHUNK if self.device == "cpu" else CHUNK

    @property
    def _background(self) -> float:
        return {"white": 1.0, "black": 0.0}[self.settings.data.background]

    def build(self) -> nn.Module:
        data, baseline = self.settings.data, self.settings.baseline
        network = RadianceField(
            near=data.near,
            far=data.far,
            background=self._background,
            **baseline.model_dump(exclude={"training"}),
        )
        return network.to(self.device)

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Colours of rays `[n, 7]`, to which calibration adds the edges of the fine pass."""
        edges = batch[:, RAY:] if batch.shape[1] > RAY else None
        return model(batch[:, :RAY], fine_edges=edges)[:, -1]

    @cached_property
    def _dense(self) -> RadianceField:
        from stages.models import dense_model

        dense = dense_model(self)
        assert isinstance(dense, RadianceField)
        return dense

    def calibration(self, seed: int, tokens: int) -> list[Tensor]:
        """Training rays; the fine pass's intervals are those of the trained dense network.

        Else the fine network of a student would be asked at other places than its teacher.
        """
        rays, _ = self._train
        count = -(-tokens // self.settings.baseline.samples)
        rows = torch.randint(len(rays), (count,), generator=torch.Generator().manual_seed(seed))
        batches = rays[rows.to(self.device)].split(self._chunk)
        if not self.settings.baseline.fine_samples:
            return list(batches)
        return [torch.cat([batch, self._dense.fine_edges(batch)], dim=1) for batch in batches]

    @torch.no_grad()
    def _render(self, model: nn.Module, part: str, view: int) -> np.ndarray:
        """float32 [height, width, 3]."""
        model.eval()
        chunks = self._rays(part, view).split(self._chunk)
        colours = torch.cat([self.call(model, chunk).float() for chunk in chunks])
        return colours.view(*self._data[f"{part}.pixels"].shape[1:3], 3).cpu().numpy()

    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        measured = []
        for view in range(self._count(part)):
            picture, truth = self._render(model, part, view), self._colours(part, view).cpu().numpy()
            measured.append((psnr(picture, truth), ssim(picture, truth)))
        means = np.mean(measured, axis=0)
        return {"psnr": float(means[0]), "ssim": float(means[1])}

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Rays of random training pixels, their colours, and uniform numbers that move the samples."""
        rays, colours = self._train
        baseline = self.settings.baseline
        rows = torch.randint(len(rays), (batch_size,), generator=generator).to(self.device)
        moves = baseline.samples - 1 + baseline.fine_samples
        jitter = torch.rand(batch_size, moves, generator=generator).to(self.device)
        return rays[rows], colours[rows], jitter

    def batch_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Squared error of the colours, both passes' added: equation 6 of NeRF."""
        rays, colours, jitter = batch
        errors = model(rays, jitter) - colours.unsqueeze(1)
        return errors.square().mean(dim=(0, 2)).sum()

    def example(self, batch: int) -> Tensor:
        rays = self._rays("test", 0)
        return rays[torch.arange(batch) % len(rays)]

    def pictures(self, model: nn.Module, folder: Path) -> list[Path]:
        shown = range(min(PICTURES, self._count("test")))
        return [_save(self._render(model, "test", view), folder, view) for view in shown]

    def truth_pictures(self, folder: Path) -> list[Path]:
        shown = range(min(PICTURES, self._count("test")))
        return [_save(self._colours("test", view).cpu().numpy(), folder, view) for view in shown]


def psnr(picture: np.ndarray, truth: np.ndarray) -> float:
    """−10 log₁₀ of the mean squared error of colours in 0..1, decibels."""
    return float(-10 * np.log10(np.square(picture.astype(np.float64) - truth).mean()))


def ssim(picture: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity of two RGB images in 0..1, mean over pixels and channels."""
    similarity = structural_similarity(
        picture.astype(np.float64),
        truth.astype(np.float64),
        data_range=1.0,
        channel_axis=-1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert isinstance(similarity, float)
    return float(similarity)


def _save(picture: np.ndarray, folder: Path, view: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.rint(255 * picture.clip(0, 1)).astype(np.uint8))
    image.thumbnail((LARGEST, LARGEST))
    path = folder / f"view-{view}.png"
    image.save(path)
    return path
