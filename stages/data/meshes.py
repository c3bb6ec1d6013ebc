"""Closed triangle meshes: one made here, or any OBJ, PLY or STL file; and the exact distance to them.

A mesh is moved and scaled so that its bounding box is centred at 0 and its longest side is 2 · `HALF_SIDE`:
the surface lies within `[-1, 1]³`, with a margin. Lengths are in these units, distances negative inside.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import igl
import numpy as np
import trimesh
from skimage.measure import marching_cubes

from stages.data.verify import DataError, sha256_arrays

HALF_SIDE = 0.9
CELLS = 90
"""Marching cubes along each edge of the default mesh."""
SUFFIXES = (".obj", ".ply", ".stl")
NEAR_SHARE = 0.5
NEAR_DEVIATIONS = (0.01, 0.05)
"""Of the points near the surface each second one is off it by the first, the others by the second."""
LEAST_VOLUME = 1e-9
"""Of a body, as a share of the cube over the longest side of its bounding box."""


@dataclass(frozen=True)
class Mesh:
    """A closed surface, its normals pointing outwards.

    Attributes:
        vertices: `[V, 3]`, float64.
        faces: `[F, 3]`, int64, rows of `vertices`.
    """

    vertices: np.ndarray
    faces: np.ndarray

    @property
    def sha256(self) -> str:
        """Digest of vertices and faces."""
        return sha256_arrays({"vertices": self.vertices, "faces": self.faces})

    @cached_property
    def surface(self) -> trimesh.Trimesh:
        """The same for trimesh."""
        return trimesh.Trimesh(self.vertices, self.faces, process=False)


def load(path: Path | None = None) -> Mesh:
    """The mesh of a file, or the default one; checked and normalised.

    Raises:
        DataError: the file is missing, no mesh, empty, or its surface encloses nothing.
    """
    if path is None:
        return checked(trimesh.Trimesh(*_default()), "the default mesh")
    where = f"mesh {path}"
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{where}: unknown kind of file, use one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{where} does not exist: correct the path, relative to the folder you start in")
    try:
        scene = trimesh.load_scene(path, process=False)
        bodies = [body for body in scene.geometry.values() if isinstance(body, trimesh.Trimesh)]
        for body in bodies:
            # Before vertices are merged: with that, trimesh drops those that are not finite, and their faces.
            _check_finite(body, where)
            body.process()
        found = scene.to_mesh()
    except DataError:
        raise
    except Exception as error:  # each reader fails in its own way on what is no mesh
        raise DataError(f"{where} cannot be read as a mesh ({error}): export it again") from error
    return checked(found, where)


def _check_finite(found: trimesh.Trimesh, where: str) -> None:
    broken = np.asarray(~np.isfinite(found.vertices).all(axis=1))
    if broken.any():
        raise DataError(
            f"{where} has vertices that are not finite: {broken.sum()} of {len(broken)}; export it again"
        )


def checked(found: trimesh.Trimesh, where: str) -> Mesh:
    """The mesh, normalised, if its surface encloses a volume; one turned inside out is turned back.

    Raises:
        DataError: names `where`, what is wrong and the cure.
    """
    _check_finite(found, where)
    corners = np.sort(found.faces, axis=1)
    # Readers merge vertices that agree but for rounding; a sliver's corners may be among them.
    found.update_faces((np.diff(corners, axis=1) > 0).all(axis=1))
    if len(found.faces) == 0:
        raise DataError(f"{where} is empty: it has no triangles; a point cloud must be meshed first")
    if not found.is_watertight:
        edges, uses = np.unique(found.edges_sorted, axis=0, return_counts=True)
        raise DataError(
            f"{where} is not watertight: of {len(edges)} edges {(uses != 2).sum()} do not have exactly two "
            "triangles, so inside and outside are undefined; close its holes, for example with MeshLab's "
            "'Close Holes' or trimesh.repair.fill_holes"
        )
    if not found.is_winding_consistent:
        raise DataError(
            f"{where} has neighbouring triangles of opposite orientation: turn them with "
            "trimesh.repair.fix_winding"
        )
    faces = np.asarray(found.faces, dtype=np.int64)
    mesh = Mesh(normalised(np.asarray(found.vertices, dtype=np.float64)), faces)
    volume = np.linalg.det(mesh.vertices[faces]).sum() / 6  # of the tetrahedra between 0 and the triangles
    if abs(volume) < LEAST_VOLUME * (2 * HALF_SIDE) ** 3:
        raise DataError(
            f"{where} encloses no volume: its surface is closed but flat, so nothing is inside; "
            "give it thickness, for example with MeshLab's 'Uniform Mesh Resampling' and an offset"
        )
    return mesh if volume > 0 else Mesh(mesh.vertices, faces[:, ::-1].copy())


def normalised(vertices: np.ndarray) -> np.ndarray:
    """`[V, 3]` with the bounding box centred at 0 and its longest side 2 · `HALF_SIDE`."""
    low, high = vertices.min(0), vertices.max(0)
    return (vertices - (low + high) / 2) * (2 * HALF_SIDE / (high - low).max())


def signed_distance(mesh: Mesh, points: np.ndarray) -> np.ndarray:
    """Distance `[N]` of points `[N, 3]` to the surface, negative inside; float64.

    Exact up to rounding; the sign is that of the generalised winding number (Barill et al. 2018).
    """
    kind = igl.SIGNED_DISTANCE_TYPE_FAST_WINDING_NUMBER
    points = np.ascontiguousarray(points, dtype=np.float64)
    signed, _, nearest, _ = igl.signed_distance(points, mesh.vertices, mesh.faces, sign_type=kind)
    # libigl multiplies the distance by 1 − 2w with the approximate winding number w: up to 0.1 % off.
    return np.copysign(np.linalg.norm(points - np.asarray(nearest), axis=1), signed)


def draw_points(mesh: Mesh, count: int, generator: np.random.Generator) -> np.ndarray:
    """Random points `[count, 3]`, float32, in random order.

    Half are on the surface plus normal noise, the others uniform in `[-1, 1]³`.
    """
    near = round(count * NEAR_SHARE)
    on_surface = draw_surface(mesh.surface, near, generator)
    deviations = np.resize(NEAR_DEVIATIONS, near)[:, None]
    points = np.concatenate(
        [
            on_surface + deviations * generator.standard_normal((near, 3)),
            generator.uniform(-1, 1, (count - near, 3)),
        ]
    )
    return generator.permutation(points).astype(np.float32)


def draw_surface(surface: trimesh.Trimesh, count: int, generator: np.random.Generator) -> np.ndarray:
    """Points `[count, 3]` uniform on the surface."""
    return np.asarray(trimesh.sample.sample_surface(surface, count, seed=generator)[0])


def unsigned_distance(surface: trimesh.Trimesh, points: np.ndarray) -> np.ndarray:
    """Distance `[N]` of points `[N, 3]` to a surface, closed or not; float64."""
    vertices, faces = np.asarray(surface.vertices, float), np.asarray(surface.faces, np.int64)
    points = np.ascontiguousarray(points, dtype=np.float64)
    return np.sqrt(igl.point_mesh_squared_distance(points, vertices, faces)[0])


def _default() -> tuple[np.ndarray, np.ndarray]:
    """A ring that stands in a plate with a hole, a thin rod across its top, a ball: one body of genus 2.

    Marching cubes of the distance to the parts. Only +, ×, √ and comparisons make that, so that it is the
    same everywhere.
    """
    axis = np.arange(CELLS + 1) / CELLS * 2 - 1
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    plate = _box(x, y, z + 0.62, (0.8, 0.6, 0.07))
    hole = _length(x - 0.45, y + 0.2) - 0.22
    ring = _length(_length(x + 0.1, z) - 0.48, y) - 0.13
    rod = np.maximum(_length(x + 0.1, z - 0.48) - 0.055, np.abs(y) - 0.7)
    ball = _length(x - 0.5, y - 0.4, z + 0.33) - 0.27
    body = np.minimum.reduce([np.maximum(plate, -hole), ring, rod, ball])
    vertices, faces, _, _ = marching_cubes(body, 0.0)
    return vertices, faces


def _length(*coordinates: np.ndarray) -> np.ndarray:
    return np.sqrt(np.add.reduce([c * c for c in coordinates]))


def _box(x: np.ndarray, y: np.ndarray, z: np.ndarray, half: tuple[float, float, float]) -> np.ndarray:
    excess = [np.abs(c) - h for c, h in zip((x, y, z), half, strict=True)]
    return _length(*(np.maximum(e, 0) for e in excess)) + np.minimum(np.maximum.reduce(excess), 0)
