"""The disks that a run writes to: tried before any work, and named when one refuses."""

from __future__ import annotations

import configparser
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

LEAST_FREE_MB = 32
"""With less than this no stage is started: outputs, their copies in DVC's cache and the notes need room."""
_REFUSED = re.compile(
    r"No space left on device|Disk quota exceeded|disk is full|Read-only file system|readonly database"
)


class DiskRefuses(RuntimeError):
    """A disk is full or cannot be written; the message says which, what it lacks, and the cure."""


def cache_folder(project: Path) -> Path:
    """Where DVC keeps the outputs of all runs."""
    chosen = ".dvc/cache"
    for name in ("config", "config.local"):
        settings = configparser.ConfigParser()
        settings.read(project / ".dvc" / name)
        if folder := settings.get("cache", "dir", fallback=None):
            chosen = str(Path(".dvc", folder))  # DVC's own rule: relative to the file that says it
    return project / chosen


def check_disks(project: Path) -> None:
    """Try to write where a run will write. Raises `DiskRefuses` before any work."""
    for folder in _written(project):
        _try(folder)
        free_mb = shutil.disk_usage(folder).free / 1e6
        if free_mb < LEAST_FREE_MB:
            raise DiskRefuses(
                f"the disk that holds {folder} is full: at least {LEAST_FREE_MB} MB are needed, "
                f"{free_mb:.1f} MB are free. Make space there and run again; finished stages are kept"
            )


def _written(project: Path) -> Iterator[Path]:
    """The folders a run writes to, or their nearest ancestors that exist."""
    cache = cache_folder(project)
    names = ("", ".work", "data", "artifacts", "results", "reports", ".dvc/tmp")
    wanted = [*(project / name for name in names), cache, cache / "files" / "md5", cache / "runs"]
    yield from dict.fromkeys(next(f for f in (folder, *folder.parents) if f.is_dir()) for folder in wanted)


def _try(folder: Path) -> None:
    """Make and remove a file: permissions alone do not tell of a disk that is read-only."""
    part = folder / f".try.{os.getpid()}.part"
    try:
        try:
            part.write_bytes(b"x")
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DiskRefuses(explain(folder, error)) from error


def explain(folder: Path, error: OSError) -> str:
    """What an `OSError` in `folder` means for the person who runs the benchmark."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free_mb = shutil.disk_usage(folder).free / 1e6
        return f"the disk that holds {folder} is full ({free_mb:.1f} MB are free): make space and run again"
    why = os.strerror(error.errno) if error.errno else str(error)
    return f"{folder} cannot be written ({why}): make it writable for this user and run again"


def reason(project: Path, lines: list[str]) -> str | None:
    """The plain reason if a stage ended because a disk refused; None if its lines do not say so."""
    for line in reversed(lines):
        if _REFUSED.search(line):
            said = line.strip()
            try:
                check_disks(project)
            except DiskRefuses as error:
                return f"{error} (the stage said: {said})"
            return f"{said}; free space: {_free(project)}. Make space and run again"
    return None


def _free(project: Path) -> str:
    found = {str(folder): shutil.disk_usage(folder).free / 1e6 for folder in (project, cache_folder(project))}
    return ", ".join(f"{free_mb:.1f} MB in {folder}" for folder, free_mb in found.items())
