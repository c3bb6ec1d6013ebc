"""Photographs in folders, one folder a class: ImageNet, Imagenette, EuroSAT and whatever is laid out so.

`root/train/<class>/*` and, where there is one, `root/val/<class>/*` as the official test split; or
`root/<class>/*` alone. Files are decoded by Pillow when read, so that a set may be larger than memory.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from stages.data.verify import DataError

CHUNK = 256
"""Images in memory at a time."""
SHARPNESS = 2
"""JPEGs are decoded at a reduced size where that is still so many times `side`: faster, looks the same."""


class ImageFolder:
    """Colour photographs of equal size, read from files.

    Args:
        root: the folder described above.
        side: pixels along each edge: the shorter side is resized to it, then the centre is cut out.

    Raises:
        DataError: the folder is missing, has no class, a class without images, or other classes in `val`.
    """

    def __init__(self, root: Path, side: int) -> None:
        if not root.is_dir():
            raise DataError(
                f"image folder {root.resolve()}: there is no such folder; set data.folder to the one that "
                "holds train/<class>/ and val/<class>/, or the classes' folders themselves"
            )
        self.root, self.side = root, side
        train = root / "train"
        parted = train.is_dir() and any(path.is_dir() for path in train.iterdir())
        self.classes, samples = _listed(train if parted else root)
        self.official = 0
        if parted and (root / "val").is_dir():
            classes, held_out = _listed(root / "val")
            if classes != self.classes:
                odd = sorted(set(classes) ^ set(self.classes))
                raise DataError(
                    f"image folder {root.resolve()}: class {odd[0]!r} is in one of train and val only; "
                    f"both need the same classes ({len(self.classes)} in train, {len(classes)} in val)"
                )
            samples, self.official = samples + held_out, len(held_out)
        self.files = [Path(file) for file, _ in samples]
        self.labels = np.array([label for _, label in samples], dtype=np.int64)
        self._digests: dict[int, str] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image: height, width, colours."""
        return (self.side, self.side, 3)

    @property
    def sha256(self) -> str:
        """Over the names and contents of the files read so far."""
        digest = hashlib.sha256()
        for row in sorted(self._digests):
            name = self.files[row].relative_to(self.root).as_posix()
            digest.update(f"{name!r} {self._digests[row]}\n".encode())
        return digest.hexdigest()

    @property
    def rows(self) -> int:
        """How many files were read so far."""
        return len(self._digests)

    def read(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The images of those rows, uint8 `[n, side, side, 3]` at a time, in their order.

        Raises:
            DataError: a file is no readable image of 8 bits per colour; names it.
        """
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter's lock
            for start in range(0, len(rows), CHUNK):
                yield np.stack(list(pool.map(self._read, rows[start : start + CHUNK])))

    def _read(self, row: int) -> np.ndarray:
        path = self.files[row]
        try:
            content = path.read_bytes()
            pixels = decode(content, self.side)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"image folder {self.root.resolve()}: {path} cannot be read ({error}); replace or delete it"
            ) from error
        self._digests[row] = hashlib.sha256(content).hexdigest()
        return pixels


def decode(content: bytes, side: int) -> np.ndarray:
    """An encoded image as uint8 RGB `[side, side, 3]`; grey, palette and CMYK are converted, alpha goes.

    Raises:
        OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError: it cannot be decoded.
    """
    with Image.open(io.BytesIO(content)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"pixels of mode {image.mode}, expected 8 bits per colour")
        image.draft(None, (SHARPNESS * side, SHARPNESS * side))
        return np.asarray(ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC))


def _listed(folder: Path) -> tuple[list[str], list[tuple[str, int]]]:
    """Classes by name, and files with their class, both in alphabetical order."""
    from torchvision.datasets import ImageFolder as Listing

    try:
        found = Listing(str(folder))
    except FileNotFoundError as error:
        raise DataError(
            f"image folder {folder.resolve()}: {error}; each class needs a folder with at least one image"
        ) from None
    return found.classes, found.samples
