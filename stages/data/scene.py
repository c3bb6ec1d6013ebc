"""A small scene rendered by ray casting, deterministic: data for radiance fields without a download.

Three glossy spheres and a turned box on a checkered disc. They hide one another and throw hard shadows of
one distant light; highlights (Phong) move with the viewer.
Everything lies within 1.3 of the origin; cameras stand at distance 4 and look at it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from stages.data.blender import PARTS, pixel_rays

DISTANCE = 4.0
"""Of the cameras from the origin; distances have the scene's own unit."""
ANGLE = 0.7
"""Horizontal field of view, radians."""
ELEVATIONS = (math.radians(12), math.radians(65))
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
PHASES = {"train": 0.0, "val": 1.0, "test": 2.0}
"""Azimuth of a part's first camera, radians: no two parts share a view."""
SAMPLES = 2
"""Rays per pixel, along each side."""
LIGHT = np.array([0.45, -0.35, 0.82]) / np.linalg.norm([0.45, -0.35, 0.82])
AMBIENT, DIFFUSE = 0.35, 0.65

Hit = tuple[np.ndarray, np.ndarray]
"""Ray parameters [n], infinite where nothing is hit, and unit normals [n, 3]."""


@dataclass(frozen=True)
class Material:
    """Colour, RGB in 0..1; `checker` takes turns with it in squares; strength and sharpness of highlights."""

    colour: tuple[float, float, float]
    checker: tuple[float, float, float] | None = None
    square: float = 0.25
    specular: float = 0.0
    exponent: float = 1.0

    def colours(self, points: np.ndarray) -> np.ndarray:
        """RGB [n, 3] at the points [n, 3]."""
        if self.checker is None:
            return np.broadcast_to(np.array(self.colour), points.shape)
        odd = np.floor(points[:, :2] / self.square).sum(axis=1) % 2 == 1
        return np.where(odd[:, None], self.checker, self.colour)


class Surface(Protocol):
    """Something that rays hit."""

    @property
    def material(self) -> Material: ...

    def hit(self, origins: np.ndarray, directions: np.ndarray) -> Hit:
        """Where rays, [n, 3] each, first meet the surface."""
        ...


@dataclass(frozen=True)
class Sphere:
    """All points at `radius` from `centre`."""

    material: Material
    centre: tuple[float, float, float]
    radius: float

    def hit(self, origins: np.ndarray, directions: np.ndarray) -> Hit:
        away = origins - np.array(self.centre)
        a, b = (directions**2).sum(axis=1), (away * directions).sum(axis=1)
        discriminant = b**2 - a * ((away**2).sum(axis=1) - self.radius**2)
        root = np.sqrt(np.maximum(discriminant, 0))
        near, far = (-b - root) / a, (-b + root) / a
        t = np.where(near > 0, near, far)
        t = np.where((discriminant > 0) & (t > 0), t, np.inf)
        return t, (away + _finite(t)[:, None] * directions) / self.radius


@dataclass(frozen=True)
class Box:
    """A block with half sides `half`, turned by `turn` radians about the vertical."""

    material: Material
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    turn: float

    def hit(self, origins: np.ndarray, directions: np.ndarray) -> Hit:
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        turned = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        o, d = (origins - np.array(self.centre)) @ turned, directions @ turned
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = (-np.array(self.half) - o) / d, (np.array(self.half) - o) / d
        enter, leave = np.minimum(low, high), np.maximum(low, high)
        t, axis = enter.max(axis=1), enter.argmax(axis=1)
        t = np.where((t < leave.min(axis=1)) & (t > 0), t, np.inf)
        normals = -np.sign(d) * np.eye(3)[axis]
        return t, normals @ turned.T


@dataclass(frozen=True)
class Disc:
    """A flat horizontal disc around the vertical axis."""

    material: Material
    height: float
    radius: float

    def hit(self, origins: np.ndarray, directions: np.ndarray) -> Hit:
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (self.height - origins[:, 2]) / directions[:, 2]
        points = origins + _finite(t)[:, None] * directions
        inside = (points[:, :2] ** 2).sum(axis=1) < self.radius**2
        t = np.where(inside & (t > 0) & np.isfinite(t), t, np.inf)
        return t, -np.sign(directions[:, 2:]) * np.array([0.0, 0.0, 1.0])


SCENE: tuple[Surface, ...] = (
    Disc(Material((0.85, 0.83, 0.78), checker=(0.32, 0.36, 0.42), square=0.3), -0.5, 1.15),
    Sphere(Material((0.80, 0.16, 0.12), specular=0.7, exponent=12), (-0.42, -0.25, -0.1), 0.4),
    Box(Material((0.18, 0.36, 0.75)), (0.42, 0.38, -0.22), (0.3, 0.3, 0.28), 0.5),
    Sphere(Material((0.12, 0.62, 0.45), specular=0.5, exponent=20), (0.42, 0.38, 0.32), 0.26),
    Sphere(Material((0.90, 0.70, 0.15), specular=0.3, exponent=8), (0.3, -0.55, -0.28), 0.22),
)


def cameras(part: str, count: int) -> np.ndarray:
    """Poses, camera to world, float64 [count, 4, 4]: a spiral around the scene, from low to high."""
    share = (np.arange(count) + 0.5) / count
    low, high = (math.sin(angle) for angle in ELEVATIONS)
    sine = low + (high - low) * share
    azimuth = PHASES[part] + GOLDEN_ANGLE * np.arange(count)
    level = np.sqrt(1 - sine**2)
    back = np.stack([level * np.cos(azimuth), level * np.sin(azimuth), sine], axis=1)
    right = np.stack([-np.sin(azimuth), np.cos(azimuth), np.zeros(count)], axis=1)
    poses = np.tile(np.eye(4), (count, 1, 1))
    poses[:, :3, :3] = np.stack([right, np.cross(back, right), back], axis=2)
    poses[:, :3, 3] = DISTANCE * back
    return poses


def render(pose: np.ndarray, side: int, surfaces: tuple[Surface, ...] = SCENE) -> np.ndarray:
    """The square image that a camera sees: uint8 [side, side, 4], RGB and straight alpha."""
    total = np.zeros((side, side, 4))
    steps = (np.arange(SAMPLES) + 0.5) / SAMPLES
    for down in steps:
        for right in steps:
            origins, directions = pixel_rays(pose, ANGLE, side, side, (right, down))
            shaded = shade(origins.reshape(-1, 3), directions.reshape(-1, 3), surfaces)
            total += shaded.reshape(side, side, 4)
    alpha = total[..., 3:]
    colour = np.divide(total[..., :3], alpha, out=np.zeros_like(total[..., :3]), where=alpha > 0)
    return np.rint(255 * np.concatenate([colour, alpha / SAMPLES**2], axis=-1)).astype(np.uint8)


def shade(origins: np.ndarray, directions: np.ndarray, surfaces: tuple[Surface, ...] = SCENE) -> np.ndarray:
    """What rays [n, 3] see: RGB in 0..1 and whether anything was hit, float64 [n, 4]; all 0 where nothing."""
    hits = [surface.hit(origins, directions) for surface in surfaces]
    depths = np.stack([t for t, _ in hits])
    nearest = depths.argmin(axis=0)
    seen = np.zeros((len(origins), 4))
    for number, (surface, (t, normals)) in enumerate(zip(surfaces, hits, strict=True)):
        rows = np.flatnonzero((nearest == number) & np.isfinite(t))
        points = origins[rows] + t[rows, None] * directions[rows]
        seen[rows, :3] = _light(surface.material, points, normals[rows], directions[rows], surfaces)
        seen[rows, 3] = 1
    return seen


def _light(
    material: Material,
    points: np.ndarray,
    normals: np.ndarray,
    directions: np.ndarray,
    surfaces: tuple[Surface, ...],
) -> np.ndarray:
    """Phong's model: RGB [n, 3] in 0..1 of lit points."""
    towards = np.broadcast_to(LIGHT, points.shape)
    # Off the surface by a little, so that no point shadows itself.
    blocked = [np.isfinite(s.hit(points + 1e-6 * normals, towards)[0]) for s in surfaces]
    lit = ~np.any(blocked, axis=0)
    facing = np.maximum(normals @ LIGHT, 0) * lit
    mirrored = 2 * (normals @ LIGHT)[:, None] * normals - LIGHT
    view = -directions / np.linalg.norm(directions, axis=1, keepdims=True)
    glint = np.maximum((mirrored * view).sum(axis=1), 0) ** material.exponent * (facing > 0)
    diffuse = material.colours(points) * (AMBIENT + DIFFUSE * facing)[:, None]
    return np.clip(diffuse + material.specular * glint[:, None], 0, 1)


def write(folder: Path, views: Mapping[str, int], side: int) -> None:
    """Render so many views of each part, `train`, `val` and `test`, into the layout of `blender.load`."""
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
        frames = []
        for number, pose in enumerate(cameras(part, views[part])):
            name = f"{part}/r_{number}"
            Image.fromarray(render(pose, side)).save(folder / f"{name}.png")
            frames.append({"file_path": f"./{name}", "transform_matrix": pose.tolist()})
        content = {"camera_angle_x": ANGLE, "frames": frames}
        (folder / f"transforms_{part}.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _finite(t: np.ndarray) -> np.ndarray:
    """Ray parameters with 0 in the place of misses."""
    return np.where(np.isfinite(t), t, 0)
