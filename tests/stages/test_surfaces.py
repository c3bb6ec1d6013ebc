"""Surfaces of known functions: extracted, compared and drawn."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from PIL import Image

from stages import surfaces


def ball(radius: float, centre: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> surfaces.Distance:
    return lambda points: np.linalg.norm(points - np.array(centre, np.float32), axis=1) - radius


def plane(height: float, size: float = 1.0) -> trimesh.Trimesh:
    corners = [[0, 0, height], [size, 0, height], [size, 1, height], [0, 1, height]]
    return trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], process=False)


@pytest.mark.parametrize(("radius", "resolution"), [(0.5, 40), (0.8, 25)])
def test_the_surface_of_a_ball_has_its_radius_and_place(radius, resolution):
    centre = (0.1, -0.15, 0.05)
    found = surfaces.extract(ball(radius, centre), resolution)
    assert found is not None and found.is_watertight
    distances = np.linalg.norm(found.vertices - np.array(centre), axis=1)
    # Along a grid edge the distance is linear but for its curvature, at most h² / 8 r.
    step = 2 / (resolution - 1)
    np.testing.assert_allclose(distances, radius, atol=step**2 / 8 / radius * 1.5)
    assert found.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)  # positive: normals point out


def test_axes_are_not_exchanged():
    found = surfaces.extract(lambda p: np.abs(p / np.float32([0.9, 0.5, 0.2])).max(1) - 1, 61)
    assert found is not None
    np.testing.assert_allclose(found.vertices.max(0), [0.9, 0.5, 0.2], atol=0.02)


@pytest.mark.parametrize("value", [1.0, -1.0, 0.0, np.nan])
def test_a_function_without_a_zero_has_no_surface(value):
    assert surfaces.extract(lambda points: np.full(len(points), value, np.float32), 9) is None


def test_points_come_in_chunks_and_each_once(monkeypatch):
    monkeypatch.setattr(surfaces, "CHUNK", 100)
    seen: list[np.ndarray] = []
    surfaces.extract(lambda points: seen.append(points) or ball(0.5)(points), 8)
    assert max(map(len, seen)) == 100
    joined = np.concatenate(seen)
    assert len(np.unique(joined, axis=0)) == len(joined) == 8**3
    assert joined.min() == -1 and joined.max() == 1 and joined.dtype == np.float32


def test_f_score_of_a_surface_with_itself_is_one_and_with_none_zero():
    truth = trimesh.creation.icosphere()
    assert surfaces.f_score(truth, truth, threshold=1e-6, points=500) == 1
    assert surfaces.f_score(None, truth, threshold=1.0, points=500) == 0


@pytest.mark.parametrize(("height", "expected"), [(0.09, 1.0), (0.11, 0.0)])
def test_f_score_counts_what_is_within_the_threshold(height, expected):
    assert surfaces.f_score(plane(height), plane(0), threshold=0.1, points=300) == expected


@pytest.mark.parametrize("swapped", [False, True])
def test_f_score_is_the_harmonic_mean_of_precision_and_recall(swapped):
    # The larger one reaches 3 beyond the smaller: 1.2 of its 4 are within 0.2. All of the smaller is.
    pair = [plane(0, size=4.0), plane(0)]
    found, true = reversed(pair) if swapped else pair
    score = surfaces.f_score(found, true, threshold=0.2, points=40_000)
    assert score == pytest.approx(2 * 0.3 / 1.3, abs=0.01)


@pytest.mark.parametrize(
    ("precision", "recall", "mean"), [(0.5, 0.5, 0.5), (1.0, 0.25, 0.4), (0.0, 0.0, 0.0), (1.0, 0.0, 0.0)]
)
def test_the_harmonic_mean_by_hand(precision, recall, mean):
    assert surfaces.harmonic_mean(precision, recall) == pytest.approx(mean)


def picture(surface, folder) -> np.ndarray:
    path = folder / "surface.png"
    surfaces.draw(surface, path)
    assert path.stat().st_size < 100_000
    return np.asarray(Image.open(path)).astype(int)


def test_a_ball_is_drawn_as_a_disc_with_the_normals_colours(tmp_path):
    radius = 0.9
    pixels = picture(trimesh.creation.icosphere(subdivisions=5, radius=radius), tmp_path)
    assert pixels.shape == (surfaces.SIDE, surfaces.SIDE, 3)
    offset = (np.arange(surfaces.SIDE) + 0.5) / surfaces.SIDE * 2 - 1
    right, down = np.meshgrid(offset * surfaces.REACH, offset * surfaces.REACH)
    distance = np.hypot(right, down)
    drawn = (pixels != 255).any(-1)
    pixel = 2 * surfaces.REACH / surfaces.SIDE
    assert drawn[distance < radius - pixel].all() and not drawn[distance > radius + pixel].any()
    # Normal at a pixel: (right, up, towards the camera) / r, from −1…1 to 0…255. No far side shines through.
    inside = distance < 0.8 * radius
    towards = np.sqrt(np.maximum(radius**2 - distance**2, 0))
    normal = np.stack([right, -down, towards], axis=-1) / radius
    expected = (normal + 1) / 2 * 255
    assert np.abs(pixels - expected)[inside].max() < 12


def test_up_is_up_and_the_camera_looks_from_in_front_above(tmp_path):
    def rows_and_columns(*centre: float) -> np.ndarray:
        moved = trimesh.creation.icosphere(radius=0.1)
        moved.apply_translation(centre)
        return np.argwhere((picture(moved, tmp_path) != 255).any(-1)).mean(0)

    middle = rows_and_columns(0, 0, 0)
    assert rows_and_columns(0, 0, 0.8)[0] < middle[0] - 20 and rows_and_columns(0, 0, 0.8)[
        1
    ] == pytest.approx(middle[1], abs=1)
    assert rows_and_columns(0.8, 0, 0)[1] > middle[1] + 20
    assert rows_and_columns(0, 0.8, 0)[0] < middle[0] - 20  # farther away is higher, seen from above


def test_what_is_nearer_hides_what_is_behind(tmp_path):
    towards = surfaces.TOWARDS_CAMERA / np.linalg.norm(surfaces.TOWARDS_CAMERA)
    near, far = trimesh.creation.icosphere(radius=0.3), trimesh.creation.box(extents=(0.3, 0.3, 0.3))
    near.apply_translation(0.6 * towards)
    far.apply_translation(-0.6 * towards)
    alone, both = picture(near, tmp_path), picture(trimesh.util.concatenate([near, far]), tmp_path)
    inner = slice(surfaces.SIDE // 2 - 12, surfaces.SIDE // 2 + 12)
    assert np.abs(alone - both)[inner, inner].max() < 40 and (both[inner, inner] != 255).any(-1).all()
    assert (both[0, 0] == 255).all()


def test_a_picture_makes_its_folder(tmp_path):
    assert picture(trimesh.creation.icosphere(), tmp_path / "eugen/budget0.3").any()


def test_nothing_is_drawn_as_nothing(tmp_path):
    assert (picture(None, tmp_path) == 255).all()
