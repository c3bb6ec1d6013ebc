"""SHA-256 of files and arrays, and the error every data problem ends in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np


class DataError(RuntimeError):
    """A data set is missing, altered or malformed. Its text names the set, the place and the cure."""


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> dict[str, int]:
    """Size in bytes and time of the last change in ns: what a file must keep to be taken for unchanged.

    Raises `DataError` if the file is missing.
    """
    if not path.is_file():
        raise DataError(f"data file {path} is missing: put it back there or correct its path in params.yaml")
    found = path.stat()
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def check_unchanged(path: Path, known: Mapping[str, int], task: str) -> None:
    """For files that stay where they are: hashing gigabytes at each opening would take minutes.

    Args:
        known: the file's `stamp` when the task's data were prepared.

    Raises:
        DataError: the file is missing or its stamp is another.
    """
    found = stamp(path)
    if found != dict(known):
        raise DataError(
            f"data file {path} changed since it was prepared ({found}, then {dict(known)}): "
            f"run dvc repro -f prepare@{task}"
        )


def sha256_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of named arrays: names, dtypes, shapes and values; neither order nor memory layout counts.

    Raises `ValueError` for arrays of Python objects: their bytes are addresses, not values.
    """
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        if array.dtype.hasobject:
            raise ValueError(
                f"array {name!r} holds Python objects ({array.dtype}): give it a numeric or text dtype"
            )
        # Little-endian everywhere, so that equal values have equal hashes on every machine.
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{name!r} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
