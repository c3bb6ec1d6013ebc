"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path, size: int | None = None) -> Iterator[Path]:
    """A file beside `path` to write to; it takes the place of `path` when the block ends well.

    Its name tells which process writes it, so that whoever comes after a kill can tell that nobody does
    any more. `size` in bytes, where it is known, goes into the error of a full disk.

    Raises:
        OSError: the disk is full or read-only; the message says which disk, what it lacks, and the cure.
    """
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):  # a folder that became read-only: the next run clears it away
            part.unlink()
        if (number := disk_trouble(error)) is not None:
            raise OSError(number, explained(path, number, size)) from error
        raise


def part_of(path: Path) -> Path:
    """The name under which this process makes or removes `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def remove_whole(folder: Path) -> None:
    """Remove a folder whole or not at all, as far as readers see: a kill leaves no half of it."""
    part = part_of(folder)
    with suppress(FileNotFoundError):
        os.replace(folder, part)
    shutil.rmtree(part, ignore_errors=True)


def disk_trouble(error: BaseException) -> int | None:
    """The error number if a disk is full, its quota used up, or read-only; else None.

    torch hides it behind an error of its own; that of safetensors has the number in its words only.
    """
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    if isinstance(error, OSError) and error.errno in numbers:
        return error.errno
    found = next((number for number in numbers if f"(os error {number})" in str(error)), None)
    behind = error.__cause__ or error.__context__
    return found if found is not None or behind is None else disk_trouble(behind)


def explained(path: Path, number: int, size: int | None) -> str:
    """What is wrong with the disk of `path`, in words."""
    folder = next(place for place in [path, *path.resolve().parents] if place.is_dir())
    if number == errno.EROFS:
        why = f"{os.strerror(number)}: {path} cannot be written"
        return f"{why}, its disk is read-only: mount it writable and run again"
    free = shutil.disk_usage(folder).free
    needed = f"{size / 1e6:.1f} MB are needed, " if size is not None else ""
    return (
        f"{os.strerror(number)}: the disk that holds {folder} is full: {needed}{free / 1e6:.1f} MB are free. "
        "Make space and run again; finished stages are kept"
    )


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    data = text.encode("utf-8")
    with whole(path, len(data)) as part:
        part.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write plain data as sorted, indented JSON, whole or not at all. NaN is refused."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")
