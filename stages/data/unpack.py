"""Reading zip and tar archives without trusting them.

Only ordinary files named by the caller are read; links, devices and paths that lead out of
the folder are refused. Nothing is unpickled or executed.
"""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO

from stages.data.verify import DataError

LIMIT_BYTES = 4 << 30
"""What may come out of one archive at a time; the largest data set of the suite has a tenth of it."""
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)


def names(archive: Path) -> list[str]:
    """Names of the ordinary files in a zip (`.whl`) or tar (`.tar.gz`, `.tgz`) archive, sorted."""
    with _opened(archive) as (files, _):
        return sorted(files)


def members(archive: Path, wanted: Iterable[str]) -> dict[str, bytes]:
    """Contents of the wanted members, read in one pass. Raises `DataError` as `extract` does."""
    contents = {}
    with _opened(archive) as (files, read):
        for name in _in_order(archive, files, wanted):
            with read(name) as stream:
                contents[name] = stream.read()
    return contents


def member(archive: Path, name: str) -> bytes:
    """Contents of one member. Raises `DataError` as `extract` does."""
    return members(archive, [name])[name]


def extract(archive: Path, targets: Mapping[str, str], folder: Path) -> None:
    """Write members to paths below `folder`: `targets` maps a member's name to its path there.

    Raises `DataError`, before anything is written, for a member that is missing or not an ordinary
    file and for a path that leaves the folder, by `..`, by a root or through a link already there.
    """
    paths = {name: _inside(folder, target) for name, target in targets.items()}
    with _opened(archive) as (files, read):
        for name in _in_order(archive, files, paths):
            paths[name].parent.mkdir(parents=True, exist_ok=True)
            with read(name) as source, open(paths[name], "wb") as destination:
                shutil.copyfileobj(source, destination)


def _inside(folder: Path, target: str) -> Path:
    """The path of `target` below `folder`; raises `DataError` if it leads elsewhere."""
    path = PurePosixPath(target)
    windows = PureWindowsPath(target)
    if (
        not path.parts
        or windows.is_absolute()
        or windows.drive
        or path.is_absolute()
        or ".." in windows.parts
    ):
        raise DataError(
            f"path {target!r} leaves the folder {folder}: only relative paths without '..' are unpacked"
        )
    place = folder / path
    if not place.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"path {target!r} leaves the folder {folder} through a link: remove the link")
    return place


def _in_order(archive: Path, files: Mapping[str, int], wanted: Iterable[str]) -> list[str]:
    """The wanted names in the archive's own order, in which a compressed tar is read only once.

    Neither format gives more bytes than it declares, so that the limit is checked before any is read.
    """
    wanted = set(wanted)
    missing = sorted(wanted.difference(files))
    if missing:
        raise DataError(
            f"{archive} has no ordinary file {missing[0]!r} (links do not count): "
            "it is not the expected release; delete it and run again to fetch it anew"
        )
    declared = sum(files[name] for name in wanted)
    if declared > LIMIT_BYTES:
        raise DataError(
            f"{archive} would unpack to {declared} bytes, more than the {LIMIT_BYTES} that are allowed: "
            "it is not the expected release; delete it"
        )
    return [name for name in files if name in wanted]


@contextmanager
def _opened(archive: Path) -> Iterator[tuple[dict[str, int], Callable[[str], IO[bytes]]]]:
    """The archive's ordinary files in its own order with their declared bytes, and how to open one.

    Of several entries of one name the last counts, as when it is opened.
    """
    if not archive.is_file():
        raise DataError(f"{archive} is missing: run again to fetch it anew")
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                entries = {info.filename: info for info in file.infolist()}
                yield {n: info.file_size for n, info in entries.items() if _is_ordinary(info)}, file.open
        else:
            with tarfile.open(archive, "r:*") as file:
                sizes = {info.name: info.size for info in file if info.isreg()}
                yield sizes, lambda name: _tar_stream(file, name)
    except _BROKEN as error:
        raise DataError(
            f"{archive} cannot be unpacked ({error}): delete it and run again to fetch it anew"
        ) from error


def _is_ordinary(info: zipfile.ZipInfo) -> bool:
    """True for a file. Archives made on Windows carry no Unix mode (0), and cannot hold links."""
    mode = info.external_attr >> 16
    return not info.is_dir() and (stat.S_IFMT(mode) == 0 or stat.S_ISREG(mode))


def _tar_stream(file: tarfile.TarFile, name: str) -> IO[bytes]:
    """An ordinary file of a tar archive. A link of the same name further on is refused too."""
    info = file.getmember(name)
    stream = file.extractfile(info) if info.isreg() else None
    if stream is None:
        raise DataError(
            f"{file.name} holds a link or device under the name {name!r}: it is not the expected release"
        )
    return stream
