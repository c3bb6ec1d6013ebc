"""What a killed run can leave broken in DVC's bookkeeping, and its cure. Nothing is ever recomputed by it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

Say = Callable[[str], None]
"""Takes one line meant for a person."""


def is_dvc(pid: int) -> bool:
    """Whether a process with this id is alive and is DVC: after a kill the id may belong to anything."""
    try:
        return any(Path(part).name == "dvc" for part in psutil.Process(pid).cmdline())
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


def repair_dvc_lock(project: Path, say: Say) -> None:
    """Put a `dvc.lock` that DVC cannot read aside; DVC's run cache then restores the stages."""
    aside = project / ".work" / "dvc.lock.broken"
    aside.parent.mkdir(exist_ok=True)
    os.replace(project / "dvc.lock", aside)
    say("dvc.lock was unreadable (a killed run can leave it so): moved to .work/dvc.lock.broken;")
    say("finished stages come back from DVC's cache")


def repair_rwlock(project: Path, say: Say) -> list[int]:
    """Delete `.dvc/tmp/rwlock` if it is unreadable or names only processes that are no longer DVC.

    Returns the ids of the DVC processes that still hold files by it.
    """
    path = project / ".dvc" / "tmp" / "rwlock"
    if not path.exists():
        return []
    with _guard(path.with_name("rwlock.lock")):
        try:
            pids = set(_holders(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, AttributeError, KeyError, TypeError):
            path.unlink()
            say("DVC's table of locks (.dvc/tmp/rwlock) was unreadable after a killed run: deleted")
            return []
        living = sorted(pid for pid in pids if is_dvc(pid))
        if pids and not living:
            path.unlink()
            say(f"DVC's locks of ended processes ({sorted(pids)}) were still there: deleted")
        return living


def remove_parts(project: Path, say: Say) -> None:
    """Remove the unfinished files and folders of processes that are gone."""
    folders = [project / name for name in ("artifacts", "reports", "results", ".work")]
    left = [part for folder in folders for part in folder.rglob(".*.part") if _abandoned(part)]
    for part in left:
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    if left:
        names = ", ".join(str(part.relative_to(project)) for part in left[:3])
        say(f"a killed run left {len(left)} unfinished files ({names}): removed")


def remove_dvc_parts(project: Path, say: Say) -> None:
    """Remove what DVC was copying into its cache when it was killed, or when the disk was full.

    Called when no DVC works in the clone. A cache elsewhere may be another clone's too: it is left alone.
    """
    left = list((project / ".dvc" / "cache").rglob(".*.tmp"))
    for part in left:
        part.unlink(missing_ok=True)
    if left:
        say(f"DVC left {len(left)} half-copied files in its cache: removed")


def _abandoned(part: Path) -> bool:
    """Whether the process that a part is named after (`.record.json.4711.part`) has ended."""
    number = part.name.split(".")[-2]
    return number.isdigit() and not psutil.pid_exists(int(number))


def wait_for_other_dvc(project: Path, say: Say) -> None:
    """Wait until no DVC command that somebody started beside this run holds files or the clone."""
    told = False
    while living := repair_rwlock(project, say) or _lock_holder(project / ".dvc" / "tmp" / "lock"):
        if not told:
            say(f"another DVC command (process {living[0]}) works in this clone: waiting until it ends")
        told = True
        time.sleep(0.5)


def _lock_holder(path: Path) -> list[int]:
    """The process that holds DVC's lock of the clone, if one does."""
    if not path.exists():
        return []
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return [int(file.read().strip() or 0)]
    return []


def _holders(table: Any) -> Iterator[int]:
    for holder in table.get("write", {}).values():
        yield int(holder["pid"])
    for holders in table.get("read", {}).values():
        yield from (int(holder["pid"]) for holder in holders)


@contextmanager
def _guard(path: Path) -> Iterator[None]:
    """Hold the lock under which DVC edits the table: a half-written one must not be taken for broken."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
