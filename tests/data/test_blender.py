"""The layout of `nerf_synthetic`: what was written comes back, a miniature folder loads, faults are told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages.data import blender, scene
from stages.data.verify import DataError

POSE = scene.cameras("train", 7)[3]


def noise(height: int, width: int, channels: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def miniature(folder: Path, images: list[np.ndarray], part: str = "train", **changes: Any) -> Path:
    """A folder as Blender's script leaves it; returns the transforms file."""
    (folder / part).mkdir(parents=True, exist_ok=True)
    frames = []
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / part / f"r_{number}.png")
        Image.fromarray(image[..., 0]).save(folder / part / f"r_{number}_depth_0000.png")
        matrix = scene.cameras(part, len(images))[number].tolist()
        frames.append({"file_path": f"./{part}/r_{number}", "rotation": 0.0125, "transform_matrix": matrix})
    path = folder / f"transforms_{part}.json"
    path.write_text(json.dumps({"camera_angle_x": 0.69, "frames": frames, **changes}), encoding="utf-8")
    return path


def edit(path: Path, **frame: Any) -> None:
    """Change keys of the second frame."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["frames"][1].update(frame)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_what_was_rendered_comes_back(tmp_path):
    counts = {"train": 3, "val": 1, "test": 2}
    scene.write(tmp_path, counts, 16)
    for part, count in counts.items():
        views = blender.load(tmp_path, part)
        poses = scene.cameras(part, count)
        assert np.array_equal(views.poses, poses) and views.angle == scene.ANGLE
        assert np.array_equal(views.pixels, np.stack([scene.render(pose, 16) for pose in poses]))


def test_a_folder_as_blender_leaves_it_loads_unchanged(tmp_path):
    images = [noise(6, 8, seed=i) for i in range(4)]
    miniature(tmp_path, images)
    views = blender.load(tmp_path, "train")
    assert views.angle == 0.69
    assert np.array_equal(views.poses, scene.cameras("train", 4))
    assert np.array_equal(views.pixels, np.stack(images))


def test_images_without_alpha_are_opaque(tmp_path):
    image = noise(6, 8, channels=3)
    miniature(tmp_path, [image])
    (pixels,) = blender.load(tmp_path, "train").pixels
    assert np.array_equal(pixels[..., :3], image) and (pixels[..., 3] == 255).all()


def test_a_part_of_the_views_is_spread_over_all(tmp_path):
    images = [noise(4, 4, seed=i) for i in range(9)]
    miniature(tmp_path, images)
    views = blender.load(tmp_path, "train", most=3)
    assert np.array_equal(views.pixels, np.stack(images[::3]))
    assert np.array_equal(views.poses, scene.cameras("train", 9)[::3])
    assert len(blender.load(tmp_path, "train", most=9).pixels) == 9
    with pytest.raises(DataError, match=r"transforms_train.json has 9 frames and 10 were asked for"):
        blender.load(tmp_path, "train", most=10)


def test_downscaling_averages_what_is_seen(tmp_path):
    image = noise(6, 8)
    image[:2, :2] = [[[200, 100, 0, 255], [0, 0, 0, 0]], [[0, 0, 0, 0], [200, 100, 0, 255]]]
    miniature(tmp_path, [image])
    (pixels,) = blender.load(tmp_path, "train", downscale=2).pixels
    assert pixels.shape == (3, 4, 4)
    assert np.abs(pixels[0, 0].astype(int) - [200, 100, 0, 128]).max() <= 1  # no fringe of black
    mixed = image.astype(float).reshape(3, 2, 4, 2, 4)
    alpha = mixed[..., 3:]
    expected = (mixed[..., :3] * alpha).sum((1, 3)) / 255 / 4
    found = pixels[..., :3].astype(float) * pixels[..., 3:] / 255
    assert np.abs(found - expected).max() < 3  # 8 bits, rounded three times
    with pytest.raises(DataError, match=r"r_0.png is 8×6: downscale = 4 must divide both sides"):
        blender.load(tmp_path, "train", downscale=4)


def project(point: np.ndarray, angle: float, height: int, width: int) -> np.ndarray:
    """Column and row, in pixels from the upper left corner, of a world point: the pinhole's own equations."""
    x, y, z, _ = np.linalg.inv(POSE) @ [*point, 1]
    focal = width / 2 / math.tan(angle / 2)
    return np.array([width / 2 + focal * x / -z, height / 2 - focal * y / -z])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 100)])
def test_a_point_is_on_the_ray_of_the_pixel_that_it_projects_to(height, width):
    for point in np.random.default_rng(1).uniform(-0.4, 0.4, (20, 3)):
        column, row = project(point, 0.7, height, width)
        offset = (column % 1, row % 1)
        origins, directions = blender.pixel_rays(POSE, 0.7, height, width, offset)
        origin, direction = origins[int(row), int(column)], directions[int(row), int(column)]
        depth = -(np.linalg.inv(POSE) @ [*point, 1])[2]
        assert origin + depth * direction == pytest.approx(point)


def test_rays_pass_through_the_middle_of_their_pixels():
    centre = blender.pixel_rays(POSE, 0.7, 5, 9)[1][2, 4]
    assert centre == pytest.approx(-POSE[:3, 2])  # an odd picture's middle pixel looks along the axis
    left, right = blender.pixel_rays(POSE, 0.7, 4, 8)[1][1, [0, 7]]
    half = math.tan(0.35) * 7 / 8  # the outermost pixels' centres
    assert (right - left) @ POSE[:3, 0] == pytest.approx(2 * half)


def test_a_missing_transforms_file_is_told(tmp_path):
    miniature(tmp_path, [noise(4, 4)])
    with pytest.raises(DataError, match=r"transforms_val.json is missing: .* layout of nerf_synthetic"):
        blender.load(tmp_path, "val")


def test_a_broken_transforms_file_is_told(tmp_path):
    (tmp_path / "transforms_train.json").write_text('{"camera_angle_x": 0.6, "frames": [', encoding="utf-8")
    with pytest.raises(DataError, match=r"transforms_train.json is not valid JSON"):
        blender.load(tmp_path, "train")


@pytest.mark.parametrize("angle", [None, "0.7", 0, 3.2, -1])
def test_a_wrong_field_of_view_is_told(tmp_path, angle):
    miniature(tmp_path, [noise(4, 4)], camera_angle_x=angle)
    with pytest.raises(DataError, match=rf"camera_angle_x = {angle!r}: must be an angle"):
        blender.load(tmp_path, "train")


@pytest.mark.parametrize("frames", [[], None, {}])
def test_missing_frames_are_told(tmp_path, frames):
    miniature(tmp_path, [noise(4, 4)], frames=frames)
    with pytest.raises(DataError, match=r"transforms_train.json: frames = .*: must be a list"):
        blender.load(tmp_path, "train")


@pytest.mark.parametrize(
    "matrix",
    [None, "one", np.eye(3).tolist(), np.eye(4)[:3].tolist(), [[1, 2], [3]], [[math.nan] * 4] * 4],
)
def test_a_matrix_of_the_wrong_shape_is_told(tmp_path, matrix):
    path = miniature(tmp_path, [noise(4, 4)] * 3)
    edit(path, transform_matrix=matrix)
    with pytest.raises(DataError, match=r"frame 1: transform_matrix = .*: must be 4 rows of 4 finite"):
        blender.load(tmp_path, "train")


def test_a_missing_image_is_told(tmp_path):
    miniature(tmp_path, [noise(4, 4)] * 3)
    (tmp_path / "train/r_1.png").unlink()
    with pytest.raises(DataError, match=r"frame 1: image .*train/r_1.png is missing"):
        blender.load(tmp_path, "train")


@pytest.mark.parametrize("name", [None, 7])
def test_a_frame_without_an_image_is_told(tmp_path, name):
    edit(miniature(tmp_path, [noise(4, 4)] * 3), file_path=name)
    with pytest.raises(DataError, match=rf"frame 1: file_path = {name!r}: must be an image's path"):
        blender.load(tmp_path, "train")


def test_images_of_mixed_size_are_told(tmp_path):
    miniature(tmp_path, [noise(4, 4), noise(4, 6)])
    with pytest.raises(
        DataError, match=r"mixed size, \./train/r_0 is 4×4 and \./train/r_1 is 6×4: render all"
    ):
        blender.load(tmp_path, "train")


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "LA"])
def test_an_image_without_colours_is_told(tmp_path, mode):
    miniature(tmp_path, [noise(4, 4)] * 2)
    Image.new(mode, (4, 4)).save(tmp_path / "train/r_1.png")
    with pytest.raises(DataError, match=rf"r_1.png has mode {mode}: must be RGB or RGBA"):
        blender.load(tmp_path, "train")


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_broken_image_is_told(tmp_path, content):
    miniature(tmp_path, [noise(64, 64)] * 2)
    file = tmp_path / "train/r_1.png"
    file.write_bytes(file.read_bytes()[:3000] if content is None else content)
    with pytest.raises(DataError, match=r"r_1.png cannot be read as an image"):
        blender.load(tmp_path, "train")
