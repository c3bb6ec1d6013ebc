"""Digests: equal values have equal digests, different ones do not."""

import hashlib
import os

import numpy as np
import pytest

from stages.data.verify import DataError, check_unchanged, sha256_arrays, sha256_file, stamp


def test_file_digest_is_that_of_its_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"EUGen" * 100_000)
    assert sha256_file(path) == hashlib.sha256(b"EUGen" * 100_000).hexdigest()


def test_order_of_names_and_memory_layout_do_not_count():
    image, label = np.arange(12, dtype=np.int32).reshape(3, 4), np.array([1.5, -2.0])
    expected = sha256_arrays({"image": image, "label": label})
    assert sha256_arrays({"label": label, "image": image}) == expected
    assert sha256_arrays({"image": np.asfortranarray(image), "label": label}) == expected
    assert sha256_arrays({"image": image.astype(">i4"), "label": label}) == expected


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.zeros((2, 3), np.uint8)},
        {"y": np.zeros((3, 2), np.uint8)},
        {"x": np.zeros((3, 2), np.int8)},
        {"x": np.array([[0, 0], [0, 0], [0, 1]], np.uint8)},
        {"x": np.zeros((3, 2), np.uint8), "y": np.zeros(0, np.uint8)},
        {},
    ],
    ids=["shape", "name", "dtype", "value", "another", "none"],
)
def test_every_difference_changes_the_digest(other):
    assert sha256_arrays(other) != sha256_arrays({"x": np.zeros((3, 2), np.uint8)})


def test_arrays_of_objects_are_refused():
    with pytest.raises(ValueError, match="'words' holds Python objects"):
        sha256_arrays({"words": np.array([object()])})


def test_a_file_that_was_only_read_is_unchanged(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"EUGen")
    known = stamp(path)
    assert path.read_bytes()
    check_unchanged(path, known, "vision")


@pytest.mark.parametrize("change", ["size", "time"])
def test_a_file_of_another_size_or_time_has_changed(tmp_path, change):
    path = tmp_path / "file"
    path.write_bytes(b"EUGen")
    known, before = stamp(path), path.stat()
    if change == "size":
        path.write_bytes(b"EUGen!")
    later = before.st_mtime_ns + (1 if change == "time" else 0)
    os.utime(path, ns=(before.st_atime_ns, later))
    expected = f"{path} changed since it was prepared .*: run dvc repro -f prepare@vision$"
    with pytest.raises(DataError, match=expected):
        check_unchanged(path, known, "vision")


def test_a_file_that_is_gone_is_missing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"EUGen")
    known = stamp(path)
    path.unlink()
    with pytest.raises(DataError, match=f"{path} is missing: put it back"):
        check_unchanged(path, known, "vision")
