"""Surfaces of distance functions: extracted, compared with the truth, and drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image
from skimage.measure import marching_cubes

from stages.data.meshes import draw_surface, unsigned_distance

Distance = Callable[[np.ndarray], np.ndarray]
"""Signed distances `[N]` of points `[N, 3]`, float32; negative inside."""

CHUNK = 1 << 15
"""Points that a distance function gets at once."""
SIDE = 200
"""Pixels along a picture's edge."""
DOTS = 600_000
"""Of a picture: about forty on each pixel of an object that fills it."""
REACH = 1.35
"""Half the width of what a picture shows."""
POINTS_SEED = 0
TOWARDS_CAMERA = np.array([0.55, -0.7, 0.45])


def extract(distance: Distance, resolution: int) -> trimesh.Trimesh | None:
    """Where the function is zero in `[-1, 1]³`, by marching cubes; None if it is nowhere.

    Args:
        resolution: grid points along each edge.
    """
    axis = np.linspace(-1, 1, resolution, dtype=np.float32)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    chunks = [distance(grid[start : start + CHUNK]) for start in range(0, len(grid), CHUNK)]
    volume = np.concatenate(chunks).reshape(resolution, resolution, resolution)
    if not volume.min() < 0 < volume.max():
        return None
    step = 2 / (resolution - 1)
    vertices, faces, _, _ = marching_cubes(volume, 0.0, spacing=(step, step, step))
    return trimesh.Trimesh(vertices - 1, faces, process=False)


def f_score(found: trimesh.Trimesh | None, true: trimesh.Trimesh, *, threshold: float, points: int) -> float:
    """Harmonic mean of precision and recall of a surface (Knapitsch et al. 2017); 0 where none was found.

    Precision is the share of the found surface within the threshold of the true one, recall the reverse.
    Both are estimated from so many random points on one surface and their exact distances to the other: to
    points on the other, they would depend on how dense these are.
    """
    if found is None:
        return 0.0
    generator = np.random.default_rng(POINTS_SEED)
    to_true = unsigned_distance(true, draw_surface(found, points, generator))
    to_found = unsigned_distance(found, draw_surface(true, points, generator))
    return harmonic_mean(float((to_true <= threshold).mean()), float((to_found <= threshold).mean()))


def harmonic_mean(precision: float, recall: float) -> float:
    """0 if both are."""
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def draw(surface: trimesh.Trimesh | None, path: Path) -> None:
    """Write a PNG of the surface seen obliquely from above, coloured by its normals; white around it.

    The projection is parallel. Dense dots on the surface are painted far to near. Missing folders are made.
    """
    pixels = np.full((SIDE, SIDE, 3), 255, dtype=np.uint8)
    if surface is not None:
        dots, face = trimesh.sample.sample_surface(surface, DOTS, seed=POINTS_SEED)[:2]
        camera = _camera()
        right, up, depth = (dots @ camera.T).T
        column, row = (np.floor((c / REACH + 1) / 2 * SIDE).astype(int) for c in (right, -up))
        seen = (column >= 0) & (column < SIDE) & (row >= 0) & (row < SIDE)
        order = np.argsort(depth, kind="stable")
        order = order[seen[order]]
        colours = (surface.face_normals @ camera.T + 1) / 2 * 255
        pixels[row[order], column[order]] = colours[face[order]].astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, optimize=True)


def _camera() -> np.ndarray:
    """Rows: right, up and towards the camera."""
    towards = TOWARDS_CAMERA / np.linalg.norm(TOWARDS_CAMERA)
    right = np.cross([0.0, 0.0, 1.0], towards)
    right /= np.linalg.norm(right)
    return np.stack([right, np.cross(towards, right), towards])
