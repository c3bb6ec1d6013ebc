"""The signed distance to a mesh as a network, learned from exact distances at random points.

The network is iSDF's (arXiv 2204.02296); its targets are exact, where iSDF's are bounds from a stream of
depth images. Lengths are in the units of `stages.data.meshes`: the mesh is 1.8 long, in a cube of side 2.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stages.networks.sdf import Block, SDFNetwork
from stages.params import Section, TaskSettings, TrainingRecipe
from stages.tasks import DataSource, Task

if TYPE_CHECKING:
    from trimesh import Trimesh

    from stages.data.meshes import Mesh

POINTS, MESH = "points.safetensors", "mesh.safetensors"
PARTS = ("test", "validation", "train")
DRAW_SEED = 0
CHUNK = 1 << 14
"""Points of one forward pass."""
NEAR = 0.05
"""Held-out points whose true distance is at most this are near the surface."""


class DataSettings(Section):
    """The mesh, how many points are drawn, and how surfaces are compared."""

    mesh: str | None = None
    """Path of an OBJ, PLY or STL file with a closed surface; None for the mesh that the project makes."""
    train: PositiveInt
    validation: PositiveInt
    test: PositiveInt
    resolution: int = Field(default=64, ge=8)
    """Grid points along each edge where a network's surface is extracted."""
    surface_points: PositiveInt = 20_000
    """Random points on each of two surfaces that are compared."""
    threshold: PositiveFloat = 0.01
    """How near is near enough for the F-score. The grid bounds it: 0.995 for the exact distance at 64."""


class BaselineSettings(Section):
    """The network and its training."""

    width: PositiveInt
    layers: int = Field(ge=2, multiple_of=2)
    """Hidden layers."""
    frequencies: PositiveInt
    block: Block = "pair"
    """What is one feed-forward block: two hidden layers, or one with its activation."""
    eikonal: NonNegativeFloat = 0.0
    """Weight of `| ‖∇y‖ − 1 |` in the loss."""
    training: TrainingRecipe


class DistanceSettings(TaskSettings):
    """The task's section of params.yaml."""

    data: DataSettings
    baseline: BaselineSettings


class Distance(Task):
    """Mean absolute error of the distance at held-out points, half of them near the surface.

    `near_surface_error` is that of the points within `NEAR`. The test part adds `f_score`, the extracted
    surface against the mesh.
    """

    name = "distance"
    quality_name = "sdf_error"
    higher_is_better = False
    computed = True
    Settings: ClassVar[type[TaskSettings]] = DistanceSettings
    settings: DistanceSettings

    def prepare(self, folder: Path) -> dict[str, DataSource]:
        from stages.data import meshes

        data = self.settings.data
        mesh = meshes.load(None if data.mesh is None else Path(data.mesh))
        generator = np.random.default_rng(DRAW_SEED)
        arrays: dict[str, np.ndarray] = {}
        for part in PARTS:
            points = meshes.draw_points(mesh, getattr(data, part), generator)
            arrays[f"{part}.points"] = points
            arrays[f"{part}.distances"] = meshes.signed_distance(mesh, points).astype(np.float32)
        save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, folder / POINTS)
        triangles = {"vertices": torch.from_numpy(mesh.vertices), "faces": torch.from_numpy(mesh.faces)}
        save_file(triangles, folder / MESH)
        return {"mesh": DataSource(mesh.sha256, len(mesh.faces))}

    @cached_property
    def _data(self) -> dict[str, Tensor]:
        return load_file(self.folder / POINTS, device=self.device)

    def build(self) -> nn.Module:
        sizes = self.settings.baseline
        return SDFNetwork(sizes.width, sizes.layers, sizes.frequencies, sizes.block).to(self.device)

    def call(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Signed distances `[n]` of points `[n, 3]`."""
        return model(batch)

    def draw(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points `[n, 3]` and their distances `[n]`, drawn with replacement."""
        points, distances = self._data["train.points"], self._data["train.distances"]
        rows = torch.randint(len(points), (batch_size,), generator=generator).to(self.device)
        return points[rows], distances[rows]

    def batch_loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Mean absolute error, and the eikonal term if it has a weight."""
        points, distances = batch
        weight = self.settings.baseline.eikonal
        if not weight:
            return (model(points) - distances).abs().mean()
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            found = model(points)
            (slope,) = torch.autograd.grad(found.sum(), points, create_graph=True)
        eikonal = (slope.norm(dim=-1) - 1).abs().mean()
        return (found - distances).abs().mean() + weight * eikonal

    def calibration(self, seed: int, tokens: int) -> list[Tensor]:
        points, _ = self.draw(tokens, torch.Generator().manual_seed(seed))
        return list(points.split(CHUNK))

    @torch.no_grad()
    def evaluate(self, model: nn.Module, part: str) -> dict[str, float]:
        model.eval()
        points, distances = self._data[f"{part}.points"], self._data[f"{part}.distances"]
        found = torch.cat([self.call(model, chunk) for chunk in points.split(CHUNK)])
        errors = (found.double() - distances.double()).abs()
        near = distances.abs() <= NEAR
        quality = {"sdf_error": float(errors.mean()), "near_surface_error": float(errors[near].mean())}
        # Training looks at the validation part often, and a surface takes far longer than those points.
        return quality | ({"f_score": self._f_score(model)} if part == "test" else {})

    def _f_score(self, model: nn.Module) -> float:
        from stages import surfaces

        data = self.settings.data
        return surfaces.f_score(
            self._surface(model), self._mesh.surface, threshold=data.threshold, points=data.surface_points
        )

    @cached_property
    def _mesh(self) -> Mesh:
        from stages.data.meshes import Mesh

        stored = load_file(self.folder / MESH)
        return Mesh(stored["vertices"].numpy(), stored["faces"].numpy())

    @torch.no_grad()
    def _surface(self, model: nn.Module) -> Trimesh | None:
        """The network's zero level as a mesh, or None."""
        from stages import surfaces

        model.eval()
        return surfaces.extract(
            lambda points: self.call(model, torch.from_numpy(points).to(self.device)).float().cpu().numpy(),
            self.settings.data.resolution,
        )

    def example(self, batch: int) -> Tensor:
        points = self._data["test.points"]
        return points[torch.arange(batch, device=self.device) % len(points)]

    def pictures(self, model: nn.Module, folder: Path) -> list[Path]:
        """The extracted surface, coloured by its normals."""
        from stages import surfaces

        surfaces.draw(self._surface(model), folder / "surface.png")
        return [folder / "surface.png"]

    def truth_pictures(self, folder: Path) -> list[Path]:
        """The mesh itself."""
        from stages import surfaces

        surfaces.draw(self._mesh.surface, folder / "surface.png")
        return [folder / "surface.png"]
