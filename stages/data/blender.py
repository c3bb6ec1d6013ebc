"""Posed images in the layout of `nerf_synthetic` (Mildenhall et al. 2020, rendered by Blender).

A folder holds `transforms_train.json`, `transforms_val.json` and `transforms_test.json`, each with the
horizontal field of view `camera_angle_x` in radians and a list of frames: an image's path without its
extension, and the matrix that turns camera coordinates into the world's. Cameras follow OpenGL: x right,
y up, looking along −z. Images are PNG files, RGBA with straight alpha, or RGB.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stages.data.verify import DataError

PARTS = ("train", "val", "test")
"""As the files call them."""


@dataclass(frozen=True)
class Views:
    """Images of one size and their cameras.

    Attributes:
        pixels: uint8 [views, height, width, 4], RGB and straight alpha.
        poses: float64 [views, 4, 4], camera to world.
        angle: horizontal field of view, radians.
    """

    pixels: np.ndarray
    poses: np.ndarray
    angle: float


def load(folder: Path, part: str, *, most: int | None = None, downscale: int = 1) -> Views:
    """The views of one part.

    Args:
        part: `train`, `val` or `test`.
        most: that many of the frames, evenly spaced; None for all.
        downscale: each pixel becomes the mean of so many by so many.

    Raises:
        DataError: a file is missing or malformed, the images differ in size, or are too few.
    """
    path = folder / f"transforms_{part}.json"
    angle, frames = _transforms(path)
    if most is not None:
        if most > len(frames):
            raise DataError(f"{path} has {len(frames)} frames and {most} were asked for: ask for fewer views")
        frames = [frames[i * len(frames) // most] for i in range(most)]
    poses = np.stack([_pose(path, i, frame) for i, frame in enumerate(frames)])
    images = [_image(path, i, frame, downscale) for i, frame in enumerate(frames)]
    for image, frame in zip(images, frames, strict=True):
        if image.shape != images[0].shape:
            raise DataError(
                f"{path}: images of mixed size, {frames[0]['file_path']} is {_size(images[0])} and "
                f"{frame['file_path']} is {_size(image)}: render all frames at one resolution"
            )
    return Views(np.stack(images), poses, angle)


def pixel_rays(
    pose: np.ndarray,
    angle: float,
    height: int,
    width: int,
    offset: tuple[float, float] = (0.5, 0.5),
) -> tuple[np.ndarray, np.ndarray]:
    """Origins and directions, float64 [height, width, 3], of the rays through an image's pixels.

    Directions are one long along the camera's axis, so that a ray's parameter is depth.

    Args:
        pose: camera to world [4, 4].
        angle: horizontal field of view, radians.
        offset: where a ray passes through its pixel, right and down, in pixels; the centre by default.
    """
    focal = 0.5 * width / math.tan(0.5 * angle)
    right = (np.arange(width) + offset[0] - 0.5 * width) / focal
    up = (0.5 * height - np.arange(height) - offset[1]) / focal
    x, y = np.meshgrid(right, up)
    directions = np.stack([x, y, -np.ones_like(x)], axis=-1) @ pose[:3, :3].T
    return np.broadcast_to(pose[:3, 3], directions.shape), directions


def _transforms(path: Path) -> tuple[float, list[dict[str, Any]]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: a folder of posed images in the layout of nerf_synthetic has it"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    angle = content.get("camera_angle_x") if isinstance(content, dict) else None
    if not (isinstance(angle, int | float) and 0 < angle < math.pi):
        raise DataError(f"{path}: camera_angle_x = {angle!r}: must be an angle between 0 and π radians")
    frames = content.get("frames")
    if not (isinstance(frames, list) and frames):
        raise DataError(f"{path}: frames = {frames!r}: must be a list with at least one frame")
    return float(angle), frames


def _pose(path: Path, number: int, frame: Any) -> np.ndarray:
    matrix = frame.get("transform_matrix") if isinstance(frame, dict) else None
    try:
        pose = np.asarray(matrix, dtype=np.float64)
    except (TypeError, ValueError):
        pose = np.empty(0)
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        raise DataError(
            f"{path}: frame {number}: transform_matrix = {matrix!r}: must be 4 rows of 4 finite numbers"
        )
    return pose


def _image(path: Path, number: int, frame: Any, downscale: int) -> np.ndarray:
    """uint8 [height, width, 4]."""
    name = frame.get("file_path")
    if not isinstance(name, str):
        raise DataError(f"{path}: frame {number}: file_path = {name!r}: must be an image's path")
    file = path.parent / (name if name.endswith(".png") else f"{name}.png")
    if not file.is_file():
        raise DataError(f"{path}: frame {number}: image {file} is missing: the folder is incomplete")
    try:
        with Image.open(file) as opened:
            if opened.mode not in ("RGB", "RGBA"):
                raise DataError(f"{file} has mode {opened.mode}: must be RGB or RGBA with 8 bits a channel")
            image = opened.convert("RGBA")
    except OSError as error:
        raise DataError(f"{file} cannot be read as an image: {error}") from None
    if downscale == 1:
        return np.asarray(image)
    if image.width % downscale or image.height % downscale:
        raise DataError(
            f"{file} is {image.width}×{image.height}: downscale = {downscale} must divide both sides"
        )
    # Pillow weights colours by alpha here, so that what is transparent leaves no fringe.
    return np.asarray(image.reduce(downscale))


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}×{image.shape[0]}"
