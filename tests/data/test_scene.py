"""The rendered scene: geometry against the surfaces' equations, light against what must hold."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stages.data import scene
from stages.data.verify import sha256_file

MATT = scene.Material((0.2, 0.4, 0.6))
SPHERE = scene.Sphere(MATT, (0.1, -0.2, 0.3), 0.7)
BOX = scene.Box(MATT, (0.2, 0.1, -0.3), (0.5, 0.3, 0.4), 0.6)
DISC = scene.Disc(MATT, -0.4, 0.8)


def random_rays(count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """From outside, towards points near the middle."""
    rng = np.random.default_rng(0)
    origins = rng.normal(size=(count, 3))
    origins *= 4 / np.linalg.norm(origins, axis=1, keepdims=True)
    return origins, rng.uniform(-1, 1, size=(count, 3)) - origins


def inside(surface: scene.Surface, points: np.ndarray) -> np.ndarray:
    """Whether points [..., 3] are within a solid, by its definition."""
    if isinstance(surface, scene.Sphere):
        return np.linalg.norm(points - surface.centre, axis=-1) < surface.radius
    assert isinstance(surface, scene.Box)
    x, y, z = np.moveaxis(points - surface.centre, -1, 0)
    c, s = math.cos(surface.turn), math.sin(surface.turn)
    along, across = c * x + s * y, -s * x + c * y
    return (abs(along) < surface.half[0]) & (abs(across) < surface.half[1]) & (abs(z) < surface.half[2])


@pytest.mark.parametrize("surface", [SPHERE, BOX])
def test_a_ray_enters_a_solid_where_marching_along_it_does(surface):
    origins, directions = random_rays()
    steps = np.linspace(0, 2, 4001)
    points = origins[:, None] + steps[:, None] * directions[:, None]
    within = inside(surface, points)
    marched = np.where(within.any(axis=1), steps[within.argmax(axis=1)], np.inf)
    t, _ = surface.hit(origins, directions)
    both = np.isfinite(marched)
    assert 100 < both.sum() < 390
    assert (np.abs(t[both] - marched[both]) <= steps[1] + 1e-9).all()
    # Marching may step over a corner, but never enters where there is nothing.
    assert np.isfinite(t[both]).all() and (np.isfinite(t) & ~both).mean() < 0.01


@pytest.mark.parametrize("surface", [SPHERE, BOX])
def test_normals_point_out_of_a_solid(surface):
    origins, directions = random_rays()
    t, normals = surface.hit(origins, directions)
    rows = np.isfinite(t)
    points, normals = origins[rows] + t[rows, None] * directions[rows], normals[rows]
    assert np.linalg.norm(normals, axis=1) == pytest.approx(np.ones(rows.sum()))
    assert not inside(surface, points + 1e-6 * normals).any()
    assert inside(surface, points - 1e-6 * normals).mean() > 0.99  # but for rays that hit an edge
    if isinstance(surface, scene.Sphere):
        assert normals == pytest.approx((points - surface.centre) / surface.radius)
    else:  # each face is as far from the centre as half a side
        height = ((points - surface.centre) * normals).sum(axis=1)
        assert np.abs(height[:, None] - surface.half).min(axis=1) == pytest.approx(np.zeros(rows.sum()))


def test_a_disc_is_met_in_its_plane_and_within_its_radius():
    origins, directions = random_rays()
    t, normals = DISC.hit(origins, directions)
    rows = np.isfinite(t)
    points = origins[rows] + t[rows, None] * directions[rows]
    assert 50 < rows.sum() < 350
    assert points[:, 2] == pytest.approx(np.full(rows.sum(), DISC.height))
    assert (np.linalg.norm(points[:, :2], axis=1) < DISC.radius).all()
    assert ((normals[rows] * directions[rows]).sum(axis=1) < 0).all()
    in_plane = origins + ((DISC.height - origins[:, 2]) / directions[:, 2])[:, None] * directions
    assert (np.linalg.norm(in_plane[~rows, :2], axis=1) >= DISC.radius).all()


@pytest.mark.parametrize("surface", [SPHERE, BOX, DISC])
def test_what_lies_behind_a_ray_is_not_hit(surface):
    origins, directions = random_rays()
    t, _ = surface.hit(origins, -directions)
    assert np.isinf(t).all()


@pytest.mark.parametrize("order", [1, -1])
def test_the_nearer_surface_wins(order):
    red = scene.Sphere(scene.Material((0.9, 0.0, 0.0)), (0.0, 0.0, 0.5), 0.3)
    blue = scene.Sphere(scene.Material((0.0, 0.0, 0.9)), (0.0, 0.0, -0.5), 0.3)
    origins = np.array([[0, 0, 4.0], [0, 0, -4.0], [2.0, 0, 4.0]])
    directions = np.array([[0, 0, -1.0], [0, 0, 1.0], [0, 0, -1.0]])
    seen = scene.shade(origins, directions, (red, blue)[::order])
    assert seen[0, 0] > 0.2 and seen[0, 2] == 0
    assert seen[1, 2] > 0.2 and seen[1, 0] == 0
    assert (seen[:, 3] == [1, 1, 0]).all() and (seen[2] == 0).all()


def looks(surface: scene.Surface, point: np.ndarray, towards: list[np.ndarray]) -> np.ndarray:
    """Colour of one point seen from several unit directions."""
    origins = np.stack([point + 3 * direction for direction in towards])
    return scene.shade(origins, point - origins, (surface,))[:, :3]


def test_highlights_move_with_the_viewer_and_matt_surfaces_look_the_same_to_all():
    normal = scene.LIGHT + np.array([0.5, 0.3, 0.0])
    normal /= np.linalg.norm(normal)
    mirrored = 2 * (normal @ scene.LIGHT) * normal - scene.LIGHT
    views = [mirrored, normal, scene.LIGHT]
    glossy = scene.Material((0.2, 0.2, 0.2), specular=0.5, exponent=10)
    seen = looks(scene.Sphere(glossy, (0.0, 0.0, 0.0), 1.0), normal, views)
    matt = looks(scene.Sphere(scene.Material((0.2, 0.2, 0.2)), (0.0, 0.0, 0.0), 1.0), normal, views)
    assert np.ptp(matt, axis=0).max() < 1e-12
    # By Phong's formula: strength · cos(angle to the mirrored light)^exponent.
    cosines = np.array([1.0, normal @ mirrored, scene.LIGHT @ mirrored])
    assert (seen - matt)[:, 0] == pytest.approx(0.5 * cosines**10)


def test_a_matt_surface_has_lambert_s_brightness():
    (seen,) = looks(DISC, np.array([0.2, 0.1, DISC.height]), [np.array([0.0, 0.0, 1.0])])
    bright = scene.AMBIENT + scene.DIFFUSE * scene.LIGHT[2]
    assert seen == pytest.approx(bright * np.array(MATT.colour))


def test_things_throw_shadows():
    ball = scene.Sphere(MATT, (0.0, 0.0, 0.6), 0.3)
    shaded = np.array(ball.centre) - scene.LIGHT * (0.6 - DISC.height) / scene.LIGHT[2]
    points = np.stack([shaded, shaded - [0.0, 0.6, 0.0]])
    origins = points + np.array([-2.0, 0.5, 0.5])
    seen = scene.shade(origins, points - origins, (DISC, ball))
    assert seen[0, :3] == pytest.approx(scene.AMBIENT * np.array(MATT.colour))
    assert (seen[1, :3] > 1.5 * seen[0, :3]).all()


def test_edges_are_partly_transparent_and_keep_their_colour():
    floor = scene.Disc(MATT, 0.0, 1.0)
    pose = scene.cameras("train", 8)[5]
    pixels = scene.render(pose, 48, (floor,))
    alphas = np.unique(pixels[..., 3]).tolist()
    assert alphas == [0, 64, 128, 191, 255]  # of 2 × 2 rays
    colours = np.unique(pixels[pixels[..., 3] > 0][:, :3], axis=0)
    assert len(colours) == 1
    assert (pixels[pixels[..., 3] == 0] == 0).all()


def test_cameras_stand_upright_on_a_sphere_and_look_at_the_middle():
    for part in scene.PARTS:
        poses = scene.cameras(part, 10)
        turns, places = poses[:, :3, :3], poses[:, :3, 3]
        assert turns @ turns.transpose(0, 2, 1) == pytest.approx(np.tile(np.eye(3), (10, 1, 1)))
        assert np.linalg.det(turns) == pytest.approx(np.ones(10))
        assert np.linalg.norm(places, axis=1) == pytest.approx(np.full(10, scene.DISTANCE))
        assert -turns[:, :, 2] == pytest.approx(-places / scene.DISTANCE)  # looks along −z
        assert turns[:, 2, 0] == pytest.approx(np.zeros(10))  # x is level
        assert (turns[:, 2, 1] > 0).all()  # y is up


def test_no_two_views_are_the_same():
    places = np.concatenate(
        [scene.cameras(p, n)[:, :3, 3] for p, n in {"train": 100, "val": 10, "test": 20}.items()]
    )
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 9 * np.eye(len(places))
    assert apart.min() > 0.05


def test_the_scene_lies_where_its_text_says_and_fills_the_picture():
    for pose in scene.cameras("train", 12):
        origins, directions = (a.reshape(-1, 3) for a in scene.pixel_rays(pose, scene.ANGLE, 96, 96))
        depths = np.stack([surface.hit(origins, directions)[0] for surface in scene.SCENE]).min(axis=0)
        points = (origins + depths[:, None] * directions)[np.isfinite(depths)]
        assert np.linalg.norm(points, axis=1).max() < 1.3
        frame = np.isfinite(depths).reshape(96, 96)
        assert 0.1 < frame.mean() < 0.8
        assert not (frame[0].any() or frame[-1].any() or frame[:, 0].any() or frame[:, -1].any())


def test_every_surface_is_seen_and_some_hide_others():
    hidden, counts = 0, np.zeros(len(scene.SCENE))
    for pose in scene.cameras("test", 8):
        origins, directions = (a.reshape(-1, 3) for a in scene.pixel_rays(pose, scene.ANGLE, 48, 48))
        depths = np.stack([surface.hit(origins, directions)[0] for surface in scene.SCENE])
        met = np.isfinite(depths)
        counts += np.bincount(depths.argmin(axis=0)[met.any(axis=0)], minlength=len(scene.SCENE))
        hidden += (met[1:].sum(axis=0) > 1).sum()  # the floor aside
    assert (counts > 50).all() and hidden > 100


def test_rendering_again_gives_the_same_files(tmp_path):
    counts = {"train": 2, "val": 1, "test": 1}
    for name in ("one", "two"):
        scene.write(tmp_path / name, counts, 16)
    first, second = (
        {path.relative_to(tmp_path / name): sha256_file(path) for path in (tmp_path / name).rglob("*.*")}
        for name in ("one", "two")
    )
    assert first == second and len(first) == 4 + 3
