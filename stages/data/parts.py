"""Labelled images cut into parts, and the file that holds them.

The file is a safetensors file (https://github.com/huggingface/safetensors, "Format"), written piece by piece:
a set may be larger than memory, and reading maps the file instead of loading it.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from stages.data import verify
from stages.data.verify import DataError

SPLIT_SEED = 0
CHUNK = 1024

Parts = dict[str, np.ndarray]
"""Row numbers of a set, in random order, under `test`, `validation` and `train`."""


class LabelledImages(Protocol):
    """Images of one size and kind, read when needed."""

    labels: np.ndarray
    """Class numbers, int64 `[N]`."""
    classes: list[str]
    """Names by class number."""
    official: int
    """How many of the last images are an official test split."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image: `(side, side)`, or `(side, side, colours)`."""
        ...

    @property
    def sha256(self) -> str:
        """Of what was read."""
        ...

    @property
    def rows(self) -> int:
        """How many images that covers."""
        ...

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The images of those rows in their order, uint8 `[n, *shape]` at a time."""
        ...


class DecodedImages:
    """A set that is in memory.

    Raises:
        DataError: images of another kind than `[N, side, side]` or `[N, side, side, 3]` in uint8, or another
            number of labels.
    """

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray, *, classes: list[str], official: int = 0
    ) -> None:
        shape = images.shape
        square = len(shape) in (3, 4) and shape[1] == shape[2] and shape[3:] in ((), (3,))
        if not square or images.dtype != np.uint8 or labels.shape != shape[:1]:
            raise DataError(
                f"data set {name}: images {images.dtype} {shape} with labels {labels.shape}; "
                "expected uint8 [N, side, side] or [N, side, side, 3] with one label each"
            )
        self.images, self.labels = images, labels.astype(np.int64)
        self.classes, self.official = classes, official
        self.sha256 = verify.sha256_arrays({"images": images, "labels": labels})

    @property
    def shape(self) -> tuple[int, ...]:
        """See `LabelledImages`."""
        return self.images.shape[1:]

    @property
    def rows(self) -> int:
        """All of them."""
        return len(self.images)

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """See `LabelledImages`."""
        for start in range(0, len(rows), CHUNK):
            yield self.images[rows[start : start + CHUNK]]


def split(source: LabelledImages, *, test: int, validation: int, limit: int | None, where: str) -> Parts:
    """Disjoint random parts; the test part comes from the official test split where there is one.

    Args:
        limit: at most so many images of each class, those of an official test split not counted.
        where: key of params.yaml that holds the numbers, for errors.

    Raises:
        DataError: there are too few images.
    """
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    count = len(source.labels) - source.official
    order = torch.randperm(count, generator=generator).numpy()
    if limit is not None:
        labels = source.labels[order]
        firsts = [np.flatnonzero(labels == label)[:limit] for label in range(len(source.classes))]
        order = order[np.sort(np.concatenate(firsts))]
    if source.official:
        if test > source.official:
            raise DataError(f"{where}.test = {test}: the official test split has {source.official} images")
        chosen = torch.randperm(source.official, generator=generator)[:test].numpy()
        order = np.concatenate([count + chosen, order])
    held_out = test + validation
    if held_out >= len(order):
        raise DataError(
            f"{where}: test={test} and validation={validation} leave nothing of {len(order)} images "
            "for training"
        )
    return {"test": order[:test], "validation": order[test:held_out], "train": order[held_out:]}


def write(path: Path, source: LabelledImages, parts: Parts) -> None:
    """Write `<part>.images` (uint8) and `<part>.labels` (int64); names of the classes stand in the metadata.

    Raises:
        DataError: an image cannot be read, or they do not fit on the disk.
    """
    size = int(np.prod(source.shape))
    needed, free = size * sum(map(len, parts.values())), shutil.disk_usage(path.parent).free
    if needed > free:
        raise DataError(
            f"{needed / 1e9:.1f} GB of images for {path}, but the disk has {free / 1e9:.1f} GB free: "
            f"lower data.side (now {source.shape[0]}) or data.limit, images per class"
        )
    header: dict[str, Any] = {"__metadata__": {"classes": json.dumps(source.classes)}}
    end = 0
    for name, rows in parts.items():
        header[f"{name}.labels"] = _entry("I64", [len(rows)], end, 8 * len(rows))
        end += 8 * len(rows)
    for name, rows in parts.items():
        header[f"{name}.images"] = _entry("U8", [len(rows), *source.shape], end, size * len(rows))
        end += size * len(rows)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the labels are aligned
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for rows in parts.values():
            file.write(source.labels[rows].astype("<i8").tobytes())
        for rows in parts.values():
            for images in source.read(rows):
                file.write(np.ascontiguousarray(images).data)


def _entry(dtype: str, shape: list[int], start: int, length: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + length]}
